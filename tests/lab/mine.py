"""Check your own attention, MultiHead or Block, and name the first mistake in each.

    python tests/lab/mine.py my_attention.py

The file may hold any of these three. All of them are causal: a position sees itself and the past.

    attention(q, k, v)         a function; q, k, v and the result are (B, n_head, T, head_size)
    MultiHead(n_embd, n_head)  an nn.Module from x (B, T, n_embd) to the same shape
    Block(n_embd, n_head)      an nn.Module, too: x + attention(norm(x)), and then
                               x + feed_forward(norm(x)) with 4 * n_embd channels inside

For example, a file with an attention that has no mask is answered by:

    attention looks into the future: position 0 sees position 1. Set such scores to -inf before
    softmax, where tril() is 0 or, the same, where triu(1) is 1.
    MultiHead is not in my_attention.py.
    Block is not in my_attention.py.

The checks try several sizes and up to 64 positions. What your file prints is not shown, and what
stands below if __name__ == "__main__": is not run.
Exit status: 0 if all that was found is right, 1 if there is a mistake, 2 if nothing can be checked.
"""

import argparse
import dis
import inspect
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from difflib import SequenceMatcher
from functools import partial
from math import isclose, isfinite, nan
from pathlib import Path
from types import CodeType, ModuleType

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

B, H, T, D = 2, 3, 10, 16  # texts, heads, positions, channels of a head: all different
C = H * D  # channels of a position
LONG = 64  # positions in the longest text
SIZES = [(C, H), (64, 2)]  # n_embd and n_head of the modules that are checked
HEAD_SIZES = [D, 64]  # of the attention that is checked

MASK = "where tril() is 0 or, the same, where triu(1) is 1"
SOFTMAX = "Mask and scale, then take the softmax over the keys, softmax(dim=-1)."
SIGNATURES = {
    "attention": "attention(q, k, v)",
    "MultiHead": "MultiHead(n_embd, n_head)",
    "Block": "Block(n_embd, n_head)",
}
NEAR_WORDS = {  # a name with such a word in it may stand for the one that is missing
    "attention": ["attention", "attn", "attend"],
    "MultiHead": ["head", "attention", "attn", "mha"],
    "Block": ["block", "layer"],
}


class Mistake(Exception):
    """A mistake in an answer. Its text follows the answer's name: "looks into the future"."""


# 1. Calling what the reader wrote.
LIBRARIES = (str(Path(torch.__file__).parents[1]), str(Path(os.__file__).parent))


def is_readers(filename):
    """Whether a file with code is the reader's: neither this one nor a library's."""
    return not filename.startswith(("<", __file__, *LIBRARIES))


def describe(error):
    """An error in one line, with the last line of the reader's that led to it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_readers(frame.filename):
            return f"{text} ({Path(frame.filename).name}, line {frame.lineno}: {frame.line})"
    return text


def result(answer, *inputs):
    """What attention (three inputs) or a module (one) returns.
    Mistake if it stops, or if that is no tensor of the first input's shape and type."""
    shape = tuple(inputs[0].shape)
    try:
        y = answer(*inputs)
    except (Exception, SystemExit) as error:
        what = f"stops when its input has the shape {shape}: {describe(error)}."
        raise Mistake(what) from None
    if y is None:
        raise Mistake("returns None. Is the return at its end missing?")
    if not isinstance(y, torch.Tensor):
        kind = type(y).__name__
        raise Mistake(f"returns a value of type {kind}. Return one tensor, of the shape {shape}.")
    if tuple(y.shape) != shape:
        raise Mistake(f"returns the wrong shape, {tuple(y.shape)}. Its input has {shape}.")
    if y.dtype != inputs[0].dtype:
        raise Mistake(f"returns numbers of type {y.dtype}. Its input has {inputs[0].dtype}.")
    return y


def build(make, n_embd, n_head):
    """make(n_embd, n_head), in evaluation. Mistake if it stops or if that is no module."""
    try:
        module = make(n_embd, n_head)
    except (Exception, SystemExit) as error:
        what = f"cannot be made with n_embd = {n_embd} and n_head = {n_head}: {describe(error)}."
        raise Mistake(what) from None
    if not isinstance(module, nn.Module):
        raise Mistake("is not an nn.Module. Derive its class from nn.Module.")
    return module.eval()


