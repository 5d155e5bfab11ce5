"""Train the full model and every deletion, and print what each part is worth.

    python tests/lab/sweep.py --seeds 3              every deletion with seeds 1, 2 and 3
    python tests/lab/sweep.py --steps 500 --n-embd 32    flags of gpt.py go to every run
    python tests/lab/sweep.py --ladder               from the bigram model to the GPT instead
    python tests/lab/sweep.py --other-way            twice each size, ReLU, post-norm instead
    python tests/lab/sweep.py --table                print what runs.jsonl holds; train nothing
    python tests/lab/sweep.py --table */runs.jsonl   of several files
    python tests/lab/sweep.py --bars bars.png        draw the costs, with a dot for each seed
    python tests/lab/sweep.py --plot curves.png --names full NORM=False    draw these curves

A cost is the loss less that of the base with the same seed, and ± is the standard error of its
mean. The base is the run that differs least from the full model. Runs are added to runs.jsonl in
the current folder. A run that is there already is not trained again, so after Ctrl-C the same
command goes on with what is left. No model is kept.

A table or a picture shows runs of one text and one number of steps: those with the most names.
Flags of gpt.py choose other runs, for example --steps 500. Where a name and seed were run twice,
the newest counts.
"""

import argparse
import contextlib
import glob
import io
import json
import math
import multiprocessing
import signal
import statistics
import sys
import tempfile
import textwrap
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare clone has gpt.py there

import gpt

OTHER_VALUES = {"N_HEAD": [1], "N_LAYER": [1, 0], "OPTIMIZER": ["sgd"]}
# fmt: off
LADDER = [  # each rung with what is not yet there
    ("bigram", dict(N_LAYER=0, NORM=False, TIE=False)),
    ("average, learned positions", dict(
        QUERY_KEY=False, N_HEAD=1, PROJECTION=False, ROTARY=False, MLP=False, RESIDUAL=False,
        NORM=False, N_LAYER=1, TIE=False)),
    ("one head", dict(
        N_HEAD=1, PROJECTION=False, ROTARY=False, MLP=False, RESIDUAL=False, NORM=False, N_LAYER=1,
        TIE=False)),
    ("rotary positions", dict(
        N_HEAD=1, PROJECTION=False, MLP=False, RESIDUAL=False, NORM=False, N_LAYER=1, TIE=False)),
    ("four heads", dict(
        PROJECTION=False, MLP=False, RESIDUAL=False, NORM=False, N_LAYER=1, TIE=False)),
    ("residual", dict(PROJECTION=False, MLP=False, NORM=False, N_LAYER=1, TIE=False)),
    ("norm", dict(PROJECTION=False, MLP=False, N_LAYER=1, TIE=False)),
    ("feed-forward, projection", dict(N_LAYER=1, TIE=False)),
    ("three blocks", dict(TIE=False)),
    ("tied: the full model", {}),
]
OTHER_WAY = [
    ("full", {}),
    ("twice the width", dict(N_EMBD=128)),
    ("twice the layers", dict(N_LAYER=6)),
    ("twice the context", dict(BLOCK_SIZE=256)),
    ("twice the batch", dict(BATCH_SIZE=16)),
    ("ReLU", dict(GELU=False)),
    ("post-norm", dict(PRE_NORM=False)),
]
COLOURS = {  # of what a run shows: read on white and on black
    "full": "#4f7df3", "bigram": "#b07a7a", "average, learned positions": "#9a6a30",
    "ATTENTION": "#e5484d", "QUERY_KEY": "#d9660a", "SCALE": "#5f8f6f", "CAUSAL": "#e0559a",
    "FLASH": "#6f84a0", "N_HEAD": "#4d9a6a", "PROJECTION": "#c05cc8", "POSITION": "#3a9a3a",
    "ROTARY": "#7a8a10", "MLP": "#a05bf0", "GELU": "#9b7fe0", "RESIDUAL": "#d6409f",
    "NORM": "#a17c00", "PRE_NORM": "#8a8f3f", "DROPOUT": "#a8658f", "N_LAYER": "#0d9488",
    "N_EMBD": "#cf5a3c", "BLOCK_SIZE": "#2f8fa8", "TIE": "#b0703a", "BIAS": "#7b8fae",
    "SCALED_INIT": "#0e8fc0", "OPTIMIZER": "#a87350", "AVERAGE": "#8f76c8",
    "BATCH_SIZE": "#d14d72", "NOTE": "#c0507a",
}
KEYS = {"name", "data", "params", "vocab", "started", "curve", "val_loss", "STEPS", "SEED"}
# fmt: on
GREY = "#808080"
COSTLIEST = 6  # so many deletions are drawn beside the full model where none are chosen


