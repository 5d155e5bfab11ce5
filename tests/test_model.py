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
from conftest import DEFAULTS, DELETIONS, TINY, build, leaks
from torch import nn
from torch.nn import functional as F

import gpt

B, H, T, D = 2, 3, 7, 5
C, V, L, S = TINY["N_EMBD"], 11, TINY["N_LAYER"], TINY["BLOCK_SIZE"]
BOTH = (True, False)
ON_OFF = {n: list(product(BOTH, repeat=n)) for n in (2, 3, 4)}  # all settings of n flags


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return torch.randn(3, B, H, T, D)


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def ids(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(0))


def layer_norm(x, norm):
    """Each character to mean 0 and variance 1, then times the weights of norm."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * norm.weight


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
    return {k.replace("c_proj.", "out_proj.").replace("c_attn.", "in_proj_"): w for k, w in weights}


@pytest.mark.parametrize("n_head", [1, 2, 4])
@pytest.mark.parametrize("bias, causal, flash", ON_OFF[3])
def test_attention_layer_is_torchs_multihead_attention(flags, n_head, bias, causal, flash):
    flags(ROTARY=False, N_HEAD=n_head, BIAS=bias, CAUSAL=causal, FLASH=flash)
    ours, x = build().layers[0].f, torch.randn(B, T, C)
    theirs = nn.MultiheadAttention(C, n_head, bias=bias, batch_first=True)
    theirs.load_state_dict(renamed(ours))
    mask = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    same(ours(x), theirs(x, x, x, attn_mask=mask)[0])


@pytest.mark.parametrize("n_layer, length", [(1, S), (3, S), (2, 5)])
@pytest.mark.parametrize("bias, flash, pre_norm", ON_OFF[3])
def test_model_is_torchs_encoder(flags, n_layer, bias, flash, pre_norm, length):
    """Embedding, N_LAYER of nn.TransformerEncoderLayer with the same weights, norm and head."""
    flags(ROTARY=False, N_LAYER=n_layer, BIAS=bias, FLASH=flash, PRE_NORM=pre_norm)
    model, text = build(), ids(B, length)
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    x = model.wte(text) + model.wpe(torch.arange(length))
    for one, two in zip(model.layers[::2], model.layers[1::2], strict=True):
        how = dict(norm_first=pre_norm, activation="gelu", batch_first=True, dropout=0, bias=bias)
        theirs = nn.TransformerEncoderLayer(C, gpt.N_HEAD, 4 * C, **how)
        parts = dict(linear1=two.f.c_fc, linear2=two.f.c_proj, norm1=one.norm, norm2=two.norm)
        weights = {f"self_attn.{name}": w for name, w in renamed(one.f).items()}
        for name, part in parts.items():
            weights |= {f"{name}.{key}": w for key, w in part.state_dict().items()}
        theirs.load_state_dict(weights)
        x = theirs(x, src_mask=mask, is_causal=True)
    same(model(text), F.linear(model.ln_f(x), model.wte.weight), 1e-4)
    assert len(model.layers) == 2 * n_layer


# rotate


def turned(x, n_head=1):
    """rotate by the numbers that an attention layer with heads of the size of x's has."""
    vars(gpt).update(N_EMBD=n_head * x.size(-1), N_HEAD=n_head)
    return gpt.rotate(x[None], gpt.Attention().rotation)[0]


