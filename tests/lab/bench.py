"""Measure gpt.py on this machine's CPU, in turn with an earlier commit of it and with nanoGPT.

    python tests/bench.py                      the table, with goals
    python tests/bench.py --before COMMIT      the same beside that commit's gpt.py
    python tests/bench.py --nanogpt PATH       the same beside a checkout of nanoGPT
    python tests/bench.py step                 one part: step, float32, bfloat16, whole or sample
    python tests/bench.py deletions            a step without each part, and with twice each size
    python tests/bench.py long --seconds 900   a long run: its curve, its best loss and a sample
    python tests/bench.py long --recipe "..."  the same with other flags of gpt.py

It asserts nothing. All but long runs in processes of their own, in turn, round by round, and ratios
are taken within each round. It needs `pip install -e .` and Linux or macOS, reads input.txt in the
current folder (fetched if missing) and writes only to a temporary folder.

Training is `python gpt.py` itself, not a line of it replaced: a hook of PyTorch after each
optimizer step reads the clock, evaluates with the clock stopped, and ends it as by Ctrl-C.
nanoGPT runs its README's recipe for a CPU, in float32; its times and losses are those of its log.
Its prepare.py and sample.py import other packages, so what they do is done here. Its whole run does
not sample; ours does.
"""

import argparse
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import gpt

TARGET, LONG_TARGET = 1.88, 1.4697  # losses to reach: nanoGPT's on a CPU, and its best on a GPU
SMALL = "--n-layer 2 --block-size 64 --batch-size 16"
RECIPES = {"float32": SMALL, "bfloat16": SMALL + " --bfloat16 --no-flash"}
LONG = (
    "--n-embd 160 --n-layer 4 --n-head 5 --block-size 256 --batch-size 8 --dropout 0.15"
    " --learning-rate 1.5e-3 --bfloat16 --no-flash"
)
NANOGPT = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1"
    " --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
    " --lr_decay_iters=2000 --dropout=0.0"
)
COUNT, LIMIT, SECONDS, LOOKS, WHOLE = 300, 60, 900, 50, ""
QUICK = dict(COUNT=5, LIMIT=0.5, SECONDS=2, LOOKS=2, WHOLE="--steps 10 --sample 20")
QUICK |= dict(NANOGPT=NANOGPT + " --max_iters=10 --lr_decay_iters=10 --eval_interval=5")
GOALS = {  # the rows of the table: name, the two whose ratio has a goal, and the goal
    "step": ("default: ms a step", "now", "before", "ratio 0.8 or less"),
    "float32": (f"training seconds to {TARGET}, float32", "nanoGPT", "now", "ratio 10 or more"),
    "bfloat16": (f"training seconds to {TARGET}, bfloat16", "nanoGPT", "now", "ratio 14 or more"),
    "seconds": ("whole run: seconds", "now", "nanoGPT", "ratio 0.6 or less"),
    "loss": ("whole run: loss", "now", "nanoGPT", "now 1.65 or less"),
    "sampling": ("500 sampled characters: seconds", "nanoGPT", "now", "ratio 2 or more"),
    "memory": ("whole run: peak memory, MiB", "now", "nanoGPT", "ratio 1 or less"),
}


# 1. What runs in a process of its own, where gpt is the version that PYTHONPATH names.
def run(recipe, seed, hook):
    """Run python gpt.py by a recipe, with a hook after each step, until that raises Ctrl-C."""
    sys.argv = f"gpt.py --device cpu --seed {seed} --steps {10**9} {recipe}".split()
    handle = register_optimizer_step_post_hook(hook)
    with suppress(KeyboardInterrupt):
        runpy.run_path(gpt.__file__, run_name="__main__")
    handle.remove()


def step_time(recipe, seed, count):
    """Milliseconds from the end of a step to the end of the next: the median of count."""
    ends = []

    def hook(*_):
        ends.append(time.perf_counter())
        if len(ends) > count:
            raise KeyboardInterrupt

    run(recipe + " --sample 0", seed, hook)
    return 1000 * np.median(np.diff(ends))


