"""Train the full model and every deletion, several seeds each, and print one table of them all.

    python tests/deletions.py                       a seed each
    python tests/deletions.py --seeds 3             seeds 1, 2 and 3
    python tests/deletions.py --steps 500 --n-embd 32    all other flags go to every run
    python tests/deletions.py --ladder              from the bigram to the GPT in nine runs instead
    python tests/deletions.py --other-way   twice each size, ReLU and post-norm instead
    python tests/deletions.py --plot curves.png     draw what runs.jsonl holds; train nothing
    python tests/deletions.py --ladder --plot ladder.png    its nine rungs alone

It reads the text and adds to runs.jsonl in the current folder, as gpt.py does, but keeps no model
and samples nothing. What runs.jsonl holds already is not run again, so what was stopped, by Ctrl-C
or worse, goes on where it was. A picture shows the runs of one text, code, size and number of
steps, those of which there are most.

On the ladder each rung adds one thing to the rung before. Positions come with the queries and keys,
as only those can tell them apart: learned at first, rotary at last. The bigram is that of the
deletions, with its norm, for without one a matrix that reads and writes characters is no bigram.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import tempfile
import textwrap
from pathlib import Path

import numpy as np

import gpt

OTHER = {"N_HEAD": [1], "OPTIMIZER": ["sgd"], "N_LAYER": [1, 0], "BFLOAT16": []}
CUTS = [{}]  # the full model, then every part's other settings in the order of the flags
for flag, value in gpt.FULL.items():
    CUTS += [{flag: v} for v in OTHER.get(flag, [not value] if type(value) is bool else [])]

LADDER = {"bigram: the last character alone": {"N_LAYER": 0}}  # titles, and what is not yet there
off = dict.fromkeys("POSITION ROTARY NORM RESIDUAL MLP QUERY_KEY PROJECTION".split(), False)
off |= {"N_HEAD": 1, "N_LAYER": 1}
for title, added in {
    "+ the plain average of the past, no norm": [],
    "+ queries and keys, learned positions": ["QUERY_KEY", "POSITION"],
    "+ several heads": ["N_HEAD"],
    "+ projection, feed-forward": ["PROJECTION", "MLP"],
    "+ residual": ["RESIDUAL"],
    "+ norm": ["NORM"],
    "+ three blocks": ["N_LAYER"],
    "+ rotary positions, the full model": ["ROTARY"],
}.items():
    off = {flag: value for flag, value in off.items() if flag not in added}
    LADDER[title] = off

OTHER_WAY = {
    "full": {},
    "twice the width": {"N_EMBD": 2 * gpt.FULL["N_EMBD"]},
    "twice the layers": {"N_LAYER": 2 * gpt.FULL["N_LAYER"]},
    "twice the context": {"BLOCK_SIZE": 2 * gpt.FULL["BLOCK_SIZE"]},
    "ReLU": {"GELU": False},
    "post-norm": {"PRE_NORM": False},
}

SIZES = ["N_EMBD", "BLOCK_SIZE", "BATCH_SIZE"]
KEYS = {"name", "seed", "flags", "code", "data", "steps", "val_loss", "curve", "seconds"}
GREY, BLUE = "#808080", "#4f7df3"  # these and all colours below can be read on white and on black
COLOURS = "#e5484d #a17c00 #0d9488 #d6409f #3a9a3a #a05bf0".split()
RAINBOW = "#a05bf0 #4f7df3 #0e8fc0 #0d9488 #3a9a3a #a17c00 #d9660a #e5484d #d6409f".split()


def name(flags):
    """What gpt.py calls a run with these flags."""
    differs = [flag for flag, value in gpt.FULL.items() if flags.get(flag, value) != value]
    return " ".join(f"{flag}={flags[flag]!r}" for flag in differs) or "full"


def recorded():
    """The runs in runs.jsonl, without lines that are no whole record."""
    path = Path("runs.jsonl")
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            run = json.loads(line)
            if type(run) is dict and run.keys() >= KEYS:
                yield run


def sweep(cuts, seeds, given):
    """Run the cuts on top of the flags given with so many seeds, from SEED on, but for those that
    runs.jsonl holds. Returns the records of all that are finished, by name and seed."""
    vars(gpt).update(gpt.FULL | given)
    data = hashlib.sha256(gpt.read_text().encode()).hexdigest()[:8]
    like = dict(steps=gpt.STEPS, data=data, code=gpt.CODE).items()
    done = {(run["name"], run["seed"]): run for run in recorded() if like <= run.items()}
    plan = [
        (gpt.FULL | given | cut, given.get("SEED", 1) + n) for n in range(seeds) for cut in cuts
    ]
    plan = {(name(flags), seed): flags | {"SEED": seed} for flags, seed in plan}
    done = {key: run for key, run in done.items() if key in plan}
    left = [key for key in plan if key not in done]
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:
        how = dict(CHECKPOINT=f"{folder}/gpt.pt", SAMPLE=0, PROMPT="")
        for n, key in enumerate(left):
            minutes = sum(run["seconds"] for run in done.values()) / 60 / max(len(done), 1)
            when = f", about {minutes * (len(left) - n):.0f} minutes" if done else ""
            print(f"{len(left) - n} of {len(plan)} runs left{when}; now {key[0]}", flush=True)
            with contextlib.redirect_stdout(io.StringIO()):
                _, _, run = gpt.main(**plan[key] | how)
            if run["steps"] < gpt.STEPS:  # Ctrl-C: it is recorded, but is no part of the sweep
                break
            done[key] = run
    return done


def climb(done, given):
    """Print the ladder's table of the finished runs: mean losses, each less the one before."""
    print("\n    loss  change")
    before = math.nan
    for title, off in LADDER.items():
        want = name(gpt.FULL | given | off)
        if losses := [run["val_loss"] for (other, _), run in done.items() if other == want]:
            loss = np.mean(np.array(losses, float))  # nan where a seed diverged
            change = "" if np.isnan(before) else f"{loss - before:+.3f}"
            print(f"{loss:8.3f}{change:>8}  {title}")
            before = loss


