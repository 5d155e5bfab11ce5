"""A notebook: many runs in one process."""

import contextlib
import io
import json
import os
import runpy
import sys
import threading
from pathlib import Path

import pytest
from conftest import SCRIPT, TINY, TINY_ARGS

import gpt


def test_main_returns_the_model_its_vocabulary_and_the_line_of_runs_jsonl(text):
    model, vocab, run = gpt.main(**TINY)
    assert type(model) is gpt.GPT and vocab == "".join(sorted(set(text)))
    assert json.loads(Path("runs.jsonl").read_text("utf-8")) == run
    again, vocab_again, none = gpt.main(STEPS=0)
    assert vocab_again == vocab and none is None
    assert gpt.sample(again, vocab, "to be") == gpt.sample(model, vocab, "to be")


def test_a_flag_stays_as_it_was_set(text):
    names = [gpt.main(**TINY, NORM=False)[2]["name"], gpt.main(GELU=False)[2]["name"]]
    assert "NORM=False" in names[0] and "NORM=False" in names[1] and "GELU=False" in names[1]


@pytest.mark.parametrize("given, near", [("NROM", "NORM"), ("N_HEADS", "N_HEAD"), ("F", "")])
def test_an_unknown_flag_is_refused_and_the_nearest_named(given, near, text, capsys):
    with pytest.raises(SystemExit) as end:
        gpt.main(**{given: False})
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"gpt.py: error: no flag {given}; maybe {near}")
    assert os.listdir() == ["input.txt"]


def test_a_run_works_in_a_thread(text):
    results = []
    thread = threading.Thread(target=lambda: results.append(gpt.main(**TINY)))
    thread.start()
    thread.join()
    assert results[0][2]["steps"] == TINY["STEPS"] and Path("gpt.pt").exists()


def test_a_run_prints_to_an_output_that_is_no_file(text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpt.py", *TINY_ARGS])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        gpt.main(**TINY)
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert out.getvalue().count("The model is in gpt.pt") == 2


def test_models_of_other_flags_are_sampled_in_turn(text, capsys):
    made = []
    for flags in (
        dict(PRE_NORM=False, N_HEAD=4, BLOCK_SIZE=4),
        dict(PRE_NORM=True, N_HEAD=2, BLOCK_SIZE=8, RESIDUAL=False),
        dict(RESIDUAL=True, SCALE=False, ROTARY=False, N_LAYER=1),
    ):
        model, vocab, _ = gpt.main(**TINY | {"STEPS": 20, "SAMPLE": 60} | flags)
        out = capsys.readouterr().out.split("\n\n    loss ")[0]
        made.append((model, vocab, out[-61:]))
    for model, vocab, sample in made + made[::-1]:
        assert gpt.sample(model, vocab, "") == sample
    assert len({sample for _, _, sample in made}) == 3
    for model, vocab, _ in made:
        lengths = []
        model.register_forward_pre_hook(lambda _, args, seen=lengths: seen.append(args[0].size(1)))
        gpt.sample(model, vocab, 3 * "to be ")  # longer than any context
        assert set(lengths) == {model.flags["BLOCK_SIZE"]}


def test_a_notebook(text, monkeypatch):
    """In a kernel of its own: %run, flags set both ways, two models in turn, a flag misspelt."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(Path("home").resolve()))
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    tiny = {**TINY, "SAMPLE": 30}
    cells = [
        f"%run {SCRIPT} {' '.join(TINY_ARGS)}",
        f"import gpt\ngpt.NORM = False\na, vocab, run = gpt.main(**{tiny})\nprint(run['name'])",
        "_, _, again = gpt.main(NORM=False)\nprint(again['name'], again['curve'] == run['curve'])",
        "b, _, _ = gpt.main(NORM=True, N_HEAD=1, PRE_NORM=False)\n"
        "one, two = gpt.sample(a, vocab, ''), gpt.sample(b, vocab, '')\n"
        "print(gpt.sample(a, vocab, '') == one, gpt.sample(b, vocab, '') == two, one != two)",
        "gpt.main(NROM=False)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[-1].metadata.tags = ["raises-exception"]
    client = nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(Path().resolve())}}
    )
    client.execute()
    printed = [
        {
            name: "".join(out.text for out in cell.outputs if out.get("name") == name)
            for name in ("stdout", "stderr")
        }
        for cell in notebook.cells
    ]
    assert all(cell["stderr"] == "" for cell in printed[:-1])
    ran, first, second, third, wrong = (cell["stdout"] for cell in printed)
    assert ran.endswith("The model is in gpt.pt; python gpt.py --steps 0 samples from it.\n")
    assert "NORM=False" in first.splitlines()[-1].split()
    assert second.endswith(first.splitlines()[-1] + " True\n") and "NORM=False" in second
    assert third.endswith("True True True\n") and wrong == ""
    assert "gpt.py: error: no flag NROM; maybe NORM?\n" in printed[-1]["stderr"]
    assert len(Path("runs.jsonl").read_text("utf-8").splitlines()) == 4
