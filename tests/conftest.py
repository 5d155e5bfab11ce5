"""What the tests share: flags that are put back, a tiny model, a text, and gpt.py as a command."""

import os
import random
import subprocess
import sys
from pathlib import Path

import mine
import pytest
import torch

import gpt

SCRIPT = Path(gpt.__file__).resolve()
TINY = dict(N_EMBD=8, N_HEAD=2, N_LAYER=2, BLOCK_SIZE=8, BATCH_SIZE=4, STEPS=2, SAMPLE=10)
TINY_ARGS = [f"--{flag}={value}" for flag, value in TINY.items()]
TINY_ARGS = [arg.lower() for arg in TINY_ARGS]
DEFAULTS = {flag: getattr(gpt, flag) for flag in gpt.FLAGS} | {"DEVICE": "cpu"}

torch.set_num_threads(1)  # the models are tiny, and results then do not depend on the machine


def pytest_addoption(parser):
    """--mine PATH has test_mine check what that file has of attention, MultiHead and Block."""
    what = "a file with your attention(q, k, v), class MultiHead or class Block"
    parser.addoption("--mine", type=mine.load, metavar="PATH", help=what)


@pytest.fixture(autouse=True)
def restored():
    """Every test starts from the flags as the file has them, on the CPU."""
    yield vars(gpt).update(DEFAULTS)
    vars(gpt).update(DEFAULTS)


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """flags(N_HEAD=1) sets flags of gpt for one test, on top of the tiny sizes. The test stands in
    an empty folder, where training leaves its checkpoint."""
    monkeypatch.chdir(tmp_path)
    return lambda **changes: vars(gpt).update(DEFAULTS | TINY | changes)


def words(n=2000, seed=0):
    """A text of n characters that a model can learn something from: words, lines, a few names."""
    draw = random.Random(seed)
    vocabulary = ["to", "be", "or", "not", "that", "is", "the", "question", "ROMEO:\n", "\n"]
    text = ""
    while len(text) < n:
        text += draw.choice(vocabulary) + " "
    return text[:n]


def everything():
    """The files of this folder and what a write would change."""
    stats = {path: path.lstat() for path in [Path(), *Path().rglob("*")]}
    return {path: (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns) for path, s in stats.items()}


@pytest.fixture
def text(tmp_path, monkeypatch):
    """An empty folder to stand in, with a text of 2,000 characters in input.txt; returns it."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(words(), encoding="utf-8")
    return words()


def command(*args, cwd=None, env=None, **how):
    """Run python gpt.py with args in the folder cwd; returns the finished process, text decoded."""
    how = dict(capture_output=True, text=True, encoding="utf-8", timeout=120) | how
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"} | (env or {})
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], cwd=cwd, env=env, **how)


# Every flag's other setting: the parts deleted one at a time, and those put back.
DELETIONS = [{flag: not on} for flag, on in gpt.FULL.items() if type(on) is bool]
DELETIONS += [{"N_HEAD": 1}, {"N_LAYER": 1}, {"N_LAYER": 0}, {"OPTIMIZER": "sgd"}, {"DROPOUT": 0.2}]


def build(vocab_size=11):
    """A GPT with all weights drawn anew: SCALED_INIT starts with layers that add nothing."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab_size).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0, 0.5)
    return model


@torch.no_grad()
def leaks(model):
    """Whether any output of model depends, to the last bit, on a later input."""
    place = torch.arange(model.flags["BLOCK_SIZE"])
    past = place < place[:, None]  # row t keeps what stands before t; all from t on is changed
    ids = place.expand(past.shape) % model.wte.num_embeddings
    changed = torch.where(past, ids, (ids + 1) % model.wte.num_embeddings)
    return not torch.equal(model(ids)[past], model(changed)[past])