def global_names(code):
    """The names of the globals that some code reads, with those of the functions inside it."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= global_names(constant)
    return names


def is_size(value):
    """Whether a global may hold a size, as a number, a mask or a configuration does."""
    return not callable(value) and not isinstance(value, ModuleType | bool | float | str)


def sizes_from_file(answer):
    """The names of the sizes that an answer, or what it calls, reads from the top of the file."""
    sizes, seen, waiting = set(), [], [answer]
    while waiting:
        item = waiting.pop()
        seen.append(item)
        functions = [item]
        if isinstance(item, nn.Module):
            item = type(item)
        if inspect.isclass(item):
            functions = [function for base in item.__mro__ for function in vars(base).values()]
        for function in functions:
            if not inspect.isfunction(function) or not is_readers(function.__code__.co_filename):
                continue
            for name in global_names(function.__code__) & function.__globals__.keys():
                value = function.__globals__[name]
                if is_size(value):
                    sizes.add(name)
                elif callable(value) and value not in seen:
                    waiting.append(value)
    return sorted(sizes)


def sizes_hint(answer):
    """A sentence, after a space, on sizes that an answer takes from its file; "" if it has none."""
    sizes = sizes_from_file(answer)
    if not sizes:
        return ""
    return (
        f" It uses {', '.join(sizes)} from the top of the file: sizes must come from the"
        f" arguments instead, and a mask must be large enough for {LONG} positions."
    )


def signature_hint(make):
    """A sentence, after a space, on the arguments a class should take; "" if it takes them."""
    try:
        names = list(inspect.signature(make).parameters)
    except ValueError:  # of a function written in C
        return ""
    if names[:2] == ["n_embd", "n_head"]:
        return ""
    return f" The checks make it with (n_embd, n_head); yours takes ({', '.join(names)})."


def draw(*shape):
    """Three tensors of a shape, always the same: for q, k and v, or for three x."""
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def first_true(x):
    """The indices of the first place where x is true, as a list; [] if it is nowhere."""
    return x.nonzero()[:1].flatten().tolist()


# 2. The checks of attention(q, k, v), all (B, H, T, D).
def weights(attention, q, k):
    """The weights (B, H, T, T), read off with a v that is 1 in channel t at position t, else 0.
    There must be as many channels as positions, or more."""
    positions, channels = q.shape[2:]
    v = torch.eye(positions, channels).repeat(*q.shape[:2], 1, 1)
    return result(attention, q, k, v)[..., :positions]


def equal_weights(attention):
    """The weights (T, T) where all scores are 0, so that all that is seen weighs the same."""
    return weights(attention, *torch.zeros(2, 1, 1, T, D))[0, 0]


def attention_shape(attention):
    usual = (B, H, T, D)
    try:
        result(attention, *draw(*usual))
    except Mistake as mistake:
        raise Mistake(f"{mistake}{sizes_hint(attention)}") from None
    others = [
        ("texts", (1, H, T, D)),
        ("heads", (B, 1, T, D)),
        ("positions", (B, H, 1, D)),
        ("positions", (B, H, LONG, D)),
        ("channels", (B, H, T, 6)),
    ]
    for things, shape in others:
        try:
            result(attention, *draw(*shape))
        except Mistake as mistake:
            what = f"works for q, k and v of the shape {usual}, but {mistake}"
            hint = f"Is the number of {things} written in?{sizes_hint(attention)}"
            raise Mistake(f"{what} {hint}") from None


def attention_inputs(attention):
    used = draw(B, H, T, D)
    result(attention, *used)
    for name, x, kept in zip("qkv", used, draw(B, H, T, D), strict=True):
        if not x.equal(kept):
            raise Mistake(f"changes its input {name} in place. Make a new tensor of it.")


def attention_repeat(attention):
    first, second = (result(attention, *draw(B, H, T, D)) for _ in range(2))
    if not first.allclose(second, atol=1e-5, equal_nan=True):
        what = "returns another result each time for the same q, k and v. Is it random?"
        raise Mistake(f"{what} Leave dropout out: a function does not know when training is over.")


def attention_axis(attention):
    w = weights(attention, *draw(B, H, T, D)[:2])
    sums = {
        "keys": w.sum(-1),
        "queries": w.sum(-2),
        "heads": w[:, :, -1].sum(1),  # of the last query, which sees all
        "texts": w[:, :, -1].sum(0),
    }
    ones = [name for name, x in sums.items() if x.allclose(torch.ones(()), atol=0.01)]
    if ones and "keys" not in ones:
        raise Mistake(f"takes the softmax over the {ones[0]}. Take it over the keys: dim=-1.")


def attention_texts(attention):
    qkv, changed = draw(B, H, T, D), draw(B, H, T, D)
    changed[:, 1:] *= 2
    one, other = (result(attention, *x)[0] for x in (qkv, changed))
    if not one.allclose(other, atol=1e-4, equal_nan=True):
        raise Mistake("mixes the texts of a batch: the first one's result depends on the others.")


def attention_heads(attention):
    qkv, changed = draw(B, H, T, D), draw(B, H, T, D)
    changed[:, :, 1:] *= 2
    one, other = (result(attention, *x)[:, 0] for x in (qkv, changed))
    if not one.allclose(other, atol=1e-4, equal_nan=True):
        raise Mistake("mixes the heads: the first one's result depends on the others.")


def attention_past(attention):
    hidden = equal_weights(attention) < 1e-4
    if place := first_true(hidden.tril()):
        raise hides(*place)


def attention_future(attention):
    seen = equal_weights(attention) > 1e-4
    if place := first_true(seen.triu(1)):
        raise looks_ahead(*place)


def attention_sum(attention):
    q, k, v = draw(1, 1, T, D)
    sums = result(attention, q, k, torch.ones_like(v))[0, 0, :, 0]
    if place := first_true(~sums.isclose(torch.ones(()), atol=0.05)):  # so is nan
        t = place[0]
        what = f"has weights that do not sum to one: at position {t} they make {sums[t]:.2g}."
        raise Mistake(f"{what} {SOFTMAX}")


def attention_factor(attention, head_size):
    """What q·k is multiplied by before softmax; nan if that is no one number."""
    factors = []
    for score in (0.5, 1):  # of head 0's last query and each first key; all other scores are 0
        q, k = torch.zeros(2, 1, H, T, head_size)
        q[:, 0, -1] = 1
        k[:, :, 0] = score / head_size
        first, second = weights(attention, q, k)[0, 0, -1, :2]
        factors.append((first / second).log().item() / score)
    if isclose(*factors, rel_tol=0.05, abs_tol=0.003):
        return factors[0]
    return nan


def attention_scale(attention):
    factors = [attention_factor(attention, size) for size in HEAD_SIZES]
    sizes = [(H * size, H) for size in HEAD_SIZES]
    check_scale(attention, factors, sizes, T, 0.05)


def attention_torch(attention):
    for shape in ((B, H, LONG, D), (1, 2, 5, 6)):
        q, k, v = draw(*shape)
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if result(attention, k, q, v).allclose(theirs, atol=1e-4):
            raise Mistake("swaps q and k. The scores are q @ k.mT, with a row for each query.")
        off = (result(attention, q, k, v) - theirs).abs().max().item()
        if not off < 1e-4:
            what = "passes all other checks but is not what torch's scaled_dot_product_attention"
            raise Mistake(f"{what} gives: off by up to {off:.2g} for the shape {shape}.")


# 3. What the checks of attention and of modules share.
def hides(t, s):
    what = "present" if s == t else "past"
    seen = f"position {t} does not see position {s}"
    return Mistake(f"hides the {what}: {seen}. Mask only what comes later, {MASK}.")


def looks_ahead(t, s):
    seen = f"position {t} sees position {s}"
    hint = f"Set such scores to -inf before softmax, {MASK}."
    return Mistake(f"looks into the future: {seen}. {hint}")


def check_scale(answer, factors, sizes, positions, tolerance):
    """A Mistake if scores are not multiplied by 1 / sqrt(head size). factors: what they are
    multiplied by, for each of the sizes (n_embd, n_head); 0 and nan are no factors."""
    for factor, (n_embd, n_head) in zip(factors, sizes, strict=True):
        head_size = n_embd // n_head
        close = partial(isclose, factor, rel_tol=tolerance, abs_tol=0.003)
        if not isfinite(factor) or close(0) or close(head_size**-0.5):
            continue
        what = f"multiplies its scores by {factor:.2g}"
        right = f"Divide them by sqrt({head_size}), the root of the size of one head."
        if (n_embd, n_head) != sizes[0] and close(factors[0]):
            right = "Divide them by the root of the size of one head, q.size(-1) ** 0.5."
            what = f"{what} whatever the size of a head is"
            raise Mistake(f"{what}. {right}{sizes_hint(answer)}")
        named = {
            "does not scale its scores": 1,
            f"divides its scores by sqrt({n_embd}), the width of all heads": n_embd**-0.5,
            "divides its scores by sqrt(T), the number of positions": positions**-0.5,
            f"divides its scores by {head_size}, not by its root": 1 / head_size,
            f"multiplies its scores by sqrt({head_size})": head_size**0.5,
        }
        for name, value in named.items():
            if close(value):
                what = name
                break
        raise Mistake(f"{what}. {right}")


# 4. The checks of MultiHead and Block, made as make(n_embd, n_head). Their matrices are drawn
# anew, so that neither their layout nor what they start from matters.
def matrices(module):
    """By name what is trained and has more than a number a channel: no biases and no norms."""
    named = module.named_parameters()
    return {name: p for name, p in named if p.requires_grad and p.squeeze().dim() > 1}


def part_of(matrix, n_embd):
    """Which part of a Block a matrix belongs to, "attention" or "feed_forward"."""
    if 4 * n_embd in matrix.shape:
        return "feed_forward"
    return "attention"


def is_block(module, n_embd):
    """Whether a module has a feed-forward."""
    parts = [part_of(matrix, n_embd) for matrix in matrices(module).values()]
    return "feed_forward" in parts


def made(make, n_embd=C, n_head=H, size=1.0, silent=None, seed=0):
    """A module in evaluation without biases. Its matrices keep the size of x, times size; those of
    one part, "attention" or "feed_forward", are 0 if it is silent."""
    torch.manual_seed(seed)
    module = build(make, n_embd, n_head)
    for p in module.parameters():
        if p.squeeze().dim() == 1 and not p.eq(p.flatten()[0]).all():  # norms are ones or zeros
            p.zero_()
    for matrix in matrices(module).values():
        matrix.normal_(0, size * n_embd**-0.5)
        if part_of(matrix, n_embd) == silent:
            matrix.zero_()
    return module


def normal(*shape, which=0):
    """Vectors of mean 0 and variance 1: a norm leaves them as they are."""
    return F.layer_norm(draw(*shape)[which], shape[-1:])


def relative(x, y):
    """How far x is from y, in sizes of y."""
    return ((x - y).norm() / y.norm()).item()


def influence(make, silent=None):
    """By how much position t's result changes with position s's input, at [t, s]: (T, T)."""
    module = made(make, size=0.5, silent=silent)
    x, other = draw(T, C)[:2]
    changed = torch.where(torch.eye(T).bool()[..., None], other, x)  # (T, T, C): text s has a new s
    return (result(module, changed) - result(module, x[None])).abs().amax(-1).T


def module_shape(make):
    usual = f"n_embd = {C}, n_head = {H} and x of the shape {(B, T, C)}"
    try:
        result(build(make, C, H), draw(B, T, C)[0])
    except Mistake as mistake:
        raise Mistake(f"{mistake}{signature_hint(make)}{sizes_hint(make)}") from None
    others = [
        ("texts", C, H, (1, T, C)),
        ("positions", C, H, (B, 1, C)),
        ("positions", C, H, (B, LONG, C)),
        ("channels", 2 * C, H, (B, T, 2 * C)),
        ("heads", C, 4, (B, T, C)),
        ("heads", 64, 2, (B, T, 64)),
    ]
    for things, n_embd, n_head, shape in others:
        try:
            result(build(make, n_embd, n_head), draw(*shape)[0])
        except Mistake as mistake:
            hint = f"Is the number of {things} written in?{sizes_hint(make)}"
            raise Mistake(f"works for {usual}, but {mistake} {hint}") from None


def plain_lists(module):
    """The names of the attributes that keep modules in a plain list, which torch does not see."""
    names = []
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, list | tuple) and any(isinstance(x, nn.Module) for x in value):
                names.append(name)
    return names


def check_count(module, found, where, n_embd, n_head):
    """A Mistake unless the matrices that were found are as large as the four of attention."""
    count = sum(matrix.numel() for matrix in found)
    if count == 4 * n_embd**2:
        return
    hint = "Queries, keys, values and the projection have n_embd**2 each."
    if count == 3 * n_embd**2:
        hint = "Is there no projection at the end, or one matrix for two?"
    if count * n_head == (3 + n_head) * n_embd**2:
        hint = "Is one layer used several times, as by [head] * n_head? Make each anew."
    if count in (4 * n_head * n_embd**2, (3 * n_head + 1) * n_embd**2):
        hint = "Is each head n_embd wide? It is n_embd // n_head."
    for name in plain_lists(module):
        hint = f"Torch does not see what is in the plain list {name}. Make it an nn.ModuleList."
    what = f"has {count:,} parameters {where}for n_embd = {n_embd}, biases aside"
    raise Mistake(f"{what}, not 4 * n_embd**2 = {4 * n_embd**2:,}. {hint}")


def multihead_parameters(make):
    for n_embd, n_head in SIZES:
        module = build(make, n_embd, n_head)
        check_count(module, matrices(module).values(), "", n_embd, n_head)


def block_parameters(make):
    for n_embd, n_head in SIZES:
        module = build(make, n_embd, n_head)
        found = {"attention": [], "feed_forward": []}
        for matrix in matrices(module).values():
            found[part_of(matrix, n_embd)].append(matrix)
        wide = [matrix.numel() for matrix in found["feed_forward"]]
        if wide != [4 * n_embd**2] * 2:
            what = f"has {len(wide) or 'no'} matrices of n_embd by 4 * n_embd for its feed-forward"
            right = "nn.Linear(n_embd, 4 * n_embd) and nn.Linear(4 * n_embd, n_embd)"
            raise Mistake(f"{what}, where n_embd is {n_embd}. It needs two: {right}.")
        check_count(module, found["attention"], "in its attention ", n_embd, n_head)


def module_inputs(make):
    x = draw(B, T, C)[0]
    result(made(make), x)
    if not x.equal(draw(B, T, C)[0]):
        raise Mistake("changes its input x in place. Write x = x + y, not x += y.")


def backward(make):
    """A module whose parameters have their gradients. Mistake if there can be none."""
    module = made(make)
    with torch.enable_grad():
        y = result(module, draw(B, T, C)[0])
        try:
            if y.requires_grad:
                y.square().sum().backward()
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise Mistake(f"cannot learn: {describe(error)}.") from None
            what = "cannot learn: its forward overwrites in place what its gradients need"
            raise Mistake(f"{what}. Write x = x + y, not x += y.") from None
    return module


CUT_OFF = "its forward does not use it, or cuts it off, as .detach(), .data and no_grad do"


def module_gradient(make):
    for name, p in matrices(backward(make)).items():
        if p.grad is None:
            raise Mistake(f"cannot learn {name}: {CUT_OFF}.")


def module_learning(make):
    """One matrix for q, k and v has a gradient where that of q and k is 0."""
    for name, p in matrices(backward(make)).items():
        if p.grad.eq(0).float().mean() > 0.1:
            raise Mistake(f"cannot learn a part of {name}: {CUT_OFF}.")


def module_repeat(make):
    module, x = made(make), draw(B, T, C)[0]
    if not result(module, x).allclose(result(module, x), atol=1e-5, equal_nan=True):
        why = "Is dropout still on? F.dropout needs training=self.training, nn.Dropout nothing."
        raise Mistake(f"returns another result each time, even after eval(). {why}")


def module_texts(make):
    module, (x, other, _) = made(make), draw(B, T, C)
    other[0] = x[0]
    if result(module, x)[0].allclose(result(module, other)[0], atol=1e-4, equal_nan=True):
        return
    what = "mixes the texts of a batch: the first one's result depends on the others."
    for inner in module.modules():
        if isinstance(inner, nn.MultiheadAttention) and not inner.batch_first:
            raise Mistake(f"{what} Give nn.MultiheadAttention batch_first=True.")
    raise Mistake(what)


def module_nan(make):
    y = result(made(make), draw(1, T, C)[0])[0]
    if place := first_true(y.isnan().any(-1)):
        what = (
            f"gives nan at position {place[0]}: its softmax is over scores that are all -inf there"
        )
        raise Mistake(f"{what}. Take it over the keys, dim=-1, and mask only what comes later.")


def block_alone(make):
    seen = influence(make, silent="attention") > 1e-5
    if place := first_true(seen & ~torch.eye(T).bool()):
        t, s = place
        what = f"position {t} sees position {s} even if attention adds nothing"
        right = "A norm and the feed-forward take each position alone: nn.LayerNorm(n_embd)."
        raise Mistake(f"mixes positions outside of attention: {what}. {right}")


def module_places(make):
    """Whatever the mask is, t sees s or not by t - s alone. It may differ at both ends, where a
    mask may hide all, and for t itself, which may be seen as the query only."""
    seen = influence(make) > 1e-5
    for t in range(1, T - 2):
        for s in range(T - 1):
            if s != t and seen[t, s] != seen[t + 1, s + 1]:
                what = f"position {t} sees position {s}, but {t + 1} does not see {s + 1}"
                if seen[t + 1, s + 1]:
                    what = f"position {t} does not see position {s}, but {t + 1} sees {s + 1}"
                cut = "Cut x into heads by view(B, T, n_head, -1).transpose(1, 2)"
                back = "put them side by side by transpose(1, 2).reshape(B, T, n_embd)"
                raise Mistake(f"mixes up positions and heads: {what}. {cut}, {back}.")


def module_past(make):
    seen = influence(make) > 1e-5
    if not (seen & ~torch.eye(T).bool()).any():
        right = "Cut x into heads by view(B, T, n_head, -1).transpose(1, 2); scores are (T, T) each"
        raise Mistake(f"hides the past: no position sees another. {right}.")
    if place := first_true((~seen).tril()):
        raise hides(*place)


def module_sum(make):
    x = draw(1, C)[0].expand(1, T, C).clone()
    module = made(make)
    y, alone = result(module, x)[0], result(module, x[:, :1])[0, 0]
    if place := first_true((y - alone).norm(dim=-1) > 0.01 * alone.norm()):
        what = f"of {T} equal vectors, the one at position {place[0]} comes out unlike one alone"
        raise Mistake(f"has weights that do not sum to one: {what}. {SOFTMAX}")


def module_future(make):
    seen = influence(make) > 1e-5
    if place := first_true(seen.triu(1)):
        raise looks_ahead(*place)


def block_residual(make):
    x = normal(1, T, C)
    lost = []
    for part in ("attention", "feed_forward"):
        if result(made(make, silent=part), x).abs().max() <= 1e-4:
            lost.append(part)
    if lost:
        what = f"around {' and '.join(lost)}: where that adds nothing, nothing is left of x"
        raise Mistake(f"has no residual {what}. Add the result to x: x = x + y.")


def block_post_norm(make):
    module, x = made(make, size=0.1), normal(1, T, C)
    if relative(result(module, 100 * x), result(module, x)) < 0.3:
        what = "norms x itself: 100 * x comes out no larger than x"
        raise Mistake(f"{what}. Norm what each part takes in: x = x + attention(norm(x)).")


def block_carry(make):
    module, x = made(make, size=0.1), normal(1, T, C)
    y = result(module, 100 * x)
    if relative(y, 100 * x) > 0.3:
        times = (y * x).sum() / (100 * x * x).sum()
        raise Mistake(f"carries on {times:.2g} times x, not x itself. Add once to x: x = x + y.")


def block_norm(make):
    x, bare = normal(1, T, C), []
    for part, other in (("attention", "feed_forward"), ("feed_forward", "attention")):
        module = made(make, size=0.1, silent=other)
        added, added_to_large = result(module, x) - x, result(module, 100 * x) - 100 * x
        if added_to_large.norm() > 3 * added.norm():
            bare.append(part)
    if bare:
        what = "what it adds to 100 * x is not what it adds to x"
        right = f"x = x + {bare[0]}(norm(x))"
        raise Mistake(f"has no norm before {' and '.join(bare)}: {what}. Write {right}.")
    if relative(result(made(make, size=0.1), x), x) > 0.3:
        what = "has a norm after a part: even if its matrices are small it adds much"
        raise Mistake(f"{what}. The norm goes before: x = x + attention(norm(x)).")


def right_angles(d):
    """d times sqrt(2), and vectors e at right angles to it. Then e + d / 2 and e - d / 2 have
    mean 0 and variance 1, so that a norm leaves them as they are. d: rows from normal()."""
    e = normal(*d.shape, which=1)
    e = F.layer_norm(e - (e * d).mean(-1, keepdim=True) * d, d.shape[-1:])
    return 2**0.5 * d, 0.5**0.5 * e


def block_activation(make):
    """Of one matrix, f(d / 2 + e) would be f(d / 2) + f(e)."""
    module = made(make, silent="attention")
    d, e = right_angles(normal(1, T, C))
    both, one, other = (result(module, x) - x for x in (d / 2 + e, 2**-0.5 * d, 2**0.5 * e))
    if relative((one + other) * 0.5**0.5, both) < 1e-3:
        what = "has nothing between the two matrices of its feed-forward, so they act as one"
        raise Mistake(f"{what}. Put a GELU or a ReLU there.")


def block_order(make):
    attention, feed_forward = made(make, silent="feed_forward"), made(make, silent="attention")
    x = draw(1, T, C)[0]
    y = result(made(make), x)
    if relative(y, result(feed_forward, result(attention, x))) < 1e-3:
        return
    what = "combines attention and feed-forward in another way"
    if relative(y, result(attention, result(feed_forward, x))) < 1e-3:
        what = "has the feed-forward before attention"
    if relative(y, result(attention, x) + result(feed_forward, x) - x) < 1e-3:
        what = "gives attention and feed-forward the same x"
    right = "x = x + attention(norm(x)), then x = x + feed_forward(norm(x))"
    raise Mistake(f"{what}. It should be {right}.")


def handed_on(module, d, e):
    """What the second of the vectors e + d / 2 and e - d / 2 takes over from the first, which is
    its weight times what it would take over at weight 1; and that. d, e: (texts, C)."""
    x = torch.stack([e + d / 2, e - d / 2], 1)  # (texts, 2, C)
    first, second = (result(module, x[:, i : i + 1])[:, 0] for i in (0, 1))  # alone, at weight 1
    whole = first - second
    if is_block(module, x.size(2)):
        whole = whole - d  # a block carries x on beside what attention adds
    return result(module, x)[:, 1] - second, whole


def module_heads(make):
    """With one d and many e, all that each head hands on are multiples of one vector."""
    for n_embd, n_head in SIZES:
        d, e = right_angles(normal(1, n_embd).expand(LONG, n_embd))
        module = made(make, n_embd, n_head, size=0.5, silent="feed_forward")
        sizes = torch.linalg.svdvals(handed_on(module, d, e)[0])
        count = (sizes > 1e-3 * sizes[0]).sum().item()
        if count == 1:
            right = "Cut x into heads of n_embd // n_head channels, with a softmax for each"
            raise Mistake(f"looks with one head, whatever n_head is. {right}.")
        if count != n_head:
            what = f"looks with {count} heads where n_embd is {n_embd} and n_head is {n_head}."
            if count == n_embd // n_head:
                what = f"{what} Is n_head taken for the size of a head?"
            raise Mistake(f"{what}{sizes_hint(make)}")


def module_factor(make, n_embd, n_head):
    """What q·k is multiplied by before softmax, from how much the weights vary where matrices are
    small; nan if scores are no products of queries and keys."""
    head_size = n_embd // n_head
    d, e = right_angles(normal(256, n_embd))
    factors = []
    for size in (0.1, 0.15):
        change = total = 0
        for seed in range(4):
            module = made(make, n_embd, n_head, size, "feed_forward", seed)
            one, whole = handed_on(module, d, e)
            other, _ = handed_on(module, d, -e)
            change += (one - other).norm().item() ** 2
            total += whole.norm().item() ** 2
        score = 2 * (change / total) ** 0.5  # the weights are near 1 / 2 ± score / 4
        factors.append(score / size**2 / head_size**0.5)
    if isclose(*factors, rel_tol=0.1):
        return sum(factors) / 2
    return nan


def module_scale(make):
    factors = [module_factor(make, *size) for size in SIZES]
    check_scale(make, factors, SIZES, 2, 0.12)


CHECKS = {  # in an order in which each may rely on those before it
    "attention": [
        attention_shape,
        attention_inputs,
        attention_repeat,
        attention_axis,
        attention_texts,
        attention_heads,
        attention_past,
        attention_future,
        attention_sum,
        attention_scale,
        attention_torch,
    ],
    "MultiHead": [
        module_shape,
        multihead_parameters,
        module_inputs,
        module_gradient,
        module_repeat,
        module_texts,
        module_nan,
        module_places,
        module_past,
        module_sum,
        module_future,
        module_heads,
        module_scale,
        module_learning,
    ],
    "Block": [
        module_shape,
        block_parameters,
        module_inputs,
        module_gradient,
        module_repeat,
        module_texts,
        module_nan,
        block_alone,
        module_places,
        module_past,
        module_sum,
        module_future,
        block_residual,
        block_post_norm,
        block_carry,
        block_norm,
        block_activation,
        block_order,
        module_heads,
        module_scale,
        module_learning,
    ],
}


@torch.no_grad()
def find_mistake(task, answer):
    """The name of the first check that an answer fails, and its message; None if it is right."""
    for check in CHECKS[task]:
        try:
            check(answer)
        except Mistake as mistake:
            return check.__name__, str(mistake)
    return None


# 5. What is said of an answer without mistakes.
class CountCalls(TorchFunctionMode):
    """Counts the calls of torch."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


