"""tests/lab/xray.py: its numbers against naive loops, finite differences and models with the part
taken out by hand; then the command, on every kind of model, on edited code and on bad input."""

import cmath
import copy
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xray
from conftest import TESTS, TINY, build, everything, start, words

import gpt

XRAY = TESTS / "lab" / "xray.py"
FLAG_SETS = [
    {},
    {"QUERY_KEY": False},
    {"SCALE": False, "BIAS": True},
    {"CAUSAL": False},
    {"FLASH": False},
    {"N_HEAD": 1},
    {"PROJECTION": False},
    {"POSITION": False},
    {"ROTARY": False},
    {"MLP": False, "GELU": False},
    {"ATTENTION": False},
    {"RESIDUAL": False, "BIAS": True},
    {"NORM": False},
    {"PRE_NORM": False, "TIE": False},
    {"RESIDUAL": False, "PRE_NORM": False, "BIAS": True, "DROPOUT": 0.5},
]


@pytest.fixture
def measured(flags):
    """measured(N_HEAD=1) is a tiny model with random weights, windows and the rows of its X-ray."""

    def measure(**changes):
        flags(**{"N_LAYER": 1, "BLOCK_SIZE": 6} | changes)
        model = build()
        windows = torch.randint(11, [2, 7], generator=torch.Generator().manual_seed(0))
        return model, windows, xray.xray(model, windows)

    return measure


@torch.no_grad()
def find_loss(model, windows):
    """Mean of -ln p over all characters to predict, one at a time."""
    losses = []
    for window in windows.tolist():
        logits = model(torch.tensor([window[:-1]]))[0].tolist()
        for row, target in zip(logits, window[1:], strict=True):
            losses.append(math.log(sum(map(math.exp, row))) - row[target])
    return sum(losses) / len(losses)


def turn(x, place):
    """Rotary positions by hand: pair i of x, a list of D numbers, turned by place / 1e4^(2i/D)."""
    turned = []
    for i in range(0, len(x), 2):
        pair = complex(x[i], x[i + 1]) * cmath.exp(1j * place * 1e4 ** (-i / len(x)))
        turned += [pair.real, pair.imag]
    return turned


def attend(f, x):
    """Attention f on one text x (T, C) in loops over lists. Returns its output, and of each head
    its visible scores, those of no queries and keys being 0, and the exp(entropy) of each query."""
    size = x.size(1) // f.n_head
    values = f.value(x).tolist()
    out = [[0.0] * x.size(1) for _ in x]
    all_scores, all_sees = [], []
    for head in range(f.n_head):
        channels = slice(head * size, (head + 1) * size)
        scores_of_head, sees_of_head = [], []
        for t in range(len(x)):
            visible = range(t + 1 if f.options["causal"] else len(x))
            scores = [0.0 for _ in visible]
            if f.query_key:
                q, k = f.query(x)[:, channels].tolist(), f.key(x)[:, channels].tolist()
                if f.rotary:
                    q = [turn(row, place) for place, row in enumerate(q)]
                    k = [turn(row, place) for place, row in enumerate(k)]
                scores = [sum(a * b for a, b in zip(q[t], k[s], strict=True)) for s in visible]
                if f.options["scale"]:
                    scores = [score / math.sqrt(size) for score in scores]
            total = sum(map(math.exp, scores))
            weights = [math.exp(score) / total for score in scores]
            for channel in range(head * size, (head + 1) * size):
                out[t][channel] = sum(w * values[s][channel] for s, w in enumerate(weights))
            scores_of_head += scores
            sees_of_head.append(math.exp(-sum(w * math.log(w) for w in weights)))
        all_scores.append(scores_of_head)
        all_sees.append(sees_of_head)
    return f.projection(torch.tensor(out)), all_scores, all_sees


