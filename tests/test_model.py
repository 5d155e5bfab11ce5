"""The model against torch's own layers, naive loops and formulas worked out by hand."""

import ast
import cmath
import re
from collections import Counter
from itertools import product
from math import exp
from pathlib import Path

import pytest
import torch
from conftest import DELETIONS, TINY, build, leaks
from torch import nn
from torch.nn import functional as F

import gpt

B, H, T, D = 2, 3, 7, 5
BOTH = (True, False)
ON_OFF = {n: list(product(BOTH, repeat=n)) for n in (2, 3, 4)}  # all settings of n flags


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return torch.randn(3, B, H, T, D)


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def ids(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(0))


# attention


@pytest.mark.parametrize("flash, causal, scale", ON_OFF[3])
def test_attention_is_torchs(qkv, flags, flash, causal, scale):
    flags(FLASH=flash, CAUSAL=causal, SCALE=scale)
    how = dict(is_causal=causal, scale=D**-0.5 if scale else 1)
    same(gpt.attention(*qkv), F.scaled_dot_product_attention(*qkv, **how))


@pytest.mark.parametrize("flash, causal, scale, look", ON_OFF[4])
def test_attention_is_a_weighted_mean_worked_position_by_position(
    qkv, flags, flash, causal, scale, look
):
    flags(FLASH=flash, CAUSAL=causal, SCALE=scale, QUERY_KEY=look)
    q, k, v = qkv
    result = gpt.attention(q, k, v) if look else gpt.attention(None, None, v)
    for b, h, t in product(range(B), range(H), range(T)):
        seen = range(t + 1 if causal else T)
        scores = [float(q[b, h, t] @ k[b, h, s]) * (D**-0.5 if scale else 1) for s in seen]
        weights = [exp(score) if look else 1 for score in scores]
        mean = sum(w * v[b, h, s] for w, s in zip(weights, seen, strict=True)) / sum(weights)
        same(result[b, h, t], mean)


def test_without_query_key_attention_is_the_running_mean_of_the_values(qkv, flags):
    flags(QUERY_KEY=False)
    v = qkv[2]
    same(gpt.attention(None, None, v), v.cumsum(-2) / torch.arange(1, T + 1)[:, None])
    for t in range(T):
        same(gpt.attention(None, None, v)[..., t, :], v[..., : t + 1, :].mean(-2))


def renamed(attention):
    """The weights of gpt.Attention under the names that nn.MultiheadAttention has for them."""
    weights = attention.state_dict().items()
    return {k.replace("proj.", "out_proj.").replace("qkv.", "in_proj_"): w for k, w in weights}


@pytest.mark.parametrize("n_head", [1, 2, TINY["N_EMBD"]])
@pytest.mark.parametrize("bias, causal, flash", ON_OFF[3])
def test_attention_layer_is_torchs_multihead_attention(flags, n_head, bias, causal, flash):
    flags(ROTARY=False, N_HEAD=n_head, BIAS=bias, CAUSAL=causal, FLASH=flash)
    ours, x = build().layers[0], torch.randn(B, T, gpt.N_EMBD)
    theirs = nn.MultiheadAttention(gpt.N_EMBD, n_head, bias=bias, batch_first=True)
    theirs.load_state_dict(renamed(ours))
    mask = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    same(ours(x), theirs(x, x, x, attn_mask=mask)[0])


@pytest.mark.parametrize("n_layer, bias, flash", list(product((1, 3), BOTH, BOTH)))
def test_model_is_torchs_pre_norm_encoder(flags, n_layer, bias, flash):
    """Embedding, N_LAYER of nn.TransformerEncoderLayer with the same weights, norm and head."""
    flags(ROTARY=False, N_LAYER=n_layer, BIAS=bias, FLASH=flash)
    model, text = build(), ids(B, gpt.BLOCK_SIZE)
    mask = nn.Transformer.generate_square_subsequent_mask(gpt.BLOCK_SIZE)
    x = model.wte(text) + model.wpe(torch.arange(gpt.BLOCK_SIZE))
    for i in range(0, 2 * n_layer, 2):
        how = dict(norm_first=True, activation="gelu", batch_first=True, dropout=0, bias=bias)
        theirs = nn.TransformerEncoderLayer(gpt.N_EMBD, gpt.N_HEAD, 4 * gpt.N_EMBD, **how)
        parts = dict(linear1=model.layers[i + 1].up, linear2=model.layers[i + 1].proj)
        parts |= dict(norm1=model.norms[i], norm2=model.norms[i + 1])
        weights = {f"self_attn.{name}": w for name, w in renamed(model.layers[i]).items()}
        weights |= {
            f"{k}.{n}": w for k, part in parts.items() for n, w in part.state_dict().items()
        }
        theirs.load_state_dict(weights)
        x = theirs(x, src_mask=mask, is_causal=True)
    same(model(text), F.linear(model.norm(x), model.wte.weight), 1e-4)


