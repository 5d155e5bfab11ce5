"""tests/deletions.py: the sweep, the ladder and their pictures."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import deletions
import pytest
from conftest import SCRIPT, TINY, words

import gpt

SMALL = TINY | {"N_HEAD": 4, "N_LAYER": 3, "DEVICE": "cpu"}
del SMALL["SAMPLE"]
ARGS = [f"--{flag.lower()}={value}" for flag, value in SMALL.items()]
SIZES = "N_EMBD=8 BLOCK_SIZE=8 BATCH_SIZE=4"
FOUR = [{}, {"N_HEAD": 1}, {"POSITION": False}, {"ROTARY": False}]


def lines():
    """The records of runs.jsonl."""
    path = Path("runs.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def recorded():
    """What the runs in runs.jsonl differ in from the full model but for SIZES, their seeds and
    steps."""
    runs = [(run["name"].replace(SIZES, ""), run["seed"], run["steps"]) for run in lines()]
    return [(name.strip() or "full", seed, steps) for name, seed, steps in runs]


def rows(out):
    """The rows of the one table at the end of the output: names, without SIZES, to losses."""
    before, table = re.split(r"\n +loss    cost  spread  seeds  name\n", out)
    table = re.sub(r"\n {33}", " ", table)
    found = re.findall(r"^ *([\d.]+).{24}(.+)$", table, re.MULTILINE)
    return {row[1].replace(SIZES, "").strip() or "full": float(row[0]) for row in found}


# The sweep.
def test_the_cuts_are_the_full_model_and_every_other_setting():
    first, *cuts = deletions.CUTS
    switches = {flag: [not on] for flag, on in gpt.FULL.items() if type(on) is bool}
    del switches["BFLOAT16"]
    switches |= {"N_HEAD": [1], "N_LAYER": [1, 0], "OPTIMIZER": ["sgd"]}
    want = [{flag: value} for flag, values in switches.items() for value in values]
    assert first == {} and len(cuts) == 21
    assert sorted(cuts, key=str) == sorted(want, key=str)


def test_a_sweep_runs_each_once_and_shows_one_table(text, capsys, monkeypatch):
    monkeypatch.setattr(deletions, "CUTS", FOUR)
    gpt.main(**SMALL, POSITION=False, SEED=2)  # one is there before
    os.remove("gpt.pt")
    capsys.readouterr()
    deletions.main([*ARGS, "--seeds=2"])
    out = capsys.readouterr().out
    names = ["full", "N_HEAD=1", "POSITION=False", "ROTARY=False"]
    first = ("POSITION=False", 2, 2)
    plan = [(name, seed, 2) for seed in (1, 2) for name in names]
    assert recorded() == [first, *(run for run in plan if run != first)]
    begun = [row.split("; now ")[0] for row in out.splitlines()[:7]]
    assert begun == [f"{7 - n} of 8 runs left, about 0 minutes" for n in range(7)]
    losses = {name: [] for name in names}
    for (name, _, _), run in zip(recorded(), lines(), strict=True):
        losses[name].append(run["val_loss"] / 2)
    assert rows(out) == pytest.approx({name: sum(losses[name]) for name in names}, abs=0.00051)
    assert sorted(os.listdir()) == ["input.txt", "runs.jsonl"]
    deletions.main([*ARGS, "--seeds=2"])
    again = capsys.readouterr().out
    assert len(lines()) == 8 and again == out[out.index("\n\n") + 1 :]
    deletions.main([*ARGS, "--seed=3"])
    assert len(lines()) == 12 and all(seed == 3 for _, seed, _ in recorded()[8:])


@pytest.mark.parametrize(
    "other", [{"steps": 7}, {"seed": 7}, {"data": "7"}, {"code": "7"}, {"name": "7"}], ids=str
)
def test_a_run_of_anything_else_does_not_count(other, text):
    deletions.sweep([{}], 1, SMALL)
    (run,) = lines()
    Path("runs.jsonl").write_text(json.dumps(run | other) + "\n")
    assert deletions.sweep([{}], 1, SMALL).keys() == {(SIZES, 1)}
    like = lines()[1] | {key: run[key] for key in ("seconds", "started")}
    assert len(lines()) == 2 and like == run
    deletions.sweep([{}], 1, SMALL)
    assert len(lines()) == 2


def test_another_text_and_other_steps_are_run_anew(text, capsys):
    for n, change in enumerate([{}, {"STEPS": 3}, {"DATA": "other.txt"}, {"N_EMBD": 16}], 1):
        Path("other.txt").write_text(words(seed=1))
        assert len(deletions.sweep([{}], 1, SMALL | change)) == 1
        assert len(lines()) == n
    assert capsys.readouterr().out.count("1 of 1 runs left; now N_EMBD") == 4


def test_a_cut_that_the_flags_given_make_already_is_run_once(text):
    deletions.sweep([*FOUR, {"NORM": False}], 1, SMALL | {"NORM": False})
    names = [name.replace("NORM=False", "-") for name, *_ in recorded()]
    assert names == ["-", "N_HEAD=1 -", "POSITION=False -", "ROTARY=False -"]


def test_the_minutes_that_are_left(text, capsys):
    gpt.main(**SMALL)
    run = lines()[0] | {"seconds": 600}
    Path("runs.jsonl").write_text(json.dumps(run) + "\n")
    capsys.readouterr()
    deletions.sweep(FOUR, 1, SMALL)
    out = capsys.readouterr().out
    assert re.findall(r"(\d) of 4 runs left, about (\d+) min", out) == [
        ("3", "30"),
        ("2", "10"),
        ("1", "3"),
    ]


def test_what_was_killed_goes_on_and_repeats_no_finished_run(text, monkeypatch):
    """Even if the last line was half written. A kill is an exception that nothing catches."""
    train, left = gpt.train, [1, 2, 3]

    def killed(*args):
        left.pop()  # the fourth run raises IndexError
        return train(*args)

    monkeypatch.setattr(gpt, "train", killed)
    with pytest.raises(IndexError):
        deletions.sweep(deletions.CUTS, 1, SMALL)
    monkeypatch.setattr(gpt, "train", train)
    assert len(lines()) == 3
    whole = Path("runs.jsonl").read_text().splitlines()
    Path("runs.jsonl").write_text("\n".join([*whole[:2], whole[2][:99], "{}"]) + "\n")
    done = deletions.sweep(deletions.CUTS, 1, SMALL)
    new = Path("runs.jsonl").read_text().splitlines()[4:]
    assert [json.loads(line)["name"] for line in [*whole[:2], *new]] == [name for name, _ in done]
    assert len(done) == len(deletions.CUTS) == 2 + len(new)


def test_ctrl_c_in_a_run_ends_the_sweep_with_the_table(text, monkeypatch, capsys):
    """The run that was stopped is recorded, of fewer steps, and is done anew the next time."""
    evaluate, calls = gpt.evaluate, itertools.count(1)

    def interrupted(*args):
        if next(calls) == 13:  # the third of ten in the second run
            signal.raise_signal(signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(gpt, "evaluate", interrupted)
    deletions.main([*ARGS, "--steps=20"])
    out = capsys.readouterr().out
    second = deletions.name(deletions.CUTS[1])
    assert recorded() == [("full", 1, 20), (second, 1, 6)] and list(rows(out)) == ["full"]
    deletions.sweep(deletions.CUTS[:2], 1, SMALL | {"STEPS": 20})
    assert recorded()[2:] == [(second, 1, 20)]


def test_ctrl_c_before_anything_is_finished_shows_no_table(text, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "GPT", lambda _: signal.raise_signal(signal.SIGINT))
    deletions.main(ARGS)
    assert capsys.readouterr() == ("22 of 22 runs left; now " + SIZES + "\n", "")


def test_the_command_itself_and_ctrl_c(text):
    command = [sys.executable, str(SCRIPT.with_name("tests") / "deletions.py"), *ARGS]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    sweep = subprocess.Popen([*command, "--steps=100"], **how)
    while sweep.poll() is None and "now N_HEAD=1" not in sweep.stdout.readline():
        pass
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=60)
    assert (sweep.returncode, err) == (0, "") and 1 <= len(lines()) < 22
    assert "full" in rows(out)


@pytest.mark.parametrize(
    "args, word",
    [
        (["--seeds=0"], "--seeds"),
        (["--steps=0"], "--steps"),
        (["--steps=-1"], "STEPS"),
        (["--wat"], "--wat"),
        (["--checkpoint=x.pt"], "--checkpoint"),  # a sweep keeps no model
        (["--n-embd=9"], "N_EMBD"),
        (["--data=no.txt"], "no.txt"),
        (["--plot=x.png", "--steps=9"], "--plot"),
        (["--plot=x.png"], "runs.jsonl"),
        (["--ladder", "--plot=x.png"], "runs.jsonl"),
        (["--other-way", "--plot=x.png"], "runs.jsonl"),
        (["--other-way", "--ladder"], "--ladder"),
    ],
    ids=str,
)
def test_bad_input_gets_one_line(args, word, text, capsys):
    with pytest.raises(SystemExit) as end:
        deletions.main(args)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and os.listdir() == ["input.txt"] and out.count("\n") < 2
    assert re.fullmatch(r"(deletions|gpt)\.py: error: .+\n", err) and word in err


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit):
        deletions.main(["--help"])
    assert capsys.readouterr().out.startswith(deletions.__doc__.strip())


# The ladder.
def test_each_rung_adds_to_the_one_before_what_it_says():
    titles = list(deletions.LADDER)
    bigram, average, *rest = rungs = [gpt.FULL | off for off in deletions.LADDER.values()]
    assert bigram == gpt.FULL | {"N_LAYER": 0} and rungs[-1] == gpt.FULL
    off = "POSITION ROTARY NORM RESIDUAL MLP QUERY_KEY PROJECTION".split()
    assert average == gpt.FULL | dict.fromkeys(off, False) | {"N_LAYER": 1, "N_HEAD": 1}
    words = ["queries and keys, learned positions", "heads", "projection, feed-forward"]
    words += ["residual", "norm", "three blocks", "rotary"]
    added = [
        {"QUERY_KEY": True, "POSITION": True},
        {"N_HEAD": 4},
        {"PROJECTION": True, "MLP": True},
    ]
    added += [{"RESIDUAL": True}, {"NORM": True}, {"N_LAYER": 3}, {"ROTARY": True}]
    assert "bigram" in titles[0] and "average" in titles[1] and len(titles) == 9
    for title, word, before, after, flags in zip(
        titles[2:], words, rungs[1:], rest, added, strict=False
    ):
        assert word in title
        assert {flag: after[flag] for flag in gpt.FULL if after[flag] != before[flag]} == flags


def test_the_ladder_is_climbed_in_its_order(text, capsys):
    args = [*ARGS, "--ladder", "--steps=20", "--seeds=2"]
    deletions.main(args)
    *begun, blank, head = capsys.readouterr().out.splitlines()[:20]
    runs = lines()
    names = [deletions.name(gpt.FULL | SMALL | off) for off in deletions.LADDER.values()]
    assert [run["name"] for run in runs] == names * 2 and len({*names}) == 9 == names.index(
        SIZES
    ) + 1
    assert [run["seed"] for run in runs] == [1] * 9 + [2] * 9
    assert sorted(os.listdir()) == ["input.txt", "runs.jsonl"]
    assert [row.split("; now ")[1] for row in begun] == names * 2
    deletions.main(args)  # runs nothing, and shows the same table
    again, header, *table = capsys.readouterr().out.splitlines()
    assert (again, header, head.split()) == (blank, head, ["loss", "change"])
    losses = [(runs[n]["val_loss"] + runs[n + 9]["val_loss"]) / 2 for n in range(9)]
    for n, (row, title) in enumerate(zip(table, deletions.LADDER, strict=True)):
        change = f"{losses[n] - losses[n - 1]:+.3f}" if n else ""
        assert row == f"{losses[n]:8.3f}{change:>8}  {title}"
    pytest.importorskip("matplotlib")
    figure = deletions.main(["--ladder", "--plot=ladder.png"])
    ends = [text.get_text().partition(" ")[2] for text in figure.axes[0].texts]
    assert sorted(ends) == sorted(deletions.LADDER) and os.path.getsize("ladder.png") > 10_000


def test_a_rung_that_diverged(capsys):
    runs = {}
    for n, off in enumerate(deletions.LADDER.values()):
        runs[deletions.name(off), 1] = {"val_loss": None if n == 1 else 3 - n / 4}
    deletions.climb(runs, {})
    table = capsys.readouterr().out.splitlines()[2:]
    assert [row[:16].split() for row in table[:4]] == [
        ["3.000"],
        ["nan", "+nan"],
        ["2.500"],
        ["2.250", "-0.250"],
    ]


# The pictures.
def record(loss, steps=30, curve=None, seed=1, **flags):
    """A record of a run of three evaluations, or of the losses given."""
    curve = [loss + 1, loss + 0.5, loss] if curve is None else curve
    rows = [[steps * (n + 1) // len(curve), 5.0, value] for n, value in enumerate(curve)]
    flags = gpt.FULL | flags
    run = dict(name=deletions.name(flags), seed=seed, flags=flags, code="c", data="d", steps=steps)
    return run | dict(val_loss=loss, curve=rows, seconds=1.0)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """drawn(*records) is the axis of their picture: coloured curves and labels, grey curves, and a
    caption. It is in a file, too, and its labels lie in it, beside one another."""
    monkeypatch.chdir(tmp_path)
    extent = pytest.importorskip("matplotlib.text").Text.get_window_extent  # without its line

    def draw(*records, option=None):
        written = [line if type(line) is str else json.dumps(line) for line in records]
        Path("runs.jsonl").write_text("\n".join(written) + "\n")
        figure = deletions.main(["--plot=curves.png"] + ([option] if option else []))
        assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
        (axis,) = figure.axes
        figure.draw_without_rendering()
        boxes = [extent(text) for text in axis.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        for box in boxes:
            assert 0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert 0 <= box.y0 and box.y1 <= figure.bbox.y1
        return axis

    return draw


def labels(axis):
    """What is written at the ends of the coloured curves, and the curves' heights there."""
    ends = {text.get_color(): text for text in axis.texts}
    assert len(ends) == len(axis.texts)  # no two of a colour
    found = {}
    for line in axis.lines:
        if line.get_color() in ends:
            text = ends.pop(line.get_color())
            assert text.xy == (line.get_xdata()[-1], line.get_ydata()[-1])
            found[text.get_text()] = list(line.get_ydata())
    assert not ends
    return found