def deletions():
    """The full model and every deletion, as (title, flags): each bool flag the other way, and
    OTHER_VALUES. BFLOAT16 is no part. The name of the run is title enough."""
    rows = [("", {})]
    for flag, value in gpt.FULL.items():
        if type(value) is bool and flag != "BFLOAT16":
            rows.append(("", {flag: not value}))
        for other in OTHER_VALUES.get(flag, []):
            rows.append(("", {flag: other}))
    return rows


def read_runs(paths):
    """The records in these files, oldest first. A line that is no record is skipped."""
    runs = []
    for path in paths:
        for line in Path(path).read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                run = json.loads(line)
                if type(run) is dict and run.keys() >= KEYS:
                    runs.append(run)
    return sorted(runs, key=lambda run: run["started"])


def hash_text():
    """The text of gpt.DATA, as a record names it."""
    return f"{zlib.crc32(gpt.read_text().encode()):08x}"


def one_thread():
    """Begin a process that trains beside others. It is ended by the one that began it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train(flags):
    """Train with these flags and keep no model. Returns the record or, where the loss became no
    number, why there is none. gpt.BadInput for flags that cannot be used."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _, _, run = gpt.main(**flags | {"SAMPLE": 0})
    except gpt.BadInput as error:
        if not str(error).startswith("the loss"):
            raise
        return f"{gpt.name_run(flags)}: {error}"
    finally:
        Path(flags["CHECKPOINT"]).unlink(missing_ok=True)
    return run


def train_all(plan, jobs):
    """Train with the flags of each in plan, so many at a time. Yields what train returns."""
    if jobs == 1:
        yield from map(train, plan)
    else:
        with multiprocessing.get_context("spawn").Pool(jobs, one_thread) as pool:
            yield from pool.imap_unordered(train, plan)


def sweep(models, seeds, jobs):
    """Train models, {name: flags}, with so many seeds from gpt.SEED on, until Ctrl-C; but not what
    runs.jsonl holds. Returns {name: {seed: run}} of all that are finished."""
    wanted = range(gpt.SEED, gpt.SEED + seeds)
    data = hash_text()
    done = {name: {} for name in models}
    if Path("runs.jsonl").exists():
        for run in read_runs(["runs.jsonl"]):
            same = run["data"] == data and run["STEPS"] == gpt.STEPS and run["SEED"] in wanted
            if same and run["name"] in models:
                done[run["name"]][run["SEED"]] = run
    started = time.time()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        plan = []
        for seed in wanted:
            for name, flags in models.items():
                if seed not in done[name]:
                    path = f"{folder}/{len(plan)}.pt"
                    given = {flag: getattr(gpt, flag) for flag in gpt.REST}
                    plan.append(flags | given | {"SEED": seed, "CHECKPOINT": path})
        left = len(plan)
        if left:
            print(f"{left} of {len(models) * seeds} runs left", flush=True)
        for run in train_all(plan, jobs):
            left -= 1
            minutes = (time.time() - started) / (len(plan) - left) * left / 60
            if type(run) is str:
                print(f"{left} left; not trained: {run}", flush=True)
                continue
            if run["STEPS"] < gpt.STEPS:  # Ctrl-C: it is in runs.jsonl, but no part of the sweep
                break
            done[run["name"]][run["SEED"]] = run
            print(f"{left} left, about {minutes:.0f} minutes; done: {run['name']}", flush=True)
    return {name: runs for name, runs in done.items() if runs}


