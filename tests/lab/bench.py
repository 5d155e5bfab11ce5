"""Measure gpt.py on this machine's CPU, in turn with an earlier commit of it and with nanoGPT.

    python tests/lab/bench.py --before f098a68 --nanogpt ../nanoGPT    the table, three rounds
    python tests/lab/bench.py --rows step hundred --before f098a68     some rows of it
    python tests/lab/bench.py --deletions         a step without each part, with twice each size
    python tests/lab/bench.py --long 900           900 seconds of training a larger model

Each figure comes from a process of its own. The processes run in turn, round by round, and every
ratio is of one round, because the speed of a machine changes from minute to minute. Training is
gpt.py itself: a hook of PyTorch after each optimizer step reads the clock, evaluates with the clock
stopped, and ends the run as Ctrl-C does. nanoGPT trains by its README's recipe for a CPU; its times
and losses are those of its log. nanoGPT's whole run samples nothing; ours does.
"""

import argparse
import json
import os
import pickle
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# gpt and torch are imported in the child processes only: a process that starts others must be
# small, as on Linux their peak memory begins with its own.
ROOT = Path(__file__).resolve().parents[2]
TARGET = 1.88  # nanoGPT's loss on a CPU, by its README
NANOGPT = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1"
    " --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
    " --lr_decay_iters=2000 --dropout=0.0"
)
QUICK_NANOGPT = NANOGPT + " --max_iters=10 --lr_decay_iters=10 --eval_interval=5"
SMALL = "--n-layer 2 --block-size 64 --batch-size 16 --learning-rate 5e-3"  # to TARGET soonest
LONG = (
    "--n-embd 160 --n-layer 4 --n-head 5 --block-size 256 --batch-size 8 --dropout 0.15"
    " --learning-rate 2.37e-3"
)
CHANGES = (  # for --deletions: each part alone, then twice each size
    "",
    "--no-attention",
    "--no-query-key",
    "--no-scale",
    "--no-causal",
    "--no-flash",
    "--n-head 1",
    "--no-projection",
    "--no-position",
    "--no-rotary",
    "--no-mlp",
    "--no-gelu",
    "--no-residual",
    "--no-norm",
    "--no-pre-norm",
    "--n-layer 1",
    "--n-layer 0",
    "--no-tie",
    "--no-scaled-init",
    "--bias",
    "--optimizer sgd",
    "--no-average",
    "--bfloat16",
    "--n-embd 128",
    "--n-layer 6",
    "--block-size 256",
    "--batch-size 16",
)
ROWS = {  # what is measured, whose figure is divided by whose, and the goal of that ratio
    "step": ("a step of the default run, ms", "now/before", "1.0"),
    "hundred": ("--steps 100, whole process, s", "now/before", "0.5"),
    "float32": (f"training to {TARGET}, s", "nanoGPT/now", "10"),
    "bfloat16": (f"training to {TARGET}, --bfloat16, s", "nanoGPT/now", "12"),
    "run": ("the whole default run, s", "now/nanoGPT", "0.55"),
    "loss": ("its loss", "now/nanoGPT", ""),
    "memory": ("its peak memory, MiB", "now/nanoGPT", "1.0"),
    "sampling": ("500 sampled characters, s", "nanoGPT/now", "2"),
    "two": ("two runs at once by one alone", "", "2.8"),
}