@pytest.mark.parametrize("n_head", [1, 3])
@pytest.mark.parametrize("size", [2, 6, 8])
def test_rotate_multiplies_by_complex_numbers(flags, size, n_head):
    """Channels 2j and 2j + 1 are one complex number, turned by t / 10000^(2j / D)."""
    flags()
    x = torch.randn(B, H, S, size)
    result = turned(x, n_head)
    for t, j in product(range(S), range(size // 2)):
        z = torch.complex(x[..., t, 2 * j], x[..., t, 2 * j + 1])
        z = z * cmath.exp(1j * t / 10000 ** (2 * j / size))
        same(torch.complex(result[..., t, 2 * j], result[..., t, 2 * j + 1]), z)


def test_rotate_keeps_norms_and_the_type(flags):
    flags()
    x = torch.randn(B, H, T, 6)
    same(turned(x).norm(dim=-1), x.norm(dim=-1))
    same(turned(x.bfloat16()), turned(x).bfloat16(), 0.02)


@pytest.mark.parametrize("flash", BOTH)
def test_rotary_attention_worked_position_by_position(flags, flash):
    """The score of query t and key s: the real part of q · conj(k), turned by t - s."""
    flags(FLASH=flash)
    layer, x, size = build().layers[0].f, torch.randn(1, S, C), C // gpt.N_HEAD
    qkv = layer.c_attn(x)[0].unflatten(1, (3, gpt.N_HEAD, size))
    heads = torch.zeros(S, gpt.N_HEAD, size)
    for t, h in product(range(S), range(gpt.N_HEAD)):
        q, k = (torch.view_as_complex(qkv[:, i, h].unflatten(1, (-1, 2))) for i in (0, 1))
        scores = []
        for s in range(t + 1):
            angles = (t - s) / 10000 ** (2 * torch.arange(size // 2) / size)
            scores.append((q[t] * k[s].conj() * torch.exp(1j * angles)).sum().real / size**0.5)
        weights = torch.stack(scores).softmax(0)
        heads[t, h] = sum(w * qkv[s, 2, h] for s, w in enumerate(weights))
    same(layer(x)[0], layer.c_proj(heads.flatten(1)))


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

ATTENTION = Counter(Sublayer=1, Attention=1, Linear=2, LayerNorm=1)
MLP = Counter(Sublayer=1, FeedForward=1, Linear=2, GELU=1, LayerNorm=1)
LAYER = ATTENTION + MLP
GONE = {  # deletion: how many parameters go, and which modules
    "POSITION=False": (0, Counter()),
    "ROTARY=False": (-S * C, Counter()),
    "AVERAGE=False": (0, Counter()),
    "NORM=False": ((2 * L + 1) * C, Counter(LayerNorm=2 * L + 1)),
    "PRE_NORM=False": (0, Counter()),
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


@pytest.mark.parametrize(
    "n_layer, n_head, n_embd, params",
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_gpt_2_has_its_published_number_of_parameters(flags, n_layer, n_head, n_embd, params):
    flags(N_LAYER=n_layer, N_HEAD=n_head, N_EMBD=n_embd, BLOCK_SIZE=1024, BIAS=True, ROTARY=False)
    with torch.device("meta"):
        assert sum(p.numel() for p in gpt.GPT(50257).parameters()) == params


# What each flag does


@pytest.mark.parametrize("deletion", DELETIONS, ids=str)
def test_without_layers_it_is_a_bigram(flags, deletion):
    """The logits at a position are those of its character alone."""
    flags(**deletion | {"N_LAYER": 0, "POSITION": deletion.get("ROTARY", True)})
    model, text = build(), ids(B, S)
    same(model(text), model(torch.arange(V)[:, None])[text, 0])


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


@pytest.mark.parametrize("deletion", DELETIONS, ids=str)
def test_two_models_in_turn_each_keep_the_flags_of_their_making(flags, deletion):
    flags()
    full = build().train()
    flags(**deletion)
    other, text = build().train(), ids(B, S)

    def logits(model):
        torch.manual_seed(0)  # of dropout
        return model(text)

    expected = logits(other)
    flags()
    again = logits(full)
    for _ in range(2):
        assert torch.equal(logits(other), expected)
        assert {flag: getattr(gpt, flag) for flag in gpt.FULL} == other.flags
        assert torch.equal(logits(full), again)
        assert other.flags == {flag: (DEFAULTS | TINY | deletion)[flag] for flag in gpt.FULL}


@pytest.mark.parametrize("tie", BOTH)
def test_tie_shares_one_matrix(flags, tie):
    flags(TIE=tie)
    model = gpt.GPT(V)
    assert (model.lm_head.weight is model.wte.weight) == tie
    assert torch.equal(model.lm_head.weight, model.wte.weight) == tie


def deviation(name, inputs, scaled, residual):
    """The standard deviation at which the matrix of that name starts."""
    if not scaled or name == "wte.weight":
        return 0.02
    return 0.0 if residual and name.endswith("c_proj.weight") else inputs**-0.5


@pytest.mark.parametrize("scaled, residual, tie", ON_OFF[3])
def test_matrices_start_at_their_standard_deviation(flags, scaled, residual, tie):
    torch.manual_seed(0)
    changes = dict(SCALED_INIT=scaled, RESIDUAL=residual, TIE=tie)
    flags(N_EMBD=64, BLOCK_SIZE=64, ROTARY=False, **changes)
    matrices = {n: w for n, w in gpt.GPT(64).named_parameters() if w.dim() == 2}
    for name, weight in matrices.items():
        std = deviation(name, weight.size(1), scaled, residual)
        assert weight.std().item() == pytest.approx(std, rel=0.05), name
        assert weight.mean().item() == pytest.approx(0, abs=0.06 * std), name
    assert len(matrices) == 4 * L + 3 - tie


@pytest.mark.parametrize("scaled", BOTH)
def test_with_scaled_init_every_layer_adds_nothing_at_first(flags, scaled):
    flags(SCALED_INIT=scaled)
    model, text = gpt.GPT(V), ids(B, 8)
    first = model.lm_head(model.ln_f(model.wte(text)))
    assert torch.equal(model(text), first) == scaled


@pytest.mark.parametrize("norm", BOTH)
def test_norm_scales_each_character_to_variance_one(flags, norm):
    flags(N_LAYER=0, NORM=norm)
    model, text = build(), ids(B, 8)
    x = model.wte(text)
    same(model(text), (layer_norm(x, model.ln_f) if norm else x) @ model.wte.weight.mT)


@pytest.mark.parametrize("residual, norm, pre_norm", ON_OFF[3])
def test_a_sublayer_norms_adds_and_norms_as_its_flags_say(flags, residual, norm, pre_norm):
    flags(RESIDUAL=residual, NORM=norm, PRE_NORM=pre_norm)
    for layer in build().layers:
        x = 3 * torch.randn(B, T, C) + 1
        y = layer.f(layer_norm(x, layer.norm) if norm and pre_norm else x)
        y = x + y if residual else y
        same(layer(x), layer_norm(y, layer.norm) if norm and not pre_norm else y)


@pytest.mark.parametrize("gelu", BOTH)
def test_gelu_gives_way_to_relu(flags, gelu):
    flags(GELU=gelu, BIAS=True)
    layer, x = build().layers[1].f, torch.randn(B, T, C)
    hidden = F.linear(x, layer.c_fc.weight, layer.c_fc.bias)
    hidden = hidden * torch.special.ndtr(hidden) if gelu else hidden.clamp(0)
    same(layer(x), F.linear(hidden, layer.c_proj.weight, layer.c_proj.bias))


def test_without_projection_heads_lie_side_by_side(flags):
    flags(PROJECTION=False, POSITION=False)
    layer, x = build().layers[0].f, torch.randn(B, T, C)
    q, k, v = layer.c_attn(x).chunk(3, -1)
    for start in range(0, C, C // gpt.N_HEAD):
        head = [part[..., start : start + C // gpt.N_HEAD] for part in (q, k, v)]
        one = F.scaled_dot_product_attention(*head, is_causal=True)
        same(layer(x)[..., start : start + C // gpt.N_HEAD], one)


def test_without_query_key_a_layer_projects_the_running_mean_of_the_values(flags):
    flags(QUERY_KEY=False)
    layer, x = build().layers[0].f, torch.randn(B, T, C)
    same(layer(x), layer.c_proj(layer.c_attn(x).cumsum(1) / torch.arange(1, T + 1)[:, None]))


def test_bias_off_leaves_no_bias_anywhere(flags):
    for bias in BOTH:
        flags(BIAS=bias, TIE=False)
        linear = [m for m in gpt.GPT(V).modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
        assert [m.bias is not None for m in linear] == [bias] * (len(linear) - 1) + [False]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_dropout_zeroes_its_share_of_what_each_layer_adds_in_training_only(flags, share):
    """What is left is larger by 1 / (1 - share)."""
    flags(DROPOUT=share, RESIDUAL=False)
    for layer in build().layers:
        x = torch.randn(B * 100, S, C)
        quiet, noisy = layer(x), layer.train()(x)
        left = noisy != 0
        assert left.float().mean().item() == pytest.approx(1 - share, abs=0.02)
        same(noisy[left], quiet[left] / max(1 - share, 1e-9))
        assert torch.equal(layer.eval()(x), quiet)


# The shape comments of gpt.py

SOURCE = Path(gpt.__file__).read_text("utf-8")


def comments(source):
    """What the shape comments of source say between their brackets, by line."""
    lines = enumerate(source.splitlines(), 1)
    return {n: found[1] for n, line in lines if (found := re.search(r"# \(([^)]*)\)", line))}


class Watched(ast.NodeTransformer):
    """Calls watch(line, value, ...) with what each line that has a shape comment assigns or
    returns."""

    def __init__(self, lines):
        self.lines = lines

    def visit_Assign(self, node):
        names = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
        watch = ast.parse(f"watch({node.end_lineno}, {', '.join(names)})").body
        return [node] + watch * (node.end_lineno in self.lines)

    def visit_Return(self, node):
        watch = ast.parse(f"return watch({node.end_lineno}, {ast.unparse(node)[6:]})").body
        return watch if node.end_lineno in self.lines else node


def check_shapes(source):
    """Runs source; returns the lines of its shape comments that are wrong, or were never run."""
    shapes, wrong, run = comments(source), set(), set()
    vocab = "".join(map(chr, range(65, 94)))
    train, val = (torch.arange(n * 13 + 1) % 29 for n in (31, 7))
    sizes = dict(N=len(train), T=13, C=110, H=5, D=22, V=29)  # and B, another in each room

    def watch(line, *values):
        run.add(line)
        for tensor in values:
            if tensor is not None and tensor.shape != eval(f"({shapes[line]},)", sizes):
                wrong.add(line)
        return values[-1]

    room = dict(__name__="watched", __file__=gpt.__file__, watch=watch)
    exec(compile(Watched(shapes).visit(ast.parse(source)), "gpt.py", "exec"), room)
    room |= dict(N_EMBD=110, N_HEAD=5, N_LAYER=1, BLOCK_SIZE=13, BATCH_SIZE=7, SAMPLE=1, STEPS=1)
    room |= dict(DEVICE="cpu", AVERAGE=False)
    for flag in ("CAUSAL", "FLASH", "ROTARY"):
        room |= {flag: False}
        sizes["B"] = 7
        model, _ = room["train"](room["GPT"](29), train, val, vocab)
        sizes["B"] = 8
        room["evaluate"](model, train[: 8 * 13 + 1])
        sizes["B"] = 1
        room["sample"](model, vocab, vocab[:20])
        room |= {flag: True}
    return wrong, set(shapes) - run


def test_shape_comments_are_right_and_all_run(flags):
    assert len(comments(SOURCE)) > 15
    assert check_shapes(SOURCE) == (set(), set())


@pytest.mark.parametrize("line", comments(SOURCE))
def test_a_wrong_shape_comment_is_found(flags, line):
    lines = SOURCE.splitlines()
    lines[line - 1] = re.sub(r"(# \([^)]*)", r"\1 + 1", lines[line - 1])
    assert check_shapes("\n".join(lines)) == ({line}, set())


def test_a_shape_comment_that_never_runs_is_found(flags):
    source = SOURCE + "\n\ndef never(x):\n    return x  # (B, T)\n"
    assert check_shapes(source) == (set(), {len(source.splitlines())})