def curves(chosen):
    """Of the runs that can be compared, those of which runs.jsonl holds most: what they share, how
    many seeds, and of each name its steps and its mean losses. Those of LADDER or OTHER_WAY alone
    under their titles, or else all of one size but the ladder's."""
    rungs = {name(gpt.FULL | off): title for title, off in (chosen or LADDER).items()}
    groups = {}
    for run in recorded():
        flags = gpt.FULL | run["flags"]
        sizes = {flag: flags[flag] for flag in SIZES}
        if chosen is OTHER_WAY:
            sizes = {}
        part = name(flags | {flag: gpt.FULL[flag] for flag in sizes})
        if part in rungs if chosen else part in map(name, CUTS) or part not in rungs:
            key = run["data"], run["code"], run["steps"], name(sizes)
            rows = {step: loss for step, _, loss in run["curve"]}
            groups.setdefault(key, {})[rungs[part] if chosen else part, run["seed"]] = rows
    if not groups:
        raise ValueError("runs.jsonl holds no such run; train one, without --plot")
    key, group = max(reversed(groups.items()), key=lambda item: len(item[1]))
    means = {}
    for part in {part for part, _ in group}:
        seeds = [rows for (other, _), rows in group.items() if other == part]
        steps = [step for step in seeds[0] if all(step in rows for rows in seeds)]
        losses = np.array([[rows[step] for step in steps] for rows in seeds], float)
        means[part] = steps, losses.mean(0)
    return key, len({seed for _, seed in group}), means


