"""The record: names of runs, the hash of the code, runs.jsonl and the table."""

import ast
import functools
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import time
import tokenize
from itertools import combinations
from pathlib import Path

import pytest
from conftest import DELETIONS, SCRIPT, TINY, everything

import gpt

SOURCE = SCRIPT.read_text("utf-8")
SHIPPED = gpt.SHIPPED
HASH = gpt.hash_code(SOURCE)
HEADER = "     loss    cost  parameters  seconds  name\n"
ROW = r"(.)(?: *(\d+\.\d{3}) *([+-]\d+\.\d{3})|diverged {8}) +([\d,]+) +(\d+)  (.+)"
LIGHT = TINY | {"N_LAYER": 0}
KEYS = "name flags seed data steps params vocab started curve val_loss seconds"


@pytest.fixture(autouse=True)
def shipped(monkeypatch):
    """The file as it lies counts as shipped: an edit fails the one test of that, not them all."""
    monkeypatch.setattr(gpt, "SHIPPED", HASH)


def records():
    return [json.loads(line) for line in Path("runs.jsonl").read_text("utf-8").splitlines()]


def table(out):
    """The rows of the table in out, name to mark, loss, cost, parameters and seconds, in order."""
    rows = {}
    for line in out.split(HEADER)[-1].splitlines():
        mark, loss, cost, params, seconds, name = re.fullmatch(ROW, line).groups()
        assert name not in rows
        rows[name] = mark, loss, cost, params, seconds
    return rows


# Names.
@pytest.mark.parametrize("changes", [{}, *DELETIONS], ids=str)
def test_a_name_is_what_one_would_type(changes):
    for others in ({}, {"N_EMBD": 128}, {"OPTIMIZER": "sgd", "LEARNING_RATE": 0.01}):
        differs = {flag: v for flag, v in (others | changes).items() if gpt.FULL[flag] != v}
        name = gpt.name_run(gpt.FULL | differs)
        if differs:
            assert eval(f"dict({name.replace(' ', ', ')})") == differs
        else:
            assert name == "full"


def test_every_pair_of_deletions_has_a_name_of_its_own():
    pairs = [one | two for one, two in combinations(DELETIONS, 2) if one.keys() != two.keys()]
    assert len({gpt.name_run(gpt.FULL | pair) for pair in pairs}) == len(pairs)


def test_a_note_is_part_of_the_name_and_what_does_not_change_the_model_is_not(text):
    Path("other.txt").write_text(text)
    same = dict(SEED=5, DATA="other.txt", PROMPT="to", CHECKPOINT="b.pt", TEMPERATURE=0.5, TOP_K=2)
    plain = gpt.main(**LIGHT)[2]["name"]
    assert gpt.main(**LIGHT, **same)[2]["name"] == plain
    noted = gpt.main(**LIGHT, NOTE="a wider window")[2]
    assert noted["name"] == f"{plain} NOTE='a wider window'"
    assert noted["flags"]["NOTE"] == "a wider window"


def test_the_full_model_is_the_file_as_it_lies():
    """The flags are the file's first assignments, each a literal but DEVICE, in one order."""
    assignments = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.Assign)]
    lines = {node.targets[0].id: node.value for node in assignments[: len(gpt.FULL | gpt.KINDS)]}
    assert list(lines) == list(gpt.FULL | gpt.KINDS)
    shipped = {flag: ast.literal_eval(lines[flag]) for flag in gpt.FULL}
    assert shipped == gpt.FULL
    assert [type(value) for value in shipped.values()] == [type(v) for v in gpt.FULL.values()]


# The hash of the code.
def test_the_file_as_it_lies_is_the_file_as_shipped():
    assert gpt.SOURCE == SOURCE and SHIPPED == HASH


def docstrings():
    """Each docstring below the flags as it stands in the file, with its quotes."""
    found = []
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            found.append(ast.get_source_segment(SOURCE, node.body[0].value))
    return found


def test_comments_docstrings_and_blank_lines_are_no_edit():
    for docstring in docstrings():
        for instead in ("", '"""Another."""', '"""Two lines,\n    with a # in it."""'):
            assert gpt.hash_code(SOURCE.replace(docstring, instead)) == HASH
    for line in re.findall(r".*  # .*\n", SOURCE):
        bare = line.partition("  # ")[0]
        if '"' not in bare:
            for instead in (bare + "\n", bare + "  # Another, with 'one quote\n\n   \n"):
                assert gpt.hash_code(SOURCE.replace(line, instead)) == HASH
    assert gpt.hash_code(SOURCE.replace("\nclass ", "\n# One more.\nclass ")) == HASH