# 1. What runs in a child process, with the gpt.py that lies in the current folder.
def train(recipe, hook):
    """Run gpt.py by a recipe for ever, calling hook after each step, until that raises Ctrl-C."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    sys.argv = f"gpt.py --device cpu --steps {10**9} --sample 0 {recipe}".split()
    handle = register_optimizer_step_post_hook(hook)
    with suppress(KeyboardInterrupt, SystemExit):
        runpy.run_path("gpt.py", run_name="__main__")
    handle.remove()


def measure_step(recipe, count):
    """Milliseconds from the end of a step to the end of the next: the median of count."""
    ends = []

    def hook(*_):
        ends.append(time.perf_counter())
        if len(ends) > count + 5:
            raise KeyboardInterrupt

    train(recipe, hook)
    steps = [1000 * (end - start) for start, end in zip(ends[5:], ends[6:], strict=False)]
    return statistics.median(steps)


class Clock:
    """A hook that counts training seconds and evaluates the average of the weights now and then."""

    def __init__(self, limit, target, looks):
        import gpt

        self.limit, self.target = limit, target
        self.marks = [limit * (look + 1) / looks for look in range(looks)]
        self.steps, self.seconds, self.started = 0, 0.0, None
        self.rows = []
        text = gpt.read_text()
        self.vocab = "".join(sorted(set(text)))
        self.val_ids = gpt.encode(text, self.vocab)[len(text) * 9 // 10 :]
        self.mean = None

    def __call__(self, optimizer, *_):
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
        self.steps += 1
        running = sys.modules["__main__"]
        if self.mean is None:
            running.look = lambda *_: True  # the looks are here; an earlier gpt.py stops at None
            self.mean = running.GPT(len(self.vocab))
        weights = optimizer.param_groups[0]["params"]
        for mean, weight in zip(self.mean.parameters(), weights, strict=True):
            mean.data.lerp_(weight.data, 16 / (self.steps + 15))
        if self.marks and self.seconds >= self.marks[0]:
            self.marks.pop(0)
            loss = running.evaluate(self.mean, self.val_ids)
            self.rows.append([self.steps, self.seconds, loss])
            print(
                "{:7} steps {:8.1f} s of training  loss {:.4f}".format(*self.rows[-1]), flush=True
            )
            if loss <= self.target or not self.marks:
                raise KeyboardInterrupt
        self.started = time.perf_counter()


def measure_training(recipe, limit, target, looks):
    """Rows [steps, training seconds, loss], looks of them up to limit seconds or to target."""
    clock = Clock(limit, target, looks)
    train(recipe, clock)
    return clock.rows


def measure_sampling(folder):
    """Seconds to sample 500 characters, the second time: by gpt.py, or by the nanoGPT in folder."""
    import torch

    if folder:
        sys.path.insert(0, folder)
        from model import GPT, GPTConfig

        saved = torch.load(Path(folder, "out-shakespeare-char", "ckpt.pt"))
        model = GPT(GPTConfig(**saved["model_args"])).eval()
        start = torch.zeros(1, 1, dtype=torch.long)
        for _ in range(2):
            begin = time.perf_counter()
            model.generate(start, 500, temperature=0.8, top_k=200)
        return time.perf_counter() - begin
    import gpt

    vocab = "".join(sorted(set(gpt.read_text())))
    gpt.DEVICE = "cpu"
    model = gpt.GPT(len(vocab)).eval()
    for _ in range(2):
        begin = time.perf_counter()
        gpt.sample(model, vocab, "")
    return time.perf_counter() - begin


# 2. Processes, in a temporary folder that holds now/, before/ and nanoGPT/, each with the text.
def process(folder, *args):
    """Run python with args in folder: what it printed, its wall seconds, its peak memory in MiB."""
    begin = time.perf_counter()
    log = Path(folder, "log.txt")
    with log.open("w") as file:
        child = subprocess.Popen([sys.executable, *args], cwd=folder, stdout=file, stderr=file)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"python {' '.join(args)} failed:\n{log.read_text()[-2000:]}")
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return log.read_text(), seconds, peak


def call(folder, function, *args):
    """What a function of part 1 returns in a process of its own in folder."""
    printed, _, _ = process(folder, __file__, "--child", json.dumps([function.__name__, *args]))
    return json.loads(printed.splitlines()[-1])


def seconds_to(rows, loss):
    """Training seconds at the first row at that loss or lower; infinity if there is none."""
    return min((seconds for _, seconds, value in rows if value <= loss), default=float("inf"))


def two_at_once(folder, steps):
    """Seconds of two runs side by side, by those of one alone."""
    command = [sys.executable, "gpt.py", "--device", "cpu", "--steps", str(steps), "--sample", "0"]
    seconds = []
    for count in (1, 2):
        begin = time.perf_counter()
        options = [["--checkpoint", f"{n}.pt"] for n in range(count)]
        runs = [
            subprocess.Popen(command + option, cwd=folder, stdout=subprocess.DEVNULL)
            for option in options
        ]
        for run in runs:
            run.wait()
        seconds.append(time.perf_counter() - begin)
    return seconds[1] / seconds[0]


def measure(folder, row, seed, quick):
    """The figures of a row for the gpt.py in folder, by the names in ROWS."""
    if row == "step":
        return {"step": call(folder, measure_step, f"--seed {seed}", 5 if quick else 300)}
    if row == "hundred":
        args = f"gpt.py --device cpu --steps {10 if quick else 100} --seed {seed}".split()
        return {"hundred": process(folder, *args)[1]}
    if row in ("float32", "bfloat16"):
        recipe = f"{SMALL} --seed {seed}"
        if row == "bfloat16":
            recipe += " --bfloat16 --no-flash"
        limit = 1 if quick else 60
        rows = call(folder, measure_training, recipe, limit, TARGET, 4 * limit)
        return {row: seconds_to(rows, TARGET)}
    if row == "run":
        args = f"gpt.py --device cpu --seed {seed}".split()
        if quick:
            args += ["--steps", "10", "--sample", "20"]
        _, seconds, memory = process(folder, *args)
        record = json.loads(Path(folder, "runs.jsonl").read_text().splitlines()[-1])
        return {"run": seconds, "loss": record["val_loss"], "memory": memory}
    if row == "sampling":
        return {"sampling": call(folder, measure_sampling, "")}
    return {"two": two_at_once(folder, 10 if quick else 100)}


def measure_nanogpt(folder, quick):
    """nanoGPT's figures. If it never reaches TARGET, its seconds are all that it trained."""
    recipe = QUICK_NANOGPT if quick else NANOGPT
    log, wall, memory = process(folder, "train.py", *recipe.split())
    times = [float(ms) for ms in re.findall(r"^iter \d+: .+ time ([\d.]+)ms", log, re.M)]
    looks = re.findall(r"^step (\d+): .+ val loss ([\d.]+)", log, re.M)
    for step, _ in looks:
        times[int(step)] = statistics.median(times)  # this iteration also evaluated
    rows = [(int(step), sum(times[: int(step)]) / 1000, float(loss)) for step, loss in looks]
    seconds = min(seconds_to(rows, TARGET), sum(times) / 1000)
    return {
        "float32": seconds,
        "bfloat16": seconds,
        "run": wall,
        "loss": rows[-1][2],
        "memory": memory,
        "sampling": call(folder, measure_sampling, os.path.abspath(folder)),
    }


