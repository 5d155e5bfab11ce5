"""tests/look.py: the weights it reads off a model, its rows in a pipe and a terminal, bad input."""

import math
import os
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import look
import numpy as np
import pytest
import torch
from conftest import SCRIPT, TINY, build

import gpt

LOOK = str(SCRIPT.with_name("tests") / "look.py")
HEAD = "layer.head  distance  entropy  what the last character, {!r}, attends to"
ASCII = str.maketrans("▁█", "_#")
SHADES = [16, 52, 88, 124, 160, 196]  # black and the reds of 256 colours


def save(model, vocab, path="gpt.pt"):
    """Write what gpt.train writes."""
    torch.save((model.flags, vocab, model.state_dict()), path)


@pytest.fixture
def saved(flags, tmp_path, monkeypatch):
    """saved("abc", N_HEAD=1) leaves a model with random weights in gpt.pt, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def make(vocab, **changes):
        flags(**changes)
        save(build(len(vocab)), vocab)

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
    """script("gpt.pt", "to be") is python tests/look.py gpt.pt "to be" without a process of its
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


@torch.no_grad()
def expected(model, ids):
    """The weights (H, T, T) of each layer, in loops and float64, from what its c_attn gives."""
    seen, hooks, size, maps = [], [], gpt.N_EMBD // gpt.N_HEAD, []
    for layer in model.layers:
        if isinstance(layer.f, gpt.Attention):
            hook = layer.f.c_attn.register_forward_hook
            hooks.append(hook(lambda _, x, y: seen.append(y[0].double().numpy())))
    model(ids[None])
    for hook in hooks:
        hook.remove()
    for qkv in seen:  # (T, 3 C)
        maps.append(np.zeros((gpt.N_HEAD, len(ids), len(ids))))
        for head, weights in enumerate(maps[-1]):
            q, k = (qkv[:, i * gpt.N_EMBD + head * size :][:, :size] for i in (0, 1))
            if gpt.QUERY_KEY and gpt.POSITION and gpt.ROTARY:
                q, k = turned(q), turned(k)
            for t, row in enumerate(weights):
                for s in range(t + 1 if gpt.CAUSAL else len(ids)):
                    score = sum(q[t] * k[s]) if gpt.QUERY_KEY else 0.0
                    row[s] = math.exp(score / (math.sqrt(size) if gpt.SCALE else 1))
                row /= sum(row)
    return maps


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
    model, ids = build(), torch.tensor([3, 1, 4, 1, 5, 9, 2])[:length]
    maps, loops = look.attention_weights(model, ids), expected(model, ids)
    assert len(maps) == len(loops) == gpt.N_LAYER
    for weights, want in zip(maps, loops, strict=True):
        assert weights.shape == want.shape and np.abs(weights.numpy() - want).max() < 1e-5
    if gpt.QUERY_KEY and length > 1:  # the heads and layers differ, so none stands for another
        rows = torch.stack(maps)[:, :, -1].flatten(0, 1)
        assert torch.pdist(rows).min() > 0.01


def test_the_model_is_left_as_it_was_and_other_flags_do_not_matter(flags):
    flags(DROPOUT=0.5, N_HEAD=4)
    model, ids = build(), torch.tensor([3, 1, 4, 1, 5])
    logits, weights = model(ids[None]), look.attention_weights(model, ids)
    assert model(ids[None]).equal(logits)
    flags(N_HEAD=1, SCALE=False, CAUSAL=False)
    again = look.attention_weights(model.train(), ids)
    assert all(a.equal(b) for a, b in zip(weights, again, strict=True))


def test_a_file_of_gpt_py_gives_the_model_and_its_flags_back(text, flags, capsys):
    how = TINY | {"DEVICE": "cpu", "DROPOUT": 0.5, "N_HEAD": 4, "CHECKPOINT": "mine.pt"}
    best, _, _ = gpt.main(**how)
    capsys.readouterr()
    flags()
    model, vocab = look.load("mine.pt")
    assert capsys.readouterr() == ("", "") and not model.training
    assert vocab == "".join(sorted(set(text))) and (gpt.DROPOUT, gpt.N_HEAD) == (0.5, 4)
    weights = best.state_dict()
    assert all(weight.equal(weights[name]) for name, weight in model.state_dict().items())


# The rows.
def parsed(lines):
    """Rows of plain output below its two head lines: (name, distance, entropy, bars) of each."""
    form = r"(?=.{31}\S+$) *(\d+\.\d+) +(\d+\.\d) +(\d+\.\d\d)  (\S+)"
    return [re.fullmatch(form, line).groups() for line in lines]