def test_the_full_model_and_six_deletions_have_colours_and_the_rest_is_grey(drawn):
    losses = [1.6 + 0.3 * (n % 7) / (1 + n) for n in range(len(deletions.CUTS))]
    axis = drawn(*(record(loss, **cut) for loss, cut in zip(losses, deletions.CUTS, strict=True)))
    names = {deletions.name(cut): loss for loss, cut in zip(losses, deletions.CUTS, strict=True)}
    del names["CAUSAL=False"]
    costly = sorted(names, key=names.get)[-6:]
    want = [f"{names[name]:.3f} {name}" for name in ["full", *costly]]
    assert sorted(labels(axis)) == sorted(want)
    grey = [line for line in axis.lines if line.get_color() == deletions.GREY]
    assert len(grey) == len(names) - 7 and all(line.get_alpha() < 1 for line in grey)
    caption = axis.get_title("left").replace("\n", " ")
    assert "Grey: 14 more." in caption and "CAUSAL=False" in caption and "1 seed," in caption


def test_a_curve_is_the_mean_of_its_seeds(drawn):
    runs = [record(1.5, seed=1), record(1.0, seed=2), record(1.7, seed=2), record(2.0, MLP=False)]
    axis = drawn(*runs)  # of a seed that was run twice the newest counts
    curves = labels(axis)
    assert curves["1.600 full"] == pytest.approx([2.6, 2.1, 1.6])
    assert curves["2.000 MLP=False"] == pytest.approx([3.0, 2.5, 2.0])
    assert "2 seeds" in axis.get_title("left")