def lay_out(folder, before, nanogpt):
    """Fill the temporary folder: now/, before/ and nanoGPT/ with their text."""
    path = Path("input.txt") if Path("input.txt").exists() else ROOT / "input.txt"
    if not path.exists():
        sys.exit("bench.py: error: there is no input.txt; python gpt.py fetches it")
    text = path.read_text("utf-8")
    places = ["now"]
    Path(folder, "now").mkdir()
    shutil.copy(ROOT / "gpt.py", Path(folder, "now"))
    if before:
        places.append("before")
        Path(folder, "before").mkdir()
        command = ["git", "-C", str(ROOT), "show", f"{before}:gpt.py"]
        code = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        Path(folder, "before", "gpt.py").write_bytes(code)
    if nanogpt:
        hidden = shutil.ignore_patterns(".*", "out*")
        shutil.copytree(nanogpt, Path(folder, "nanoGPT"), ignore=hidden)
        data = Path(folder, "nanoGPT", "data", "shakespeare_char")
        characters = sorted(set(text))
        ids = [characters.index(character) for character in text]
        split = len(ids) * 9 // 10
        for name, part in (("train.bin", ids[:split]), ("val.bin", ids[split:])):
            (data / name).write_bytes(b"".join(id.to_bytes(2, "little") for id in part))
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
    for place in places:
        Path(folder, place, "input.txt").write_text(text, "utf-8")
    return places


