"""Sample from a model that gpt.py has saved.

    python tests/lab/sample.py                       500 characters from gpt.pt
    python tests/lab/sample.py gpt.pt --prompt "JULIET:" --temperature 0.8
    python tests/lab/sample.py long.pt --length 2000 --seed 2

It prints which run made the model, then the text. A low temperature gives safe text, a high one
wild text; at 0 each character is the likeliest. In a notebook beside gpt.py, whatever the flags:

    import sys; sys.path.append("tests/lab")
    import gpt, sample
    model, vocab, run = sample.load("gpt.pt")
    print(gpt.sample(model, vocab, "JULIET:"))
"""

import argparse
import math
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare clone has gpt.py there

import gpt


def load(path, device="cpu"):
    """The model in the file path in eval mode, its vocabulary and its run. The flags are those it
    was trained with, and gpt's own stay as they are. gpt.BadInput if the file cannot be used."""
    try:
        run, weights = torch.load(path, device).values()
        flags = {flag: run[flag] for flag in gpt.FULL if flag in run}
        gpt.require(flags, "its flags are not known")
        with patch.multiple(gpt, **gpt.FULL | flags):  # a reader's own flag may be newer
            model = gpt.GPT(len(run["vocab"])).to(device)
        model.load_state_dict(weights)
    except Exception as error:
        problem = f"{type(error).__name__}: python gpt.py makes such a file"
        raise gpt.BadInput(f"{path!r} holds no model of this gpt.py ({problem})") from error
    return model.eval(), run["vocab"], run


def find_step(run):
    """The step of the look whose model was kept: the best, perhaps not the last."""
    return max(step for step, _, loss in run["curve"] if loss == run["val_loss"])


def main(checkpoint, prompt, length, temperature, seed):
    """Print the name of the run and a sample. gpt.BadInput for what cannot be used."""
    gpt.require(0 <= length < 2**31, f"--length={length}: give a whole number from 0 on")
    gpt.require(0 <= seed < 2**31, f"--seed={seed}: give a whole number from 0 on")
    good = 0 <= temperature < math.inf
    gpt.require(good, f"--temperature={temperature}: give a number from 0 on")
    model, vocab, run = load(checkpoint)
    unknown = sorted(set(prompt) - set(vocab))
    about = f"--prompt={prompt!r}: the model does not know {unknown}; leave them out"
    gpt.require(not unknown, about)
    print(f"{checkpoint}: {run['name']}, {find_step(run):,} steps, loss {run['val_loss']:.3f}\n")
    with patch.multiple(gpt, SAMPLE=length, SEED=seed):
        print(gpt.sample(model, vocab, prompt, temperature))


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout cannot
        sys.stdout.reconfigure(errors="replace")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sample.py", argparse.SUPPRESS, __doc__, formatter_class=layout, allow_abbrev=False
    )
    about = f"the model [{gpt.CHECKPOINT}]"
    parser.add_argument("checkpoint", nargs="?", default=gpt.CHECKPOINT, help=about)
    parser.add_argument("--prompt", default="", help="how the sample begins [a new line]")
    parser.add_argument("--length", type=int, default=500, help="characters to add [500]")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 or more [1.0]")
    parser.add_argument("--seed", type=int, default=1, help="draws the sample [1]")
    try:
        main(**vars(parser.parse_args()))
    except (gpt.BadInput, KeyboardInterrupt) as error:
        parser.error(str(error) or "stopped")
