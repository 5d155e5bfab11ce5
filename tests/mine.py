"""The checks of --mine: one for each mistake one can make in attention(q, k, v), in a class
MultiHead or in a class Block, in an order in which each may rely on those before it."""

import inspect
import runpy
import timeit
import traceback
from functools import cache, partial
from math import inf, isclose, nan
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

B, H, T, D = 2, 3, 10, 16  # all different, as are their roots and that of C
C = H * D
PARTS = "attention", "feed_forward"  # of a Block; the matrices of the latter are C by 4 * C
MASK = "where tril() is 0 or, the same, where triu(1) is 1"
near = partial(isclose, rel_tol=0.05, abs_tol=0.003)


# 1. What the checks share.
def fail(message):
    """Ends a check with the message alone: not with its source, nor the error that led there."""
    raise pytest.fail.Exception(message, pytrace=False) from None


def stopped(error):
    """In one line what stopped an answer, and where: its last line outside of libraries."""
    others = ("<", __file__, str(Path(torch.__file__).parents[1]), str(Path(runpy.__file__).parent))
    tb = traceback.extract_tb(error.__traceback__)
    at = [f", line {f.lineno}: {f.line}" for f in tb if not f.filename.startswith(others)]
    return f"{type(error).__name__}: {' '.join(str(error).split())}" + "".join(at[-1:])


def load(path):
    """The answers in the file at path, as {"attention": a function, "Block": a class}."""
    try:
        own = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise pytest.UsageError(f"--mine {path}: {stopped(error)}") from None
    found = {task: own[task] for task in CHECKS if callable(own.get(task))}
    why = "it has only a class Head" if "Head" in own else "it has none of them"
    if attention := found.get("attention"):
        try:
            inspect.signature(getattr(attention, "forward", attention)).bind("q", "k", "v")
        except ValueError:
            pass  # written in C, as torch's own
        except TypeError as error:
            why = f"its attention cannot be called with q, k and v ({error})"
            del found["attention"]
    if not found:
        wants = "attention(q, k, v), all (B, n_head, T, head_size), or a class MultiHead or Block"
        wants += ", made as MultiHead(n_embd, n_head), from (B, T, n_embd) to the same shape"
        raise pytest.UsageError(f"--mine {path}: give a function {wants}; {why}")
    return found


