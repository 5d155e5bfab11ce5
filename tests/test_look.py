"""tests/lab/look.py: the weights it reads off a model, its rows in a pipe and a terminal, its page
in a real browser, its picture, bad input."""

import itertools
import json
import math
import os
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import look
import numpy as np
import pytest
import torch
from conftest import TESTS, TINY, build

import gpt

LOOK = str(TESTS / "lab" / "look.py")
HEAD = "layer.head  distance     sees  what the last character, {!r}, attends to"
ASCII = str.maketrans("▁█", "_#")
SHADES = [16, 52, 88, 124, 160, 196]  # black and the reds of 256 colours


def save(model, vocab, path="gpt.pt", name="tiny"):
    """Write what gpt.look writes, as far as look.py and sample.load need it."""
    run = {flag: getattr(gpt, flag) for flag in gpt.FULL}
    run |= {"name": name, "STEPS": 1000, "vocab": vocab}
    run |= {"curve": [[1000, 2.0, 2.0]], "val_loss": 2.0}
    torch.save({"run": run, "weights": model.state_dict()}, path)


@pytest.fixture
def saved(flags):
    """saved("abc", N_HEAD=1) leaves a model with random weights in gpt.pt, in an empty folder, and
    returns it. Its flags are gone again from gpt."""

    def make(vocab, name="tiny", **changes):
        flags(**changes)
        model = build(len(vocab))
        save(model, vocab, name=name)
        flags()
        return model

    return make


def received(main):
    """All that comes out of the descriptor main, a pipe or the near side of a terminal."""
    sent = b""
    try:
        while part := os.read(main, 65536):
            sent += part
    except OSError:  # how Linux says that the far side of a terminal is closed
        pass
    os.close(main)
    return sent


@pytest.fixture
def script(monkeypatch, capsys):
    """script("gpt.pt", "to be") is python tests/lab/look.py gpt.pt "to be" without a process of its
    own, its output a pipe or a terminal of 80 columns, or COLUMNS. Returns its exit status,
    standard output and standard error."""

    def run(*args, terminal=False, encoding="utf-8", **env):
        main, side = pytest.importorskip("pty").openpty() if terminal else os.pipe()
        parts = []
        reader = threading.Thread(target=lambda: parts.append(received(main)))
        reader.start()
        status = 0
        with monkeypatch.context() as patch, open(side, "w", encoding=encoding) as out:
            patch.delenv("NO_COLOR", raising=False)
            for name, value in ({"TERM": "xterm", "COLUMNS": "80"} | env).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["look.py", *args])
            patch.setattr(sys, "stdout", out)
            try:
                runpy.run_path(LOOK, run_name="__main__")
            except SystemExit as end:
                status = end.code
        reader.join()
        return status, parts[0].decode(encoding).replace("\r\n", "\n"), capsys.readouterr().err

    return run


@pytest.fixture
def shown(script):
    """shown("gpt.pt", "to be") is the lines of output of a run that must succeed."""

    def run(*args, **how):
        status, out, err = script(*args, **how)
        assert (status, err) == (0, "") and out.endswith("\n")
        return out.splitlines()

    return run


# The weights.
def turned(x):
    """x (T, D) with its pairs of channels rotated, each by its own angle a place; float64."""
    y = np.zeros_like(x)
    for t, (row, turn) in enumerate(zip(x, y, strict=True)):
        for i in range(0, len(row), 2):
            angle = t * 10000.0 ** (-i / len(row))
            turn[i] = row[i] * math.cos(angle) - row[i + 1] * math.sin(angle)
            turn[i + 1] = row[i] * math.sin(angle) + row[i + 1] * math.cos(angle)
    return y


class Output:
    """A forward hook that keeps what a module returned for the first text, in float64."""

    def __call__(self, module, inputs, output):
        self.value = output[0].double().numpy()


@torch.no_grad()
def expected(model, ids):
    """The weights (H, T, T) of each layer, in loops and float64, from its queries and keys."""
    layers = [layer.f for layer in model.layers if isinstance(layer.f, gpt.Attention)]
    queries, keys = [Output() for _ in layers], [Output() for _ in layers]
    for f, query, key in zip(layers, queries, keys, strict=True):
        if f.query_key:
            f.query.register_forward_hook(query)
            f.key.register_forward_hook(key)
    model(ids[None])
    maps = []
    for f, query, key in zip(layers, queries, keys, strict=True):
        maps.append(np.zeros((f.n_head, len(ids), len(ids))))
        for head, weights in enumerate(maps[-1]):
            size = f.value.out_features // f.n_head
            if f.query_key:
                q = query.value[:, head * size :][:, :size]
                k = key.value[:, head * size :][:, :size]
                if f.rotary:
                    q, k = turned(q), turned(k)
            for t, row in enumerate(weights):
                for s in range(t + 1 if f.options["causal"] else len(ids)):
                    score = sum(q[t] * k[s]) if f.query_key else 0.0
                    row[s] = math.exp(score / (math.sqrt(size) if f.options["scale"] else 1))
                row /= sum(row)
    return maps


