"""Both READMEs: what they tell a reader to type works, and their tables speak of gpt.py's flags."""

import contextlib
import functools
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
from conftest import TINY, start, words

import gpt

ROOT = Path(gpt.__file__).resolve().parent
README = (ROOT / "README.md").read_text("utf-8")
LAB = (ROOT / "tests" / "lab" / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README + LAB, re.S)
PYTHON = [block for language, block in BLOCKS if language == "python"]
LINES = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python ") and "-m" not in line.split()]
SMALL = [f"--{flag.lower().replace('_', '-')}={value}" for flag, value in TINY.items()]


def test_what_is_read_has_at_most_2000_words():
    assert len(re.sub(r"```.*?```", "", README, flags=re.S).split()) <= 2000


def test_the_commands_of_the_first_screen_are_those_that_ci_runs():
    first = README[: README.index("```text")]
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    for pattern in re.findall(r"grep --max-count=1 '(.+)' README.md", script):
        assert re.search(pattern, first), pattern
    assert first.count("\n") < 30


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_a_python_block_runs_and_leaves_the_flags_as_they_were(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(words(), "utf-8")
    block = block.replace("STEPS=300", "STEPS=2, SAMPLE=5, N_EMBD=8, BLOCK_SIZE=8")
    before = {flag: getattr(gpt, flag) for flag in gpt.FULL | gpt.REST}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(block, {})
    assert {flag: getattr(gpt, flag) for flag in before} == before


def test_the_head_by_hand_is_that_of_attention():
    block = next(block for block in PYTHON if "w_q" in block)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(block, {})
    printed = {}
    for line in out.getvalue().splitlines():
        name, _, value = line.partition(" ")
        printed[name] = eval(value, {"inf": float("inf")})
    for row in re.findall(
        r"^\| (q|k|v|scores|scaled|masked|softmax|output) \|(.+?)\|(.+?)\|", README, re.M
    ):
        for column, cell in enumerate(row[1:]):
            numbers = [float(number) for number in cell.replace("−", "-").split(",")]
            assert printed[row[0]][column] == pytest.approx(numbers, abs=1e-3)
    for one, other in zip(printed["output"], printed["gpt.py"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@functools.cache
def show_help(path):
    """What python path --help prints."""
    status, out, _ = start("--help", file=ROOT / path)
    assert status == 0
    return out


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_has_the_files_and_options_it_names(command):
    words = shlex.split(command)
    assert (ROOT / words[1]).exists()
    known = set(re.findall(r"--[a-z-]+", show_help(words[1])))
    known |= {f"--{flag.lower().replace('_', '-')}" for flag in gpt.FULL | gpt.REST}
    known |= {f"--no-{flag.lower().replace('_', '-')}" for flag in gpt.FULL}
    assert set(re.findall(r"(?<!\S)--[a-z-]+", command)) <= known


def test_the_table_has_every_deletion_and_no_other_of_ours():
    rows = re.findall(
        r"^\| `?([A-Za-z_=' 0-9]+?)`? \| +-?[\d.]+ \| *(?:[-+−][\d.]+ ±[^|]+)?\|", README, re.M
    )
    shipped = [flag for flag in gpt.FULL if re.search(rf"`{flag}=", README)]
    names = {gpt.name_run(gpt.FULL | flags) for _, flags in sweep.deletions()}
    ours = {name for name in names if name == "full" or name.partition("=")[0] in shipped}
    assert set(rows) == ours


OWN_FLAG = {  # a part of a reader's own, added by "Change it": what it replaces, by what
    'NOTE = ""': 'SQUARE = False  # on: what the activation lets through is squared\nNOTE = ""',
    'NOTE="",': 'NOTE="", SQUARE=False,',
    "self.activation = ": "self.square = SQUARE\n        self.activation = ",
    "return self.projection(self.activation(self.expansion(x)))  # (B, T, C)": """\
y = self.activation(self.expansion(x))  # (B, T, 4 * C)
        if self.square:
            y = y.square()  # (B, T, 4 * C)
        return self.projection(y)  # (B, T, C)""",
}


@pytest.mark.slow
def test_a_reader_s_own_flag_leaves_all_tests_green(tmp_path):
    names = ["README.md", "pyproject.toml", "gpt.py", "tests", ".ci", ".github"]
    for path in map(ROOT.joinpath, names):
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name)
        else:
            shutil.copy(path, tmp_path)
    source = (ROOT / "gpt.py").read_text("utf-8")
    for old, new in OWN_FLAG.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / "gpt.py").write_text(source, "utf-8")
    tests = subprocess.run(
        [sys.executable, "-m", "pytest"], cwd=tmp_path, capture_output=True, text=True
    )
    assert tests.returncode == 0, tests.stdout


def test_the_pictures_are_there():
    for path in re.findall(r"\]\((\.github/[^)]+)\)", README):
        assert (ROOT / path).read_bytes().startswith(b"\x89PNG")


# The five questions of the lab's README.
QUESTIONS = LAB[LAB.index("## Five questions") : LAB.index("## What the X-ray shows")]


def questions():
    """The commands below the heads of the five questions."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", QUESTIONS, re.S):
        found += block.splitlines()
    return found


@pytest.mark.parametrize("command", questions())
def test_a_question_s_command_runs(command, tmp_path, monkeypatch):
    """On a small model and a short text, where it prints the lines that it prints in the README."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(words(), "utf-8")
    _, file, *args = shlex.split(command)
    sizes = SMALL
    if "xray" in file:
        sizes = [option for option in SMALL if not option.startswith("--sample")]
    status, out, err = start(*sizes, *args, "--steps=2", file=ROOT / file)
    assert (status, err) == (0, "")
    assert "name" in out or "One pass" in out
