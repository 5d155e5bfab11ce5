"""Train a character-level GPT on Tiny Shakespeare, and delete any part of it with one flag."""

import argparse
import ast
import copy
import hashlib
import json
import os
import socket
import sys
import textwrap
import time
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# 1. The flags: edit a line, or run gpt.py --no-norm, or in a notebook gpt.main(NORM=False).
N_HEAD = 4  # 1: one wide look at the past where there were several narrow ones
POSITION = True  # off: attention sees a bag of characters; only the causal mask tells their order
ROTARY = True  # off: positions are learned and added at the input, not turned into q and k
OPTIMIZER = "adamw"  # "sgd": one step size for all weights
AVERAGE = True  # off: the last weights with their noise, not a running average of all steps
NORM = True  # off: activations grow or shrink from layer to layer
PRE_NORM = True  # off: each norm comes after the sum, as in 2017; no path leads past the norms
RESIDUAL = True  # off: each layer must pass on all it got; gradients fade on their way down
N_LAYER = 3  # 1: no head can use what another found; 0: the bigram model, embedding then head
MLP = True  # off: characters communicate but nothing is computed from what they learn
ATTENTION = True  # off: each character is computed on alone and never sees another
QUERY_KEY = True  # off: every visible character weighs the same, the plain average of the past
SCALE = True  # off: scores grow with the head size and softmax saturates
CAUSAL = True  # off: it reads the answer: the loss collapses, the samples are nonsense
PROJECTION = True  # off: heads are laid side by side and never mixed
GELU = True  # off: ReLU, a corner in place of a curve
TIE = True  # off: reading and writing characters get a matrix each
SCALED_INIT = True  # off: every matrix starts at N(0, 0.02²) and training stalls at first
FLASH = True  # off: softmax(QKᵀ/√D)·V written out, with the same numbers
BIAS = False  # on: every linear layer and norm adds a vector, as in GPT-2
DROPOUT = 0.0  # the share of each layer's output that is zeroed in training, 0 to 1
N_EMBD = 64  # channels of each character's vector, a multiple of 2 * N_HEAD
BLOCK_SIZE = 128  # characters of context
BATCH_SIZE = 8  # texts in a step
LEARNING_RATE = 0.0  # constant; 0: the optimizer's own best
BFLOAT16 = False  # on: matrix products of training in bfloat16, faster where there is hardware
STEPS = 3000  # optimizer steps; 0: none, sample from CHECKPOINT
SEED = 1  # draws the weights, the batches and the sample
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # or "mps"
DATA = "input.txt"  # a UTF-8 text; input.txt is fetched if it is not there
CHECKPOINT = "gpt.pt"  # where the best model so far is kept, with its flags
PROMPT = ""  # how the sample begins; empty: with the vocabulary's first character, a new line
SAMPLE = 500  # how many characters to sample
TEMPERATURE = 1.0  # 0: always the likeliest character; below 1: safe; above 1: wild
TOP_K = 0  # sample from so many of the likeliest characters; 0: from all

# A run is named by what differs from the full model. An edit above does not move this table.
FLAGS = [name for name in list(globals()) if name.isupper() and name != "F"]
KNOBS = dict(STEPS=int, SEED=int, DEVICE=str, DATA=str, CHECKPOINT=str)  # no part of a name
KNOBS |= dict(PROMPT=str, SAMPLE=int, TEMPERATURE=float, TOP_K=int)
FULL = {flag: True for flag in FLAGS if flag not in KNOBS}
FULL |= dict(N_HEAD=4, N_LAYER=3, N_EMBD=64, BLOCK_SIZE=128, BATCH_SIZE=8, OPTIMIZER="adamw")
FULL |= dict(LEARNING_RATE=0.0, DROPOUT=0.0, BIAS=False, BFLOAT16=False)
KINDS = {flag: type(value) for flag, value in FULL.items()} | KNOBS
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CODE = Path(__file__).read_text("utf-8").partition("\ndef ")[2]  # all but the flags and this table
CODE = hashlib.sha256(ast.unparse(ast.parse("def " + CODE)).encode()).hexdigest()[:8]


def require(condition, message):
    """End the run with one line on standard error and status 2, unless condition holds."""
    if not condition:
        print(f"gpt.py: error: {message}", file=sys.stderr)
        sys.exit(2)


# 2. The text.
def read_text():
    """The text of DATA. Any line end is a new line. Only input.txt is fetched if it is missing."""
    if DATA == "input.txt" and not os.path.lexists(DATA):
        try:
            socket.setdefaulttimeout(10)
            torch.hub.download_url_to_file(URL, DATA, SHA256, progress=False)
        except Exception as error:
            print(f"Python's own manual stands in for {URL} ({error}); save that as input.txt.")
            return "\n".join(topics.values())
    try:
        return Path(DATA).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        require(False, f"DATA={DATA!r}: {error}; give a UTF-8 text file")


