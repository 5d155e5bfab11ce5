"""The table after a run, and the sweep over every deletion that ends in one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import deletions
import pytest
from conftest import SCRIPT, TINY, words

import gpt

LIKE = dict(data="abc", steps=100, sizes={"N_EMBD": 8})


def record(name, seed, loss, curve=(4.0, 3.0, 2.0), **other):
    """A run's record; without a loss it diverged at its last step."""
    curve = [[10 * n, 0.0, value] for n, value in enumerate(curve)]
    return dict(name=name, seed=seed, val_loss=loss, curve=curve, params=1234) | LIKE | other


def table(capsys, *records):
    """The rows that compare prints for the last of records: name to the words behind it."""
    lines = [line if type(line) is str else json.dumps(line) for line in records]
    Path("runs.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    gpt.compare(records[-1])
    blank, head, *rows = capsys.readouterr().out.splitlines()
    assert blank == "" and head.split() == "params loss cost spread seeds curve".split()
    assert all(len(row) <= 80 for row in rows)
    return {row.split()[0]: row.split()[1:] for row in rows}


def test_means_costs_and_spreads_by_hand(text, capsys):
    rows = table(
        capsys,
        record("full", 1, 1.60),
        record("full", 2, 1.64),
        record("no-mlp", 1, 1.90, params=99),
        record("no-gelu", 1, 1.61),
        record("no-gelu", 2, 1.65),
        record("no-gelu", 3, 1.69),
    )
    assert list(rows) == ["full", "no-gelu", "no-mlp"]  # the best first
    assert rows["full"][:5] == ["1,234", "1.620", "+0.000", "0.040", "2"]
    assert rows["no-gelu"][:5] == ["1,234", "1.650", "+0.030", "0.080", "3"]
    assert rows["no-mlp"][:5] == ["99", "1.900", "+0.280", "0.000", "1"]
    noise = {name: " ".join(row[6:]) for name, row in rows.items()}
    assert noise == {"full": "", "no-gelu": "within noise", "no-mlp": ""}


@pytest.mark.parametrize("cost, noise", [(0.09, ["within", "noise"]), (0.11, [])])
def test_a_cost_is_within_the_noise_when_the_seeds_of_either_spread_further(
    cost, noise, text, capsys
):
    one, two = (1.6, 1.6), (1.6 + cost - 0.05, 1.6 + cost + 0.05)  # a spread of 0.1, in either
    for full, cut in ((one, two), (two, one)):
        records = [record("full", seed, loss) for seed, loss in enumerate(full)]
        records += [record("no-tie", seed, loss) for seed, loss in enumerate(cut)]
        assert table(capsys, *records)["no-tie"][6:] == noise


def test_a_seed_that_was_run_twice_counts_once_the_newest(text, capsys):
    rows = table(capsys, record("full", 1, 1.6), record("full", 1, 1.5))
    assert rows["full"][1:5] == ["1.500", "+0.000", "0.000", "1"]


@pytest.mark.parametrize("other", [{"data": "b"}, {"steps": 99}, {"sizes": {"N_EMBD": 9}}], ids=str)
def test_other_data_steps_and_sizes_are_never_compared(other, text, capsys):
    rows = table(capsys, record("full", 1, 1.0, **other), record("no-tie", 1, 1.7))
    assert list(rows) == ["no-tie"] and rows["no-tie"][2] == "?"  # no full model to compare with


@pytest.mark.parametrize("line", ['{"name": "fu', "", "7", "[]", "{}", '{"data": "abc"}', "\0"])
def test_a_line_that_is_no_record_is_skipped(line, text, capsys):
    rows = table(capsys, record("full", 1, 1.6), line, record("no-tie", 1, 1.7))
    assert [row[2] for row in rows.values()] == ["+0.000", "+0.100"]


def test_a_diverged_run_comes_last_and_says_so(text, capsys):
    wild = record("optimizer=sgd", 1, None, curve=(9.0, 99.0, None))
    rows = table(capsys, wild, record("full", 1, 1.6), record("no-tie", 1, 1.7))
    assert list(rows) == ["full", "no-tie", "optimizer=sgd"]
    assert rows["optimizer=sgd"][1:3] == ["nan", "?"] and rows["optimizer=sgd"][-1] == "diverged"
    assert rows["full"][5] == table(capsys, record("full", 1, 1.6))["full"][5]  # nothing of it
    assert list(table(capsys, record("full", 1, None, curve=(None,)))) == ["full"]
    rows = table(capsys, wild, record("optimizer=sgd", 2, 1.9), record("full", 1, 1.6))
    assert rows["optimizer=sgd"][-1] == "diverged"  # as soon as one of its seeds did


def test_the_curves_share_one_scale(text, capsys, monkeypatch):
    """Eight heights between the 5th and the 95th percentile of all losses but each curve's first;
    those are worked out here by their rank: place (n - 1) / 20 in the sorted list of n, and from
    its end."""
    monkeypatch.setattr(gpt, "BARS", "01234567")
    curves = (9.0, 4.5, 2.0, 1.0), (8.0, 8.0, 5.0, 3.0)
    rows = table(
        capsys, *(record(str(n), 1, curve[-1], curve=curve) for n, curve in enumerate(curves))
    )
    one, two, *_, nine, ten = sorted(curves[0][1:] + curves[1][1:])
    low, high = one + (two - one) * 5 / 20, ten - (ten - nine) * 5 / 20
    scaled = [[min(7, max(0, round(7 * (x - low) / (high - low)))) for x in c] for c in curves]
    assert [[int(bar) for bar in row[5]] for row in rows.values()] == scaled


# The sweep.
SMALL = TINY | {"N_HEAD": 4, "N_LAYER": 3, "DEVICE": "cpu"}  # so that it is called full
ARGS = [f"--{flag.lower()}={value}" for flag, value in SMALL.items()]
SWEEP = [sys.executable, str(SCRIPT.with_name("tests") / "deletions.py"), *ARGS]


def recorded():
    """Names and seeds of the runs in runs.jsonl."""
    path = Path("runs.jsonl")
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(run["name"], run["seed"]) for run in runs]


