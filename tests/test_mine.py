"""The checks of tests/lab/mine.py: right answers, each written differently, pass all of them, and
of the many wrong ones each fails the check meant for it. Then the command, as a reader types it."""

import inspect
import subprocess
import sys
from functools import partial
from math import inf
from multiprocessing import Pipe
from pathlib import Path

import mine
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpt


# 1. Right answers.
def product(q, k, v, scale=lambda q: q.size(3) ** -0.5, mask=lambda x: x.triu(1), weigh=None):
    """Attention in two matrix products, right unless told otherwise."""
    scores = q @ k.mT * scale(q)
    scores = scores.masked_fill(mask(torch.ones(scores.shape[-2:])).bool(), -inf)
    w = weigh(scores) if weigh else scores.softmax(-1)
    return w @ v


def loops(q, k, v):
    """Attention in two loops, over the queries and the keys that each sees: right and slow."""
    result = torch.zeros_like(v)
    for t in range(q.size(2)):
        scores = [(q[:, :, t] * k[:, :, s]).sum(-1) / q.size(3) ** 0.5 for s in range(t + 1)]
        for s, weight in enumerate(torch.stack(scores).softmax(0)):
            result[:, :, t] += weight[..., None] * v[:, :, s]
    return result


def tril(q, k, v):
    """As a lecture writes it: what comes later is where the lower triangle is 0."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    mask = torch.tril(torch.ones(q.shape[-2], q.shape[-2]))
    return F.softmax(scores.masked_fill(mask == 0, float("-inf")), dim=-1) @ v


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
        q, k, v = (self.cut(y) for y in self.qkv(x).chunk(3, -1))
        return self.proj(self.join(self.attention(q, k, v)))


class Head(nn.Module):
    """One head of a lecture, which needs a block size and drops weights out in training."""

    def __init__(self, n_embd, size):
        super().__init__()
        self.key = nn.Linear(n_embd, size, bias=False)
        self.query = nn.Linear(n_embd, size, bias=False)
        self.value = nn.Linear(n_embd, size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(64, 64)))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(self.tril[: x.size(1), : x.size(1)] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ v


class Heads(nn.Module):
    """A lecture's heads one by one, with a biased projection; right unless changed."""

    collect, last = nn.ModuleList, nn.Linear

    def size(self, n_embd, n_head):
        return n_embd // n_head

    def __init__(self, n_embd, n_head):
        super().__init__()
        size = self.size(n_embd, n_head)
        self.heads = self.collect([Head(n_embd, size) for _ in range(n_head)])
        self.proj = self.last(n_head * size, n_embd)

    def forward(self, x):
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class Separate(nn.Module):
    """Queries, keys and values from a biased matrix each, turned by their positions."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.q, self.k, self.v, self.out = (nn.Linear(n_embd, n_embd) for _ in range(4))

    def cut(self, x):
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)

    def turn(self, x):
        a, b = x.chunk(2, -1)
        angle = torch.arange(x.size(2))[:, None] * 0.5 ** torch.arange(a.size(-1))
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x):
        q, k, v = self.turn(self.cut(self.q(x))), self.turn(self.cut(self.k(x))), self.v(x)
        y = F.scaled_dot_product_attention(q, k, self.cut(v), is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(x.shape))


class Tensors(nn.Module):
    """A matrix a head in one parameter each, which starts at 0, and sums by their letters."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(3, n_head, n_embd, n_embd // n_head))
        self.out = nn.Parameter(torch.zeros(n_head, n_embd // n_head, n_embd))

    def forward(self, x):
        q, k, v = torch.einsum("btc,nhcd->nbhtd", x, self.qkv)
        return torch.einsum("bhtd,hdc->btc", product(q, k, v), self.out)


class Unit(MultiHead):
    """Queries and keys of one length, and a mask among the parameters that is not trained."""

    def __init__(self, n_embd, n_head):
        super().__init__(n_embd, n_head)
        self.mask = nn.Parameter(torch.ones(64, 64).triu(1), requires_grad=False)

    def attention(self, q, k, v):
        mask = self.mask[: q.size(2), : q.size(2)]
        return product(4 * F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, mask=lambda x: mask)


class Near(MultiHead):
    """Scores fall with the distance, in each head more than in the next, and the mask is finite."""

    def attention(self, q, k, v):
        place = torch.arange(q.size(2))
        fall = (place - place[:, None]) * 0.5 ** torch.arange(1, self.n_head + 1)[:, None, None]
        scores = q @ k.mT / q.size(-1) ** 0.5 + fall
        return scores.masked_fill(place > place[:, None], -1e9).softmax(-1) @ v


class Torch(nn.Module):
    """Torch's own module in one's own, with arguments of other names."""

    def __init__(self, width, heads, dropout=0.1):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def forward(self, x):
        future = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        return self.inner(x, x, x, attn_mask=future, need_weights=False)[0]


class Block(nn.Module):
    """Attention, then a feed-forward, each after a norm and added to x; right unless changed."""

    heads, middle, norm, width, bias = MultiHead, nn.GELU, nn.LayerNorm, 4, False

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.attention = self.heads(n_embd, n_head)
        up = nn.Linear(n_embd, self.width * n_embd, self.bias)
        down = nn.Linear(self.width * n_embd, n_embd, self.bias)
        self.feed_forward = nn.Sequential(up, self.middle(), down)
        self.norm1, self.norm2 = self.norm(n_embd), self.norm(n_embd)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class ByHand(nn.Module):
    """All in one class: parameters, functions and slices of channels for heads."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head, self.c = n_head, n_embd
        self.qkv = nn.Parameter(torch.randn(n_embd, 3 * n_embd) * 0.02)
        self.proj = nn.Parameter(torch.randn(n_embd, n_embd) * 0.02)
        self.up = nn.Parameter(torch.randn(n_embd, 4 * n_embd) * 0.02)
        self.down = nn.Parameter(torch.randn(4 * n_embd, n_embd) * 0.02)

    def forward(self, x):
        q, k, v = (F.rms_norm(x, (self.c,)) @ self.qkv).split(self.c, dim=2)
        size = self.c // self.n_head
        heads = [tril(*(y[..., i : i + size] for y in (q, k, v))) for i in range(0, self.c, size)]
        x = x + torch.cat(heads, -1) @ self.proj
        return x + torch.tanh(F.rms_norm(x, (self.c,)) @ self.up) @ self.down


class Layer(nn.TransformerEncoderLayer):
    """Torch's own, told to be causal."""

    def __init__(self, n_embd, n_head):
        super().__init__(n_embd, n_head, 4 * n_embd, 0.1, batch_first=True, norm_first=True)

    def forward(self, x):
        return super().forward(x, nn.Transformer.generate_square_subsequent_mask(x.size(1)))


def change(base, **changes):
    """A class like base, but for what is changed."""
    return type(base.__name__, (base,), changes)


multihead, block = partial(change, MultiHead), partial(change, Block)
RIGHT = {
    "of gpt.py": ("attention", gpt.attention),
    "loops": ("attention", loops),
    "triu": ("attention", product),
    "tril": ("attention", tril),
    "one matrix": ("MultiHead", MultiHead),
    "heads one by one": ("MultiHead", Heads),
    "separate matrices, biases, flash and rotary": ("MultiHead", Separate),
    "matrices a head": ("MultiHead", Tensors),
    "unit queries and keys": ("MultiHead", Unit),
    "scores that fall with the distance": ("MultiHead", Near),
    "torch's attention": ("MultiHead", Torch),
    "a block": ("Block", Block),
    "a block of heads one by one, ReLU": ("Block", block(heads=Heads, middle=nn.ReLU)),
    "a block of torch's attention, tanh": ("Block", block(heads=Torch, middle=nn.Tanh)),
    "a block with rotary and biases": ("Block", block(heads=Separate, bias=True)),
    "a block by hand": ("Block", ByHand),
    "torch's layer": ("Block", Layer),
}


@pytest.mark.parametrize("task, answer", RIGHT.values(), ids=RIGHT)
def test_a_right_answer_passes_all_checks(task, answer):
    assert mine.find_mistake(task, answer) is None


@pytest.mark.parametrize(
    "name, says",
    [
        ("triu", "is right."),
        ("loops", "is right. It has a Python loop over the positions: "),
        ("one matrix", "is right."),
        ("heads one by one", "is right. It has a Python loop over the heads: "),
        ("a block by hand", "is right. It has a Python loop over the heads: "),
        ("torch's layer", "is right."),
    ],
)
def test_a_right_answer_is_told_of_its_loops(name, says):
    said = mine.praise(*RIGHT[name])
    assert said == says or says.endswith(": ") and said.startswith(says)


# 2. Wrong answers: the check that each fails first, a phrase of what is said, the answer.
wrong = partial(partial, product)


def flat_mask(q, k, v):
    """A mask for ten positions, whatever the text is."""
    return product(q, k, v, mask=lambda x: torch.ones(10, 10).triu(1))


WRONG_ATTENTION = [
    ("shape", "stops when its input has the shape (2, 3, 10, 16): Ru", lambda q, k, v: q @ k @ v),
    ("shape", "wrong shape, (2, 10, 48)", lambda *qkv: product(*qkv).transpose(1, 2).flatten(2)),
    ("shape", "returns None. Is the return", lambda q, k, v: None),
    ("shape", "type tuple. Return one tensor", lambda *qkv: (product(*qkv), None)),
    ("shape", "type ndarray. Return one tensor", lambda *qkv: product(*qkv).numpy()),
    ("shape", "type torch.float64. Its input", lambda *qkv: product(*(x.double() for x in qkv))),
    ("shape", "but returns the wrong shape, (3, 10, 16)", lambda *qkv: product(*qkv).squeeze()),
    ("shape", "Is the number of positions written in?", flat_mask),
    ("shape", "Is the number of heads written in?", lambda *qkv: product(*qkv).view(-1, 3, 10, 16)),
    ("inputs", "changes its input q in place", lambda q, k, v: product(q.div_(2), 2 * k, v)),
    ("repeat", "Leave dropout out", lambda *qkv: F.dropout(product(*qkv), 0.1)),
    ("axis", "over the queries", wrong(weigh=lambda s: s.softmax(-2))),
    ("axis", "over the heads", wrong(weigh=lambda s: s.softmax(1))),
    ("axis", "over the texts", wrong(weigh=lambda s: s.softmax(0))),
    ("texts", "mixes the texts of a batch", lambda q, k, v: product(q, k.flip(0), v)),
    ("heads", "mixes the heads", wrong(weigh=lambda s: s.sum(1, True).softmax(-1))),
    ("past", "hides the present: position 1", wrong(mask=lambda x: x.triu(0))),
    ("past", "position 1 does not see position 0", lambda q, k, v: v),
    ("past", "hides the past: position 1", wrong(mask=lambda x: x.tril(-1))),
    ("past", "hides the past: position 3", wrong(mask=lambda x: x.triu(1) + x.tril(-3))),
    ("future", "looks into the future", wrong(mask=lambda x: 0 * x)),
    ("future", "position 0 sees position 1", wrong(mask=lambda x: x.triu(2))),
    ("sum", "do not sum to one", wrong(weigh=torch.exp)),
    ("sum", "at position 0 they make nan", wrong(mask=lambda x: x.triu(1) + x.cumsum(0).eq(1))),
    ("sum", "at position 0 they make 0.25", wrong(weigh=lambda s: s.softmax(-1) / 4)),
    ("sum", "then take the softmax", lambda q, k, v: (q @ k.mT / 4).softmax(-1).tril() @ v),
    ("scale", "does not scale its scores. Divide them by sqrt(16)", wrong(scale=lambda q: 1)),
    ("scale", "sqrt(48), the width", wrong(scale=lambda q: (q.size(1) * q.size(3)) ** -0.5)),
    ("scale", "sqrt(T), the number", wrong(scale=lambda q: q.size(2) ** -0.5)),
    ("scale", "divides its scores by 16, not", wrong(scale=lambda q: 1 / q.size(3))),
    ("scale", "multiplies its scores by sqrt(16)", wrong(scale=lambda q: q.size(3) ** 0.5)),
    ("scale", "multiplies its scores by 0.1.", wrong(scale=lambda q: 0.1)),
    ("scale", "0.25 whatever the size of a head", wrong(scale=lambda q: 16**-0.5)),
    ("torch", "swaps q and k", lambda q, k, v: product(k, q, v)),
    ("torch", "off by up to", lambda *qkv: product(*(x.bfloat16() for x in qkv)).float()),
]


def weighed(**how):
    """A MultiHead with another product."""
    return multihead(attention=lambda self, *qkv: product(*qkv, **how))


def heads_of(number):
    """A MultiHead that cuts x into so many heads, whatever n_head is."""
    return multihead(cut=lambda self, x: x.unflatten(-1, (number, -1)).transpose(1, 2))


def heads_of_size(size):
    """A MultiHead with heads of so many channels. A size of None stands for n_head."""
    return multihead(cut=lambda self, x: x.unflatten(-1, (-1, size or self.n_head)).transpose(1, 2))


def view(self, x):
    """Cuts the rows of (T, C), not each row, into heads."""
    return x.reshape(x.size(0), self.n_head, x.size(1), -1)


def hide_present(scores):
    """Weights on what came earlier alone; none at the first position."""
    return scores.masked_fill(torch.eye(scores.size(-1)).bool(), -inf).softmax(-1).nan_to_num()


def no_projection(self, x):
    """Nothing but the values, so that a matrix is left out."""
    return self.qkv(x).chunk(3, -1)[2]


def first_head_twice(scores):
    """Weights of the first head in place of those of the last."""
    return torch.cat([scores[:, :1], scores[:, :-1]], 1).softmax(-1)


def repeat_head(self, heads):
    """The same layer several times."""
    return nn.ModuleList(heads[:1] * len(heads))


class Narrow(MultiHead):
    """As if n_embd were 48."""

    def __init__(self, n_embd, n_head):
        super().__init__(48, n_head)


class Shared(Separate):
    """One matrix for queries, keys and values."""

    def __init__(self, n_embd, n_head):
        super().__init__(n_embd, n_head)
        self.k = self.v = self.q


class TimeFirst(Torch):
    """Leaves torch's order of dimensions: it attends to the other texts."""

    def __init__(self, n_embd, n_head):
        super().__init__(n_embd, n_head)
        self.inner.batch_first = False

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class NoModule:
    def __init__(self, n_embd, n_head):
        pass


class Unmade(nn.Module):
    """Forgets super().__init__()."""

    def __init__(self, n_embd, n_head):
        self.proj = nn.Linear(n_embd, n_embd)


one_head = multihead(cut=lambda self, x: x[:, None], join=lambda self, x: x[:, 0])

# The classes of a lecture that take what they need from the top of the file.
n_embd, block_size, dropout = 384, 256, 0.2


class LectureHead(nn.Module):
    def __init__(self, head_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.dropout = nn.Dropout(dropout)

    forward = Head.forward


class MultiHeadAttention(nn.Module):
    def __init__(self, num_heads, head_size):
        super().__init__()
        self.heads = nn.ModuleList([LectureHead(head_size) for _ in range(num_heads)])
        self.proj = nn.Linear(head_size * num_heads, n_embd)

    forward = Heads.forward


class LectureBlock(Block):
    def heads(self, n_embd, n_head):
        return MultiHeadAttention(n_head, n_embd // n_head)


class SmallMask(MultiHead):
    """A mask for fewer positions than there are."""

    def attention(self, q, k, v):
        return product(q, k, v, mask=lambda x: torch.ones(max_length, max_length).triu(1))


max_length = 10
WRONG_MULTIHEAD = [
    ("shape", "cannot be made with n_embd = 48 and n_head = 3: Type", multihead(__init__=id)),
    ("shape", "AttributeError: cannot assign module before", Unmade),
    ("shape", "is not an nn.Module. Derive its class from nn.Module", NoModule),
    ("shape", "stops when its input has the shape (2, 10, 48)", multihead(join=lambda _, x: x)),
    ("shape", "wrong shape, (2, 3, 10, 16)", multihead(forward=lambda self, x: self.cut(x))),
    ("shape", "returns a value of type tuple", multihead(forward=lambda self, x: (x, None))),
    ("shape", "It uses block_size, n_embd from the top of the file", MultiHeadAttention),
    ("shape", "with (n_embd, n_head); yours takes (num_heads, head_size)", MultiHeadAttention),
    ("shape", "number of positions written in? It uses max_length from", SmallMask),
    ("shape", "Is the number of heads written in?", heads_of(3)),
    ("shape", "Is the number of channels written in?", Narrow),
    ("parameters", "Is there no projection", change(Heads, last=nn.Identity)),
    ("parameters", "in the plain list heads", change(Heads, collect=list)),
    ("parameters", "as by [head] * n_head", change(Heads, collect=repeat_head)),
    ("parameters", "Is each head n_embd wide", change(Heads, size=lambda _, c, h: c)),
    ("parameters", "4,608 parameters for n_embd = 48, biases aside, not 4 * n_embd**2", Shared),
    ("inputs", "x in place", multihead(forward=lambda self, x: MultiHead.forward(self, x.mul_(2)))),
    ("gradient", "learn proj.weight", multihead(forward=no_projection)),
    (
        "learning",
        "cannot learn a part of qkv.weight",
        weighed(weigh=lambda s: s.softmax(-1).detach()),
    ),
    ("repeat", "Is dropout still on", weighed(weigh=lambda s: F.dropout(s.softmax(-1), 0.1))),
    ("texts", "mixes the texts of a batch", weighed(weigh=lambda s: s.flip(0).softmax(-1))),
    ("texts", "Give nn.MultiheadAttention batch_first=True", TimeFirst),
    ("nan", "nan at position 0", weighed(mask=lambda x: x.triu(0))),
    ("nan", "over the keys, dim=-1", weighed(weigh=lambda s: s.softmax(1))),
    ("places", "mixes up positions and heads", multihead(cut=view)),
    (
        "places",
        "reshape(B, T, n_embd)",
        multihead(join=lambda _, x: x.reshape(len(x), x.size(2), -1)),
    ),
    ("past", "no position sees another", weighed(mask=lambda x: 1 - x.diag().diag())),
    ("past", "position 1 does not see position 0", weighed(mask=lambda x: x.tril(-1))),
    ("past", "position 3 does not see", weighed(mask=lambda x: x.triu(1) + x.tril(-3))),
    ("past", "hides the present: position 0", weighed(weigh=hide_present)),
    ("sum", "of 10 equal vectors, the one at position 1", weighed(weigh=torch.exp)),
    ("sum", "position 0 comes out unlike one alone", weighed(weigh=lambda s: s.softmax(-2))),
    ("future", "position 0 sees position 1", weighed(mask=lambda x: 0 * x)),
    ("future", "or, the same, where triu(1) is 1", weighed(mask=lambda x: x.triu(2))),
    ("heads", "looks with one head", one_head),
    ("heads", "whatever n_head is", weighed(weigh=lambda s: s.sum(1, True).softmax(-1))),
    ("heads", "16 heads where n_embd is 48 and n_head is 3. Is n_head taken", heads_of_size(None)),
    ("heads", "4 heads where n_embd is 64 and n_head is 2", heads_of_size(16)),
    ("heads", "2 heads where n_embd is 48", weighed(weigh=first_head_twice)),
    ("scale", "does not scale its scores. Divide them by sqrt(16)", weighed(scale=lambda q: 1)),
    ("scale", "sqrt(48), the width", weighed(scale=lambda q: (q.size(1) * q.size(3)) ** -0.5)),
    ("scale", "sqrt(T), the number", weighed(scale=lambda q: q.size(2) ** -0.5)),
    ("scale", "divides its scores by 16, not", weighed(scale=lambda q: 1 / q.size(3))),
    ("scale", "multiplies its scores by sqrt(16)", weighed(scale=lambda q: q.size(3) ** 0.5)),
    ("scale", "multiplies its scores by 0.", weighed(scale=lambda q: 0.1)),
    ("scale", "whatever the size of a head is", weighed(scale=lambda q: 16**-0.5)),
]


class TimeNorm(nn.Module):
    """Norms each channel over the positions instead of each position over its channels."""

    dim = 1

    def __init__(self, n_embd):
        super().__init__()

    def forward(self, x):
        std, mean = torch.std_mean(x, self.dim, correction=0, keepdim=True)
        return (x - mean) / (std + 1e-5)


class Wide(Block):
    """A feed-forward of 192 channels, which is right for an n_embd of 48."""

    def __init__(self, n_embd, n_head):
        super().__init__(n_embd, n_head)
        self.feed_forward[0] = nn.Linear(n_embd, 192)
        self.feed_forward[2] = nn.Linear(192, n_embd)


def sums(forward):
    """A Block with another forward(x, a, f), where a is attention after its norm, f the other."""

    def call(self, x):
        def a(x):
            return self.attention(self.norm1(x))

        def f(x):
            return self.feed_forward(self.norm2(x))

        return forward(x, a, f)

    return block(forward=call)


def norms(forward):
    """A Block with another forward(x, attention, feed_forward, norm1, norm2)."""

    def call(self, x):
        return forward(x, self.attention, self.feed_forward, self.norm1, self.norm2)

    return block(forward=call)


WRONG_BLOCK = [
    ("shape", "cannot be made with n_embd", block(heads=lambda self, c, _: c // 0)),
    ("shape", "stops when its input has the shape (2, 10, 48)", sums(lambda x, a, f: a(x.mT))),
    ("shape", "It uses block_size, n_embd from the top of the file", LectureBlock),
    ("parameters", "has no matrices of n_embd by 4 * n_embd", block(width=2)),
    ("parameters", "where n_embd is 64", Wide),
    ("parameters", "2,304 parameters in its att", block(heads=lambda self, c, _: nn.Linear(c, c))),
    ("inputs", "Write x = x + y, not x += y", sums(lambda x, a, f: x.add_(a(x)) + f(x))),
    ("gradient", "learn feed_forward.0.weight", sums(lambda x, a, f: x + a(x))),
    ("gradient", "overwrites in place", sums(lambda x, a, f: (y := x + a(x)).add_(f(y)))),
    ("repeat", "Is dropout still on", sums(lambda x, a, f: (y := x + a(x)) + F.dropout(f(y), 0.1))),
    ("texts", "mixes the texts of a batch", block(norm=change(TimeNorm, dim=0))),
    ("nan", "nan at position 0", block(heads=weighed(mask=lambda x: x.triu(0)))),
    ("alone", "position 1 even if attention adds nothing", block(norm=TimeNorm)),
    ("places", "mixes up positions and heads", block(heads=multihead(cut=view))),
    ("past", "position 1 does not see", block(heads=weighed(mask=lambda x: x.tril(-1)))),
    ("sum", "position 0 comes out", block(heads=weighed(weigh=lambda s: s.softmax(-2)))),
    ("future", "position 0 sees position 1", block(heads=weighed(mask=lambda x: 0 * x))),
    ("residual", "around attention and feed_forward", sums(lambda x, a, f: f(a(x)))),
    ("residual", "around attention: where", sums(lambda x, a, f: (y := a(x)) + f(y))),
    ("residual", "around feed_forward: where", sums(lambda x, a, f: f(x + a(x)))),
    ("post_norm", "no larger", norms(lambda x, a, f, n, m: m((y := n(x + a(x))) + f(y)))),
    ("post_norm", "x itself", norms(lambda x, a, f, n, m: (z := m((y := n(x)) + a(y))) + f(z))),
    ("carry", "carries on 2 times x", sums(lambda x, a, f: 2 * (y := x + a(x)) + f(y))),
    ("carry", "carries on 0.5 times x", sums(lambda x, a, f: (y := (x + a(x)) / 2) + f(y))),
    ("norm", "no norm before attention and feed_forward", block(norm=nn.Identity)),
    ("norm", "before attention: what", norms(lambda x, a, f, n, m: (y := x + a(x)) + f(n(y)))),
    ("norm", "before feed_forward: what", norms(lambda x, a, f, n, m: (y := x + a(n(x))) + f(y))),
    ("norm", "a norm after a part", norms(lambda x, a, f, n, m: (y := x + n(a(x))) + m(f(y)))),
    ("activation", "nothing between the two matrices", block(middle=nn.Identity)),
    ("order", "feed-forward before attention", sums(lambda x, a, f: (y := x + f(x)) + a(y))),
    ("order", "the same x", sums(lambda x, a, f: x + a(x) + f(x))),
    ("order", "in another way", sums(lambda x, a, f: x + f(x + a(x)))),
    ("heads", "looks with one head", block(heads=one_head)),
    ("scale", "does not scale its scores", block(heads=weighed(scale=lambda q: 1))),
    ("scale", "whatever the size of", block(heads=weighed(scale=lambda q: 16**-0.5))),
]


def expect(task, check, phrase, answer):
    """An answer must fail the check meant for it first, with that phrase in one line."""
    failed, message = mine.find_mistake(task, answer)
    assert failed.split("_", 1)[1] == check
    assert phrase in message
    assert "\n" not in message


@pytest.mark.parametrize("check, phrase, answer", WRONG_ATTENTION)
def test_a_wrong_attention_fails_the_check_meant_for_it(check, phrase, answer):
    expect("attention", check, phrase, answer)


@pytest.mark.parametrize("check, phrase, answer", WRONG_MULTIHEAD)
def test_a_wrong_multihead_fails_the_check_meant_for_it(check, phrase, answer):
    expect("MultiHead", check, phrase, answer)


@pytest.mark.parametrize("check, phrase, answer", WRONG_BLOCK)
def test_a_wrong_block_fails_the_check_meant_for_it(check, phrase, answer):
    expect("Block", check, phrase, answer)


# 3. The file and the command.
@pytest.mark.parametrize(
    "code, says",
    [
        (None, "mine.py cannot be run: FileNotFoundError: "),
        ("def attention(q, k, v) return v", "mine.py cannot be run: SyntaxError: "),
        ("import torch\n\ntorch.eye(3) @ torch.eye(2)", "(mine.py, line 3: torch.eye(3) @"),
        ("exit(3)", "SystemExit: 3 (mine.py, line 1: exit(3))"),
        ("x = 1", "there is nothing to check. attention is not in mine.py. MultiHead is not in"),
        ("def attn(): pass", "Is attn meant? Write it as attention(q, k, v)."),
        ("class MHA: pass", "Is MHA meant? Write it as MultiHead(n_embd, n_head)."),
        ("class Blok: pass", "Is Blok meant? Write it as Block(n_embd, n_head)."),
        ("class Head: pass\nclass MultiHeads: pass", "Is MultiHeads meant?"),
        ("def attention(x): pass", "as attention(q, k, v): too many positional arguments."),
        ("Block = 1", "Block is of type int. Write it as Block(n_embd, n_head)."),
    ],
)
def test_a_file_without_answers_is_told_why_in_one_line(code, says, tmp_path):
    path = tmp_path / "mine.py"
    if code:
        path.write_text(code)
    with pytest.raises(ValueError) as told:
        mine.load(str(path))
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_what_is_missing_beside_an_answer_is_told(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch.nn import MultiheadAttention\n"  # not the reader's own
        "def attention(x): return x\n"  # a helper
        "class Block: pass"
    )
    answers, missing = mine.load(str(path))
    assert list(answers) == ["Block"]
    assert missing["attention"].startswith("is not checked: it cannot be called as attention(q, ")
    assert missing["MultiHead"] == "is not in mine.py."


def run_main(monkeypatch, *args):
    """Runs the command in this process, up to its end. Returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["mine.py", *args])
    with pytest.raises(SystemExit) as ended:
        mine.main()
    return ended.value.code


def test_help_shows_an_example(monkeypatch, capsys):
    assert run_main(monkeypatch, "--help") == 0
    assert "python tests/lab/mine.py my_attention.py" in capsys.readouterr().out


def test_wrong_arguments_are_told_in_one_line(monkeypatch, capsys):
    assert run_main(monkeypatch, "mine.py", "--limit=0") == 2
    assert run_main(monkeypatch) == 2
    assert run_main(monkeypatch, "attention.ipynb") == 2
    limit, missing, notebook = capsys.readouterr().err.splitlines()
    assert notebook.startswith("mine.py: error: attention.ipynb: give a .py file; in a notebook,")
    assert limit == "mine.py: error: --limit: give 1 second or more"
    assert missing == "mine.py: error: the following arguments are required: file"


def test_a_process_that_is_gone_or_silent_is_told():
    receiver, sender = Pipe(duplex=False)
    with pytest.raises(mine.Mistake, match="still runs after 0.1 s. Is there an endless loop?"):
        mine.receive(receiver, 0.1)
    sender.close()
    with pytest.raises(mine.Mistake, match="ended the program, by a crash or "):
        mine.receive(receiver, 0.1)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(files, *args) writes files, {"mine.py": code}, into the folder own of an empty one,
    where it runs the command, without this project in reach. Returns status, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    Path("own").mkdir()

    def run(files, *args):
        for name, code in files.items():
            Path("own", name).write_text(code)
        words = [sys.executable, mine.__file__, *args]
        done = subprocess.run(words, capture_output=True, text=True, timeout=100)
        return done.returncode, done.stdout, done.stderr

    return run


HEADER = (
    "from math import inf\nimport torch\nfrom torch import nn\nimport torch.nn.functional as F\n"
)


def test_a_right_file_that_imports_its_neighbour(command):
    neighbour = HEADER + inspect.getsource(product) + inspect.getsource(MultiHead)
    own = "import sys\nfrom torch import nn\nfrom neighbour import MultiHead, product\n"
    own += "attn = product\nprint('this is not shown')\n" + inspect.getsource(Block)
    own += "assert not {'gpt', 'pytest'} & set(sys.modules)"
    files = {"neighbour.py": neighbour, "mine.py": own}
    status, output, errors = command(files, "own/mine.py")
    assert output.splitlines() == [
        "MultiHead is right.",
        "Block is right.",
        "attention is not in mine.py. Is attn meant? Write it as attention(q, k, v).",
        "All that could be checked is right.",
    ]
    assert status == 0
    assert errors == ""


def test_a_mistake_in_one_of_two(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    code = HEADER + inspect.getsource(tril).replace("mask == 0", "mask < 0")
    Path("mine.py").write_text(
        code + inspect.getsource(Torch) + "attention, MultiHead = tril, Torch"
    )
    assert run_main(monkeypatch, "mine.py") == 1
    of_attention, of_multihead, of_block = capfd.readouterr().out.splitlines()
    assert of_attention.startswith("attention looks into the future: position 0 sees position 1.")
    assert of_multihead == "MultiHead is right."
    assert of_block == "Block is not in mine.py."


def test_a_file_may_set_the_device_and_print_what_no_terminal_shows(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    code = HEADER + "torch.set_default_device('meta')\nprint('\\udc80')\n" + inspect.getsource(tril)
    Path("mine.py").write_text(code + "attention = tril")
    assert run_main(monkeypatch, "mine.py") == 0
    assert capfd.readouterr().out.startswith("attention is right.")


def test_ctrl_c_is_one_line(monkeypatch, tmp_path, capfd):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("while True: pass")
    monkeypatch.setattr(mine, "report", press)
    assert run_main(monkeypatch, "mine.py") == 2
    assert capfd.readouterr() == ("", "mine.py: error: stopped\n")


def test_a_file_that_does_not_end_is_told_in_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("while True: pass")
    assert run_main(monkeypatch, "mine.py", "--limit=1") == 2
    output, errors = capfd.readouterr()
    assert errors.startswith("mine.py: error: mine.py still runs after 1 s. Is there an endless")
    assert errors.count("\n") == 1
    assert output == ""


def test_an_answer_that_does_not_end_even_outside_of_python_code(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    code = "import itertools\n\ndef attention(q, k, v): sum(itertools.count())\n\nBlock = id"
    Path("mine.py").write_text(code)
    assert run_main(monkeypatch, "mine.py", "--limit=1") == 1
    assert capfd.readouterr().out.splitlines() == [
        "attention still runs after 1 s. Is there an endless loop?",
        "Block is not checked because of that.",
        "MultiHead is not in mine.py.",
    ]
