"""X-ray what each layer of a model does, beside the full model.

    python tests/lab/xray.py --no-residual           any flags of gpt.py
    python tests/lab/xray.py --n-head 1 --steps 500  200 steps unless given
    python tests/lab/xray.py gpt.pt other.pt         one or two trained models

It trains the full model, A, and the one with your flags, B, and shows both at
the start and after training. For example, --no-scale shows at the start

                          scores              sees
                      A        B        A        B
    attention1    0.986     3.94     42.7     5.91

Without 1/sqrt(D) scores are four times as large, so each character looks at 6
characters instead of 43.

All flags of python gpt.py --help may be given, also --steps, --seed and --data.
It measures on up to 32 windows of validation text and keeps nothing on disk.
In a notebook beside gpt.py, the numbers come as dictionaries, one a layer:

    import sys; sys.path.append("tests/lab")
    import gpt, sample, xray
    model, vocab, run = sample.load("gpt.pt")
    ids = gpt.encode(gpt.read_text()[-5000:], vocab)
    rows = xray.xray(model, xray.cut_windows(ids, model.block_size))
"""

import argparse
import contextlib
import inspect
import io
import math
import os
import sys
import tempfile
import textwrap
import zlib
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare clone has gpt.py there

from sample import find_step, load

import gpt

STREAM = {  # the columns of the two tables, and what they mean
    "size": "root mean square of what leaves the layer, with its residual path",
    "alike": "the share of it that all positions have in common, 0 to 1",
    "gradient": "of the loss at its weights: root mean square, in thousandths",
}
EFFECT = {
    "scores": "standard deviation of the scores that softmax turns into weights",
    "sees": "how many characters a query looks at; plain average: half the context",
    "without": "how much the loss rises if the layer or the head gives only zeros",
}
START = "At the start"  # the title of the picture before training
WIDTH = 80


# 1. Measuring.
class Recorder:
    """A forward hook that keeps what a module was given and what it returned."""

    def __call__(self, module, inputs, output):
        self.inputs = inputs
        self.output = output


class Probe:
    """Stands in for gpt.attention: keeps its calls, and sets the output of one head to 0, of those
    counted from 0 over all calls. v may be (N, H, T, D), or (N, T, D) with a call for each head."""

    def __init__(self, attention, silent=None):
        self.attention = attention
        self.silent = silent
        self.calls = []
        self.n_head = 0

    def __call__(self, *args, **options):
        call = inspect.signature(self.attention).bind(*args, **options)
        call.apply_defaults()
        self.calls.append(call)
        y = self.attention(*args, **options).clone()
        heads = y.view(len(y), -1, *y.shape[-2:])  # (N, H, T, D), the same memory
        for head in heads.unbind(1):
            if self.n_head == self.silent:
                head.zero_()
            self.n_head += 1
        return y


def compute_loss(model, windows):
    """Mean cross-entropy in nats a character of windows (N, T + 1)."""
    logits = model(windows[:, :-1])  # (N, T, V)
    return F.cross_entropy(logits.mT, windows[:, 1:])


def compute_alike(stream):
    """|mean over t|² / mean over t of |x|², mean over the texts of a stream (N, T, C)."""
    common = stream.mean(1).square().sum(1)  # (N)
    energy = stream.square().sum(2).mean(1)  # (N)
    return (common / energy).mean().item()


def compute_gradient(loss, layer):
    """Root mean square of the loss's gradient over a layer's parameters. None if it has none."""
    weights = list(layer.parameters())
    if not weights:
        return None
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    gradients = torch.autograd.grad(loss, weights, **options)
    values = torch.cat([gradient.flatten() for gradient in gradients])
    return values.cpu().double().square().mean().sqrt().item()


def compute_scores(call):
    """The scores QKᵀ/√D of a call that the mask leaves, (N, H, pairs)."""
    q, k, v = call.args[:3]
    scores = q @ k.mT  # (N, H, T, T)
    if call.arguments.get("scale", True):
        scores = scores * v.size(-1) ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=v.device)  # (T, T)
    if call.arguments.get("causal", True):
        seen = seen.tril()
    scores = scores[..., seen]  # (N, H, pairs)
    return scores.view(len(v), -1, scores.size(-1))