def spread(values):
    """Standard deviation of a list."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


# 1. The numbers.
@torch.no_grad()
@pytest.mark.parametrize("changes", FLAG_SETS, ids=str)
def test_size_alike_scores_and_sees_are_those_of_naive_loops(measured, changes):
    model, windows, rows = measured(N_LAYER=2, **changes)
    streams = []  # of each text
    for window in windows:
        x = model.wte(window[:-1])
        if model.wpe is not None:
            x = x + model.wpe.weight[: len(x)]
        streams.append(x)
    assert [row["layer"] for row in rows] == [name for name, _ in model.layers.named_children()]
    for row, layer in zip(rows, model.layers, strict=True):
        scores = [[] for _ in row["heads"]]
        sees = [[] for _ in row["heads"]]
        for n, x in enumerate(streams):
            y = layer.norm(x) if layer.pre_norm else x
            if row["heads"]:
                y, scores_of_text, sees_of_text = attend(layer.f, y)
                for head in range(len(scores)):
                    scores[head] += scores_of_text[head]
                    sees[head] += sees_of_text[head]
            else:
                y = layer.f(y)
            if layer.residual:
                y = x + y
            streams[n] = y if layer.pre_norm else layer.norm(y)
        squares, alike = [], []
        for x in streams:
            rows_of_text = x.tolist()
            energy = [value**2 for place in rows_of_text for value in place]
            means = [
                sum(channel) / len(rows_of_text) for channel in zip(*rows_of_text, strict=True)
            ]
            squares += energy
            alike.append(sum(mean**2 for mean in means) / (sum(energy) / len(rows_of_text)))
        assert row["size"] == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-3)
        assert row["alike"] == pytest.approx(sum(alike) / len(alike), rel=1e-3)
        if "attention" not in row["layer"]:
            assert (row["scores"], row["sees"], row["heads"]) == (None, None, [])
            continue
        assert len(row["heads"]) == layer.f.n_head
        values = sum(sees, [])
        assert row["sees"] == pytest.approx(sum(values) / len(values), rel=1e-3)
        for head, values in zip(row["heads"], sees, strict=True):
            assert head["sees"] == pytest.approx(sum(values) / len(values), rel=1e-3)
        if not layer.f.query_key:
            assert row["scores"] is None and all(head["scores"] is None for head in row["heads"])
            continue
        assert row["scores"] == pytest.approx(spread(sum(scores, [])), rel=1e-3)
        for head, values in zip(row["heads"], scores, strict=True):
            assert head["scores"] == pytest.approx(spread(values), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("changes", FLAG_SETS, ids=str)
def test_gradient_is_that_of_finite_differences(measured, changes):
    model, windows, rows = measured(N_EMBD=4, **changes)
    model.double()
    loss = xray.compute_loss(model, windows).item()
    step = 1e-4
    for row, layer in zip(rows, model.layers, strict=True):
        slopes = []
        for weight in layer.parameters():
            for n in range(weight.numel()):
                value = weight.view(-1)[n].item()
                weight.view(-1)[n] = value + step
                slopes.append((xray.compute_loss(model, windows).item() - loss) / step)
                weight.view(-1)[n] = value
        size = math.sqrt(sum(slope**2 for slope in slopes) / len(slopes))
        assert row["gradient"] == pytest.approx(size, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("changes", FLAG_SETS, ids=str)
def test_without_is_the_loss_of_a_model_that_lacks_that_part(measured, changes):
    model, windows, rows = measured(N_LAYER=2, **changes)
    loss = find_loss(model, windows)
    for row in rows:
        lacks = copy.deepcopy(model)
        layer = lacks.layers.get_submodule(row["layer"])
        if not layer.residual:
            assert row["without"] is None
        elif layer.pre_norm:
            delattr(lacks.layers, row["layer"])
            assert row["without"] == pytest.approx(find_loss(lacks, windows) - loss, abs=1e-4)
        else:  # the norm after the sum stays
            setattr(lacks.layers, row["layer"], layer.norm)
            assert row["without"] == pytest.approx(find_loss(lacks, windows) - loss, abs=1e-4)
        for n, head in enumerate(row["heads"]):
            lacks = copy.deepcopy(model)
            f = lacks.layers.get_submodule(row["layer"]).f
            channels = slice(n * 8 // f.n_head, (n + 1) * 8 // f.n_head)
            if isinstance(f.projection, torch.nn.Linear):
                f.projection.weight[:, channels] = 0
            else:
                f.value.weight[channels] = 0
            assert head["without"] == pytest.approx(find_loss(lacks, windows) - loss, abs=1e-4)


def test_without_scale_scores_start_sqrt_16_times_as_large():
    scores = []
    for scale in (True, False):
        gpt.SCALE = scale
        windows = torch.randint(65, [4, 65], generator=torch.Generator().manual_seed(0))
        scores.append(xray.xray(gpt.GPT(65), windows)[0]["scores"])
    assert scores[1] / scores[0] == pytest.approx(4.0, abs=0.2)


def test_a_plain_average_sees_half_the_context_or_all_of_it_without_a_mask(measured):
    _, _, rows = measured(QUERY_KEY=False)
    assert rows[0]["sees"] == pytest.approx(3.5)
    _, _, rows = measured(QUERY_KEY=False, CAUSAL=False)
    assert rows[0]["sees"] == pytest.approx(6)


def test_positions_that_are_all_alike_or_cancel_out():
    same = torch.ones(3, 4, 2)
    assert xray.compute_alike(same) == 1
    assert xray.compute_alike(same * torch.tensor([1, -1, 1, -1])[:, None]) == 0


def test_the_attention_that_a_reader_has_edited_is_measured(measured, monkeypatch):
    def only_itself(q, k, v, causal=True, scale=True, flash=True):
        return v

    def itself_and_the_one_before(q, k, v, **options):
        return (v + torch.cat([v[:, :, :1], v[:, :, :-1]], 2)) / 2

    monkeypatch.setattr(gpt, "attention", only_itself)
    _, _, rows = measured()
    assert rows[0]["sees"] == pytest.approx(1)
    monkeypatch.setattr(gpt, "attention", itself_and_the_one_before)
    _, _, rows = measured()
    assert rows[0]["sees"] == pytest.approx((1 + 5 * 2) / 6)


def test_heads_that_a_reader_computes_one_by_one(measured, monkeypatch):
    """As in the lecture: a call of attention for each head, on (B, T, D)."""
    _, _, expected = measured()

    def rotate(x):  # (B, T, D)
        size = x.size(2)
        angle = torch.tensor([[t / 1e4 ** (i / size) for i in range(0, size, 2)] for t in range(6)])
        a, b = x[..., ::2], x[..., 1::2]
        turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return torch.stack(turned, 3).flatten(2)

    def forward(self, x):
        outputs = []
        for n in range(self.n_head):
            channels = slice(n * 8 // self.n_head, (n + 1) * 8 // self.n_head)
            q, k, v = self.query(x), self.key(x), self.value(x)
            q, k, v = q[..., channels], k[..., channels], v[..., channels]
            if self.rotary:
                q, k = rotate(q), rotate(k)
            outputs.append(gpt.attention(q, k, v, **self.options))
        return self.projection(torch.cat(outputs, 2))

    monkeypatch.setattr(gpt.Attention, "forward", forward)
    _, _, rows = measured()
    for row, like in zip(rows, expected, strict=True):
        heads, expected_heads = row.pop("heads"), like.pop("heads")
        assert row == pytest.approx(like, abs=1e-5)
        for head, like_head in zip(heads, expected_heads, strict=True):
            assert head == pytest.approx(like_head, abs=1e-5)


def test_layers_of_a_reader_s_own(measured, monkeypatch):
    class Shift(torch.nn.Module):
        def forward(self, x):
            return x + 1

    model, windows, _ = measured()
    model.layers.add_module("shift", Shift())
    row = xray.xray(model, windows)[-1]
    assert row["layer"] == "shift" and row["size"] > 0 and 0 <= row["alike"] <= 1
    assert [row[key] for key in ("gradient", "scores", "sees", "without")] == [None] * 4
    monkeypatch.delattr(gpt, "attention")  # it is called in the class itself, by another name
    monkeypatch.setattr(gpt.Attention, "forward", lambda self, x: self.value(x))
    rows = xray.xray(model, windows)
    assert rows[0]["sees"] is None and rows[0]["heads"] == [] and rows[0]["without"] is not None
    assert not hasattr(gpt, "attention")


def test_a_model_is_the_same_after_its_xray(measured):
    attention = gpt.attention
    model, windows, rows = measured(DROPOUT=0.5)
    before = copy.deepcopy(model.state_dict())
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert xray.xray(model, windows) == rows
    assert gpt.attention is attention and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# 2. Training.
@pytest.mark.parametrize("changes", [{}, {"DROPOUT": 0.3, "N_LAYER": 1}, {"N_LAYER": 0}], ids=str)
def test_the_pictures_are_of_the_model_that_gpt_py_trains(flags, text, changes):
    flags(STEPS=3, SAMPLE=0, **changes)
    run = xray.train_model(text, {})
    assert os.listdir() == ["input.txt"]
    fresh = gpt.GPT(len(run["vocab"]))
    model, vocab, expected = gpt.main()
    assert (run["name"], run["vocab"], run["STEPS"]) == (expected["name"], vocab, 3)
    ids = gpt.encode(text[len(text) * 9 // 10 :], vocab)
    windows = torch.stack([ids[n : n + 9] for n in range(0, len(ids) - 8, 8)])[:32]
    for title, expected in {"At the start": fresh, "After step 3": model}.items():
        picture = run["pictures"][title]
        assert picture["loss"] == pytest.approx(find_loss(expected, windows), rel=1e-4)
        assert picture["rows"] == xray.xray(expected, windows)


def test_every_flag_and_function_is_put_back(flags, text):
    flags()
    before = dict(vars(gpt))
    xray.train_model(text, {"NORM": False, "STEPS": 1})
    with pytest.raises(gpt.BadInput):
        xray.train_model(text, {"N_HEAD": 3})
    assert vars(gpt) == before
    assert os.listdir() == ["input.txt"]


# 3. The command.
@pytest.fixture
def small(text, monkeypatch):
    """The full model is a small one, and input.txt lies in an otherwise empty folder."""
    for flag, value in {"N_EMBD": 16, "BLOCK_SIZE": 16}.items():
        monkeypatch.setitem(gpt.FULL, flag, value)
        monkeypatch.setattr(gpt, flag, value)


def xray_command(*args):
    """python tests/lab/xray.py with args. Its lines, none of them too wide."""
    status, out, err = start(*args, file=XRAY)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    return out.splitlines()


def table(lines, title, first):
    """The cells of the table under title whose first column is first, by the names of its rows."""
    lines = lines[next(n for n, line in enumerate(lines) if line.startswith(title)) :]
    lines = lines[next(n for n, line in enumerate(lines) if line.split()[:1] == [first]) + 2 :]
    cells = {}
    for line in lines:
        if not line:
            break
        cells[line[:14].rstrip()] = line[14:].split()
    return cells


def test_two_models_side_by_side_and_nothing_is_left_on_disk(small):
    before = everything()
    lines = xray_command("--no-residual", "--n-head=1", "--steps", 1, "--data", "input.txt")
    assert everything() == before
    assert "A  full." in lines
    assert any(line.startswith("B  N_HEAD=1 RESIDUAL=False.") for line in lines)
    text = Path("input.txt").read_text()
    run = xray.train_model(text, {"STEPS": 1})
    other = xray.train_model(text, {"STEPS": 1, "N_HEAD": 1, "RESIDUAL": False})
    for title, picture in run["pictures"].items():
        second = other["pictures"][title]
        assert f"{title}: loss {picture['loss']:.3f} and {second['loss']:.3f}" in lines
        stream, effect = table(lines, title, "size"), table(lines, title, "scores")
        for row, paired in zip(picture["rows"], second["rows"], strict=True):
            cells = [float(cell) for cell in stream[row["layer"]]]
            for n, key in enumerate(["size", "alike", "gradient"]):
                unit = 1000 if key == "gradient" else 1
                assert cells[2 * n] == pytest.approx(unit * row[key], rel=6e-3)
                assert cells[2 * n + 1] == pytest.approx(unit * paired[key], rel=6e-3)
            cells = effect[row["layer"]]
            assert float(cells[4]) == pytest.approx(row["without"], abs=6e-4) and cells[5] == "-"
            if row["heads"]:
                assert float(cells[2]) == pytest.approx(row["sees"], rel=6e-3)
                assert float(cells[3]) == pytest.approx(paired["sees"], rel=6e-3)
            else:
                assert cells[:4] == ["-"] * 4
    assert effect["  head 4"][1::2] == ["-"] * 3 and "-" not in effect["  head 1"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--n-layer=0", "It has no layers, so only its loss can be shown."),
        (
            "--no-attention",
            "No layer calls attention(), so there are no scores and nothing is seen.",
        ),
        ("--no-query-key", "It has no queries and keys, so no scores."),
        (
            "--no-residual",
            "No layer can be left out: it has no residual path, or layers of another kind.",
        ),
        (
            "--no-norm --optimizer=sgd --learning-rate=1e9",
            "Its loss is no longer a number: training diverged.",
        ),
    ],
)
def test_it_says_what_a_model_lacks(small, options, sentence):
    lines = xray_command(*options.split(), "--steps", 3)
    names = " ".join(line.strip() for line in lines[1 : lines.index("")])
    assert names.startswith("A  full. B  ") and names.endswith(f". {sentence}")
    assert "attention3" in table(lines, "After step 3", "scores")


def test_the_full_model_alone(small):
    lines = xray_command("--steps", 1, "--norm", "--n-head", 4)
    assert lines[:2] == ["Training the full model to step 1.", "A  full."]
    assert not any(line.startswith("B") for line in lines)
    assert len(table(lines, "At the start", "size")["attention1"]) == 3


def test_the_smallest_and_largest_numbers_fit_their_columns():
    for value in (0.0, 1e-30, 1.234e-5, 9.9999, 99.999, 123456.0, 1.6e7, 1e30, math.inf, math.nan):
        for column in ("size", "gradient", "without"):
            cell = xray.format_cell({column: value}, column)
            if column != "without" or abs(value) < 1e3:
                assert len(cell) <= 8 and float(cell) is not None


def test_trained_models_from_files(flags, text, small):
    flags(SAMPLE=0)
    gpt.main()
    flags(SAMPLE=0, NORM=False, BLOCK_SIZE=4)
    model, vocab, run = gpt.main(CHECKPOINT="other.pt")
    flags()
    before = everything()
    lines = xray_command("gpt.pt", "other.pt")
    assert everything() == before
    names = " ".join(line.strip() for line in lines[: lines.index("")])
    assert names.startswith("A  gpt.pt: N_HEAD=2 N_LAYER=2 N_EMBD=8 BLOCK_SIZE=8 BATCH_SIZE=4, ")
    assert f"B  other.pt: {run['name']}, trained to step 2." in names
    ids = gpt.encode(text[len(text) * 9 // 10 :], vocab)
    row = xray.xray(model, ids.unfold(0, 5, 4)[:32])[-1]
    size = float(table(lines, "As trained", "size")["feed_forward2"][1])
    assert size == pytest.approx(row["size"], rel=6e-3)
    assert len(table(xray_command("other.pt"), "As trained", "size")["attention1"]) == 3
    assert xray_command("gpt.pt", "--data", "input.txt", "other.pt") == lines
    assert any(line.startswith("One pass, or 8 and 4 over the") for line in lines)
    Path("twice.txt").write_text(text + text)
    first = " ".join(xray_command("gpt.pt", "--data=twice.txt")[:3])
    assert "trained to step 2, on another text than 'input.txt' was" in " ".join(first.split())


@pytest.mark.parametrize(
    "args, message",
    [
        (["--n-head", "3"], "N_EMBD=64 must be a multiple of 2 * N_HEAD=3"),
        (["--n-head", "many"], "invalid int value: 'many'"),
        (["--steps", "0"], "STEPS=0: give 1 or more"),
        (["--sample", "5"], "SAMPLE changes nothing here; leave it out"),
        (["--no-such-part"], "unrecognized arguments: --no-such-part"),
        (["--data", "none.txt"], "'none.txt' cannot be read"),
        (["--block-size", "500"], "DATA='input.txt' is too short for BLOCK_SIZE=500"),
        (["none.pt"], "'none.pt' holds no model of this gpt.py (FileNotFoundError"),
        (["input.txt"], "'input.txt' holds no model"),
        (["gpt.pt", "--device", "abacus"], "DEVICE='abacus' is not here"),
        (["gpt.pt", "gpt.pt", "gpt.pt"], "give one model or two"),
        (["gpt.pt", "--no-norm"], "a trained model has its flags; give no others"),
        (["gpt.pt", "--data", "other.txt"], "gpt.pt does not know 'xyz'"),
        (["gpt.pt", "--data", "short.txt"], "the text is too short for gpt.pt"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_status_2(text, args, message):
    Path("other.txt").write_text("to be xyz " * 100)
    Path("short.txt").write_text("to be")
    gpt.main(**TINY)
    status, out, err = start(*args, file=XRAY)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("xray.py: error: ") and message in err


def test_help_has_an_example_and_fits(text):
    lines = xray_command("--help")
    assert any("python tests/lab/xray.py --no-residual" in line for line in lines)


def test_a_bare_clone_with_edited_code(tmp_path):
    """The gpt.py beside the instrument is measured, an edited one and from any folder."""
    clone = tmp_path / "clone"
    (clone / "tests" / "lab").mkdir(parents=True)
    for name in ("xray.py", "sample.py"):
        shutil.copy(TESTS / "lab" / name, clone / "tests" / "lab")
    source = Path(gpt.__file__).read_text("utf-8")
    before, line, after = source.partition("class Attention(")
    edit = "def attention(q, k, v, **options):\n    return v\n\n\n"  # each sees itself alone
    (clone / "gpt.py").write_text(before + edit + line + after, "utf-8")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "input.txt").write_text(words())
    command = [sys.executable, clone / "tests" / "lab" / "xray.py", "--no-norm", "--steps=1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert table(lines, "After step 1", "scores")["attention1"][2:4] == ["1.00", "1.00"]
    assert os.listdir(folder) == ["input.txt"]
