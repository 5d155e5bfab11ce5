"""Train a character-level GPT on Tiny Shakespeare, and delete any part of it with one flag."""

import argparse
import copy
import hashlib
import json
import math
import os
import re
import sys
import time
import urllib.request
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # two runs at once do not wait for each other

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# The flags: edit a line, or run gpt.py --no-norm, or in a notebook gpt.main(NORM=False).
ATTENTION = True  # off: each character is computed on alone and never sees another
QUERY_KEY = True  # off: every visible character weighs the same, the plain average of the past
SCALE = True  # off: scores are sqrt(D) times as large: a query sees 6 characters at first, not 43
CAUSAL = True  # off: it reads the answer: the loss collapses, the samples are nonsense
FLASH = True  # off: softmax(QKᵀ/√D)·V written out, with the same numbers
N_HEAD = 4  # 1: one look, at 2 to 6 characters; the four heads look at 2 to 25
PROJECTION = True  # off: heads are laid side by side and never mixed
POSITION = True  # off: a query cannot tell near from far and goes on to see 48 characters, not 17
ROTARY = True  # off: positions are learned and added at the input; attention narrows later
MLP = True  # off: characters communicate but nothing is computed from what they learn
GELU = True  # off: ReLU, a corner in place of a curve
RESIDUAL = True  # off: positions become alike, and gradients fade on their way down
NORM = True  # off: scores start near 0, so attention stays a plain average for long
PRE_NORM = True  # off: the norm comes after the sum, as in 2017; the first attention averages
DROPOUT = 0.0  # the share of each layer's output that is zeroed in training, 0 to 1
N_LAYER = 3  # 1: no head can use what another found; 0: the bigram model, embedding then head
N_EMBD = 64  # channels of each character's vector, a multiple of 2 * N_HEAD
BLOCK_SIZE = 128  # characters of context
TIE = True  # off: reading and writing characters get a matrix each
BIAS = False  # on: every linear layer and norm adds a vector, as in GPT-2
SCALED_INIT = True  # off: every matrix starts at N(0, 0.02²): scores near 0, attention an average
OPTIMIZER = "adamw"  # "sgd": one step size for all weights
LEARNING_RATE = None  # constant; None: the optimizer's own best, 3e-3 or 0.5 at width 64
AVERAGE = True  # off: the last weights with their noise, not a running average of all steps
BATCH_SIZE = 8  # texts in a step
BFLOAT16 = False  # on: matrix products of training in bfloat16, faster where there is hardware
NOTE = ""  # what you changed in the code; it is part of the run's name
STEPS = 2000  # optimizer steps; 0: none, sample from CHECKPOINT
SEED = 1  # draws the weights, the batches and the sample
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # or "mps"
DATA = "input.txt"  # a UTF-8 text; input.txt is fetched if it is not there
CHECKPOINT = "gpt.pt"  # where the run's best model is kept, with its flags
PROMPT = ""  # how the sample begins; empty: with the vocabulary's first character, a new line
SAMPLE = 500  # how many characters to sample
TEMPERATURE = 1.0  # 0: always the likeliest character; below 1: safe; above 1: wild
TOP_K = None  # sample from so many of the likeliest characters; None: from all


# 1. The model: B texts, T characters, C channels, H heads of D = C / H channels, V characters.
def attention(q, k, v, causal=True, scale=True, flash=True):
    """softmax(QKᵀ/√D)·V, all (B, H, T, D); the plain mean of V where q and k are None.
    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762"""
    factor = v.size(-1) ** -0.5 if scale else 1.0
    if flash and q is not None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=factor)
    scores = v.new_zeros(v.size(-2), v.size(-2))  # (T, T)
    if q is not None:
        scores = q @ k.mT * factor  # (B, H, T, T)
    if causal:
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)  # (B, H, T, T)
    return scores.softmax(-1) @ v  # (B, H, T, D)