# rotate


def test_rotate_keeps_norms(qkv):
    same(gpt.rotate(qkv[0]).norm(dim=-1), qkv[0].norm(dim=-1))


def test_rotated_scores_depend_on_the_distance_alone(qkv):
    q, k = (x[:, :, :1].expand(-1, -1, T, -1) for x in qkv[:2])
    scores = gpt.rotate(q) @ gpt.rotate(k).mT
    same(scores[..., 1:, 1:], scores[..., :-1, :-1])
    assert (scores[..., 0, 0] - scores[..., 1, 0]).abs().min() > 1e-3


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_rotate_multiplies_by_complex_numbers(size):
    """Channels j and j + half are one complex number, turned by t / 10000^(j / half)."""
    x, half = torch.randn(B, H, T, size), size // 2
    result = gpt.rotate(x)
    for t, j in product(range(T), range(half)):
        z = torch.complex(x[..., t, j], x[..., t, j + half])
        z = z * cmath.exp(1j * t / 10000 ** (j / half))
        same(torch.complex(result[..., t, j], result[..., t, j + half]), z)
    assert torch.equal(result[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("rotary", BOTH)
def test_order_comes_from_positions_alone(flags, rotary):
    """Without POSITION and the causal mask a shuffled text has its outputs shuffled alike."""
    shuffled, text = torch.arange(8).flip(0), ids(B, 8)
    for position in BOTH:
        flags(CAUSAL=False, POSITION=position, ROTARY=rotary)
        model = build()
        change = (model(text)[:, shuffled] - model(text[:, shuffled])).abs().max()
        assert change > 0.1 if position else change < 1e-4


# What each flag removes

C, V, L, S = TINY["N_EMBD"], 11, TINY["N_LAYER"], TINY["BLOCK_SIZE"]
ATTENTION = Counter(Attention=1, Linear=2, LayerNorm=1)
MLP = Counter(Sequential=1, Linear=2, GELU=1, LayerNorm=1)
LAYER = ATTENTION + MLP
GONE = {  # deletion: how many parameters go, and which modules
    "POSITION=False": (0, Counter()),
    "ROTARY=False": (-S * C, Counter()),
    "AVERAGE=False": (0, Counter()),
    "NORM=False": ((2 * L + 1) * C, Counter(LayerNorm=2 * L + 1)),
    "RESIDUAL=False": (0, Counter()),
    "MLP=False": (L * (C * 4 * C + 4 * C * C + C), MLP + MLP),
    "ATTENTION=False": (L * (C * 3 * C + C * C + C), ATTENTION + ATTENTION),
    "QUERY_KEY=False": (L * C * 2 * C, Counter()),
    "SCALE=False": (0, Counter()),
    "CAUSAL=False": (0, Counter()),
    "PROJECTION=False": (L * C * C, Counter(Linear=L)),
    "GELU=False": (0, Counter(GELU=L)),
    "TIE=False": (-V * C, Counter()),
    "SCALED_INIT=False": (0, Counter()),
    "FLASH=False": (0, Counter()),
    "BIAS=True": (-(L * (3 * C + C + 4 * C + C) + (2 * L + 1) * C), Counter()),
    "BFLOAT16=True": (0, Counter()),
    "N_HEAD=1": (0, Counter()),
    "N_LAYER=1": (12 * C * C + 2 * C, LAYER),
    "N_LAYER=0": (L * (12 * C * C + 2 * C), LAYER + LAYER),
    "OPTIMIZER=sgd": (0, Counter()),
    "DROPOUT=0.2": (0, Counter()),
}


@pytest.mark.parametrize("deletion", DELETIONS, ids=str)
def test_deletion_removes_its_parameters_and_modules(flags, deletion):
    flags()
    full = gpt.GPT(V)
    flags(**deletion)
    left = gpt.GPT(V)
    params = [sum(p.numel() for p in model.parameters()) for model in (full, left)]
    modules = [Counter(type(m).__name__ for m in model.modules()) for model in (full, left)]
    assert params[0] == V * C + L * (12 * C * C + 2 * C) + C
    key = "{}={}".format(*next(iter(deletion.items())))
    assert (params[0] - params[1], modules[0] - modules[1]) == GONE[key]


def test_gpt_2_small_has_its_published_number_of_parameters(flags):
    flags(N_LAYER=12, N_HEAD=12, N_EMBD=768, BLOCK_SIZE=1024, BIAS=True, TIE=True, ROTARY=False)
    with torch.device("meta"):
        assert sum(p.numel() for p in gpt.GPT(50257).parameters()) == 124_439_808


# What each flag does


@pytest.mark.parametrize("deletion", DELETIONS, ids=str)
def test_without_layers_it_is_a_bigram(flags, deletion):
    """The logits at a position are those of its character alone."""
    flags(**deletion | {"N_LAYER": 0})
    model, text = build(), ids(B, gpt.BLOCK_SIZE)
    same(model(text), model(torch.arange(11)[:, None])[text, 0])


@pytest.mark.parametrize("look, rotary, flash", ON_OFF[3])
def test_only_the_causal_mask_hides_later_characters(flags, look, rotary, flash):
    for causal in BOTH:
        flags(CAUSAL=causal, QUERY_KEY=look, ROTARY=rotary, FLASH=flash)
        assert leaks(build()) != causal


def test_flash_on_and_off_give_the_same_logits(flags):
    logits = []
    for flash in BOTH:
        flags(FLASH=flash)
        logits.append(build()(ids(B, 8)))
    same(*logits)


@pytest.mark.parametrize("tie", BOTH)
def test_tie_shares_one_matrix(flags, tie):
    flags(TIE=tie)
    model = gpt.GPT(V)
    assert (model.head.weight is model.wte.weight) == tie
    assert torch.equal(model.head.weight, model.wte.weight) == tie


@pytest.mark.parametrize("scaled, residual", ON_OFF[2])
def test_matrices_start_at_their_standard_deviation(flags, scaled, residual):
    """With SCALED_INIT 1 / √inputs, and 0 where a layer adds to x; without it 0.02 everywhere."""
    torch.manual_seed(0)
    flags(N_EMBD=64, BLOCK_SIZE=64, ROTARY=False, TIE=False, SCALED_INIT=scaled, RESIDUAL=residual)
    for name, weight in gpt.GPT(64).named_parameters():
        if weight.dim() == 2:
            silent = residual and name.endswith("proj.weight")
            std = 0.02 if not scaled else 0 if silent else weight.size(1) ** -0.5
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert weight.mean().item() == pytest.approx(0, abs=0.06 * std), name


@pytest.mark.parametrize("scaled", BOTH)
def test_with_scaled_init_every_layer_adds_nothing_at_first(flags, scaled):
    flags(SCALED_INIT=scaled, BIAS=False)
    model, text = gpt.GPT(V), ids(B, 8)
    first = model.head(model.norm(model.wte(text)))
    assert torch.equal(model(text), first) == scaled


@pytest.mark.parametrize("norm", BOTH)
def test_norm_scales_each_character_to_variance_one(flags, norm):
    flags(N_LAYER=0, NORM=norm)
    model, text = build(), ids(B, 8)
    x = model.wte(text)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    x = (x - mean) / (var + 1e-5).sqrt() * model.norm.weight if norm else x
    same(model(text), x @ model.wte.weight.mT)


@pytest.mark.parametrize("residual", BOTH)
def test_residual_adds_what_a_layer_got(flags, residual):
    flags(RESIDUAL=residual, ATTENTION=False, NORM=False, N_LAYER=1)
    model, text = build(), ids(B, 8)
    x = model.wte(text)
    y = model.layers[0](x)
    same(model(text), model.head(x + y if residual else y))


@pytest.mark.parametrize("gelu", BOTH)
def test_gelu_gives_way_to_relu(flags, gelu):
    flags(GELU=gelu, BIAS=True)
    layer, x = build().layers[1], torch.randn(B, T, C)
    hidden = F.linear(x, layer.up.weight, layer.up.bias)
    hidden = hidden * torch.special.ndtr(hidden) if gelu else hidden.clamp(0)
    same(layer(x), F.linear(hidden, layer.proj.weight, layer.proj.bias))


def test_without_projection_heads_lie_side_by_side(flags):
    flags(PROJECTION=False)
    layer, x = build().layers[0], torch.randn(B, T, C)
    q, k, v = layer.qkv(x).chunk(3, -1)
    for start in range(0, C, C // gpt.N_HEAD):
        head = [part[..., start : start + C // gpt.N_HEAD] for part in (q, k, v)]
        one = gpt.attention(gpt.rotate(head[0]), gpt.rotate(head[1]), head[2])
        same(layer(x)[..., start : start + C // gpt.N_HEAD], one)


def test_bias_off_leaves_no_bias_anywhere(flags):
    for bias in BOTH:
        flags(BIAS=bias, TIE=False)
        linear = [m for m in gpt.GPT(V).modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
        assert [m.bias is not None for m in linear] == [bias] * (len(linear) - 1) + [False]


def test_dropout_acts_in_training_only(flags):
    flags(DROPOUT=0.5)
    model, text = build(), ids(B, 8)
    quiet, noisy = model(text), model.train()(text)
    assert not torch.allclose(quiet, noisy) and not torch.allclose(noisy, model(text))
    flags(DROPOUT=0.0)
    assert torch.equal(model(text), quiet)
    flags(DROPOUT=1.0)
    assert torch.equal(model(text), model.head(model.norm(model.wte(text))))


# The shape comments of gpt.py

SOURCE = Path(gpt.__file__).read_text("utf-8")


def comments(source):
    """What the shape comments of source say between their brackets, by line."""
    lines = enumerate(source.splitlines(), 1)
    return {n: found[1] for n, line in lines if (found := re.search(r"# \(([^)]*)\)", line))}


class Watched(ast.NodeTransformer):
    """Calls watch(line, value, ...) with what each line that has a shape comment assigns (but for
    a variable called rest) or returns."""

    def __init__(self, lines):
        self.lines = lines

    def visit_Assign(self, node):
        names = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
        names = ", ".join(name for name in names if name != "rest")
        watch = ast.parse(f"watch({node.end_lineno}, {names})").body
        return [node] + watch * (node.end_lineno in self.lines)

    def visit_Return(self, node):
        watch = ast.parse(f"return watch({node.end_lineno}, {ast.unparse(node)[6:]})").body
        return watch if node.end_lineno in self.lines else node


def check_shapes(source):
    """Runs source; returns the lines of its shape comments that are wrong, or were never run."""
    shapes, wrong, run = comments(source), set(), set()
    text = torch.arange(13 * 19 + 1) % 29
    sizes = dict(N=len(text), T=13, C=110, H=5, D=22, V=29)  # and B, another in each room

    def watch(line, *values):
        run.add(line)
        for value in values:
            for tensor in value if isinstance(value, list) else [value]:
                if tuple(tensor.shape) != eval(f"({shapes[line]},)", sizes):
                    wrong.add(line)
        return values[-1]

    room = dict(__name__="watched", __file__=gpt.__file__, watch=watch)
    exec(compile(Watched(shapes).visit(ast.parse(source)), "gpt.py", "exec"), room)
    room |= dict(N_EMBD=110, N_HEAD=5, BLOCK_SIZE=13, BATCH_SIZE=7, SAMPLE=1)
    room |= dict(DEVICE="cpu")
    for room["CAUSAL"], room["FLASH"], room["ROTARY"] in ON_OFF[3]:
        sizes["B"] = 7
        model = room["GPT"](29)
        model(room["batch"](text, torch.Generator())[0])
        sizes["B"] = 19
        room["evaluate"](model, text)
        sizes["B"] = 1
        room["sample"](model, text[:13])
    return wrong, set(shapes) - run


def test_shape_comments_are_right_and_all_run():
    assert len(comments(SOURCE)) > 15
    assert check_shapes(SOURCE) == (set(), set())


@pytest.mark.parametrize("line", comments(SOURCE))
def test_a_wrong_shape_comment_is_found(line):
    lines = SOURCE.splitlines()
    lines[line - 1] = lines[line - 1].removesuffix(")") + " + 1)"
    assert check_shapes("\n".join(lines)) == ({line}, set())


def test_a_shape_comment_that_never_runs_is_found():
    source = SOURCE + "\n\ndef never(x):\n    return x  # (B, T)\n"
    assert check_shapes(source) == (set(), {len(source.splitlines())})
