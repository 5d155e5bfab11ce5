"""Both READMEs: their commands run, their Python runs, their numbers by hand are right."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import deletions
import pytest
import torch
from conftest import SCRIPT, TINY, words

import gpt

ROOT = SCRIPT.parent
README = (ROOT / "README.md").read_text("utf-8")
BOTH = README + (ROOT / "tests/README.md").read_text("utf-8")
COMMANDS = sorted(set(re.findall(r"(?<!; )python gpt\.py( --[^`\n,;]+)", BOTH)))
CODE = re.findall(r"```python\n(.*?)```", README, re.S)
QUICK = ["--steps=1", "--sample=1", "--batch-size=1", "--device=cpu", "--no-bfloat16"]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line, text, monkeypatch):
    Path("my.txt").write_text(text * 3, "utf-8")
    Path("input.txt").write_text("JULIET:\n" + text * 3, "utf-8")
    monkeypatch.setattr(sys, "argv", ["gpt.py", *shlex.split(line), *QUICK])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert Path("runs.jsonl").exists() and Path("gpt.pt").exists()


def test_the_commands_are_found():
    assert len(COMMANDS) > 6 and " --no-norm --n-head 1" in COMMANDS
    scripts = set(re.findall(r"python (tests/\w+\.py)", BOTH))
    assert scripts == {"tests/bench.py", "tests/deletions.py", "tests/look.py"}
    assert all((ROOT / name).exists() for name in scripts)


def test_every_flag_is_named():
    assert [flag for flag in gpt.FLAGS if f"`{flag}" not in README] == []


def test_the_readme_has_at_most_2000_words_outside_its_code():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    lines = [line for line in prose.splitlines() if not line.startswith("    ")]
    words = [word for word in " ".join(lines).split() if any(map(str.isalnum, word))]
    assert 500 < len(words) <= 2000


@pytest.fixture
def trained(text, monkeypatch):
    """A folder with a text and the tiny model trained on it, in gpt.pt."""
    monkeypatch.syspath_prepend(ROOT)
    for flag, value in TINY.items():
        monkeypatch.setattr(gpt, flag, value)
    Path("input.txt").write_text("But, soft! what light " + words() + "ROMEO:", "utf-8")
    monkeypatch.setattr(gpt, "BLOCK_SIZE", 32)
    gpt.main()  # leaves gpt.pt


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_each_python_block_runs_alone(code, trained, capsys):
    before = code.replace("STEPS=300", "STEPS=3")
    exec(compile(before, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


def test_all_python_blocks_run_in_order(trained):
    room = {"__name__": "readme"}
    for code in CODE:
        exec(compile(code.replace("STEPS=300", "STEPS=3"), "README.md", "exec"), room)
    assert room["run"]["name"].startswith("N_HEAD=2") and "RESIDUAL=False" in room["run"]["name"]


def block(start):
    """The Python block that has start in it, run: its names, and what it printed."""
    (code,) = [code for code in CODE if start in code]
    room = {}
    exec(code, room)
    return room


def test_the_head_by_hand(capsys):
    """Every number of the table, from x and the matrices, as the README's lines print them."""
    room = block("w_q")
    section = re.search(r"### One head by hand\n(.+?)\n#", README, re.S)[1]
    cells = re.findall(r"^\| (\w+) \| ([-\d., inf]+) \| ([-\d., inf]+) \|", section, re.M)
    table = {
        name: torch.tensor([[float(number) for number in cell.split(", ")] for cell in row])
        for name, *row in cells
    }
    assert list(table) == "x q k v scores scaled masked softmax output".split()
    for name, numbers in table.items():
        torch.testing.assert_close(numbers, room[name], rtol=0, atol=5e-4)
    x, q, k, v, scores, *_, weights, output = table.values()
    assert torch.equal(scores, torch.tensor([[float(a @ b) for b in k] for a in q]))
    hand = (scores[1] / 2).exp() / (scores[1] / 2).exp().sum()
    torch.testing.assert_close(weights[1], hand, rtol=0, atol=5e-4)
    torch.testing.assert_close(room["output"], gpt.attention(room["q"], room["k"], room["v"]))
    printed = capsys.readouterr().out
    assert all(f"\n{name} [" in "\n" + printed for name in list(table)[1:])