def encode(text, vocab):
    """Ids (N,) of N characters: their places in vocab, a sorted string."""
    unknown = sorted(set(text) - set(vocab))
    require(not unknown, f"PROMPT={text!r}: the model does not know {unknown}; leave them out")
    return torch.tensor(list(map(vocab.index, text)))


# 3. The model: B texts, T characters, C channels, H heads of D = C / H channels, V characters.
def rotate(x, rotation):
    """Turn the channel pairs of q and k, stacked in x (2, B, H, T, D).
    Su et al. 2021, https://arxiv.org/abs/2104.09864"""
    pairs = torch.view_as_complex(x.float().unflatten(4, (-1, 2)))  # (2, B, H, T, D / 2)
    turned = pairs * rotation[: x.size(3)]  # (2, B, H, T, D / 2)
    return torch.view_as_real(turned).flatten(4).type_as(x)  # (2, B, H, T, D)


def attention(q, k, v):
    """softmax(QKᵀ/√D)·V, all (B, H, T, D); the plain mean of V without QUERY_KEY (q, k None).
    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762"""
    scale = v.size(-1) ** -0.5 if SCALE else 1.0
    if FLASH and QUERY_KEY:
        return F.scaled_dot_product_attention(q, k, v, is_causal=CAUSAL, scale=scale)
    scores = v.new_zeros(v.size(-2), v.size(-2))  # (T, T)
    if QUERY_KEY:
        scores = q @ k.mT * scale  # (B, H, T, T)
    if CAUSAL:
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)  # (B, H, T, T)
    return scores.softmax(-1) @ v  # (B, H, T, D)


