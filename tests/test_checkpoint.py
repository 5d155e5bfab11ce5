"""The checkpoint: what is written and when, what is read again, and what may go wrong with it."""

import multiprocessing
import os
import re
import shlex
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TESTS, TINY, TINY_ARGS, everything, start
from sample import load

import gpt

SHORT = TINY | {"N_LAYER": 1}
fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs a process that can fork"
)


def equal(model, weights):
    """Whether the model has exactly these weights."""
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[n], weights[n]) for n in own)


# Written.
def test_the_best_model_so_far_is_kept_in_one_rename_before_the_look_is_printed(text, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 1.5, 1.7])
    events = []
    real = os.replace

    def evaluate(model, ids):
        if len(ids) > 1000:  # the text that is trained on
            return 1.0
        events.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return next(losses)

    def replace(part, path):
        kept = torch.load(part)
        assert kept.keys() == {"run", "weights"}
        assert kept["weights"].keys() == events[-1].keys()
        assert all(torch.equal(w, events[-1][name]) for name, w in kept["weights"].items())
        real(part, path)
        events.append("kept")

    def write(text):
        if re.match(r" +\d+ +\d", text):
            events.append("printed")

    monkeypatch.setattr(gpt, "evaluate", evaluate)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr("sys.stdout.write", write)
    model, _, run = gpt.main(**SHORT | {"STEPS": 500, "N_LAYER": 0})
    kinds = [event if isinstance(event, str) else "look" for event in events]
    better, worse = ["look", "kept", "printed"], ["look", "printed"]
    assert kinds == better + better + worse + better + worse
    assert run["val_loss"] == 1.5 and equal(model, torch.load("gpt.pt")["weights"])
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt", "runs.jsonl"]


def test_the_file_holds_the_run_and_the_weights(text):
    model, vocab, run = gpt.main(**SHORT, NORM=False)
    kept = torch.load("gpt.pt")  # by torch's safe loader
    assert kept.keys() == {"run", "weights"}
    assert kept["run"]["val_loss"] == run["val_loss"] and kept["run"]["vocab"] == vocab
    assert {key: kept["run"][key] for key in gpt.FULL} == {key: run[key] for key in gpt.FULL}
    vars(gpt).update({flag: kept["run"][flag] for flag in gpt.FULL})
    again = gpt.GPT(len(vocab))
    again.load_state_dict(kept["weights"])
    assert equal(again, model.state_dict())


def test_numbers_from_numpy_make_a_file_that_can_be_read(text):
    for rate in np.logspace(-3, -2, 2):
        sizes = dict(N_HEAD=np.int64(2), STEPS=np.int32(2), SEED=np.uint8(3), NORM=np.True_)
        run = gpt.main(**SHORT | sizes, LEARNING_RATE=rate, DROPOUT=np.float32(0.5))[2]
        assert run["LEARNING_RATE"] == rate and "np." not in run["name"]
        assert f"LEARNING_RATE={float(rate)!r}" in run["name"]
        assert load("gpt.pt")[2]["name"] == run["name"]


def test_what_a_symbolic_link_leads_to_is_left_alone(text):
    os.mkdir("models")
    Path("models/mine.pt").write_text("mine")
    Path("gpt.pt").symlink_to("models/mine.pt")
    model = gpt.main(**SHORT)[0]
    assert equal(model, torch.load("gpt.pt")["weights"]) and not Path("gpt.pt").is_symlink()
    assert Path("models/mine.pt").read_text() == "mine" and os.listdir("models") == ["mine.pt"]


def test_a_full_disk_loses_nothing(text):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    gpt.main(**SHORT)
    kept, recorded = Path("gpt.pt").read_bytes(), Path("runs.jsonl").read_bytes()
    for width in (8, 64):  # less and more than one block
        Path(f"gpt.pt.{os.getpid()}.part").symlink_to("/dev/full")
        status, _, err = start(*TINY_ARGS, f"--n-embd={width}", "--seed=2")
        assert status in (1, 2) and err
        assert Path("gpt.pt").read_bytes() == kept and Path("runs.jsonl").read_bytes() == recorded
        Path(f"gpt.pt.{os.getpid()}.part").unlink(missing_ok=True)


