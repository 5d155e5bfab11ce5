"""Measure gpt.py on this machine's CPU, and nanoGPT beside it. It asserts nothing; no test runs it.

    python tests/bench.py                      the table: ceiling, target, loss, whole and sample
    python tests/bench.py --nanogpt PATH       the same beside a checkout of nanoGPT, with ratios
    python tests/bench.py target whole         only these parts of the table
    python tests/bench.py growth               how cost grows with each size
    python tests/bench.py long --seconds 900   the long recipe, to nanoGPT's best loss on a GPU
    python tests/bench.py ... --seeds 5        so many rounds, a seed each (else 3)
    python tests/bench.py ... --quick          seconds, not minutes: does the script itself work?

Tables go to standard output, progress to standard error. It reads input.txt in the current folder,
fetched if missing, and writes only to temporary folders. Linux or macOS. nanoGPT's train.py needs
torch and numpy and nothing else: its prepare.py (which imports requests) and its sample.py (which
imports tiktoken) are not run, their work is done here.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt  # noqa: E402

RECIPES = {  # the flags of gpt.py in each part
    "target": "--n-layer 2 --block-size 64 --batch-size 16",
    "loss": "",
    "whole": "",
    "sample": "",
    "long": "--n-embd 160 --n-layer 4 --n-head 5 --block-size 256 --batch-size 16 --dropout 0.15"
    " --learning-rate 2e-3 --bfloat16 --no-flash",
}
NANOGPT = (  # its README's recipe for a CPU
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1"
    " --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
    " --lr_decay_iters=2000 --dropout=0.0"
)
TARGET, LONG_TARGET = 1.88, 1.4697  # losses to reach: nanoGPT's on a CPU, and its best on a GPU
LIMIT, AFTER, LONG = 60, (60, 119), 900  # seconds of training; 119 is nanoGPT's whole run
SIZE, LOOKS, WHOLE, GROWTH = 2048, 50, "", "--sample 0 --steps 100"
QUICK = dict(LIMIT=2, AFTER=(1, 2), LONG=3, SIZE=512, LOOKS=2, WHOLE="--steps 20")
QUICK |= dict(GROWTH="--sample 0 --steps 1")
QUICK |= dict(NANOGPT=NANOGPT + " --max_iters=20 --lr_decay_iters=20 --eval_interval=10")
GOALS = {
    "training seconds to loss 1.88": 6,
    "loss after 119 s of training": 1.55,
    "whole run: seconds": 60,
    "whole run: loss": 1.65,
    "whole run: peak memory, MiB": "nanoGPT's",
    "share of the float32 ceiling": 0.5,
    "500 sampled characters, seconds": 0.28,
}
# On Linux a process begins with its parent's peak memory, so a small one stands between.
METER = """if True:
    import resource, subprocess, sys, time
    start = time.perf_counter()
    subprocess.run(sys.argv[1:], check=True)
    seconds = time.perf_counter() - start
    print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
say = partial(print, file=sys.stderr, flush=True)


