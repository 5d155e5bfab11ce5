"""The README's commands, its Python, its numbers worked by hand; the house rules of gpt.py."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, TINY, words

import gpt

README = SCRIPT.with_name("README.md").read_text("utf-8")
COMMANDS = re.findall(r"python gpt\.py(?! --help)( --[^`\n;]+)", README)
CODE = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    command, *_ = line.split("  ")  # what follows two spaces is a remark
    assert set(gpt.parse(shlex.split(command.replace("$rate", "1")))) <= set(gpt.FULL)


def test_the_commands_are_found():
    assert len(COMMANDS) > 12 and " --no-norm" in COMMANDS
    scripts = set(re.findall(r"python (tests/\w+\.py)", README))
    assert scripts == {"tests/bench.py", "tests/deletions.py", "tests/look.py"}
    assert all((SCRIPT.parent / name).exists() for name in scripts)


def test_every_flag_is_named():
    assert [flag for flag in gpt.FULL if f"`{flag}`" not in README] == []


@pytest.fixture
def room(text, monkeypatch):
    """The names that the README's Python leaves, run in order after three runs."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    Path("input.txt").write_text(words() + "But, soft! what light through yonder windo" * 3)
    for changes in ({}, {"NORM": False}, {"SEED": 2}):
        gpt.main(TINY | {"DEVICE": "cpu"} | changes)
    room = {}
    for code in CODE:
        exec(code, room)
    return room


def test_the_python_draws_the_curves_and_the_attention_maps(room):
    for picture in ("curves.png", "heads.png"):
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    labels = [text.get_text() for text in room["axis"].figure.axes[0].texts]
    assert labels == [] and len(room["runs"]) == 2  # axis is the last of the maps by now
    assert len(room["maps"]) == TINY["N_LAYER"] and gpt.attention is room["attention"]
    for weights in map(torch.tensor, room["maps"]):
        assert weights.shape == (TINY["N_HEAD"], len(room["text"]), len(room["text"]))
        assert weights.sum(-1).allclose(torch.ones(()), atol=1e-5)
        assert weights.triu(1).abs().max() == 0


def test_the_head_by_hand(room):
    """Every number of the table, from x and the matrices, and by gpt.attention."""
    section = re.search(r"### One head by hand\n(.+?)\n#", README, re.S)[1]
    cells = re.findall(r"^\| (\w+) \| ([-\d., inf]+) \| ([-\d., inf]+) \|", section, re.M)
    table = {
        name: torch.tensor([[float(number) for number in cell.split(", ")] for cell in row])
        for name, *row in cells
    }
    assert list(table) == "x q k v scores scaled masked softmax output".split()
    x, q, k, v, scores, scaled, masked, softmax, output = table.values()
    assert torch.equal(x, room["x"]) and all(
        torch.equal(projected, x @ room[f"w_{name}"])
        for name, projected in zip("qkv", (q, k, v), strict=True)
    )
    assert torch.equal(scores, torch.tensor([[a @ b for b in k] for a in q]))
    assert torch.equal(scaled, scores / 2)
    assert masked[0].tolist() == [scaled[0, 0], -torch.inf] and torch.equal(masked[1], scaled[1])
    weights = masked.exp() / masked.exp().sum(-1, keepdim=True)
    assert (softmax - weights).abs().max() < 5e-4 and (output - weights @ v).abs().max() < 5e-4
    assert (output - room["output"]).abs().max() < 5e-4
    for flag, first in (("SCALE", 0.95), ("QUERY_KEY", 0.5)):  # the sentence below the table
        vars(gpt).update(gpt.FULL | {flag: False})
        given = (q, k) if gpt.QUERY_KEY else (None, None)
        assert gpt.attention(*given, torch.eye(2))[1, 0].item() == pytest.approx(first, abs=5e-3)


def test_the_diagram_names_every_part_of_the_model():
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", README, re.S)
    outside = {"N_HEAD", "OPTIMIZER", "LEARNING_RATE", "AVERAGE", "SCALED_INIT", "LOAD", *gpt.SIZES}
    assert [flag for flag in gpt.MODEL if flag not in outside and flag not in diagram] == []
    assert len(re.findall(r'-- "[^"]*\(.+\)', diagram)) == len(re.findall(r"-->", diagram))


ROWS = re.findall(r"\| `([A-Z_]+)` \| `(--[^`]+)` \| ([\d,]+) \|", README)


@pytest.mark.parametrize("flag, how, params", ROWS)
def test_parameters_of_the_deletion_table(flag, how, params):
    assert list(gpt.parse(how.split())) == [flag]
    vars(gpt).update(gpt.FULL | {"DEVICE": "cpu"} | gpt.parse(how.split()))
    assert sum(p.numel() for p in gpt.GPT(65).parameters()) == int(params.replace(",", ""))


def test_the_deletion_table_is_complete():
    parts = set(gpt.MODEL) - {"LEARNING_RATE", "DROPOUT", "LOAD", *gpt.SIZES}
    assert {flag for flag, _, _ in ROWS} == parts


def test_the_file_keeps_to_330_lines_of_100_columns():
    lines = SCRIPT.read_text("utf-8").splitlines()
    assert len(lines) <= 330 and max(map(len, lines)) <= 100
