"""--mine PATH checks a reader's own attention, MultiHead and Block. Without it right answers, each
written differently, pass all checks, and of the many wrong ones each fails the check meant for it.
"""

import inspect
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from mine import CHECKS, MultiHead, load, mistake, praise, product
from torch import nn
from torch.nn import functional as F

import gpt


# 1. Right answers.
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
    """A lecture's heads one by one, with a biased projection."""

    def make(self, n_embd, n_head):
        heads = nn.ModuleList(Head(n_embd, n_embd // n_head) for _ in range(n_head))
        return heads, nn.Linear(n_embd, n_embd)

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.heads, self.proj = self.make(n_embd, n_head)

    def forward(self, x):
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class Separate(nn.Module):
    """Queries, keys and values from a biased matrix each, turned by their positions."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.q, self.k, self.v, self.out = (nn.Linear(n_embd, n_embd) for _ in range(4))

    def turn(self, x):
        a, b = x.chunk(2, -1)
        angle = torch.arange(x.size(2))[:, None] * 0.5 ** torch.arange(a.size(-1))
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (
            f(x).view(b, t, self.n_head, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


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
    """Torch's own module in one's own."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.inner = nn.MultiheadAttention(n_embd, n_head, dropout=0.1, batch_first=True)

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
    "attention": {"flash": gpt.attention, "loops": loops, "triu": product, "tril": tril},
    "MultiHead": {
        "one matrix": MultiHead,
        "heads one by one": Heads,
        "separate matrices, biases, flash and rotary": Separate,
        "matrices a head": Tensors,
        "unit queries and keys": Unit,
        "scores that fall with the distance": Near,
        "torch": Torch,
    },
    "Block": {
        "one matrix": Block,
        "heads one by one and ReLU": block(heads=Heads, middle=nn.ReLU),
        "torch and tanh": block(heads=Torch, middle=nn.Tanh),
        "rotary and biases": block(heads=Separate, bias=True),
        "by hand": ByHand,
        "torch's layer": Layer,
    },
}


# 2. Wrong answers, by the check that each fails first and a phrase of its message.
def weighed(**how):
    """A MultiHead with another product."""
    return multihead(attention=lambda self, *qkv: product(*qkv, **how))


def later(forward, **changes):
    """A Block with another forward(x, attention, feed_forward, norm1, norm2)."""

    def call(self, x):
        return forward(x, self.attention, self.feed_forward, self.norm1, self.norm2)

    return block(forward=call, **changes)


def one_by_one(make):
    """Heads of other layers, which make(n_embd, n_head) gives."""
    return change(Heads, make=lambda self, n_embd, n_head: make(n_embd, n_head))


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


class TimeNorm(nn.Module):
    """Norms each channel over the positions instead of each position over its channels."""

    dim = 1

    def __init__(self, n_embd):
        super().__init__()

    def forward(self, x):
        std, mean = torch.std_mean(x, self.dim, correction=0, keepdim=True)
        return (x - mean) / (std + 1e-5)


def view(self, x):
    """Cuts the rows of (T, C), not each row, into heads."""
    return x.reshape(x.size(0), self.n_head, x.size(1), -1)


one_head = multihead(cut=lambda self, x: x[:, None], join=lambda self, x: x[:, 0])
wrong = partial(partial, product)
WRONG = {
    "attention": {
        "shape: stops when q, k and v have the shape (2, 3, 10, 16): Ru": lambda q, k, v: q @ k @ v,
        "shape: wrong shape: (2, 10, 48)": lambda *qkv: product(*qkv).transpose(1, 2).flatten(2),
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
        "scale: by sqrt(48), the width": wrong(scale=lambda q: (q.size(1) * q.size(3)) ** -0.5),
        "scale: by sqrt(T), the number": wrong(scale=lambda q: q.size(2) ** -0.5),
        "scale: divided by 16, not its": wrong(scale=lambda q: 1 / q.size(3)),
        "scale: multiplied by sqrt(16)": wrong(scale=lambda q: q.size(3) ** 0.5),
        "scale: multiplied by 0.1;": wrong(scale=lambda q: 0.1),
        "torch: takes q for k": lambda q, k, v: product(k, q, v),
        "torch: is off torch's": lambda *qkv: product(*(x.bfloat16() for x in qkv)).float(),
    },
    "MultiHead": {
        "shape: MultiHead(48, 3) cannot be made: TypeError": multihead(__init__=lambda self: None),
        "shape: cannot be made: AttributeError: cannot assign module": Unmade,
        "shape: is no module: derive it, class NoModule(nn.Module)": NoModule,
        "shape: stops when x has the shape (2, 10, 48): Runtime": multihead(join=lambda _, x: x),
        "shape: wrong shape: (2, 3, 10, 16) where x has (2, 10, 48)": multihead(
            forward=lambda self, x: self.cut(x)
        ),
        "shape: wrong shape: tuple": multihead(forward=lambda self, x: (x, None)),
        "parameters: Is there no projection": one_by_one(
            lambda c, h: (nn.ModuleList(Head(c, c // h) for _ in range(h)), nn.Identity())
        ),
        "parameters: in the plain list heads": one_by_one(
            lambda c, h: ([Head(c, c // h) for _ in range(h)], nn.Linear(c, c))
        ),
        "parameters: Is one layer used several times, as by [head] * n_head": one_by_one(
            lambda c, h: (nn.ModuleList([Head(c, c // h)] * h), nn.Linear(c, c))
        ),
        "parameters: Is each head n_embd wide": one_by_one(
            lambda c, h: (nn.ModuleList(Head(c, c) for _ in range(h)), nn.Linear(h * c, c))
        ),
        "parameters: 4,608 parameters for n_embd = 48, not 4 * n_embd**2 = 9,216": Shared,
        "gradient: cannot learn proj.weight": multihead(
            forward=lambda self, x: self.join(product(*map(self.cut, self.qkv(x).chunk(3, -1))))
        ),
        "gradient: cannot learn qkv.weight": multihead(
            attention=lambda self, *qkv: product(*(y.detach() for y in qkv))
        ),
        "repeat: Is dropout still on": multihead(
            join=lambda self, x: MultiHead.join(self, F.dropout(x, 0.1))
        ),
        "inputs: changes its input x in place": multihead(
            forward=lambda self, x: MultiHead.forward(self, x.mul_(2))
        ),
        "texts: mixes the texts of a batch": multihead(
            attention=lambda self, q, k, v: product(q, k.flip(0), v)
        ),
        "texts: Give nn.MultiheadAttention batch_first=True": TimeFirst,
        "nan: nan at position 0": weighed(mask=lambda x: x.triu(0)),
        "nan: softmax(dim=-1)": weighed(weigh=lambda s: s.softmax(1)),
        "places: mixes up positions and heads": multihead(cut=view),
        "places: transpose(1, 2).reshape(B, T, n_embd)": multihead(
            join=lambda self, x: x.reshape(x.size(0), x.size(2), -1)
        ),
        "sum: of 10 equal vectors, that at position 1 comes": weighed(weigh=torch.exp),
        "sum: position 0 comes out unlike one alone": weighed(weigh=lambda s: s.softmax(-2)),
        "sum: Mask and scale, then take the softmax over the keys": weighed(
            mask=lambda x: 0 * x, weigh=lambda s: s.softmax(-1).tril()
        ),
        "past: no position sees another": multihead(
            cut=lambda self, x: x.unflatten(-1, (self.n_head, -1)), join=lambda _, x: x.flatten(2)
        ),
        "past: position 1 does not see position 0": weighed(mask=lambda x: x.tril(-1)),
        "past: position 3 does not see": weighed(mask=lambda x: x.triu(1) + x.tril(-3)),
        "past: hides the present: position 0": weighed(
            mask=lambda x: x.triu(0), weigh=lambda s: s.softmax(-1).nan_to_num()
        ),
        "past: hides the present: position 1": weighed(
            mask=lambda x: x.triu(0), weigh=lambda s: s.clamp(-1e9).softmax(-1)
        ),
        "future: position 0 sees position 1": weighed(mask=lambda x: 0 * x),
        "future: where tril() is 0 or, the same, where triu(1) is 1": weighed(
            mask=lambda x: x.triu(2)
        ),
        "heads: looks with one head": one_head,
        "heads: one head, whatever n_head is": weighed(
            weigh=lambda s: s.sum(1, keepdim=True).softmax(-1)
        ),
        "heads: 16 heads where n_head is 3. Is n_head taken": multihead(
            cut=lambda self, x: x.unflatten(-1, (-1, self.n_head)).transpose(1, 2)
        ),
        "heads: 2 heads where n_head is 3": weighed(
            weigh=lambda s: s[:, [0, *range(s.size(1) - 1)]].softmax(-1)
        ),
        "scale: is not scaled: divide the scores by sqrt(16)": weighed(scale=lambda q: 1),
        "scale: by sqrt(48), the width": weighed(scale=lambda q: (q.size(1) * q.size(3)) ** -0.5),
        "scale: by sqrt(T), the number": weighed(scale=lambda q: q.size(2) ** -0.5),
        "scale: divided by 16, not its": weighed(scale=lambda q: 1 / q.size(3)),
        "scale: multiplied by sqrt(16)": weighed(scale=lambda q: q.size(3) ** 0.5),
        "scale: multiplied by 0.": weighed(scale=lambda q: 0.1),
    },
    "Block": {
        "shape: Block(48, 3) cannot be made: ZeroDivision": block(heads=lambda self, c, _: c // 0),
        "shape: stops when x has the shape (2, 10, 48): Runtime": later(lambda x, a, *_: a(x.mT)),
        "parameters: Block has no matrices of n_embd by 4 * n_embd": block(width=2),
        "parameters: Your Block's attention has 2,304": block(
            heads=lambda self, c, _: nn.Linear(c, c, bias=False)
        ),
        "parameters: plain list heads": block(
            heads=one_by_one(lambda c, h: ([Head(c, c // h) for _ in range(h)], nn.Linear(c, c)))
        ),
        "gradient: cannot learn feed_forward.0.weight": later(lambda x, a, f, n, m: x + a(n(x))),
        "repeat: Is dropout still on": later(
            lambda x, a, f, n, m: x + a(n(x)) + F.dropout(f(m(x + a(n(x)))), 0.1)
        ),
        "gradient: Block cannot learn: forward overwrites in place": later(
            lambda x, a, f, n, m: (y := x + a(n(x))).add_(f(m(y)))
        ),
        "inputs: Write x = x + y, not x += y": later(
            lambda x, a, f, n, m: x.add_(a(n(x))) + f(m(x))
        ),
        "texts: mixes the texts of a batch": block(norm=change(TimeNorm, dim=0)),
        "texts: batch_first=True": block(heads=TimeFirst),
        "nan: nan at position 0": block(heads=weighed(mask=lambda x: x.triu(0))),
        "alone: position 0 sees position 1 even if attention adds nothing": block(norm=TimeNorm),
        "places: mixes up positions and heads": block(heads=multihead(cut=view)),
        "sum: position 0 comes out unlike": block(heads=weighed(weigh=lambda s: s.softmax(-2))),
        "past: no position sees another": block(
            heads=weighed(mask=lambda x: x.triu(1) + x.tril(-1))
        ),
        "past: position 1 does not see": block(heads=weighed(mask=lambda x: x.tril(-1))),
        "future: position 0 sees position 1": block(heads=weighed(mask=lambda x: 0 * x)),
        "residual: around attention and feed_forward": later(lambda x, a, f, n, m: f(m(a(n(x))))),
        "residual: around attention: where": later(lambda x, a, f, n, m: (y := a(n(x))) + f(m(y))),
        "residual: around feed_forward: where": later(lambda x, a, f, n, m: f(m(x + a(n(x))))),
        "post_norm: 100 * x comes out no larger": later(
            lambda x, a, f, n, m: m((y := n(x + a(x))) + f(y))
        ),
        "post_norm: not x": later(lambda x, a, f, n, m: (z := m((y := n(x)) + a(y))) + f(z)),
        "carry: carries on 2 times x": later(
            lambda x, a, f, n, m: (y := x + a(n(x))) + (y + f(m(y)))
        ),
        "carry: carries on 0.5 times x": later(
            lambda x, a, f, n, m: (y := (x + a(n(x))) / 2) + f(m(y))
        ),
        "norm: no norm before attention and feed_forward": block(norm=nn.Identity),
        "norm: no norm before attention: what": later(
            lambda x, a, f, n, m: (y := x + a(x)) + f(m(n(y)))
        ),
        "norm: no norm before feed_forward: what": later(
            lambda x, a, f, n, m: (y := x + a(m(n(x)))) + f(y)
        ),
        "norm: a norm after a part": later(lambda x, a, f, n, m: (y := x + n(a(x))) + m(f(y))),
        "heads: looks with one head": block(heads=one_head),
        "scale: is not scaled": block(heads=weighed(scale=lambda q: 1)),
        "scale: by sqrt(48), the width": block(
            heads=weighed(scale=lambda q: (q.size(1) * q.size(3)) ** -0.5)
        ),
        "activation: one matrix in effect": block(middle=nn.Identity),
        "order: has the feed-forward before attention": later(
            lambda x, a, f, n, m: (y := x + f(n(x))) + a(m(y))
        ),
        "order: gives attention and feed-forward the same x": later(
            lambda x, a, f, n, m: x + a(n(x)) + f(m(x))
        ),
        "order: combines attention and feed-forward in another way": later(
            lambda x, a, f, n, m: x + f(m(x + a(n(x))))
        ),
    },
}


# 3. The tests.
def pytest_generate_tests(metafunc):
    mine = metafunc.config.getoption("mine")
    answers = {task: {"mine": answer} for task, answer in mine.items()} if mine else RIGHT
    if metafunc.function is test_mine:
        cases = {
            f"{task}-{name}-{title(check)}": (task, answer, check)
            for task in CHECKS
            for name, answer in answers.get(task, {}).items()
            for check in CHECKS[task]
        }
        metafunc.parametrize("task, answer, check", cases.values(), ids=cases)
    elif "name" in metafunc.fixturenames:
        names = RIGHT if metafunc.function is test_what_is_said_of_a_right_answer else WRONG
        cases = [(task, name) for task in names for name in names[task] if not mine]
        metafunc.parametrize("task, name", cases)


def title(check):
    return check.__name__.split("_", 1)[1]


def test_mine(task, answer, check, pytestconfig, capsys):
    checks = CHECKS[task]
    if found := mistake(task, answer):
        if found[0] is check:
            pytest.fail(found[1], pytrace=False)
        elif checks.index(check) > checks.index(found[0]):
            pytest.skip(f"one mistake at a time, first {title(found[0])}: {found[1]}")
    elif check is checks[-1] and pytestconfig.getoption("mine"):
        with capsys.disabled():
            print("\n" + praise(task, answer))


def test_a_mistake_fails_the_check_meant_for_it(task, name):
    meant, phrase = name.split(": ", 1)
    check, message = mistake(task, WRONG[task][name]) or pytest.fail("passes all checks")
    assert title(check) == meant and phrase in message and "\n" not in message


@pytest.fixture
def file(tmp_path, pytestconfig):
    """file(code) is the path of a file with that code; without any, of one that is not there."""
    if pytestconfig.getoption("mine"):
        pytest.skip("not of interest to one who has their own checked")

    def write(code):
        if code:
            (tmp_path / "mine.py").write_text(code)
        return str(tmp_path / "mine.py")

    return write


@pytest.mark.parametrize(
    "code, says",
    [
        (None, "FileNotFoundError: "),
        ("def attention(q, k, v) return v", "SyntaxError: "),
        ("import torch\n\ntorch.zeros(3) @ torch.zeros(2)", ", line 3: torch.zeros(3) @"),
        ("exit(3)", "SystemExit: 3, line 1: exit(3)"),
        ("x = 1", "give a function attention(q, k, v), all (B, n_head, T, head_size), or a class"),
        ("class Head: pass", "; it has only a class Head"),
        ("def attention(x): pass", "; its attention cannot be called with q, k and v (too many"),
        ("Block = 1", "; it has none of them"),
    ],
)
def test_a_file_without_answers_is_told_why_in_one_line(code, says, file):
    with pytest.raises(pytest.UsageError) as told:
        load(file(code))
    assert says in str(told.value) and "\n" not in str(told.value)


def test_a_helper_called_attention_is_no_answer_beside_a_class(file):
    code = "def attention(x): return x\n\nclass Block: pass\n\nHead = MultiHead = 1"
    assert list(load(file(code))) == ["Block"]


def test_torchs_own_attention_is_an_answer(file):
    code = "from torch.nn.functional import scaled_dot_product_attention as attention"
    assert list(load(file(code))) == ["attention"]


def test_what_is_said_of_a_right_answer(task, name):
    said = praise(task, RIGHT[task][name])
    assert re.search(r" is right| takes \d+\.\d times as long as one ", said)
    if task != "attention":  # whose loops are told by the time they take
        loop = name == "by hand" or "one by one" in name
        assert ("a Python loop over the heads, " in said) == loop


LECTURE = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\n"
LECTURE += "".join(map(inspect.getsource, (tril, Head, Heads)))
LECTURE += "attention, MultiHead = tril, Heads\n" + inspect.getsource(Block)


@pytest.mark.parametrize(
    "code, status, says",
    [
        (
            LECTURE.replace("mask == 0", "mask < 0"),
            1,
            ["attention looks into the future", "Your Heads takes ", "Your Block is right"],
        ),
        (None, 4, ["ERROR: --mine mine.py: FileNotFoundError"]),
    ],
    ids=["a mistake", "no file"],
)
def test_the_command_that_a_reader_types(code, status, says, file):
    path = file(code)
    args = [sys.executable, "-m", "pytest", __file__, "--mine", path]
    done = subprocess.run(args, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    shown = (done.stdout + done.stderr).replace(os.path.dirname(path) + os.sep, "")
    assert done.returncode == status and "Traceback" not in shown
    assert [phrase for phrase in says if phrase not in shown] == []
