"""Combinations of flags: each trains, samples, keeps causality and reaches every parameter."""

import random
from itertools import combinations, islice, product
from math import isfinite, prod

import pytest
import torch
from conftest import DELETIONS, TINY, build, leaks

import gpt

VOCAB = "abcdefghijk"
V = len(VOCAB)
TRAIN = torch.arange(300) ** 2 % 97 % V
VAL = torch.arange(12) ** 3 % 89 % V
BOOLEAN = {flag: (True, False) for flag, value in gpt.FULL.items() if type(value) is bool}
SETTINGS = BOOLEAN | {"N_LAYER": (0, 2), "N_HEAD": (1, 2, TINY["N_EMBD"] // 2)}
SETTINGS |= {"OPTIMIZER": ("adamw", "sgd")}


def check(flags, changes):
    """Trains and samples with the flags given; asserts all that must hold whatever they are."""
    flags(**changes)
    torch.manual_seed(0)
    model = gpt.GPT(V)
    before = [weight.detach().clone() for weight in model.parameters()]
    best, curve = gpt.train(model, TRAIN, VAL, VOCAB)
    for (name, weight), old in zip(model.named_parameters(), before, strict=True):
        assert weight.grad is not None, f"{changes}: no gradient for {name}"
        moved = not torch.equal(weight, old)
        assert moved or not weight.grad.any(), f"{changes}: {name} is not trained"
    assert [row[0] for row in curve] == list(range(1, gpt.STEPS + 1)), changes
    assert all(isfinite(loss) for row in curve for loss in row), changes
    sees_later = not gpt.CAUSAL and gpt.ATTENTION and gpt.N_LAYER > 0
    assert leaks(build(V)) == sees_later, changes
    assert sees_later or not leaks(best.eval()), changes
    text = gpt.sample(best, VOCAB, "abc")
    assert text.startswith("abc") and len(text) == 3 + gpt.SAMPLE, changes
    assert set(text) <= set(VOCAB), changes


@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_every_deletion_alone(flags, deletion):
    check(flags, deletion)
    assert (gpt.STEPS, gpt.SAMPLE) == (2, 10)


@pytest.mark.parametrize("one", DELETIONS[:-1], ids=str)
def test_every_pair_of_deletions(flags, one):
    for two in DELETIONS[DELETIONS.index(one) + 1 :]:
        check(flags, one | two | {"STEPS": 1, "SAMPLE": 1})


@pytest.mark.parametrize("seed", range(30))
def test_random_combinations(flags, seed):
    draw = random.Random(seed)
    changes = draw.sample(DELETIONS, draw.randint(3, len(DELETIONS)))
    check(flags, {flag: value for deletion in changes for flag, value in deletion.items()})


def triples(row):
    """All sets of three flags with their settings in row, a dict."""
    return set(combinations(row.items(), 3))


def covering_array():
    """Rows of settings in which every three flags take all their settings together: each row
    is the one, of some drawn around a triple not yet covered, that covers the most new ones."""
    draw, rows = random.Random(0), []
    left = {
        tuple(zip(flags, values, strict=True))
        for flags in combinations(SETTINGS, 3)
        for values in product(*(SETTINGS[flag] for flag in flags))
    }
    while left:
        some = draw.sample(sorted(left, key=repr), min(20, len(left)))
        drawn = [{f: draw.choice(v) for f, v in SETTINGS.items()} | dict(s) for s in some]
        rows.append(max(drawn, key=lambda row: len(triples(row) & left)))
        left -= triples(rows[-1])
    return rows


ROWS = covering_array()


def test_the_covering_array_covers_every_triple_of_flags_in_every_setting():
    for flags in combinations(SETTINGS, 3):
        seen = {tuple(row[flag] for flag in flags) for row in ROWS}
        assert len(seen) == prod(len(SETTINGS[flag]) for flag in flags), flags


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_every_triple_of_flags_in_every_setting(flags, row):
    check(flags, row | {"STEPS": 1, "SAMPLE": 1})


CHUNKS = 64


@pytest.mark.sweep
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_combination_of_the_boolean_flags(flags, chunk):
    for values in islice(product(*BOOLEAN.values()), chunk, None, CHUNKS):
        check(flags, dict(zip(BOOLEAN, values, strict=True)) | {"STEPS": 1, "SAMPLE": 1})
