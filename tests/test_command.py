"""The command line: flags, a run, its record, keeping and loading, and bad input."""

import ast
import hashlib
import itertools
import json
import os
import re
import runpy
import signal
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, TINY, TINY_ARGS, words
from torch import nn

import gpt

SOURCE = SCRIPT.read_text("utf-8")
KEYS = "name changes seed steps params train_loss val_loss seconds tokens_per_second device torch"


def record():
    """The record of the last run."""
    return json.loads(Path("runs.jsonl").read_text().splitlines()[-1])


def run(*args):
    """One run in this process at the tiny sizes, then args; returns its record."""
    gpt.main(gpt.parse([*TINY_ARGS, *args]))
    return record()


@pytest.fixture
def script(monkeypatch, capsys):
    """script("--n-head", "3") is python gpt.py --n-head 3 without a process of its own; returns
    its exit status, standard output and standard error."""
    names = [getattr(signal, name) for name in ("SIGINT", "SIGPIPE") if hasattr(signal, name)]
    before = {name: signal.getsignal(name) for name in names}

    def start(*args):
        monkeypatch.setattr(sys, "argv", ["gpt.py", *args])
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back, whatever becomes of it
        sys.stderr.reconfigure(errors="backslashreplace")  # as it is in a process
        status = 0
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                runpy.run_path(str(SCRIPT), run_name="__main__")
            except SystemExit as end:
                status = end.code
        out, err = capsys.readouterr()
        return status, out, err + "".join(f"{w.category.__name__}: {w.message}\n" for w in warned)

    yield start
    for name, handler in before.items():
        signal.signal(name, handler)


# The flags.
def test_every_constant_of_the_switchboard_is_a_flag_with_a_comment():
    lines = SOURCE.splitlines()
    switchboard = itertools.takewhile(
        lambda node: ast.unparse(node.targets[0]) != "HELP" if type(node) is ast.Assign else True,
        ast.parse(SOURCE).body,
    )
    assigned = [node for node in switchboard if type(node) is ast.Assign]
    assert [node.targets[0].id for node in assigned] == list(gpt.HELP) == list(gpt.FULL)
    for node in assigned:
        comment = lines[node.lineno - 1].split("  # ", 1)[1]
        assert gpt.HELP[node.targets[0].id] == comment and node.end_lineno == node.lineno


def test_help_shows_every_flag_its_comment_word_for_word_and_its_default(script):
    status, out, err = script("--help")
    assert (
        status == 0 and not err and gpt.__doc__.split() == out.split()[: len(gpt.__doc__.split())]
    )
    folded = " ".join(out.split())
    for flag, comment in gpt.HELP.items():
        name = "--" + flag.lower().replace("_", "-")
        if type(gpt.FULL[flag]) is bool:
            name += f", --no{name[1:]}"
        else:
            name += f" {flag}"
        assert f"{name} {' '.join(comment.split())} [{gpt.FULL[flag]!r}]" in folded


@pytest.mark.parametrize(
    "argv, flags",
    [
        ("", {}),
        ("--n-head 1", {"N_HEAD": 1}),
        ("--n-head=1", {"N_HEAD": 1}),
        ("--n_head=1", {"N_HEAD": 1}),
        ("--n_head 1", {"N_HEAD": 1}),
        ("--no-norm", {"NORM": False}),
        ("--no_norm", {"NORM": False}),
        ("--no-query-key", {"QUERY_KEY": False}),
        ("--no_query_key", {"QUERY_KEY": False}),
        ("--bias", {"BIAS": True}),
        ("--no-norm --norm", {"NORM": True}),
        ("--n-head 1 --n-head 2", {"N_HEAD": 2}),
        ("--learning_rate 1e-3", {"LEARNING_RATE": 0.001}),
        ("--prompt=--a_b=c_d", {"PROMPT": "--a_b=c_d"}),
        ("--prompt a_b --save=", {"PROMPT": "a_b", "SAVE": ""}),
    ],
)
def test_flags_are_spelled_with_dashes_or_underscores(argv, flags):
    assert gpt.parse(argv.split()) == flags


