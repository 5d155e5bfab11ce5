"""What the tests share: flags that are put back, a tiny model, a text, and gpt.py as a command."""

import contextlib
import io
import random
import runpy
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "lab")]

import gpt  # noqa: E402

SCRIPT = Path(gpt.__file__).resolve()
TINY = dict(N_EMBD=8, N_HEAD=2, N_LAYER=2, BLOCK_SIZE=8, BATCH_SIZE=4, STEPS=2, SAMPLE=10)
TINY_ARGS = [f"--{flag.lower().replace('_', '-')}={value}" for flag, value in TINY.items()]
DEFAULTS = {flag: getattr(gpt, flag) for flag in gpt.FULL | gpt.REST} | {"DEVICE": "cpu"}

# Every flag's other setting: the parts deleted one at a time, and those put back.
DELETIONS = [
    {"ATTENTION": False},
    {"QUERY_KEY": False},
    {"SCALE": False},
    {"CAUSAL": False},
    {"FLASH": False},
    {"N_HEAD": 1},
    {"PROJECTION": False},
    {"POSITION": False},
    {"ROTARY": False},
    {"MLP": False},
    {"GELU": False},
    {"RESIDUAL": False},
    {"NORM": False},
    {"PRE_NORM": False},
    {"DROPOUT": 0.2},
    {"N_LAYER": 1},
    {"N_LAYER": 0},
    {"TIE": False},
    {"BIAS": True},
    {"SCALED_INIT": False},
    {"OPTIMIZER": "sgd"},
    {"AVERAGE": False},
    {"BFLOAT16": True},
]

SHIPPED = {flag for changes in DELETIONS for flag in changes}
SHIPPED |= {"N_EMBD", "BLOCK_SIZE", "LEARNING_RATE", "BATCH_SIZE", "NOTE"}
SHIPPED |= {"STEPS", "SEED", "DEVICE", "DATA", "CHECKPOINT", "SAMPLE"}
OWN = DEFAULTS.keys() - SHIPPED  # flags that a reader added

torch.set_num_threads(1)  # the models are tiny, and results then do not depend on the machine


@pytest.fixture(autouse=True)
def restored():
    """Every test starts from the flags as the file has them, on the CPU."""
    vars(gpt).update(DEFAULTS)
    yield
    vars(gpt).update(DEFAULTS)


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """flags(N_HEAD=1) sets flags of gpt for one test, on top of the tiny sizes. The test stands in
    an empty folder, where training leaves its checkpoint."""
    monkeypatch.chdir(tmp_path)

    def set_flags(**changes):
        vars(gpt).update(DEFAULTS | TINY | changes)

    return set_flags


@pytest.fixture
def text(tmp_path, monkeypatch):
    """An empty folder to stand in, with a text of 2,000 characters in input.txt; returns it."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(words(), encoding="utf-8")
    return words()


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


def start(*args, file=SCRIPT, encoding="utf-8"):
    """python file args, without a process of its own; returns its status, output and errors."""
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    status = 0
    argv = mock.patch.object(sys, "argv", [str(file), *map(str, args)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            status = end.code
        except Exception:
            status = 1
            traceback.print_exc()
    out.flush()
    err.flush()
    return status, out.buffer.getvalue().decode(encoding), err.buffer.getvalue().decode()


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
    place = torch.arange(model.block_size)
    past = place < place[:, None]  # row t keeps what stands before t; all from t on is changed
    ids = place.expand(past.shape) % model.wte.num_embeddings
    changed = torch.where(past, ids, (ids + 1) % model.wte.num_embeddings)
    return not torch.equal(model(ids)[past], model(changed)[past])
