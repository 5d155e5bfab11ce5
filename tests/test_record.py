"""The record: names of runs, runs.jsonl and the table."""

import ast
import io
import json
import multiprocessing
import re
import time
import zlib
from itertools import combinations
from pathlib import Path

import pytest
from conftest import DELETIONS, OWN, SCRIPT, TINY, everything, start

import gpt

SOURCE = SCRIPT.read_text("utf-8")
HEADER = r"     loss    cost  name \((?:[\d,]+) steps, seed \d+\)\n"
ROW = r"(.) *(\d+\.\d{3}) *([+-]\d+\.\d{3})  (.+)"
LIGHT = TINY | {"N_LAYER": 0}
KEYS = "name data params vocab started curve val_loss"


def records():
    return [json.loads(line) for line in Path("runs.jsonl").read_text("utf-8").splitlines()]


def table(out):
    """The rows of the table in out, name to mark, loss and cost, in order."""
    rows = {}
    for line in re.split(HEADER, out)[-1].splitlines():
        mark, loss, cost, name = re.fullmatch(ROW, line).groups()
        assert name not in rows
        rows[name] = mark, loss, cost
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
    same = dict(SEED=5, DATA="other.txt", CHECKPOINT="b.pt", SAMPLE=3)
    plain = gpt.main(**LIGHT)[2]["name"]
    assert gpt.main(**LIGHT | same)[2]["name"] == plain
    noted = gpt.main(**LIGHT, NOTE="a wider window")[2]
    assert noted["name"] == f"{plain} NOTE='a wider window'"
    assert noted["NOTE"] == "a wider window"


def test_the_full_model_is_the_file_as_it_lies():
    """The flags are the file's first assignments, each a literal but DEVICE, in one order. A
    reader's own flag may stand anywhere among them."""
    assignments = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.Assign)]
    lines = {node.targets[0].id: node.value for node in assignments[: len(gpt.FULL | gpt.REST)]}
    assert lines.keys() == (gpt.FULL | gpt.REST).keys()
    ours = [[flag for flag in flags if flag not in OWN] for flags in (lines, gpt.FULL | gpt.REST)]
    assert ours[0] == ours[1]
    shipped = {flag: ast.literal_eval(lines[flag]) for flag in gpt.FULL}
    assert shipped == gpt.FULL
    assert [type(value) for value in shipped.values()] == [type(v) for v in gpt.FULL.values()]


# runs.jsonl.
def test_the_record_of_a_run(text, capsys):
    before = time.time()
    returned = gpt.main(**LIGHT | {"N_HEAD": 4, "STEPS": 120, "SEED": 3})[2]
    (run,) = records()
    assert run == returned and set(run) == set(KEYS.split()) | set(gpt.FULL | gpt.REST)
    assert run["name"] == "N_LAYER=0 N_EMBD=8 BLOCK_SIZE=8 BATCH_SIZE=4"
    assert "  name (120 steps, seed 3)\n" in capsys.readouterr().out
    differs = {"N_LAYER": 0, "N_EMBD": 8, "BLOCK_SIZE": 8, "BATCH_SIZE": 4}
    assert {flag: run[flag] for flag in gpt.FULL} == gpt.FULL | differs
    assert (run["SEED"], run["STEPS"]) == (3, 120)
    assert run["params"] == len(set(text)) * 8 + 8  # the tied matrix and a norm's weights
    assert run["data"] == f"{zlib.crc32(text.encode()):08x}"
    assert run["vocab"] == "".join(sorted(set(text)))
    assert before <= run["started"] <= time.time()
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
@pytest.mark.parametrize("last", ["", '{"name": "fu', '{"name": "full"}', "hello", "\xff\xfe"])
def test_whatever_the_file_ends_with_a_record_has_a_line_of_its_own(last, end, text, capsys):
    first = gpt.main(**LIGHT)[2]
    before = Path("runs.jsonl").read_bytes() + (last + end).encode("latin-1")
    Path("runs.jsonl").write_bytes(before)
    run = gpt.main(**LIGHT, BIAS=True)[2]
    after = Path("runs.jsonl").read_bytes()
    assert after.startswith(before) and after.endswith(b"}\n")
    assert json.loads(after.splitlines()[-1]) == run
    assert list(table(capsys.readouterr().out)) in (
        [first["name"], run["name"]],
        [run["name"], first["name"]],
    )


def test_a_file_of_another_encoding_takes_a_record_too(text):
    Path("runs.jsonl").write_bytes("{}".encode("utf-16"))
    run = gpt.main(**LIGHT)[2]
    assert json.loads(Path("runs.jsonl").read_bytes().splitlines()[-1]) == run


def refuse_to_write(monkeypatch):
    real = io.open

    def refuse(path, mode="r", *args, **how):
        if str(path) == "runs.jsonl" and set(mode) & set("awx+"):
            raise PermissionError(13, "Permission denied", "runs.jsonl")
        return real(path, mode, *args, **how)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)


@pytest.mark.parametrize("kind", ["folder", "read-only"])
def test_a_file_that_cannot_be_written_is_found_before_training(kind, text, monkeypatch):
    if kind == "folder":
        Path("runs.jsonl").mkdir()
    else:
        Path("runs.jsonl").touch()
        refuse_to_write(monkeypatch)
    before = everything()
    status, _, err = start("--n-embd=8", "--steps=2")
    assert status == 2 and "runs.jsonl" in err and err.count("\n") == 1
    assert everything() == before


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
    assert sorted(json.loads(line)["SEED"] for line in lines if line) == list(range(6))


# The table.
def record(name, loss, **other):
    """What the table needs of a run's record."""
    return dict(name=name, val_loss=loss, SEED=1, data="abc", STEPS=9) | other


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


def test_losses_and_costs_by_hand_best_first(show):
    rows = show(
        record("full", 1.62),
        record("MLP=False", 1.9),
        record("BIAS=True", 1.605),
        record("GELU=False", 1.65),
    )
    assert list(rows.items()) == [
        ("BIAS=True", (" ", "1.605", "-0.015")),
        ("full", (" ", "1.620", "+0.000")),
        ("GELU=False", (">", "1.650", "+0.030")),
        ("MLP=False", (" ", "1.900", "+0.280")),
    ]


def test_the_last_run_of_a_name_counts(show):
    rows = show(record("full", 1.6), record("full", 1.5))
    assert rows == {"full": (">", "1.500", "+0.000")}


@pytest.mark.parametrize("other", [{"data": "b"}, {"STEPS": 8}, {"SEED": 2}], ids=str)
def test_another_text_other_steps_and_another_seed_are_not_compared(other, show):
    rows = show(record("full", 1.0, **other), record("TIE=False", 1.7))
    assert rows == {"TIE=False": (">", "1.700", "+0.000")}


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
        record("x", None),
        record("x", []),
        record("x", {}),
        record("x", "low"),
    ],
    ids=lambda line: str(line)[:40],
)
def test_a_line_that_is_no_record_is_skipped(line, show):
    rows = show(record("full", 1.6), line, record("TIE=False", 1.7))
    assert [row[2] for row in rows.values()] == ["+0.000", "+0.100"]