class Attention(nn.Module):
    """Communication: each character gathers from those before it. (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.n_head = N_HEAD
        self.options = dict(causal=CAUSAL, scale=SCALE, flash=FLASH)
        self.query_key = QUERY_KEY
        self.rotary = QUERY_KEY and POSITION and ROTARY
        if QUERY_KEY:
            self.query = nn.Linear(N_EMBD, N_EMBD, bias=BIAS)
            self.key = nn.Linear(N_EMBD, N_EMBD, bias=BIAS)
        self.value = nn.Linear(N_EMBD, N_EMBD, bias=BIAS)
        self.projection = nn.Linear(N_EMBD, N_EMBD, bias=BIAS) if PROJECTION else nn.Identity()
        if self.rotary:
            frequency = 1e4 ** (-torch.arange(0, N_EMBD // N_HEAD, 2) * N_HEAD / N_EMBD)  # (D / 2)
            angle = torch.outer(torch.arange(BLOCK_SIZE), frequency)  # (T, D / 2)
            self.register_buffer("rotation", torch.exp(1j * angle), persistent=False)

    def forward(self, x):
        q, k = None, None
        if self.query_key:
            q = self.query(x).unflatten(2, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
            k = self.key(x).unflatten(2, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
            if self.rotary:
                q, k = rotate(torch.stack([q, k]), self.rotation)  # (B, H, T, D)
        v = self.value(x).unflatten(2, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
        y = attention(q, k, v, **self.options)  # (B, H, T, D)
        return self.projection(y.transpose(1, 2).flatten(2))  # (B, T, C)


def rotate(x, rotation):
    """Turn each channel pair of q and k, stacked in x (2, B, H, T, D), by angles that grow with T.
    Su et al. 2021, https://arxiv.org/abs/2104.09864"""
    pairs = torch.view_as_complex(x.float().unflatten(4, (-1, 2)))  # (2, B, H, T, D / 2)
    turned = pairs * rotation[: x.size(3)]  # (2, B, H, T, D / 2)
    return torch.view_as_real(turned).flatten(4).type_as(x)  # (2, B, H, T, D)