@pytest.mark.parametrize("other", [{"data": "e"}, {"code": "e"}, {"steps": 60}], ids=str)
def test_the_runs_of_which_there_are_most_are_drawn(other, drawn):
    """Of as many, the newest."""
    old, new = record(1.6), record(1.7) | other
    most = [record(1.8, MLP=False, seed=seed) for seed in (1, 2)]
    both = ["1.600 full", "1.700 full", "1.800 MLP=False"]
    assert sorted(labels(drawn(old, new))) == both[1:2]
    assert sorted(labels(drawn(old, *most, new))) == [both[0], both[2]]
    assert sorted(labels(drawn(old, *(run | other for run in most), new))) == both[1:]


@pytest.mark.parametrize("line", ['{"name": "fu', "", "7", "[]", "{}", "\0"])
def test_a_line_that_is_no_record_is_skipped(line, drawn):
    assert list(labels(drawn(record(1.6), line))) == ["1.600 full"]


def test_another_width(drawn):
    small = dict(N_EMBD=32, BATCH_SIZE=4)
    axis = drawn(record(1.6), record(1.7, **small), record(1.9, NORM=False, **small))
    assert sorted(labels(axis)) == ["1.700 full", "1.900 NORM=False"]
    assert "N_EMBD=32 BATCH_SIZE=4." in axis.get_title("left")


