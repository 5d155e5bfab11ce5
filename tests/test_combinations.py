"""Combinations of flags: each trains, samples, keeps causality and reaches every parameter."""

import random
from itertools import combinations, islice, product
from math import isfinite, prod
from time import time

import pytest
import torch
from conftest import DELETIONS, TINY, build, leaks

import gpt

VOCAB = "abcdefghijk"
V = len(VOCAB)
TRAIN = torch.arange(300) ** 2 % 97 % V
VAL = torch.arange(12) ** 3 % 89 % V
BOOLEAN = {flag: (True, False) for flag, value in gpt.FULL.items() if type(value) is bool}
SETTINGS = BOOLEAN | {
    "N_LAYER": (0, 2),
    "N_HEAD": (1, TINY["N_EMBD"] // 2),
    "OPTIMIZER": ("adamw", "sgd"),
    "DROPOUT": (0.0, 0.2),
}


def check(flags, changes):
    """Trains and samples with the flags given; asserts all that must hold whatever they are."""
    flags(**changes)
    model = gpt.GPT(V)
    before = [weight.detach().clone() for weight in model.parameters()]
    run = {"curve": [], "started": time()}
    best = gpt.train(model, TRAIN, VAL, run)
    for (name, weight), old in zip(model.named_parameters(), before, strict=True):
        assert weight.grad is not None, f"{changes}: no gradient for {name}"
        if weight.grad.abs().max() > 1e-7:  # less than that is lost in the rounding of weight
            assert not torch.equal(weight, old), f"{changes}: {name} is not trained"
    ((step, *losses),) = run["curve"]
    assert step == gpt.STEPS and all(isfinite(loss) for loss in losses), changes
    sees_later = not gpt.CAUSAL and gpt.ATTENTION and gpt.N_LAYER > 0
    assert leaks(build(V)) == sees_later, changes
    assert sees_later or not leaks(best.eval()), changes
    text = gpt.sample(best, VOCAB, "abc")
    assert text.startswith("abc") and len(text) == 3 + gpt.SAMPLE, changes
    assert set(text) <= set(VOCAB), changes


@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_every_deletion_alone(flags, deletion):
    check(flags, deletion)


@pytest.fixture(scope="module")
def rows():
    """Settings of all flags, drawn at random."""
    draw = random.Random(0)
    return [{flag: draw.choice(both) for flag, both in SETTINGS.items()} for _ in range(150)]


def test_the_rows_hold_every_three_flags_in_every_setting(rows):
    for three in combinations(SETTINGS, 3):
        seen = {tuple(row[flag] for flag in three) for row in rows}
        assert len(seen) == prod(len(SETTINGS[flag]) for flag in three), three


@pytest.mark.parametrize("part", range(10))
def test_every_three_flags_in_every_setting(flags, rows, part):
    for row in rows[part::10]:
        check(flags, row | {"STEPS": 1, "SAMPLE": 1})


CHUNKS = 64


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_combination_of_the_boolean_flags(flags, chunk):
    for values in islice(product(*BOOLEAN.values()), chunk, None, CHUNKS):
        check(flags, dict(zip(BOOLEAN, values, strict=True)) | {"STEPS": 1, "SAMPLE": 1})