def choose(runs, given):
    """Of the runs with these flags, those of one text and number of steps: those with the most
    names, of as many the most runs, and then the newest. Returns {name: {seed: run}}."""
    groups = {}
    for run in runs:
        facts = gpt.FULL | run | {"DATA": run["data"]}  # it may be older than a reader's own flag
        if all(facts.get(flag) == value for flag, value in given.items()):
            group = groups.setdefault((run["data"], run["STEPS"]), {})
            group.setdefault(run["name"], {})[run["SEED"]] = run
    gpt.require(groups, "there are no such runs; train them, without --table, --bars and --plot")
    sizes = [(len(group), sum(map(len, group.values()))) for group in groups.values()]
    return max(zip(sizes, range(len(sizes)), groups.values(), strict=True))[2]


class Row(NamedTuple):
    """A line of the table, a bar, a curve."""

    title: str
    runs: list
    losses: dict  # {seed: loss}
    costs: list  # losses less those of the base with the same seed
    part: str  # what it shows, a key of COLOURS


def make_rows(found, titles, base, ladder):
    """A Row for each of found, {name: {seed: run}}, beside the base, or on the ladder beside the
    rung before."""
    rows = []
    before = found[base]
    for name, runs in found.items():
        losses, of_before = read_losses(runs), read_losses(before)
        costs = [loss - of_before[seed] for seed, loss in losses.items() if seed in of_before]
        if ladder and not rows:
            costs = []  # there is no rung before
        part = find_part(runs, before)
        title = titles.get(name, name)
        if name == base:
            part = "full"
        elif title in COLOURS:
            part = title
        rows.append(Row(title, list(runs.values()), losses, costs, part))
        if ladder:
            before = runs
    return rows


def read_losses(runs):
    """{seed: loss} of the runs, {seed: run}."""
    return {seed: run["val_loss"] for seed, run in runs.items()}


def find_part(runs, base):
    """The first flag by which runs differ from base, both {seed: run}; "NOTE" where none does."""
    run, of_base = (gpt.FULL | next(iter(group.values())) for group in (runs, base))
    for flag in gpt.FULL:
        if run[flag] != of_base[flag]:
            return flag
    return "NOTE"


def mean(numbers):
    """Their mean, or infinity where there are none, so that such rows come last."""
    return statistics.mean(numbers) if numbers else math.inf


def tell_cost(row):
    """The mean cost and, of several seeds, its standard error; empty where there is none."""
    text = ""
    if row.costs:
        text = f"{mean(row.costs):+.3f}"
    if len(row.costs) > 1:
        text += f" ± {statistics.stdev(row.costs) / math.sqrt(len(row.costs)):.3f}"
    return text


def print_table(rows, heading):
    """A line for each row. Its seeds are those that tell the cost, of those that tell the loss."""
    print(f"\nAfter {rows[0].runs[0]['STEPS']:,} steps")
    print(f"    loss  {heading:16} seeds  parameters  name")
    for row in rows:
        seeds, params = str(len(row.losses)), row.runs[0]["params"]
        if 0 < len(row.costs) < len(row.losses):
            seeds = f"{len(row.costs)} of {len(row.losses)}"
        loss = mean(row.losses.values())
        print(f"{loss:8.3f}  {tell_cost(row):16}{seeds:>6}{params:12,}  {row.title}")


def new_axis(height, about):
    """An empty axis with a line above it, in a figure of that height in inches."""
    from matplotlib.figure import Figure

    axis = Figure(figsize=(9, height), layout="constrained").add_subplot()
    axis.set_title(about, fontsize=9, loc="left", color=GREY)
    axis.tick_params(which="both", colors=GREY)
    axis.spines[:].set_color(GREY)
    return axis


def shorten(row):
    """What names a row in a picture, in at most 48 characters."""
    return textwrap.shorten(row.title, 48, placeholder=" ...")