def draw(*shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def compare_shape(name, call, shape, inputs):
    """Fails unless call() is a tensor of that shape."""
    try:
        result = call()
    except Exception as error:
        fail(f"Your {name} stops when {inputs} the shape {shape}: {stopped(error)}")
    got = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
    if got != shape:
        fail(f"Your result has the wrong shape: {got} where {inputs} {shape}.")


# 2. attention(q, k, v), all (B, H, T, D).
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


def name_scale(x, positions, tolerance):
    """Fails if scores are multiplied by x and not by 1 / sqrt(D); 0 and nan are no factors."""
    close = partial(isclose, x, rel_tol=tolerance, abs_tol=0.003)
    names = {C**-0.5: f"divided by sqrt({C}), the width of all heads"}
    names |= {positions**-0.5: "divided by sqrt(T), the number of positions"}
    names |= {1 / D: f"divided by {D}, not its root", D**0.5: f"multiplied by sqrt({D})"}
    if close(1):
        fail(f"Your attention is not scaled: divide the scores by sqrt({D}), the size of one head.")
    if 0.003 < abs(x) < inf and not close(D**-0.5):
        how = next((name for y, name in names.items() if close(y)), f"multiplied by {x:.2g}")
        fail(f"Your scores are {how}; divide by sqrt({D}), the size of one head.")


def attention_shape(attention):
    for shape in ((B, H, T, D), (1, 1, 1, 6)):
        call = partial(attention, *draw(*shape))
        compare_shape("attention", call, shape, "q, k and v have")


def attention_inputs(attention):
    attention(*(qkv := draw(B, H, T, D)))
    for name, x, kept in zip("qkv", qkv, draw(B, H, T, D), strict=True):
        if not x.equal(kept):
            fail(f"Your attention changes its input {name} in place: make a new tensor of it.")


def attention_axis(attention):
    w = weights(attention, *draw(B, H, T, D)[:2])
    over = {"keys": w.sum(-1), "queries": w.sum(-2)}
    over |= {"heads": w[:, :, -1].sum(1), "texts": w[:, :, -1].sum(0)}  # the last query sees all
    ones = [name for name, sums in over.items() if sums.allclose(torch.ones(()), atol=0.01)]
    if ones and "keys" not in ones:
        fail(f"Your softmax runs over the {ones[0]}: run it over the keys, softmax(dim=-1).")


def attention_texts(attention, dim=0, things="texts of a batch"):
    qkv, changed = draw(B, H, T, D), draw(B, H, T, D)
    changed.narrow(dim + 1, 1, (B, H)[dim] - 1).mul_(2)  # all but the first
    one, other = (attention(*x).select(dim, 0) for x in (qkv, changed))
    if not one.allclose(other, atol=1e-4, equal_nan=True):
        fail(f"Your attention mixes the {things}: the first one's result depends on the others.")


def attention_heads(attention):
    attention_texts(attention, 1, "heads")


def attention_past(attention):
    w = weights(attention, *torch.zeros(2, 1, 1, T, D))[0, 0]  # all that is seen weighs the same
    for t, s in (w + torch.ones(T, T).triu(1) < 1e-4).nonzero().tolist():
        what = f"{'present' if s == t else 'past'}: position {t} does not see position {s}"
        fail(f"Your attention hides the {what}. Mask only what comes later, {MASK}.")


def attention_future(attention):
    w = weights(attention, *torch.zeros(2, 1, 1, T, D))[0, 0]
    for t, s in (w.triu(1) > 1e-4).nonzero().tolist():
        what = f"position {t} sees position {s}. Set such scores to -inf before softmax, {MASK}."
        fail(f"Your attention looks into the future: {what}")


def attention_sum(attention):
    q, k, v = draw(1, 1, T, D)
    for t, total in enumerate(attention(q, k, torch.ones_like(v))[0, 0, :, 0].tolist()):
        if not near(total, 1):
            what = f"at position {t} they make {total:.2g}. Mask and scale, then take the softmax."
            fail(f"Your weights do not sum to one: {what}")


def attention_scale(attention):
    name_scale(factor(attention, H), T, 0.05)


def attention_torch(attention):
    q, k, v = draw(B, H, 64, D)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if attention(k, q, v).allclose(theirs, atol=1e-4):
        fail("Your attention takes q for k: the scores are q @ k.mT, with a row for each query.")
    if not (off := (attention(q, k, v) - theirs).abs().max()) < 1e-4:
        fail(f"Your attention passes all other checks but is off torch's by up to {off:.2g}.")


# 3. MultiHead and Block, made as make(n_embd, n_head). Their matrices are drawn anew, so that
# neither their layout nor what they start from matters.
def title(make):
    return getattr(make, "__name__", "module")


def matrices(module):
    """What is trained and has more than a number a channel, by name: no biases and no norms."""
    named = module.named_parameters()
    return {name: p for name, p in named if p.requires_grad and p.squeeze().dim() > 1}


def feeds(matrix):
    """Whether a matrix is one of a feed-forward, C by 4 * C."""
    return 4 * C in matrix.shape


def made(make, size=1.0, silent=None, seed=0):
    """A module in evaluation without biases. Its matrices keep the size of x, times size; those of
    one part, "attention" or "feed_forward", are 0 if it is silent."""
    torch.manual_seed(seed)
    module = make(C, H).eval()
    for p in module.parameters():
        if p.squeeze().dim() == 1 and not p.eq(p.flatten()[0]).all():  # norms are ones or zeros
            p.zero_()
    for p in matrices(module).values():
        p.normal_(0, C**-0.5).mul_(0 if silent == PARTS[feeds(p)] else size)
    return module


def normal(*shape, which=0):
    """Vectors of mean 0 and variance 1: a norm leaves them as they are."""
    return F.layer_norm(draw(*shape)[which], shape[-1:])


def relative(x, y):
    """How far x is from y, in sizes of y."""
    return ((x - y).norm() / y.norm()).item()


def sights(make, **how):
    """By how much position t's result changes with position s's input, at [t, s]: (T, T)."""
    module, (x, other) = made(make, 0.5, **how), draw(T, C)[:2]
    changed = torch.where(torch.eye(T).bool()[..., None], other, x)  # (T, T, C)
    return (module(changed) - module(x[None])).abs().amax(-1).T


def handed(make, d, e, **how):
    """What the second of the vectors e + d / 2 and e - d / 2 takes over from the first (texts, C),
    which is weight * d @ values @ projection, summed over the heads; and with all weights at 1."""
    module = made(make, silent="feed_forward", **how)
    x = torch.stack([e + d / 2, e - d / 2], 1)
    first, second = (module(x[:, i : i + 1])[:, 0] for i in (0, 1))  # alone, at weight 1
    residual = d * any(map(feeds, matrices(module).values()))
    return module(x)[:, 1] - second, first - second - residual


def angles(d):
    """Vectors d and others e at right angles, such that e + d / 2 and e - d / 2 are normal."""
    e = normal(*d.shape, which=1)
    e = F.layer_norm(e - (e * d).mean(-1, keepdim=True) * d, (C,))
    return 2**0.5 * d, 0.5**0.5 * e


def module_shape(make):
    for shape, heads in (((B, T, C), H), ((1, 1, 8), 2)):
        try:
            module = make(shape[2], heads)
        except Exception as error:
            fail(f"Your {title(make)}({shape[2]}, {heads}) cannot be made: {stopped(error)}")
        if not isinstance(module, nn.Module):
            fail(f"Your {title(make)} is no module: derive it, class {title(make)}(nn.Module).")
        call = partial(module.eval(), draw(*shape)[0])
        compare_shape(title(make), call, shape, "x has")


def count(make, owner, found):
    """Fails unless what is found are the four matrices of attention."""
    plain = [
        name
        for part in make(C, H).modules()
        for name, value in vars(part).items()
        if isinstance(value, list | tuple) and any(isinstance(x, nn.Module) for x in value)
    ]
    why = {3: "Is there no projection at the end, or one matrix for two?"}
    why |= {1 + 3 / H: "Is one layer used several times, as by [head] * n_head? Make each anew."}
    why |= dict.fromkeys((3 * H + 1, 4 * H), "Is each head n_embd wide? It is n_embd // n_head.")
    n = sum(p.numel() for p in found)
    hint = why.get(n / C**2, "Queries, keys, values and the projection have n_embd**2 each.")
    if plain:
        hint = f"Torch does not see what is in the plain list {plain[0]}: make it an nn.ModuleList."
    if n != 4 * C**2:
        what = f"{n:,} parameters for n_embd = {C}, not 4 * n_embd**2 = {4 * C**2:,}, biases aside"
        fail(f"Your {owner} has {what}. {hint}")


def multihead_parameters(make):
    count(make, title(make), matrices(make(C, H)).values())


def block_parameters(make):
    found = matrices(make(C, H)).values()
    wide = [p for p in found if feeds(p)]
    if [p.numel() for p in wide] != [4 * C**2] * 2:
        wants = "nn.Linear(n_embd, 4 * n_embd) and nn.Linear(4 * n_embd, n_embd), 8 * n_embd**2"
        what = f"{len(wide) or 'no'} matrices of n_embd by 4 * n_embd for a feed-forward"
        fail(f"Your {title(make)} has {what}. It needs two: {wants}.")
    count(make, f"{title(make)}'s attention", [p for p in found if not feeds(p)])


def module_gradient(make):
    module = made(make)
    with torch.enable_grad():
        y = module(draw(B, T, C)[0])
        try:
            if y.requires_grad:
                y.square().sum().backward()
        except RuntimeError as error:
            if "inplace operation" in str(error):
                what = "forward overwrites in place what its gradients need"
                fail(f"Your {title(make)} cannot learn: {what}. Write x = x + y, not x += y.")
            raise
    for name, p in matrices(module).items():
        if p.grad is None:
            why = "forward does not use it, or cuts it off, as .detach(), .data and no_grad do"
            fail(f"Your {title(make)} cannot learn {name}: {why}.")


def module_repeat(make):
    module, x = made(make), draw(B, T, C)[0]
    if not module(x).allclose(module(x), atol=1e-5, equal_nan=True):
        why = "Is dropout still on? F.dropout needs training=self.training, nn.Dropout nothing."
        fail(f"Your {title(make)} differs from call to call, even after eval(). {why}")


def module_inputs(make):
    made(make)(x := draw(B, T, C)[0])
    if not x.equal(draw(B, T, C)[0]):
        fail(f"Your {title(make)} changes its input x in place. Write x = x + y, not x += y.")


def module_texts(make):
    module, (x, other, _) = made(make), draw(B, T, C)
    other[0] = x[0]
    inner = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
    hint = " Give nn.MultiheadAttention batch_first=True." * any(not m.batch_first for m in inner)
    if not module(x)[0].allclose(module(other)[0], atol=1e-4, equal_nan=True):
        what = "the texts of a batch: the first one's result depends on the others."
        fail(f"Your {title(make)} mixes {what}{hint}")


def module_nan(make):
    for t in made(make)(draw(1, T, C)[0])[0].isnan().any(-1).nonzero().flatten().tolist():
        what = f"nan at position {t}: softmax runs over scores that are all -inf there"
        hint = f"Let it run over the keys, softmax(dim=-1), and mask only what comes later, {MASK}."
        fail(f"Your {title(make)} gives {what}. {hint}")


def block_alone(make):
    alone = sights(make, silent="attention") < 1e-5
    for t, s in (~alone & ~torch.eye(T).bool()).nonzero().tolist():
        what = f"position {t} sees position {s} even if attention adds nothing"
        hint = "A norm and the feed-forward take each position alone: nn.LayerNorm(n_embd)."
        fail(f"Your {title(make)} mixes positions outside of attention: {what}. {hint}")


def module_places(make):
    seen = sights(make) > 1e-5
    for t, s in torch.cartesian_prod(torch.arange(1, T - 2), torch.arange(T - 1)).tolist():
        # Whatever the mask, what is seen depends on t - s alone, but at the ends, where it may
        # hide all, and for t itself, which may be seen as the query only.
        if seen[t, s] != seen[t + 1, s + 1] and t != s:
            one, other = ("sees" if x else "does not see" for x in (seen[t, s], seen[t + 1, s + 1]))
            what = f"position {t} {one} position {s}, but {t + 1} {other} {s + 1}"
            cut = "Cut x into heads by view(B, T, n_head, -1).transpose(1, 2)"
            back = "lay them side by side by transpose(1, 2).reshape(B, T, n_embd)"
            fail(f"Your {title(make)} mixes up positions and heads: {what}. {cut}, {back}.")


def module_past(make):
    seen = sights(make) > 1e-5
    if seen.equal(seen & torch.eye(T).bool()):
        hint = "Cut x into heads by view(B, T, n_head, -1).transpose(1, 2); scores are (T, T) each"
        fail(f"Your {title(make)} hides the past: no position sees another. {hint}.")
    for t, s in (~seen & torch.ones(T, T).tril().bool()).nonzero().tolist():
        what = f"{'present' if s == t else 'past'}: position {t} does not see position {s}"
        fail(f"Your {title(make)} hides the {what}. Mask only what comes later, {MASK}.")


def module_sum(make):
    module, x = made(make), draw(1, C)[0].expand(1, T, C)
    y, alone = module(x)[0], module(x[:, :1])[0, 0]
    for t in ((y - alone).norm(dim=-1) > 0.01 * alone.norm()).nonzero().flatten().tolist():
        what = f"of {T} equal vectors, that at position {t} comes out unlike one alone"
        hint = "Mask and scale, then take the softmax over the keys, softmax(dim=-1)."
        fail(f"Your weights do not sum to one: {what}. {hint}")


def module_future(make):
    for t, s in (sights(make).triu(1) > 1e-5).nonzero().tolist():
        what = f"position {t} sees position {s}. Set such scores to -inf before softmax, {MASK}."
        fail(f"Your {title(make)} looks into the future: {what}")


def block_residual(make):
    x = normal(1, T, C)
    lost = [part for part in PARTS if not made(make, silent=part)(x).abs().max() > 1e-4]
    if lost:
        what = f"around {' and '.join(lost)}: where that adds nothing, nothing is left of x"
        fail(f"Your {title(make)} has no residual {what}. Add its result to x: x = x + y.")


def block_post_norm(make):
    module, x = made(make, 0.1), normal(1, T, C)
    if relative(module(100 * x), module(x)) < 0.3:
        what = "x itself: 100 * x comes out no larger than x. Norm what each part takes in, not x"
        fail(f"Your {title(make)} norms {what}: x = x + attention(norm(x)).")


def block_carry(make):
    module, x = made(make, 0.1), normal(1, T, C)
    if relative(module(100 * x), 100 * x) > 0.3:
        what = f"{(module(100 * x) * x).sum() / (100 * x * x).sum():.2g} times x"
        fail(f"Your {title(make)} carries on {what}, not x itself. Add once to x: x = x + y.")


def block_norm(make):
    x, bare = normal(1, T, C), []
    for part, other in zip(PARTS, reversed(PARTS), strict=True):
        module = made(make, 0.1, silent=other)
        if (module(100 * x) - 100 * x).norm() > 3 * (module(x) - x).norm():
            bare.append(part)
    if bare:
        what = f"no norm before {' and '.join(bare)}: what it adds to 100 * x is not what it adds"
        fail(f"Your {title(make)} has {what} to x. Write x = x + {bare[0]}(norm(x)).")
    if relative(made(make, 0.1)(x), x) > 0.3:
        what = "after a part: even if its matrices are small it adds much"
        fail(f"Your {title(make)} has a norm {what}. Norm goes before: x = x + attention(norm(x)).")


def block_activation(make):
    module = made(make, silent="attention")
    d, e = angles(normal(1, T, C))
    x, one, other = (module(x) - x for x in (d / 2 + e, 2**-0.5 * d, 2**0.5 * e))
    if relative((one + other) * 0.5**0.5, x) < 1e-3:
        hint = "Put a GELU or a ReLU between"
        fail(f"Your feed-forward is one matrix in effect, as nothing is between two. {hint}.")


def block_order(make):
    attention, feed_forward = (made(make, silent=part) for part in reversed(PARTS))
    x = draw(1, T, C)[0]
    y = made(make)(x)
    orders = {"has the feed-forward before attention": attention(feed_forward(x))}
    orders["gives attention and feed-forward the same x"] = attention(x) + feed_forward(x) - x
    if relative(y, feed_forward(attention(x))) > 1e-3:
        what = [name for name, other in orders.items() if relative(y, other) < 1e-3]
        what = what[0] if what else "combines attention and feed-forward in another way"
        right = "x = x + attention(norm(x)), then x = x + feed_forward(norm(x))"
        fail(f"Your {title(make)} {what}. It should be {right}.")


def module_heads(make):
    d = normal(1, C).expand(64, C)
    sizes = torch.linalg.svdvals(handed(make, *angles(d), size=0.5)[0])  # d is one, weights vary
    n = (sizes > 1e-3 * sizes[0]).sum().item()
    if n == 1:
        hint = f"Cut x into heads of n_embd // n_head channels, with a softmax for each of {H}."
        fail(f"Your {title(make)} looks with one head, whatever n_head is. {hint}")
    if n != H:
        hint = " Is n_head taken for the size of a head?" * (n == D)
        fail(f"Your {title(make)} looks with {n} heads where n_head is {H}.{hint}")


def module_scale(make):
    d, e = angles(normal(256, C))
    found = []
    for size in (0.1, 0.15):
        change = total = 0
        for seed in range(4):
            (one, full), (other, _) = (handed(make, d, x, size=size, seed=seed) for x in (e, -e))
            change, total = change + (one - other).norm() ** 2, total + full.norm() ** 2
        score = 2 * (change / total) ** 0.5  # the weights are near 1 / 2 ± score / 4
        found.append(score.item() / size**2 / D**0.5)
    if isclose(*found, rel_tol=0.1):  # else a score is not a product of queries and keys
        name_scale(sum(found) / 2, 2, 0.12)


CHECKS = {
    "attention": [
        attention_shape,
        attention_inputs,
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
    ],
}


@cache
def mistake(task, answer):
    """The first check that an answer fails, with its message; None if it passes them all."""
    for check in CHECKS[task]:
        try:
            with torch.no_grad():
                check(answer)
        except pytest.fail.Exception as failed:
            return check, str(failed)
        except Exception as error:
            return check, f"Your {task} stops: {stopped(error)}"


# 4. What is said of an answer without mistakes.
def product(q, k, v, scale=lambda q: q.size(3) ** -0.5, mask=lambda x: x.triu(1), weigh=None):
    """Attention in two matrix products, right unless told otherwise."""
    scores = q @ k.mT * scale(q)
    scores = scores.masked_fill(mask(torch.ones(scores.shape[-2:])).bool(), -inf)
    return (weigh(scores) if weigh else scores.softmax(-1)) @ v


class MultiHead(nn.Module):
    """Multi-head attention in one batched product for all heads, right unless changed."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def cut(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def attention(self, q, k, v):
        return product(q, k, v)

    def join(self, x):
        return x.transpose(1, 2).flatten(2)

    def forward(self, x):
        return self.proj(self.join(self.attention(*map(self.cut, self.qkv(x).chunk(3, -1)))))


class Calls(TorchFunctionMode):
    """Counts the calls of torch."""

    n = 0

    def __torch_function__(self, f, types, args=(), kwargs=None):
        self.n += 1
        return f(*args, **kwargs or {})


def calls(module):
    with Calls() as counted:
        module(draw(B, T, C)[0])
    return counted.n


def times(answer, other, inputs):
    """How many times as long an answer takes as the other does."""
    best = [min(timeit.repeat(partial(f, *inputs), number=1, repeat=5)) for f in (answer, other)]
    return best[0] / best[1]


@torch.no_grad()
def praise(task, answer):
    """What is said of an answer that passes all checks."""
    if task == "attention":
        x = times(answer, product, draw(B, H, 64, D))
        said = f"Your attention takes {x:.1f} times as long as one matrix product would"
        return said + ": is there a Python loop over positions?" * (x > 5)
    few, many = (calls(answer(C, heads).eval()) for heads in (2, 8))
    loop = f"a Python loop over the heads, {few} calls of torch for 2 heads and {many} for 8"
    if task == "Block":
        return f"Your {title(answer)} is right" + f", with {loop}" * (many > few)
    x = times(answer(C, 8).eval(), MultiHead(C, 8), draw(B, 32, C)[:1])
    said = f"Your {title(answer)} takes {x:.1f} times as long as one product for all heads would"
    return said + f": there is {loop}" * (many > few)