BUILT = """\
layer.head  distance  entropy  what the last character, 'h', attends to
                               abcdefgh
       1.1       1.0     0.00  ▁▁▁▁▁▁█▁
       1.2       3.0     0.00  ▁▁▁▁█▁▁▁
       2.1       0.0     0.00  ▁▁▁▁▁▁▁█
       2.2       7.0     0.00  █▁▁▁▁▁▁▁
"""


@pytest.fixture
def built(saved):
    """In gpt.pt a model whose heads look just 1, 3, 0 and 7 back. It knows ?, newline, a to h."""
    saved("\n?abcdefgh", NORM=False, ROTARY=False, MLP=False, N_EMBD=16)
    model = build(10)
    for weight in model.parameters():
        weight.data.zero_()
    model.wpe.weight.data = torch.eye(8, 16)  # position t is 1 in channel t, else 0
    for layer, distances in zip(model.layers, [(1, 3), (0, 7)], strict=True):
        qkv = layer.f.c_attn.weight.data.view(
            3, 2, 8, 16
        )  # of q, k and v, two heads, eight channels
        for head, distance in enumerate(distances):
            qkv[0, head] = 1e3 * torch.eye(8, 16).roll(distance, 1)  # (t - distance, t)
            qkv[0, head, 8 - distance :] = 0
            qkv[1, head] = torch.eye(8, 16)
    save(model, "\n?abcdefgh")


def test_heads_that_look_just_so_far_back(built, script):
    assert script("gpt.pt", "abcdefgh") == (0, BUILT, "")


def test_of_a_text_longer_than_the_context_the_end_is_used(built, script):
    assert script("gpt.pt", "hhh\nabcdefgh") == (0, BUILT, "")
    assert script("gpt.pt", "☃abcdefgh") == (0, BUILT, "")


def test_a_new_line_is_a_space(built, script):
    for text in ("ab\ndefg\n", "\nbcdefgh"):
        spaced = BUILT.replace("abcdefgh", text.replace("\n", " "))
        spaced = spaced.replace("'h'", repr(text[-1]))
        assert script("gpt.pt", text) == (0, spaced, "")


def test_one_character_gets_it_all(built, shown):
    _, text, *rows = shown("gpt.pt", "c")
    assert text == 31 * " " + "c"
    assert [row[1:] for row in parsed(rows)] == [("0.0", "0.00", "█")] * 4


@pytest.mark.parametrize("t, distance, entropy", [(8, "3.5", "2.08"), (2, "0.5", "0.69")])
def test_the_plain_average_of_the_past(t, distance, entropy, saved, shown):
    """Mean distance (T - 1) / 2 and entropy ln T."""
    saved("abcdefgh", QUERY_KEY=False)
    rows = parsed(shown("gpt.pt", "abcdefgh"[:t])[2:])
    assert [row[1:] for row in rows] == [(distance, entropy, "█" * t)] * 4


def test_distance_entropy_and_bars_recomputed(saved, shown):
    """Of the default line, whose rows keep to 80 columns, for heads and layers past the tenth."""
    vocab = "".join(sorted(set(look.LINE)))
    saved(vocab, BLOCK_SIZE=64, N_HEAD=11, N_EMBD=44, N_LAYER=11)
    head, text, *rows = shown()
    assert head == HEAD.format("o") and text == 31 * " " + look.LINE
    assert all(len(row) == 31 + len(look.LINE) <= 80 for row in rows)
    maps = look.attention_weights(look.load("gpt.pt")[0], gpt.encode(look.LINE, vocab))
    last = [
        (f"{layer}.{head}", w[-1].tolist())
        for layer, heads in enumerate(maps, 1)
        for head, w in enumerate(heads, 1)
    ]
    for (name, distance, entropy, bars), (want, weights) in zip(parsed(rows), last, strict=True):
        assert name == want
        mean = sum(weight * (len(weights) - 1 - s) for s, weight in enumerate(weights))
        nats = -sum(weight * math.log(weight) for weight in weights if weight)
        assert float(distance) == pytest.approx(mean, abs=0.0501)
        assert float(entropy) == pytest.approx(nats, abs=0.00501)
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
    assert shown(*args) == ["gpt.pt: a model without attention, so there is nothing to see"]