def compute_sees(call, attention):
    """exp of the entropy of each query's weights in a call, (N, H, T).

    attention(q, k, v) is weights · v. With the columns of an identity matrix in place of v it
    returns the weights, D columns at a time: v keeps its shape, since the scale depends on D.
    """
    v = call.args[2]  # (N, H, T, D)
    length, size = v.shape[-2:]
    pieces = math.ceil(length / size)
    identity = torch.eye(length, pieces * size, dtype=v.dtype, device=v.device)  # (T, T or more)
    entropy = torch.zeros_like(v[..., 0])  # (N, H, T)
    for columns in identity.split(size, 1):  # (T, D)
        columns = columns.expand_as(v).contiguous()  # (N, H, T, D)
        weights = attention(*call.args[:2], columns, *call.args[3:], **call.kwargs)  # (N, H, T, D)
        entropy = entropy + torch.special.entr(weights).sum(-1)  # (N, H, T)
    return entropy.exp().view(len(v), -1, length)


def loss_with(model, windows, layer, output):
    """The loss if layer returned this output."""
    with layer.register_forward_hook(lambda *call: output):
        return compute_loss(model, windows).item()


def bypass(layer, inputs):
    """What a layer returns if its attention or feed-forward gives 0. None if nothing of its input
    is left, as without a residual path, or if it is no gpt.Sublayer."""
    if not hasattr(layer, "f"):
        return None
    with layer.f.register_forward_hook(lambda f, x, y: torch.zeros_like(y)):
        output = layer(*inputs)  # (N, T, C)
    if torch.equal(output, output[:1, :1].expand_as(output)):
        return None
    return output


def xray_attention(model, windows, layer, inputs, loss):
    """The values scores, sees and heads of xray for a layer that is given these inputs."""
    attention = getattr(gpt, "attention", None)
    probe = Probe(attention)
    with patch.object(gpt, "attention", probe, create=True):
        layer(*inputs)
    row = {"scores": None, "sees": None, "heads": []}
    if not probe.calls:
        return row
    sees = torch.cat([compute_sees(call, attention) for call in probe.calls], 1)  # (N, H, T)
    row["sees"] = sees.mean().item()
    for n in range(probe.n_head):
        with patch.object(gpt, "attention", Probe(attention, silent=n)):
            output = layer(*inputs)  # (N, T, C)
        without = loss_with(model, windows, layer, output) - loss
        head = {"scores": None, "sees": sees[:, n].mean().item(), "without": without}
        row["heads"].append(head)
    if probe.calls[0].args[0] is not None:
        scores = torch.cat([compute_scores(call) for call in probe.calls], 1)  # (N, H, pairs)
        row["scores"] = scores.std(correction=0).item()
        for n, head in enumerate(row["heads"]):
            head["scores"] = scores[:, n].std(correction=0).item()
    return row


def xray(model, windows):
    """What each layer of model does on windows (N, T + 1) of ids, without dropout.

    Returns a dictionary for each child of model.layers. Its values are plain numbers:

    layer     the name of the child
    size      root mean square of the stream after it
    alike     |mean over t|² / mean over t of |x|² of that stream x, mean over the texts
    gradient  root mean square of the loss's gradient over its parameters; None if it has none
    without   rise of the loss, in nats a character, if its attention or feed-forward gives 0; None
              without a residual path
    scores    standard deviation of the scores that are not masked, after scaling; None without
              queries and keys
    sees      exp of the entropy of a query's weights, mean over queries; None without attention
    heads     a list with scores, sees and without of each head; empty without attention
    """
    was_training = model.training
    model.eval()
    windows = windows.to(next(model.parameters()).device)
    layers = dict(model.layers.named_children())
    recorders = {name: Recorder() for name in layers}
    rows = []
    with torch.enable_grad(), contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(recorders[name]))
        loss = compute_loss(model, windows)
    for name, layer in layers.items():
        inputs, stream = recorders[name].inputs, recorders[name].output
        gradient = compute_gradient(loss, layer)
        with torch.no_grad():
            without = None
            bypassed = bypass(layer, inputs)
            if bypassed is not None:
                without = loss_with(model, windows, layer, bypassed) - loss.item()
            row = {
                "layer": name,
                "size": stream.square().mean().sqrt().item(),
                "alike": compute_alike(stream),
                "gradient": gradient,
                "without": without,
            }
            rows.append(row | xray_attention(model, windows, layer, inputs, loss.item()))
    model.train(was_training)
    return rows


