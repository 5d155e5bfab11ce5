"""attention(q, k, v): a check for each mistake one can make in it, in an order in which each may
rely on those before it. gpt's passes them all; of the many wrong ones here each fails the check
meant for it. With --mine PATH they check your own instead."""

import os
import subprocess
import sys
import timeit
import traceback
from functools import partial
from math import inf, isclose, nan

import pytest
import torch
from conftest import SCRIPT
from torch.nn import functional as F

import gpt

B, H, T, D = 2, 4, 10, 16  # all different, as are their roots and that of C = H * D
near = partial(isclose, rel_tol=0.05, abs_tol=0.003)


def fail(message):
    """Ends a test with the message alone: not with its source, nor the error that led there."""
    raise pytest.fail.Exception(message, pytrace=False) from None


def draw(*shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def weights(attention, q, k):
    """The weights (B, H, T, T), read off with a v that is 1 in channel t at position t, else 0."""
    return attention(q, k, torch.eye(T, D).repeat(*q.shape[:2], 1, 1))[..., :T]


def factor(attention, heads):
    """What q·k is multiplied by before softmax; nan if that is no one number."""
    found = []
    for score in (0.5, 1):  # of head 0's last query and every first key; all others are 0
        q, k = torch.zeros(2, 1, heads, T, D)
        q[:, 0, -1], k[:, :, 0] = 1, score / D
        first, second, *_ = weights(attention, q, k)[0, 0, -1]
        found.append((first / second).log().item() / score)
    return found[0] if near(*found) else nan


def check_shape(attention):
    for shape in ((B, H, T, D), (1, 1, 1, 6)):
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
    attention(*(qkv := draw(B, H, T, D)))
    for name, x, kept in zip("qkv", qkv, draw(B, H, T, D), strict=True):
        if not x.equal(kept):
            fail(f"Your attention changes its input {name} in place: make a new tensor of it.")


def check_axis(attention):
    w = weights(attention, *draw(B, H, T, D)[:2])
    over = {"keys": w.sum(-1), "queries": w.sum(-2)}
    over |= {"heads": w[:, :, -1].sum(1), "texts": w[:, :, -1].sum(0)}  # the last query sees all
    ones = [name for name, sums in over.items() if sums.allclose(torch.ones(()), atol=0.01)]
    if ones and "keys" not in ones:
        fail(f"Your softmax runs over the {ones[0]}: run it over the keys, softmax(dim=-1).")


def check_texts(attention, dim=0, things="texts of a batch"):
    qkv, changed = draw(B, H, T, D), draw(B, H, T, D)
    changed.narrow(dim + 1, 1, (B, H)[dim] - 1).mul_(2)  # all but the first
    one, other = (attention(*x).select(dim, 0) for x in (qkv, changed))
    if not one.allclose(other, atol=1e-4, equal_nan=True):
        fail(f"Your attention mixes the {things}: the first one's result depends on the others.")


def check_heads(attention):
    check_texts(attention, 1, "heads")


def check_past(attention):
    w = weights(attention, *torch.zeros(2, 1, 1, T, D))[0, 0]  # all that is seen weighs the same
    for t, s in (w + torch.ones(T, T).triu(1) < 1e-4).nonzero().tolist():
        what = f"{'present' if s == t else 'past'}: position {t} does not see position {s}"
        fail(f"Your attention hides the {what}. Mask only what comes later: triu(1).")


def check_future(attention):
    w = weights(attention, *torch.zeros(2, 1, 1, T, D))[0, 0]
    for t, s in (w.triu(1) > 1e-4).nonzero().tolist():
        what = f"position {t} sees position {s}. Set such scores to -inf before softmax."
        fail(f"Your attention looks into the future: {what}")


def check_sum(attention):
    q, k, v = draw(1, 1, T, D)
    for t, total in enumerate(attention(q, k, torch.ones_like(v))[0, 0, :, 0].tolist()):
        if not near(total, 1):
            what = f"at position {t} they make {total:.2g}. Mask and scale, then take the softmax."
            fail(f"Your weights do not sum to one: {what}")


def check_scale(attention):
    if near(factor(attention, 1), 1):
        fail(f"Your attention is not scaled: divide the scores by sqrt({D}), the size of one head.")


def check_scale_size(attention):
    x = factor(attention, H)
    names = {(H * D) ** -0.5: f"divided by sqrt({H * D}), the width of all heads"}
    names |= {T**-0.5: f"divided by sqrt({T}), the number of positions"}
    names |= {1 / D: f"divided by {D}, not its root", D**0.5: f"multiplied by sqrt({D})"}
    if 0.003 < abs(x) < inf and not near(x, D**-0.5):  # 0 and nan are no factors
        how = next((name for y, name in names.items() if near(x, y)), f"multiplied by {x:.2g}")
        fail(f"Your scores are {how}; divide by sqrt({D}), the size of one head.")


def check_torch(attention):
    q, k, v = draw(B, H, 64, D)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if attention(k, q, v).allclose(theirs, atol=1e-4):
        fail("Your attention takes q for k: the scores are q @ k.mT, with a row for each query.")
    if not (off := (attention(q, k, v) - theirs).abs().max()) < 1e-4:
        fail(f"Your attention passes all other checks but is off torch's by up to {off:.2g}.")


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def product(q, k, v, scale=lambda q: q.size(3) ** -0.5, mask=lambda x: x.triu(1), weigh=None):
    """Attention in two matrix products, right unless told otherwise."""
    scores = q @ k.mT * scale(q)
    scores = scores.masked_fill(mask(torch.ones(scores.shape[-2:])).bool(), -inf)
    return (weigh(scores) if weigh else scores.softmax(-1)) @ v


def loops(q, k, v):
    """The same in two loops, over the queries and the keys that each sees: right and slow."""
    result = torch.zeros_like(v)
    for t in range(q.size(2)):
        scores = [(q[:, :, t] * k[:, :, s]).sum(-1) / q.size(3) ** 0.5 for s in range(t + 1)]
        for s, weight in enumerate(torch.stack(scores).softmax(0)):
            result[:, :, t] += weight[..., None] * v[:, :, s]
    return result


wrong = partial(partial, product)
RIGHT = {"flash": gpt.attention, "loops": loops}
RIGHT["no flash"] = lambda *qkv: vars(gpt).update(FLASH=False) or gpt.attention(*qkv)
WRONG = {  # the first check that each fails and a phrase of its message
    "shape: stops when q, k and v have the shape (2, 4, 10, 16): Ru": lambda q, k, v: q @ k @ v,
    "shape: wrong shape: (2, 10, 64)": lambda *qkv: product(*qkv).transpose(1, 2).flatten(2),
    "shape: wrong shape: NoneType": lambda q, k, v: None,
    "shape: wrong shape: (6,)": lambda *qkv: product(*qkv).squeeze(),
    "inputs: changes its input q in place": lambda q, k, v: product(q.div_(2), 2 * k, v),
    "axis: runs over the queries": wrong(weigh=lambda s: s.softmax(-2)),
    "axis: runs over the heads": wrong(weigh=lambda s: s.softmax(1)),
    "axis: runs over the texts": wrong(weigh=lambda s: s.softmax(0)),
    "texts: mixes the texts of a batch": lambda q, k, v: product(q, k.flip(0), v),
    "heads: mixes the heads": wrong(weigh=lambda s: s.sum(1, True).softmax(-1)),
    "past: hides the present: position 1": wrong(mask=lambda x: x.triu(0)),
    "past: position 1 does not see position 0": lambda q, k, v: v,
    "past: hides the past: position 1": wrong(mask=lambda x: x.tril(-1)),
    "past: hides the past: position 3": wrong(mask=lambda x: x.triu(1) + x.tril(-3)),
    "future: looks into the future": wrong(mask=lambda x: 0 * x),
    "future: position 0 sees position 1": wrong(mask=lambda x: x.triu(2)),
    "sum: do not sum to one": wrong(weigh=torch.exp),
    "sum: at position 0 they make 0.25": wrong(weigh=lambda s: s.softmax(-1) / 4),
    "sum: then take the softmax": lambda q, k, v: (q @ k.mT / 4).softmax(-1).tril() @ v,
    "scale: is not scaled: divide the scores by sqrt(16)": wrong(scale=lambda q: 1),
    "scale_size: by sqrt(64), the width": wrong(scale=lambda q: (q.size(1) * q.size(3)) ** -0.5),
    "scale_size: by sqrt(10), the number": wrong(scale=lambda q: q.size(2) ** -0.5),
    "scale_size: divided by 16, not its": wrong(scale=lambda q: 1 / q.size(3)),
    "scale_size: multiplied by sqrt(16)": wrong(scale=lambda q: q.size(3) ** 0.5),
    "scale_size: multiplied by 0.1;": wrong(scale=lambda q: 0.1),
    "torch: takes q for k": lambda q, k, v: product(k, q, v),
    "torch: is off torch's": lambda *qkv: product(*(x.bfloat16() for x in qkv)).float(),
}


def pace(attention):
    """How long attention takes beside product, in words."""
    qkv = draw(B, H, 64, D)
    best = [min(timeit.repeat(partial(f, *qkv), number=1, repeat=5)) for f in (attention, product)]
    times = best[0] / best[1]
    said = f"Your attention takes {times:.1f} times as long as one matrix product would"
    return said + ": is there a Python loop over positions?" * (times > 5)


def pytest_generate_tests(metafunc):
    mine = metafunc.config.getoption("mine")
    if metafunc.function is test_attention:
        attentions = {"mine": mine} if mine else RIGHT
        metafunc.parametrize("attention", attentions.values(), ids=attentions)
    elif metafunc.function is test_a_mistake_fails_the_check_meant_for_it:
        metafunc.parametrize("mistake", () if mine else WRONG)


def failure(attention, checks):
    """The first of the checks that attention fails, with its message, or None."""
    for check in checks:
        try:
            check(attention)
        except pytest.fail.Exception as failed:
            return f"{check.__name__}: {failed}"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_attention(attention, check, pytestconfig, capsys):
    if earlier := failure(attention, CHECKS[: CHECKS.index(check)]):
        pytest.skip(f"one mistake at a time, first {earlier}")
    check(attention)
    if check is check_torch and pytestconfig.getoption("mine"):
        with capsys.disabled():
            print("\n" + pace(attention))
    elif check is check_torch:
        assert " times as long as one matrix product would" in pace(attention)


def test_a_mistake_fails_the_check_meant_for_it(mistake):
    check, phrase = mistake.split(": ", 1)
    message = failure(WRONG[mistake], CHECKS)
    assert message and message.startswith(f"check_{check}: ") and phrase in message


@pytest.mark.parametrize(
    "code, status, says",
    [
        ("def attention(q, k, v): return (q @ k.mT).tril().softmax(-1) @ v", 1, "into the future"),
        (None, 4, "ERROR: --mine mine.py: FileNotFoundError"),
    ],
    ids=["a mistake", "no file"],
)
def test_the_command_that_a_reader_types(code, status, says, tmp_path, pytestconfig):
    if pytestconfig.getoption("mine"):
        pytest.skip("this is that command")
    if code:
        (tmp_path / "mine.py").write_text(code)
    args = [sys.executable, "-m", "pytest", __file__, "--mine", tmp_path / "mine.py"]
    done = subprocess.run(args, cwd=SCRIPT.parent, capture_output=True, text=True)
    shown = (done.stdout + done.stderr).replace(str(tmp_path) + os.sep, "")
    assert done.returncode == status and says in shown and "Traceback" not in shown