def calls(answer, *inputs):
    """How often torch is called for a result."""
    with CountCalls() as counted:
        result(answer, *inputs)
    return counted.count


@torch.no_grad()
def praise(task, answer):
    """What is said of a right answer: that it is, and of loops in Python, which take long."""
    if task == "attention":
        few, many = (calls(answer, *draw(B, H, positions, D)) for positions in (8, 16))
        things, numbers = "positions", "8 and 16"
    else:
        few, many = (calls(build(answer, C, heads), draw(B, T, C)[0]) for heads in (2, 8))
        things, numbers = "heads", "2 and 8"
    if many == few:
        return "is right."
    loop = f"a Python loop over the {things}: {few} and {many} calls of torch for {numbers}"
    return f"is right. It has {loop}. One product does all {things} at once."


# 6. The reader's file and the command.
def near_name(task, own):
    """The name in own, the globals of a file, that is most like a task's; None if none is."""
    is_kind = inspect.isfunction if task == "attention" else inspect.isclass
    best, best_ratio = None, 0.0
    for name, value in own.items():
        if not is_kind(value) or value.__module__.startswith("torch"):
            continue
        ratio = SequenceMatcher(None, task.lower(), name.lower()).ratio()
        has_word = any(word in name.lower() for word in NEAR_WORDS[task])
        if (has_word or ratio > 0.6) and ratio > best_ratio:
            best, best_ratio = name, ratio
    return best


