"""Faults: kills, Ctrl-C, two runs at once, an ascii terminal, a run that diverges."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, TINY, TINY_ARGS, command
from test_command import runs, start, table

import gpt

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


def begin(*args):
    """A run as a process of its own that has looked once and written gpt.pt; and the step."""
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    process = subprocess.Popen([sys.executable, SCRIPT, *TINY_ARGS, *args], env=ENV, **pipe)
    for line in process.stdout:
        if line.startswith("step "):
            while not os.path.exists("gpt.pt") and process.poll() is None:
                time.sleep(0.01)
            return process, int(line.split()[1].split("/")[0])
    pytest.fail(process.stderr.read())


def sampled(*args):
    """What --steps 0 prints."""
    status, out, err = start("--steps=0", "--sample=200", *args)
    assert (status, err) == (0, "")
    return out


# Killed.
@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_the_model_of_its_last_look(number, text):
    process, step = begin("--steps=3000", "--no-norm")
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == -number and err == "" and "step " not in out  # the next is far
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt"]
    start(*TINY_ARGS, f"--steps={step}", "--no-norm", "--checkpoint=stopped.pt")
    assert sampled() == sampled("--checkpoint=stopped.pt")


# Ctrl-C.
@posix
def test_ctrl_c_ends_training_not_the_program(text):
    process, step = begin("--steps=4000", "--sample=50")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    (run,) = runs()
    assert step == 400 <= run["steps"] < 4000 and run["curve"][-1][0] == run["steps"]
    look, rest = out.split("step ")[-1].split("\n", 1)
    assert look.startswith(f"{run['steps']}/4000  train ")
    sample, rows = rest.split("\n\n    loss ")
    assert len(sample) == 51 and list(table(out)) == [run["name"]]
    assert sampled().startswith(sample)


def test_ctrl_c_in_the_middle_of_a_look_looks_again(text, monkeypatch, capsys):
    real, calls = gpt.evaluate, []

    def evaluate(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(gpt, "evaluate", evaluate)
    model, vocab, run = gpt.main(**TINY | {"STEPS": 100})
    assert [row[0] for row in run["curve"]] == [10, 20, 30] and run["steps"] == 30
    assert json.loads(Path("runs.jsonl").read_text("utf-8")) == run


@pytest.mark.parametrize("step", [1, 15])
def test_ctrl_c_in_the_middle_of_a_step_ends_training_there(step, text, monkeypatch):
    real, calls = gpt.F.cross_entropy, []

    def loss(*args, **how):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == step and calls[-1]:
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(gpt.F, "cross_entropy", loss)
    run = gpt.main(**TINY | {"STEPS": 100})[2]
    assert run["curve"][-1][0] == run["steps"] and run["steps"] in (step - 1, step)
    assert runs()[0]["val_loss"] == run["val_loss"] > 0 and Path("gpt.pt").exists()


def test_ctrl_c_while_the_checkpoint_is_written_writes_it_again(text, monkeypatch):
    real, calls = torch.save, []

    def save(what, path):
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        real(what, path)

    monkeypatch.setattr(torch, "save", save)
    model, vocab, run = gpt.main(**TINY | {"STEPS": 100})
    assert [row[0] for row in run["curve"]] == [10, 20]
    weights = torch.load("gpt.pt")[2]
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt", "runs.jsonl"]


# Two at once.
TWO = f"""
import os, sys, gpt
os.mkdir(sys.argv[1])
while not (os.path.exists("1") and os.path.exists("2")):
    pass
for _ in range(8):
    gpt.main(**{TINY}, SEED=int(sys.argv[1]))
"""


def test_two_runs_at_once_lose_no_line(text):
    quiet = dict(env=ENV | {"PYTHONPATH": str(SCRIPT.parent)}, stdout=subprocess.DEVNULL)
    both = [subprocess.Popen([sys.executable, "-c", TWO, seed], **quiet) for seed in "12"]
    assert [process.wait(120) for process in both] == [0, 0]
    seeds = [run["seed"] for run in runs()]
    assert seeds.count(1) == seeds.count(2) == 8 and len(seeds) == 16
    assert sorted(os.listdir()) == ["1", "2", "gpt.pt", "input.txt", "runs.jsonl"] and sampled()


def test_a_line_that_another_run_writes_meanwhile_stays(text, monkeypatch):
    real = json.dumps

    def dumps(run):
        with open("runs.jsonl", "a") as other:
            other.write("{}\n")
        return real(run)

    monkeypatch.setattr(json, "dumps", dumps)
    gpt.main(**TINY)
    assert [len(run) > 0 for run in runs()] == [False, True]


def test_runs_go_on_after_a_half_written_line(text):
    gpt.main(**TINY)
    half = Path("runs.jsonl").read_text("utf-8")[:200]
    Path("runs.jsonl").write_text(half, "utf-8")
    assert [start(*TINY_ARGS)[0] for _ in range(2)] == [0, 0]
    rows = table(start(*TINY_ARGS, "--no-norm")[1])
    assert len(rows) == 2 and Path("runs.jsonl").read_text("utf-8").startswith(half)


# An ascii terminal.
def test_an_ascii_terminal_shows_question_marks(text):
    Path("input.txt").write_text("我能吞下玻璃而不伤身体。\n" * 100, "utf-8")
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = command(*TINY_ARGS, "--prompt=我", "--sample=99", env=env)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.isascii()
    assert done.stdout.count("?") > 50 and len(runs()) == 1


# A run that diverges.
def test_a_rate_that_is_far_too_high_diverges_and_the_old_checkpoint_stays(text):
    start(*TINY_ARGS, "--no-norm", "--steps=50")
    before = Path("gpt.pt").read_bytes()
    wild = ["--optimizer=sgd", "--learning-rate=1e9", "--no-norm", "--steps=50"]
    status, out, err = start(*TINY_ARGS, *wild)
    assert (status, err) == (0, "") and "NaN" not in Path("runs.jsonl").read_text("utf-8")
    run = runs()[-1]
    assert run["val_loss"] is None and run["steps"] == run["curve"][-1][0] == 50
    assert len(run["curve"]) == 10 and run["curve"][-1][2] is None
    assert [row[0] for row in table(out).values()].count("diverged") == 1
    assert list(table(out).values())[-1][0] == "diverged"
    assert Path("gpt.pt").read_bytes() == before
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt", "runs.jsonl"]


def test_a_run_that_blows_up_late_is_diverged_and_keeps_what_it_had(text, monkeypatch):
    losses = iter([3.0, 2.0, float("nan"), float("nan")])
    looks = []

    def evaluate(model, ids):
        looks.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(gpt, "evaluate", evaluate)
    model, vocab, run = gpt.main(**TINY | {"STEPS": 4})
    assert runs()[0]["val_loss"] is None
    assert [row[2] for row in runs()[0]["curve"]] == [3.0, 2.0, None, None]
    for weights in (torch.load("gpt.pt")[2], model.state_dict()):
        assert all(torch.equal(weight, looks[1][name]) for name, weight in weights.items())
