"""Faults: kills, Ctrl-C, two runs at once, odd terminals, a full disk, a run that diverges."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, TINY_ARGS, command

import gpt

posix = pytest.mark.skipif(os.name != "posix", reason="signals, forks and terminals of POSIX")
ARGS = [*TINY_ARGS, "--steps=3"]

# A process that has imported torch and forks a child for each run, which saves the import. A
# request is a line of JSON: the child runs gpt.py as a script, times times, in the folder cwd, its
# output in the file or terminal out, and sends itself signal at the line events in at.
SERVER = """
import gc, json, os, resource, runpy, sys
import numpy, torch, torch._dynamo, torch.optim.swa_utils

gc.freeze()  # so that the children share it
script = sys.argv[1]
for line in sys.stdin:
    request = json.loads(line)
    if type(request) is int:
        print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        break
else:
    sys.exit()
os.chdir(request["cwd"])
os.environ.update(request["env"])
new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY
for fd, path in enumerate(["/dev/null", request["out"], "err"]):
    os.dup2(os.open(path, [os.O_RDONLY, new, new][fd]), fd)
sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
if request["limit"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
sys.argv = ["gpt.py", *request["args"]]
events = 0


def trace(frame, event, _):
    global events
    if frame.f_code.co_filename != script:
        return None
    events += event == "line"
    if event == "line" and events in request["at"]:
        os.kill(os.getpid(), request["signal"])
    return trace


if "at" in request:
    sys.settrace(trace)
status = 0
try:
    for _ in range(request["times"]):
        runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    status = end.code
sys.settrace(None)
with open("events", "w") as file:
    file.write(str(events))
if sys.stdout:
    sys.stdout.flush()
os._exit(status)  # the interpreter takes a second to take torch apart
"""


@pytest.fixture(scope="module")
def server():
    pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", SERVER, SCRIPT], env=env, **pipe) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def start(server, text):
    """start("--steps", "9") runs gpt.py in a fork, returns its pid; start.end(pid) its status."""

    def ask(request):
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def start(*args, out="out", env=(), limit=0, times=1, **faults):
        request = dict(args=[*ARGS, *args], cwd=os.getcwd(), out=out, env=dict(env), limit=limit)
        return ask(request | dict(times=times) | faults)

    start.end = ask
    return start


def runs():
    """The records; every line that is complete must be one."""
    path = Path("runs.jsonl")
    *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line) for line in lines]


def clean(killed=False):
    """Whether nothing lies in the folder but what belongs there, and, where a run may have been
    killed while it saved, its temporary folder."""
    left = {name for name in os.listdir() if not (killed and name.startswith("tmp"))}
    return left <= {"input.txt", "gpt.pt", "runs.jsonl", "out", "err", "events"}


def loads():
    """Whether gpt.pt, if there is one, loads."""
    return not os.path.exists("gpt.pt") or len(torch.load("gpt.pt", weights_only=True)["vocab"]) > 1


def until(happens):
    """Wait, at most 20 s, until happens() is true."""
    for _ in range(2000):
        if happens():
            return
        time.sleep(0.01)
    pytest.fail("nothing happened in 20 s")


# Killed.
@posix
def test_fifty_kills_at_random_moments_lose_nothing(start):
    draw, finished = random.Random(1), 0
    for _ in range(50):
        Path("out").unlink(missing_ok=True)
        pid = start(times=1000)
        time.sleep(draw.uniform(0.02, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert start.end(pid) == -signal.SIGKILL
        shown = Path("out").read_text() if os.path.exists("out") else ""
        finished += max(0, shown.count("[##########] 3/3") - 1)
        assert len(runs()) >= finished and loads()
        finished = len(runs())
    assert finished > 10  # so most of the kills met a run that others had come before
    assert start.end(start()) == 0 and len(runs()) == finished + 1


@posix
def test_a_kill_at_every_line_of_saving_and_recording_loses_nothing(start):
    assert start.end(start("--sample=0", signal=0, at=[])) == 0
    events, old = int(Path("events").read_text()), Path("gpt.pt").read_bytes()
    for at in range(events - 75, events - 25):  # the table takes the rest
        before = len(runs())
        assert start.end(start("--seed=2", "--sample=0", signal=9, at=[at])) == -signal.SIGKILL
        assert before <= len(runs()) <= before + 1 and loads()
        assert len(runs()) == before or Path("gpt.pt").read_bytes() != old
    assert len(runs()) > 1 and start.end(start()) == 0


# Ctrl-C.
@posix
@pytest.mark.parametrize("sample", [10, 0], ids=["from start to end", "forty lines of the end"])
def test_ctrl_c_at_any_line_gives_a_result_or_a_clean_end(sample, start):
    args, status = [f"--sample={sample}"], {}
    assert start.end(start(*args, signal=0, at=[])) == 0 and len(runs()) == 1
    events = int(Path("events").read_text())  # some come before the line that is for Ctrl-C
    for at in range(9, events, events // 40) if sample else range(events - 80, events - 40):
        before = len(runs())
        status[at] = start.end(start(*args, signal=signal.SIGINT, at=[at]))
        assert Path("err").read_text() == "" and loads()
        assert clean(killed=True), f"left behind at line event {at} of {events}: {os.listdir()}"
        if status[at] == 0:
            assert len(runs()) == before + 1
        else:
            assert status[at] == -signal.SIGINT
    assert 0 in status.values()


@posix
def test_ctrl_c_in_training_ends_it_and_keeps_everything(start):
    pid = start("--steps=1000000", "--sample=50")
    until(lambda: Path("out").exists() and "1/1000000" in Path("out").read_text())
    os.kill(pid, signal.SIGINT)
    assert start.end(pid) == 0 and Path("err").read_text() == ""
    (row,) = runs()
    assert 1 <= row["steps"] < 1000000 and row["val_loss"] > 0
    assert row["curve"][-1] == [row["steps"], row["train_loss"], row["val_loss"]]
    _, end = Path("out").read_text().split(f"] {row['steps']}/1000000  train ")
    assert len(end.split("\n", 1)[1].split("\n" + 18 * " ")[0]) == 1 + 50 + 1
    assert loads() and os.path.exists("gpt.pt")


@posix
def test_ctrl_c_twice_stops_at_once(start):
    assert start.end(start("--steps=5", signal=0, at=[])) == 0
    first = int(Path("events").read_text()) * 2 // 3
    at = [first, first + 1]  # in training, and a line later
    assert start.end(start("--steps=5", signal=signal.SIGINT, at=at)) == -signal.SIGINT
    assert Path("err").read_text() == "" and len(runs()) == 1


@posix
@pytest.mark.parametrize("module", ["argparse", "numpy", "torch.autograd"])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(module, text):
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen([sys.executable, "-X", "importtime", SCRIPT, *ARGS], **how)
    assert any(line.split("|")[-1].strip() == module for line in run.stderr)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    assert run.returncode == -signal.SIGINT and out == "" and "Traceback" not in err


# Two at once.
@posix
def test_two_runs_at_once_lose_no_line(start):
    pids = [start(f"--seed={seed}", times=15) for seed in (1, 2)]
    assert [start.end(pid) for pid in pids] == [0, 0]
    seeds = [row["seed"] for row in runs()]
    assert seeds.count(1) == seeds.count(2) == 15 and len(seeds) == 30 and loads() and clean()


# Odd outputs.
@posix
@pytest.mark.parametrize("where, steps", [("| head -1", 300), ("| true", 0)])
def test_an_output_closed_early_gives_no_traceback(where, steps, text, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    shell = ["sh", "-c", f'"$@" {where}', "sh", sys.executable, SCRIPT, *ARGS, f"--steps={steps}"]
    run = subprocess.run(shell, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in run.stderr and "Exception" not in run.stderr
    assert run.stderr.count("\n") <= 1 and run.stdout.count("\n") == where.count("head")
    assert clean()


def test_ascii_no_home_and_no_color(text, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    Path("input.txt").write_text("我能吞下玻璃而不伤身体。\n" * 100, "utf-8")
    env = {"PYTHONIOENCODING": "ascii", "NO_COLOR": "1", "LC_ALL": "C"}
    run = command(*ARGS, "--prompt=我", "--sample=99", env=env)
    assert run.returncode == 0 and run.stderr == "" and run.stdout.isascii()
    assert run.stdout.count("?") > 50 and "\033" not in run.stdout and len(runs()) == 1


@pytest.fixture
def terminal(start):
    """terminal(20, "--steps=9") is what a terminal of 20 columns is sent, TERM as in the env."""
    pytest.importorskip("termios")
    import fcntl
    import pty
    import struct
    import termios

    def show(columns, *args, **env):
        main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        assert start.end(start(*args, out=os.ttyname(side), env=env)) == 0
        assert Path("err").read_text() == ""
        os.close(side)
        sent = b""
        try:
            while part := os.read(main, 65536):
                sent += part
        except OSError:  # how Linux says that the other side is closed
            pass
        os.close(main)
        return sent.decode().replace("\r\n", "\n")

    return show


LINE = r"\[#*\.*\] {}/40  train \d\.\d{{3}}  val \d\.\d{{4}}  [\d,]+ tokens/s  \d+ s left"


@posix
def test_a_terminal_shows_one_live_line(terminal):
    shown = terminal(80, "--steps=40", "--sample=30", TERM="xterm", NO_COLOR="1")
    head, shape, live, sample = shown.split("\n" + 18 * " " + "params")[0].split("\n", 3)
    parts = live.split("\r")
    steps = [1, *range(4, 41, 4)]
    steps = sorted({*steps, 10, 20, 30})  # as measured, and every tenth
    assert parts[0] == "" and len(parts) == 1 + len(steps)
    for step, part in zip(steps, parts[1:], strict=True):
        assert part.endswith("\033[K") and re.fullmatch(LINE.format(step), part[:-3])
        assert part.count("#") == step // 4 and len(part) - 3 < 80
    assert len(sample) == 1 + 30 + 1 and "\033" not in sample


@posix
@pytest.mark.parametrize("columns", [20, 5, 1, 0])
def test_the_live_line_never_exceeds_a_narrow_terminal(columns, terminal):
    shown = terminal(columns, "--steps=40", TERM="xterm")
    live = shown.split("\n")[2].split("\r")[1:]
    assert len(live) > 10 and all(part.endswith("\033[K") for part in live)
    if columns:  # 0: a terminal that doesn't say how wide it is
        assert all(len(part) - 3 == columns - 1 for part in live)


@posix
def test_a_dumb_terminal_gets_plain_lines(terminal):
    shown = terminal(80, "--steps=40", TERM="dumb")
    assert "\r" not in shown and "\033" not in shown
    lines = shown.split("\n")[2:13]
    assert all(re.fullmatch(LINE.format(r"\d+"), line) for line in lines)


# A full disk.
@posix
def test_a_disk_too_full_for_the_weights(start):
    assert start.end(start()) == 0
    before = [Path(name).read_bytes() for name in ("gpt.pt", "runs.jsonl")]
    assert start.end(start("--seed=2", limit=5000)) == 2
    err = Path("err").read_text()
    assert err.count("\n") == 1 and err.startswith("gpt.py: error: ")
    assert before == [Path(name).read_bytes() for name in ("gpt.pt", "runs.jsonl")] and clean()


@posix
@pytest.mark.parametrize("room", [0, 100])
def test_a_disk_too_full_for_the_record(room, start):
    """It says so, in one line, also where a part of the record found room; the next run works."""
    assert start.end(start()) == 0
    old = Path("runs.jsonl").read_bytes()
    old *= 30_000 // len(old)
    Path("runs.jsonl").write_bytes(old)
    assert start.end(start("--seed=2", limit=len(old) + room)) == 2
    err = Path("err").read_text()
    assert err.count("\n") == 1 and err.startswith("gpt.py: error: ")
    assert Path("runs.jsonl").read_bytes()[: len(old)] == old and loads() and clean()
    assert start.end(start("--seed=3")) == 0
    assert json.loads(Path("runs.jsonl").read_text().splitlines()[-1])["seed"] == 3


# A run that diverges.
@pytest.mark.parametrize("step", [1, 4])
def test_a_diverging_run_is_noticed_recorded_and_not_saved(step, text, flags, monkeypatch, capsys):
    flags()
    losses, real = iter(range(1, 100)), gpt.F.cross_entropy

    def loss(logits, *args, **how):
        blows = torch.is_grad_enabled() and next(losses) == step
        return real(logits * torch.inf if blows else logits, *args, **how)

    monkeypatch.setattr(gpt.F, "cross_entropy", loss)
    gpt.main(gpt.parse([*TINY_ARGS, "--steps=9"]))
    (row,) = runs()
    assert row["steps"] == 9 and row["train_loss"] is None and row["val_loss"] is None
    assert row["curve"][-1] == [step, None, None] and "NaN" not in Path("runs.jsonl").read_text()
    *_, shown, _, _, line = capsys.readouterr().out.splitlines()
    assert f" {step}/9 " in shown and line.split()[-1] == "diverged"
    assert not os.path.exists("gpt.pt")


@posix
def test_a_rate_that_is_far_too_high_diverges_and_the_old_file_stays(start):
    assert start.end(start()) == 0
    before = Path("gpt.pt").read_bytes()
    wild = ["--optimizer=sgd", "--learning-rate=1e9", "--no-norm", "--steps=50"]
    assert start.end(start(*wild)) == 0 and Path("err").read_text() == ""
    row = runs()[-1]
    assert row["val_loss"] is None and row["curve"][-1][0] < row["steps"] == 50
    assert Path("out").read_text().endswith("diverged\n")
    assert Path("gpt.pt").read_bytes() == before and clean()
