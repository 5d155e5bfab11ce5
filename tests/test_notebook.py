"""A notebook: many runs in one process, and flags that are as they were after each."""

import ast
import contextlib
import inspect
import io
import json
import os
import runpy
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, TINY, TINY_ARGS
from sample import load
from torch.nn import functional as F

import gpt


def now():
    """The flags as they are."""
    return {flag: getattr(gpt, flag) for flag in gpt.FULL | gpt.REST}


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


def test_main_returns_the_model_its_vocabulary_and_the_line_of_runs_jsonl(text):
    model, vocab, run = gpt.main(**TINY)
    assert type(model) is gpt.GPT and not model.training and vocab == "".join(sorted(set(text)))
    assert json.loads(Path("runs.jsonl").read_text("utf-8")) == run
    again, vocab_again, kept = load("gpt.pt")
    assert vocab_again == vocab and kept["name"] == run["name"]
    assert gpt.sample(again, vocab, "to be") == gpt.sample(model, vocab, "to be")


# Whatever way main ends, every flag is as it was.
def test_flags_are_as_before_when_main_returns(text):
    vars(gpt).update(TINY | {"GELU": False, "LEARNING_RATE": 0})
    before = now()
    gpt.main(NORM=False, N_HEAD=1, NOTE="wide", SEED=7)
    assert now() == before and type(gpt.LEARNING_RATE) is int


@pytest.mark.parametrize(
    "wrong",
    [
        {"GELU": 7},
        {"SEED": -1},
        {"DATA": "nowhere.txt"},
        {"CHECKPOINT": "nowhere/gpt.pt"},
        {"STEPS": 0},
        {"no_flag": True},
    ],
    ids=str,
)
def test_flags_are_as_before_when_main_refuses(wrong, text):
    gpt.main(**TINY)
    vars(gpt).update(TINY)
    before = now()
    with pytest.raises(gpt.BadInput):
        gpt.main(**{"NORM": False, "N_HEAD": 1} | wrong)
    assert now() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError, SystemExit])
@pytest.mark.parametrize("where", ["evaluate", "sample", "compare", "read_text", "name_run"])
def test_flags_are_as_before_when_main_is_interrupted_or_fails(error, where, text, monkeypatch):
    vars(gpt).update(TINY)
    before = now()
    monkeypatch.setattr(gpt, where, raises(error("on purpose")))
    with contextlib.suppress(error, gpt.BadInput):
        gpt.main(NORM=False, N_HEAD=1)
    assert now() == before


def test_only_main_writes_globals():
    """No global statement anywhere; globals() is written to in main alone."""
    tree = ast.parse(inspect.getsource(gpt))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    writers = set()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for node in ast.walk(function):
            stored = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
            called = isinstance(node, ast.Attribute) and node.attr not in ("get", "items")
            if (stored or called) and ast.unparse(node.value) in ("globals()", "vars()"):
                writers.add(function.name)
    assert writers == {"main"}
    assert "sys.modules" not in inspect.getsource(gpt)


# The model of one set of flags beside flags that are another's.
def test_a_sample_of_an_older_model_leaves_the_next_run_alone(text):
    vars(gpt).update(TINY)
    full, vocab, first = gpt.main()
    gpt.NORM = False
    gpt.sample(full, vocab, "ROMEO:")
    model, _, run = gpt.main()
    assert gpt.NORM is False and run["NORM"] is False and run["GELU"] is True
    assert "NORM=False" in run["name"].split() and run["curve"] != first["curve"]
    assert not [part for part in model.modules() if isinstance(part, torch.nn.LayerNorm)]


def test_a_sample_of_an_older_deletion_leaves_the_next_full_run_alone(text):
    vars(gpt).update(TINY)
    expected = gpt.main()[2]
    gpt.NORM = False
    without, vocab, _ = gpt.main()
    gpt.NORM = True
    gpt.sample(without, vocab, "ROMEO:")
    run = gpt.main()[2]
    assert (run["name"], run["curve"]) == (expected["name"], expected["curve"])


def test_after_a_model_is_loaded_the_next_run_has_the_flags_as_they_are(text):
    vars(gpt).update(TINY)
    gpt.main(BIAS=True)
    model, vocab, _ = load("gpt.pt")
    gpt.sample(model, vocab)
    run = gpt.main(NORM=False)[2]
    assert (run["STEPS"], run["BIAS"], run["NORM"]) == (TINY["STEPS"], False, False)
    assert len(Path("runs.jsonl").read_text("utf-8").splitlines()) == 2


def test_a_sample_in_the_middle_of_training_does_not_change_the_training(text, monkeypatch):
    vars(gpt).update(TINY | {"STEPS": 10})
    other, vocab, _ = gpt.main(NORM=False, N_HEAD=1, BLOCK_SIZE=4)
    alone = gpt.main()[2]["curve"]
    sampled = gpt.sample(other, vocab, "to be")
    real = F.cross_entropy
    seen = []

    def loss(*args, **how):
        seen.append(gpt.sample(other, vocab, "to be"))
        return real(*args, **how)

    monkeypatch.setattr(F, "cross_entropy", loss)
    assert gpt.main()[2]["curve"] == alone
    assert set(seen) == {sampled} and len(seen) > 10