def draw_bars(rows, base):
    """The costs as bars, with a dot for each seed. Returns the figure."""
    steps = rows[0].runs[0]["STEPS"]
    about = f"Cost after {steps:,} steps: the loss less that of {base}. A dot is a seed."
    axis = new_axis(1.2 + 0.25 * len(rows), about)
    for place, row in enumerate(rows):
        colour = COLOURS.get(row.part, GREY)
        axis.barh(place, mean(row.costs), color=colour, alpha=0.5)
        axis.plot(row.costs, [place] * len(row.costs), "o", color=colour, markersize=4)
        how = dict(transform=axis.get_yaxis_transform(), va="center", color=colour, fontsize=9)
        axis.text(1.01, place, tell_cost(row), **how)
    axis.set_yticks(range(len(rows)), [shorten(row) for row in rows])
    axis.axvline(0, color=GREY, linewidth=1)
    axis.set_xscale("symlog", linthresh=0.01)  # the large costs do not flatten the small ones
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("nats a character, linear up to 0.01 and logarithmic beyond", color=GREY)
    return axis.figure


def mean_curve(row):
    """Steps and mean validation losses, from ln V at step 0 on, where all seeds have been."""
    curves = [{step: loss for step, _, loss in run["curve"]} for run in row.runs]
    steps, losses = [0], [math.log(len(row.runs[0]["vocab"]))]
    for step in curves[0]:
        loss = mean([curve.get(step, math.nan) for curve in curves])
        if not math.isfinite(loss):
            break
        steps.append(step)
        losses.append(loss)
    return steps, losses


def draw_curves(rows):
    """The mean curves, each with its loss in the table. The axis is logarithmic above a value below
    the lowest loss, so that both the fall and the end are seen. Returns the figure."""
    curves = sorted([(*mean_curve(row), row) for row in rows], key=lambda curve: curve[1][-1])
    top = 1.03 * max(losses[0] for _, losses, _ in curves)  # what is above leaves the picture
    low = min(min(losses) for _, losses, _ in curves)

    def to_height(loss):
        return np.log(np.maximum(loss - low + 0.1, 1e-3))

    def to_loss(height):
        return np.exp(height) + low - 0.1

    seeds = max(len(row.runs) for row in rows)
    about = "Validation loss in nats a character. The axis is stretched where losses are low."
    axis = new_axis(6, f"{about} Seeds: {seeds}.")
    axis.set_yscale("function", functions=(to_height, to_loss))
    height = to_height(top) - to_height(low)
    place = -math.inf
    for steps, losses, row in curves:
        colour = COLOURS.get(row.part, GREY)
        axis.plot(steps, losses, color=colour, linewidth=2.5 if row.part == "full" else 1.5)
        end = steps[-1], min(losses[-1], top)
        place = max(to_height(end[1]), place + height / 20)  # no label lies on another
        how = dict(xytext=(1.03, to_loss(place)), textcoords=("axes fraction", "data"), va="center")
        how |= dict(arrowprops=dict(arrowstyle="-", color=colour, relpos=(0, 0.5)))
        text = f"{mean(row.losses.values()):.3f} {shorten(row)}"
        axis.annotate(text, end, color=colour, fontsize=9, **how)
    ends = to_height(low) - 0.02 * height, max(to_height(top), place)
    axis.set_ylim(*map(to_loss, ends))
    ticks = [math.ceil(10 * low) / 10]
    while ticks[-1] < top:
        following = to_loss(to_height(ticks[-1]) + height / 15)
        ticks.append(math.ceil(10 * following) / 10)
    axis.set_yticks(ticks[:-1])
    axis.set_xlim(left=0)
    axis.set_xlabel("step", color=GREY)
    return axis.figure


def draw(args, rows, base):
    """Draw what the arguments ask for, and tell what is in it and what not. Returns the figure."""
    if args.bars:
        rows = [row for row in rows if row.title != base]
        path, drawn = args.bars, [row for row in rows if row.costs]
        gpt.require(drawn, f"there is no run to compare with {base}")
        figure = draw_bars(drawn, base)
    else:
        path, drawn = args.plot, rows
        if not (args.names or args.ladder or args.other_way):
            others = [row for row in rows if row.part not in ("full", "CAUSAL")]
            drawn = [row for row in rows if row.part == "full"] + others[-COSTLIEST:]
        figure = draw_curves(drawn)
    try:
        figure.savefig(path, transparent=True, dpi=120)
    except ValueError as error:
        raise gpt.BadInput(f"{path}: {error}") from error
    left = [row.title for row in rows if row not in drawn]
    print(f"{path} shows: {'; '.join(row.title for row in drawn)}")
    print(f"Left out: {'; '.join(left) or 'nothing'}")
    return figure