def test_one_evaluation_is_a_point(drawn):
    axis = drawn(record(1.6, curve=[1.6], steps=1), record(1.6, curve=[1.6], steps=1, NORM=False))
    assert sorted(labels(axis)) == ["1.600 NORM=False", "1.600 full"]
    assert all(line.get_marker() == "." for line in axis.lines)


@pytest.mark.parametrize("curve", [[4.0, 99.0, None], [4.0, math.inf, 3.0]], ids=str)
def test_what_diverged_is_left_out_and_named(curve, drawn):
    wild = record(None, curve=curve, seed=2, OPTIMIZER="sgd")
    axis = drawn(record(1.6), record(1.7, OPTIMIZER="sgd"), wild)
    assert list(labels(axis)) == ["1.600 full"] and len(axis.lines) == 1
    assert "diverged: OPTIMIZER='sgd'." in axis.get_title("left")


def test_the_ladder_alone_and_the_deletions_without_its_rungs(drawn):
    rungs = list(deletions.LADDER.items())
    runs = [record(3 - n / 500, **off) for n, (_, off) in enumerate(rungs)]  # ends lie together
    runs += [record(1.9, MLP=False), record(2.1, MLP=False, RESIDUAL=False)]
    climbed = labels(drawn(*runs, option="--ladder"))
    assert sorted(climbed) == sorted(
        f"{3 - n / 500:.3f} {title}" for n, (title, _) in enumerate(rungs)
    )
    names = ["full", "MLP=False", "RESIDUAL=False MLP=False", "N_LAYER=0", "ROTARY=False"]
    assert sorted(label.split(" ", 1)[1] for label in labels(drawn(*runs))) == sorted(names)