class FeedForward(nn.Module):
    """Computation: a multilayer perceptron on each character alone. (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.expansion = nn.Linear(N_EMBD, 4 * N_EMBD, bias=BIAS)
        self.activation = nn.GELU() if GELU else nn.ReLU()
        self.projection = nn.Linear(4 * N_EMBD, N_EMBD, bias=BIAS)

    def forward(self, x):
        return self.projection(self.activation(self.expansion(x)))  # (B, T, C)


class Sublayer(nn.Module):
    """x + f(norm(x)), where f is attention or the feed-forward. (B, T, C) to (B, T, C)."""

    def __init__(self, f):
        super().__init__()
        self.f = f
        self.norm = nn.LayerNorm(N_EMBD, bias=BIAS) if NORM else nn.Identity()
        self.dropout = nn.Dropout(DROPOUT)
        self.pre_norm = PRE_NORM
        self.residual = RESIDUAL

    def forward(self, x):
        y = self.norm(x) if self.pre_norm else x  # (B, T, C)
        y = self.dropout(self.f(y))  # (B, T, C)
        if self.residual:
            y = x + y  # (B, T, C)
        return y if self.pre_norm else self.norm(y)  # (B, T, C)


class GPT(nn.Module):
    """Ids (B, T), where T is at most BLOCK_SIZE, to the logits (B, T, V) of each next character."""

    def __init__(self, vocab_size):
        super().__init__()
        self.block_size = BLOCK_SIZE
        self.wte = nn.Embedding(vocab_size, N_EMBD)
        self.wpe = nn.Embedding(BLOCK_SIZE, N_EMBD) if POSITION and not ROTARY else None
        self.layers = nn.Sequential()
        for n in range(1, N_LAYER + 1):
            if ATTENTION:
                self.layers.add_module(f"attention{n}", Sublayer(Attention()))
            if MLP:
                self.layers.add_module(f"feed_forward{n}", Sublayer(FeedForward()))
        self.ln_f = nn.LayerNorm(N_EMBD, bias=BIAS) if NORM else nn.Identity()
        self.lm_head = nn.Linear(N_EMBD, vocab_size, bias=False)
        if TIE:
            self.lm_head.weight = self.wte.weight
        for name, weight in self.named_parameters():
            std = 0.02
            if SCALED_INIT:
                std = weight.size(-1) ** -0.5  # what comes out is as large as what went in
                if "projection" in name and RESIDUAL:
                    std = 0.0  # each sublayer starts as x + 0
            if weight.dim() == 2:  # drawn by its name: no part changes how another starts
                generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
                nn.init.normal_(weight, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
            elif name == "ln_f.weight" and SCALED_INIT:
                nn.init.constant_(weight, N_EMBD**-0.5)  # small logits: the first loss is ln V

    def forward(self, ids):
        x = self.wte(ids)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[: ids.size(1)]  # (B, T, C)
        return self.lm_head(self.ln_f(self.layers(x)))  # (B, T, V)


# 2. Training.
@torch.no_grad()
def evaluate(model, ids):
    """Mean cross-entropy in nats a character over the whole windows of ids (N,) or of 2**17."""
    model.eval()
    windows = ids[: 2**17].unfold(0, model.block_size + 1, model.block_size)  # (N / T, T + 1)
    losses = []
    for window in windows.split(8):
        logits = model(window[:, :-1])  # (B, T, V)
        losses.append(F.cross_entropy(logits.mT, window[:, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


def look(model, best, val_ids, step, train_loss, run):
    """Evaluate the model. If no look was better, it becomes best and CHECKPOINT. Adds [step, train
    loss, validation loss] to run["curve"] and prints that. Returns whether the loss is a number."""
    val_loss = evaluate(model, val_ids)
    if not math.isfinite(val_loss):
        run["val_loss"] = None
        print("The loss is no longer a number, so training stops. Nothing is sampled.")
        return False
    lowest = min([row[2] for row in run["curve"]], default=math.inf)
    run["curve"].append([step, train_loss, val_loss])
    if val_loss < lowest:
        run["val_loss"] = val_loss
        best.load_state_dict(model.state_dict())
        part = f"{os.path.realpath(CHECKPOINT)}.{os.getpid()}.part"
        with open(part, "wb") as file:
            torch.save({"run": run, "weights": best.state_dict()}, file)
        os.replace(part, os.path.realpath(CHECKPOINT))
    left = int((time.time() - run["started"]) / step * (STEPS - step))
    fine = (min(val_loss, 2.0) - 1.4) / 0.02  # a sign for each 0.02 nats from 1.4 to 2
    coarse = (max(val_loss, 2.0) - 2.0) / 0.2  # and for each 0.2 nats above
    bar = "=" * min(round(fine + coarse), 44)
    print(f"{step:7}{train_loss:9.3f}{val_loss:9.3f}{left // 60:6}:{left % 60:02}  {bar}")
    return True


def train(model, train_ids, val_ids, run):
    """Train by the flags until STEPS, Ctrl-C or a loss that is no number; the looks fill run.
    Returns the model of the lowest validation loss."""
    make, best_rate = OPTIMIZERS[OPTIMIZER]
    rate = LEARNING_RATE
    if rate is None:
        rate = best_rate * (64 / N_EMBD) ** 0.5
    optimizer = make(model.parameters(), rate, fused=True)
    smooth = copy.deepcopy(model) if AVERAGE else model
    weights = list(zip(smooth.parameters(), model.parameters(), strict=True))
    best = copy.deepcopy(model).eval()
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    windows = train_ids.unfold(0, BLOCK_SIZE + 1, 1)  # (N - T, T + 1): every text to train on
    losses = torch.full([50], torch.nan, device=DEVICE)  # of the last steps
    looks = set(range(STEPS, 0, -max(100, math.ceil(STEPS / 10))))
    if min(looks) >= 200:
        looks.add(100)
    try:
        for step in range(1, STEPS + 1):
            model.train()
            draw = torch.randint(len(windows), [BATCH_SIZE], generator=generator, device=DEVICE)
            window = windows[draw]  # (B, T + 1): a character and those to predict from it
            with torch.autocast(DEVICE, torch.bfloat16, BFLOAT16):
                logits = model(window[:, :-1])  # (B, T, V)
                loss = F.cross_entropy(logits.mT, window[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step % 50] = loss.detach()
            if AVERAGE:  # step n weighs about n^15; https://arxiv.org/abs/1212.1824
                for mean, weight in weights:
                    mean.data.lerp_(weight.data, 16 / (step + 15))
                for mean, buffer in zip(smooth.buffers(), model.buffers(), strict=True):
                    mean.copy_(buffer)
            if step in looks:
                if not look(smooth, best, val_ids, step, losses.nanmean().item(), run):
                    break
    except KeyboardInterrupt:
        if not run["curve"]:
            raise
        run["steps"] = step
        with suppress(BrokenPipeError):  # the same Ctrl-C has ended what reads the pipe
            look(smooth, best, val_ids, step, losses.nanmean().item(), run)
    return best


# 3. Text and sample.
def read(path):
    """The text of a UTF-8 file. Any line end is a new line."""
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path!r} cannot be read ({error}); give a UTF-8 text file") from error


def read_text():
    """The text of DATA. Only input.txt is fetched if it is not there."""
    if DATA == "input.txt" and not os.path.lexists(DATA):
        try:
            fetched = urllib.request.urlopen(URL, timeout=10).read()
            require(hashlib.sha256(fetched).hexdigest() == SHA256, "it is another text")
            Path("input.txt.part").write_bytes(fetched)
            os.replace("input.txt.part", DATA)
        except Exception as error:
            print(f"Python's own manual stands in for {URL} ({error}); save that as input.txt.")
            return "\n".join(topics.values())
    return read(DATA)


def encode(text, vocab):
    """Ids (N,) of N characters: their places in vocab, a sorted string."""
    unknown = sorted(set(text) - set(vocab))
    require(not unknown, f"PROMPT={text!r}: the model does not know {unknown}; leave them out")
    return torch.tensor([vocab.index(character) for character in text])


@torch.inference_mode()
def sample(model, vocab, prompt):
    """The prompt and SAMPLE characters more, each drawn from what the model predicts."""
    generator = torch.Generator().manual_seed(SEED)
    ids = encode(prompt or vocab[0], vocab)
    model.eval()
    for _ in range(SAMPLE):
        context = ids[None, -model.block_size :].to(model.wte.weight.device)  # (1, T)
        logits = model(context)[0, -1].cpu() / max(TEMPERATURE, 1e-6)  # (V)
        logits, places = logits.topk(min(TOP_K or len(vocab), len(vocab)))  # the likeliest first
        drawn = logits.softmax(-1).multinomial(1, generator=generator)  # (1)
        ids = torch.cat([ids, places[drawn]])  # (N + 1)
    return "".join(vocab[place] for place in ids)


# 4. The record: a run is named by what differs from FULL.
# fmt: off
FULL = dict(
    ATTENTION=True, QUERY_KEY=True, SCALE=True, CAUSAL=True, FLASH=True, N_HEAD=4, PROJECTION=True,
    POSITION=True, ROTARY=True, MLP=True, GELU=True, RESIDUAL=True, NORM=True, PRE_NORM=True,
    DROPOUT=0.0, N_LAYER=3, N_EMBD=64, BLOCK_SIZE=128, TIE=True, BIAS=False, SCALED_INIT=True,
    OPTIMIZER="adamw", LEARNING_RATE=None, AVERAGE=True, BATCH_SIZE=8, BFLOAT16=False, NOTE="",
)
KINDS = dict(  # of the flags that are no part of a name or may be None
    STEPS=int, SEED=int, DEVICE=str, DATA=str, CHECKPOINT=str, PROMPT=str, SAMPLE=int,
    TEMPERATURE=float, TOP_K=int, LEARNING_RATE=float,
)
PARTS = "attention", "rotate", "Attention", "FeedForward", "Sublayer", "GPT", "evaluate", "train"
# fmt: on
OPTIMIZERS = {"adamw": (torch.optim.AdamW, 3e-3), "sgd": (torch.optim.SGD, 0.5)}  # at width 64
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SOURCE = Path(__file__).read_text("utf-8")
SHIPPED = "0527ff9a"  # what hash_code gave when this file was shipped


class BadInput(ValueError):
    """A flag or a file that cannot be used. The message says what would be right."""


def require(condition, message):
    """BadInput with that message, unless condition holds."""
    if not condition:
        raise BadInput(message)


def hash_code(source):
    """A hash of the code below the flags, without comments, docstrings and blank lines."""
    code = re.sub(r'""".*?"""|#[^\n]*|SHIPPED = "\w*"', "", source, flags=re.S)
    code = "\n".join(line.rstrip() for line in code.splitlines() if line.strip())
    return hashlib.sha256(code.partition("\ndef ")[2].encode()).hexdigest()[:8]


def name_run(flags):
    """What differs from the full model as shipped, as one would type it: NORM=False N_HEAD=1."""
    differs = [f"{flag}={value!r}" for flag, value in flags.items() if value != FULL[flag]]
    if hash_code(SOURCE) != SHIPPED:
        differs.append(f"CODE={hash_code(SOURCE)}")
    for name in PARTS:
        part = globals()[name]
        pieces = [part, *getattr(part, "__dict__", {}).values()]  # a class and its methods
        if any(getattr(piece, "__module__", __name__) != __name__ for piece in pieces):
            differs.append(f"{name}=edited")  # by a notebook: gpt.attention = mine
    return " ".join(differs) or "full"


def compare(run):
    """Print the runs of runs.jsonl that saw the same batches, best first, with their costs."""
    rows = {}
    for line in read("runs.jsonl").splitlines():
        with suppress(ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
            row = json.loads(line)
            if all(row[key] == run[key] for key in ("data", "steps", "seed")):
                loss = float("inf" if row["val_loss"] is None else row["val_loss"])
                rows[str(row["name"])] = loss, int(row["params"]), float(row["seconds"])
    finished = [name for name in rows if rows[name][0] < math.inf] or list(rows)
    base = min(finished, key=lambda name: len(re.findall(r"\w=", name)))  # differs least from full
    print("\n     loss    cost  parameters  seconds  name")
    for name, (loss, params, seconds) in sorted(rows.items(), key=lambda row: row[1]):
        mark = ">" if name == run["name"] else " "
        numbers = f"{loss:8.3f}{loss - rows[base][0]:+8.3f}"
        if loss == math.inf:
            numbers = "diverged        "
        print(f"{mark}{numbers}{params:12,}{seconds:9.0f}  {name}")


# 5. The command line.
def check(flag, value):
    """The value of a flag as a plain Python value. BadInput where it cannot be used."""
    kind = KINDS.get(flag) or type(FULL[flag])
    if value is None and flag in ("LEARNING_RATE", "TOP_K"):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if kind is float and type(value) is int:
        value = float(value)
    require(type(value) is kind, f"{flag}={value!r}: give a value of type {kind.__name__}")
    if kind in (int, float):
        least = 1 if flag in ("N_HEAD", "N_EMBD", "BLOCK_SIZE", "BATCH_SIZE", "TOP_K") else 0
        require(least <= value < 2**31, f"{flag}={value}: give a number from {least} to 2**31")
    return value


def main(**flags):
    """Train, or sample where STEPS is 0, with flags as NORM=False. Returns model, vocab, run."""
    before = {flag: globals()[flag] for flag in FULL | KINDS}
    try:
        for flag, value in (before | flags).items():
            require(flag in before, f"there is no flag {flag}; the file begins with all there are")
            globals()[flag] = check(flag, value)
        require(N_EMBD % (2 * N_HEAD) == 0, f"{N_EMBD=} must be a multiple of 2 * {N_HEAD=}")
        require(OPTIMIZER in OPTIMIZERS, f"OPTIMIZER={OPTIMIZER!r}: give one of {[*OPTIMIZERS]}")
        require(DROPOUT <= 1, f"DROPOUT={DROPOUT}: give a share from 0 to 1")
        devices = {"cpu", str(torch.accelerator.current_accelerator(check_available=True) or "cpu")}
        require(DEVICE in devices, f"DEVICE={DEVICE!r} is not here; give one of {devices}")
        require(CHECKPOINT.endswith(".pt"), f"CHECKPOINT={CHECKPOINT!r}: give a name in .pt")
        if STEPS > 0:
            return experiment()
        try:
            run, weights = torch.load(CHECKPOINT, DEVICE).values()
            for flag in FULL:
                globals()[flag] = check(flag, run["flags"][flag])
            model = GPT(len(run["vocab"])).to(DEVICE)
            model.load_state_dict(weights)
        except Exception as error:
            problem = f"{type(error).__name__}; python gpt.py makes one"
            raise BadInput(f"CHECKPOINT={CHECKPOINT!r} is no model: {problem}") from error
        print(f"{CHECKPOINT} holds the model of this run: {run['name']}")
        print(sample(model, run["vocab"], PROMPT))
        return model, run["vocab"], run
    except OSError as error:
        raise BadInput(str(error)) from error
    finally:
        globals().update(before)


def experiment():
    """Train, record, sample and compare with the flags as they are. Returns as main does."""
    old = zipfile.is_zipfile(CHECKPOINT) or not os.path.exists(CHECKPOINT)
    require(old, f"CHECKPOINT={CHECKPOINT!r} is no model, and would be lost; give another name")
    folder = os.path.dirname(os.path.realpath(CHECKPOINT))
    require(os.access(folder, os.W_OK), f"CHECKPOINT={CHECKPOINT!r}: cannot write into {folder}")
    text = read_text()
    vocab = "".join(sorted(set(text)))
    encode(PROMPT, vocab)  # a character that is not in the text ends the run before training
    train_ids, val_ids = encode(text, vocab).to(DEVICE).tensor_split([len(text) * 9 // 10])
    require(len(val_ids) > BLOCK_SIZE, f"DATA={DATA!r}: too short for BLOCK_SIZE={BLOCK_SIZE}")
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    model = GPT(len(vocab)).to(DEVICE)
    torch.manual_seed(SEED)  # for dropout
    Path("runs.jsonl").open("a").close()
    read("runs.jsonl")  # what cannot be used is found before training
    flags = {flag: globals()[flag] for flag in FULL}
    run = {
        "name": name_run(flags),
        "flags": flags,
        "seed": SEED,
        "data": hashlib.sha256(text.encode()).hexdigest()[:8],
        "steps": STEPS,
        "params": sum(weight.numel() for weight in model.parameters()),
        "vocab": vocab,
        "started": time.time(),
        "curve": [],
    }
    print(f"{run['name']}: {run['params']:,} parameters, on {DEVICE}")
    print(f"{N_LAYER} layers, {N_HEAD} heads, width {N_EMBD}, context {BLOCK_SIZE}", end="; ")
    print(f"{len(text):,} characters, {len(vocab)} different")
    print("\n   step    train      val    left  loss: = is 0.02 up to 2, above it 0.2")
    model = train(model, train_ids, val_ids, run)
    run["seconds"] = time.time() - run["started"]
    with open("runs.jsonl", "ab+", buffering=0) as file:
        file.seek(max(file.tell() - 1, 0))
        end = "" if file.read() in (b"", b"\n") else "\n"  # a line may be torn
        file.write(f"{end}{json.dumps(run)}\n".encode())
    if run["val_loss"] is not None:
        with suppress(KeyboardInterrupt):
            print(f"\n{sample(model, vocab, PROMPT)}")
        option = "" if CHECKPOINT == "gpt.pt" else f' --checkpoint "{CHECKPOINT}"'
        print(f"\nThe model is in {CHECKPOINT}; python gpt.py --steps 0{option} samples from it.")
    compare(run)
    return model, vocab, run


def add_options(parser):
    """Give an argparse parser an option for each flag, with its comment and its value."""
    comments = dict(re.findall(r"^([A-Z_0-9]+) = .*?  # (.+)$", SOURCE, re.M))
    for flag in FULL | KINDS:
        option = f"--{flag.lower().replace('_', '-')}"
        kind = KINDS.get(flag) or type(FULL[flag])
        how = {"type": kind} if kind is not bool else {"action": argparse.BooleanOptionalAction}
        about = f"{comments.get(flag, '')} [{globals()[flag]}]".replace("%", "%%")
        parser.add_argument(option, dest=flag, default=argparse.SUPPRESS, help=about, **how)


if __name__ == "__main__":
    with suppress(AttributeError):  # a notebook's output is no file
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    parser = argparse.ArgumentParser("gpt.py", argparse.SUPPRESS, __doc__, allow_abbrev=False)
    add_options(parser)
    options = [re.sub("^--[a-z_]+", lambda x: x[0].replace("_", "-"), x) for x in sys.argv[1:]]
    try:
        main(**vars(parser.parse_args(options)))
    except (BadInput, KeyboardInterrupt) as error:
        parser.error(str(error) or "stopped before there was anything to keep")