@pytest.fixture
def three(text, capsys):
    """Three models of different flags, each with its vocabulary and the sample its run printed."""
    made = []
    for flags in (
        dict(PRE_NORM=False, N_HEAD=4, BLOCK_SIZE=4),
        dict(RESIDUAL=False),
        dict(SCALE=False, ROTARY=False, N_LAYER=1),
    ):
        model, vocab, _ = gpt.main(**TINY | {"STEPS": 20, "SAMPLE": 60} | flags)
        made.append((model, vocab, capsys.readouterr().out))
    return made


def test_models_of_different_flags_are_sampled_in_turn(three):
    gpt.SAMPLE = 60
    samples = []
    for model, vocab, printed in three + three[::-1]:
        samples.append(gpt.sample(model, vocab, ""))
        assert samples[-1] in printed
    assert len(set(samples)) == 3
    for model, vocab, _ in three:
        lengths = []
        model.register_forward_pre_hook(lambda _, args, seen=lengths: seen.append(args[0].size(1)))
        gpt.sample(model, vocab, 3 * "to be ")  # longer than any context
        assert set(lengths) == {model.block_size}


def test_models_of_different_flags_are_sampled_in_threads(three):
    gpt.SAMPLE = 60
    samples = {}

    def sample(name, model, vocab):
        samples[name] = gpt.sample(model, vocab, "")

    threads = [
        threading.Thread(target=sample, args=(name, *three[name % 3][:2])) for name in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(samples[name] in three[name % 3][2] for name in range(6))


def test_a_run_works_in_a_thread_and_prints_to_an_output_that_is_no_file(text):
    returned = []
    thread = threading.Thread(target=lambda: returned.append(gpt.main(**TINY)))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        thread.start()
        thread.join()
    assert returned[0][2]["STEPS"] == TINY["STEPS"] and "gpt.pt" in out.getvalue()


def test_the_command_prints_to_an_output_that_is_no_file(text, monkeypatch):
    """As with %run gpt.py, where sys.stdout writes into the notebook."""
    monkeypatch.setattr(sys, "argv", ["gpt.py", *TINY_ARGS])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "gpt.pt" in out.getvalue()


# Parts that a notebook replaces.
def test_a_replaced_function_acts_and_is_named_by_a_note(text, monkeypatch, capsys):
    def plain_average(q, k, v, **_):
        return gpt_attention(None, None, v)

    vars(gpt).update(TINY)
    gpt_attention = gpt.attention
    full = gpt.main()[2]
    monkeypatch.setattr(gpt, "attention", plain_average)
    capsys.readouterr()
    run = gpt.main(NOTE="mean")[2]
    assert run["name"] == f"{full['name']} NOTE='mean'" and run["curve"] != full["curve"]
    rows = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert sorted(rows) == sorted([full["name"], run["name"]])


def test_bad_input_ends_no_loop_over_runs(text):
    names = []
    for heads in (1, 3, 2):
        try:
            names.append(gpt.main(**TINY | {"N_HEAD": heads})[2]["name"])
        except ValueError as error:
            names.append(str(error))
    assert "N_HEAD=1" in names[0] and "N_HEAD=3" in names[1] and "N_HEAD=2" in names[2]


def test_the_file_runs_under_another_name(text):
    """As with %run in a notebook or runpy: nothing asks for the module's name."""
    there = runpy.run_path(str(SCRIPT), run_name="lesson")
    run = there["main"](**TINY)[2]
    assert run["name"] == gpt.main(**TINY)[2]["name"]
    assert there["NORM"] is True and there["STEPS"] == gpt.STEPS


def test_a_notebook(text, monkeypatch):
    """In a kernel of its own: flags set both ways, an older model sampled, a flag misspelt, a
    function replaced."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(Path("home").resolve()))
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = [
        f"import gpt\nvars(gpt).update({TINY})\nfull, vocab, run = gpt.main()\nrun['name']",
        "gpt.NORM = False\nsampled = gpt.sample(full, vocab, '')\ngpt.main()[2]['name']",
        "gpt.NORM = True\nassert sampled == gpt.sample(full, vocab, '')\n"
        "gpt.main(NORM=False, N_HEAD=1)[2]['name']",
        "gpt.main(NROM=False)",
        "attention = gpt.attention\ndef mine(q, k, v, **options):\n"
        "    return attention(q, k, v, **options)\n"
        "gpt.attention = mine\ngpt.main(NOTE='mine')[2]['name']",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[3].metadata.tags = ["raises-exception"]
    resources = {"metadata": {"path": os.getcwd()}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    results = []
    for cell in notebook.cells:
        outputs = [out for out in cell.outputs if out.output_type == "execute_result"]
        results.extend(ast.literal_eval(out.data["text/plain"]) for out in outputs)
        assert not [out for out in cell.outputs if out.get("name") == "stderr"]
    sizes = "N_HEAD=2 N_LAYER=2 N_EMBD=8 BLOCK_SIZE=8 BATCH_SIZE=4"
    assert results == [
        sizes,
        "N_HEAD=2 NORM=False N_LAYER=2 N_EMBD=8 BLOCK_SIZE=8 BATCH_SIZE=4",
        "N_HEAD=1 NORM=False N_LAYER=2 N_EMBD=8 BLOCK_SIZE=8 BATCH_SIZE=4",
        f"{sizes} NOTE='mine'",
    ]
    (error,) = [out for out in notebook.cells[3].outputs if out.output_type == "error"]
    assert error.ename == "BadInput" and "NROM" in error.evalue
    assert len(Path("runs.jsonl").read_text("utf-8").splitlines()) == 4
