"""The table after a run."""

import json
from pathlib import Path

import pytest
from test_command import table

import gpt


def record(name, seed, loss, **other):
    """What the table needs of a run's record; without a loss it diverged."""
    run = dict(name=name, seed=seed, val_loss=loss, data="abc", steps=100, code="11112222")
    return run | other


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """show(*records) prints the table for the last of them; returns its rows. A text is a line."""

    def show(*records):
        monkeypatch.chdir(tmp_path)
        lines = [line if type(line) is str else json.dumps(line) for line in records]
        Path("runs.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        gpt.compare(records[-1])
        show.out = capsys.readouterr().out
        return table(show.out)

    return show


def test_means_costs_and_spreads_by_hand(show):
    rows = show(
        record("full", 1, 1.60),
        record("full", 2, 1.64),
        record("MLP=False", 1, 1.90),
        record("BIAS=True", 1, 1.605),
        record("GELU=False", 1, 1.61),
        record("GELU=False", 2, 1.65),
        record("GELU=False", 3, 1.69),
    )
    assert list(rows.items()) == [
        ("BIAS=True, within the spread", ["1.605", "-0.015", "", "1"]),
        ("full", ["1.620", "+0.000", "0.040", "2"]),
        ("GELU=False, within the spread", ["1.650", "+0.030", "0.080", "3"]),
        ("MLP=False", ["1.900", "+0.280", "", "1"]),
    ]


@pytest.mark.parametrize("cost, noise", [(0.09, ", within the spread"), (0.11, "")])
def test_a_cost_is_within_the_spread_of_either(cost, noise, show):
    one, two = (1.6, 1.6), (1.6 + cost - 0.05, 1.6 + cost + 0.05)  # a spread of 0.1, in either
    for full, cut in ((one, two), (two, one)):
        records = [record("full", seed, loss) for seed, loss in enumerate(full)]
        records += [record("TIE=False", seed, loss) for seed, loss in enumerate(cut)]
        assert "TIE=False" + noise in show(*records)


def test_a_seed_that_was_run_twice_counts_once_the_newest(show):
    rows = show(record("full", 1, 1.6), record("full", 1, 1.5))
    assert rows == {"full": ["1.500", "+0.000", "", "1"]}


@pytest.mark.parametrize("other", [{"data": "b"}, {"steps": 99}], ids=str)
def test_other_texts_and_steps_are_not_compared(other, show):
    rows = show(record("full", 1, 1.0, **other), record("TIE=False", 1, 1.7))
    assert rows == {"TIE=False": ["1.700", "?", "", "1"]}


def test_other_widths_are_compared(show):
    rows = show(record("full", 1, 1.6), record("N_EMBD=128", 1, 1.5))
    assert rows["N_EMBD=128"][1] == "-0.100"


def test_without_a_full_run_a_line_says_which_command_makes_one(show):
    show(record("TIE=False", 1, 1.7))
    assert show.out.count("?: ") == 1 and "python gpt.py --steps 100" in show.out.split("?: ")[1]
    show(record("full", 1, 1.6), record("TIE=False", 1, 1.7))
    assert "?" not in show.out


def test_the_code_of_the_first_run_is_the_reference(show):
    mine = dict(code="abcdef99")
    first, second = record("full", 1, 1.6), record("full", 1, 1.5, **mine)
    for records in ((first, second), (first, second, first)):  # whichever run is the last
        rows = show(*records)
        assert list(rows) == ["full (edited code abcd)", "full"]
        assert rows["full (edited code abcd)"][1] == "-0.100"
    assert list(show(second, first)) == ["full", "full (edited code 1111)"]
    other = record("X=1", 1, 9.9, data="b", code="other")  # another text's first run is not it
    assert list(show(other, record("full", 1, 1.6), record("X=1", 1, 1.9))) == ["full", "X=1"]


@pytest.mark.parametrize("line", ['{"name": "fu', "", "7", "[]", "{}", '{"data": "abc"}', "\0"])
def test_a_line_that_is_no_record_is_skipped(line, show):
    rows = show(record("full", 1, 1.6), line, record("TIE=False", 1, 1.7))
    assert [row[1] for row in rows.values()] == ["+0.000", "+0.100"]


def test_a_diverged_run_comes_last_and_says_so(show):
    wild = record("OPTIMIZER='sgd'", 1, None)
    rows = show(wild, record("full", 1, 1.6), record("TIE=False", 1, 1.7))
    assert list(rows) == ["full", "TIE=False", "OPTIMIZER='sgd'"]
    assert rows["OPTIMIZER='sgd'"] == ["diverged", "", "", "1"]
    assert rows["TIE=False"][1] == "+0.100" and "nan" not in show.out
    assert list(show(record("full", 1, None))) == ["full"]
    rows = show(wild, record("OPTIMIZER='sgd'", 2, 1.9), record("full", 1, 1.6))
    assert rows["OPTIMIZER='sgd'"][0] == "diverged"  # as soon as one of its seeds did


def test_a_long_name_goes_on_below_and_moves_no_number(show):
    name = " ".join(f"{flag}=False" for flag in gpt.FLAGS[:15])
    rows = show(record("full", 1, 1.6), record(name, 1, 12.3456))
    assert rows[name] == ["12.346", "+10.746", "", "1"] and len(show.out.splitlines()) > 6
