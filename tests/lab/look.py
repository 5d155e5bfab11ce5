"""Show where each head of a saved model looks: what a text's last character attends to.

    python tests/look.py                        gpt.pt, and a line of the play
    python tests/look.py mine.pt "JULIET:"      another model, another text

A row for each head, called layer.head, both counted from 1: the mean distance it looks back (0: at
the last character itself), the entropy of its weights in nats (0: all on one character), and the
text shaded by them; outside a terminal, or with NO_COLOR, bars stand under the text instead. The
row's largest weight is the brightest. A text wider than the terminal is shown in pieces, each with
a row for every head. Of a text longer than the context the end is used.
"""

import argparse
import os
import shutil
import sys

import torch

import gpt

LINE = "But, soft! what light through yonder windo"


def load(path):
    """The model in the file path, in eval mode on the CPU, and its vocabulary; sets gpt's flags.
    ValueError if it is not what gpt.py saves."""
    if not os.path.exists(path):
        raise ValueError(f"there is no file {path!r}; python gpt.py trains a model, gpt.pt")
    try:
        flags, vocab, weights = torch.load(path, "cpu")
        vars(gpt).update(flags)
        model = gpt.GPT(len(vocab)).eval()
        model.load_state_dict(weights)
    except Exception:
        raise ValueError(f"{path}: not a model of this gpt.py; train one: python gpt.py") from None
    return model, vocab


@torch.inference_mode()
def attention_weights(model, ids):
    """The weights of each attention layer, (H, T, T), for ids (T,): a row for each query.

    A head returns weights · v. Given v of 1 for one character and 0 for the others, it returns the
    weights on that one. So its D channels tell those on D characters, and N texts those on all T.
    """
    model.eval()
    ids = ids.to(model.wte.weight.device)
    layers = [layer.f for layer in model.layers if isinstance(layer.f, gpt.Attention)]
    inputs, outputs = [], []
    hooks = [f.register_forward_pre_hook(lambda _, x: inputs.extend(x)) for f in layers]
    model(ids[None])  # sets gpt's flags, too
    for hook in hooks:
        hook.remove()
    size = gpt.N_EMBD // gpt.N_HEAD
    v = torch.eye(len(ids), -(-len(ids) // size) * size, device=ids.device)  # (T, N D)
    v = v.unflatten(1, (-1, size)).transpose(0, 1).repeat(1, 1, gpt.N_HEAD)  # (N, T, C)
    for f, x in zip(layers, inputs, strict=True):
        hooks = [
            f.c_attn.register_forward_hook(
                lambda _, x, y: torch.cat([y[..., : -gpt.N_EMBD], v], 2)
            ),
            f.c_proj.register_forward_pre_hook(lambda _, y: outputs.extend(y)),
        ]
        f(x.expand(len(v), -1, -1))
        for hook in hooks:
            hook.remove()
    outputs = [y.unflatten(2, (-1, size)).permute(2, 1, 0, 3) for y in outputs]  # (H, T, N, D)
    return [y.flatten(2)[..., : len(ids)].cpu() for y in outputs]


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
    unicode = (sys.stdout.encoding or "").lower() == "utf-8"
    marks = "▁▂▃▄▅▆▇█" if unicode else "_.:-=+*#"
    if color:
        marks = [f"\033[97;48;5;{16 + 36 * red}m" for red in range(6)]
    shown = "".join(c if c.isprintable() else " " for c in text)  # a new line is a space
    back = torch.arange(len(text) - 1.0, -1, -1)  # (T,), 0 at the last
    rows = [] if color else [(31 * " ", shown)]  # what stands before a row, and its T cells
    for layer, heads in enumerate(attention_weights(model, gpt.encode(text, vocab)), 1):
        for head, w in enumerate(heads[:, -1], 1):  # (T,)
            start = f"{f'{layer}.{head}':>10}{w @ back:10.1f}{torch.special.entr(w).sum():9.2f}  "
            levels = (w / w.max() * (len(marks) - 1)).round().int().tolist()
            rows.append((start, [marks[n] + c * color for n, c in zip(levels, shown, strict=True)]))
    lines = [f"layer.head  distance  entropy  what the last character, {text[-1]!r}, attends to"]
    width = max(shutil.get_terminal_size().columns - 31, 1)
    for left in range(0, len(text), width):
        lines += [""] if left else []
        for start, cells in rows:
            lines.append(start + "".join(cells[left : left + width]) + "\033[0m" * color)
    return lines


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    how = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("look.py", argparse.SUPPRESS, **how)
    parser.add_argument("path", nargs="?", default="gpt.pt", help="a model that gpt.py saved")
    parser.add_argument("text", nargs="?", help=f"[{LINE!r}]")
    try:
        print("\n".join(look(**vars(parser.parse_args()))))
    except ValueError as error:
        parser.error(str(error))
