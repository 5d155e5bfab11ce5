"""The model against torch's own layers, naive loops and formulas worked out by hand."""

import ast
import cmath
import re
from collections import Counter
from itertools import product
from math import exp, log
from pathlib import Path

import pytest
import torch
from conftest import DEFAULTS, DELETIONS, OWN, TINY, build, leaks
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

import gpt

B, H, T, D = 2, 3, 7, 5
C, V, L, S = TINY["N_EMBD"], 11, TINY["N_LAYER"], TINY["BLOCK_SIZE"]
BOTH = (True, False)


def on_off(*names):
    """Run the test with every setting of the arguments with these names."""
    return pytest.mark.parametrize(names, list(product(BOTH, repeat=len(names))))


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return torch.randn(3, B, H, T, D)


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def ids(*shape, vocab_size=V):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def layer_norm(x, norm):
    """Each character to mean 0 and variance 1, then times the weights of norm."""
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight


# attention


@on_off("causal", "scale", "flash")
@pytest.mark.parametrize("size", [1, 30])
def test_attention_is_torchs(qkv, causal, scale, flash, size):
    q, k, v = qkv * size
    expected = F.scaled_dot_product_attention(
        q, k, v, None, 0, causal, scale=D**-0.5 if scale else 1
    )
    same(gpt.attention(q, k, v, causal, scale, flash), expected)


@on_off("causal", "scale", "flash", "query_key")
def test_attention_is_a_weighted_mean_worked_character_by_character(
    qkv, causal, scale, flash, query_key
):
    """Without q and k it is the plain mean of the values that are visible."""
    q, k, v = qkv
    if not query_key:
        q, k = None, None
    result = gpt.attention(q, k, v, causal=causal, scale=scale, flash=flash)
    assert result.shape == v.shape
    for b, h, t in product(range(B), range(H), range(T)):
        weights = torch.ones(t + 1 if causal else T)
        for s in range(len(weights)):
            if query_key:
                score = sum(q[b, h, t, d].item() * k[b, h, s, d].item() for d in range(D))
                weights[s] = exp(score / D**0.5 if scale else score)
        mean = sum(weights[s] * v[b, h, s] for s in range(len(weights))) / weights.sum()
        same(result[b, h, t], mean)


@torch.no_grad()
def copy_attention(ours, theirs):
    """Give theirs, an nn.MultiheadAttention, the weights of ours, a gpt.Attention."""
    parts = ours.query, ours.key, ours.value
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    theirs.out_proj.load_state_dict(ours.projection.state_dict())
    if theirs.in_proj_bias is not None:
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))


@on_off("bias", "causal", "flash")
@pytest.mark.parametrize("n_head", [1, 2, 4])
def test_the_attention_layer_is_torchs(flags, n_head, bias, causal, flash):
    flags(POSITION=False, N_HEAD=n_head, BIAS=bias, CAUSAL=causal, FLASH=flash)
    ours, x = build().layers.attention2.f, torch.randn(B, T, C)
    theirs = nn.MultiheadAttention(C, n_head, bias=bias, batch_first=True)
    copy_attention(ours, theirs)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    same(ours(x), theirs(x, x, x, attn_mask=mask)[0])


@on_off("bias", "gelu", "pre_norm")
@pytest.mark.parametrize("n_layer, length", [(1, S), (3, S), (2, 5)])
def test_the_model_is_torchs_encoder(flags, n_layer, length, bias, gelu, pre_norm):
    """Embeddings, N_LAYER of nn.TransformerEncoderLayer with the same weights, norm and head."""
    flags(ROTARY=False, N_LAYER=n_layer, BIAS=bias, GELU=gelu, PRE_NORM=pre_norm)
    model, text = build(), ids(B, length)
    layers = dict(model.layers.named_children())
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    x = model.wte(text) + model.wpe(torch.arange(length))
    for n in range(1, n_layer + 1):
        one, two = layers.pop(f"attention{n}"), layers.pop(f"feed_forward{n}")
        how = dict(norm_first=pre_norm, activation="gelu" if gelu else "relu", bias=bias)
        theirs = nn.TransformerEncoderLayer(C, 2, 4 * C, dropout=0, batch_first=True, **how)
        copy_attention(one.f, theirs.self_attn)
        theirs.linear1.load_state_dict(two.f.expansion.state_dict())
        theirs.linear2.load_state_dict(two.f.projection.state_dict())
        theirs.norm1.load_state_dict(one.norm.state_dict())
        theirs.norm2.load_state_dict(two.norm.state_dict())
        x = theirs(x, src_mask=mask, is_causal=True)
    x = F.layer_norm(x, [C], model.ln_f.weight, model.ln_f.bias)
    same(model(text), x @ model.wte.weight.mT, 1e-4)
    assert not layers