def test_a_ladder_that_was_not_climbed_to_its_end(drawn):
    runs = [record(2.0, **off) for off in list(deletions.LADDER.values())[:3]]
    assert len(labels(drawn(*runs, option="--ladder"))) == 3


def test_the_other_way_in_one_picture_whatever_the_sizes(drawn):
    ways = {"full": {}, "twice the width": {"N_EMBD": 128}, "twice the layers": {"N_LAYER": 6}}
    ways |= {"twice the context": {"BLOCK_SIZE": 256}, "ReLU": {"GELU": False}}
    ways |= {"post-norm": {"PRE_NORM": False}}
    runs = [record(2 - n / 5, **flags) for n, flags in enumerate(ways.values())]
    runs += [record(1.5, MLP=False), record(1.2, N_EMBD=256), record(1.1, N_EMBD=128, GELU=False)]
    ends = labels(drawn(*runs, option="--other-way"))
    assert sorted(ends) == sorted(f"{2 - n / 5:.3f} {title}" for n, title in enumerate(ways))


def test_the_other_way_is_run_on_top_of_the_flags_given(text):
    Path("input.txt").write_text(words(4000))
    deletions.main([*ARGS, "--other-way", "--steps=2", "--n-layer=2"])
    cuts = [{}, {"N_EMBD": 128}, {"N_LAYER": 6}, {"BLOCK_SIZE": 256}]
    cuts += [{"GELU": False}, {"PRE_NORM": False}]
    flags = [SMALL | {"N_LAYER": 2, "STEPS": 2} | cut for cut in cuts]
    assert [run["name"] for run in lines()] == [deletions.name(gpt.FULL | each) for each in flags]


def test_colours_are_read_on_white_and_on_black():
    """Of contrast 3 or more, https://www.w3.org/TR/WCAG21/#non-text-contrast, and no two alike."""

    def luminance(colour):
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    black = luminance("#0d1117")
    cuts = [*deletions.COLOURS, deletions.BLUE, deletions.GREY]
    for colours in (cuts, deletions.RAINBOW):
        assert len(set(colours)) == len(colours)
        for colour in colours:
            assert 1.05 / (luminance(colour) + 0.05) >= 3
            assert (luminance(colour) + 0.05) / (black + 0.05) >= 3
    assert len(deletions.COLOURS) == 6 and len(deletions.RAINBOW) == 9


@pytest.mark.parametrize("path", ["no/folder.png", "curves.xyz"])
def test_a_picture_that_cannot_be_written(path, drawn, capsys):
    drawn(record(1.6))
    with pytest.raises(SystemExit) as end:
        deletions.main([f"--plot={path}"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(r"deletions.py: error: .+\n", err)


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as end:
        deletions.main(["--plot=curves.png"])
    assert end.value.code == 2 and "pip install" in capsys.readouterr().err
