"""The command line: ways to set a flag, what a run prints, Ctrl-C, divergence and bad input."""

import contextlib
import io
import json
import linecache
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEFAULTS, SCRIPT, SHIPPED, TINY, TINY_ARGS, everything, start, words
from torch.nn import functional as F

import gpt

SOURCE = SCRIPT.read_text("utf-8")
SMALL = dict(N_EMBD=8, N_LAYER=1, BLOCK_SIZE=8, STEPS=2, SAMPLE=0)
SMALL_ARGS = [f"--{flag.lower().replace('_', '-')}={value}" for flag, value in SMALL.items()]
SWITCHES = [flag for flag, value in gpt.FULL.items() if isinstance(value, bool)]


def edit(*changes, **flags):
    """gpt.py in this folder: a copy with flags edited in their lines, and old text made new."""
    source = SOURCE
    for flag, value in flags.items():
        source, found = re.subn(rf"(?m)^{flag} = .*?(?=  #|$)", f"{flag} = {value!r}", source)
        assert found == 1
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    Path("gpt.py").write_text(source, "utf-8")
    linecache.clearcache()  # other tests ran other files of this name in this process
    return "gpt.py"


def option(flag):
    """The option of a flag."""
    return "--" + flag.lower().replace("_", "-")


def runs():
    """The records of all runs, without the time when they started."""
    records = [json.loads(line) for line in Path("runs.jsonl").read_text("utf-8").splitlines()]
    return [{k: v for k, v in run.items() if k != "started"} for run in records]


# Ways to set a flag.
@pytest.mark.parametrize("changes", [{"NORM": False}, {"N_HEAD": 1, "OPTIMIZER": "sgd"}], ids=str)
def test_an_edit_an_option_a_global_and_a_keyword_make_one_run_under_one_name(changes, text):
    options = [f"{option(flag)}={value}" for flag, value in changes.items()]
    options = ["--no-norm" if it == "--norm=False" else it for it in options]
    assert start(file=edit(**SMALL | changes))[0] == 0
    assert start(*SMALL_ARGS, *options)[0] == 0
    gpt.main(**SMALL | changes)
    vars(gpt).update(SMALL | changes)
    gpt.main()
    edited, *others = runs()
    assert others == [edited] * 3
    for flag, value in changes.items():
        assert f"{flag}={value!r}" in edited["name"].split() and edited[flag] == value


@pytest.mark.parametrize("flag", SWITCHES)
def test_every_switch_has_an_option_an_edit_and_a_place_in_the_record(flag, text):
    value = not gpt.FULL[flag]
    start(*SMALL_ARGS, option(flag) if value else option(f"no_{flag}"))
    start(*SMALL_ARGS, file=edit(**{flag: value}))
    by_option, by_edit = runs()
    assert by_option == by_edit and f"{flag}={value}" in by_option["name"].split()
    assert by_option[flag] is value


@pytest.mark.parametrize(
    "args, flag, value",
    [
        ("--n-head 1", "N_HEAD", 1),
        ("--n-head=1", "N_HEAD", 1),
        ("--n-head 4 --n-head 1", "N_HEAD", 1),
        ("--no-pre-norm", "PRE_NORM", False),
        ("--no-norm --norm", "NORM", True),
        ("--learning-rate 1e-3", "LEARNING_RATE", 0.001),
        ("--learning-rate=0", "LEARNING_RATE", 0.0),
        ("--note with-a-line", "NOTE", "with-a-line"),
        ("--note=--no-norm", "NOTE", "--no-norm"),
    ],
)
def test_options_are_spelled_with_hyphens(args, flag, value, text):
    assert start(*SMALL_ARGS, *args.split())[0] == 0
    assert runs()[0][flag] == value