def plot(path, chosen):
    """Draw the curves of runs.jsonl into the file path. Returns the figure."""
    from matplotlib.figure import Figure

    (data, _, _, sizes), seeds, means = curves(chosen)
    wild = {part for part, (_, losses) in means.items() if not np.isfinite(losses).all()}
    reads = {part for part in means if "CAUSAL=False" in part}
    shown = sorted(means.keys() - wild - reads, key=lambda part: means[part][1][-1])
    if chosen:
        colours = dict(zip(chosen, RAINBOW, strict=False))
    else:  # the full model and the costliest deletions
        cuts = [part for part in shown if part != "full"][-len(COLOURS) :]
        colours = dict(zip(cuts, COLOURS, strict=False)) | {"full": BLUE}
    labelled = [part for part in shown if part in colours]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.add_subplot()
    for part in sorted(shown, key=colours.__contains__):  # the grey ones lie below
        how = dict(color=colours.get(part, GREY), alpha=1 if part in colours else 0.4)
        how |= dict(linewidth=2.5 if part == "full" else 1.5 if part in colours else 1)
        axis.plot(*means[part], marker="." if len(means[part][0]) == 1 else "", **how)
    low, high = axis.get_ylim()
    height = -math.inf
    for part in labelled:  # from the lowest up
        steps, losses = means[part]
        height = max(losses[-1], height + (high - low) / 20)  # no label lies on another
        label = f"{losses[-1]:.3f} {textwrap.shorten(part, 50, placeholder=' ...')}"
        line = dict(arrowstyle="-", color=colours[part], relpos=(0, 0.5))
        how = dict(xytext=(1.03, height), textcoords=("axes fraction", "data"), arrowprops=line)
        end = steps[-1], losses[-1]
        axis.annotate(label, end, color=colours[part], fontsize=9, va="center", **how)
    axis.set_ylim(low, max(high, height))
    about = f"Validation loss, {seeds} seed{'s' * (seeds > 1)}, text {data}. "
    about += f"{sizes}. " * (sizes != "full")
    about += f"Grey: {len(shown) - len(labelled)} more. " * (labelled != shown)
    about += f"Left out, as it reads the answer: {', '.join(sorted(reads))}. " * bool(reads)
    about += f"Left out, as it diverged: {', '.join(sorted(wild))}. " * bool(wild)
    axis.set_title(textwrap.fill(about, 100), fontsize=9, loc="left", color=GREY)
    axis.set_xlabel("step", color=GREY)
    axis.tick_params(colors=GREY)
    axis.spines[:].set_color(GREY)
    figure.savefig(path, transparent=True, dpi=120)
    return figure


def main(argv=None):
    how = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("deletions.py", argparse.SUPPRESS, allow_abbrev=False, **how)
    parser.add_argument("--seeds", type=int, default=1, help="of each, from --seed on [1]")
    parser.add_argument("--ladder", action="store_true", help="the nine rungs instead")
    parser.add_argument(
        "--other-way", action="store_true", help="twice each size, ReLU and post-norm"
    )
    parser.add_argument("--plot", metavar="PATH", help="a picture of runs.jsonl; train nothing")
    for flag, kind in gpt.KINDS.items():
        if flag in gpt.FULL or flag in ("STEPS", "SEED", "DEVICE", "DATA"):
            names = {f"--{flag.lower()}", f"--{flag.lower().replace('_', '-')}"}
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
            parser.add_argument(*names, dest=flag, default=argparse.SUPPRESS, **how)
    args = parser.parse_args(argv)
    given = {flag: value for flag, value in vars(args).items() if flag in gpt.KINDS}
    if args.seeds < 1 or given.get("STEPS") == 0:
        parser.error("--seeds and --steps must be 1 or more")
    if args.plot and given:
        parser.error("--plot trains nothing; leave gpt.py's flags out")
    if args.ladder and args.other_way:
        parser.error("--ladder or --other-way, not both")
    chosen = LADDER if args.ladder else OTHER_WAY if args.other_way else {}
    if args.plot:
        try:
            return plot(args.plot, chosen)
        except ImportError:
            parser.error("a picture needs matplotlib: pip install -e '.[plots]'")
        except (OSError, ValueError) as error:
            parser.error(str(error))
    done = sweep(list(chosen.values()) or CUTS, args.seeds, given)
    if args.ladder:
        climb(done, given)
    elif done:
        gpt.compare(next(iter(done.values())))


if __name__ == "__main__":
    main()
