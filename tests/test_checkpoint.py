"""The checkpoint: what is written and when, what sampling reads, and what may go wrong with it."""

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_ARGS, everything, start

import gpt

SHORT = TINY | {"N_LAYER": 1}
fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs a process that can fork"
)


def equal(model, weights):
    """Whether the model has exactly these weights."""
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[n], weights[n]) for n in own)


def sampled(capsys, **flags):
    """What main prints of the model in CHECKPOINT: the line that says which it is, the sample."""
    gpt.main(**flags, STEPS=0)
    first, sample = capsys.readouterr().out.split("\n", 1)
    return first, sample.removesuffix("\n")


# Written.
def test_the_best_model_so_far_is_kept_in_one_rename_before_the_look_is_printed(text, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 1.5, 1.7])
    events = []
    real = os.replace

    def evaluate(model, ids):
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
    assert kept["run"].items() >= {k: run[k] for k in ("name", "flags", "seed", "vocab")}.items()
    vars(gpt).update(kept["run"]["flags"])
    again = gpt.GPT(len(kept["run"]["vocab"]))
    again.load_state_dict(kept["weights"])
    assert equal(again, model.state_dict())


def test_numbers_from_numpy_make_a_file_that_can_be_read(text, capsys):
    for rate in np.logspace(-3, -2, 2):
        sizes = dict(N_HEAD=np.int64(2), STEPS=np.int32(2), SEED=np.uint8(3), NORM=np.True_)
        run = gpt.main(**SHORT | sizes, LEARNING_RATE=rate, DROPOUT=np.float32(0.5))[2]
        assert run["flags"]["LEARNING_RATE"] == rate and "np." not in run["name"]
        assert f"LEARNING_RATE={float(rate)!r}" in run["name"]
        capsys.readouterr()
        assert run["name"] in sampled(capsys)[0]


def test_a_symbolic_link_stays_a_link(text, capsys):
    os.mkdir("models")
    Path("gpt.pt").symlink_to("models/mine.pt")
    for steps in (2, 3):  # the link dangles at first
        model = gpt.main(**SHORT | {"STEPS": steps})[0]
        assert Path("gpt.pt").is_symlink() and not Path("models/mine.pt").is_symlink()
        assert equal(model, torch.load("models/mine.pt")["weights"])
    assert os.listdir("models") == ["mine.pt"]


def test_a_full_disk_is_one_line_and_loses_nothing(text):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    gpt.main(**SHORT)
    kept, recorded = Path("gpt.pt").read_bytes(), Path("runs.jsonl").read_bytes()
    for width in (8, 64):  # less and more than one block
        Path(f"gpt.pt.{os.getpid()}.part").symlink_to("/dev/full")
        status, _, err = start(*TINY_ARGS, f"--n-embd={width}", "--seed=2")
        assert status == 2 and err.count("\n") == 1 and "No space left" in err
        assert Path("gpt.pt").read_bytes() == kept and Path("runs.jsonl").read_bytes() == recorded
        Path(f"gpt.pt.{os.getpid()}.part").unlink(missing_ok=True)


@pytest.mark.parametrize("culprit", ["save", "replace"])
def test_a_write_that_fails_leaves_the_old_model(culprit, text, monkeypatch):
    gpt.main(**SHORT)
    kept = Path("gpt.pt").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr({"save": torch, "replace": os}[culprit], culprit, fail)
    with pytest.raises(gpt.BadInput, match="No space left on device"):
        gpt.main(**SHORT, SEED=2)
    assert Path("gpt.pt").read_bytes() == kept


@fork
def test_a_killed_run_leaves_the_model_of_its_last_look(text, capsys):
    process = multiprocessing.get_context("fork").Process(
        target=gpt.main, kwargs=SHORT | {"STEPS": 100_000, "NORM": False}
    )
    process.start()
    while process.is_alive() and not Path("gpt.pt").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not Path("runs.jsonl").read_text()
    assert "NORM=False" in sampled(capsys)[0]


def test_two_files_for_two_runs(text, capsys):
    one = gpt.main(**SHORT, CHECKPOINT="one.pt")[2]["name"]
    two = gpt.main(**SHORT, CHECKPOINT="two.pt", BIAS=True)[2]["name"]
    capsys.readouterr()
    assert sampled(capsys, CHECKPOINT="one.pt")[0].split(": ")[1] == one
    assert sampled(capsys, CHECKPOINT="two.pt")[0].split(": ")[1] == two
    assert not Path("gpt.pt").exists()


# The last line.
@pytest.mark.parametrize("name", ["gpt.pt", "my model.pt"])
def test_a_run_names_the_file_it_wrote_and_the_command_that_samples_it(name, text):
    out = start(*TINY_ARGS, f"--checkpoint={name}")[1]
    (line,) = [line for line in out.splitlines() if "gpt.py --steps 0" in line]
    assert name in line
    arguments = re.search(r"gpt\.py (--steps 0.*?) samples", line)[1]
    arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', arguments)]
    status, sampled, err = start(*arguments)
    assert (status, err) == (0, "") and name in sampled.splitlines()[0]


