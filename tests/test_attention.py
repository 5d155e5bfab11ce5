"""attention(q, k, v), a check for each mistake that can be made in it, with a message that names it.
They check gpt's and attentions that are wrong on purpose, or with --mine PATH the reader's own."""

import timeit
import traceback
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import gpt

B, H, T, D = 2, 4, 10, 16  # C = H * D = 64; no two of the sizes and their roots are the same


def fail(message):
    pytest.fail(message, pytrace=False)


def draw(*shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def run(attention, q, k, v):
    """What attention returns, given copies. Skips if it has the wrong shape: one check tells that."""
    try:
        result = attention(q.clone(), k.clone(), v.clone())
    except Exception:
        result = None
    if getattr(result, "shape", None) != v.shape:
        pytest.skip("the shape comes first")
    return result


def weights(attention, q, k):
    """The weights (B, H, T, T): what comes of values that are 1 in one channel, at one position."""
    return run(attention, q, k, torch.eye(T, D).expand(*q.shape[:2], T, D))[..., :T]


def even_weights(attention):
    """The weights (T, T) of one text and one head when q is 0: all that is seen weighs the same."""
    q, k, _ = draw(1, 1, T, D)
    return weights(attention, 0 * q, k)[0, 0]


def factor(attention, heads):
    """What attention multiplies q·k by, from how much more one key weighs than another that q
    does not match; nan if that is no fixed number. Only head 0's last query is not 0."""
    found = []
    for match in (2, 4):
        q, k = torch.zeros(2, 1, heads, T, D)
        q[:, 0, -1], k[:, :, 0] = 1, match / D
        ours, other, *_ = weights(attention, q, k)[0, 0, -1]
        found.append(float((ours / other).log() / match))
    return found[0] if near(*found) else torch.nan


def near(a, b):
    return abs(a - b) < 0.01 + 0.02 * abs(b) if b else abs(a) < 1e-3


def first(bad):
    """The first place where bad is true, as numbers, or None."""
    return next(iter(bad.nonzero().tolist()), None)


def after(attention, *checks):
    """Skip a check that tells nothing while attention fails these."""
    for check in checks:
        if failures(attention, [check]):
            pytest.skip(f"{check.__name__} comes first")


def failures(attention, checks):
    """The checks that attention fails, each with its message."""
    found = {}
    for check in checks:
        try:
            check(attention)
        except pytest.skip.Exception:
            pass
        except pytest.fail.Exception as failure:
            found[check] = str(failure)
    return found


def check_returns_the_shape_of_v(attention):
    for shape in ((B, H, T, D), (1, 1, 1, D), (3, 2, 5, 6)):
        try:
            result = attention(*draw(*shape))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[:2][-1]
            name = type(error).__name__
            fail(f"q, k, v of shape {shape} end in {name}: {error}\nline {at.lineno}: {at.line}")
        if getattr(result, "shape", None) != shape:
            got = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            fail(f"For q, k, v of shape {shape} the result has the wrong shape: {got}.")


def check_leaves_its_inputs_alone(attention):
    qkv = draw(B, H, T, D)
    run(lambda *copies: attention(*copies), *qkv)
