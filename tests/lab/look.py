"""Show where each head of a trained model looks: which characters a character attends to.

    python tests/lab/look.py                         gpt.pt, and a line of the play
    python tests/lab/look.py mine.pt "JULIET:"       another model, another text
    python tests/lab/look.py --page heads.html       a page to point at, for a browser
    python tests/lab/look.py --picture heads.png     all weights of all heads

For example, python tests/lab/look.py gpt.pt "to be" prints a row for each head:

    layer.head  distance     sees  what the last character, 'e', attends to
                                   to be
           1.1       2.1     4.15  █▅▄▅▂
           1.2       1.0     1.02  ▁▁▁█▁

The first head looks 2.1 characters back on average. It sees 4.15 characters: exp(entropy) of its
weights, which is 1 where all the weight is on one character. The bars are the weights; a terminal
shows the text in red instead. The largest weight of a row is the brightest. On the page and in the
picture, sees is the mean over all characters of the text.

A text longer than the context is cut: its end is used.
"""

import argparse
import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where gpt.py lies

from sample import find_step, load

import gpt

LINE = "But, soft! what light through yonder windo"
GREY = "#808080"  # can be read on white and on black
MASKED = "#80808080"  # half of it is what lies behind
COLOURS = {
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlesize": 10,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


# 1. The weights.
class Recorder:
    """Stands in for an attention function and keeps the weights of each call on one text."""

    def __init__(self, attention):
        self.attention = attention
        self.weights = []  # (H, T, T) of each call: a row for each query
        self.visible = []  # (H, T, T) of each call: whether the mask lets the query see the key

    def __call__(self, q, k, v, *args, **options):
        one = "look.py needs one call of attention() for all heads, with q, k and v (B, H, T, D)"
        gpt.require(v.dim() == 4, f"{one}; xray.py also takes a call for each head")
        self.weights.append(self.read_off(q, k, v, *args, **options))
        if q is not None:  # all scores alike: only what is masked has no weight
            alike = self.read_off(torch.zeros_like(q), torch.zeros_like(k), v, *args, **options)
            self.visible.append(alike != 0)
        else:
            self.visible.append(self.weights[-1] != 0)
        return self.attention(q, k, v, *args, **options)

    def read_off(self, q, k, v, *args, **options):
        """The weights (H, T, T) of q and k, (1, H, T, D) or None. Only the shape of v matters.

        Attention returns weights · v, which is the weights where v is the identity matrix. A head
        has D channels, so it holds D columns of that matrix, and N copies of the text hold all T.
        """
        _, n_head, length, size = v.shape
        copies = math.ceil(length / size)
        identity = torch.eye(length, copies * size, device=v.device, dtype=v.dtype)  # (T, N D)
        columns = identity.unflatten(1, (copies, 1, size)).permute(1, 2, 0, 3)  # (N, 1, T, D)
        if q is not None:
            q = q.repeat(copies, 1, 1, 1)  # (N, H, T, D)
            k = k.repeat(copies, 1, 1, 1)  # (N, H, T, D)
        columns = columns.repeat(1, n_head, 1, 1)  # (N, H, T, D)
        y = self.attention(q, k, columns, *args, **options)  # (N, H, T, D)
        return y.permute(1, 2, 0, 3).flatten(2)[..., :length].cpu()  # (H, T, T)


@torch.inference_mode()
def record(model, ids):
    """A Recorder of every call of gpt.attention while model, in eval mode, reads ids (T,)."""
    recorder = Recorder(gpt.attention)
    model.eval()
    gpt.attention = recorder
    try:
        model(ids[None].to(model.wte.weight.device))
    finally:
        gpt.attention = recorder.attention
    return recorder


def attention_weights(model, ids):
    """The weights of each attention layer, (H, T, T) with a row for each query, on the CPU.
    ids (T,) are at most BLOCK_SIZE characters. Leaves the model in eval mode."""
    return record(model, ids).weights


def count_seen(weights):
    """How many characters each query sees: exp(entropy) of its weights. (H, T, T) to (H, T)."""
    return torch.special.entr(weights).sum(-1).exp()


# 2. The terminal.
def print_rows(text, recorder):
    """Print a row for each head: what the last character of text attends to."""
    terminal = sys.stdout.isatty() and os.getenv("TERM") != "dumb"
    colour = terminal and not os.getenv("NO_COLOR")
    shown = "".join(c if c.isprintable() else " " for c in text)  # a new line is a space
    rows = []  # what stands left of a row, and its T cells
    if not colour:
        rows.append((31 * " ", list(shown)))
    back = torch.arange(len(text) - 1.0, -1, -1)  # (T), 0 at the last
    for layer, weights in enumerate(recorder.weights, 1):
        sees = count_seen(weights)  # (H, T)
        for head, last in enumerate(weights[:, -1], 1):  # (T)
            name = f"{layer}.{head}"
            left = f"{name:>10}{last @ back:10.1f}{sees[head - 1, -1]:9.2f}  "
            shares = (last / last.max()).clamp(min=0).tolist()  # an edit may have negative ones
            cells = bars(shares)
            if colour:
                cells = shaded(shown, shares)
            rows.append((left, cells))
    print(f"layer.head  distance     sees  what the last character, {text[-1]!r}, attends to")
    width = max(shutil.get_terminal_size().columns - 31, 1)
    for start in range(0, len(text), width):
        if start > 0:
            print()
        for left, cells in rows:
            end = "\033[0m\n" if colour else "\n"
            print(left, *cells[start : start + width], sep="", end=end)


def bars(shares):
    """A bar for each share from 0 to 1."""
    unicode = (sys.stdout.encoding or "").lower() == "utf-8"
    marks = "▁▂▃▄▅▆▇█" if unicode else "_.:-=+*#"
    return [marks[round(7 * share)] for share in shares]


def shaded(text, shares):
    """Each character of text in white on a red as bright as its share from 0 to 1."""
    reds = [round(5 * share) for share in shares]
    return [f"\033[97;48;5;{16 + 36 * red}m{c}" for red, c in zip(reds, text, strict=True)]


# 3. The page.
def write_page(path, title, text, recorder):
    """Write page.html with the weights in it, a page that needs no other file."""
    layers = []
    for weights, visible in zip(recorder.weights, recorder.visible, strict=True):
        heads = []
        for square, seen, sees in zip(weights, visible, count_seen(weights), strict=True):
            head = {
                "mean": round(sees.mean().item(), 2),
                "sees": [round(number, 2) for number in sees.tolist()],  # of each query
                "rows": ten_thousandths(square, seen),
            }
            heads.append(head)
        layers.append(heads)
    data = json.dumps({"title": title, "text": text, "layers": layers}, separators=(",", ":"))
    page = Path(__file__).with_name("page.html").read_text("utf-8")
    page = page.replace("{{data}}", data.replace("<", r"\u003c"))  # no tag can end the script
    Path(path).write_text(page, "utf-8")


def ten_thousandths(weights, visible):
    """The rows of weights (T, T) as whole numbers, None where a key is masked."""
    rows = []
    for row, seen in zip((weights * 10_000).round().int().tolist(), visible.tolist(), strict=True):
        rows.append([weight if see else None for weight, see in zip(row, seen, strict=True)])
    return rows


# 4. The picture.
def write_picture(path, text, recorder):
    """Draw a square for each head, with a row for each query and a column for each key."""
    try:
        import matplotlib
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise gpt.BadInput(f"--picture: {error}; pip install matplotlib") from error

    height = len(recorder.weights)
    width = max(len(weights) for weights in recorder.weights)
    with matplotlib.rc_context(COLOURS):
        figure = Figure(figsize=(2.6 * width + 1, 2.6 * height + 0.8), layout="constrained")
        axes = figure.subplots(height, width, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()  # of a layer with fewer heads some stay so
        for layer, weights in enumerate(recorder.weights):
            shown = weights.masked_fill(~recorder.visible[layer], torch.nan).numpy()  # (H, T, T)
            sees = count_seen(weights).mean(1)  # (H)
            for head, square in enumerate(shown):
                axis = axes[layer, head]
                axis.set_axis_on()
                edges = 0.5, len(text) + 0.5, len(text) + 0.5, 0.5  # the first character is 1
                colours = matplotlib.colormaps["viridis"].with_extremes(bad=MASKED)
                image = axis.imshow(square, colours, PowerNorm(0.5, 0, 1), extent=edges)
                axis.set_title(f"layer {layer + 1}, head {head + 1}: sees {sees[head]:.1f}")
                if len(text) <= 24:
                    label_with(text, axis)
        figure.supxlabel("key: the character that is looked at")
        figure.supylabel("query: the character that looks")
        bar = figure.colorbar(image, ax=axes, label="weight", aspect=40, format="{x:g}")
        bar.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1])
        masked = Patch(facecolor=MASKED, label="masked")
        figure.legend(handles=[masked], loc="outside lower right", frameon=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a character that the font lacks is an empty box
            figure.savefig(path, transparent=True, dpi=120)


def label_with(text, axis):
    """Put the characters of text in place of numbers at both axes."""
    labels = [c if c.isprintable() else "↵" for c in text]
    axis.set_xticks(range(1, len(text) + 1), labels, verticalalignment="baseline")
    axis.set_yticks(range(1, len(text) + 1), labels, verticalalignment="center_baseline")
    axis.tick_params("x", pad=9)


# 5. The command line.
def main(checkpoint, text, page, picture):
    """Print the rows, or write the page and the picture. gpt.BadInput for what cannot be used."""
    if page is not None:
        gpt.require(page.endswith(".html"), f"--page={page!r}: give a name in .html")
    if picture is not None:
        gpt.require(picture.endswith(".png"), f"--picture={picture!r}: give a name in .png")
    model, vocab, run = load(checkpoint)
    if text is None:
        text = "".join(c for c in LINE if c in vocab)
        known = any(map(str.isalpha, text))
        gpt.require(known, f"PROMPT: {checkpoint} knows {vocab[-20:]!r}; give a text of these")
    gpt.require(text, "PROMPT is empty; give a text of a character or more")
    unknown = sorted(set(text[-model.block_size :]) - set(vocab))
    gpt.require(not unknown, f"PROMPT={text!r}: the model does not know {unknown}; leave them out")
    title = f"{os.path.basename(checkpoint)}: {run['name']}, {find_step(run):,} steps"
    if len(text) > model.block_size:
        cut = f"the last {model.block_size} of {len(text):,} characters, as many as the context has"
        print(f"Shown are {cut}.")
        title = f"{title}; {cut}"
        text = text[-model.block_size :]
    recorder = record(model, gpt.encode(text, vocab))
    if not recorder.weights:
        print(f"{checkpoint}: no layer calls attention(), so there is nothing to see")
        return
    for weights in recorder.weights:
        some = weights.isfinite().all() and (weights.amax(-1) > 0).all()
        gpt.require(some, f"{checkpoint}: a character without weights, all masked or no numbers")
    if page is None and picture is None:
        print_rows(text, recorder)
    if page is not None:
        write_page(page, title, text, recorder)
        print(f"The page is in {page}; open it in a browser.")
    if picture is not None:
        write_picture(picture, text, recorder)
        print(f"The picture is in {picture}.")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout cannot
        sys.stdout.reconfigure(errors="replace")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("look.py", argparse.SUPPRESS, __doc__, formatter_class=form)
    about = f"a model that gpt.py saved [{gpt.CHECKPOINT}]"
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", default=gpt.CHECKPOINT, help=about
    )
    parser.add_argument("text", metavar="PROMPT", nargs="?", help=f"the text [{LINE!r}]")
    parser.add_argument("--page", metavar="HTML", help="write a page for a browser here")
    parser.add_argument("--picture", metavar="PNG", help="draw a picture here; needs matplotlib")
    try:
        main(**vars(parser.parse_args()))
    except (gpt.BadInput, OSError, KeyboardInterrupt) as error:
        parser.error(str(error) or "stopped")