@pytest.mark.parametrize("flag", gpt.FULL)
def test_every_flag_takes_its_own_default(flag):
    name, value = "--" + flag.lower(), gpt.FULL[flag]
    for argv in [["--no" + name[1:]], [name]] if type(value) is bool else [[name, str(value)]]:
        parsed = gpt.parse(argv)
        assert list(parsed) == [flag] and type(parsed[flag]) is type(value)
    assert parsed[flag] == (True if type(value) is bool else value)


def test_import_prints_nothing_reads_nothing_and_leaves_ctrl_c_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("input.txt").mkdir()  # whoever reads it fails
    before = signal.getsignal(signal.SIGINT)
    runpy.run_path(str(SCRIPT), run_name="gpt")
    assert capsys.readouterr() == ("", "") and signal.getsignal(signal.SIGINT) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "input.txt"]


# A run.
def test_a_run_prints_plain_lines_and_a_sample(text, script):
    status, out, err = script(*TINY_ARGS, "--steps", "20", "--sample", "300")
    assert status == 0 and not err and "\r" not in out and "\033" not in out
    vocab = "".join(sorted(set(text)))
    head, shape, *lines = out.split("\n", 13)
    assert re.fullmatch(r"n-head=2 .*: [\d,]+ parameters, 2 layers, 2 heads, width 8", head)
    assert shape == f"context 8, batch 4, {len(vocab)} characters, on {gpt.DEVICE}"
    form = r"\[(#*)\.*\] (\d+)/20  train \d\.\d{3}  val \d\.\d{4}  [\d,]+ tokens/s  \d+ s left"
    shown = [re.fullmatch(form, line) for line in lines[:-1]]
    assert [int(m[2]) for m in shown] == [1, *range(2, 21, 2)]
    assert all(len(m[1]) == 10 * int(m[2]) // 20 for m in shown)
    sample, table = lines[-1].split("\n\n" + 18 * " " + "params", 1)
    assert len(sample) == 1 + 300 and set(sample) <= set(vocab)  # the prompt is a line end
    assert table.count("\n") == 2 and "\nn-head=2 n-layer=2 " in table
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt", "runs.jsonl"]


def test_the_record_of_a_run(text):
    gpt.main(gpt.parse(["--n-layer=0", "--n-embd=8", "--steps=12", "--seed=3", "--save="]))
    (line,) = Path("runs.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert set(row) == {*KEYS.split(), "data", "sizes", "curve"}
    assert row["name"] == "n-layer=0" and row["changes"] == {"N_LAYER": 0}
    assert row["sizes"] == {"N_EMBD": 8, "BLOCK_SIZE": 128, "BATCH_SIZE": 8}
    assert (row["seed"], row["steps"]) == (3, 12)
    assert row["params"] == len(set(text)) * 8 + 8
    assert row["device"] == gpt.DEVICE and row["torch"] == torch.__version__
    assert row["data"] == hashlib.sha256(text.encode()).hexdigest()[:12]
    speed = 12 * gpt.BATCH_SIZE * gpt.BLOCK_SIZE / row["seconds"]
    assert row["seconds"] > 0 and row["tokens_per_second"] == pytest.approx(speed)
    assert [step for step, _, _ in row["curve"]] == list(range(1, 13))
    assert row["curve"][-1] == [12, row["train_loss"], row["val_loss"]]
    assert all(0 < loss < 10 for _, *losses in row["curve"] for loss in losses)


def test_runs_are_appended_a_line_each_also_after_a_torn_line(text):
    Path("runs.jsonl").write_bytes(b'{"name": "full"}\n{"name": "fu')
    run("--seed=1")
    run("--seed=2")
    first, torn, *new = Path("runs.jsonl").read_text().splitlines()
    assert (first, torn) == ('{"name": "full"}', '{"name": "fu')
    assert [json.loads(line)["seed"] for line in new] == [1, 2]


@pytest.mark.parametrize(
    "argv, name",
    [
        ("", "full"),
        ("--seed 5 --norm --data other.txt", "full"),
        ("--n-embd 32 --block-size 16 --batch-size 2", "full"),
        ("--no-norm", "no-norm"),
        ("--no_query_key --bias", "no-query-key bias"),
        ("--no-norm --n-head 1", "n-head=1 no-norm"),
        ("--optimizer sgd --learning-rate 0.01", "optimizer=sgd learning-rate=0.01"),
    ],
)
def test_a_run_is_named_by_its_difference_from_the_full_model(argv, name, text, capsys):
    Path("other.txt").write_text(text)
    gpt.main(gpt.parse([*argv.split(), "--steps", "1", "--sample", "0"]))
    record = json.loads(Path("runs.jsonl").read_text())
    assert record["name"] == name and capsys.readouterr().out.startswith(name + ": ")
    given = gpt.parse(argv.split()) if name != "full" else {}
    assert record["changes"] == given


def printed_sample(capsys):
    """The ten characters before the table."""
    return capsys.readouterr().out.split("\n\n" + 18 * " " + "params")[0][-10:]


@pytest.mark.parametrize("argv", [[], ["--no-average", "--dropout=0.1"]])
def test_one_seed_gives_one_run(argv, text, capsys):
    keys = ("train_loss", "val_loss", "curve")
    (a, seen), (b, again), (c, other) = (
        ([run(f"--seed={seed}", *argv)[key] for key in keys], printed_sample(capsys))
        for seed in (1, 1, 2)
    )
    assert (a, seen) == (b, again) and a != c and seen != other


def test_a_bom_is_dropped(text, script):
    Path("bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    outs = [script(*TINY_ARGS, "--data", name)[1] for name in ("input.txt", "bom.txt")]
    assert outs[0].splitlines()[1] == outs[1].splitlines()[1]  # as many characters
    lines = [json.loads(line) for line in Path("runs.jsonl").read_text().splitlines()]
    assert lines[0]["data"] == lines[1]["data"] and lines[0]["curve"] == lines[1]["curve"]


def test_bfloat16_trains_close_to_float32(text):
    exact, rough = run("--steps=30"), run("--steps=30", "--bfloat16")
    assert rough["val_loss"] == pytest.approx(exact["val_loss"], abs=0.05)
    assert rough["val_loss"] != exact["val_loss"] and rough["name"] == exact["name"]


# Keeping it.
def test_training_on_begins_where_the_saved_model_ended(text):
    first = run("--steps=60", "--no-tie", "--n-embd=16")
    gpt.main({"LOAD": "gpt.pt", "STEPS": 60, "SAMPLE": 0, "SAVE": "more.pt"})
    more = record()
    assert first["curve"][0][2] - first["val_loss"] > 0.2
    assert more["curve"][0][2] == pytest.approx(first["val_loss"], abs=0.1)
    assert more["val_loss"] < first["val_loss"]
    assert more["params"] == first["params"] and more["changes"]["TIE"] is False


def test_flags_and_vocabulary_come_back_and_a_given_flag_wins(text, capsys):
    run("--no-norm", "--n-embd=16", "--dropout=0.5", "--no-query-key")
    Path("input.txt").unlink()
    vocab = torch.load("gpt.pt", weights_only=True)["vocab"]
    assert vocab == "".join(sorted(set(text)))
    gpt.main({"LOAD": "gpt.pt", "STEPS": 0, "DROPOUT": 0.25, "SAMPLE": 20})
    assert (gpt.NORM, gpt.N_EMBD, gpt.QUERY_KEY, gpt.BLOCK_SIZE) == (False, 16, False, 8)
    assert gpt.DROPOUT == 0.25 and gpt.LOAD == "gpt.pt"
    assert f"{len(vocab)} characters" in capsys.readouterr().out


def test_sampling_needs_no_text_and_writes_nothing(text, script):
    assert script(*TINY_ARGS, "--save", "mine.pt")[0] == 0
    Path("input.txt").unlink()
    before = {path: path.stat() for path in Path().iterdir()}
    status, out, err = script("--load", "mine.pt", "--steps", "0", "--prompt", "to be")
    assert status == 0 and not err and before == {path: path.stat() for path in Path().iterdir()}
    assert out.split("\n", 2)[2].startswith("to be") and len(out.split("\n", 2)[2]) == 5 + 500 + 1


def test_an_untrained_model_is_sampled_and_not_saved(text, capsys):
    gpt.main(gpt.parse([*TINY_ARGS, "--steps", "0"]))
    assert os.listdir() == ["input.txt"] and len(capsys.readouterr().out.split("\n", 2)[2]) == 12


def test_sampling_needs_no_folder_that_can_be_written_and_training_does(text, monkeypatch):
    run()
    monkeypatch.setattr(os, "access", lambda *_: False)
    gpt.main({"LOAD": "gpt.pt", "STEPS": 0, "SAMPLE": 1})
    with pytest.raises(ValueError, match="--save gpt.pt"):
        gpt.main({"LOAD": "gpt.pt", "STEPS": 1})


def test_an_empty_save_writes_no_weights(text):
    run("--save", "")
    assert sorted(os.listdir()) == ["input.txt", "runs.jsonl"]


def test_the_file_replaces_the_one_before_and_only_when_it_is_whole(text, monkeypatch):
    run()
    whole = Path("gpt.pt").read_bytes()

    def torn(_, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError):
        run("--seed=2")
    assert Path("gpt.pt").read_bytes() == whole
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt", "runs.jsonl"]


def test_the_sample_by_prompt_and_temperature(text, capsys):
    run("--steps=30", "--sample=0")
    capsys.readouterr()

    def sampled(*argv):
        gpt.main(gpt.parse(["--load=gpt.pt", "--steps=0", "--prompt=to be ", "--sample=40", *argv]))
        return capsys.readouterr().out.split("\n", 2)[2]

    coldest = sampled("--temperature=0", "--seed=2")
    assert coldest == sampled("--temperature=0", "--seed=3") == sampled("--temperature=0.000001")
    assert sampled("--seed=2") != sampled("--seed=3")
    assert sampled("--temperature=9") != sampled() == sampled("--temperature=1")
    assert sampled("--sample=0") == "to be \n" and sampled("--prompt=").startswith("\n")
    assert sampled("--prompt=" + 9 * "to be ").startswith(9 * "to be ")  # longer than the context


# Devices.
class Stub(nn.Module):
    """In place of a model that would be too big for a test, or for this machine."""

    def to(self, _):
        return self


@pytest.fixture
def gpu(text, monkeypatch):
    """gpu(DEVICE="cuda") is a run on a machine that seems to have a GPU; returns its record."""
    monkeypatch.setattr(gpt, "FULL", dict(gpt.FULL))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpt, "GPT", lambda vocab_size: Stub())
    monkeypatch.setattr(gpt, "train", lambda model, *_: (model, 1.0, [[1, 2.0, 3.0]]))

    def start(**given):
        gpt.main({"SAMPLE": 0, "SAVE": ""} | given)
        return record()

    return start


def test_a_run_on_cuda_is_the_same_model_under_the_same_name(gpu):
    row = gpu(DEVICE="cuda")
    assert (row["name"], row["device"]) == ("full", "cuda")
    assert row["sizes"] == {flag: gpt.FULL[flag] for flag in gpt.SIZES}


@pytest.mark.parametrize("there, device", [(True, "cuda"), (False, "cpu")])
def test_cuda_is_the_default_where_it_is(there, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert runpy.run_path(str(SCRIPT), run_name="gpt")["DEVICE"] == device


# Bad input: one line on standard error with the culprit and the remedy, and nothing touched.
class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, a checkpoint and a record that are good, and much that is bad."""
    folder, here = tmp_path_factory.mktemp("bad"), os.getcwd()
    os.chdir(folder)
    text = words()
    Path("input.txt").write_text(text)
    for flags in ({}, {"SAVE": "narrow.pt", "N_EMBD": 6}):
        gpt.main(TINY | {"SAMPLE": 0} | flags)
    Path("empty.txt").touch()
    Path("short.txt").write_text("to be")
    Path("folder").mkdir()
    Path("latin.txt").write_bytes((text + "é").encode("latin-1"))
    Path("utf16.txt").write_text(text, "utf-16")
    Path("binary.txt").write_bytes(bytes(range(256)) * 8)
    with open("large.txt", "wb") as file:
        file.write(b"\xff")
        file.truncate(200_000_000)
    Path("chinese.txt").write_text("我能吞下玻璃而不伤身体。\n" * 100, "utf-8")
    Path("secret.txt").write_text(text)
    Path("secret.txt").chmod(0)
    Path("dangling.txt").symlink_to("nowhere.txt")
    Path("empty.pt").touch()
    Path("half.pt").write_bytes(Path("gpt.pt").read_bytes()[:4000])
    Path("text.pt").write_text(text)
    Path("nozip.pt").write_bytes(b"PK\x03\x04" + bytes(200))
    with zipfile.ZipFile("zip.pt", "w") as file:
        file.writestr("hello.txt", "hello")
    torch.save({"weights": Evil(), "flags": {}, "vocab": "ab"}, "evil.pt")
    torch.save(gpt.GPT(5).state_dict(), "weights.pt")
    Path("sealed").mkdir(0o500)
    yield os.chdir(here) or folder
    Path(folder, "large.txt").unlink()


def values(flag, *bad):
    """Cases of a flag that is out of range: the line must show the flag, the value, its comment."""
    name = "--" + flag.lower().replace("_", "-")
    remedy = gpt.HELP[flag]
    return [pytest.param(f"{name}={v}", f"{name} {v}", remedy, id=f"{name[2:]}={v}") for v in bad]


def cases(remedy, *rows):
    """Cases (args, culprit) that share a remedy."""
    return [
        pytest.param(args, culprit, remedy, id=args.strip() or culprit) for args, culprit in rows
    ]


HUGE = (2**63, 10**30)
LOAD = "--steps 0 --load"
as_user = pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root reads all")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc")

BAD = [
    *cases(
        "unrecognized arguments",
        ("--wat", "--wat"),
        ("--wat=1", "--wat=1"),
        ("--n-lay 1", "--n-lay"),
        ("-n 1", "-n"),
        ("--no-n-head", "--no-n-head"),
        ("hello", "hello"),
    ),
    *cases(
        "expected one argument",
        ("--n-head", "--n-head"),
        ("--n-head --no-norm", "--n-head"),
        ("--data", "--data"),
    ),
    *cases("ignored explicit argument", ("--norm=1", "--norm"), ("--no_norm=yes", "--no-norm")),
    *cases(
        "invalid int value",
        ("--n-head four", "--n-head"),
        ("--n-head 1.5", "--n-head"),
        ("--n_layer=", "--n-layer"),
        ("--steps 1e3", "--steps"),
        ("--seed 0x10", "--seed"),
        ("--sample nan", "--sample"),
    ),
    *cases(
        "invalid float value",
        ("--learning-rate fast", "--learning-rate"),
        ("--dropout 10%", "--dropout"),
        ("--temperature=1,0", "--temperature"),
    ),
    *values("N_HEAD", 0, -1, 3, *HUGE),
    *values("N_LAYER", -1, *HUGE),
    *values("N_EMBD", 0, -8, 10**12, *HUGE),
    *values("BLOCK_SIZE", 0, -1, *HUGE),
    *values("BATCH_SIZE", 0, -1, 10**15, *HUGE),
    *values("STEPS", -1, *HUGE),
    *values("SEED", -1, *HUGE),
    *values("SAMPLE", -1, *HUGE),
    *values("DROPOUT", -0.1, 1.5, "nan", "inf"),
    *values("LEARNING_RATE", -0.1, "nan", "inf", "-inf"),
    *values("TEMPERATURE", -1.0, "nan", "inf", 1e30),
    *values("OPTIMIZER", "adam", "SGD", ""),
    *values("DEVICE", "cuda", "mps", "tpu", "cuda:0", "CPU", ""),
    pytest.param("--n-embd 10", "--n-head 4", gpt.HELP["N_HEAD"], id="10 channels, 4 heads"),
    *cases(
        "UTF-8",
        ("--data nowhere.txt", "--data nowhere.txt"),
        ("--data=", "--data"),
        ("--data folder", "--data folder"),
        ("--data latin.txt", "--data latin.txt"),
        ("--data utf16.txt", "--data utf16.txt"),
        ("--data binary.txt", "--data binary.txt"),
        ("--data large.txt", "--data large.txt"),
        ("--data dangling.txt", "--data dangling.txt"),
        ("--data narrow.pt", "--data narrow.pt"),
        ("--data \ud800.txt", "--data"),
    ),
    pytest.param("--data secret.txt", "secret.txt", "UTF-8", marks=as_user, id="no permission"),
    *cases(
        "too short",
        ("--data empty.txt", "--data empty.txt"),
        ("--data short.txt", "--data short.txt"),
        ("--block-size 1800", "--data input.txt"),
    ),
    *cases(
        "not in the vocabulary",
        ("--prompt Ä", "--prompt"),
        ("--prompt JULIET:", "'J', 'L', 'T', 'U'"),
        ("--prompt to\t我🙂", "'\\t', '我', '🙂'"),
        (f"{LOAD} gpt.pt --prompt Ä", "'Ä'"),
        ("--load gpt.pt --data chinese.txt", "'。', '下', '不'"),
    ),
    *cases(
        "what --save wrote",
        (f"{LOAD} nowhere.pt", "--load nowhere.pt"),
        (f"{LOAD} folder", "--load folder"),
        (f"{LOAD} half.pt", "--load half.pt"),
        (f"{LOAD} empty.pt", "--load empty.pt"),
        (f"{LOAD} text.pt", "--load text.pt"),
        (f"{LOAD} nozip.pt", "--load nozip.pt"),
        (f"{LOAD} zip.pt", "--load zip.pt"),
        (f"{LOAD} evil.pt", "--load evil.pt"),
        (f"{LOAD} weights.pt", "--load weights.pt"),
        (f"{LOAD} runs.jsonl", "--load runs.jsonl"),
        (f"{LOAD} gpt.pt --n-embd 16", "--load gpt.pt"),
        (f"{LOAD} gpt.pt --n-layer 3", "--load gpt.pt"),
        (f"{LOAD} gpt.pt --no-mlp", "--load gpt.pt"),
        ("--load narrow.pt --bias", "--load narrow.pt"),
    ),
    pytest.param(f"{LOAD} narrow.pt --n-head 4", "--n-head 4", "divides N_EMBD", id="6 channels"),
    *values("SAVE", "folder", ".", "nowhere/gpt.pt", "new/", "input.txt/gpt.pt"),
    pytest.param(
        "--save /proc/gpt.pt", "--save", gpt.HELP["SAVE"], marks=[linux, as_user], id="save=/proc"
    ),
    pytest.param("--save sealed/gpt.pt", "--save", gpt.HELP["SAVE"], marks=as_user, id="sealed"),
    *values("SAVE", "input.txt", "runs.jsonl"),
]


def everything(folder):
    """Names, and what a write would change."""
    stats = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {path: (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns) for path, s in stats.items()}


def test_there_are_at_least_forty_cases():
    assert len(BAD) >= 40


@pytest.mark.parametrize("args, culprit, remedy", BAD)
def test_bad_input_is_one_line_and_touches_nothing(
    args, culprit, remedy, folder, script, monkeypatch
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    before = everything(folder)
    status, out, err = script("--steps=1", "--sample=0", *re.split(" ", args))
    assert everything(folder) == before
    assert (status, out) == (2, "")  # and it is found before anything begins
    assert err.startswith("gpt.py: error: ") and err.endswith("\n") and err.count("\n") == 1
    line = re.sub("--[a-z_]+", lambda flag: flag[0].replace("_", "-"), err)
    assert culprit in line and remedy in line