# 3. Tables.
def middle(values):
    """The median and, where there are several, the least and the greatest."""
    if not values:
        return ""
    text = f"{statistics.median(values):.4g}"
    if len(values) > 1:
        text += f" ({min(values):.4g} to {max(values):.4g})"
    return text


def show(rows):
    """Print rows of text in columns as wide as their contents."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def compare(rows, rounds, quick, before, nanogpt):
    """Measure rows in rounds, a seed each, and print the table: medians, least and greatest."""
    figures = {"now": {}, "before": {}, "nanoGPT": {}}
    with tempfile.TemporaryDirectory() as folder:
        places = lay_out(folder, before, nanogpt)
        for seed in range(1, rounds + 1):
            for row in rows:
                for place in places:
                    for name, figure in measure(f"{folder}/{place}", row, seed, quick).items():
                        figures[place].setdefault(name, []).append(figure)
                        print(f"round {seed}: {place} {name} {figure:.4g}", flush=True)
            if nanogpt:
                for name, figure in measure_nanogpt(f"{folder}/nanoGPT", quick).items():
                    figures["nanoGPT"].setdefault(name, []).append(figure)
                    print(f"round {seed}: nanoGPT {name} {figure:.4g}", flush=True)
    table = [["", "now", "before", "nanoGPT", "ratio", "", "goal"]]
    for name, (what, ratio, goal) in ROWS.items():
        if name not in figures["now"]:
            continue
        ratios = []
        above, _, below = ratio.partition("/")
        if ratio and name in figures[above] and name in figures[below]:
            pairs = zip(figures[above][name], figures[below][name], strict=True)
            ratios = [one / other for one, other in pairs]
        cells = [middle(figures[place].get(name, [])) for place in figures]
        table.append([what, *cells, middle(ratios), ratio, goal])
    show(table)


def compare_changes(rounds, quick):
    """Print the time of a step with each of CHANGES, by the full model's in the same round."""
    times = {change: [] for change in CHANGES}
    with tempfile.TemporaryDirectory() as folder:
        lay_out(folder, None, None)
        for seed in range(1, rounds + 1):
            for change in CHANGES:
                recipe = f"{change} --seed {seed}"
                count = 5 if quick else 100
                times[change].append(call(f"{folder}/now", measure_step, recipe, count))
    table = [["flags", "ms a step", "by the full model's"]]
    for change in sorted(CHANGES, key=lambda change: statistics.median(times[change])):
        ratios = [one / full for one, full in zip(times[change], times[""], strict=True)]
        table.append([change or "the full model", middle(times[change]), middle(ratios)])
    show(table)


def train_long(seconds, recipe):
    """Print the curve of one long run."""
    print(f"python gpt.py {recipe}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lay_out(folder, None, None)
        rows = call(f"{folder}/now", measure_training, recipe, seconds, 0.0, 40)
    for row in rows:
        print("{:7} steps {:8.1f} s of training  loss {:.4f}".format(*row))


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    names = [row for row in ROWS if row not in ("loss", "memory")]  # which come with run
    about = f"some of: {', '.join(names)}"
    how = dict(nargs="+", choices=names, default=names, metavar="ROW", help=about)
    parser.add_argument("--rows", **how)
    parser.add_argument("--before", metavar="COMMIT", help="a commit of this project")
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=3, help="of all rows, a seed each [3]")
    parser.add_argument("--deletions", action="store_true", help="a step with each change")
    parser.add_argument("--long", type=float, metavar="SECONDS", help="train a larger model")
    parser.add_argument("--recipe", default=LONG, help="flags of gpt.py for --long [%(default)s]")
    parser.add_argument(
        "--quick", action="store_true", help="does it work? the figures do not count"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sys.path.insert(0, os.getcwd())
        function, *values = json.loads(args.child)
        print(json.dumps(globals()[function](*values)))
    elif args.deletions:
        compare_changes(args.rounds, args.quick)
    elif args.long:
        train_long(args.long, args.recipe)
    else:
        compare(args.rows, args.rounds, args.quick, args.before, args.nanogpt)


if __name__ == "__main__":
    main()
