"""attention(q, k, v): a check for each mistake one can make in it, which says what is wrong. They
check gpt's, and are tested on attentions that are wrong; with --mine PATH they check yours."""

import timeit
import traceback
from functools import partial
from math import inf, isclose, nan

import pytest
import torch
from torch.nn import functional as F

import gpt

B, H, T, D = 2, 4, 10, 16  # all different, as are their roots and that of H * D
fail = partial(pytest.fail, pytrace=False)  # the message alone, without the test's source
near = partial(isclose, rel_tol=0.05, abs_tol=0.003)


def draw(*shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def failures(attention, checks):
    """The checks that attention fails, each with its message."""
    found = {}
    for check in checks:
        try:
            check(attention)
        except pytest.fail.Exception as failure:
            found[check.__name__.removeprefix("check_")] = str(failure)
        except pytest.skip.Exception:
            pass
    return found


def after(attention, *checks):
    """Skips a check that can tell nothing as long as attention fails one of these."""
    if found := failures(attention, checks):
        pytest.skip("not before these pass: " + ", ".join(found))


def run(attention, q, k, v):
    after(attention, check_shape)
    return attention(q.clone(), k.clone(), v.clone())


def weights(attention, q, k):
    """The weights (B, H, T, T), read off with a v that is 1 in channel t at position t, else 0."""
    return run(attention, q, k, torch.eye(T, D).expand_as(q))[..., :T]


def factor(attention, heads):
    """What q·k is multiplied by before softmax, or nan. Only head 0's last query is not 0."""
    found = []
    for score in (0.5, 1):
        q, k = torch.zeros(2, 1, heads, T, D)
        q[:, 0, -1], k[:, :, 0] = 1, score / D
        one, other, *_ = weights(attention, q, k)[0, 0, -1]  # of q·k = score and of q·k = 0
        found.append((one / other).log().item() / score)
    return found[0] if near(*found) else nan


def check_shape(attention):
    for shape in ((B, H, T, D), (1, 1, 1, D), (3, 2, 5, 6)):
        try:
            result = attention(*draw(*shape))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[:2][-1]
            what = f"{type(error).__name__}: {error}\nline {at.lineno}: {at.line}"
            fail(f"Your attention stops when q, k and v have the shape {shape}: {what}")
        got = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        if got != shape:
            fail(f"Your result has the wrong shape: {got} where q, k and v have {shape}.")


def check_inputs(attention):
    after(attention, check_shape)
    given = draw(B, H, T, D)
    attention(*given)
    for name, x, kept in zip("qkv", given, draw(B, H, T, D), strict=True):
        if not x.equal(kept):
            fail(f"Your attention changes its input {name} in place: make a new tensor of it.")


def check_axis(attention):
    w = weights(attention, *draw(B, H, T, D)[:2])
    over = {"queries": w.sum(-2), "heads": w[:, :, -1].sum(1), "texts": w[:, :, -1].sum(0)}
    for name, sums in over.items():
        if sums.allclose(torch.ones(()), atol=0.01):
            fail(f"Your softmax runs over the {name}: run it over the keys, softmax(dim=-1).")


def check_sum(attention):
    after(attention, check_axis)
    q, k, v = draw(1, 1, T, D)
    for t, total in enumerate(run(attention, q, k, v**0)[0, 0, :, 0].tolist()):
        if abs(total - 1) > 0.01:
            where = f"they sum to {total:.3g} at position {t}"
            fail(f"Your weights do not sum to one: {where}. Mask and scale, then take the softmax.")


def check_future(attention):
    w = weights(attention, *torch.zeros(2, 1, 1, T, D))[0, 0]  # all that is seen weighs the same
    w[0] = 0  # if all is hidden from position 0 it may see everything: that is check_past's
    for t, s in (w.triu(1) > 1e-4).nonzero().tolist():
        what = f"position {t} gives position {s} the weight {w[t, s]:.2f}"
        fail(f"Your attention looks into the future: {what}. Give its score -inf before softmax.")


def check_past(attention):
    w = weights(attention, *torch.zeros(2, 1, 1, T, D))[0, 0]
    for t, s in (w + torch.ones(T, T).triu(1) < 1e-4).nonzero().tolist():
        what = f"the {'present' if s == t else 'past'}: position {t} gives position {s} no weight"
        fail(f"Your attention hides {what}. Mask only what comes later, triu(1).")


def check_heads(attention, dim=1, things="heads"):
    after(attention, check_axis)
    qkv, changed = draw(B, H, T, D), draw(B, H, T, D)
    changed.narrow(dim + 1, 1, (B, H)[dim] - 1).mul_(2)
    one, other = (run(attention, *x).select(dim, 0) for x in (qkv, changed))
    if not one.allclose(other, atol=1e-4, equal_nan=True):
        why = f"what the first one gives changes with the others. Keep dim {dim} of q, k, v apart."
        fail(f"Your attention mixes the {things}: {why}")


def check_texts(attention):
    check_heads(attention, 0, "texts of a batch")


def check_query_key(attention):
    after(attention, check_axis)
    if near(factor(attention, 1), 0):
        why = "a key like the query gets no more weight than others. The scores are q @ k.mT."
        fail(f"Your weights do not follow q·k: {why}")


def check_scale(attention):
    if near(factor(attention, 1), 1):
        fail(f"Your attention is not scaled: divide the scores by sqrt({D}), the size of one head.")


def check_scale_size(attention):
    after(attention, check_heads)
    x = factor(attention, H)
    names = {(H * D) ** -0.5: f"divided by sqrt({H * D}), the width of all heads"}
    names |= {T**-0.5: f"divided by sqrt({T}), the number of positions"}
    names |= {1 / D: f"divided by {D}, not its root", D**0.5: f"multiplied by sqrt({D})"}
    if abs(x) < inf and not any(near(x, other) for other in (0, 1, D**-0.5)):
        how = next((name for y, name in names.items() if near(x, y)), f"multiplied by {x:.2g}")
        fail(f"Your scores are {how}; divide by sqrt({D}), the size of one head.")


def check_torch(attention):
    after(attention, *CHECKS[:-1])
    qkv = draw(B, H, 64, D)
    off = (run(attention, *qkv) - F.scaled_dot_product_attention(*qkv, is_causal=True)).abs().max()
    if not off < 1e-4:
        fail(f"Your attention passes the other checks but is {off:.2g} off torch's somewhere.")


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def product(
    q, k, v, scale=lambda q: q.size(-1) ** -0.5, mask=lambda x: x.triu(1), low=-inf, weigh=None
):
    """Attention in two matrix products, right unless told otherwise."""
    scores = q @ k.mT * scale(q)
    scores = scores.masked_fill(mask(torch.ones(scores.shape[-2:])).bool(), low)
    return (weigh(scores) if weigh else scores.softmax(-1)) @ v


def loops(q, k, v):
    """The same number by number: slow and right."""
    result = torch.zeros_like(v)
    for t in range(q.size(2)):
        scores = [(q[:, :, t] * k[:, :, s]).sum(-1) / q.size(-1) ** 0.5 for s in range(t + 1)]
        for s, weight in enumerate(torch.stack(scores).softmax(0)):
            result[:, :, t] += weight[..., None] * v[:, :, s]
    return result


def ours(flash, q, k, v):
    gpt.FLASH = flash
    return gpt.attention(q, k, v)


def wide(q, k, v):
    return product(*(x.transpose(1, 2).flatten(2)[:, None] for x in (q, k)), v)


def wrong(**changes):
    return partial(product, **changes)


RIGHT = {"flash": partial(ours, True), "no flash": partial(ours, False), "loops": loops}
WRONG = {  # each with the checks that it must fail, and no other, and what their messages must say
    "no scale": (
        wrong(scale=lambda q: 1),
        {"scale": "is not scaled: divide the scores by sqrt(16)"},
    ),
    "sqrt(C)": (
        wrong(scale=lambda q: q[0, :, 0].numel() ** -0.5),
        {"scale_size": "by sqrt(64), the width"},
    ),
    "sqrt(T)": (
        wrong(scale=lambda q: q.size(2) ** -0.5),
        {"scale_size": "by sqrt(10), the number"},
    ),
    "D": (wrong(scale=lambda q: 1 / q.size(3)), {"scale_size": "divided by 16, not its root"}),
    "times": (wrong(scale=lambda q: q.size(3) ** 0.5), {"scale_size": "multiplied by sqrt(16);"}),
    "tenth": (wrong(scale=lambda q: 0.1), {"scale_size": "multiplied by 0.1;"}),
    "no mask": (wrong(mask=lambda x: 0 * x), {"future": "looks into the future"}),
    "late mask": (wrong(mask=lambda x: x.triu(2)), {"future": "position 1 gives position 2"}),
    "early mask": (wrong(mask=lambda x: x.triu(0)), {"past": "hides the present"}),
    "early, finite": (wrong(mask=lambda x: x.triu(0), low=-1e9), {"past": "hides the present"}),
    "turned mask": (wrong(mask=lambda x: x.tril(-1)), {"future": "the future", "past": "the past"}),
    "window": (wrong(mask=lambda x: x.triu(1) + x.tril(-3)), {"past": "hides the past"}),
    "neither": (
        wrong(mask=lambda x: 0 * x, scale=lambda q: 1),
        {"future": "future", "scale": "not scaled"},
    ),
    "mask after": (
        wrong(mask=lambda x: 0 * x, weigh=lambda s: s.softmax(-1).tril()),
        {"sum": "not sum to one"},
    ),
    "scale after": (wrong(weigh=lambda s: s.softmax(-1) / 4), {"sum": "they sum to 0.25"}),
    "only exp": (wrong(weigh=torch.exp), {"sum": "do not sum to one"}),
    "over queries": (wrong(weigh=lambda s: s.softmax(-2)), {"axis": "over the queries"}),
    "over heads": (wrong(weigh=lambda s: s.softmax(1)), {"axis": "over the heads"}),
    "over texts": (wrong(weigh=lambda s: s.softmax(0)), {"axis": "over the texts"}),
    "wide head": (wide, {"heads": "mixes the heads"}),
    "mean of heads": (
        lambda q, k, v: product(q, k, v.mean(1, True) + 0 * v),
        {"heads": "mixes the heads"},
    ),
    "other text": (lambda q, k, v: product(q, k.flip(0), v), {"texts": "mixes the texts"}),
    "swapped": (lambda q, k, v: product(k, q, v), {"query_key": "do not follow q·k"}),
    "in place": (
        lambda q, k, v: product(q.mul_(2), k, v / 2),
        {"inputs": "changes its input q in place"},
    ),
    "joined": (lambda *x: product(*x).transpose(1, 2).flatten(2), {"shape": "shape: (2, 10, 64)"}),
    "no transpose": (lambda q, k, v: q @ k @ v, {"shape": "stops when"}),
    "no return": (lambda q, k, v: None, {"shape": "wrong shape: NoneType"}),
    "bfloat16": (lambda *x: product(*(y.bfloat16() for y in x)).float(), {"torch": "off torch's"}),
}


def pace(attention):
    """How long attention takes beside product, in words."""
    qkv = draw(B, H, 64, D)
    one, theirs = (
        min(timeit.repeat(lambda f=f: f(*qkv), number=1, repeat=5)) for f in (product, attention)
    )
    question = ": is there a Python loop over positions or heads?" if theirs > 5 * one else "."
    return f"Your attention takes {theirs / one:.1f} times as long as one matrix product would{question}"


def pytest_generate_tests(metafunc):
    mine = metafunc.config.getoption("mine")
    if "attention" in metafunc.fixturenames:
        attentions = {"mine": mine} if mine else RIGHT
        metafunc.parametrize("attention", attentions.values(), ids=attentions)
    else:
        metafunc.parametrize("name", () if mine else WRONG)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_attention(attention, check, pytestconfig, capsys):
    check(attention)
    if check is check_torch:
        if pytestconfig.getoption("mine"):
            with capsys.disabled():
                print("\n" + pace(attention))
        else:
            assert ("loop" in pace(attention)) == (attention is loops)


def test_wrong_attentions_fail_the_checks_meant_for_them(name):
    attention, expected = WRONG[name]
    found = failures(attention, CHECKS)
    assert set(found) == set(expected)
    assert [check for check, phrase in expected.items() if phrase not in found[check]] == []
