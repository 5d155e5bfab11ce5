"""tests/lab/sweep.py: the sweep, its table, the ladder and the pictures."""

import itertools
import json
import math
import os
import re
import signal
import sys
import zlib
from pathlib import Path

import pytest
import sweep
import torch
from conftest import DELETIONS, TINY

import gpt

COUNT = len(sweep.deletions())  # 22, and more with flags of a reader's own


def record(loss, seed=1, curve=(), steps=2000, data="d", started=1.0, name="", **flags):
    """A record as gpt.py writes it. Its name is given only where flags do not tell it."""
    run = gpt.FULL | flags | dict(STEPS=steps, SEED=seed, DEVICE="cpu", SAMPLE=0)
    run |= dict(name=name or gpt.name_run(run), data=data, params=1234, vocab="x" * 65)
    run |= dict(started=started, curve=list(curve) or [[steps, 5.0, loss]], val_loss=loss)
    return run


def write(*records, path="runs.jsonl"):
    lines = [json.dumps(line) if type(line) is dict else line for line in records]
    Path(path).write_text("\n".join(lines) + "\n")


def lines():
    """The records in runs.jsonl."""
    return [json.loads(line) for line in Path("runs.jsonl").read_text().splitlines()]


def rows(out):
    """The table at the end of the output: the words of each row."""
    _, head, table = re.split(r"( +loss +(?:cost|change) +seeds  parameters  name\n)", out)
    return [re.split(" {2,}", row.strip()) for row in table.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(text, monkeypatch):
    """The flags that gpt.main was called with, in a list. Nothing is trained: a minute passes and a
    record is written. Where trained.stop is a number, so many runs later Ctrl-C is pressed. Where
    trained.bad(flags) holds, the loss is no number."""

    class Trained(list):
        stop = math.inf

        def bad(self, flags):
            return False

    calls = Trained()
    monkeypatch.setattr(sweep.time, "time", lambda: 60.0 * len(calls))

    def main(**flags):
        calls.append(flags)
        gpt.require(not calls.bad(flags), "the loss is no number at step 9; lower LEARNING_RATE")
        changes = {flag: flags[flag] for flag in gpt.FULL}
        data = f"{zlib.crc32(text.encode()):08x}"
        steps = flags["STEPS"] if len(calls) <= calls.stop else 7
        run = record(2.0, flags["SEED"], steps=steps, data=data, **changes)
        with open("runs.jsonl", "a") as file:
            file.write(json.dumps(run) + "\n")
        print("what gpt.py prints")
        return None, run["vocab"], run

    monkeypatch.setattr(gpt, "main", main)
    return calls


# Training.
def test_the_deletions_are_the_full_model_and_every_other_setting():
    changes = [flags for _, flags in sweep.deletions()]
    switches = {flag: [not on] for flag, on in gpt.FULL.items() if type(on) is bool}
    del switches["BFLOAT16"]
    switches |= {"N_HEAD": [1], "N_LAYER": [1, 0], "OPTIMIZER": ["sgd"]}
    want = [{flag: value} for flag, values in switches.items() for value in values]
    assert changes[0] == {} and sorted(changes[1:], key=str) == sorted(want, key=str)
    assert {"NORM": False} in changes and {"BIAS": True} in changes


def test_a_reader_s_own_flag_is_swept_and_drawn(trained, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(gpt.FULL, "RMSNORM", False)
    monkeypatch.setattr(gpt, "RMSNORM", False, raising=False)
    sweep.main([])
    assert ["2.000", "+0.000", "1", "1,234", "RMSNORM=True"] in rows(capsys.readouterr().out)
    sweep.main(["--table", "--names", "RMSNORM=True"])
    assert len(rows(capsys.readouterr().out)) == 1
    axis = sweep.main(["--bars", "bars.png"]).axes[0]
    assert "RMSNORM=True" in [label.get_text() for label in axis.get_yticklabels()]


def test_a_sweep_trains_each_with_each_seed_and_the_flags_given(trained, capsys):
    sweep.main(["--seeds=2", "--seed=5", "--steps=30", "--n-embd=32", "--bias"])
    want = []
    for seed in (5, 6):
        for _, changes in sweep.deletions():
            flags = gpt.FULL | {"N_EMBD": 32, "BIAS": True} | changes
            want.append((gpt.name_run(flags), seed))
    want = list(dict.fromkeys(want))  # BIAS=True is the base, and is trained once
    assert [(run["name"], run["SEED"]) for run in lines()] == want
    assert len(want) == 2 * (COUNT - 1)
    for flags in trained:
        assert (flags["STEPS"], flags["SAMPLE"], flags["N_EMBD"]) == (30, 0, 32)
        assert not Path(flags["CHECKPOINT"]).is_relative_to(Path.cwd())
    assert sorted(os.listdir()) == ["input.txt", "runs.jsonl"]
    out = capsys.readouterr().out
    table = rows(out)
    assert "what gpt.py prints" not in out and len(table) == COUNT - 1
    assert {row[1] for row in table} == {"+0.000 ± 0.000"}  # all have costs, whatever the width
    assert table[0][4] == "N_EMBD=32 BIAS=True"


def test_what_is_recorded_is_not_trained_again(trained, capsys):
    sweep.main(["--steps=30"])
    whole = Path("runs.jsonl").read_text().splitlines()
    Path("runs.jsonl").write_text("\n".join([*whole[:9], whole[9][:99], "{}", *whole[12:], ""]))
    del trained[:]
    capsys.readouterr()
    sweep.main(["--steps=30"])
    out = capsys.readouterr().out
    missing = [json.loads(line)["name"] for line in whole[9:12]]
    assert [gpt.name_run({flag: run[flag] for flag in gpt.FULL}) for run in trained] == missing
    told = [f"{2 - n} left, about {2 - n} minutes; done: {missing[n]}" for n in range(3)]
    assert out.splitlines()[:5] == [f"3 of {COUNT} runs left", *told, ""]
    sweep.main(["--steps=30"])
    again = capsys.readouterr().out
    assert len(trained) == 3 and again == out[out.index("\n\n") + 1 :]


@pytest.mark.parametrize("other", [{"STEPS": 7}, {"SEED": 7}, {"data": "7"}, {"name": "7"}])
def test_a_run_of_anything_else_does_not_count(other, trained, capsys):
    sweep.main(["--steps=30"])
    write(*[run | other for run in lines()])
    capsys.readouterr()
    sweep.main(["--steps=30"])
    out = capsys.readouterr().out
    assert len(trained) == 2 * COUNT
    assert {row[2] for row in rows(out)} == {"1"}


def test_a_run_that_ctrl_c_stopped_is_no_part_of_the_sweep(trained, capsys):
    trained.stop = 2
    sweep.main(["--steps=30"])
    out = capsys.readouterr().out
    assert [run["STEPS"] for run in lines()] == [30, 30, 7]
    left = COUNT - 2
    assert f"{left} left, about {left} minutes; done: ATTENTION=False" in out
    assert len(rows(out)) == 2
    trained.stop = math.inf
    sweep.main(["--steps=30"])
    assert lines()[3]["name"] == lines()[2]["name"] == "QUERY_KEY=False"
    assert len(lines()) == COUNT + 1


def test_a_loss_that_is_no_number_is_told_and_the_sweep_goes_on(trained, capsys):
    trained.bad = lambda flags: not (flags["SCALE"] and flags["CAUSAL"])
    sweep.main(["--steps=30"])
    out = capsys.readouterr().out
    told = f"{COUNT - 4} left; not trained: SCALE=False: the loss is no number at step 9; lower "
    told += "LEARNING_RATE"
    assert [told] == [line for line in out.splitlines() if "SCALE" in line and "left" in line][:1]
    assert len(trained) == COUNT and len(lines()) == len(rows(out)) == COUNT - 2
    sweep.main(["--steps=30"])
    again = [gpt.name_run(flags) for flags in trained[COUNT:]]
    assert again == ["SCALE=False", "CAUSAL=False"]


def test_ctrl_c_before_there_is_anything(text, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "main", lambda **_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        sweep.main([])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, f"{COUNT} of {COUNT} runs left\n") and "no run" in err


def test_two_processes_train_what_one_trains(text):
    """Real runs, which keep no model. One is told in place of a record: its loss is no number."""
    wild = dict(OPTIMIZER="sgd", LEARNING_RATE=1e9, NORM=False, STEPS=9)
    plan = []
    for n, changes in enumerate([{}, {"N_LAYER": 0}, wild, {"NORM": False}]):
        run = dict(SEED=1, DEVICE="cpu", DATA="input.txt", CHECKPOINT=f"{n}.pt")
        plan.append(gpt.FULL | TINY | changes | run)
        del plan[-1]["SAMPLE"]
    found = []
    for jobs in (1, 2):
        made = list(sweep.train_all(plan, jobs))
        told = [run for run in made if type(run) is str]
        assert told == [
            f"{gpt.name_run(plan[2])}: the loss is no number at step 9; lower LEARNING_RATE"
        ]
        found.append({run["name"]: run["val_loss"] for run in made if type(run) is dict})
    assert found[0] == found[1] and len(found[0]) == 3 and len(lines()) == 6
    assert sorted(os.listdir()) == ["input.txt", "runs.jsonl"]


def test_a_flag_of_a_reader_s_own_that_is_in_no_name_goes_to_every_run(trained, monkeypatch):
    monkeypatch.setitem(gpt.REST, "CLIP", 0.0)
    monkeypatch.setattr(gpt, "CLIP", 1.5, raising=False)
    sweep.main(["--other-way", "--steps=30"])
    assert len(trained) == 7 and {flags["CLIP"] for flags in trained} == {1.5}


def test_the_other_way_is_told_by_titles(trained, capsys):
    sweep.main(["--other-way", "--n-head=2"])
    changes = [{}, {"N_EMBD": 128}, {"N_LAYER": 6}, {"BLOCK_SIZE": 256}, {"BATCH_SIZE": 16}]
    changes += [{"GELU": False}, {"PRE_NORM": False}]
    flags = [{flag: run[flag] for flag in gpt.FULL} for run in lines()]
    assert flags == [gpt.FULL | {"N_HEAD": 2} | c for c in changes]
    table = rows(capsys.readouterr().out)
    assert [row[-1] for row in table] == [title for title, _ in sweep.OTHER_WAY]


# The table.
def test_the_table_by_hand_with_seeds_missing(folder, capsys):
    write(
        *[record(loss, seed) for seed, loss in enumerate([1.7, 1.8, 1.75], 1)],
        *[record(loss, seed, NORM=False) for seed, loss in enumerate([1.8, 2.1], 1)],
        *[record(loss, seed, MLP=False) for seed, loss in enumerate([1.85, 1.95, 5, 4], 3)],
        record(1.6, 4, BIAS=True),
        record(1.9, 2, TIE=False),
    )
    sweep.main(["--table"])
    assert rows(capsys.readouterr().out) == [
        ["1.750", "+0.000 ± 0.000", "3", "1,234", "full"],
        ["1.900", "+0.100", "1", "1,234", "TIE=False"],
        # 1.85 - 1.75, and the mean of 1.85, 1.95, 5 and 4
        ["3.200", "+0.100", "1 of 4", "1,234", "MLP=False"],
        # costs 0.1 and 0.3: their deviation is 0.1 * sqrt(2), and that over sqrt(2) is 0.1
        ["1.950", "+0.200 ± 0.100", "2", "1,234", "NORM=False"],
        ["1.600", "1", "1,234", "BIAS=True"],
    ]


def test_notes_and_names_that_are_no_deletions_are_in_the_table(folder, capsys):
    write(
        record(1.9, NORM=False, NOTE="mine"),
        record(1.8, NOTE="mine"),
        record(2.0, NOTE="no = sign"),
        record(1.7),
        record(2.2, N_EMBD=32, MLP=False),
    )
    sweep.main(["--table"])
    out = capsys.readouterr().out
    assert [row[1] for row in rows(out)] == ["+0.000", "+0.100", "+0.200", "+0.300", "+0.500"]
    sweep.main(["--table", "--names", "full", "NOTE='no = sign'"])
    assert [row[1] for row in rows(capsys.readouterr().out)] == ["+0.000", "+0.300"]


def test_several_files_and_the_newest_of_each_seed(folder, capsys):
    write(record(1.7), record(2.0, started=3.0, NORM=False), path="a.jsonl")
    write("", "7", '{"name": "full"}', '{"name', record(1.9, NORM=False), path="b.jsonl")
    write(record(1.8, 2), record(2.2, 2, NORM=False), path="c.jsonl")
    sweep.main(["--table", "a.jsonl", "b.jsonl", "c.jsonl"])
    norm = rows(capsys.readouterr().out)[1]
    assert norm == ["2.100", "+0.350 ± 0.050", "2", "1,234", "NORM=False"]


def test_the_ladder_and_the_other_way_choose_among_their_own_runs(folder, capsys):
    """Of other runs there are more."""
    write(
        *[record(2.0 - n / 10, steps=1000, **flags) for n, (_, flags) in enumerate(sweep.LADDER)],
        *[record(2.0, steps=500, **flags) for _, flags in sweep.OTHER_WAY],
        *[
            record(2.0, seed, steps=300, **flags)
            for seed in range(3)
            for _, flags in sweep.deletions()
        ],
    )
    for args, steps, count in [("--ladder", 1000, 10), ("--other-way", 500, 7), ("", 300, COUNT)]:
        sweep.main(["--table", *args.split()])
        out = capsys.readouterr().out
        assert out.startswith(f"\nAfter {steps:,} steps\n") and len(rows(out)) == count


def test_a_name_may_have_lost_its_quotes_and_a_file_its_star_a_shell(folder, capsys):
    write(record(1.7), record(1.9, OPTIMIZER="sgd"), record(1.8, NOTE="a b"), path="a.jsonl")
    sweep.main(["--table", "*.jsonl", "--names", "OPTIMIZER=sgd", "NOTE='a b'"])
    assert [row[-1] for row in rows(capsys.readouterr().out)] == ["NOTE='a b'", "OPTIMIZER='sgd'"]


def test_the_runs_of_which_there_are_most_or_those_asked_for(folder, capsys):
    write(
        *[record(1.1, started=2.0, steps=500), record(1.2, seed=2, steps=500)],
        *[record(1.3, steps=500, N_EMBD=32), record(1.5, steps=500, N_EMBD=32, NORM=False)],
        *[record(1.6, data="e"), record(1.7, seed=2, data="e"), record(1.8)],
    )
    losses, costs = {}, {}
    for args in ["", "--seed 2", "--n-embd 32", "--steps 2000"]:
        sweep.main(["--table", *args.split()])
        table = rows(capsys.readouterr().out)
        losses[args] = [row[0] for row in table]
        costs[args] = {row[-1]: row[1] for row in table}
    assert costs[""].keys() == {"full", "N_EMBD=32", "NORM=False N_EMBD=32"}
    assert costs["--n-embd 32"] == {"N_EMBD=32": "+0.000", "NORM=False N_EMBD=32": "+0.200"}
    assert losses["--seed 2"] == ["1.700"]  # of as many the newest
    assert losses["--steps 2000"] == ["1.650"]


@pytest.mark.parametrize(
    "args, word",
    [
        (["--seeds=0"], "--seeds"),
        (["--jobs=0"], "--jobs"),
        (["--steps=0"], "STEPS"),
        (["--steps=-1"], "STEPS"),
        (["--wat"], "--wat"),
        (["--checkpoint=x.pt"], "CHECKPOINT"),  # a sweep keeps no model
        (["--n-embd=9"], "N_EMBD"),
        (["--data=no.txt"], "no.txt"),
        (["--other-way", "--ladder"], "--ladder"),
        (["--ladder", "--bars=x.png"], "--plot"),
        (["--bars=x.png", "--plot=x.png"], "--plot"),
        (["--names", "full"], "--names"),
        (["--table", "a.jsonl", "--bars=x.png"], "compare"),
        (["--table"], "runs.jsonl"),
        (["--table", "a.jsonl", "--steps=9"], "no such runs"),
        (["--table", "a.jsonl", "--names", "nobody"], "nobody"),
        (["--table", "a.jsonl", "--other-way", "--n-layer=9"], "no such runs"),
        (["--table", "a.jsonl", "--plot=no/folder.png"], "folder"),
        (["--table", "a.jsonl", "--plot=x.xyz"], "xyz"),
    ],
    ids=str,
)
def test_bad_input_gets_one_line(args, word, text, capsys):
    write(record(1.7), path="a.jsonl")
    with pytest.raises(SystemExit) as end:
        sweep.main(args)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and sorted(os.listdir())[:2] == ["a.jsonl", "input.txt"]
    assert re.fullmatch(r"sweep\.py: error: .+\n", err) and word in err


def test_without_matplotlib(folder, monkeypatch, capsys):
    write(record(1.7))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as end:
        sweep.main(["--plot=curves.png"])
    assert end.value.code == 2 and "pip install" in capsys.readouterr().err


# The pictures.
@pytest.fixture
def drawn(folder):
    """drawn("--plot", *records) is the axis of their picture. It is in a file, too, and what is
    written in it lies in it, and not one thing on another."""
    extent = pytest.importorskip("matplotlib.text").Text.get_window_extent  # without its line
    image = pytest.importorskip("matplotlib.image")

    def draw(option, *records, args=()):
        write(*records)
        figure = sweep.main([option, "picture.png", *args])
        assert (image.imread("picture.png")[0, :, 3] == 0).all()  # transparent
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
    """The curves with labels: {label: [(step, loss), ...]}, and their colours."""
    curves = {}
    for line in axis.lines:
        points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for text in axis.texts:
            if text.get_color() == line.get_color() and text.xy[0] == points[-1][0]:
                curves[text.get_text()] = points
    return curves


def test_a_curve_is_the_mean_of_its_seeds_from_the_known_start(drawn, capsys):
    """Its label is the loss of the table: of each run's best look, not of its last."""
    axis = drawn(
        "--plot",
        record(1.5, 1, [[100, 9.0, 3.0], [200, 9.0, 1.5], [300, 9.0, 1.7]]),
        record(1.6, 2, [[100, 9.0, 2.0], [200, 9.0, 1.7], [300, 9.0, 1.6]]),
        record(2.0, NORM=False),
    )
    curves = labels(axis)
    start = (0, pytest.approx(math.log(65)))
    assert curves["1.550 full"] == [start, (100, 2.5), (200, 1.6), (300, pytest.approx(1.65))]
    assert curves["2.000 NORM=False"] == [start, (2000, 2.0)]
    sweep.main(["--table"])
    assert rows(capsys.readouterr().out)[0][0] == "1.550"
    assert axis.get_xlim()[0] == 0


def test_what_gets_lost_does_not_flatten_the_others(drawn):
    wild = [[100, 9.0, 3.0], [200, 9.0, 1e9], [300, 9.0, 1e10]]
    tame = [[100, 9.0, 2.5], [200, 9.0, 2.0], [300, 9.0, 1.5]]
    runs = record(1.5, 1, tame), record(3.0, 1, wild, SCALE=False)
    runs += record(1.5, 1, tame, MLP=False), record(3.0, 2, wild, MLP=False)
    axis = drawn("--plot", *runs)
    assert 4 < axis.get_ylim()[1] < 5 and 1 < axis.get_ylim()[0] < 1.5
    assert labels(axis)["2.250 MLP=False"][-2] == (200, pytest.approx(5e8 + 1))


def test_both_the_start_and_ends_that_differ_by_little_are_seen(drawn):
    """0.01 of 2.7 would be 2 pixels on an even axis; here it is that of a logarithm, worked by hand
    for the lowest loss of 1.5."""
    ends = {"full": 1.5, "TIE=False": 1.51, "MLP=False": 2.5}
    axis = drawn("--plot", *[record(loss, name=name) for name, loss in ends.items()])
    heights = axis.transData.transform([(0, math.log(65)), *[(0, end) for end in ends.values()]])
    start, full, tie, mlp = heights[:, 1]
    assert tie - full > 12 and start < axis.get_window_extent().y1
    assert (tie - full) / (mlp - full) == pytest.approx(math.log(1.1) / math.log(11))
    ticks = axis.get_yticks()
    assert (
        len(ticks) > 8
        and ticks[0] == 1.5
        and (10 * ticks).round(6).tolist() == [round(10 * tick) for tick in ticks]
    )


def test_of_all_runs_the_full_model_and_the_costliest_are_drawn(drawn, capsys):
    runs = []
    for n, (_, changes) in enumerate(sweep.deletions()):
        runs.append(record(1.5 + n / 100, **changes))
    names = [run["name"] for run in runs]
    axis = drawn("--plot", *runs)
    assert [label.partition(" ")[2] for label in labels(axis)] == ["full", *names[-6:]]
    told = f"picture.png shows: full; {'; '.join(names[-6:])}\n"
    told += f"Left out: {'; '.join(names[1:-6])}\n"
    assert capsys.readouterr().out == told and "CAUSAL=False" in names[1:-6]
    axis = drawn("--plot", *runs[:6])  # CAUSAL=False reads the answer, and would flatten the others
    shown = {label.partition(" ")[2] for label in labels(axis)}
    assert shown == {*names[:6]} - {"CAUSAL=False"} and len(shown) == 5
    axis = drawn("--plot", *runs, args=["--names", "CAUSAL=False", "full"])
    assert [label.partition(" ")[2] for label in labels(axis)] == ["full", "CAUSAL=False"]


def test_bars_are_costs_in_their_order_with_a_dot_a_seed(drawn, capsys):
    full = [record(1.7, 1), record(1.8, 2)]
    runs = [record(1.9, 1, NORM=False), record(2.2, 2, NORM=False), record(1.69, 1, BIAS=True)]
    runs += [record(0.1, 2, CAUSAL=False), record(1.6, 3, TIE=False), record(2.0, 1, NOTE="mine")]
    axis = drawn("--bars", *full, *runs)
    names = ["CAUSAL=False", "BIAS=True", "NOTE='mine'", "NORM=False"]
    assert [label.get_text() for label in axis.get_yticklabels()] == names
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([-1.7, -0.01, 0.3, 0.3])
    dots = [list(line.get_xdata()) for line in axis.lines[:4]]
    assert dots == [[pytest.approx(-1.7)], [pytest.approx(-0.01)], [pytest.approx(0.3)]] + [
        pytest.approx([0.2, 0.4])
    ]
    assert [text.get_text() for text in axis.texts][2:] == ["+0.300", "+0.300 ± 0.100"]
    assert capsys.readouterr().out.endswith("Left out: TIE=False\n")
    assert axis.get_xscale() == "symlog"


def test_a_part_has_one_colour_in_every_picture(drawn):
    runs = [record(1.7), record(1.9, NORM=False), record(1.8, BIAS=True, N_EMBD=32)]
    bars = drawn("--bars", *runs)
    curves = drawn("--plot", *runs)
    of_bars = {
        name.get_text(): text.get_color()
        for name, text in zip(bars.get_yticklabels(), bars.texts, strict=True)
    }
    of_curves = {text.get_text().partition(" ")[2]: text.get_color() for text in curves.texts}
    assert of_curves == of_bars | {"full": sweep.COLOURS["full"]}
    assert of_bars["NORM=False"] == sweep.COLOURS["NORM"]


def test_records_older_than_a_reader_s_own_flag_are_kept(drawn, monkeypatch):
    full, norm = record(1.7), record(1.9, NORM=False)
    monkeypatch.setattr(gpt, "FULL", {"RMSNORM": False} | gpt.FULL)
    monkeypatch.setattr(gpt, "RMSNORM", False, raising=False)
    runs = full, norm, record(1.8, BIAS=True), record(2.0, RMSNORM=True)
    axis = drawn("--bars", *runs)
    names = [label.get_text() for label in axis.get_yticklabels()]
    colours = [text.get_color() for text in axis.texts]
    assert names == ["BIAS=True", "NORM=False", "RMSNORM=True"]
    assert colours == [sweep.COLOURS["BIAS"], sweep.COLOURS["NORM"], sweep.GREY]


def test_colours_are_read_on_white_and_on_black():
    """Of contrast 3 or more, https://www.w3.org/TR/WCAG21/#non-text-contrast. No two are alike, and
    those of the other way, which lie close together, differ by more."""

    def luminance(colour):
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    black = luminance("#0d1117")
    colours = [*sweep.COLOURS.values(), sweep.GREY]
    for colour in colours:
        assert 1.05 / (luminance(colour) + 0.05) >= 3
        assert (luminance(colour) + 0.05) / (black + 0.05) >= 3
    assert sorted(colours) == sorted(set(colours))
    parts = [next(iter(changes), "full") for _, changes in sweep.OTHER_WAY]
    for a, b in itertools.combinations([sweep.COLOURS[part] for part in parts], 2):
        ab = [int(colour[n : n + 2], 16) for n in (1, 3, 5) for colour in (a, b)]
        assert math.dist(ab[::2], ab[1::2]) > 40, (a, b)
    deleted = {flag for changes in DELETIONS for flag in changes} - {"BFLOAT16"}
    assert deleted <= sweep.COLOURS.keys()  # a flag of a reader's own is grey


# The ladder.
def test_each_rung_adds_to_the_one_before_what_it_says():
    titles = [title for title, _ in sweep.LADDER]
    rungs = [gpt.FULL | flags for _, flags in sweep.LADDER]
    added = [
        {flag for flag in gpt.FULL if a[flag] != b[flag]} for a, b in itertools.pairwise(rungs)
    ]
    assert list(zip(titles[2:], added[1:], strict=True)) == [
        ("one head", {"QUERY_KEY"}),
        ("rotary positions", {"ROTARY"}),
        ("four heads", {"N_HEAD"}),
        ("residual", {"RESIDUAL"}),
        ("norm", {"NORM"}),
        ("feed-forward, projection", {"MLP", "PROJECTION"}),
        ("three blocks", {"N_LAYER"}),
        ("tied: the full model", {"TIE"}),
    ]
    assert rungs[-1] == gpt.FULL and not any(rung["TIE"] for rung in rungs[:-1])


def test_the_ladder_begins_with_a_real_bigram_model(flags):
    """A table: one row of logits for each character, from two matrices and nothing else."""
    flags(**sweep.LADDER[0][1], N_EMBD=8)
    model = gpt.GPT(5)
    assert [name for name, _ in model.named_parameters()] == ["wte.weight", "lm_head.weight"]
    table = model.wte.weight @ model.lm_head.weight.T
    ids = torch.tensor([[3, 1, 4, 1, 0, 2]])
    assert torch.equal(model(ids)[0], table[ids[0]])


def test_the_second_rung_is_the_plain_average_of_the_past(flags):
    flags(**sweep.LADDER[1][1], N_EMBD=8)
    model = gpt.GPT(5)
    ids = torch.tensor([[3, 1, 4, 1, 0, 2]])
    (attention,) = model.layers
    for t in range(1, 7):
        x = model.wte.weight[ids[0, :t]] + model.wpe.weight[:t]
        want = model.lm_head(attention.f.value(x.mean(0)))
        torch.testing.assert_close(model(ids)[0, t - 1], want)


def test_the_ladder_is_told_rung_by_rung(drawn, trained, capsys):
    losses = [2.5, 3.25, 2.25, 2.375, 2.125, 2.0, 1.875, 1.75, 1.625, 1.5]
    runs = []
    for (_, flags), loss in zip(sweep.LADDER, losses, strict=True):
        curve = [[1000, 9.0, loss], [2000, 9.0, loss]]
        runs += [record(loss, 1, curve, **flags), record(loss, 2, curve, **flags)]
    write(*runs, record(2.0, NORM=False))
    sweep.main(["--ladder", "--table"])
    table = rows(capsys.readouterr().out)
    assert [row[-1] for row in table] == [title for title, _ in sweep.LADDER]
    assert [row[0] for row in table[:4]] == ["2.500", "3.250", "2.250", "2.375"]
    changes = ["+0.750 ± 0.000", "-1.000 ± 0.000", "+0.125 ± 0.000", "-0.250 ± 0.000"]
    assert [row[1] for row in table[:5]] == ["2", *changes]
    axis = drawn("--plot", *runs, record(2.0, NORM=False), args=["--ladder"])
    ends = {text.get_text().partition(" ")[2]: text.get_color() for text in axis.texts}
    assert sorted(ends) == sorted(title for title, _ in sweep.LADDER)
    assert len(set(ends.values())) == 10 and axis.get_ylim()[1] < 5
    parts = {"residual": "RESIDUAL", "norm": "NORM", "tied: the full model": "full"}
    for title, part in parts.items():
        assert ends[title] == sweep.COLOURS[part]
    os.remove("runs.jsonl")
    sweep.main(["--ladder", "--seeds=2", "--steps=30"])
    names = [gpt.name_run(gpt.FULL | flags) for _, flags in sweep.LADDER]
    assert [run["name"] for run in lines()] == names * 2
