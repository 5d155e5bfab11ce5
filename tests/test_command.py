"""The command line: three ways to set a flag, a run, its record, its checkpoint, and bad input."""

import ast
import contextlib
import hashlib
import io
import json
import linecache
import os
import re
import runpy
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import SCRIPT, TINY, TINY_ARGS, everything, words

import gpt

SOURCE = SCRIPT.read_text("utf-8")
KEYS = "name seed flags code data torch params started val_loss curve steps seconds"
QUICK = ["--steps=2", "--sample=0"]  # the full model's sizes


def start(*args, file=SCRIPT):
    """python file args, without a process of its own; returns its status, output and errors."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    status = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [str(file), *args]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        warned = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            status = end.code
        except Exception:
            status = 1
            traceback.print_exc()
        for warning in warned:
            print(f"{warning.category.__name__}: {warning.message}", file=sys.stderr)
    out.flush()
    err.flush()
    return status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


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
    return "gpt.py"


def runs():
    """The records of all runs; those that are equal but for the time they took are equal."""
    records = [json.loads(line) for line in Path("runs.jsonl").read_text("utf-8").splitlines()]
    return [{k: v for k, v in run.items() if k not in ("started", "seconds")} for run in records]


def table(out):
    """The rows of the table in out, name to the other columns; a long name goes on below."""
    lines = out[out.index("    loss    cost  spread  seeds  name\n") :].splitlines()[1:]
    rows = []
    for line in lines:
        if line.startswith(("?: ", "The model is in ")):
            break
        assert len(line) <= 80 and line[31:33] == "  " and line[33] != " "
        if line[:31].strip():
            columns = [line[:8], line[8:16], line[16:24], line[24:31]]
            if not line.startswith("diverged  "):
                assert re.fullmatch(r" *\d+\.\d{3}", columns[0])
                assert re.fullmatch(r" *([+-]\d+\.\d{3}|\?)", columns[1])
                assert re.fullmatch(r" +(\d+\.\d{3})?", columns[2])
            assert re.fullmatch(r" +\d+", columns[3])
            rows.append([line[33:], [column.strip() for column in columns]])
        else:
            rows[-1][0] += " " + line[33:]
    assert len(dict(rows)) == len(rows) > 0
    return dict(rows)


# Three ways to set a flag.
def test_an_edit_an_option_and_a_notebook_make_one_run_under_one_name(text, capsys):
    assert start(file=edit(NORM=False, STEPS=2, SAMPLE=0))[0] == 0
    assert start(*QUICK, "--no-norm")[0] == 0
    gpt.STEPS, gpt.SAMPLE, gpt.NORM = 2, 0, False
    gpt.main()
    gpt.NORM = True
    gpt.main(NORM=False)
    edited, *others = runs()
    assert others == [edited] * 3
    assert edited["name"] == "NORM=False" and edited["code"] == gpt.CODE
    assert list(table(capsys.readouterr().out.split("NORM=False: ")[-1])) == ["NORM=False"]


def test_an_edit_and_an_option_meet_in_one_table(text):
    start(*QUICK, file=edit())
    start(*QUICK, file=edit(NORM=False))
    rows = table(start(*QUICK, "--seed=2", "--no-norm", file=edit())[1])
    assert rows.keys() == {"full", "NORM=False"}
    assert rows["full"][3] == "1" and rows["NORM=False"][3] == "2"


def test_edits_upon_edits_are_a_row_each_of_at_most_80_columns(text):
    flags = "MLP TIE GELU SCALE CAUSAL PROJECTION SCALED_INIT".split()
    for n in range(len(flags) + 1):
        out = start(file=edit(STEPS=1, SAMPLE=0, **dict.fromkeys(flags[:n], False)))[1]
    names = {frozenset(name.split(", ")[0].split()) for name in table(out)}
    assert names == {
        frozenset(f"{flag}=False" for flag in flags[:n]) or frozenset(["full"])
        for n in range(len(flags) + 1)
    }


@pytest.mark.parametrize(
    "args, name",
    [
        ("", "full"),
        ("--seed 5 --norm --data other.txt --prompt to --checkpoint b.pt", "full"),
        ("--learning-rate=0 --dropout=0", "full"),
        ("--n-embd 128", "N_EMBD=128"),
        ("--block-size=16 --batch-size=2", "BLOCK_SIZE=16 BATCH_SIZE=2"),
        ("--n-layer 0", "N_LAYER=0"),
        ("--no-gelu", "GELU=False"),
        ("--no-flash", "FLASH=False"),
        ("--bfloat16", "BFLOAT16=True"),
        ("--optimizer sgd --learning-rate 0.01", "OPTIMIZER='sgd' LEARNING_RATE=0.01"),
        ("--no-query-key --bias --n-head=1", "N_HEAD=1 QUERY_KEY=False BIAS=True"),
    ],
)
def test_a_run_is_named_by_its_difference_from_the_full_model(args, name, text):
    Path("other.txt").write_text(text)
    status, out, err = start(*QUICK, *args.split())
    assert (status, err) == (0, "") and out.startswith(name + ": ")
    assert runs()[0]["name"] == name and list(table(out)) == [name]


@pytest.mark.parametrize("flag", [flag for flag, value in gpt.FULL.items() if type(value) is bool])
def test_every_part_has_an_option_an_edit_and_a_place_in_the_record(flag, text):
    value = not gpt.FULL[flag]
    name = flag.lower().replace("_", "-")
    start(*TINY_ARGS, f"--{name}" if value else f"--no-{name}")
    start(*TINY_ARGS, file=edit(**{flag: value}))
    option, edited = runs()
    assert option == edited and f"{flag}={value}" in option["name"].split()
    assert option["flags"][flag] is value


@pytest.mark.parametrize(
    "args, flag, value",
    [
        ("--n-head 1", "N_HEAD", 1),
        ("--n-head=1", "N_HEAD", 1),
        ("--n_head=1", "N_HEAD", 1),
        ("--n_head 1", "N_HEAD", 1),
        ("--n-head 4 --n-head 1", "N_HEAD", 1),
        ("--no-pre-norm", "PRE_NORM", False),
        ("--no-norm --norm", "NORM", True),
        ("--learning_rate 1e-3", "LEARNING_RATE", 0.001),
    ],
)
def test_options_are_spelled_with_dashes_or_underscores(args, flag, value, text):
    assert start(*TINY_ARGS, *args.split())[0] == 0
    assert runs()[0]["flags"][flag] == value


def test_every_flag_takes_the_value_it_has(text):
    args = []
    for flag in gpt.FLAGS:
        value = getattr(gpt, flag)
        option = f"--{flag.lower()}" if value else f"--no-{flag.lower()}"
        args.append(option if type(value) is bool else f"--{flag.lower()}={value}")
    status, out, err = start(*args, *QUICK)
    assert (status, err) == (0, "") and runs()[0]["name"] == "full"


def test_the_table_of_the_full_model_is_the_file_as_shipped():
    shipped = runpy.run_path(str(SCRIPT), run_name="gpt")
    assert gpt.FULL == {flag: shipped[flag] for flag in gpt.FULL}
    assert [type(value) for value in gpt.FULL.values()] == [type(shipped[f]) for f in gpt.FULL]
    assert list(gpt.FULL) + list(gpt.KNOBS) == gpt.FLAGS
    assert all(type(shipped[knob]) is kind for knob, kind in gpt.KNOBS.items())
    assert (
        gpt.FLAGS
        == [node.targets[0].id for node in ast.parse(SOURCE).body if type(node) is ast.Assign][
            : len(gpt.FLAGS)
        ]
    )


# The code.
@pytest.mark.parametrize(
    "lose",
    [
        lambda source: ast.unparse(ast.parse(source)),  # all comments and blank lines
        lambda source: source.replace("  # (B, T, C)\n", "  # x\n\n\n"),
        lambda source: source.replace("NORM = True  # off: ", "NORM = True  # on: "),
        lambda source: source.replace("\nN_HEAD = 4  #", "\n\n# 5. more\nN_HEAD = 4\n#"),
    ],
    ids=["all", "in the code", "one flag's", "a line more"],
)
def test_a_comment_changes_neither_the_name_nor_the_code(lose, text):
    start(*QUICK)
    assert lose(SOURCE) != SOURCE
    Path("gpt.py").write_text(lose(SOURCE), "utf-8")
    start(*QUICK, file="gpt.py")
    first, second = runs()
    assert first == second


def test_a_changed_line_of_code_is_another_row(text):
    start(*QUICK)
    file = edit(("16 / (step + 15)", "8 / (step + 7)"))
    rows = table(start(*QUICK, file=file)[1])
    full, mine = runs()
    assert full["code"] == gpt.CODE != mine["code"] and full["name"] == mine["name"] == "full"
    assert rows.keys() == {"full", f"full (edited code {mine['code'][:4]})"}


def test_a_new_flag_is_a_line_in_the_switchboard_and_one_where_it_acts(text):
    file = edit(
        ("\nBIAS = False", "\nDOUBLED = True\nBIAS = False"),
        ("x = self.wte(ids)", "x = self.wte(ids) * (2 if DOUBLED else 1)"),
    )
    start(*QUICK, file=file)
    rows = table(start(*QUICK, "--no-doubled", file=file)[1])
    full, without = runs()
    assert (full["name"], without["name"]) == ("full", "DOUBLED=False")
    assert full["flags"]["DOUBLED"] is True and without["flags"]["DOUBLED"] is False
    assert full["val_loss"] != without["val_loss"] and rows.keys() == {"full", "DOUBLED=False"}
    Path(file).write_text(Path(file).read_text("utf-8").replace("\nDOUBLED = T", "\nDOUBLED=0<0#"))
    start(*QUICK, file=file)
    assert runs()[2] == without


def test_a_bug_in_the_code_shows_its_traceback_and_line(text):
    file = edit(("scores = q @ k.mT * scale", "scores = q @ k * scale"))
    linecache.clearcache()  # other tests ran other files of this name in this process
    status, out, err = start(*TINY_ARGS, "--no-flash", file=file)
    line = 1 + Path(file).read_text("utf-8").splitlines().index(
        "        scores = q @ k * scale  # (B, H, T, T)"
    )
    assert status == 1 and err.startswith("Traceback ") and "characters" in out
    assert f'gpt.py", line {line}, in attention\n' in err
    assert "RuntimeError: " in err.splitlines()[-1] and "scores = q @ k * scale" in err


def test_help_names_every_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = start("--help")
    assert (status, err) == (0, "") and " ".join(gpt.__doc__.split()) in " ".join(out.split())
    for flag in gpt.FLAGS:
        assert f"--{flag.lower().replace('_', '-')}" in out
    assert os.listdir() == []


def test_import_prints_nothing_and_reads_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("input.txt").mkdir()  # whoever reads it fails
    runpy.run_path(str(SCRIPT), run_name="gpt")
    assert capsys.readouterr() == ("", "") and os.listdir() == ["input.txt"]


# A run.
def test_a_run_prints_ten_looks_a_sample_and_a_table(text):
    status, out, err = start(*TINY_ARGS, "--steps=40", "--sample=300")
    assert status == 0 and not err and "\r" not in out and "\033" not in out
    vocab = "".join(sorted(set(text)))
    name = "N_HEAD=2 N_LAYER=2 N_EMBD=8 BLOCK_SIZE=8 BATCH_SIZE=4"
    head, shape, *looks, rest = out.split("\n", 12)
    params = runs()[0]["params"]
    assert head == f"{name}: {params:,} parameters, 2 layers, 2 heads, {gpt.DEVICE}"
    assert shape == f"width 8, context 8; 2,000 characters, {len(vocab)} different"
    form = r"step (\d+)/40  train \d\.\d{3}  val \d\.\d{4}"
    assert [int(re.fullmatch(form, look)[1]) for look in looks] == list(range(4, 41, 4))
    sample, rows = rest.split("\n\n    loss ")
    assert len(sample) == 1 + 300 and set(sample) <= set(vocab)  # the prompt is a line end
    assert out.endswith("\nThe model is in gpt.pt; python gpt.py --steps 0 samples from it.\n")
    assert list(table(out)) == [name]
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt", "runs.jsonl"]


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 25, 99])
def test_a_run_is_looked_at_ten_times_and_at_its_end(steps, text):
    start(*TINY_ARGS, f"--steps={steps}")
    steps_seen = [row[0] for row in runs()[0]["curve"]]
    assert len(steps_seen) == min(steps, 10) and steps_seen[-1] == steps
    assert all(abs(n * steps / len(steps_seen) - s) < 1 for n, s in enumerate(steps_seen, 1))


def test_the_record_of_a_run(text):
    before = time.time()
    start(*"--n-layer=0 --n-embd=8 --steps=12 --sample=0 --seed=3".split())
    (line,) = Path("runs.jsonl").read_text("utf-8").splitlines()
    row = json.loads(line)
    assert set(row) == set(KEYS.split())
    assert row["name"] == "N_LAYER=0 N_EMBD=8" and (row["seed"], row["steps"]) == (3, 12)
    assert row["flags"] == gpt.FULL | {"N_LAYER": 0, "N_EMBD": 8}
    assert row["params"] == len(set(text)) * 8 + 8
    assert row["data"] == hashlib.sha256(text.encode()).hexdigest()[:8]
    assert row["torch"] == torch.__version__ and row["code"] == gpt.CODE
    assert before <= row["started"] and 0 < row["seconds"] <= time.time() - row["started"]
    assert row["val_loss"] == min(val for _, _, val in row["curve"])
    assert row["curve"][-1][0] == 12
    assert all(0 < loss < 10 for _, *losses in row["curve"] for loss in losses)


@pytest.mark.parametrize("args", [[], ["--no-average", "--dropout=0.1"]], ids=str)
def test_one_seed_gives_one_run(args, text):
    outs = [start(*TINY_ARGS, f"--seed={seed}", *args)[1] for seed in (1, 1, 2)]
    a, again, other = (out.split("\n\n    loss ")[0] for out in outs)
    first, second, third = runs()
    assert a == again != other and first == second and first["curve"] != third["curve"]


def test_bfloat16_trains_close_to_float32(text):
    start(*TINY_ARGS, "--steps=30")
    start(*TINY_ARGS, "--steps=30", "--bfloat16")
    exact, rough = (run["val_loss"] for run in runs())
    assert rough == pytest.approx(exact, abs=0.05) and rough != exact


@pytest.mark.parametrize("there, device", [(True, "cuda"), (False, "cpu")])
def test_cuda_is_the_default_where_it_is(there, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert runpy.run_path(str(SCRIPT), run_name="gpt")["DEVICE"] == device


# The checkpoint.
def test_each_look_with_the_lowest_loss_is_kept_in_one_rename(text, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.5, 1.6])
    looks, real = [], os.replace

    def evaluate(model, ids):
        looks.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return next(losses)

    def replace(part, name):
        assert name == "gpt.pt" and os.path.exists(name) == (len(kept) > 0)
        flags, vocab, weights = torch.load(part)
        same = [all(torch.equal(look[w], weights[w]) for w in weights) for look in looks]
        assert same.index(True) == len(looks) - 1  # it is what was just looked at
        assert flags == gpt.FULL | {f: v for f, v in TINY.items() if f in gpt.FULL}
        assert vocab == "".join(sorted(set(text)))
        kept.append(len(looks))
        real(part, name)

    kept = []
    monkeypatch.setattr(gpt, "evaluate", evaluate)
    monkeypatch.setattr(os, "replace", replace)
    model, _, run = gpt.main(**TINY | {"STEPS": 6})
    assert kept == [1, 2, 5] and run["val_loss"] == 1.5
    weights = torch.load("gpt.pt")[2]
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert sorted(os.listdir()) == ["gpt.pt", "input.txt", "runs.jsonl"]


def test_a_checkpoint_is_replaced_only_when_the_new_one_is_whole(text, monkeypatch):
    gpt.main(**TINY)
    whole = Path("gpt.pt").read_bytes()

    def torn(_, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        gpt.main(SEED=2)
    assert Path("gpt.pt").read_bytes() == whole


def test_sampling_takes_flags_and_vocabulary_from_the_checkpoint_and_writes_nothing(text):
    args = "--no-norm --no-query-key --no-position --n-head=4 --n-embd=16 --checkpoint=m.pt"
    out = start(*TINY_ARGS, "--steps=20", "--sample=60", *args.split())[1]
    sample = re.split(r"val [\d.]+\n", out)[-1].split("\n\n    loss ")[0]
    Path("input.txt").unlink()
    file = edit(N_LAYER=1, N_EMBD=32, MLP=False, CHECKPOINT="m.pt", SAMPLE=60)
    before = everything()
    assert start("--steps=0", "--block-size=4", "--optimizer=sgd", file=file) == (
        (0, sample + "\n", "")
    )
    assert before == everything()


def test_the_sample_by_prompt_temperature_top_k_and_seed(text):
    start(*TINY_ARGS, "--steps=30", "--sample=0")

    def sampled(*args):
        how = ["--steps=0", "--prompt=to be ", "--sample=40", *args]
        status, out, err = start(*how)
        assert status == 0 and not err and out.endswith("\n")
        return out[:-1]

    coldest = sampled("--temperature=0", "--seed=2")
    assert coldest == sampled("--temperature=0", "--seed=3") == sampled("--top-k=1")
    assert sampled("--seed=2") != sampled("--seed=3")
    assert sampled("--temperature=9") != sampled() == sampled("--temperature=1")
    assert sampled("--top-k=99") == sampled() != sampled("--top-k=2") != coldest
    assert len(sampled()) == 46 and sampled("--sample=0") == "to be "
    assert sampled("--prompt=").startswith("\n")
    assert sampled("--prompt=" + 9 * "to be ").startswith(9 * "to be ")  # longer than the context


# Bad input: one line on standard error that names the culprit, and nothing touched.
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
    assert start(*TINY_ARGS)[0] == 0
    for name in ("empty.txt", "empty.pt"):
        Path(name).touch()
    Path("short.txt").write_text("to be")
    Path("folder").mkdir()
    Path("latin.txt").write_bytes((text + "é").encode("latin-1"))
    Path("utf16.txt").write_text(text, "utf-16")
    Path("binary.txt").write_bytes(bytes(range(256)) * 8)
    Path("secret.txt").write_text(text)
    Path("secret.txt").chmod(0)
    Path("dangling.txt").symlink_to("nowhere.txt")
    Path("half.pt").write_bytes(Path("gpt.pt").read_bytes()[:4000])
    Path("text.pt").write_text(text)
    Path("nozip.pt").write_bytes(b"PK\x03\x04" + bytes(200))
    with zipfile.ZipFile("zip.pt", "w") as file:
        file.writestr("hello.txt", "hello")
    torch.save(torch.nn.Linear(2, 2).state_dict(), "two.pt")
    torch.save(torch.nn.Sequential(*[torch.nn.Linear(2, 2)] * 2).state_dict(), "four.pt")
    torch.save(7, "seven.pt")
    torch.save((Evil(), "ab", {}), "evil.pt")
    torch.save({"weights": {}, "flags": {}, "vocab": "ab"}, "before.pt")  # an earlier gpt.py's
    Path("sealed").mkdir(0o500)
    yield os.chdir(here) or folder


as_user = pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may do all")
LOAD = "--steps 0 --checkpoint"
OPTIONS = [
    ("--wat", "--wat"),
    ("--wat=1", "--wat=1"),
    ("--n-lay 1", "--n-lay"),
    ("-n 1", "-n"),
    ("--no-n-head", "--no-n-head"),
    ("hello", "hello"),
    ("--n-head", "--n-head"),
    ("--n-head --no-norm", "--n-head"),
    ("--data", "--data"),
    ("--norm=1", "--norm"),
    ("--no-norm=yes", "--no-norm"),
    ("--n-head four", "--n-head"),
    ("--n-head 1.5", "--n-head"),
    ("--n_layer=", "--n-layer"),
    ("--steps 1e3", "--steps"),
    ("--sample nan", "--sample"),
    ("--dropout 10%", "--dropout"),
    ("--temperature=1,0", "--temperature"),
    ("--n-head 0", "sizes"),
    ("--n-head -1", "N_HEAD=-1"),
    ("--n-head 3", "N_HEAD=3"),
    ("--n-head 8", "N_HEAD=8"),
    ("--n-embd 10", "N_EMBD=10"),
    ("--n-embd 0", "sizes"),
    ("--n-layer -1", "N_LAYER=-1"),
    ("--block-size 0", "sizes"),
    ("--batch-size 0", "sizes"),
    ("--block-size 1800", "BLOCK_SIZE=1800"),
    ("--steps -1", "STEPS=-1"),
    ("--seed -1", "SEED=-1"),
    ("--sample -1", "SAMPLE=-1"),
    ("--top-k -1", "TOP_K=-1"),
    ("--dropout -0.1", "DROPOUT=-0.1"),
    ("--dropout 1.5", "DROPOUT=1.5"),
    ("--dropout nan", "DROPOUT=nan"),
    ("--learning-rate -0.1", "LEARNING_RATE=-0.1"),
    ("--learning-rate nan", "LEARNING_RATE=nan"),
    ("--temperature -1", "TEMPERATURE=-1.0"),
    ("--temperature nan", "TEMPERATURE=nan"),
    ("--optimizer adam", "OPTIMIZER='adam'"),
    ("--optimizer=", "OPTIMIZER=''"),
    ("--device cuda", "DEVICE='cuda'"),
    ("--device tpu", "DEVICE='tpu'"),
    ("--device=", "DEVICE=''"),
    ("--data nowhere.txt", "DATA='nowhere.txt'"),
    ("--data=", "DATA=''"),
    ("--data folder", "DATA='folder'"),
    ("--data latin.txt", "DATA='latin.txt'"),
    ("--data utf16.txt", "DATA='utf16.txt'"),
    ("--data binary.txt", "DATA='binary.txt'"),
    ("--data dangling.txt", "DATA='dangling.txt'"),
    ("--data gpt.pt", "DATA='gpt.pt'"),
    ("--data \ud800.txt", "DATA="),
    pytest.param("--data secret.txt", "DATA='secret.txt'", marks=as_user),
    ("--data empty.txt", "DATA='empty.txt': too short"),
    ("--data short.txt", "DATA='short.txt': too short"),
    ("--prompt Ä", "['Ä']"),
    ("--prompt JULIET:", "['I', 'J', 'L', 'T', 'U']"),
    ("--prompt to\t我🙂", "['\\t', '我', '🙂']"),
    ("--steps 0 --prompt Ä", "['Ä']"),
    (f"{LOAD} nowhere.pt", "CHECKPOINT='nowhere.pt'"),
    (f"{LOAD} half.pt", "CHECKPOINT='half.pt'"),
    (f"{LOAD} empty.pt", "CHECKPOINT='empty.pt'"),
    (f"{LOAD} text.pt", "CHECKPOINT='text.pt'"),
    (f"{LOAD} nozip.pt", "CHECKPOINT='nozip.pt'"),
    (f"{LOAD} zip.pt", "CHECKPOINT='zip.pt'"),
    (f"{LOAD} two.pt", "CHECKPOINT='two.pt'"),
    (f"{LOAD} four.pt", "CHECKPOINT='four.pt'"),
    (f"{LOAD} seven.pt", "CHECKPOINT='seven.pt'"),
    (f"{LOAD} evil.pt", "CHECKPOINT='evil.pt'"),
    (f"{LOAD} before.pt", "CHECKPOINT='before.pt'"),
    ("--checkpoint input.txt", "CHECKPOINT='input.txt'"),
    ("--checkpoint runs.jsonl", "CHECKPOINT='runs.jsonl'"),
    ("--checkpoint=", "CHECKPOINT=''"),
    ("--checkpoint folder", "CHECKPOINT='folder'"),
    ("--checkpoint nowhere/gpt.pt", "CHECKPOINT='nowhere/gpt.pt'"),
    pytest.param("--checkpoint sealed/gpt.pt", "CHECKPOINT='sealed/gpt.pt'", marks=as_user),
]
EDITS = [
    ("STEPS", 1e3),
    ("STEPS", "300"),
    ("STEPS", None),
    ("STEPS", -1),
    ("N_HEAD", 4.0),
    ("N_HEAD", "4"),
    ("N_EMBD", 66),
    ("N_LAYER", None),
    ("NORM", 0),
    ("NORM", "False"),
    ("BIAS", None),
    ("OPTIMIZER", "SGD"),
    ("OPTIMIZER", None),
    ("LEARNING_RATE", "0.1"),
    ("LEARNING_RATE", None),
    ("DROPOUT", 2),
    ("SEED", 1.5),
    ("DATA", None),
    ("DATA", "inptu.txt"),
    ("CHECKPOINT", None),
    ("CHECKPOINT", "gpt.txt"),
    ("PROMPT", 7),
    ("PROMPT", "Ä"),
    ("TEMPERATURE", "hot"),
    ("TOP_K", 1.0),
]


def refused(folder, monkeypatch, *args, file=SCRIPT):
    """Run where all is before as it is after; returns the one line of the refusal."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: None)
    before = everything()
    status, out, err = start(*args, file=file)
    assert everything() == before
    assert (status, out) == (2, ""), err  # and it is found before anything begins
    assert err.startswith("gpt.py: error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("args, culprit", OPTIONS)
def test_a_bad_option_is_one_line_and_touches_nothing(args, culprit, folder, monkeypatch):
    assert culprit in refused(folder, monkeypatch, *TINY_ARGS, "--steps=1", *args.split(" "))


@pytest.mark.parametrize("flag, value", EDITS)
def test_a_bad_edit_is_one_line_and_touches_nothing(flag, value, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(edit(**{flag: value})).resolve()
    line = refused(folder, monkeypatch, *([] if flag == "STEPS" else ["--steps=1"]), file=file)
    assert f"{flag}={value!r}" in line


@pytest.mark.parametrize(
    "flag, value", [("LEARNING_RATE", 0), ("DROPOUT", 0), ("TEMPERATURE", 1), ("LEARNING_RATE", 1)]
)
def test_a_number_may_be_edited_to_a_whole_one(flag, value, text):
    assert start(*QUICK, file=edit(**{flag: value}))[0] == 0
    start(*QUICK, f"--{flag.lower()}={value}")
    edited, option = runs()
    assert edited == option


def test_a_line_of_an_error_says_what_to_do(folder, monkeypatch):
    assert "'adamw' or 'sgd'" in refused(folder, monkeypatch, "--optimizer=adam")
    assert "UTF-8" in refused(folder, monkeypatch, "--data=latin.txt")
    assert "leave them out" in refused(folder, monkeypatch, *TINY_ARGS, "--prompt=Ä")
    assert "python gpt.py makes one" in refused(folder, monkeypatch, *f"{LOAD} no.pt".split())
    assert ".pt in a folder" in refused(folder, monkeypatch, "--checkpoint=no/gpt.pt")