# Positions


@pytest.fixture
def turned(flags, monkeypatch):
    """turned(x, n_head) gives the queries (B, H, T, D) that the layer puts into attention for x
    (B, T, C), where what they are before they are turned is x itself."""
    given = []
    monkeypatch.setattr(gpt, "attention", lambda q, k, v, **_: given.extend([q, k]) or v)

    def turn(x, n_head):
        flags(N_EMBD=x.size(-1), N_HEAD=n_head, BLOCK_SIZE=T + 2)
        layer = gpt.Attention()
        nn.init.eye_(layer.query.weight)
        nn.init.eye_(layer.key.weight)
        layer(x)
        q, k = given[-2:]
        assert torch.equal(q, k)
        return q

    return turn


@pytest.mark.parametrize("n_head", [1, 3])
@pytest.mark.parametrize("size", [2, 6, 8])
@torch.no_grad()
def test_queries_and_keys_are_multiplied_by_complex_numbers(turned, size, n_head):
    """Channels 2j and 2j + 1 of a head are one complex number, turned by t / 10000^(2j / D)."""
    x = torch.randn(B, T, n_head * size)
    result = turned(x, n_head)
    assert result.shape == (B, n_head, T, size)
    for h, t, j in product(range(n_head), range(T), range(size // 2)):
        one = h * size + 2 * j
        z = torch.complex(x[:, t, one], x[:, t, one + 1])
        z = z * cmath.exp(1j * t / 10000 ** (2 * j / size))
        same(torch.complex(result[:, h, t, 2 * j], result[:, h, t, 2 * j + 1]), z)
    with torch.autocast("cpu", torch.bfloat16):
        same(turned(x, n_head).float(), result, 0.03)


@torch.no_grad()
def test_scores_of_rotated_characters_depend_on_their_distance_alone(turned):
    """One query and one key at all places: each diagonal of their scores holds one number."""
    q, k = torch.randn(2, 1, 1, 6)
    scores = turned(q.expand(1, T, 6), 1)[0, 0] @ turned(k.expand(1, T, 6), 1)[0, 0].mT
    for distance in range(1 - T, T):
        diagonal = scores.diagonal(distance)
        same(diagonal, diagonal[:1].expand(len(diagonal)))
    assert scores[0].std() > 0.01


@on_off("flash")
@torch.no_grad()
def test_rotary_attention_worked_character_by_character(flags, flash):
    """The score of query t and key s: the real part of q · conj(k), turned by t - s."""
    flags(FLASH=flash)
    layer, x, size = build().layers.attention1.f, torch.randn(1, S, C), C // 2
    q, k, v = (part(x)[0].unflatten(1, (2, size)) for part in (layer.query, layer.key, layer.value))
    heads = torch.zeros(S, 2, size)
    for t, h in product(range(S), range(2)):
        weights = torch.zeros(t + 1)
        for s, j in product(range(t + 1), range(0, size, 2)):
            turn = cmath.exp(1j * (t - s) / 10000 ** (j / size))
            key = complex(k[s, h, j], -k[s, h, j + 1])
            weights[s] += (complex(q[t, h, j], q[t, h, j + 1]) * key * turn).real / size**0.5
        heads[t, h] = weights.softmax(0) @ v[: t + 1, h]
    same(layer(x)[0], layer.projection(heads.flatten(1)), 1e-4)


@on_off("rotary")
def test_order_comes_from_positions_alone(flags, rotary):
    """Without POSITION and the causal mask a shuffled text has its outputs shuffled alike."""
    shuffled, text = torch.arange(S).flip(0), ids(B, S)
    for position in BOTH:
        flags(CAUSAL=False, POSITION=position, ROTARY=rotary)
        model = build()
        change = (model(text)[:, shuffled] - model(text[:, shuffled])).abs().max()
        assert change > 0.1 if position else change < 1e-4


@on_off("query_key", "rotary", "flash")
def test_only_the_causal_mask_hides_later_characters(flags, query_key, rotary, flash):
    """To the last bit."""
    for causal in BOTH:
        flags(CAUSAL=causal, QUERY_KEY=query_key, ROTARY=rotary, FLASH=flash)
        assert leaks(build()) != causal


# What each flag removes

ROTATION = dict(stack=L, view_as_complex=L, mul=L)
GONE = {  # deletion: how many parameters go, and which operations
    "ATTENTION=False": (
        L * (4 * C * C + C),
        dict(linear=4 * L, scaled_dot_product_attention=L, layer_norm=L, add=L) | ROTATION,
    ),
    "QUERY_KEY=False": (
        L * 2 * C * C,
        dict(linear=2 * L, scaled_dot_product_attention=L) | ROTATION,
    ),
    "SCALE=False": (0, {}),
    "CAUSAL=False": (0, {}),
    "FLASH=False": (0, dict(scaled_dot_product_attention=L)),
    "N_HEAD=1": (0, {}),
    "PROJECTION=False": (L * C * C, dict(linear=L)),
    "POSITION=False": (0, ROTATION),
    "ROTARY=False": (-S * C, ROTATION),
    "MLP=False": (L * (8 * C * C + C), dict(linear=2 * L, gelu=L, layer_norm=L, add=L)),
    "GELU=False": (0, dict(gelu=L)),
    "RESIDUAL=False": (0, dict(add=2 * L)),
    "NORM=False": ((2 * L + 1) * C, dict(layer_norm=2 * L + 1)),
    "PRE_NORM=False": (0, {}),
    "DROPOUT=0.2": (0, {}),
    "N_LAYER=1": (
        12 * C * C + 2 * C,
        dict(linear=6, scaled_dot_product_attention=1, gelu=1, layer_norm=2, add=2)
        | dict.fromkeys(ROTATION, 1),
    ),
    "N_LAYER=0": (
        L * (12 * C * C + 2 * C),
        dict(linear=6 * L, scaled_dot_product_attention=L, gelu=L, layer_norm=2 * L, add=2 * L)
        | ROTATION,
    ),
    "TIE=False": (-V * C, {}),
    "BIAS=True": (-L * (9 * C + 2 * C) - C, {}),
    "SCALED_INIT=False": (0, {}),
    "OPTIMIZER=sgd": (0, {}),
    "AVERAGE=False": (0, {}),
    "BFLOAT16=True": (0, {}),
}


class Operations(TorchFunctionMode):
    """Counts the operations that are called, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_function__(self, operation, types, args=(), kwargs=None):
        self.count[resolve_name(operation).rpartition(".")[2].strip("_")] += 1
        return operation(*args, **kwargs or {})


def measure():
    """The parameters of a model with the flags as they are, and the operations of its forward."""
    model = gpt.GPT(V)
    with Operations() as operations:
        model(ids(B, S))
    return sum(weight.numel() for weight in model.parameters()), operations.count


@pytest.mark.parametrize("deletion", DELETIONS, ids=str)
def test_a_deletion_removes_its_parameters_and_operations(flags, deletion):
    flags()
    params, operations = measure()
    flags(**deletion)
    params_left, operations_left = measure()
    assert params == V * C + L * (12 * C * C + 2 * C) + C
    params_gone, operations_gone = GONE["{}={}".format(*deletion.popitem())]
    assert params - params_left == params_gone
    known = Counter(linear=1, gelu=1, layer_norm=1, add=1, scaled_dot_product_attention=1)
    for name in known + Counter(ROTATION):
        assert operations[name] > 0, name
        expected = operations_gone.get(name, 0)
        assert max(operations[name] - operations_left[name], 0) == expected, name


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


@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_a_model_keeps_the_flags_of_its_making(flags, monkeypatch, deletion):
    """Its outputs are the same to the last bit when there are no flags any more."""
    flags(**deletion)
    model, text = build().train(), ids(B, S)

    def logits():
        torch.manual_seed(0)  # of dropout
        return model(text)

    expected = logits()
    for flag in DEFAULTS:
        monkeypatch.delattr(gpt, flag)
    assert torch.equal(logits(), expected)
    for flag in DEFAULTS:
        assert not hasattr(gpt, flag)


@pytest.mark.parametrize("deletion", [{}, {"NORM": False}, {"TIE": False}], ids=str)
def test_without_layers_it_is_a_bigram(flags, deletion):
    """The logits at a place are those of its character alone."""
    flags(N_LAYER=0, **deletion)
    model, text = build(), ids(B, S)
    x = model.wte.weight
    if "NORM" not in deletion:
        x = layer_norm(x, model.ln_f)
    same(model(text), (x @ model.lm_head.weight.mT)[text])


@on_off("tie")
def test_tie_shares_one_matrix(flags, tie):
    flags(TIE=tie)
    model = gpt.GPT(V)
    assert (model.lm_head.weight is model.wte.weight) == tie
    assert torch.equal(model.lm_head.weight, model.wte.weight) == tie


@on_off("residual", "norm", "pre_norm")
def test_a_sublayer_norms_adds_and_norms_as_its_flags_say(flags, residual, norm, pre_norm):
    flags(RESIDUAL=residual, NORM=norm, PRE_NORM=pre_norm)
    for layer in build().layers:
        x = y = 3 * torch.randn(B, T, C) + 1
        if norm and pre_norm:
            y = layer_norm(y, layer.norm)
        y = layer.f(y)
        if residual:
            y = x + y
        if norm and not pre_norm:
            y = layer_norm(y, layer.norm)
        same(layer(x), y)


def test_without_projection_heads_lie_side_by_side(flags):
    flags(PROJECTION=False, POSITION=False)
    layer, x = build().layers.attention1.f, torch.randn(B, T, C)
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    half = C // 2
    one = F.scaled_dot_product_attention(
        q[..., :half], k[..., :half], v[..., :half], is_causal=True
    )
    two = F.scaled_dot_product_attention(
        q[..., half:], k[..., half:], v[..., half:], is_causal=True
    )
    same(layer(x), torch.cat([one, two], -1))


def test_without_query_key_a_layer_projects_the_running_mean_of_the_values(flags):
    flags(QUERY_KEY=False)
    layer, x = build().layers.attention1.f, torch.randn(B, T, C)
    same(layer(x), layer.projection(layer.value(x).cumsum(1) / torch.arange(1, T + 1)[:, None]))


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


# Where training starts


@on_off("tie")
@pytest.mark.parametrize("n_embd", [16, 64, 256, 768])
@pytest.mark.parametrize(
    "deletion", [{}, {"ROTARY": False, "NORM": False}, {"RESIDUAL": False}], ids=str
)
def test_the_first_loss_is_that_of_knowing_nothing(flags, n_embd, tie, deletion):
    """ln V, which is 4.17 for 65 characters, at every width."""
    flags(N_EMBD=n_embd, N_HEAD=4, BLOCK_SIZE=64, TIE=tie, **deletion)
    text = ids(4, 65, vocab_size=65)
    loss = F.cross_entropy(gpt.GPT(65)(text[:, :-1]).mT, text[:, 1:])
    assert loss.item() == pytest.approx(log(65), abs=0.1)


@pytest.mark.parametrize("deletion", DELETIONS, ids=str)
@pytest.mark.parametrize("others", [{}, {"ROTARY": False, "TIE": False, "BIAS": True}], ids=str)
def test_no_deletion_changes_how_the_other_parts_start(flags, others, deletion):
    flags(**others)
    full = gpt.GPT(V).state_dict()
    torch.manual_seed(7)  # the flag SEED alone draws weights
    flags(**others | deletion)
    left = gpt.GPT(V).state_dict()
    changed = {name for name in full.keys() & left if not torch.equal(full[name], left[name])}
    projections = {name for name in full if "projection.weight" in name}
    matrices = {name for name in full if full[name].dim() == 2}
    if deletion.get("SCALED_INIT") is False:
        assert changed == matrices
    elif deletion.get("RESIDUAL") is False:  # nothing would come out of a layer that starts at 0
        assert changed == projections
    elif "TIE" in deletion and "TIE" not in others:  # the name of the head is there in both
        assert changed == {"lm_head.weight"}
    else:
        assert not changed
    assert len(full.keys() & left) >= 2


def test_every_matrix_is_drawn_for_itself_and_by_the_seed(flags):
    matrices = []
    for seed in (1, 2):
        flags(SEED=seed, TIE=False, ROTARY=False, RESIDUAL=False)
        for weight in gpt.GPT(S).parameters():
            if weight.dim() == 2:
                matrices.append(weight.flatten()[: C * C] / weight.std())
    matrices = torch.stack(matrices).detach()
    same(matrices.mean(1), torch.zeros(len(matrices)), 0.5)
    assert len(matrices) == 2 * (6 * L + 3)
    alike = torch.corrcoef(matrices).triu(1).abs().max()
    assert alike < 0.6


@on_off("scaled")
def test_biases_start_at_0_and_both_embeddings_alike(flags, scaled):
    flags(N_EMBD=64, BLOCK_SIZE=64, ROTARY=False, TIE=False, BIAS=True, SCALED_INIT=scaled)
    model = gpt.GPT(64)
    for name, weight in model.named_parameters():
        if "bias" in name:
            assert not weight.any(), name
        elif weight.dim() == 2 and not scaled:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
    spread = model.wte.weight.std().item()
    assert model.wpe.weight.std().item() == pytest.approx(spread, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(spread, rel=0.05)


@on_off("residual")
def test_scaled_init_keeps_the_size_of_what_a_matrix_reads(flags, residual):
    """Only the last matrix of a sublayer starts at 0, so that the sublayer adds nothing."""
    flags(N_EMBD=64, RESIDUAL=residual)
    model = gpt.GPT(V)
    for name, layer in model.layers.named_modules():
        if isinstance(layer, nn.Linear):
            spread = layer(torch.randn(100, layer.in_features)).std().item()
            adds_nothing = residual and "projection" in name
            assert spread == pytest.approx(0 if adds_nothing else 1, abs=0.1), name


def test_a_layer_of_a_reader_s_own_starts_at_0_only_if_it_is_the_last(flags, monkeypatch):
    """Two matrices in a row that start at 0 never learn: each has the other in its gradient."""

    class Attention(gpt.Attention):
        def __init__(self):
            super().__init__()
            self.value_projection = self.value
            del self.value

    flags()
    monkeypatch.setattr(gpt, "Attention", Attention)
    layer = gpt.GPT(V).layers.attention1.f
    assert layer.value_projection.weight.any() and not layer.projection.weight.any()


# The shape comments of gpt.py

SOURCE = Path(gpt.__file__).read_text("utf-8")
SHAPE = r"# \(([A-Z0-9 ,+*/-]+)\)"


def comments(source):
    """What the shape comments of source say between their brackets, by line."""
    lines = enumerate(source.splitlines(), 1)
    return {n: found[1] for n, line in lines if (found := re.search(SHAPE, line))}


class Watched(ast.NodeTransformer):
    """Calls watch(line, value, ...) with what each line that has a shape comment assigns or
    returns."""

    def __init__(self, lines):
        self.lines = lines

    def visit_Assign(self, node):
        if node.end_lineno not in self.lines:
            return node
        names = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
        return [node, *ast.parse(f"watch({node.end_lineno}, {', '.join(names)})").body]

    def visit_Return(self, node):
        if node.end_lineno not in self.lines:
            return node
        return ast.parse(f"return watch({node.end_lineno}, {ast.unparse(node.value)})").body


def check_shapes(source):
    """Runs source; returns the lines of its shape comments that are wrong, or were never run."""
    shapes, wrong, run = comments(source), set(), set()
    vocab = "".join(map(chr, range(65, 94)))
    train_ids, val_ids = torch.arange(31 * 13) % 29, torch.arange(8 * 13 + 1) % 29
    sizes = dict(T=13, C=110, H=5, D=22, V=29)  # and B and N, others in each room

    def watch(line, *values):
        run.add(line)
        shape = [int(size) for size in eval(f"[{shapes[line]}]", sizes)]
        if any(tensor is not None and list(tensor.shape) != shape for tensor in values):
            wrong.add(line)
        return values[-1]

    room = dict(__name__="watched", __file__=gpt.__file__, watch=watch)
    exec(compile(Watched(shapes).visit(ast.parse(source)), "gpt.py", "exec"), room)
    room |= dict(N_EMBD=110, N_HEAD=5, N_LAYER=1, BLOCK_SIZE=13, BATCH_SIZE=7, SAMPLE=1, STEPS=1)
    room |= dict(DEVICE="cpu", AVERAGE=False)
    switches = [flag for flag in OWN if type(DEFAULTS[flag]) is bool]
    for flag in ["CAUSAL", "FLASH", "ROTARY", *switches]:
        room |= {flag: not room[flag]}
        sizes |= dict(B=7, N=len(train_ids))
        room["look"] = lambda *_: 1.0
        model = room["train"](room["GPT"](29), train_ids, val_ids, {})
        sizes |= dict(B=8, N=len(val_ids))
        room["evaluate"](model, val_ids)
        sizes |= dict(B=1, N=20)
        room["sample"](model, vocab, vocab[:20])
        room |= {flag: not room[flag]}
    return wrong, set(shapes) - run


def test_every_shape_comment_is_right_and_is_run(flags):
    """A reader's own flag may be a number, and what it needs to run a line is not known here."""
    flags()
    assert len(comments(SOURCE)) > 15
    wrong, never_run = check_shapes(SOURCE)
    assert not wrong
    assert OWN or not never_run


def test_every_wrong_shape_comment_is_found(flags):
    flags()
    wrong, never_run = check_shapes(re.sub(SHAPE, r"# (\1 + 1)", SOURCE))
    assert wrong and wrong == comments(SOURCE).keys() - never_run


def test_a_shape_comment_that_never_runs_is_found(flags):
    flags()
    source = SOURCE + "\n\ndef never(x):\n    return x  # (B, T)\n"
    wrong, never_run = check_shapes(source)
    assert not wrong and len(source.splitlines()) in never_run