class Attention(nn.Module):
    """Communication: each character gathers from those before it. (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(N_EMBD, 3 * N_EMBD if QUERY_KEY else N_EMBD, bias=BIAS)
        self.c_proj = nn.Linear(N_EMBD, N_EMBD, bias=BIAS) if PROJECTION else nn.Identity()
        if POSITION and ROTARY:
            frequency = 1e4 ** (-torch.arange(0, N_EMBD // N_HEAD, 2) * N_HEAD / N_EMBD)  # (D / 2)
            angle = torch.outer(torch.arange(BLOCK_SIZE), frequency)  # (T, D / 2)
            self.register_buffer("rotation", torch.exp(1j * angle), persistent=False)

    def forward(self, x):
        heads = self.c_attn(x).unflatten(2, (-1, N_HEAD, N_EMBD // N_HEAD))  # (B, T, 3, H, D)
        heads = heads.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, k, v = heads if QUERY_KEY else (None, None, heads[0])  # (B, H, T, D)
        if QUERY_KEY and POSITION and ROTARY:
            q, k = rotate(heads[:2], self.rotation)  # (B, H, T, D)
        y = attention(q, k, v)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class FeedForward(nn.Sequential):
    """Computation: a multilayer perceptron on each character alone. (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(N_EMBD, 4 * N_EMBD, bias=BIAS)
        self.act = nn.GELU() if GELU else nn.ReLU()
        self.c_proj = nn.Linear(4 * N_EMBD, N_EMBD, bias=BIAS)


class Sublayer(nn.Module):
    """x + f(norm(x)), where f is attention or the feed-forward. (B, T, C) to (B, T, C)."""

    def __init__(self, f):
        super().__init__()
        self.f = f
        self.norm = nn.LayerNorm(N_EMBD, bias=BIAS) if NORM else nn.Identity()

    def forward(self, x):
        y = self.f(self.norm(x) if PRE_NORM else x)  # (B, T, C)
        y = F.dropout(y, DROPOUT, self.training)  # (B, T, C)
        if RESIDUAL:
            y = x + y  # (B, T, C)
        return y if PRE_NORM else self.norm(y)  # (B, T, C)


class GPT(nn.Module):
    """Ids (B, T) to the logits (B, T, V) of each next character, with the flags of its making."""

    def __init__(self, vocab_size):
        super().__init__()
        self.flags = {flag: globals()[flag] for flag in FULL}
        self.wte = nn.Embedding(vocab_size, N_EMBD)
        if POSITION and not ROTARY:
            self.wpe = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.layers = nn.Sequential()
        for _ in range(N_LAYER):
            if ATTENTION:
                self.layers.append(Sublayer(Attention()))
            if MLP:
                self.layers.append(Sublayer(FeedForward()))
        self.ln_f = nn.LayerNorm(N_EMBD, bias=BIAS) if NORM else nn.Identity()
        self.lm_head = nn.Linear(N_EMBD, vocab_size, bias=False)
        if TIE:
            self.lm_head.weight = self.wte.weight
        for name, weight in self.named_parameters():
            std = 0.02
            if SCALED_INIT and name != "wte.weight":
                std = 0.0 if RESIDUAL and "c_proj" in name else weight.size(-1) ** -0.5
            if weight.dim() == 2:
                nn.init.normal_(weight, std=std)

    def forward(self, ids):
        globals().update(self.flags)
        x = self.wte(ids)  # (B, T, C)
        if POSITION and not ROTARY:
            x = x + self.wpe.weight[: ids.size(1)]  # (B, T, C)
        return self.lm_head(self.ln_f(self.layers(x)))  # (B, T, V)


# 4. Training.
@torch.no_grad()
def evaluate(model, ids):
    """Mean cross-entropy in nats a character over the whole windows of ids (N,) or of 2**17."""
    model.eval()
    losses = []
    size = model.flags["BLOCK_SIZE"]
    for window in ids[: 2**17].unfold(0, size + 1, size).split(8):
        logits = model(window[:, :-1])  # (B, T, V)
        losses.append(F.cross_entropy(logits.mT, window[:, 1:], reduction="none"))
    model.train()
    return torch.cat(losses).mean().item()


def train(model, train_ids, val_ids, vocab):
    """Train until STEPS or Ctrl-C. Returns the model of the lowest validation loss, in
    CHECKPOINT too, and ten rows [step, train loss, validation loss], nan from where it diverged."""
    make, rate = (torch.optim.AdamW, 3e-3) if OPTIMIZER == "adamw" else (torch.optim.SGD, 0.5)
    rate = LEARNING_RATE or rate * (64 / N_EMBD) ** 0.5
    optimizer = make(model.parameters(), rate, fused=True)
    smooth = copy.deepcopy(model) if AVERAGE else model
    best = copy.deepcopy(model)
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    windows = train_ids.unfold(0, BLOCK_SIZE + 1, 1)  # (N - T, T + 1): every text to train on
    losses, curve = torch.full([50], torch.nan, device=DEVICE), []  # losses of the last steps

    def look(step):
        train_loss = losses.nanmean().item()
        val_loss = evaluate(smooth, val_ids)
        print(f"step {step}/{STEPS}  train {train_loss:.3f}  val {val_loss:.4f}")
        if val_loss < min([row[2] for row in curve], default=np.inf):
            best.load_state_dict(smooth.state_dict())
            part = f"{CHECKPOINT}.{os.getpid()}.part"
            torch.save((best.flags, vocab, best.state_dict()), part)
            os.replace(part, CHECKPOINT)
        curve.append([step, train_loss, val_loss])

    try:
        for step in range(1, STEPS + 1):
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
                for mean, weight in zip(smooth.parameters(), model.parameters(), strict=True):
                    mean.data.lerp_(weight.data, 16 / (step + 15))
            if 10 * step % STEPS < 10:
                look(step)
    except KeyboardInterrupt:
        look(step)
    return best, curve


# 5. Looking.
@torch.inference_mode()
def sample(model, vocab, prompt):
    """The prompt and SAMPLE characters more, each drawn from what the model predicts."""
    torch.manual_seed(SEED)
    ids = encode(prompt or vocab[0], vocab)
    model.eval()
    for _ in range(SAMPLE):
        context = ids[None, -model.flags["BLOCK_SIZE"] :].to(DEVICE)  # (1, T)
        logits = model(context)[0, -1].cpu() / max(TEMPERATURE, 1e-6)  # (V)
        logits, places = logits.topk(min(TOP_K or len(vocab), len(vocab)))  # the likeliest first
        ids = torch.cat([ids, places[logits.softmax(-1).multinomial(1)]])
    return "".join(vocab[place] for place in ids)


def compare(run):
    """Print the runs of the same text and as many steps in runs.jsonl, a name a row, best first."""
    runs, losses = [], {}
    for line in Path("runs.jsonl").read_text().splitlines():
        with suppress(ValueError, KeyError, TypeError):  # a line that is no whole record
            other = json.loads(line)
            if all(other[key] == run[key] for key in ("data", "steps")):
                runs.append(other)
    for other in runs:
        edited = "" if other["code"] == runs[0]["code"] else f" (edited code {other['code'][:4]})"
        losses.setdefault(other["name"] + edited, {})[other["seed"]] = other["val_loss"]
    rows = {name: np.array(list(seeds.values()), float) for name, seeds in losses.items()}
    full = rows.get("full", [np.nan])
    print("\n    loss    cost  spread  seeds  name")
    for name, loss in sorted(rows.items(), key=lambda row: np.nan_to_num(row[1].mean(), nan=99)):
        cost = loss.mean() - np.mean(full)
        spread = f"{np.ptp(loss):.3f}" if len(loss) > 1 else ""
        if 0 < abs(cost) < max(np.ptp(loss), np.ptp(full)):
            name += ", within the spread"
        row = f"{loss.mean():8.3f}{cost:+8.3f}{spread:>8}{len(loss):7}  {name}"
        row = row.replace("     nan    +nan", "diverged        ").replace("+nan", "   ?")
        print(textwrap.fill(row, 80, subsequent_indent=33 * " "))
    if "full" not in rows:
        print(f"?: run the full model: python gpt.py --steps {run['steps']}, the flags as shipped")


# 6. The command line.
def check():
    """End the run where a flag has a value that cannot be used."""
    for flag, kind in KINDS.items():
        value = globals()[flag]
        numbers = (int, float) if kind is float else kind
        require(
            isinstance(value, numbers), f"{flag}={value!r}: give a value of type {kind.__name__}"
        )
        require(kind is str or value >= 0, f"{flag}={value}: give 0 or more")
    require(N_HEAD and N_EMBD and BLOCK_SIZE and BATCH_SIZE, "give sizes of 1 or more")
    require(N_EMBD % (2 * N_HEAD) == 0, f"{N_EMBD=} must be a multiple of 2 * {N_HEAD=}")
    require(OPTIMIZER in ("adamw", "sgd"), f"OPTIMIZER={OPTIMIZER!r}: give 'adamw' or 'sgd'")
    require(DROPOUT <= 1, f"DROPOUT={DROPOUT}: give a share from 0 to 1")
    require(DEVICE in ("cpu", str(torch.accelerator.current_accelerator(True))), f"no {DEVICE=}")
    folder = os.path.dirname(CHECKPOINT) or "."
    good = CHECKPOINT.endswith(".pt") and os.access(folder, os.W_OK)
    require(good, f"CHECKPOINT={CHECKPOINT!r}: give a name in .pt in a folder that can be written")


def main(**flags):
    """Train, or sample where STEPS is 0, with flags as NORM=False. Returns model, vocab, run."""
    for flag in flags:
        require(flag in FLAGS, f"no flag {flag}; maybe {get_close_matches(flag, FLAGS, 1, 0)[0]}?")
    globals().update(flags)
    check()
    if STEPS == 0:
        try:
            flags, vocab, weights = torch.load(CHECKPOINT, DEVICE)
            globals().update(flags)
        except Exception as error:
            require(False, f"{CHECKPOINT=}: {type(error).__name__}; python gpt.py makes one")
        model = GPT(len(vocab)).to(DEVICE)
        model.load_state_dict(weights)
        print(sample(model, vocab, PROMPT))
        return model, vocab, None
    text = read_text()
    vocab = "".join(sorted(set(text)))
    train_ids, val_ids = encode(text, vocab).to(DEVICE).tensor_split([len(text) * 9 // 10])
    require(len(val_ids) > BLOCK_SIZE, f"DATA={DATA!r}: too short for BLOCK_SIZE={BLOCK_SIZE}")
    encode(PROMPT, vocab)  # a character that is not in the text ends the run before training
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    torch.manual_seed(SEED)
    model = GPT(len(vocab)).to(DEVICE)
    differs = [f"{flag}={KINDS[flag](x)!r}" for flag, x in model.flags.items() if x != FULL[flag]]
    run = dict(name=" ".join(differs) or "full", seed=SEED, flags=model.flags, code=CODE)
    run |= dict(data=hashlib.sha256(text.encode()).hexdigest()[:8], torch=torch.__version__)
    run |= dict(params=sum(p.numel() for p in model.parameters()), started=time.time())
    print(
        f"{run['name']}: {run['params']:,} parameters, {N_LAYER} layers, {N_HEAD} heads, {DEVICE}"
    )
    print(f"width {N_EMBD}, context {BLOCK_SIZE}; {len(text):,} characters, {len(vocab)} different")
    model, curve = train(model, train_ids, val_ids, vocab)
    run["val_loss"] = float(np.min([row[2] for row in curve]))  # nan where it diverged
    run |= dict(curve=curve, steps=curve[-1][0], seconds=time.time() - run["started"])
    with open("runs.jsonl", "a") as file:
        file.write(json.dumps(run).replace("NaN", "null") + "\n")
    print(sample(model, vocab, PROMPT))
    compare(run)
    print(f"The model is in {CHECKPOINT}; python gpt.py --steps 0 samples from it.")
    return model, vocab, run


if __name__ == "__main__":
    parser = argparse.ArgumentParser("gpt.py", argparse.SUPPRESS, __doc__, allow_abbrev=False)
    for flag, kind in KINDS.items():
        names = {f"--{flag.lower()}", f"--{flag.lower().replace('_', '-')}"}
        how = {"type": kind} if kind is not bool else {"action": argparse.BooleanOptionalAction}
        parser.add_argument(*names, dest=flag, default=argparse.SUPPRESS, **how)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook has none
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    main(**vars(parser.parse_args()))