# The output.
WRAPPED = """\
layer.head  distance  entropy  what the last character, 'h', attends to
                               abc
       1.1       1.0     0.00  ▁▁▁
       1.2       3.0     0.00  ▁▁▁
       2.1       0.0     0.00  ▁▁▁
       2.2       7.0     0.00  █▁▁

                               def
       1.1       1.0     0.00  ▁▁▁
       1.2       3.0     0.00  ▁█▁
       2.1       0.0     0.00  ▁▁▁
       2.2       7.0     0.00  ▁▁▁

                               gh
       1.1       1.0     0.00  █▁
       1.2       3.0     0.00  ▁▁
       2.1       0.0     0.00  ▁█
       2.2       7.0     0.00  ▁▁
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
    saved("\nabcdefgh")
    for text in ("abcdefgh", "ab\ndefgh"):
        head, *rows = shown("gpt.pt", text, terminal=True, **off)
        plain = shown("gpt.pt", text)[2:]
        maps = look.attention_weights(look.load("gpt.pt")[0], gpt.encode(text, "\nabcdefgh"))
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
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    how = dict(capture_output=True, text=True, timeout=60, env=env)
    done = subprocess.run([sys.executable, LOOK, "gpt.pt", "abcdefgh"], **how)
    assert (done.returncode, done.stdout, done.stderr) == (0, BUILT.translate(ASCII), "")
    assert os.listdir() == ["gpt.pt"]


def test_import_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {flag: getattr(gpt, flag) for flag in gpt.FULL}
    runpy.run_path(LOOK, run_name="look")
    assert capsys.readouterr() == ("", "") and os.listdir() == []
    assert before == {flag: getattr(gpt, flag) for flag in gpt.FULL}


def test_a_folder_that_cannot_be_written(built, script, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert script("gpt.pt", "abcdefgh") == (0, BUILT, "")


def test_a_model_that_was_trained_on_a_gpu(built, script, monkeypatch):
    """Its file holds tensors of a GPU, which torch.load can only open if it is told where to."""
    opened, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args: opened.append(args[1]) or load(*args))
    monkeypatch.setattr(gpt, "DEVICE", "cuda")
    assert script("gpt.pt", "abcdefgh") == (0, BUILT, "") and opened == ["cpu"]


# Bad input.
@pytest.mark.parametrize(
    "args, words",
    [
        (["none.pt"], ["'none.pt'", "no file", "python gpt.py"]),
        (["JULIET:"], ["'JULIET:'", "no file", "python gpt.py"]),
        (["", "abc"], ["''", "no file", "python gpt.py"]),
        (["folder"], ["folder: not a model", "python gpt.py"]),
        (["text.pt"], ["text.pt: not a model", "python gpt.py"]),
        (["half.pt"], ["half.pt: not a model", "python gpt.py"]),
        (["empty.pt"], ["empty.pt: not a model", "python gpt.py"]),
        (["weights.pt"], ["weights.pt: not a model", "python gpt.py"]),
        (["old.pt"], ["old.pt: not a model", "python gpt.py"]),
        (["layers.pt"], ["layers.pt: not a model", "python gpt.py"]),
        (["gpt.pt", ""], ["text is empty", "give"]),
        (["gpt.pt", "abxyb"], ["'abxyb'", "gpt.pt", "['x', 'y']", "leave them out"]),
        (["gpt.pt", "ab☃\n"], ["'ab☃\\n'", "['☃']", "leave them out"]),
        (["xyz.pt"], ["xyz.pt", "another alphabet", "give a text", "'XYZ'"]),
        (["gpt.pt", "abc", "abc"], ["unrecognized arguments: abc"]),
        (["--steps=3"], ["unrecognized arguments: --steps=3"]),
    ],
    ids=ascii,
)
def test_bad_input_gets_one_line(args, words, saved, flags, script):
    saved("XYZ")
    os.rename("gpt.pt", "xyz.pt")
    saved("\nabcdefgh")
    Path("folder").mkdir()
    Path("text.pt").write_text("to be or not to be\n" * 99)
    Path("half.pt").write_bytes(Path("gpt.pt").read_bytes()[:4000])
    Path("empty.pt").touch()
    torch.save(build().state_dict(), "weights.pt")
    torch.save({"flags": {}, "vocab": "abc", "weights": build().state_dict()}, "old.pt")
    model = build()
    model.flags = model.flags | {"N_LAYER": 3}
    save(model, "abcdefghijk", "layers.pt")
    before = sorted(os.listdir())
    status, out, err = script(*args)
    assert (status, out) == (2, "") and sorted(os.listdir()) == before
    assert err.startswith("look.py: error: ") and err.endswith("\n") and err.count("\n") == 1
    assert all(word in err for word in words)


def test_help_is_the_docstring(script):
    status, out, err = script("--help")
    assert (status, err) == (0, "") and out.startswith(look.__doc__.strip())