def why_missing(task, own, path):
    """Why a file with the globals own has no answer to a task; "" if it has one."""
    if task not in own:
        what = f"is not in {Path(path).name}."
        if name := near_name(task, own):
            what = f"{what} Is {name} meant? Write it as {SIGNATURES[task]}."
        return what
    if not callable(own[task]):
        return f"is of type {type(own[task]).__name__}. Write it as {SIGNATURES[task]}."
    if task == "attention":
        try:
            inspect.signature(own[task]).bind("q", "k", "v")
        except TypeError as error:
            return f"is not checked: it cannot be called as {SIGNATURES[task]}: {error}."
        except ValueError:
            pass  # a function written in C, as torch's own, has no signature
    return ""


def load(path):
    """Runs the file at path. Returns the answers in it, {"Block": a class}, and why the others are
    missing, {"attention": "is not in ..."}. ValueError if it does not run or has no answer."""
    try:
        own = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {describe(error)}") from None
    answers, missing = {}, {}
    for task in CHECKS:
        if why := why_missing(task, own, path):
            missing[task] = why
        else:
            answers[task] = own[task]
    if not answers:
        reasons = " ".join(f"{task} {why}" for task, why in missing.items())
        raise ValueError(f"there is nothing to check. {reasons}")
    return answers, missing


