"""Show where each head of a saved model looks: what a text's last character attends to.

    python tests/look.py                        gpt.pt, and a line of the play
    python tests/look.py mine.pt "JULIET:"      another model, another text

A row for each head, called layer.head, both counted from 1: the mean distance it looks back (0: at
the last character itself), the entropy of its weights in nats (0: all on one character), and the
text shaded by them; outside a terminal, or with NO_COLOR, bars stand under the text instead. The
row's largest weight is the brightest. Of a text longer than the context the end is used.
"""

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt  # noqa: E402

LINE = "But, soft! what light through yonder windo"


def load(path):
    """The model in the file path, in eval mode on the CPU, and its vocabulary; sets gpt's flags.
    ValueError if it is not what gpt.py saves."""
    if not os.path.exists(path):
        raise ValueError(f"there is no file {path!r}; python gpt.py trains a model, gpt.pt")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            gpt.main({"LOAD": path, "STEPS": 0, "SAMPLE": 0, "DEVICE": "cpu"})
    except ValueError:
        raise ValueError(f"{path}: not a model of this gpt.py; train one: python gpt.py") from None
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = gpt.GPT(len(saved["vocab"])).eval()
    model.load_state_dict(saved["weights"])
    return model, saved["vocab"]


@torch.inference_mode()
def attention_weights(model, ids):
    """The weights of each attention layer, (H, T, T), for ids (T,): a row for each query."""
    with mock.patch.object(gpt, "attention", wraps=gpt.attention) as calls:
        model(ids[None])
    eye = torch.eye(len(ids)).expand(1, gpt.N_HEAD, -1, -1)  # (1, H, T, T), as v
    return [gpt.attention(q, k, eye)[0] for (q, k, _), _ in calls.call_args_list]


def look(path, text=None):
    """The lines to print for the model in the file path and a text, or what it knows of LINE.
    ValueError for a file or a text that can't be."""
    model, vocab = load(path)
    if not (gpt.ATTENTION and gpt.N_LAYER):
        return [f"{path}: a model without attention, so there is nothing to see"]
    if text is None and not (text := "".join(c for c in LINE if c in vocab)):
        raise ValueError(f"{path}: trained on another alphabet; give a text in it: {vocab[:20]!r}")
    if not text:
        raise ValueError("the text is empty; give one of a character or more")
    text = text[-gpt.BLOCK_SIZE :]
    if unknown := sorted(set(text) - set(vocab)):
        raise ValueError(f"{text[:20]!r}: {path} doesn't know {unknown[:20]}; leave them out")
    color = sys.stdout.isatty() and os.getenv("TERM") != "dumb" and not os.getenv("NO_COLOR")
    marks = [f"\033[97;48;5;{16 + 36 * r}m" for r in range(6)] if color else gpt.BARS
    shown = "".join(c if c.isprintable() else " " for c in text)  # a new line is a space
    lines = ["layer.head  distance  entropy  what the last character attends to"]
    lines += [] if color else [" " * 31 + shown]
    back = torch.arange(len(text) - 1.0, -1, -1)  # (T,), 0 at the last
    for layer, heads in enumerate(attention_weights(model, gpt.encode(text, vocab)), 1):
        for head, w in enumerate(heads[:, -1], 1):  # (T,)
            entropy = torch.special.entr(w).sum()
            row = f"{f'{layer}.{head}':>10}{w @ back:10.1f}{entropy:9.2f}  "
            levels = (w / w.max() * (len(marks) - 1)).round().int().tolist()
            row += "".join(marks[n] + c * color for n, c in zip(levels, shown, strict=True))
            lines.append(row + "\033[0m" * color)
    return lines


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    how = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("look.py", argparse.SUPPRESS, **how)
    parser.add_argument("path", nargs="?", default="gpt.pt", help="a model that gpt.py saved")
    parser.add_argument("text", nargs="?", help=f"[{LINE!r}]")
    try:
        print("\n".join(look(**vars(parser.parse_args()))))
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