def seen(row):
    """How many characters a query with these weights sees."""
    return math.exp(-sum(weight * math.log(weight) for weight in row if weight > 0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ROTARY": False},
        {"POSITION": False},
        {"SCALE": False},
        {"CAUSAL": False},
        {"QUERY_KEY": False},
        {"FLASH": False},
        {"N_HEAD": 1},
        {"N_EMBD": 4},  # heads of two channels
        {"PROJECTION": False},
        {"RESIDUAL": False},
        {"PRE_NORM": False},
        {"NORM": False},
        {"MLP": False, "N_LAYER": 3},
        {"CAUSAL": False, "FLASH": False},
        {"CAUSAL": False, "QUERY_KEY": False},
        {"DROPOUT": 0.5, "BIAS": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 7])
def test_the_weights_are_those_of_the_models_own_q_and_k(changes, length, flags):
    flags(**changes)
    layers = gpt.N_LAYER
    model, ids = build(), torch.tensor([3, 1, 4, 1, 5, 9, 2])[:length]
    flags()  # a model keeps its own
    maps, loops = look.attention_weights(model, ids), expected(model, ids)
    assert len(maps) == len(loops) == layers
    for weights, want in zip(maps, loops, strict=True):
        assert weights.shape == want.shape and np.abs(weights.numpy() - want).max() < 1e-5
    if "QUERY_KEY" not in changes and length > 1:  # no head or layer stands for another
        rows = torch.stack(maps)[:, :, -1].flatten(0, 1)
        assert torch.pdist(rows).min() > 0.01


@pytest.mark.parametrize("changes", [{"ATTENTION": False}, {"N_LAYER": 0}], ids=str)
def test_without_attention_there_are_no_weights(changes, flags):
    flags(**changes)
    assert look.attention_weights(build(), torch.tensor([3, 1, 4])) == []


def test_the_model_and_the_module_are_left_as_they_were(flags):
    flags(DROPOUT=0.5)
    model, ids, attention = build(), torch.tensor([3, 1, 4, 1, 5]), gpt.attention
    logits, weights = model(ids[None]), look.attention_weights(model, ids)
    assert model(ids[None]).equal(logits) and gpt.attention is attention
    again = look.attention_weights(model.train(), ids)
    assert all(a.equal(b) for a, b in zip(weights, again, strict=True))
    with pytest.raises(IndexError):
        look.attention_weights(model, ids + 99)
    assert gpt.attention is attention


def twice_the_window(q, k, v, **options):
    """A reader's attention: every query sees itself and the one before, this one twice as much."""
    weights = torch.eye(v.size(2)) + 2 * torch.eye(v.size(2)).roll(-1, 1).tril(-1)
    return weights / weights.sum(1, keepdim=True) @ v


def test_an_edited_attention_is_read_off_as_it_is(flags, monkeypatch):
    flags()
    monkeypatch.setattr(gpt, "attention", twice_the_window)
    for weights in look.attention_weights(build(), torch.tensor([3, 1, 4, 1])):
        third = 1 / 3
        rows = [[1, 0, 0, 0], [2 * third, third, 0, 0], [0, 2 * third, third, 0]]
        want = torch.tensor([[*rows, [0, 0, 2 * third, third]]] * 2)
        assert weights.allclose(want)


@pytest.mark.parametrize("causal", [True, False])
def test_masked_is_told_from_a_weight_of_0(causal, flags):
    """Scores of thousands leave most weights exactly 0, masked or not."""
    flags(SCALE=False, CAUSAL=causal)
    model = build()
    for layer in model.layers:
        if isinstance(layer.f, gpt.Attention):
            layer.f.query.weight.data *= 1000
    recorder = look.record(model, torch.tensor([3, 1, 4, 1, 5]))
    want = torch.ones(2, 5, 5, dtype=torch.bool)
    if causal:
        want = want.tril()
    for weights, visible in zip(recorder.weights, recorder.visible, strict=True):
        assert visible.equal(want) and (weights[want] == 0).sum() > 5


def test_a_call_for_each_head_is_told(flags, monkeypatch):
    def forward(self, x):
        q, k, v = (part(x).chunk(2, -1) for part in (self.query, self.key, self.value))
        heads = [gpt.attention(q[n], k[n], v[n]) for n in range(2)]
        return self.projection(torch.cat(heads, -1))

    flags(ROTARY=False)
    monkeypatch.setattr(gpt.Attention, "forward", forward)
    with pytest.raises(gpt.BadInput, match="one call of attention.. for all heads"):
        look.record(build(), torch.arange(5))


def test_a_model_that_gpt_py_has_trained(text, capsys, shown):
    best, vocab, _ = gpt.main(**TINY | {"DROPOUT": 0.5, "N_LAYER": 1, "CHECKPOINT": "mine.pt"})
    capsys.readouterr()
    (maps,) = expected(best.eval(), gpt.encode("to be or", vocab))
    rows = parsed(shown("mine.pt", "to be or")[2:])
    assert [row[0] for row in rows] == ["1.1", "1.2"]
    for (_, _, sees, _), weights in zip(rows, maps, strict=True):
        assert float(sees) == pytest.approx(seen(weights[-1]), abs=0.00501)


# The rows.
def parsed(lines):
    """Rows of plain output below its two head lines: (name, distance, sees, bars) of each."""
    form = r"(?=.{31}\S+$) *(\d+\.\d+) +(\d+\.\d) +(\d+\.\d\d)  (\S+)"
    return [re.fullmatch(form, line).groups() for line in lines]


BUILT = """\
layer.head  distance     sees  what the last character, 'h', attends to
                               abcdefgh
       1.1       1.0     1.00  ▁▁▁▁▁▁█▁
       1.2       3.0     1.00  ▁▁▁▁█▁▁▁
       2.1       0.0     1.00  ▁▁▁▁▁▁▁█
       2.2       7.0     1.00  █▁▁▁▁▁▁▁
"""


@pytest.fixture
def built(saved):
    """In gpt.pt a model whose heads look just 1, 3, 0 and 7 back. It knows ?, newline, a to h."""
    vocab = "\n?abcdefgh"
    flags = dict(NORM=False, ROTARY=False, MLP=False, N_EMBD=16)
    model = saved(vocab, **flags)
    for weight in model.parameters():
        weight.data.zero_()
    model.wpe.weight.data = torch.eye(8, 16)  # position t is 1 in channel t, else 0
    for layer, distances in zip(model.layers, [(1, 3), (0, 7)], strict=True):
        query = layer.f.query.weight.data.view(2, 8, 16)  # two heads, eight channels
        key = layer.f.key.weight.data.view(2, 8, 16)
        for head, distance in enumerate(distances):
            query[head] = 1e3 * torch.eye(8, 16).roll(distance, 1)  # (t - distance, t)
            query[head, 8 - distance :] = 0
            key[head] = torch.eye(8, 16)
    run, _ = torch.load("gpt.pt").values()
    torch.save({"run": run, "weights": model.state_dict()}, "gpt.pt")


def test_heads_that_look_just_so_far_back(built, script):
    assert script("gpt.pt", "abcdefgh") == (0, BUILT, "")


def test_of_a_text_longer_than_the_context_the_end_is_used(built, script):
    for text, length in [("hhh\nabcdefgh", 12), ("☃abcdefgh", 9)]:
        cut = f"Shown are the last 8 of {length} characters, as many as the context has.\n"
        assert script("gpt.pt", text) == (0, cut + BUILT, "")


def test_a_new_line_is_a_space(built, script):
    for text in ("ab\ndefg\n", "\nbcdefgh"):
        spaced = BUILT.replace("abcdefgh", text.replace("\n", " "))
        spaced = spaced.replace("'h'", repr(text[-1]))
        assert script("gpt.pt", text) == (0, spaced, "")


def test_one_character_gets_it_all(built, shown):
    _, text, *rows = shown("gpt.pt", "c")
    assert text == 31 * " " + "c"
    assert [row[1:] for row in parsed(rows)] == [("0.0", "1.00", "█")] * 4


@pytest.mark.parametrize("t, distance, sees", [(8, "3.5", "8.00"), (2, "0.5", "2.00")])
def test_the_plain_average_of_the_past(t, distance, sees, saved, shown):
    """Mean distance (T - 1) / 2, and T characters are seen."""
    saved("abcdefgh", QUERY_KEY=False)
    rows = parsed(shown("gpt.pt", "abcdefgh"[:t])[2:])
    assert [row[1:] for row in rows] == [(distance, sees, "█" * t)] * 4


def test_distance_sees_and_bars_recomputed(saved, shown):
    """Of the default line, whose rows keep to 80 columns, for heads and layers past the tenth."""
    vocab = "".join(sorted(set(look.LINE)))
    model = saved(vocab, BLOCK_SIZE=64, N_HEAD=11, N_EMBD=44, N_LAYER=11)
    head, text, *rows = shown()
    assert head == HEAD.format("o") and text == 31 * " " + look.LINE
    assert all(len(row) == 31 + len(look.LINE) <= 80 for row in rows)
    maps = look.attention_weights(model, gpt.encode(look.LINE, vocab))
    last = [
        (f"{layer}.{head}", w[-1].tolist())
        for layer, heads in enumerate(maps, 1)
        for head, w in enumerate(heads, 1)
    ]
    for (name, distance, sees, bars), (want, weights) in zip(parsed(rows), last, strict=True):
        assert name == want
        mean = sum(weight * (len(weights) - 1 - s) for s, weight in enumerate(weights))
        assert float(distance) == pytest.approx(mean, abs=0.0501)
        assert float(sees) == pytest.approx(seen(weights), abs=0.00501)
        levels = ["▁▂▃▄▅▆▇█".index(bar) for bar in bars]
        for level, weight in zip(levels, weights, strict=True):
            assert level == pytest.approx(7 * weight / max(weights), abs=0.501)


def test_the_default_line_loses_what_the_model_does_not_know(saved, shown):
    saved("\n bdhisowz", BLOCK_SIZE=64)
    known = "".join(c for c in look.LINE if c in " bdhisow")
    assert shown()[1] == 31 * " " + known and known.endswith(" wido")


@pytest.mark.parametrize("changes", [{"ATTENTION": False}, {"N_LAYER": 0}], ids=str)
@pytest.mark.parametrize("args", [[], ["gpt.pt", "abc"]], ids=str)
def test_a_model_without_attention_has_nothing_to_show(changes, args, saved, shown):
    saved("abc", **changes)
    told = ["gpt.pt: no layer calls attention(), so there is nothing to see"]
    assert shown(*args) == told


# The output.
WRAPPED = """\
layer.head  distance     sees  what the last character, 'h', attends to
                               abc
       1.1       1.0     1.00  ▁▁▁
       1.2       3.0     1.00  ▁▁▁
       2.1       0.0     1.00  ▁▁▁
       2.2       7.0     1.00  █▁▁

                               def
       1.1       1.0     1.00  ▁▁▁
       1.2       3.0     1.00  ▁█▁
       2.1       0.0     1.00  ▁▁▁
       2.2       7.0     1.00  ▁▁▁

                               gh
       1.1       1.0     1.00  █▁
       1.2       3.0     1.00  ▁▁
       2.1       0.0     1.00  ▁█
       2.2       7.0     1.00  ▁▁
"""


def test_a_text_wider_than_the_terminal_is_shown_in_pieces(built, script):
    assert script("gpt.pt", "abcdefgh", COLUMNS="34") == (0, WRAPPED, "")
    for columns in ("39", "200"):
        assert script("gpt.pt", "abcdefgh", COLUMNS=columns) == (0, BUILT, "")


COLOUR = r"(.{31})((?:\033\[97;48;5;\d+m[^\033])+)\033\[0m"
posix = pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")


@posix
@pytest.mark.parametrize("off", [{}, {"NO_COLOR": ""}], ids=str)
def test_a_terminal_gets_the_text_shaded(off, saved, shown):
    model = saved("\nabcdefgh")
    for text in ("abcdefgh", "ab\ndefgh"):
        head, *rows = shown("gpt.pt", text, terminal=True, **off)
        plain = shown("gpt.pt", text)[2:]
        maps = look.attention_weights(model, gpt.encode(text, "\nabcdefgh"))
        last = torch.cat(maps)[:, -1].tolist()
        assert head == HEAD.format("h")
        for row, bars, weights in zip(rows, plain, last, strict=True):
            start, cells = re.fullmatch(COLOUR, row).groups()
            codes, seen = zip(*re.findall(r"48;5;(\d+)m(.)", cells), strict=True)
            assert start == bars[:31] and "".join(seen) == text.replace("\n", " ")
            for code, weight in zip(codes, weights, strict=True):
                level = SHADES.index(int(code))
                assert level == pytest.approx(5 * weight / max(weights), abs=0.501)
            assert "196" in codes


@posix
def test_shaded_pieces(saved, shown):
    """Each row of a piece starts and ends its colours, and all pieces together are the text."""
    saved("\nabcdefgh", BLOCK_SIZE=32)
    text = "abcdefgh" * 3
    _, *lines = shown("gpt.pt", text, terminal=True, COLUMNS="41")
    assert [len(lines), lines[4], lines[9]] == [14, "", ""]
    _, *whole = shown("gpt.pt", text, terminal=True)
    for n, row in enumerate(whole):
        parts = [re.fullmatch(COLOUR, lines[n + start]).groups() for start in (0, 5, 10)]
        assert len(whole) == 4 and [part[0] for part in parts] == 3 * [row[:31]]
        assert "".join(part[1] for part in parts) == re.fullmatch(COLOUR, row)[2]


@posix
@pytest.mark.parametrize("off", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_without_colour_gets_bars(off, built, script):
    assert script("gpt.pt", "abcdefgh", terminal=True, **off) == (0, BUILT, "")


def test_bars_in_ascii(built, script):
    assert script("gpt.pt", "abcdefgh", encoding="ascii") == (0, BUILT.translate(ASCII), "")


def test_what_an_encoding_lacks_is_one_question_mark_each(saved, shown):
    saved("abcü我")
    head, text, *rows = shown("gpt.pt", "a我ü", encoding="ascii")
    assert text == 31 * " " + "a??" and all(len(row) == 31 + 3 for row in rows)


def test_the_command_itself_from_another_folder(built):
    """Without what is installed, too: -S leaves out site-packages, where an editable install is."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    env["PYTHONPATH"] = str(Path(torch.__file__).parents[1])
    how = dict(capture_output=True, text=True, timeout=60, env=env)
    done = subprocess.run([sys.executable, "-S", LOOK, "gpt.pt", "abcdefgh"], **how)
    assert (done.returncode, done.stdout, done.stderr) == (0, BUILT.translate(ASCII), "")
    assert os.listdir() == ["gpt.pt"]


def test_import_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {flag: getattr(gpt, flag) for flag in gpt.FULL}
    runpy.run_path(LOOK, run_name="look")
    assert capsys.readouterr() == ("", "") and os.listdir() == []
    assert before == {flag: getattr(gpt, flag) for flag in gpt.FULL}


def test_a_model_that_was_trained_on_a_gpu(built, script, monkeypatch):
    """Its file holds tensors of a GPU, which torch.load can only open if it is told where to."""
    opened, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args: opened.append(args[1]) or load(*args))
    monkeypatch.setattr(gpt, "DEVICE", "cuda")
    assert script("gpt.pt", "abcdefgh") == (0, BUILT, "") and opened == ["cpu"]


# The page, in a real browser.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
CHROMIUM = CHROMIUM or shutil.which("google-chrome")


class Browser:
    """Chromium without a window. It reads commands of the DevTools protocol, JSON with a zero byte
    behind, from file descriptor 3 and answers on 4. Its events are kept as they come."""

    def __init__(self, folder):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        args = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        args += ["--disable-background-networking", f"--user-data-dir={folder}", "about:blank"]
        ends = {commands: 3, answers: 4, null: 2}
        actions = [(os.POSIX_SPAWN_DUP2, ours, theirs) for ours, theirs in ends.items()]
        self.process = os.posix_spawn(CHROMIUM, args, os.environ, file_actions=actions)
        for end in ends:
            os.close(end)
        self.numbers = itertools.count()
        self.received = b""
        self.events = []
        self.session = {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        answer = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": answer["sessionId"]}
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """The result of a command."""
        command = {"id": next(self.numbers), "method": method, "params": params} | self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self.receive()
            if message.get("id") == command["id"]:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def receive(self):
        """The next message."""
        while b"\0" not in self.received:
            assert select.select([self.answers], [], [], 60)[0], "the browser does not answer"
            part = os.read(self.answers, 65536)
            assert part, "the browser has ended"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, path):
        """Load a file, with the mouse in a corner."""
        self.events = []
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def value(self, expression):
        """What an expression in JavaScript gives."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def middle(self, selector):
        """The middle of an element, scrolled into view, as x and y."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView()")
        box = self.value(f"{element}.getBoundingClientRect().toJSON()")
        return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}

    def hover(self, selector):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **self.middle(selector))

    def click(self, selector):
        for kind in ("mousePressed", "mouseReleased"):
            how = dict(type=kind, button="left", clickCount=1)
            self.send("Input.dispatchMouseEvent", **how, **self.middle(selector))

    def tap(self, selector):
        """Touch an element with a finger. The click that follows may come a little later."""
        self.send("Emulation.setTouchEmulationEnabled", enabled=True)
        finger = self.middle(selector)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[finger])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.send("Emulation.setTouchEmulationEnabled", enabled=False)
        time.sleep(0.2)

    def press(self, key, modifiers=0):
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, modifiers=modifiers)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=modifiers)

    def set_scheme(self, scheme):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def set_size(self, width, height):
        how = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setDeviceMetricsOverride", **how)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    os.kill(browser.process, signal.SIGTERM)
    os.waitpid(browser.process, 0)


@pytest.fixture
def browser(chromium):
    """The browser, light and wide. No page may ask for another file, or have an error."""
    chromium.set_scheme("light")
    chromium.set_size(1200, 900)
    yield chromium
    for event in chromium.events:
        assert event["method"] not in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening")
        if event["method"] == "Network.requestWillBeSent":
            assert event["params"]["request"]["url"].endswith("/heads.html")


@pytest.fixture
def opened(browser, script):
    """opened("a text") opens the page of gpt.pt with a text."""

    def open_page(*text):
        status, out, err = script("gpt.pt", *text, "--page=heads.html")
        assert (status, err) == (0, "") and out.endswith("heads.html; open it in a browser.\n")
        browser.open("heads.html")
        return browser

    return open_page


def styles(browser, selector, style):
    """The computed style of every character of a text on the page."""
    spans = f"[...document.querySelectorAll({json.dumps(selector + ' [data-place]')})]"
    return browser.value(f"{spans}.map((span) => getComputedStyle(span).{style})")


def numbers(colour):
    """Red, green and blue from 0 to 1, and alpha, of a computed colour."""
    parts = [float(number) for number in re.findall(r"[\d.]+(?:e-?\d+)?", colour)]
    if colour.startswith("rgb"):
        parts[:3] = [part / 255 for part in parts[:3]]
    return parts if len(parts) == 4 else [*parts, 1.0]


def queries(browser):
    """The places that are marked as the query, in any text."""
    marked = "[...document.querySelectorAll('.query')]"
    return set(browser.value(f"{marked}.map((span) => Number(span.dataset.place))"))


def check_shades(browser, maps, query):
    """Whether every head's text, and the large one's, is shaded by the weights of a query."""
    assert queries(browser) == {query}
    blue = numbers("rgb(106, 165, 255)")[:3]
    for layer, heads in enumerate(maps, 1):
        for head, weights in enumerate(heads, 1):
            text = f"section:nth-of-type({layer}) button:nth-of-type({head}) .text"
            colours = styles(browser, f"#layers {text}", "backgroundColor")
            assert len(colours) == len(weights)
            for s, colour in enumerate(colours):
                *rgb, alpha = numbers(colour)
                if weights[query, s] > 0.0001:
                    assert rgb == pytest.approx(blue, abs=0.01)
                if s <= query:
                    share = weights[query, s] / weights[query].max()
                    assert alpha == pytest.approx(math.sqrt(share), abs=0.01)
                else:
                    assert rgb == pytest.approx(numbers("rgb(228, 228, 233)")[:3], abs=0.001)
    chosen = styles(browser, "[aria-pressed=true] .text", "backgroundColor")
    assert styles(browser, "#text", "backgroundColor") == chosen


def test_hover_click_and_touch_shade_every_head(saved, opened):
    model = saved("\nabcdefgh")
    browser = opened("abcd\nfgh")
    maps = expected(model, gpt.encode("abcd\nfgh", "\nabcdefgh"))
    check_shades(browser, maps, 7)  # the last, as in the terminal
    browser.hover("#text [data-place='2']")
    check_shades(browser, maps, 2)
    browser.hover("#text [data-place='5']")
    check_shades(browser, maps, 5)
    browser.hover("h1")
    check_shades(browser, maps, 7)
    browser.click("#text [data-place='3']")
    browser.hover("#text [data-place='0']")
    check_shades(browser, maps, 0)
    browser.hover("h1")
    check_shades(browser, maps, 3)
    browser.tap("#text [data-place='6']")
    check_shades(browser, maps, 6)


def test_arrow_keys(saved, opened):
    """a b c d↵
    e f↵
    g h: from h up to f, and so on."""
    saved("\nabcdefgh", BLOCK_SIZE=16)
    browser = opened("abcd\nef\ngh")
    keys = "Left Left Right Up Up Up Left Down Right Right Down Down Down Right".split()
    places = [8, 7, 8, 5, 0, 0, 0, 5, 6, 7, 9, 9, 9, 9]
    browser.press("ArrowLeft", modifiers=1)  # Alt: the page before
    assert queries(browser) == {9}
    for key, place in zip(keys, places, strict=True):
        browser.press(f"Arrow{key}")
        assert queries(browser) == {place}


def test_a_head_can_be_chosen_and_each_says_what_it_sees(saved, opened):
    model = saved("\nabcdefgh")
    browser = opened("abcd\nfgh")
    maps = np.concatenate(expected(model, gpt.encode("abcd\nfgh", "\nabcdefgh")))
    means = [np.mean([seen(row) for row in weights]) for weights in maps]
    shown = browser.value("[...document.querySelectorAll('.name span')].map((x) => x.textContent)")
    assert [float(words.split()[1]) for words in shown] == pytest.approx(means, abs=0.056)
    for layer, head in [(1, 1), (2, 1), (1, 2), (2, 2)]:
        browser.click(f"section:nth-of-type({layer}) button:nth-of-type({head})")
        weights = maps[2 * layer + head - 3]
        title = browser.value("document.querySelector('#name').textContent")
        assert title.startswith(f"Layer {layer}, head {head}, sees ")
        said = browser.value("document.querySelector('output').textContent")
        name, sees, first, percent = re.match(
            r"“(.)”.*sees ([\d.]+): (.+?)\xa0(\d+)%", said
        ).groups()
        best = "abcd\nfgh"[weights[7].argmax()].replace("\n", "new line")
        assert name == "h" and first.strip("“”") == best
        assert float(sees) == pytest.approx(seen(weights[7]), abs=0.056)
        assert float(percent) == pytest.approx(100 * weights[7].max(), abs=0.51)
        chosen = styles(browser, "[aria-pressed=true] .text", "backgroundColor")
        assert styles(browser, "#text", "backgroundColor") == chosen
        assert browser.value("document.querySelectorAll('[aria-pressed=true]').length") == 1


def pixel(browser, x, y):
    """The colour of the weight of query y and key x in the large square."""
    pen = "document.querySelector('#large canvas').getContext('2d')"
    data = browser.value(
        f"Array.from({pen}.getImageData(cell * {x} + 1, cell * {y} + 1, 1, 1).data)"
    )
    return [number / 255 for number in data]


def luminance(rgb):
    """As WCAG 2 defines it, of red, green and blue from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """The ratio of two colours' luminances, from 1 to 21."""
    low, high = sorted([luminance(one[:3]), luminance(other[:3])])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(scheme, built, opened):
    browser = opened("abcdefgh")
    browser.set_scheme(scheme)
    browser.click("#text [data-place='4']")  # head 1.1 looks at 3
    body = "getComputedStyle(document.body)"
    ink, paper = (numbers(browser.value(f"{body}.{x}")) for x in ("color", "backgroundColor"))
    assert (luminance(paper) < 0.1) == (scheme == "dark") and contrast(ink, paper) > 10
    quiet = numbers(browser.value("getComputedStyle(document.querySelector('p')).color"))
    assert contrast(quiet, paper) > 4.5
    letters = [numbers(colour) for colour in styles(browser, "#text", "color")]
    behind = [numbers(colour) for colour in styles(browser, "#text", "backgroundColor")]
    assert [alpha for *_, alpha in behind] == [0, 0, 0, 1, 0, 1, 1, 1]
    assert contrast(letters[3], behind[3]) > 4.5 and contrast(letters[7], behind[7]) > 4.5
    most, masked, nothing = pixel(browser, 3, 4), pixel(browser, 5, 4), pixel(browser, 0, 4)
    assert most == pytest.approx(behind[3], abs=0.01) and nothing[3] == 0
    assert masked == pytest.approx(behind[7], abs=0.01)
    assert contrast(masked, paper) > 1.2


@pytest.mark.parametrize("width", [320, 600])
def test_a_narrow_screen_is_not_scrolled_sideways(width, saved, opened):
    saved("\nab", BLOCK_SIZE=128, N_HEAD=4)
    browser = opened("ab" * 60 + "\n\nab")
    browser.set_size(width, 600)
    assert browser.value("document.documentElement.scrollWidth") <= width


HOSTILE = "</script><!--<b>&amp;\"'`${1}\\ {{data}}\n\t\0\u2028é👩‍👧我" + "😀"


def test_a_hostile_text_and_name_are_only_text(saved, opened):
    name = "NOTE='<img src=x onerror=alert(1)>&lt;'"
    saved("".join(sorted(set(HOSTILE))), BLOCK_SIZE=64, name=name)
    browser = opened(HOSTILE)
    spans = "Array.from(document.querySelectorAll('#text span'))"
    assert "".join(browser.value(f"{spans}.map((x) => x.textContent)")) == HOSTILE.replace(
        "\n", "↵"
    )
    assert browser.value("document.getElementById('title').textContent").startswith(
        f"gpt.pt: {name}, 1,000 steps"
    )
    assert browser.value("document.querySelectorAll('img, b b, #text b').length") == 0
    assert queries(browser) == {len(HOSTILE) - 1}
    assert min(float(width[:-2]) for width in styles(browser, "#text", "width")) > 5


def test_a_page_without_a_mask_and_of_a_plain_average(saved, opened):
    saved("abc", CAUSAL=False, QUERY_KEY=False)
    browser = opened("abcab")
    shades = styles(browser, "#text", "backgroundColor")
    assert [numbers(shade)[3] for shade in shades] == [1] * 5
    assert browser.value("document.getElementById('masked').hidden")
    assert "sees 5.0" in browser.value("document.getElementById('name').textContent")


def test_the_page_says_that_a_text_was_cut(built, opened):
    browser = opened("ghabcdefgh")
    title = browser.value("document.getElementById('title').textContent")
    assert title.endswith("the last 8 of 10 characters, as many as the context has")
    assert browser.value("document.getElementById('text').textContent") == "abcdefgh"


# The picture.
@pytest.fixture
def drawn(script, monkeypatch):
    """drawn("abc") draws gpt.pt's picture of a text; returns its pixels (y, x, 4), its figure."""
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib import figure, image

    figures, savefig = [], figure.Figure.savefig

    def keep(self, *args, **options):
        figures.append(self)
        savefig(self, *args, **options)

    def draw(text):
        monkeypatch.setattr(figure.Figure, "savefig", keep)
        before = dict(matplotlib.rcParams)
        done = script("gpt.pt", text, "--picture=heads.png")
        assert done == (0, "The picture is in heads.png.\n", "")
        assert before == dict(matplotlib.rcParams)
        return image.imread("heads.png"), figures[-1]

    return draw


def test_the_picture_has_a_row_for_each_query(saved, drawn):
    model = saved("\nabcdefgh", N_LAYER=3)
    pixels, figure = drawn("abc\nfgh")
    maps = np.concatenate(expected(model, gpt.encode("abc\nfgh", "\nabcdefgh")))
    squares = [axis for axis in figure.axes if axis.images]
    assert len(squares) == len(maps) == 6
    for n, (axis, weights) in enumerate(zip(squares, maps, strict=True)):
        shown = axis.images[0].get_array()
        assert np.array_equal(np.ma.getmaskarray(shown), np.triu(np.ones((7, 7), bool), 1))
        assert np.abs(shown.filled(0) - weights).max() < 1e-5
        mean = np.mean([seen(row) for row in weights])
        layer, head, sees = re.findall(r"[\d.]+", axis.get_title())
        assert (int(layer), int(head)) == (n // 2 + 1, n % 2 + 1)
        assert float(sees) == pytest.approx(mean, abs=0.0501)
        for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
            assert "".join(tick.get_text() for tick in ticks) == "abc↵fgh"
            # the first is at the first row or column, from the top or the left
        assert list(axis.get_xticks()) == [1, 2, 3, 4, 5, 6, 7]
        assert axis.get_xlim() == (0.5, 7.5) and axis.get_ylim() == (7.5, 0.5)
    assert "query" in figure.get_supylabel() and "key" in figure.get_supxlabel()


def test_the_picture_on_white_and_on_black(built, drawn):
    """Each pixel is transparent, half grey (masked), a colour of viridis, or grey."""
    pixels, figure = drawn("abcdefgh")
    height, width, _ = pixels.shape
    assert pixels[0, 0, 3] == 0
    grey = (np.ptp(pixels[..., :3], 2) < 0.02) & (pixels[..., 3] > 0.99)
    assert grey.sum() > 1000 and np.abs(pixels[grey][:, :3] - 0.5).max() < 0.05
    letters = pixels[grey].mean(0)
    assert contrast(letters, (0, 0, 0)) > 3 and contrast(letters, (1, 1, 1)) > 3
    viridis = pytest.importorskip("matplotlib").colormaps["viridis"]
    for axis, distance in zip(figure.axes, [1, 3, 0, 7], strict=False):
        box = axis.get_position()
        for t, s in itertools.product(range(8), range(8)):
            y = height * (1 - box.y1 + box.height * (t + 0.5) / 8)
            x = width * (box.x0 + box.width * (s + 0.5) / 8)
            weight = float(s == t - distance)
            if t < distance:
                weight = 1 / (t + 1)  # a query of 0 looks at all alike
            colour = (0.5, 0.5, 0.5, 0.5)
            if s <= t:
                colour = viridis(math.sqrt(weight))
            assert np.abs(pixels[int(y), int(x)] - colour).max() < 0.02
    for behind in (0, 1):  # masked is seen on white and on black, and is not the colour of 0
        masked = [0.25 + 0.5 * behind] * 3
        assert contrast(masked, [behind] * 3) > 1.5
        assert np.abs(np.subtract(masked, viridis(0.0)[:3])).max() > 0.2


def test_a_picture_of_characters_that_no_font_has(saved, drawn):
    text = "$😀$\n\\_^{"
    saved("".join(sorted(set(text))), BLOCK_SIZE=32, N_HEAD=1, N_LAYER=1)
    _, figure = drawn(text)
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert labels == list(text.replace("\n", "↵"))


def test_a_longer_text_is_numbered_from_1(saved, drawn):
    saved("ab", BLOCK_SIZE=64, N_HEAD=1, N_LAYER=1)
    _, figure = drawn("ab" * 15)
    axis = figure.axes[0]
    assert axis.get_xlim() == (0.5, 30.5) and axis.get_ylim() == (30.5, 0.5)
    assert {"10", "20", "30"} <= {tick.get_text() for tick in axis.get_xticklabels()}


# Bad input.
@pytest.mark.parametrize(
    "args, words",
    [
        (["none.pt"], ["'none.pt' holds no model", "FileNotFoundError", "python gpt.py"]),
        (["JULIET:"], ["'JULIET:' holds no model", "python gpt.py"]),
        (["", "abc"], ["'' holds no model", "python gpt.py"]),
        (["folder.pt"], ["'folder.pt' holds no model", "python gpt.py"]),
        (["weights.pt"], ["'weights.pt' holds no model", "python gpt.py"]),
        (["layers.pt"], ["'layers.pt' holds no model", "python gpt.py"]),
        (["gpt.pt", ""], ["PROMPT is empty", "give"]),
        (["gpt.pt", "abxyb"], ["PROMPT='abxyb'", "['x', 'y']", "leave them out"]),
        (["gpt.pt", "ab☃\n"], ["'ab☃\\n'", "['☃']", "leave them out"]),
        (["gpt.pt", 9 * "abcde" + "x"], ["abcdex'", "['x']", "leave them out"]),
        (["xyz.pt"], ["PROMPT", "xyz.pt", "give a text", "'XYZ'"]),
        (["gpt.pt", "abc", "abc"], ["unrecognized arguments: abc"]),
        (["--steps=3"], ["unrecognized arguments: --steps=3"]),
        (["--page=gpt.pt"], ["--page='gpt.pt'", ".html"]),
        (["--picture=heads.jpg"], ["--picture='heads.jpg'", ".png"]),
        (["gpt.pt", "abc", "--page=no/heads.html"], ["no/heads.html", "No such file"]),
        (["gpt.pt", "abc", "--picture=no/heads.png"], ["no/heads.png", "No such file"]),
        (["nan.pt", "abc"], ["nan.pt", "no numbers"]),
    ],
    ids=ascii,
)
def test_bad_input_gets_one_line(args, words, saved, flags, script):
    saved("XYZ")
    os.rename("gpt.pt", "xyz.pt")
    model = saved("\nabcdefghosw")
    Path("folder.pt").mkdir()
    torch.save(model.state_dict(), "weights.pt")
    flags(N_LAYER=3)
    save(model, "\nabcdefghosw", "layers.pt")
    flags()
    model.wte.weight.data[:] = torch.nan
    save(model, "\nabcdefghosw", "nan.pt")
    before = sorted(os.listdir())
    status, out, err = script(*args)
    assert (status, out) == (2, "") and sorted(os.listdir()) == before
    assert err.startswith("look.py: error: ") and err.endswith("\n") and err.count("\n") == 1
    assert all(word in err for word in words)


def test_a_picture_without_matplotlib(built, script, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = script("gpt.pt", "abc", "--picture=heads.png")
    assert (status, out, err.count("\n")) == (2, "", 1) and "pip install matplotlib" in err


def test_help_is_the_docstring(script):
    status, out, err = script("--help")
    assert (status, err) == (0, "") and out.startswith(look.__doc__.strip())