def test_every_flag_has_an_option_that_takes_the_value_it_has(text):
    assert DEFAULTS == gpt.FULL | gpt.REST
    args = []
    for flag, value in DEFAULTS.items():
        if isinstance(value, bool):
            args.append(option(flag) if value else option(f"no_{flag}"))
        else:
            args.append(f"{option(flag)}={value}")
    options = gpt.parser.parse_args(args)
    assert vars(options) == DEFAULTS
    status, _, err = start(*args, "--steps=1", "--sample=0")
    assert (status, err) == (0, "") and runs()[0]["name"] == "full"


def test_an_edit_of_the_code_acts_under_the_name_that_its_note_gives(text):
    start(*SMALL_ARGS)
    change = ("16 / (step + 15)", "1 / step")
    start(*SMALL_ARGS, "--note=plain mean", file=edit(change))
    start(*SMALL_ARGS, file=edit(change, NOTE="plain mean"))
    first, noted, edited = runs()
    assert noted == edited and noted["name"] == first["name"] + " NOTE='plain mean'"
    assert noted["curve"] != first["curve"]


def test_help_shows_each_flag_with_its_comment_and_value_in_the_order_of_the_file(tmp_path):
    os.chdir(tmp_path)
    file = edit(N_HEAD=2, NOTE="100% to", NORM=False)
    status, out, err = start("--help", file=file)
    assert (status, err) == (0, "") and os.listdir() == ["gpt.py"]
    shown = " ".join(out.split())
    assert gpt.__doc__ in shown
    places = []
    source = Path(file).read_text("utf-8")
    for flag, comment in re.findall(r"(?m)^([A-Z_0-9]+) = .*?  # (.+)$", source):
        if flag not in SHIPPED:
            continue
        value = {"N_HEAD": 2, "NOTE": "100% to", "NORM": False}.get(flag, DEFAULTS[flag])
        if flag == "DEVICE":
            value = "cuda" if torch.cuda.is_available() else "cpu"
        found = re.search(rf"{option(flag)}\b[^\[]*{re.escape(comment)} \[{value}\]", shown)
        assert found, flag
        places.append(found.start())
    assert len(places) == len(SHIPPED) and places == sorted(places)


def test_a_flag_may_be_typed_in_any_way_that_python_allows(text):
    """Without spaces, as a run's name has it, with an annotation, and with no comment."""
    flags = SMALL | {"N_HEAD": 1, "NORM": False, "TIE": False, "SAMPLE": 3}
    changes = []
    for old, new in [
        (r"N_HEAD = \d+  # ", "N_HEAD=1 # "),
        (r"NORM = True  # ", "NORM: bool = False  # "),
        (r"TIE = True  # .*", "TIE =False"),
        (r"SAMPLE = 500  # ", "SAMPLE  =  3 # "),
    ]:
        line = re.search(f"(?m)^{old}", SOURCE)[0]
        changes.append((f"\n{line}", f"\n{new}"))
    rest = {flag: value for flag, value in SMALL.items() if flag not in ("N_HEAD", "SAMPLE")}
    status, out, err = start(file=edit(*changes, **rest))
    assert (status, err) == (0, "") and "1 heads" in out
    gpt.main(**flags)
    edited, by_keyword = runs()
    assert edited == by_keyword
    status, out, err = start("--help", file="gpt.py")
    assert (status, err) == (0, "") and "one look, at 2 to 6" in " ".join(out.split())


def test_import_prints_nothing_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("input.txt").mkdir()  # whoever reads it fails
    runpy.run_path(str(SCRIPT), run_name="gpt")
    assert capsys.readouterr() == ("", "") and os.listdir() == ["input.txt"]