def test_a_flag_is_no_edit_of_the_code():
    for flag in gpt.FULL | gpt.KINDS:
        edited, found = re.subn(rf"(?m)^{flag} = .*?(?=  #)", f"{flag} = 7", SOURCE)
        assert found == 1 and gpt.hash_code(edited) == HASH


def code_lines():
    """(index, end) of each line below the flags that ends in code: its index in the file and the
    column where the code ends. Lines with a # in a string, and the hash's own, are left out."""
    ends = {}
    left_out = set()
    words = docstrings()
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        row, column = token.end
        if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING):
            ends[row - 1] = column
        if token.type == tokenize.STRING and ("#" in token.string or token.string in words):
            left_out.update(range(token.start[0] - 1, row))
    lines = SOURCE.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("def "))
    left_out.update(n for n, line in enumerate(lines) if line.startswith("SHIPPED = "))
    return [(n, end) for n, end in ends.items() if n >= first and n not in left_out]


def test_every_line_of_the_code_counts():
    lines = SOURCE.splitlines()
    places = code_lines()
    assert len(places) > 200
    for index, end in places:
        line = lines[index]
        edits = [line[: end - 1], line[:end] + "x", " " + line]
        if line.startswith("    "):
            edits.append(line[4:])  # a dedent
        for edit in edits:
            edited = lines[:index] + [edit] + lines[index + 1 :]
            assert gpt.hash_code("\n".join(edited)) != HASH, (index + 1, edit)


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_every_python_gives_the_same_hash(version):
    python = shutil.which(f"python{version}")
    env = os.environ | {"PYENV_VERSION": version}  # pyenv's shims run the version asked for
    if not python or subprocess.run([python, "-V"], capture_output=True, env=env).returncode != 0:
        pytest.skip(f"no Python {version} here")
    imports = "import hashlib, re, sys\n"
    ends = "print(hash_code(open(sys.argv[1], encoding='utf-8').read()))"
    program = imports + inspect.getsource(gpt.hash_code) + ends
    command = [python, "-c", program, SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == (HASH + "\n", "")


def test_a_file_that_was_edited_says_so_in_the_name(monkeypatch):
    edited = SOURCE.replace("16 / (step + 15)", "8 / (step + 7)")
    assert edited != SOURCE
    monkeypatch.setattr(gpt, "SOURCE", edited)
    code = f"CODE={gpt.hash_code(edited)}"
    assert gpt.name_run(gpt.FULL) == code
    assert gpt.name_run(gpt.FULL | {"NORM": False}) == f"NORM=False {code}"


# What a notebook replaces.
@pytest.mark.parametrize("name", ["attention", "rotate", "evaluate", "train", "GPT", "Sublayer"])
def test_a_part_that_a_notebook_replaces_is_an_edit(name, monkeypatch):
    real = getattr(gpt, name)
    for mine in (lambda *args, **how: real(*args, **how), functools.partial(real)):
        monkeypatch.setattr(gpt, name, mine)
        assert gpt.name_run(gpt.FULL) == f"{name}=edited"
        assert gpt.name_run(gpt.FULL | {"NORM": False}) == f"NORM=False {name}=edited"
    monkeypatch.setattr(gpt, name, real)
    assert gpt.name_run(gpt.FULL) == "full"


@pytest.mark.parametrize("name", ["Attention", "FeedForward", "Sublayer", "GPT"])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_a_method_that_a_notebook_replaces_is_an_edit(name, method, monkeypatch):
    part = getattr(gpt, name)
    real = getattr(part, method)
    monkeypatch.setattr(part, method, lambda *args: real(*args))
    assert gpt.name_run(gpt.FULL) == f"{name}=edited"
    monkeypatch.setattr(part, method, real)
    assert gpt.name_run(gpt.FULL) == "full"


@pytest.mark.parametrize("name", ["Attention", "FeedForward", "Sublayer", "GPT"])
def test_a_class_that_a_notebook_derives_is_an_edit(name, monkeypatch):
    derived = type(name, (getattr(gpt, name),), {"__module__": "__main__"})
    monkeypatch.setattr(gpt, name, derived)
    assert gpt.name_run(gpt.FULL) == f"{name}=edited"


# runs.jsonl.
def test_the_record_of_a_run(text):
    before = time.time()
    returned = gpt.main(**LIGHT | {"N_HEAD": 4, "STEPS": 120, "SEED": 3})[2]
    (run,) = records()
    assert run == returned and set(run) == set(KEYS.split())
    assert run["name"] == "N_LAYER=0 N_EMBD=8 BLOCK_SIZE=8 BATCH_SIZE=4"
    differs = {"N_LAYER": 0, "N_EMBD": 8, "BLOCK_SIZE": 8, "BATCH_SIZE": 4}
    assert run["flags"] == gpt.FULL | differs
    assert (run["seed"], run["steps"]) == (3, 120)
    assert run["params"] == len(set(text)) * 8 + 8  # the tied matrix and a norm's weights
    assert run["data"] == hashlib.sha256(text.encode()).hexdigest()[:8]
    assert run["vocab"] == "".join(sorted(set(text)))
    assert before <= run["started"] and 0 < run["seconds"] <= time.time() - run["started"]
    assert run["val_loss"] == min(val for _, _, val in run["curve"])
    assert run["curve"][-1][0] == 120
    assert all(0 < loss < 10 for _, *losses in run["curve"] for loss in losses)


@pytest.mark.parametrize("changes", [{}, {"AVERAGE": False, "DROPOUT": 0.1}], ids=str)
def test_one_seed_gives_one_run(changes, text):
    first, second, third = [
        gpt.main(**TINY, **changes, SEED=seed)[2]["curve"] for seed in (1, 1, 2)
    ]
    assert first == second != third


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("last", ['{"name": "fu', '{"name": "full"}', "hello"])
def test_whatever_the_file_ends_with_a_record_has_a_line_of_its_own(last, end, text):
    gpt.main(**LIGHT)
    before = Path("runs.jsonl").read_bytes() + (last + end).encode()
    Path("runs.jsonl").write_bytes(before)
    run = gpt.main(**LIGHT, SEED=2)[2]
    after = Path("runs.jsonl").read_bytes()
    assert after.startswith(before) and json.loads(after.splitlines()[-1]) == run
    assert len(after.splitlines()) == 3 and after.endswith(b"}\n")


def test_an_empty_file_gets_no_empty_line(text):
    Path("runs.jsonl").touch()
    run = gpt.main(**LIGHT)[2]
    assert records() == [run]


@pytest.mark.parametrize("content", ["folder", b"\xff\xfe\n", "{}".encode("utf-16")])
def test_a_file_that_cannot_hold_records_is_found_before_training(content, text, capsys):
    path = Path("runs.jsonl")
    if content == "folder":
        path.mkdir()
    else:
        path.write_bytes(content)
    before = everything()
    with pytest.raises(gpt.BadInput, match="runs.jsonl"):
        gpt.main(**LIGHT)
    assert everything() == before and capsys.readouterr() == ("", "")


def test_a_file_that_may_not_be_written_is_found_before_training(text, monkeypatch, capsys):
    Path("runs.jsonl").touch()
    real = io.open

    def refuse(path, mode="r", *args, **how):
        if str(path) == "runs.jsonl" and set(mode) & set("awx+"):
            raise PermissionError(13, "Permission denied", "runs.jsonl")
        return real(path, mode, *args, **how)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    before = everything()
    with pytest.raises(gpt.BadInput, match="runs.jsonl"):
        gpt.main(**LIGHT)
    assert everything() == before and capsys.readouterr() == ("", "")


def test_runs_that_write_at_once_lose_no_line(text):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("without fork, six imports of torch take long")
    gpt.main(**LIGHT)  # what torch imports at its first step is then imported once
    Path("runs.jsonl").write_text('{"name": "torn')
    fork = multiprocessing.get_context("fork")
    runs = [fork.Process(target=gpt.main, kwargs=LIGHT | {"SEED": seed}) for seed in range(6)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(100)
    assert [run.exitcode for run in runs] == [0] * 6
    torn, *lines = Path("runs.jsonl").read_text("utf-8").split("\n")
    assert torn == '{"name": "torn'
    assert sorted(json.loads(line)["seed"] for line in lines if line) == list(range(6))


# The table.
def record(name, loss, **other):
    """What the table needs of a run's record. The loss of a run that diverged is None."""
    return (
        dict(name=name, val_loss=loss, seed=1, data="abc", steps=9, params=1234, seconds=5) | other
    )


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """show(*records) prints the table for the last of them; returns its rows. A text is a line."""
    monkeypatch.chdir(tmp_path)

    def show(*lines):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        Path("runs.jsonl").write_text("\n".join(texts) + "\n", "utf-8")
        gpt.compare(lines[-1])
        return table(capsys.readouterr().out)

    return show


def test_losses_costs_parameters_and_seconds_by_hand_best_first(show):
    rows = show(
        record("full", 1.62),
        record("MLP=False", 1.9, params=99_800, seconds=2.6),
        record("BIAS=True", 1.605),
        record("GELU=False", 1.65, seconds=3601),
    )
    assert list(rows.items()) == [
        ("BIAS=True", (" ", "1.605", "-0.015", "1,234", "5")),
        ("full", (" ", "1.620", "+0.000", "1,234", "5")),
        ("GELU=False", (">", "1.650", "+0.030", "1,234", "3601")),
        ("MLP=False", (" ", "1.900", "+0.280", "99,800", "3")),
    ]


def test_the_last_run_of_a_name_counts(show):
    rows = show(record("full", 1.6), record("full", 1.5))
    assert rows == {"full": (">", "1.500", "+0.000", "1,234", "5")}


@pytest.mark.parametrize("other", [{"data": "b"}, {"steps": 8}, {"seed": 2}], ids=str)
def test_another_text_other_steps_and_another_seed_are_not_compared(other, show):
    rows = show(record("full", 1.0, **other), record("TIE=False", 1.7))
    assert rows == {"TIE=False": (">", "1.700", "+0.000", "1,234", "5")}


@pytest.mark.parametrize(
    "base, others",
    [
        ("full", ["NORM=False"]),
        ("NORM=False", ["NORM=False GELU=False"]),
        ("N_EMBD=32", ["N_EMBD=32 MLP=False", "N_EMBD=32 MLP=False BIAS=True"]),
        ("NOTE='a norm at the end'", ["NORM=False GELU=False"]),
    ],
)
def test_the_base_is_the_run_that_differs_least_from_the_full_model(base, others, show):
    runs = [record(base, 1.7)] + [record(name, 1.9) for name in others]
    for order in (runs, runs[::-1]):  # whichever was made first
        rows = show(*order)
        assert rows[base][2] == "+0.000"
        assert all(rows[name][2] == "+0.200" for name in others)


def test_a_diverged_run_comes_last_says_so_and_is_no_base(show):
    rows = show(
        record("full", None), record("SCALE=False", 1.9), record("TIE=False ROTARY=False", 2)
    )
    assert list(rows) == ["SCALE=False", "TIE=False ROTARY=False", "full"]
    assert rows["full"] == (" ", None, None, "1,234", "5")
    assert rows["TIE=False ROTARY=False"][2] == "+0.100"
    assert list(show(record("full", None))) == ["full"]
    again = show(record("full", None), record("full", 1.6))
    assert again == {"full": (">", "1.600", "+0.000", "1,234", "5")}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\0",
        '{"name": "fu',
        "7",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"data": "abc"}',
        "[" * 9999,
        record("x", []),
        record("x", {}),
        record("x", "low"),
        record("x", 1.0, params=None),
        record("x", 1.0, params=[]),
        record("x", 1.0, params="many"),
        record("x", 1.0, seconds=None),
        record("x", 1.0, seconds={}),
        record("x", 1.0, seconds="long"),
    ],
    ids=lambda line: str(line)[:40],
)
def test_a_line_that_is_no_record_is_skipped(line, show):
    rows = show(record("full", 1.6), line, record("TIE=False", 1.7))
    assert [row[2] for row in rows.values()] == ["+0.000", "+0.100"]


@pytest.mark.parametrize("wrong", [{"params": math.inf}, {"val_loss": 10**400}], ids=["inf", "big"])
def test_a_number_out_of_range_is_skipped(wrong, show):
    rows = show(record("full", 1.6), record("x", 1.0) | wrong, record("TIE=False", 1.7))
    assert list(rows) == ["full", "TIE=False"]