@pytest.mark.parametrize("flag, first", [("SCALE", 0.953), ("QUERY_KEY", 0.5)])
def test_the_sentence_below_the_table(flag, first, monkeypatch, capsys):
    room = block("w_q")
    monkeypatch.setattr(gpt, flag, False)
    weights = gpt.attention(room["q"], room["k"], torch.eye(2, 4))
    assert weights[1, 0].item() == pytest.approx(first, abs=5e-4)
    assert f"{first:.3g}" in README or first == 0.5


def test_the_shapes(capsys):
    block("one head's output")
    assert f"```text\n{capsys.readouterr().out}```" in README


def test_the_diagram_names_the_parts():
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", README, re.S)
    for flag in ("N_LAYER", "NORM", "ATTENTION", "RESIDUAL", "MLP", "TIE"):
        assert flag in diagram


def test_the_deletion_table_is_complete_sorted_and_adds_up():
    """Its rows are the runs of the sweep; each cost is a loss less the full model's."""
    section = re.search(r"### What each part is worth\n(.+?)\n#", README, re.S)[1]
    rows = re.findall(r"^\| `?([^|`]+?)`? \| ([\d.]+) \| ([-+\d.]*) \| ([\d.]+) \|", section, re.M)
    names = [name for name, *_ in rows]
    assert sorted(names) == sorted(deletions.name(gpt.FULL | cut) for cut in deletions.CUTS)
    losses = {name: float(loss) for name, loss, _, _ in rows}
    assert list(losses.values()) == sorted(losses.values())
    for name, _, cost, _ in rows:
        difference = losses[name] - losses["full"]
        assert float(cost or 0) == pytest.approx(difference, abs=0.0011)


def test_the_ladder_has_its_rungs_and_adds_up():
    section = re.search(r"## From the bigram(.+?)\n## ", README, re.S)[1]
    rows = re.findall(r"^\| [^|]+ \| (\d[\d.]+) \| ([-+\d.]*) \|", section, re.M)
    assert len(rows) == len(deletions.LADDER)
    for (before, _), (loss, change) in zip(rows, rows[1:], strict=False):
        assert float(change) == pytest.approx(float(loss) - float(before), abs=0.0011)


def test_the_commands_of_the_rungs_are_the_ladder():
    section = re.search(r"## From the bigram(.+?)\n## ", README, re.S)[1]
    commands = re.findall(r"^python gpt\.py --steps 1000(.*)$", section, re.M)
    rungs = []
    for command in commands:
        off = re.findall(r"--no-([a-z-]+)", command)
        sizes = re.findall(r"--(n-[a-z]+) (\d)", command)
        flags = dict.fromkeys(off, False) | {flag: int(value) for flag, value in sizes}
        rungs.append({flag.replace("-", "_").upper(): value for flag, value in flags.items()})
    assert rungs == list(deletions.LADDER.values())


def test_the_other_way_is_measured_against_the_same_seed():
    section = re.search(r"### The other way\n(.+?)\n#", README, re.S)[1]
    full = float(re.search(r"that seed \(([\d.]+)\)", section)[1])
    row = r"^\| `([A-Z_]+)=(\d+)` \| ([^|]+) \| ([\d.]+) \| ([-+\d.]+) \|"
    rows = re.findall(row, section, re.M)
    assert len(rows) == 3
    for flag, value, title, loss, cost in rows:
        assert deletions.OTHER_WAY[title] == {flag: int(value)}
        assert float(cost) == pytest.approx(float(loss) - full, abs=0.0011)