@cache
def text_ids():
    """The vocabulary and the ids of the training and of the validation split, as in gpt.main."""
    text = gpt.read_text()
    vocab = "".join(sorted(set(text)))
    return vocab, *gpt.encode(text, vocab).tensor_split([len(text) * 9 // 10])


def build(recipe, **more):
    """Set the flags of a recipe, as on the command line, and more: those flags and a new model."""
    flags = gpt.FULL | {"DEVICE": "cpu"} | gpt.parse(recipe.split()) | more
    vars(gpt).update(flags)
    torch.manual_seed(gpt.SEED)
    return flags, gpt.GPT(len(text_ids()[0]))


@cache
def ceiling(dtype):
    """Operations a second in the best of 20 products of two square matrices."""
    (a, b), seconds = torch.randn(2, SIZE, SIZE).to(dtype), []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * SIZE**3 / min(seconds)


def operations(flags):
    """Operations of a step. Each token costs 6 a matrix weight, 2 forward and 4 backward, and 12TC
    a layer for attention's scores and sums, as if without the causal mask."""
    layers, context, width = flags["N_LAYER"], flags["BLOCK_SIZE"], flags["N_EMBD"]
    weights = 12 * layers * width**2 + len(text_ids()[0]) * width  # the embedding is a look-up
    return (6 * weights + 12 * layers * context * width) * context * flags["BATCH_SIZE"]


def speed(flags, seconds, steps):
    """Step time, tokens a second and the share of the ceiling, as figures of the table."""
    return {
        "ms a step": 1000 * seconds / steps,
        "tokens a second": flags["BLOCK_SIZE"] * flags["BATCH_SIZE"] * steps / seconds,
        "share of the float32 ceiling": operations(flags)
        * steps
        / seconds
        / ceiling(torch.float32),
    }


def process(*args, cwd):
    """Run python with args in cwd: what it printed, its wall seconds, its peak memory in MiB."""
    command = [sys.executable, "-c", METER, sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    printed, _, last = done.stdout.rstrip().rpartition("\n")
    seconds, peak = map(float, last.split())
    return printed, seconds, peak / (2**20 if sys.platform == "darwin" else 2**10)


def command_line(recipe, seed):
    """Run python gpt.py by a recipe: its record if it trained, wall seconds, peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(gpt.FULL["DATA"], folder)
        args = ["--device", "cpu", "--seed", seed, *recipe.split()]
        _, seconds, peak = process(gpt.__file__, *args, cwd=folder)
        runs = Path(folder, "runs.jsonl")
        return json.loads(runs.read_text()) if runs.exists() else None, seconds, peak


def train(recipe, seed, marks, target=0.0):
    """Train by gpt.train and evaluate at each of marks, in training seconds, the clock stopped;
    end at the last, or once the loss is at target. Rows: steps, training seconds, loss."""
    _, model = build(recipe, SEED=seed, STEPS=10**9)
    _, train_ids, val_ids = text_ids()
    batch, evaluate = gpt.batch, gpt.evaluate
    rows, marks, best, steps, begin, stopped = [], list(marks), None, 0, None, 0.0

    def measure(model, ids):  # gpt.train calls it after its first step and after its last
        nonlocal best, stopped
        start = time.perf_counter()
        rows.append((steps, start - begin - stopped, evaluate(model, ids)))
        best, stopped = model, stopped + time.perf_counter() - start
        say("  {} steps, {:.2f} s of training, loss {:.4f}".format(*rows[-1]))
        return rows[-1][2]

    def next_batch(ids, generator):  # gpt.train calls it at the start of each step
        nonlocal begin, steps
        begin = begin or time.perf_counter()
        if marks and steps and time.perf_counter() - begin - stopped >= marks[0]:
            del marks[0]
            if not marks or measure(best, val_ids) <= target:
                marks.clear()
                signal.raise_signal(signal.SIGINT)  # as by Ctrl-C, this step is the last
        steps += 1
        return batch(ids, generator)

    gpt.batch, gpt.evaluate = next_batch, measure
    with contextlib.redirect_stdout(io.StringIO()):
        gpt.train(model, train_ids, val_ids)
    gpt.batch, gpt.evaluate = batch, evaluate
    return rows


def seconds_to(rows, loss):
    """Training seconds at the first row at that loss or lower; infinity if there is none."""
    return min((seconds for _, seconds, value in rows if value <= loss), default=np.inf)


def target(seed):
    """Training seconds to the loss where nanoGPT ends, to a quarter of a second."""
    rows = train(RECIPES["target"], seed, np.arange(0.25, LIMIT + 0.1, 0.25), TARGET)
    return {f"training seconds to loss {TARGET}": seconds_to(rows, TARGET)}


def loss(seed):
    """The loss after some seconds of training."""
    _, *rows = train(RECIPES["loss"], seed, AFTER)
    return {
        f"loss after {mark} s of training": row[2] for mark, row in zip(AFTER, rows, strict=True)
    }


def whole(seed):
    """python gpt.py, from Enter to the end of the sample."""
    record, wall, peak = command_line(f"{RECIPES['whole']} {WHOLE}", seed)
    return {
        "whole run: seconds": wall,
        "whole run: seconds in steps": record["seconds"],
        "whole run: loss": record["val_loss"],
        "whole run: peak memory, MiB": peak,
        **speed(build(RECIPES["whole"])[0], record["seconds"], record["steps"]),
    }


def sample(seed):
    """Seconds to sample 500 characters, after 20 that warm up. The weights don't matter."""
    for count in (20, 500):
        _, model = build(RECIPES["sample"], SEED=seed, SAMPLE=count)
        start = time.perf_counter()
        gpt.sample(model.eval(), torch.zeros(1, dtype=torch.long))
    return {"500 sampled characters, seconds": time.perf_counter() - start}


def nanogpt(path):
    """Train a copy of that checkout of nanoGPT by its recipe; sample from its checkpoint, and take
    its exact loss: over the whole validation split, every window once."""
    vocab, *splits = text_ids()
    with tempfile.TemporaryDirectory() as folder:
        hidden = shutil.ignore_patterns(".*", "out*")
        shutil.copytree(path, folder, ignore=hidden, dirs_exist_ok=True)
        data = Path(folder, "data", "shakespeare_char")
        for name, ids in zip(("train.bin", "val.bin"), splits, strict=True):
            ids.numpy().astype(np.uint16).tofile(data / name)
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(vocab)}))
        log, wall, peak = process("train.py", *NANOGPT.split(), cwd=folder)
        saved = torch.load(Path(folder, "out-shakespeare-char", "ckpt.pt"))
        sys.path.insert(0, folder)
        from model import GPT, GPTConfig

        sys.path.remove(folder)
    ms = np.array(re.findall(r"^iter \d+: .+ time ([\d.]+)ms", log, re.M), float)
    found = re.findall(r"^step (\d+): .+ val loss ([\d.]+)", log, re.M)
    ms[[int(step) for step, _ in found]] = np.median(ms)  # these iterations also evaluated
    seconds = ms.sum() / 1000
    rows = [(int(step), ms[: int(step)].sum() / 1000, float(loss)) for step, loss in found]
    flags = {key.upper(): int(value) for key, value in re.findall(r"--(\w+)=(\d+)\b", NANOGPT)}
    with contextlib.redirect_stdout(sys.stderr):
        model = GPT(GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    for count in (20, 500):
        start = time.perf_counter()
        with torch.no_grad():  # temperature and top_k as in its sample.py
            model.generate(torch.zeros(1, 1, dtype=torch.long), count, temperature=0.8, top_k=200)
    sampling = time.perf_counter() - start
    forward, gpt.DEVICE, gpt.BLOCK_SIZE = model.forward, "cpu", flags["BLOCK_SIZE"]
    model.forward = lambda ids: forward(ids, ids)[0]  # given targets, it returns all logits
    exact = gpt.evaluate(model, splits[1])
    say(f"  its checkpoint is of iteration {saved['iter_num']}")
    return {
        f"training seconds to loss {TARGET}": min(seconds_to(rows, TARGET), seconds),
        f"loss after {AFTER[-1]} s of training": exact,
        "whole run: seconds": wall,
        "whole run: seconds in steps": seconds,
        "whole run: loss": exact,
        "whole run: nanoGPT's own estimate of it": rows[-1][2],
        "whole run: peak memory, MiB": peak,
        **speed(flags, seconds, len(ms)),
        "500 sampled characters, seconds": sampling,
    }


def spread(values):
    """min–median–max, or the only value, or nothing."""
    three = sorted({min(values), float(np.median(values)), max(values)} if values else [])
    return "–".join(f"{x:,.0f}" if 1000 <= x < np.inf else f"{x:.4g}" for x in three)


def table(parts, seeds, path):
    """Measure parts in rounds, a seed each, in turn with nanoGPT if path, and print the table."""
    ours, theirs = defaultdict(list), defaultdict(list)
    for seed in range(1, seeds + 1):
        jobs = [(ours, part, seed) for part in parts] + [(theirs, nanogpt, path)] * bool(path)
        for results, job, argument in jobs:
            say(f"round {seed} of {seeds}: {job.__name__}")
            for key, value in job(argument).items():
                results[key].append(value)
                say(f"  {key}: {value:.6g}")
    row = "{:<40} {:>10}  {:<22} {:<22} {}".format
    print(row("min–median–max", "goal", "gpt.py", "nanoGPT" * bool(path), "ratio" * bool(path)))
    for key in dict.fromkeys([*ours, *theirs]):
        pair = [results[key] for results in (ours, theirs)]
        ratio = f"{np.median(pair[1]) / np.median(pair[0]):.3g}" if all(pair) else ""
        print(row(key, GOALS.get(key, ""), *map(spread, pair), ratio).rstrip())
    print(*(f"{part.__name__}: gpt.py {RECIPES[part.__name__]}" for part in parts), sep="\n")
    if path:
        print(f"ratio: nanoGPT's by ours; its seconds to {TARGET}: all, if it never estimates that")


def growth(seeds):
    """Print step time and peak memory at two doublings of each size, beside the operations."""
    default, results = build("")[0], defaultdict(list)
    cases = ["--steps 0", ""]  # no training; the default
    for flag in ("BLOCK_SIZE", "N_EMBD", "N_LAYER", "BATCH_SIZE"):
        cases += [f"--{flag} {default[flag] * times}".lower() for times in (2, 4)]
    for seed in range(1, seeds + 1):
        for case in cases:
            say(f"round {seed} of {seeds}: gpt.py {case}")
            record, _, peak = command_line(f"{GROWTH} {case}", seed)
            ms = 1000 * record["seconds"] / record["steps"] if record else np.nan
            results[case].append((ms, peak))
    row = "{:<18} {:<18} {:>6} {:>10}  {:<16} {:>6}".format
    print(row("min–median–max", "ms a step", "times", "operations", "peak MiB", "more"))
    median = {case: np.median(results[case], 0) for case in cases}
    for case in cases:
        ms, peak = zip(*results[case], strict=True)
        times = f"{median[case][0] / median[''][0]:.2f}"
        work = f"{operations(build(case)[0]) / operations(default):.2f}"
        more = f"{median[case][1] - median[cases[0]][1]:.0f}"
        times = ["", "", ""] if case == cases[0] else [spread(ms), times, work]
        print(row(case or "default", *times, spread(peak), more))
    print("times, operations: by the default's; more: MiB above gpt.py --steps 0")


def long():
    """Print the seconds to nanoGPT's best loss on a GPU and our best, with seed 1."""
    flags, _ = build(RECIPES["long"])
    rows = train(RECIPES["long"], 1, np.linspace(0, LONG, LOOKS + 1)[1:])
    print(f"long: gpt.py {RECIPES['long']}")
    print(f"training seconds to loss {LONG_TARGET}: {seconds_to(rows, LONG_TARGET):.1f}")
    best = min(rows, key=lambda row: row[2])
    print("best: loss {2:.4f} after {1:.1f} s of training, {0} steps".format(*best))
    print("last: loss {2:.4f} after {1:.1f} s of training, {0} steps".format(*rows[-1]))
    for key, value in speed(flags, rows[-1][1], rows[-1][0]).items():
        print(f"{key}: {spread([value])}")


def machine():
    """Print what this machine is, and its ceiling."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    print(f"{(names or [platform.processor()])[0]}, {os.cpu_count()} logical cores,", end=" ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix products in {str(dtype)[6:]}: {ceiling(dtype) / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    TABLE = {part.__name__: part for part in (target, loss, whole, sample)}
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("parts", nargs="*", help="ceiling target loss whole sample growth long")
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--seeds", type=int, help="rounds, a seed each [3]")
    parser.add_argument("--seconds", type=float, help=f"of training in long [{LONG}]")
    parser.add_argument("--quick", action="store_true", help="seconds, not minutes; one round")
    args = parser.parse_args()
    if unknown := set(args.parts) - {*TABLE, "ceiling", "growth", "long"}:
        parser.error(f"no such part: {', '.join(unknown)}")
    globals().update(QUICK if args.quick else {})
    LONG, seeds = args.seconds or LONG, args.seeds or (1 if args.quick else 3)
    text_ids()  # before anything is timed
    machine()
    if parts := [TABLE[part] for part in TABLE if part in (args.parts or TABLE)]:
        table(parts, seeds, args.nanogpt)
    if "growth" in args.parts:
        growth(seeds)
    if "long" in args.parts:
        long()