# 2. Training and loading, by gpt.py's own functions.
def cut_windows(ids, length):
    """Windows (N, T + 1) of ids, side by side: 32, or less where T² numbers a head are many."""
    count = min(32, max(1, 2**23 // length**2))
    return ids.unfold(0, length + 1, length)[:count]


@torch.no_grad()
def compare_prefixes(model, ids):
    """The largest difference between the logits of one pass over ids (T,), and those that a pass
    over each prefix alone gives its last character."""
    together = model(ids[None])[0]  # (T, V)
    alone = [model(ids[None, :end])[0, -1] for end in range(1, len(ids) + 1)]
    return (together - torch.stack(alone)).abs().max().item()


@torch.no_grad()
def take_picture(model, windows):
    """The loss, the rows of xray and the difference of compare_prefixes, as a dictionary."""
    loss = compute_loss(model.eval(), windows).item()
    prefixes = compare_prefixes(model, windows[0, :-1])
    return {"loss": loss, "rows": xray(model, windows), "prefixes": prefixes}


def watch(train):
    """gpt.train that also takes pictures before and after training, into run["pictures"]."""

    def watched(model, train_ids, val_ids, run):
        windows = cut_windows(val_ids, model.block_size)
        start = take_picture(model, windows)
        model = train(model, train_ids, val_ids, run)
        run["pictures"] = {
            START: start,
            f"After step {run['STEPS']}": take_picture(model, windows),
        }
        return model

    return watched


def keep_last(model, best, train_ids, val_ids, step, run):
    """Stands in for gpt.look: evaluates, writes and prints nothing, and keeps the last model."""
    best.load_state_dict(model.state_dict())
    run["val_loss"] = math.inf  # for the table, which nobody sees


@contextlib.contextmanager
def no_traces():
    """Work in a temporary folder, with gpt.py's printing silenced."""
    folder = os.getcwd()
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(temporary)
        try:
            yield
        finally:
            os.chdir(folder)


def read_text(flags):
    """The text of DATA, as gpt.py reads it."""
    with patch.object(gpt, "DATA", flags.get("DATA", gpt.DATA)):
        return gpt.read_text()


def train_model(text, flags):
    """The run of a model trained on text with these flags, with its pictures."""
    with (
        patch.object(gpt, "train", watch(gpt.train)),
        patch.object(gpt, "look", keep_last),
        patch.object(gpt, "read_text", lambda: text),
        no_traces(),
    ):
        _, _, run = gpt.main(**flags | {"CHECKPOINT": "gpt.pt", "SAMPLE": 0})
    return run


def train_models(flags):
    """The runs of the full model and of the one with flags; of one model if they are the same."""
    text = read_text(flags)
    full = flags | gpt.FULL
    other = {flag: getattr(gpt, flag) for flag in gpt.FULL} | flags
    if other == full:
        print(f"Training the full model to step {flags['STEPS']}.", flush=True)
        return [train_model(text, full)]
    print(f"Training two models to step {flags['STEPS']}.", flush=True)
    run = train_model(text, other)  # first, since its flags may be bad
    return [train_model(text, full), run]


def load_model(path, text, flags):
    """The run of the model in the file path, with its picture on text."""
    model, vocab, run = load(path, flags.get("DEVICE", gpt.DEVICE))
    unknown = "".join(sorted(set(text) - set(vocab)))
    gpt.require(not unknown, f"{path} does not know {unknown[:20]!r}; give its text by --data")
    ids = gpt.encode(text, vocab)[len(text) * 9 // 10 :]  # the validation text
    gpt.require(len(ids) > model.block_size, f"the text is too short for {path}; give its --data")
    windows = cut_windows(ids.to(next(model.parameters()).device), model.block_size)
    name = f"{path}: {run['name']}, trained to step {find_step(run)}"
    if run["data"] != f"{zlib.crc32(text.encode()):08x}":
        name += f", on another text than {run['DATA']!r} was; give that by --data"
    return run | {"name": name, "pictures": {"As trained": take_picture(model, windows)}}


def load_models(paths, flags):
    """The runs of the models in one or two files, with their pictures on the text of DATA."""
    gpt.require(len(paths) <= 2, "give one model or two")
    gpt.require(flags.keys() <= {"DATA", "DEVICE"}, "a trained model has its flags; give no others")
    device = flags.get("DEVICE", gpt.DEVICE)
    gpt.require(device in gpt.DEVICES, f"DEVICE={device!r} is not here; give one of {gpt.DEVICES}")
    text = read_text(flags)
    return [load_model(path, text, flags) for path in paths]


# 3. Printing.
def describe(run):
    """What a model lacks to be X-rayed in full, a sentence each."""
    picture = list(run["pictures"].values())[-1]
    rows = picture["rows"]
    if not rows:
        return ["It has no layers, so only its loss can be shown."]
    lacks = []
    if all(row["sees"] is None for row in rows):
        lacks.append("No layer calls attention(), so there are no scores and nothing is seen.")
    elif all(row["scores"] is None for row in rows):
        lacks.append("It has no queries and keys, so no scores.")
    if all(row["without"] is None for row in rows):
        lacks.append(
            "No layer can be left out: it has no residual path, or layers of another kind."
        )
    if not math.isfinite(picture["loss"]):
        lacks.append("Its loss is no longer a number: training diverged.")
    return lacks


def format_number(value):
    """Three digits or more, with an exponent only where there is no room."""
    if 100 <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")


def format_cell(row, column):
    """The text of one value, "-" where there is none."""
    value = row.get(column)
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if column == "without":
        return f"{value:+.3f}"
    if column == "gradient":
        return format_number(value * 1000)  # in thousandths
    return format_number(value)


def print_table(pictures, columns, heads):
    """A line for each layer and, if heads, each head. Every column once for each of the models."""
    tables = []  # the rows of each model by layer and head, head 0 for the layer
    for picture in pictures:
        table = {}
        for row in picture["rows"]:
            table[row["layer"], 0] = row
            if heads:
                table |= {(row["layer"], n): head for n, head in enumerate(row["heads"], 1)}
        tables.append(table)
    keys = list(dict.fromkeys(key for table in tables for key in table))
    layers = list(dict.fromkeys(layer for layer, _ in keys))
    keys.sort(key=lambda key: (layers.index(key[0]), key[1]))
    letters = "".join(f"{letter:>9}" for letter in "AB"[: len(tables)])
    print()
    print(" " * 14 + "".join(f"{column:>{len(letters)}}" for column in columns))
    print(" " * 14 + letters * len(columns))
    for layer, head in keys:
        label = f"  head {head}" if head else layer
        rows = [table.get((layer, head), {}) for table in tables]
        cells = [format_cell(row, column) for column in columns for row in rows]
        print(f"{label:14}" + "".join(f"{cell:>9}" for cell in cells))


def print_runs(runs):
    """One run, or two side by side: what they are, what the columns say, and the tables."""
    for letter, run in zip("AB", runs, strict=False):
        text = " ".join([f"{run['name']}.", *describe(run)])
        print(textwrap.fill(text, WIDTH, initial_indent=f"{letter}  ", subsequent_indent="   "))
    print()
    for column, meaning in (STREAM | EFFECT).items():
        print(f"{column:10}{meaning}")
    for title in runs[0]["pictures"]:
        pictures = [run["pictures"][title] for run in runs]
        losses = " and ".join(f"{picture['loss']:.3f}" for picture in pictures)
        print(f"\n{title}: loss {losses}")
        prefixes = " and ".join(f"{picture['prefixes']:.2g}" for picture in pictures)
        length = " and ".join(dict.fromkeys(str(run["BLOCK_SIZE"]) for run in runs))
        print(f"One pass, or {length} over the prefixes: logits differ by {prefixes}")
        if any(picture["rows"] for picture in pictures):
            print_table(pictures, STREAM, heads=False)
            print_table(pictures, EFFECT, heads=title != START)


# 4. The command line.
def main(argv):
    """Print what the command line asks for. Bad input ends the program with status 2."""
    parser = argparse.ArgumentParser(
        "xray.py",
        argparse.SUPPRESS,
        __doc__,
        parents=[gpt.parser],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,  # the flags of gpt.py bring it
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="*", help="one or two models that gpt.py has saved")
    flags = vars(parser.parse_intermixed_args(argv))  # a path may follow a flag
    paths = flags.pop("paths")
    try:
        for flag in ("CHECKPOINT", "SAMPLE"):
            gpt.require(flag not in flags, f"{flag} changes nothing here; leave it out")
        if paths:
            print_runs(load_models(paths, flags))
        else:
            print_runs(train_models({"STEPS": 200} | flags))
    except (gpt.BadInput, KeyboardInterrupt) as error:
        parser.error(str(error) or "stopped before there was anything to show")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout cannot
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    main(sys.argv[1:])