def check_file(path, sender):
    """Run in a process of its own. Sends through a connection, one after the other: "ready"; an
    error or None, the names that will be checked, and why the others are not; and for each name
    whether it is right, with what to say of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # main ends this process
    sender.send("ready")
    sys.argv = [path]
    sys.path[0] = str(Path(path).resolve().parent)  # as in python my_attention.py
    sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")
    try:
        answers, missing = load(path)
    except ValueError as error:
        sender.send((str(error), [], {}))
        return
    torch.set_default_device("cpu")  # whatever the file has set
    sender.send((None, list(answers), missing))
    for task, answer in answers.items():
        if found := find_mistake(task, answer):
            sender.send((False, found[1]))
        else:
            sender.send((True, praise(task, answer)))


def receive(receiver, limit):
    """What a process sends next. Mistake if it sends nothing for so many seconds, or is gone."""
    if not receiver.poll(limit):
        raise Mistake(f"still runs after {limit} s. Is there an endless loop?")
    try:
        return receiver.recv()
    except EOFError:
        raise Mistake("ended the program, by a crash or os._exit().") from None


def report(path, receiver, limit):
    """Prints what a process finds in the file at path, each within a limit in seconds. Returns
    the exit status. ValueError if there is nothing that can be checked."""
    try:
        error, tasks, missing = receive(receiver, limit)
    except Mistake as mistake:
        hint = 'What should not run here belongs below if __name__ == "__main__":'
        error = f"{path} {mistake} {hint}"
    if error:
        raise ValueError(error)
    status, stuck = 0, False
    for task in tasks:
        if stuck:
            print(f"{task} is not checked because of that.")
            continue
        try:
            right, message = receive(receiver, limit)
        except Mistake as mistake:
            right, message, stuck = False, str(mistake), True
        if not right:
            status = 1
        print(f"{task} {message}")
    for task, why in missing.items():
        print(f"{task} {why}")
    if status == 0:
        print("All that could be checked is right.")
    return status


def main():
    parser = argparse.ArgumentParser(
        "mine.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="a file in Python")
    parser.add_argument(
        "--limit", type=int, default=60, help="seconds for the file and for each answer [60]"
    )
    args = parser.parse_args()
    if args.limit < 1:
        parser.error("--limit: give 1 second or more")
    if not args.file.endswith(".py"):
        hint = "in a notebook, %%writefile my_attention.py at the top of a cell makes one"
        parser.error(f"{args.file}: give a .py file; {hint}")
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout cannot
        sys.stdout.reconfigure(errors="replace")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=check_file, args=(args.file, sender))
    child.start()
    sender.close()
    try:
        receiver.recv()  # the time limit begins here, when the other process has imported torch
        status = report(args.file, receiver, args.limit)
    except (ValueError, KeyboardInterrupt) as error:
        parser.error(str(error) or "stopped")
    finally:
        child.kill()  # it may be in an endless loop
    sys.exit(status)


if __name__ == "__main__":
    main()
