"""tests/lab/sample.py: models read from files, what it prints of them, and what is no model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sample
import torch
from conftest import TESTS, TINY, everything, start

import gpt

SAMPLE = TESTS / "lab" / "sample.py"
SHORT = TINY | {"N_LAYER": 1}


def flags_now():
    return {flag: getattr(gpt, flag) for flag in gpt.FULL | gpt.REST}


def sampled(*args):
    """What sample.py prints: the line that says which model it is, and the sample."""
    status, out, err = start(*args, file=SAMPLE)
    assert (status, err) == (0, "") and out.endswith("\n")
    first, text = out[:-1].split("\n\n", 1)
    return first, text


# load.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"NORM": False, "QUERY_KEY": False, "N_HEAD": 4, "N_EMBD": 16},
        {"ROTARY": False, "BIAS": True, "TIE": False, "DROPOUT": 0.5},
        {"N_LAYER": 0},
        {"PRE_NORM": False, "BLOCK_SIZE": 5, "NOTE": "é", "OPTIMIZER": "sgd"},
    ],
    ids=str,
)
def test_the_model_s_flags_come_from_the_file_whatever_is_set(changes, text):
    trained, vocab, run = gpt.main(**TINY | changes, CHECKPOINT="mine.pt")
    vars(gpt).update(N_LAYER=3, N_EMBD=32, N_HEAD=1, MLP=False, BLOCK_SIZE=4, GELU=False)
    before = flags_now()
    model, vocab_again, run_again = sample.load("mine.pt")
    assert flags_now() == before and not model.training
    assert vocab_again == vocab and run_again == run
    assert model.block_size == (TINY | changes)["BLOCK_SIZE"]
    ids = gpt.encode(text[-model.block_size :], vocab)[None]
    assert torch.equal(model(ids), trained.eval()(ids))
    weights = trained.state_dict()
    assert all(weight.equal(weights[name]) for name, weight in model.state_dict().items())


def test_two_files_for_two_runs(text):
    one = gpt.main(**SHORT, CHECKPOINT="one.pt")[2]
    two = gpt.main(**SHORT, CHECKPOINT="two.pt", BIAS=True)[2]
    assert sample.load(Path("one.pt"))[2]["name"] == one["name"]
    assert sample.load("two.pt")[2]["name"] == two["name"] != one["name"]


def test_the_sample_is_the_one_that_the_run_printed(text, capsys):
    gpt.main(**TINY | {"STEPS": 20, "SAMPLE": 60, "SEED": 4, "NORM": False})
    printed = capsys.readouterr().out
    assert f"\n\n{sampled('--length=60', '--seed=4')[1]}\n\n" in printed


# The command.
@pytest.fixture
def model(text):
    """A model that has learned a little, in gpt.pt, too, and its vocabulary."""
    return gpt.main(**TINY | {"STEPS": 30})[:2]


def test_the_first_line_says_which_file_and_which_run(text):
    run = gpt.main(**SHORT | {"STEPS": 1000, "N_LAYER": 0}, CHECKPOINT="mine.pt", GELU=False)[2]
    vars(gpt).update(NORM=False, BIAS=True)
    first, _ = sampled("mine.pt", "--length", 3)
    assert first == f"mine.pt: {run['name']}, 1,000 steps, loss {run['val_loss']:.3f}"
    assert "GELU=False" in first and "NORM" not in first


def test_the_step_is_that_of_the_model_that_was_kept(text):
    """Here the best look is the second of three."""
    gpt.main(**SHORT, CHECKPOINT="mine.pt")
    kept = torch.load("mine.pt")
    kept["run"] |= {"curve": [[100, 2.0, 2.5], [200, 1.9, 2.25]], "val_loss": 2.25, "STEPS": 300}
    torch.save(kept, "mine.pt")
    assert ", 200 steps, loss 2.250" in sampled("mine.pt")[0]
    assert (
        sample.find_step({"curve": [[1, 9, 3], [2, 9, 2], [3, 9, 2], [4, 9, 5]], "val_loss": 2})
        == 3
    )


def test_the_prompt_and_so_many_characters_more(model):
    _, vocab = model
    assert len(sampled()[1]) == 501 and sampled()[1].startswith("\n")
    assert sampled("--length=0", "--prompt", "to be ")[1] == "to be "
    for prompt in ("t", "to be ", 9 * "to be "):  # the last is longer than the context
        text = sampled("--prompt", prompt, "--length", 40)[1]
        assert text.startswith(prompt) and len(text) == len(prompt) + 40
        assert set(text) <= set(vocab)


@torch.no_grad()
def test_at_temperature_0_each_character_is_the_likeliest(model):
    gpt_model, vocab = model
    ids = [vocab.index(character) for character in "to be "]
    for _ in range(30):
        logits = gpt_model(torch.tensor([ids[-TINY["BLOCK_SIZE"] :]]))[0, -1].tolist()
        ids.append(logits.index(max(logits)))
    want = "".join(vocab[place] for place in ids)
    for seed in (1, 2):
        args = "--prompt", "to be ", "--length=30", "--temperature=0", "--seed", seed
        assert sampled("gpt.pt", *args)[1] == want


def test_the_draw_by_temperature_and_seed(model):
    def draw(*args):
        return sampled("--length=300", *args)[1]

    def share(text):  # of the commonest character
        return max(map(text.count, text)) / len(text)

    assert draw("--seed=2") == draw("--seed=2") != draw("--seed=3")
    assert draw() == draw("--temperature=1", "--seed=1")
    assert share(draw("--temperature=0.2")) > share(draw()) > share(draw("--temperature=20"))


def test_nothing_is_written_or_set(model):
    Path("input.txt").unlink()
    Path("runs.jsonl").unlink()
    os.chmod(".", 0o500)  # a folder that cannot be written to will do
    before, flags = everything(), flags_now()
    sampled("--length=5", "--seed=7")
    assert everything() == before and flags_now() == flags
    os.chmod(".", 0o700)


def test_a_character_that_the_terminal_lacks_is_a_question_mark(text):
    Path("input.txt").write_text(text + "é", "utf-8")
    gpt.main(**SHORT)
    status, out, err = start("--prompt=tét", "--length=0", file=SAMPLE, encoding="ascii")
    assert (status, err) == (0, "") and out.endswith("\n\nt?t\n")


def test_a_bare_clone_and_any_folder(text, tmp_path):
    """Without what is installed: -S leaves out site-packages, where an editable install is."""
    gpt.main(**SHORT)
    clone = tmp_path / "clone"
    (clone / "tests" / "lab").mkdir(parents=True)
    shutil.copy(gpt.__file__, clone)
    shutil.copy(SAMPLE, clone / "tests" / "lab")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    env["PYTHONPATH"] = str(Path(torch.__file__).parents[1])
    script = clone / "tests" / "lab" / "sample.py"
    command = [sys.executable, "-S", script, "gpt.pt", "--length=20"]
    how = dict(capture_output=True, text=True, encoding="utf-8", timeout=60, env=env)
    done = subprocess.run(command, **how)
    assert (done.returncode, done.stderr) == (0, "")
    assert tuple(done.stdout[:-1].split("\n\n", 1)) == sampled("--length=20")


def test_ctrl_c_is_one_line(model, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt, "sample", stop)
    status, out, err = start(file=SAMPLE)
    assert (status, err.count("\n")) == (2, 1) and err.startswith("sample.py: error: ")


# What cannot be used.
@pytest.mark.parametrize(
    "args, words",
    [
        (["--prompt", "to be xyz!"], ["--prompt='to be xyz!'", "['!', 'x', 'y', 'z']"]),
        (["--prompt", "☃"], ["☃"]),
        (["--length=-1"], ["--length=-1", "from 0 on"]),
        (["--length=many"], ["--length", "many"]),
        (["--length=1.5"], ["--length", "1.5"]),
        (["--length", 2**31], ["--length"]),
        (["--seed=-1"], ["--seed=-1", "from 0 on"]),
        (["--seed", 2**70], ["--seed"]),
        (["--temperature=-0.1"], ["--temperature=-0.1", "from 0 on"]),
        (["--temperature=nan"], ["--temperature=nan"]),
        (["--temperature=inf"], ["--temperature=inf"]),
        (["--temp=1"], ["unrecognized arguments: --temp=1"]),
        (["gpt.pt", "other.pt"], ["unrecognized arguments: other.pt"]),
    ],
    ids=ascii,
)
def test_bad_options_are_one_line(args, words, text):
    gpt.main(**SHORT)
    before = everything()
    status, out, err = start(*args, file=SAMPLE)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("sample.py: error: ") and all(word in err for word in words)
    assert everything() == before


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def without(kept, *keys):
    """The content of a file without some entries of its run."""
    return kept | {"run": {name: value for name, value in kept["run"].items() if name not in keys}}


def older(kept):
    """As before the record was flat."""
    run = dict(kept["run"])
    flags = {flag: run.pop(flag) for flag in gpt.FULL}
    return kept | {"run": run | {"flags": flags}}


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
        lambda kept: torch.save(older(kept), "x.pt"),
        lambda kept: torch.save(kept | {"run": {}}, "x.pt"),
        lambda kept: torch.save(without(kept, "vocab"), "x.pt"),
        lambda kept: torch.save(without(kept, *gpt.FULL), "x.pt"),
        lambda kept: torch.save(kept | {"weights": {}}, "x.pt"),
        lambda kept: torch.save(kept | {"weights": {"ln_f.weight": torch.ones(8)}}, "x.pt"),
        lambda kept: torch.save(kept | {"run": kept["run"] | {"vocab": "ab"}}, "x.pt"),
        lambda kept: torch.save(kept | {"run": kept["run"] | {"N_EMBD": "8"}}, "x.pt"),
        lambda kept: torch.save(kept | {"run": kept["run"] | {"N_LAYER": 3}}, "x.pt"),
    ],
    ids=(
        "nothing folder empty text no-zip half seven two evil older no-run no-vocab no-flags "
        "no-weights other-weights other-vocab no-number other-flags"
    ).split(),
)
def test_what_is_no_model_is_one_line_that_names_the_file(make, text):
    gpt.main(**SHORT)
    make(torch.load("gpt.pt"))
    before, flags = everything(), flags_now()
    for _ in range(2):  # an error that came first would not come twice
        status, out, err = start("x.pt", file=SAMPLE)
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert err.startswith("sample.py: error: ") and "'x.pt'" in err
        assert "python gpt.py makes such a file" in err
    with pytest.raises(gpt.BadInput, match="'x.pt' holds no model"):
        sample.load("x.pt")
    assert everything() == before and flags_now() == flags


def test_a_model_from_before_a_reader_s_own_flag_is_loaded(text, monkeypatch):
    model, _, run = gpt.main(**SHORT, NORM=False)
    monkeypatch.setitem(gpt.FULL, "RMSNORM", False)
    monkeypatch.setattr(gpt, "RMSNORM", True, raising=False)
    made = []

    class GPT(gpt.GPT):
        def __init__(self, vocab_size):
            super().__init__(vocab_size)
            made.append(gpt.RMSNORM)

    monkeypatch.setattr(gpt, "GPT", GPT)
    loaded, _, record = sample.load("gpt.pt")
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids), model(ids)) and record["name"] == run["name"]
    assert made == [False] and gpt.RMSNORM is True


def test_weights_of_other_code_are_told(text, monkeypatch):
    gpt.main(**SHORT)
    before = flags_now()
    monkeypatch.setattr(
        gpt.GPT, "__init__", lambda self, vocab: torch.nn.Linear.__init__(self, 2, 2)
    )
    with pytest.raises(gpt.BadInput, match="'gpt.pt' holds no model of this gpt.py"):
        sample.load("gpt.pt")
    assert flags_now() == before