def train(recipe, seed, marks, target=0.0):
    """Train, and evaluate a running average of the weights by gpt.py's formula at each of marks, in
    training seconds, to the last or to a loss of target: rows of steps, training seconds, loss. The
    first two steps, which warm up (commit 47ff3d9 also looks), count as a mean step each."""
    text = gpt.read_text()
    vocab = "".join(sorted(set(text)))
    val_ids = gpt.encode(text, vocab)[len(text) * 9 // 10 :]
    rows, steps, begin, mean = [], 0, 0.0, None

    def hook(optimizer, *_):
        nonlocal steps, begin, mean
        now = time.perf_counter()
        steps += 1
        running = sys.modules["__main__"]  # the gpt.py that runs, with the flags of the recipe
        if mean is None:
            with torch.random.fork_rng():
                mean = running.GPT(len(vocab))
        share = 16 / (steps + 15) if running.AVERAGE else 1.0
        weights = optimizer.param_groups[0]["params"]
        for average, weight in zip(mean.parameters(), weights, strict=True):
            average.data.lerp_(weight.data, share)
        seconds = (now - begin) * steps / max(steps - 2, 1)
        if steps > 2 and seconds >= marks[len(rows)]:
            rows.append((steps, seconds, running.evaluate(mean, val_ids)))
            print("{:7} steps  {:7.2f} s of training  loss {:.4f}".format(*rows[-1]), flush=True)
            if len(rows) == len(marks) or rows[-1][2] <= target:
                raise KeyboardInterrupt
        begin = time.perf_counter() - (now - begin if steps > 2 else 0.0)

    run(recipe, seed, hook)
    return rows


def seconds_to(rows, loss):
    """Training seconds at the first row at that loss or lower; infinity if there is none."""
    return min((seconds for _, seconds, value in rows if value <= loss), default=np.inf)


def sample_time(folder):
    """Seconds to sample 500 characters, the second time, by the checkpoint of nanoGPT in folder, as
    in its sample.py; without a folder by gpt.py, where the weights don't matter."""
    vocab = "".join(sorted(set(gpt.read_text())))
    if folder:
        sys.path.insert(0, folder)
        from model import GPT, GPTConfig

        saved = torch.load(Path(folder, "out-shakespeare-char", "ckpt.pt"))
        model = GPT(GPTConfig(**saved["model_args"])).eval()
        args = [torch.zeros(1, 1, dtype=torch.long), 500, 0.8, 200]  # temperature and top_k
    else:
        gpt.DEVICE = "cpu"
        model = gpt.GPT(len(vocab)).eval()
        args = [model, vocab, ""]
        if not hasattr(gpt, "CHECKPOINT"):  # as in commit 47ff3d9
            args = [model, torch.tensor([0])]
    for _ in range(2):
        start = time.perf_counter()
        model.generate(*args) if folder else gpt.sample(*args)
    return time.perf_counter() - start


# 2. Processes, in a temporary folder that holds input.txt, now/gpt.py, before/gpt.py and nanoGPT/.
METER = """if True:  # on Linux a process begins with its parent's peak memory: this one is small
    import resource, subprocess, sys
    subprocess.run(sys.argv[1:], check=True)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
CALL = """if True:
    import bench, json, sys
    print(json.dumps(getattr(bench, sys.argv[1])(*json.loads(sys.argv[2]))))
"""


def process(*args, cwd=".", tree="now"):
    """Run python with args: what it printed, its wall seconds, its peak memory in MiB."""
    path = os.pathsep.join([os.path.abspath(tree), str(Path(__file__).resolve().parent)])
    command = [sys.executable, "-c", METER, sys.executable, *args]
    how = dict(cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    start = time.perf_counter()
    done = subprocess.run(command, **how)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    printed, _, peak = done.stdout.rstrip().rpartition("\n")
    return printed, seconds, int(peak) / (2**20 if sys.platform == "darwin" else 2**10)


def call(tree, function, *args):
    """What a function of part 1 returns in a process of its own with the gpt.py of that tree."""
    printed, _, _ = process("-c", CALL, function.__name__, json.dumps(args), tree=tree)
    return json.loads(printed.splitlines()[-1])


def ours(tree, part, seed):
    """The figures of a part of the table, by their keys in GOALS."""
    if part == "step":
        return {"step": call(tree, step_time, "", seed, COUNT)}
    if part == "sample":
        return {"sampling": call(tree, sample_time, "")}
    if part in RECIPES:
        marks = np.arange(0.25, LIMIT + 0.1, 0.25).tolist()
        rows = call(tree, train, RECIPES[part] + " --sample 0", seed, marks, TARGET)
        return {part: seconds_to(rows, TARGET)}
    Path("runs.jsonl").unlink(missing_ok=True)
    given = f"{tree}/gpt.py --device cpu --seed {seed} {WHOLE}"
    _, seconds, peak = process(*given.split())
    loss = json.loads(Path("runs.jsonl").read_text())["val_loss"]
    return {"seconds": seconds, "loss": loss or np.nan, "memory": peak}


def nanogpt():
    """The same of nanoGPT. Where it never estimates TARGET, its seconds are all it trained."""
    log, wall, peak = process("train.py", *NANOGPT.split(), cwd="nanoGPT")
    ms = np.array(re.findall(r"^iter \d+: .+ time ([\d.]+)ms", log, re.M), float)
    found = re.findall(r"^step (\d+): .+ val loss ([\d.]+)", log, re.M)
    ms[[int(step) for step, _ in found]] = np.median(ms)  # these iterations also evaluated
    rows = [(int(step), ms[: int(step)].sum() / 1000, float(loss)) for step, loss in found]
    seconds = min(seconds_to(rows, TARGET), ms.sum() / 1000)
    figures = {"float32": seconds, "bfloat16": seconds, "seconds": wall, "memory": peak}
    sampling = call("now", sample_time, os.path.abspath("nanoGPT"))
    return figures | {"loss": rows[-1][2], "sampling": sampling}


def lay_out(folder, before, peer):
    """Fill the temporary folder: the text, each gpt.py, and nanoGPT with its data."""
    text = gpt.read_text()
    Path(folder, "input.txt").write_text(text, "utf-8")
    Path(folder, "now").mkdir()
    shutil.copy(gpt.__file__, Path(folder, "now"))
    if before:
        command = ["git", "-C", Path(__file__).resolve().parents[1], "show", f"{before}:gpt.py"]
        Path(folder, "before").mkdir()
        code = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        Path(folder, "before", "gpt.py").write_bytes(code)
    if peer:
        hidden = shutil.ignore_patterns(".*", "out*")
        shutil.copytree(peer, Path(folder, "nanoGPT"), ignore=hidden)
        data = Path(folder, "nanoGPT", "data", "shakespeare_char")
        vocab = "".join(sorted(set(text)))
        ids = gpt.encode(text, vocab).numpy().astype(np.uint16)
        ids[: len(ids) * 9 // 10].tofile(data / "train.bin")
        ids[len(ids) * 9 // 10 :].tofile(data / "val.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(vocab)}))


# 3. Tables.
def rounds(measure, cases, seeds):
    """What measure(case, seed) gives for each case, a list of one value a round, in turn."""
    results = {case: [] for case in cases}
    for seed in range(1, seeds + 1):
        for case in cases:
            results[case].append(measure(case, seed))
            print(f"round {seed}: {case} {results[case][-1]}", file=sys.stderr, flush=True)
    return results


def spread(values):
    """min–median–max, or the only value, or nothing."""
    three = sorted({min(values), float(np.median(values)), max(values)}) if len(values) else []
    return "–".join(f"{x:.0f}" if 1000 <= x < np.inf else f"{x:.4g}" for x in three)


def show(rows):
    """Print rows of text in columns, a head first, without the columns that are empty below it."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def table(parts, seeds, before, peer):
    """Measure parts in rounds, a seed each, and print the table with its goals."""
    trees = ["now", "before"] if before else ["now"]
    cases = [(tree, part) for part in parts for tree in trees]
    cases += [("nanoGPT", "")] if peer else []
    results = rounds(lambda case, seed: ours(*case, seed) if case[1] else nanogpt(), cases, seeds)
    rows = [["min–median–max", "now", "before", "nanoGPT", "now/before", "ratio", "of", "goal"]]
    for key, (name, above, below, goal) in GOALS.items():
        values = {"now": [], "before": [], "nanoGPT": []}
        for (who, _), figures in results.items():
            values[who] += [figure[key] for figure in figures if key in figure]
        ratios = []
        for a, b in (("now", "before"), (above, below)):
            both = values[a] and values[b] and np.isfinite(values[a] + values[b]).all()
            ratios.append(spread(np.divide(values[a], values[b])) if both else "")
        rows.append([name, *map(spread, values.values()), *ratios, f"{above}/{below}", goal])
    show([row for row in rows if row[1]])


def deletions(seeds):
    """Print the time of a step of each deletion alone, and of twice each size, by the full model's
    in the same round."""
    cases = ["", "--n-head 1", "--n-layer 1", "--n-layer 0", "--optimizer sgd"]
    for flag, value in gpt.FULL.items():
        option = flag.lower().replace("_", "-")
        if value is True:
            cases.append(f"--no-{option}")
        elif flag in ("N_LAYER", "N_EMBD", "BLOCK_SIZE", "BATCH_SIZE"):
            cases.append(f"--{option} {2 * value}")
    ms = rounds(lambda case, seed: call("now", step_time, case, seed, COUNT), cases, seeds)
    ratio = {case: np.median(np.divide(ms[case], ms[""])) for case in cases}
    rows = [["flags", "ms a step", "ratio"]]
    for case in sorted(cases, key=ratio.get):
        rows.append([case or "the full model", spread(ms[case]), f"{ratio[case]:.2f}"])
    show(rows)


def long(recipe):
    """Print the curve of a run with seed 1, a sample, the seconds to LONG_TARGET and the best."""
    rows = train(recipe, 1, np.linspace(0, SECONDS, LOOKS + 1)[1:])
    print(f"long: gpt.py {recipe}")
    print(f"training seconds to loss {LONG_TARGET}: {seconds_to(rows, LONG_TARGET):.1f}")
    best = min(rows, key=lambda row: row[2])
    print("best: loss {2:.4f} after {1:.1f} s of training, {0} steps".format(*best))


if __name__ == "__main__":
    parts = ["step", *RECIPES, "whole", "sample"]
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    choices = ["table", *parts, "deletions", "long"]
    parser.add_argument("part", nargs="?", default="table", choices=choices)
    parser.add_argument("--before", metavar="COMMIT", help="of this project, for the table")
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT, for the table")
    parser.add_argument("--seeds", type=int, help="rounds, a seed each [3; with --quick 1]")
    parser.add_argument("--seconds", type=float, help=f"of training in long [{SECONDS}]")
    parser.add_argument("--recipe", default=LONG, help="flags of gpt.py in long [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="seconds, not minutes: does it work?")
    args = parser.parse_args()
    globals().update(QUICK if args.quick else {})
    SECONDS, seeds = args.seconds or SECONDS, args.seeds or (1 if args.quick else 3)
    with tempfile.TemporaryDirectory() as folder:
        lay_out(folder, args.before, args.nanogpt)
        os.chdir(folder)
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads", end=", ")
        print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f} at the start")
        if args.part == "deletions":
            deletions(seeds)
        elif args.part == "long":
            long(args.recipe)
        else:
            table(parts if args.part == "table" else [args.part], seeds, args.before, args.nanogpt)