def test_the_cuts_are_the_full_model_and_every_flag_of_the_model_but_the_sizes():
    first, *cuts = deletions.CUTS
    assert first == {} and all(
        gpt.FULL[flag] != value for cut in cuts for flag, value in cut.items()
    )
    once = [
        flag for flag in gpt.MODEL if flag not in ("LEARNING_RATE", "DROPOUT", "LOAD", *gpt.SIZES)
    ]
    assert list(dict.fromkeys(flag for cut in cuts for flag in cut)) == once
    assert [cut["N_LAYER"] for cut in cuts if "N_LAYER" in cut] == [1, 0]


def test_a_sweep_runs_each_once_and_shows_one_table(text, capsys, monkeypatch):
    monkeypatch.setattr(deletions, "CUTS", deletions.CUTS[:4])
    gpt.main(SMALL | {"POSITION": False, "SEED": 2})  # one is there before
    capsys.readouterr()
    deletions.sweep(SMALL, 2)
    out = capsys.readouterr().out
    want = [(name, s) for name in ("full", "n-head=1", "no-position", "no-rotary") for s in (1, 2)]
    assert sorted(recorded()) == want and out.count("params ") == 1
    assert "7 of 8 runs left, the first\n" in out and "1 of 8 runs left, about 0 minutes" in out
    deletions.sweep(SMALL, 2)
    again = capsys.readouterr().out
    assert sorted(recorded()) == want and again == out[out.index("\n" + 18 * " ") :]


def test_a_sweep_that_is_killed_goes_on_and_repeats_no_finished_run(text):
    args = [*SWEEP, "--steps=3", "--seed=7"]
    sweep = subprocess.Popen(args, stdout=subprocess.DEVNULL)
    while len(recorded()) < 5 and sweep.poll() is None:
        time.sleep(0.01)
    sweep.kill()
    assert sweep.wait() == -signal.SIGKILL
    before = recorded()
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert f"{len(deletions.CUTS) - len(before)} of {len(deletions.CUTS)} runs left" in done.stdout
    assert recorded()[: len(before)] == before and len(set(recorded())) == len(recorded())
    assert len(recorded()) == len(deletions.CUTS) and {seed for _, seed in recorded()} == {7}
    assert done.stdout.count("params ") == 1


def test_ctrl_c_ends_a_sweep_with_the_table(text):
    sweep = subprocess.Popen([*SWEEP, "--steps=200000"], stdout=subprocess.PIPE, text=True)
    while "1/200000" not in sweep.stdout.readline():
        pass
    sweep.send_signal(signal.SIGINT)
    sweep.communicate(timeout=60)
    assert sweep.returncode == 0 and len(recorded()) == 1


@pytest.mark.parametrize(
    "args", [["--seeds=0"], ["--steps=0"], ["--load=gpt.pt"], ["--wat"], ["--data=no.txt"]], ids=str
)
def test_a_sweep_refuses_bad_input_in_one_line(args, text):
    done = subprocess.run([*SWEEP, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not os.path.exists("runs.jsonl") and done.stdout.count("\n") < 3
    assert "error: " in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_three_runs_show_what_each_deletion_cost(text, capsys):
    """As a newcomer: the full model, one deletion, another; after the third, one table of three."""
    Path("input.txt").write_text(words(3000), "utf-8")
    for cut in ({}, {"NORM": False}, {"RESIDUAL": False}):
        gpt.main(SMALL | {"STEPS": 20} | cut)
    rows = capsys.readouterr().out.split("curve\n")[-1].splitlines()
    runs = {run["name"]: run for run in map(json.loads, Path("runs.jsonl").open())}
    assert sorted(row.split()[0] for row in rows) == ["full", "no-norm", "no-residual"]
    for row in rows:
        name, _, loss, cost = row.split()[:4]
        assert loss == f"{runs[name]['val_loss']:.3f}"
        assert cost == f"{runs[name]['val_loss'] - runs['full']['val_loss']:+.3f}"