@pytest.mark.parametrize("there, device", [(True, "cuda"), (False, "cpu")])
def test_cuda_is_the_default_where_it_is(there, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert runpy.run_path(str(SCRIPT), run_name="gpt")["DEVICE"] == device


@pytest.mark.parametrize("there", ["cuda", "mps", None])
def test_the_devices_are_the_cpu_and_the_accelerator_that_is_there(there, monkeypatch):
    device = torch.device(there) if there else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    devices = runpy.run_path(str(SCRIPT), run_name="gpt")["DEVICES"]
    assert devices == {"cpu", there or "cpu"}


# What a run prints.
def test_a_run_prints_a_header_the_curve_a_sample_the_file_and_a_table(text):
    status, out, err = start(*TINY_ARGS, "--steps=120", "--sample=300")
    assert (status, err) == (0, "") and "\r" not in out and "\033" not in out
    (run,) = runs()
    header, curve, *sample, table = out.split("\n\n")
    assert header.startswith(f"{run['name']}: {run['params']:,} parameters")
    for fact in ("on cpu", "2 layers", "2 heads", "width 8", "context 8", "2,000 characters"):
        assert fact in header
    looks = [line.split() for line in curve.splitlines()[1:]]
    assert [int(look[0]) for look in looks] == [row[0] for row in run["curve"]]
    for (_, train, val, left, *_), row in zip(looks, run["curve"], strict=True):
        assert [train, val] == [f"{row[1]:.3f}", f"{row[2]:.3f}"]
        assert re.fullmatch(r"\d+:[0-5]\d", left)
    assert all(len(line) <= 80 for line in curve.splitlines())
    *sample, file = "\n\n".join(sample).rsplit("\n\n", 1)
    assert len(sample[0]) == 1 + 300 and set(sample[0]) <= set(text)  # it begins with a line end
    assert "gpt.pt" in file and table.count(run["name"]) == 1
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt", "runs.jsonl"]


# Ctrl-C. The signal comes in the middle of a step, where the loss is computed, or of a look.
def interrupt(monkeypatch, when):
    """Ctrl-C at the first loss for which when(number of training losses, in training) holds."""
    real = F.cross_entropy
    steps = []

    def loss(*args, **how):
        training = torch.is_grad_enabled()
        steps.extend([1] * training)
        if when(len(steps), training):
            monkeypatch.setattr(F, "cross_entropy", real)
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(F, "cross_entropy", loss)


@pytest.mark.parametrize("step, training", [(1, True), (60, True), (100, False)])
def test_ctrl_c_before_the_first_look_is_one_line_and_touches_nothing(
    step, training, text, monkeypatch
):
    start(*SMALL_ARGS)
    before = everything()
    interrupt(monkeypatch, lambda steps, in_training: (steps, in_training) == (step, training))
    status, _, err = start(*SMALL_ARGS, "--steps=1000", "--seed=2")
    assert (status, err) == (2, "gpt.py: error: stopped\n") and everything() == before


@pytest.mark.parametrize("step, training", [(130, True), (200, False)])
def test_ctrl_c_after_the_first_look_ends_training_not_the_program(
    step, training, text, monkeypatch
):
    interrupt(monkeypatch, lambda steps, in_training: (steps, in_training) == (step, training))
    status, out, err = start(*SMALL_ARGS, "--steps=1000", "--sample=50")
    assert (status, err) == (0, "")
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt", "runs.jsonl"]
    (run,) = runs()
    assert [row[0] for row in run["curve"]] == [100, step] and run["STEPS"] == step
    assert run["val_loss"] == min(row[2] for row in run["curve"])
    assert out.count(run["name"]) == 2 and 'tests/lab/sample.py "gpt.pt"' in out
    assert torch.load("gpt.pt")["run"]["val_loss"] == run["val_loss"]


@pytest.mark.parametrize("look", [1, 2])
@pytest.mark.parametrize("culprit", ["save", "replace"])
def test_ctrl_c_while_the_model_is_written_writes_it_again(culprit, look, text, monkeypatch):
    module = {"save": torch, "replace": os}[culprit]
    real = getattr(module, culprit)
    calls = []

    def write(what, file):
        calls.append(1)
        if len(calls) == look:
            raise KeyboardInterrupt
        real(what, file)

    monkeypatch.setattr(module, culprit, write)
    start(*SMALL_ARGS, "--steps=1000")
    (run,) = runs()
    kept = torch.load("gpt.pt")
    assert kept["run"]["val_loss"] == run["val_loss"] == min(row[2] for row in run["curve"])
    assert run["STEPS"] == run["curve"][-1][0] == 100 * look
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt", "runs.jsonl"]


def test_ctrl_c_while_sampling_is_one_line_and_loses_no_run(text, monkeypatch):
    def multinomial(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "multinomial", multinomial)
    status, out, err = start(*SMALL_ARGS, "--sample=50")
    assert (status, err) == (2, "gpt.py: error: stopped\n")
    (run,) = runs()
    assert torch.load("gpt.pt")["run"]["val_loss"] == run["val_loss"]


def test_ctrl_c_that_ends_what_reads_the_pipe_too_loses_no_model(text, monkeypatch):
    """As with gpt.py | tee: the terminal sends Ctrl-C to both."""
    pipe = io.StringIO()

    def closed(_):
        raise BrokenPipeError(32, "Broken pipe")

    def when(steps, training):
        if steps == 150:
            monkeypatch.setattr(pipe, "write", closed)
        return steps == 150

    interrupt(monkeypatch, when)
    with contextlib.redirect_stdout(pipe), contextlib.suppress(OSError):
        gpt.main(**SMALL | {"STEPS": 1000})
    kept = torch.load("gpt.pt")["run"]
    assert kept["STEPS"] == 150 and kept["val_loss"] == kept["curve"][1][2]


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_of_a_process_whose_reader_is_gone(text):
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [*SMALL_ARGS, "--steps=1000000", "--device=cpu"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as at a terminal
        **pipe,
    )
    for line in process.stdout:
        if re.match(r" +100 ", line):
            break
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    assert torch.load("gpt.pt")["run"]["curve"][0][0] == 100
    assert "Traceback" not in err and err.count("\n") <= 1


# A run that diverges.
WILD = ["--optimizer=sgd", "--learning-rate=1e9", "--no-norm", "--steps=300"]


def test_a_run_that_diverges_is_one_line_and_claims_no_model(text):
    start(*SMALL_ARGS)
    before = everything()
    status, out, err = start(*SMALL_ARGS, *WILD, "--sample=50")
    assert status == 2 and err.startswith("gpt.py: error: the loss is no number at step 100")
    assert err.count("\n") == 1 and "LEARNING_RATE" in err
    assert everything() == before and "gpt.pt" not in out
    assert len(out.split("\n\n")) == 2  # the header and the curve: neither a sample nor a table


def test_a_run_that_diverges_late_leaves_the_model_of_its_best_look(text, monkeypatch):
    losses = iter([3.1, 3.0, 2.1, 2.0, 0.1, float("nan")])
    monkeypatch.setattr(gpt, "evaluate", lambda model, ids: next(losses))
    with pytest.raises(gpt.BadInput, match="step 300"):
        gpt.main(**SMALL | {"STEPS": 500})
    assert torch.load("gpt.pt")["run"]["val_loss"] == 2.0 and runs() == []


@pytest.mark.parametrize("loss", [1e30, 0.0])
def test_a_look_shows_any_loss(loss, text, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "evaluate", lambda model, ids: loss)
    gpt.main(**SMALL)
    out, err = capsys.readouterr()
    assert err == "" and f"{loss:.3f}" in out and runs()[0]["val_loss"] == loss


# Bad input: one line on standard error that names the culprit, and nothing touched.
OPTIONS = [
    ("--wat", "--wat"),
    ("--n-lay 1", "--n-lay"),
    ("--n_head 1", "--n_head"),
    ("-n 1", "-n"),
    ("hello", "hello"),
    ("--no-n-head", "--no-n-head"),
    ("--n-head", "--n-head"),
    ("--n-head --no-norm", "--n-head"),
    ("--n-head four", "--n-head"),
    ("--n-head 1.5", "--n-head"),
    ("--norm=1", "--norm"),
    ("--no-norm=yes", "--no-norm"),
    ("--steps 1e3", "--steps"),
    ("--dropout 10%", "--dropout"),
    ("--n-head 0", "N_HEAD=0"),
    ("--n-head 3", "N_HEAD=3"),
    ("--n-embd 10", "N_EMBD=10"),
    ("--block-size 0", "BLOCK_SIZE=0"),
    ("--block-size 1800", "BLOCK_SIZE=1800"),
    (f"--batch-size {10**30}", "BATCH_SIZE="),
    ("--steps -1", "STEPS=-1"),
    ("--steps 0", "STEPS=0"),
    ("--dropout -0.1", "DROPOUT=-0.1"),
    ("--dropout 1.5", "DROPOUT=1.5"),
    ("--learning-rate nan", "LEARNING_RATE=nan"),
    ("--learning-rate inf", "LEARNING_RATE=inf"),
    ("--optimizer nobody", "OPTIMIZER='nobody'"),
    ("--device cuda", "DEVICE='cuda'"),
    ("--device tpu", "DEVICE='tpu'"),
    ("--data nowhere.txt", "'nowhere.txt'"),
    ("--data=", "DATA=''"),
    ("--data folder", "'folder'"),
    ("--data latin.txt", "'latin.txt'"),
    ("--data utf16.txt", "'utf16.txt'"),
    ("--data dangling.txt", "'dangling.txt'"),
    ("--data \ud800.txt", ".txt"),
    ("--data empty.txt", "DATA='empty.txt' is too short"),
    ("--data short.txt", "DATA='short.txt' is too short"),
    ("--checkpoint input.txt", "CHECKPOINT='input.txt'"),
    ("--checkpoint=", "CHECKPOINT=''"),
    ("--checkpoint folder", "CHECKPOINT='folder'"),
    ("--checkpoint nowhere/gpt.pt", "CHECKPOINT='nowhere/gpt.pt'"),
]
VALUES = [
    ("STEPS", 1e3),
    ("N_HEAD", True),
    ("N_EMBD", 66),
    ("N_EMBD", 10**30),
    ("BLOCK_SIZE", 0),
    ("NORM", 0),
    ("OPTIMIZER", "SGD"),
    ("LEARNING_RATE", "0.1"),
    ("CHECKPOINT", "gpt.txt"),
    ("DEVICE", "tpu"),
    ("NOTE", None),
]
NUMBERS = [
    "N_HEAD",
    "DROPOUT",
    "N_LAYER",
    "N_EMBD",
    "BLOCK_SIZE",
    "LEARNING_RATE",
    "BATCH_SIZE",
    "STEPS",
    "SEED",
    "SAMPLE",
]
TEXTS = ["OPTIMIZER", "NOTE", "DEVICE", "DATA", "CHECKPOINT"]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with a text, a checkpoint and a record that are good, and much that is bad."""
    folder, here = tmp_path_factory.mktemp("bad"), os.getcwd()
    os.chdir(folder)
    Path("input.txt").write_text(words())
    assert start(*TINY_ARGS)[0] == 0
    Path("empty.txt").touch()
    Path("short.txt").write_text("to be")
    Path("folder").mkdir()
    Path("latin.txt").write_bytes((words() + "é").encode("latin-1"))
    Path("utf16.txt").write_text(words(), "utf-16")
    Path("dangling.txt").symlink_to("nowhere.txt")
    yield folder
    os.chdir(here)


@pytest.fixture
def refused(bad, monkeypatch):
    """refused(*args) runs in the bad folder, where all is before as after, and where the CPU is the
    only device; returns the one line of the refusal."""
    monkeypatch.chdir(bad)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)

    def run(*args, file=SCRIPT):
        before = everything()
        status, out, err = start(*args, file=file)
        assert everything() == before
        assert status == 2 and "parameters" not in out, err  # it is found before training
        assert err.startswith("gpt.py: error: ") and err.endswith("\n") and err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize("args, culprit", OPTIONS)
def test_a_bad_option_is_one_line_and_touches_nothing(args, culprit, refused):
    assert culprit in refused(*TINY_ARGS, *args.split(" "))


@pytest.mark.parametrize("flag, value", VALUES)
def test_a_bad_edit_is_one_line_and_touches_nothing(flag, value, refused, tmp_path, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        file = Path(edit(**{"STEPS": 2, flag: value})).resolve()
    assert f"{flag}={value!r}" in refused(file=file)


@pytest.mark.parametrize("flag, value", VALUES)
def test_a_bad_value_in_the_library_is_an_exception_of_its_own(flag, value, text, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    assert issubclass(gpt.BadInput, ValueError)
    with pytest.raises(gpt.BadInput) as by_keyword:
        gpt.main(**TINY | {flag: value})
    vars(gpt).update(TINY | {flag: value})
    with pytest.raises(gpt.BadInput) as by_global:
        gpt.main()
    assert f"{flag}={value!r}" in str(by_keyword.value) == str(by_global.value)
    assert "\n" not in str(by_global.value) and not Path("gpt.pt").exists()


def test_every_flag_refuses_what_it_cannot_use(text):
    assert set(NUMBERS + TEXTS + SWITCHES) >= SHIPPED
    for names, values in (
        (NUMBERS, [True, 10**30, float("nan"), -1, "1", [1]]),
        (SWITCHES, [1, 0, "False", None]),
        (TEXTS, [1, None, True, b"gpt.pt"]),
    ):
        for flag in names:
            for value in values:
                with pytest.raises(gpt.BadInput, match=rf"^{flag}="):
                    gpt.main(**TINY | {flag: value})
    assert os.listdir() == ["input.txt"]


@pytest.mark.parametrize("keyword", ["norm", "NROM", "n_head", "wat", "FULL", "attention"])
def test_a_keyword_that_is_no_flag_is_refused(keyword, text):
    with pytest.raises(gpt.BadInput, match=rf"\b{keyword}\b"):
        gpt.main(**TINY, **{keyword: False})
    assert os.listdir() == ["input.txt"]


@pytest.mark.parametrize("flag, value", [("LEARNING_RATE", 1), ("DROPOUT", 0)])
def test_a_number_may_be_edited_to_a_whole_one(flag, value, text):
    assert start(*SMALL_ARGS, file=edit(**{flag: value}))[0] == 0
    start(*SMALL_ARGS, f"{option(flag)}={value}")
    by_edit, by_option = runs()
    assert by_edit == by_option


def test_a_line_of_an_error_says_what_to_do(refused):
    assert f"give one of {[*gpt.OPTIMIZERS]}" in refused("--optimizer=nobody")
    assert "UTF-8" in refused("--data=latin.txt")
    assert "cpu" in refused("--device=tpu")
    assert "a name in .pt" in refused(*TINY_ARGS, "--checkpoint=input.txt")


@pytest.mark.parametrize("option", ["--data=nowhere.txt", "--block-size=1800"])
def test_bad_input_leaves_no_file_in_a_new_folder(option, text):
    assert start(*SMALL_ARGS, option)[0] == 2
    assert os.listdir() == ["input.txt"]


def test_a_bug_in_the_reader_s_code_keeps_its_traceback(text):
    file = edit(("scores = q @ k.mT * factor", "scores = q @ k * factor"))
    status, _, err = start(*SMALL_ARGS, "--no-flash", file=file)
    lines = Path(file).read_text("utf-8").splitlines()
    number = 1 + lines.index("        scores = q @ k * factor  # (B, H, T, T)")
    assert status == 1 and err.startswith("Traceback ")
    assert f'gpt.py", line {number}, in attention\n' in err
    assert "RuntimeError: " in err.splitlines()[-1]
