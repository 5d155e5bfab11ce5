"""Train the full model and every deletion, several seeds each, and print one table of them all.

    python tests/deletions.py                       a seed each: about 20 minutes on two cores
    python tests/deletions.py --seeds 3             seeds 1, 2 and 3
    python tests/deletions.py --steps 500 --n-embd 32    all other flags go to every run

It reads the text and adds to runs.jsonl in the current folder, as gpt.py does, but saves no weights
and samples nothing. What runs.jsonl holds already is not run again, so a sweep that was stopped, by
Ctrl-C or worse, goes on where it was.
"""

import argparse
import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt  # noqa: E402

OTHER = {"N_HEAD": [1], "OPTIMIZER": ["sgd"], "N_LAYER": [1, 0]}  # what is not on or off
CUTS = [{}]  # the full model, then every part's other settings in the order of the flags
for flag in gpt.MODEL:
    switch = [not gpt.FULL[flag]] if type(gpt.FULL[flag]) is bool else []
    CUTS += [{flag: value} for value in OTHER.get(flag, switch)]


def identity(given):
    """What a run with the flags given, as {"N_HEAD": 1}, will have in its record."""
    flags = gpt.FULL | given
    vars(gpt).update(flags)
    parts = [flag for flag in gpt.MODEL if flag not in gpt.SIZES]
    return {
        "changes": {flag: flags[flag] for flag in parts if flags[flag] != gpt.FULL[flag]},
        "sizes": {flag: flags[flag] for flag in gpt.SIZES},
        "steps": flags["STEPS"],
        "seed": flags["SEED"],
        "data": hashlib.sha256(gpt.read_text().encode()).hexdigest()[:12],
    }


def recorded():
    """The runs in runs.jsonl, without half-written lines."""
    runs = []
    path = Path("runs.jsonl")
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            runs.append(json.loads(line))
    return runs


def done(given):
    """The record of a finished run with the flags given, or None."""
    want = identity(given).items()
    return next((run for run in recorded() if type(run) is dict and want <= run.items()), None)


def sweep(given, seeds):
    """Run every cut with seeds from SEED on, on top of the flags given, and print the table."""
    first = given.get("SEED", gpt.FULL["SEED"])
    plan = [given | cut | {"SEED": first + n} for n in range(seeds) for cut in CUTS]
    left = [flags for flags in plan if not done(flags)]
    compare, records = gpt.compare, []
    gpt.compare = records.append  # gpt.main calls it at the end of a run
    start = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        for n, flags in enumerate(left):
            each = (time.monotonic() - start) / n if n else None
            when = f"about {each * (len(left) - n) / 60:.0f} minutes left" if n else "the first"
            print(f"\n{len(left) - n} of {len(plan)} runs left, {when}", flush=True)
            gpt.main(flags | {"SAVE": "", "SAMPLE": 0, "PROMPT": ""})
            if records[-1]["steps"] < gpt.STEPS:  # Ctrl-C: it is recorded, but no part of the sweep
                break
    gpt.compare = compare
    if finished := [run for run in map(done, plan) if run]:
        gpt.compare(finished[0])


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    how = dict(formatter_class=formatter, allow_abbrev=False)  # --seed is gpt.py's
    parser = argparse.ArgumentParser(description=__doc__, **how)
    parser.add_argument("--seeds", type=int, default=1, help="of each, from --seed on [1]")
    args, rest = parser.parse_known_args()
    given = gpt.parse(rest)
    if args.seeds < 1 or given.get("STEPS") == 0 or "LOAD" in given:
        parser.error("--seeds and --steps must be 1 or more, and --load has no place here")
    try:
        sweep(given, args.seeds)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
