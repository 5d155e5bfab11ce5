"""The README's commands, its Python and what it says of parameters; the house rules of gpt.py."""

import json
import re
from pathlib import Path

import pytest
from conftest import SCRIPT, TINY, words

import gpt

README = SCRIPT.with_name("README.md").read_text("utf-8")


@pytest.mark.parametrize("line", re.findall(r"python gpt\.py (--(?!help)[^`\n;]*)", README))
def test_commands_parse(line):
    command, *_ = line.split("  ")  # what follows two spaces is a remark
    argv = re.sub(r"\$(seed|rate|cut) ?", lambda name: "1 " * (name[1] != "cut"), command).split()
    assert set(gpt.parse([arg.strip('"') for arg in argv])) <= set(gpt.FULL)


def test_every_flag_is_named():
    assert [flag for flag in gpt.FULL if f"`{flag}`" not in README] == []


def test_the_python_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    Path("input.txt").write_text(words() + "But, soft! what light through yonder windo" * 3)
    for changes in ({}, {"NORM": False}, {"SEED": 2}):
        gpt.main(TINY | {"DEVICE": "cpu"} | changes)
    capsys.readouterr()
    room = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(code, room)
    table = capsys.readouterr().out
    losses = [json.loads(line)["val_loss"] for line in Path("runs.jsonl").open()]
    assert f"{(losses[0] + losses[2]) / 2:8.4f}" in table and f"{losses[1]:8.4f}" in table
    for picture in ("curves.png", "heads.png"):
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    for weights in room["maps"]:
        assert weights.sum(-1).allclose(weights.new_ones(()), atol=1e-5)
        assert weights.triu(1).abs().max() == 0
    assert len(room["maps"]) == TINY["N_LAYER"] and gpt.attention is room["attention"]


ROWS = re.findall(r"\| `[A-Z_]+` \| `(--[^`]+)` \| ([\d,]+) \|", README)


@pytest.mark.parametrize("how, params", ROWS)
def test_parameters_of_the_deletion_table(how, params):
    vars(gpt).update(gpt.FULL | {"DEVICE": "cpu"} | gpt.parse(how.split()))
    assert sum(p.numel() for p in gpt.GPT(65).parameters()) == int(params.replace(",", ""))


def test_the_deletion_table_is_complete():
    named = {flag for how, _ in ROWS for flag in gpt.parse(how.split())}
    assert named == set(gpt.MODEL) - {"LEARNING_RATE", "DROPOUT", "LOAD"} - {
        "N_EMBD",
        "BLOCK_SIZE",
        "BATCH_SIZE",
    }


def test_the_file_keeps_to_330_lines_of_100_columns():
    lines = SCRIPT.read_text("utf-8").splitlines()
    assert len(lines) <= 330 and max(map(len, lines)) <= 100