# Sampled.
def test_the_model_s_flags_come_from_the_file_whatever_is_set(text, capsys):
    parts = dict(NORM=False, QUERY_KEY=False, ROTARY=False, N_HEAD=4, N_EMBD=16)
    model, vocab, run = gpt.main(**TINY | {"STEPS": 20, "SAMPLE": 60} | parts)
    out = capsys.readouterr().out
    Path("input.txt").unlink()
    Path("runs.jsonl").unlink()
    os.chmod(".", 0o500)  # it writes nothing, so it may be a folder that it cannot write to
    before = everything()
    vars(gpt).update(N_LAYER=1, N_EMBD=32, MLP=False, SAMPLE=60)
    first, sample = sampled(capsys, BLOCK_SIZE=4, OPTIMIZER="sgd")
    again, vocab_again, run_again = gpt.main(STEPS=0)
    assert everything() == before
    os.chmod(".", 0o700)
    assert f"\n{sample}\n" in out and len(sample) == 61
    assert equal(again, model.state_dict()) and not again.training
    assert vocab_again == vocab and run_again["flags"] == run["flags"]


def test_the_first_line_says_which_file_and_which_run(text):
    name = gpt.main(**SHORT, CHECKPOINT="mine.pt", GELU=False)[2]["name"]
    status, out, err = start("--steps=0", "--no-norm", "--checkpoint=mine.pt")
    assert (status, err) == (0, "") and "mine.pt" in out.splitlines()[0]
    assert out.splitlines()[0].endswith(f": {name}") and "NORM" not in out.splitlines()[0]


def test_the_sample_by_prompt_temperature_top_k_and_seed(text, capsys):
    gpt.main(**TINY | {"STEPS": 30})
    capsys.readouterr()

    def sample(**flags):
        return sampled(capsys, **{"PROMPT": "to be ", "SAMPLE": 40} | flags)[1]

    coldest = sample(TEMPERATURE=0, SEED=2)
    assert coldest == sample(TEMPERATURE=0, SEED=3) == sample(TOP_K=1)
    assert sample(SEED=2) != sample(SEED=3)
    assert sample(TEMPERATURE=9) != sample() == sample(TEMPERATURE=1)
    assert sample(TOP_K=99) == sample() != sample(TOP_K=2) != coldest
    assert len(sample()) == 46 and sample(SAMPLE=0) == "to be "
    assert sample(PROMPT="").startswith("\n")
    assert sample(PROMPT=9 * "to be ").startswith(9 * "to be ")  # longer than the context


# What is no model of this code.
class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def without(run, key):
    return {name: value for name, value in run.items() if name != key}


@pytest.mark.parametrize(
    "make",
    [
        lambda kept: None,
        lambda kept: Path("x.pt").mkdir(),
        lambda kept: Path("x.pt").touch(),
        lambda kept: Path("x.pt").write_text("to be or not to be"),
        lambda kept: Path("x.pt").write_bytes(b"PK\x03\x04" + bytes(200)),
        lambda kept: Path("x.pt").write_bytes(Path("gpt.pt").read_bytes()[:4000]),
        lambda kept: torch.save(7, "x.pt"),
        lambda kept: torch.save({"one": 1, "two": torch.ones(2)}, "x.pt"),
        lambda kept: torch.save({"run": Evil(), "weights": {}}, "x.pt"),
        lambda kept: torch.save((kept["run"]["flags"], "ab", kept["weights"]), "x.pt"),
        lambda kept: torch.save(kept | {"run": {}}, "x.pt"),
        lambda kept: torch.save(kept | {"run": without(kept["run"], "vocab")}, "x.pt"),
        lambda kept: torch.save(kept | {"weights": {}}, "x.pt"),
        lambda kept: torch.save(kept | {"weights": {"ln_f.weight": torch.ones(8)}}, "x.pt"),
        lambda kept: torch.save(kept | {"run": kept["run"] | {"vocab": "ab"}}, "x.pt"),
        lambda kept: torch.save(kept | {"run": kept["run"] | {"flags": {"NORM": 7}}}, "x.pt"),
    ],
    ids=(
        "nothing folder empty text no-zip half seven two evil older no-run no-vocab no-weights "
        "other-weights other-vocab other-flags"
    ).split(),
)
def test_what_is_no_model_is_one_line_that_names_the_file(make, text):
    start(*TINY_ARGS)
    make(torch.load("gpt.pt"))
    before = everything()
    for _ in range(2):  # an error that came first would not come twice
        status, out, err = start("--steps=0", "--checkpoint=x.pt")
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert err.startswith("gpt.py: error: ") and "CHECKPOINT='x.pt'" in err
        assert "python gpt.py makes one" in err
    assert everything() == before


def test_weights_of_other_code_are_one_line(text, monkeypatch):
    gpt.main(**SHORT)
    monkeypatch.setattr(
        gpt.GPT, "__init__", lambda self, vocab: torch.nn.Linear.__init__(self, 2, 2)
    )
    with pytest.raises(gpt.BadInput, match="CHECKPOINT='gpt.pt'"):
        gpt.main(STEPS=0)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("a letter")])
def test_training_does_not_replace_what_is_no_model(make, text, capsys):
    Path("runs.jsonl").touch()
    make(Path("d.pt"))
    before = everything()
    with pytest.raises(gpt.BadInput, match="CHECKPOINT='d.pt'"):
        gpt.main(**SHORT, CHECKPOINT="d.pt")
    assert everything() == before and capsys.readouterr() == ("", "")


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