@pytest.mark.parametrize("culprit", ["save", "replace"])
def test_a_write_that_fails_leaves_the_old_model(culprit, text, monkeypatch):
    gpt.main(**SHORT)
    kept = Path("gpt.pt").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr({"save": torch, "replace": os}[culprit], culprit, fail)
    recorded = Path("runs.jsonl").read_bytes()
    with pytest.raises(OSError, match="No space left on device"):
        gpt.main(**SHORT, SEED=2)
    assert Path("gpt.pt").read_bytes() == kept and Path("runs.jsonl").read_bytes() == recorded


def test_a_folder_at_its_place_is_one_line_and_stays(text):
    os.mkdir("d.pt")
    Path("d.pt/mine").touch()
    status, _, err = start(*TINY_ARGS, "--checkpoint=d.pt")
    assert status == 2 and err.startswith("gpt.py: error: ") and err.count("\n") == 1
    assert "d.pt" in err and os.listdir("d.pt") == ["mine"]
    assert not Path("runs.jsonl").read_text("utf-8")


@fork
def test_a_killed_run_leaves_the_model_of_its_last_look(text):
    process = multiprocessing.get_context("fork").Process(
        target=gpt.main, kwargs=SHORT | {"STEPS": 100_000, "NORM": False}
    )
    process.start()
    while process.is_alive() and not Path("gpt.pt").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not Path("runs.jsonl").read_text()
    assert "NORM=False" in load("gpt.pt")[2]["name"].split()


def test_two_files_for_two_runs(text):
    one = gpt.main(**SHORT, CHECKPOINT="one.pt")[2]["name"]
    two = gpt.main(**SHORT, CHECKPOINT="two.pt", BIAS=True)[2]["name"]
    assert load("one.pt")[2]["name"] == one != load("two.pt")[2]["name"] == two
    assert not Path("gpt.pt").exists()


# Read again.
@pytest.mark.parametrize("name", ["gpt.pt", "my model.pt"])
def test_a_run_names_the_command_that_samples_from_the_file_it_wrote(name, text):
    out = start(*TINY_ARGS, f"--checkpoint={name}", "--sample=60")[1]
    _, sample, line, _ = out.rsplit("\n\n", 3)
    command = re.search(r'python tests/(lab/sample\.py ".+")', line)[1]
    file, *arguments = shlex.split(command)
    status, again, err = start(*arguments, "--length=60", file=TESTS / file)
    assert (status, err) == (0, "") and again.endswith(f"\n{sample}\n") and len(sample) > 30


def test_the_model_s_flags_come_from_the_file_whatever_is_set(text):
    parts = dict(NORM=False, QUERY_KEY=False, ROTARY=False, N_HEAD=4, N_EMBD=16)
    model, vocab, run = gpt.main(**TINY | {"STEPS": 20} | parts)
    vars(gpt).update(N_LAYER=1, N_EMBD=32, MLP=False, BLOCK_SIZE=4)
    before = everything()
    again, vocab_again, run_again = load("gpt.pt")
    assert everything() == before and (gpt.N_LAYER, gpt.N_EMBD, gpt.MLP) == (1, 32, False)
    assert equal(again, model.state_dict()) and vocab_again == vocab
    assert {flag: run_again[flag] for flag in gpt.FULL} == {flag: run[flag] for flag in gpt.FULL}
    assert gpt.sample(again, vocab, 9 * "to be ") == gpt.sample(model, vocab, 9 * "to be ")


# Found before training.
def test_a_folder_that_is_not_there_is_found_before_training(text, capsys):
    Path("runs.jsonl").touch()
    before = everything()
    with pytest.raises(gpt.BadInput, match="nowhere"):
        gpt.main(**SHORT, CHECKPOINT="nowhere/gpt.pt")
    assert everything() == before and capsys.readouterr() == ("", "")


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_found_before_training(text, capsys):
    os.mkdir("sealed", 0o500)
    with pytest.raises(gpt.BadInput, match="sealed"):
        gpt.main(**SHORT, CHECKPOINT="sealed/gpt.pt")
    assert capsys.readouterr() == ("", "") and os.listdir("sealed") == []