def main(argv=None):
    how = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(
        "sweep.py",
        argparse.SUPPRESS,
        parents=[gpt.parser],
        add_help=False,
        allow_abbrev=False,
        **how,
    )
    group = parser.add_argument_group("options of the sweep")
    add = group.add_argument
    add("--seeds", type=int, default=1, help="how many seeds, from --seed on [1]")
    add("--jobs", type=int, default=1, help="how many runs at once, each with one thread [1]")
    add("--table", nargs="*", metavar="FILE", help="print these records [runs.jsonl]")
    add("--names", nargs="+", metavar="NAME", help="show only these, named as in the table")
    add = group.add_mutually_exclusive_group().add_argument
    add("--ladder", action="store_true", help="from the bigram model to the GPT instead")
    add("--other-way", action="store_true", help="twice each size, ReLU, post-norm instead")
    add = group.add_mutually_exclusive_group().add_argument
    add("--bars", metavar="PICTURE", help="draw the costs")
    add("--plot", metavar="PICTURE", help="draw the curves")
    args = parser.parse_args(argv)
    given = {flag: value for flag, value in vars(args).items() if flag.isupper()}
    try:
        return show(args, given)
    except ImportError:
        parser.error("a picture needs matplotlib: pip install matplotlib")
    except (gpt.BadInput, OSError, KeyboardInterrupt) as error:
        parser.error(str(error) or "stopped")


def show(args, given):
    """Train or read, and print the table or draw the pictures, as the arguments say."""
    gpt.require(args.seeds > 0 and args.jobs > 0, "--seeds and --jobs must be 1 or more")
    gpt.require(not (args.ladder and args.bars), "the ladder has no bars; draw it with --plot")
    for flag, value in given.items():
        used = flag not in ("CHECKPOINT", "SAMPLE")
        gpt.require(used, f"a sweep keeps no model and samples nothing; leave {flag} out")
        setattr(gpt, flag, value)
    chosen = deletions()
    if args.ladder:
        chosen = LADDER
    if args.other_way:
        chosen = OTHER_WAY
    models, titles = {}, {}
    for title, changes in chosen:
        flags = {flag: getattr(gpt, flag) for flag in gpt.FULL} | changes
        name = gpt.name_run(flags)
        models.setdefault(name, flags)
        titles.setdefault(name, title or name)
    if args.table is None and not args.bars and not args.plot:
        gpt.require(not args.names, "--names is for --table, --bars and --plot; nothing is trained")
        found = sweep(models, args.seeds, args.jobs)
    else:
        if "DATA" in given:
            given["DATA"] = hash_text()
        patterns = args.table or ["runs.jsonl"]  # a shell of Windows leaves *.jsonl as it is
        runs = read_runs([path for it in patterns for path in glob.glob(it) or [it]])
        if args.ladder or args.other_way:
            runs = [run for run in runs if run["name"] in titles]
        found = choose(runs, given)
    if args.ladder or args.other_way:
        found = {name: found[name] for name in titles if name in found}
    gpt.require(found, "no run is finished")
    base = min(found, key=lambda name: name.count("="))  # the first of those that differ least
    rows = make_rows(found, titles, base, args.ladder)
    if args.names:
        names = {name.replace("'", "") for name in args.names}  # as a shell leaves OPTIMIZER='sgd'
        known = {row.title.replace("'", ""): row for row in rows}
        unknown = sorted(names - known.keys())
        gpt.require(not unknown, f"--names: there is no run {unknown}; there are {[*known]}")
        rows = [row for title, row in known.items() if title in names]
    if not args.ladder:
        rows.sort(key=lambda row: (mean(row.costs), mean(row.losses.values())))
    if args.bars or args.plot:
        return draw(args, rows, titles.get(base, base))
    print_table(rows, "change" if args.ladder else "cost")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout cannot
        sys.stdout.reconfigure(errors="replace")
    main()
