# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy"]
# ///
"""Train a character-level GPT on Tiny Shakespeare, and delete any part of it with one flag.

python gpt.py            the full model: train it, then sample from it
python gpt.py --no-norm  the same without LayerNorm, to see what LayerNorm is for
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends the program quietly, except in train, which returns
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import hashlib
import json
import math
import os
import re
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

# 1. The flags: each a line here and a line where it acts; the command line follows by itself.
# The parts, and what is lost when one goes.
N_HEAD = 4  # 1: one wide look at the past where there were several narrow ones
POSITION = True  # off: attention sees a bag of characters; all order comes from the causal mask
ROTARY = True  # off: positions are learned and added at the input, not turned into q and k
OPTIMIZER = "adamw"  # "sgd": one step size (its own best) for all weights
AVERAGE = True  # off: the last step's weights, noise and all; nothing replaces a schedule
NORM = True  # off: activations grow or shrink from layer to layer
RESIDUAL = True  # off: each layer must pass on all it got; gradients fade on their way down
N_LAYER = 3  # 1: no head can use what another found; 0: the bigram model, embedding then head
MLP = True  # off: characters communicate but nothing is computed from what they learn
ATTENTION = True  # off: each character is computed on alone and never sees another
QUERY_KEY = True  # off: every visible character weighs the same, the plain average of the past
SCALE = True  # off: scores grow with the head size and softmax saturates
CAUSAL = True  # off: it reads the answer: the loss collapses, the samples are noise
PROJECTION = True  # off: heads are laid side by side and never mixed
GELU = True  # off: ReLU, a corner in place of a curve
TIE = True  # off: reading and writing characters get a matrix each
SCALED_INIT = True  # off: every matrix starts at N(0, 0.02²) and training stalls at first
FLASH = True  # off: softmax(QKᵀ/√d)·V written out, with the same numbers
BIAS = False  # on: every linear layer and norm adds a vector, as in GPT-2
DROPOUT = 0.0  # this share of each layer's output is zeroed in training; for long runs
# The sizes.
N_EMBD = 64  # channels of each character's vector
BLOCK_SIZE = 64  # characters of context
BATCH_SIZE = 16  # texts in a step
STEPS = 3500  # optimizer steps; 0: sample only
LEARNING_RATE = 0.0  # the constant rate; 0: the optimizer's own best, from RATES
# The knobs.
SEED = 1  # of the weights, the batches and the sample
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # "cuda", "mps" or "cpu"
BFLOAT16 = False  # on: matrix products in bfloat16; for CUDA
COMPILE = False  # on: torch.compile; for CUDA, or a long run
DATA = "input.txt"  # a UTF-8 text; the default is fetched if it is not there
SAVE = "gpt.pt"  # where weights, flags and vocabulary go after training; "": nowhere
LOAD = ""  # a file that --save wrote: sample from it (--steps 0) or train on
PROMPT = ""  # how the sample begins; default: a new line
SAMPLE = 500  # characters to sample
TEMPERATURE = 1.0  # below 1: safer characters; above: wilder; 0: always the likeliest
TOP_K = 0  # sample from the k likeliest characters only; 0: from all

ON_CUDA = dict(N_HEAD=6, N_LAYER=6, N_EMBD=384, BLOCK_SIZE=256, BATCH_SIZE=64, STEPS=3000)
ON_CUDA |= dict(LEARNING_RATE=1e-3, DROPOUT=0.2, BFLOAT16=True, COMPILE=True)
RATES = {"adamw": 4e-3, "sgd": 0.3}
HELP = dict(re.findall(r"^([A-Z_\d]+) = .+?  [#] (.+)", Path(__file__).read_text("utf-8"), re.M))
FULL = {flag: globals()[flag] for flag in HELP}
MODEL = list(FULL)[: list(FULL).index("SEED")]
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# 2. The text.
def read_text():
    """The text of DATA, fetched if it is the default and missing; offline, Python's own manual."""
    path = Path(DATA)
    if DATA == FULL["DATA"] and not os.path.lexists(path):
        try:
            socket.setdefaulttimeout(10)
            torch.hub.download_url_to_file(URL, DATA, SHA256, progress=False)
        except Exception as error:
            from pydoc_data.topics import topics

            print(f"Could not fetch {DATA} ({error}): training on Python's own manual instead.")
            return "\n".join(topics.values())
    try:
        if path.stat().st_size > 100e6:
            raise ValueError("larger than 100 MB; give a part of it")
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {DATA}: {error}; it must be a text in UTF-8") from error


def encode(text, vocab):
    """Ids (N,) of N characters: places in vocab, a sorted string. ValueError for unknown ones."""
    if unknown := sorted(set(text) - set(vocab)):
        lacks = " ".join(map(repr, unknown[:20]))
        raise ValueError(f"{text[:20]!r}: only characters of the vocabulary, which lacks {lacks}")
    codes = [np.frombuffer(s.encode("utf-32-le", "surrogatepass"), "<u4") for s in (vocab, text)]
    return torch.from_numpy(np.searchsorted(*codes))


def decode(ids, vocab):
    """The text of N characters for ids (N,)."""
    return "".join(np.array(list(vocab), object)[np.asarray(ids)])


def batch(ids, generator):
    """Random windows of ids (N,): inputs x and targets y, (B, T) each, y one character later."""
    start = torch.randint(len(ids) - BLOCK_SIZE, (BATCH_SIZE, 1), generator=generator)
    window = ids[start + torch.arange(BLOCK_SIZE + 1)].to(DEVICE)  # (B, T + 1)
    return window[:, :-1], window[:, 1:]


# 3. The model: B texts, T characters, C channels, H heads of D = C / H channels, V characters.
def rotate(x):
    """Turn channel pairs of x (..., T, D) by angles that grow with the position: a score then
    depends on how far q is from k. Su et al. 2021, https://arxiv.org/abs/2104.09864"""
    T, D = x.shape[-2:]
    frequency = 10_000 ** -(torch.arange(0, D, 2) / D)  # (D / 2)
    angle = torch.outer(torch.arange(T), frequency).to(x.device)  # (T, D / 2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (2, B, H, T, D / 2)
    return torch.view_as_real(pairs * (1j * angle).exp()).flatten(-2).to(x.dtype)


def attention(q, k, v):
    """softmax(QKᵀ/√d)·V: each position's weighted mean of the values it may see.

    q, k, v and the result: (B, H, T, D); without QUERY_KEY q and k play no part.
    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    """
    past = torch.ones(v.size(-2), v.size(-2), dtype=torch.bool, device=v.device).tril()  # (T, T)
    if not QUERY_KEY:
        return v.cumsum(-2) / past.sum(-1, True) if CAUSAL else v.mean(-2, True).expand_as(v)
    scale = 1 / math.sqrt(q.size(-1)) if SCALE else 1.0
    if FLASH:
        return F.scaled_dot_product_attention(q, k, v, is_causal=CAUSAL, scale=scale)
    scores = q @ k.transpose(-2, -1) * scale  # (B, H, T, T)
    if CAUSAL:
        scores = scores.masked_fill(~past, -math.inf)  # (B, H, T, T)
    return scores.softmax(-1) @ v  # (B, H, T, D)


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(N_EMBD, N_EMBD * (3 if QUERY_KEY else 1), bias=BIAS)
        self.proj = nn.Linear(N_EMBD, N_EMBD, bias=BIAS) if PROJECTION else nn.Identity()

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (-1, N_HEAD, N_EMBD // N_HEAD))  # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        qk, v = qkv[:-1], qkv[-1]
        if POSITION and ROTARY and QUERY_KEY:
            qk = rotate(qk)  # (2, B, H, T, D)
        y = attention(*(qk if QUERY_KEY else (None, None)), v)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class FeedForward(nn.Module):
    """A multilayer perceptron on each character alone, (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(N_EMBD, 4 * N_EMBD, bias=BIAS)
        self.proj = nn.Linear(4 * N_EMBD, N_EMBD, bias=BIAS)

    def forward(self, x):
        x = self.up(x)  # (B, T, 4 * C)
        return self.proj(F.gelu(x) if GELU else F.relu(x))  # (B, T, C)


class Block(nn.Module):
    """Communication, then computation, each x + f(norm(x)): (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        layers = [Attention] * ATTENTION + [FeedForward] * MLP
        self.layers = nn.ModuleList(nn.Sequential(norm(), layer()) for layer in layers)

    def forward(self, x):
        for layer in self.layers:
            y = F.dropout(layer(x), DROPOUT, self.training)  # (B, T, C)
            x = x + y if RESIDUAL else y  # (B, T, C)
        return x


def norm():
    """LayerNorm unless NORM is off. Ba et al. 2016, https://arxiv.org/abs/1607.06450"""
    return nn.LayerNorm(N_EMBD, bias=BIAS) if NORM else nn.Identity()


class GPT(nn.Module):
    """Ids (B, T) to the logits (B, T, V) of each next character."""

    def __init__(self, vocab_size):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, N_EMBD)
        if POSITION and not ROTARY and N_LAYER:
            self.wpe = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.blocks = nn.Sequential(*(Block() for _ in range(N_LAYER)))
        self.norm = norm()
        self.head = nn.Linear(N_EMBD, vocab_size, bias=False)
        if TIE:
            self.head.weight = self.wte.weight
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                first = RESIDUAL and "proj" in name  # at first every block is the identity
                std = 0 if first else weight.size(1) ** -0.5
                nn.init.normal_(weight, 0, std if SCALED_INIT else 0.02)

    def forward(self, ids):
        x = self.wte(ids)  # (B, T, C)
        if POSITION and not ROTARY and N_LAYER:
            x = x + self.wpe.weight[: ids.size(1)]  # (B, T, C)
        x = self.blocks(F.dropout(x, DROPOUT, self.training))  # (B, T, C)
        return self.head(self.norm(x))  # (B, T, V)


# 4. Training.
@torch.no_grad()
def evaluate(model, ids):
    """Mean cross-entropy in nats per character over all windows of ids (N,), each target once."""
    model.eval()
    pad = (0, -(len(ids) - 1) % BLOCK_SIZE)
    xs = F.pad(ids[:-1], pad).view(-1, BLOCK_SIZE).split(64)
    ys = F.pad(ids[1:], pad, value=-100).view(-1, BLOCK_SIZE).split(64)  # -100 is not counted
    total = 0.0
    for x, y in zip(xs, ys):
        logits = model(x.to(DEVICE)).flatten(0, 1).float()  # (B * T, V)
        total += F.cross_entropy(logits, y.to(DEVICE).flatten(), reduction="sum").item()
    model.train()
    return total / (len(ids) - 1)


def average_weights(mean, weights, n):
    """Weigh step n by about n¹⁵: the last sixteenth of any run. https://arxiv.org/abs/1212.1824"""
    torch._foreach_lerp_(mean, weights, 16 / (float(n) + 16))


def train(model, train_ids, val_ids):
    """Train for STEPS steps, or until Ctrl-C, or until a loss is not finite.

    Returns the model to use (with AVERAGE the averaged one), the curve, [step, train loss,
    validation loss] rows (the last two None where it diverged), and the seconds in steps.
    """
    rate = LEARNING_RATE or RATES[OPTIMIZER]
    if OPTIMIZER == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=0)
    else:
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    average = AveragedModel(model, multi_avg_fn=average_weights)
    best = average.module if AVERAGE else model
    forward = torch.compile(model) if COMPILE else model
    generator = torch.Generator().manual_seed(SEED)
    live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    curve, losses, val, seconds, shown, stops = [], [], math.nan, 0.0, 0.0, []
    before = signal.signal(
        signal.SIGINT, lambda *_: stops.append(signal.signal(signal.SIGINT, before))
    )
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        x, y = batch(train_ids, generator)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=BFLOAT16):
            loss = F.cross_entropy(forward(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if AVERAGE:
            average.update_parameters(model)
        losses.append(loss.item())
        seconds += time.perf_counter() - start
        last = step == STEPS or bool(stops) or not math.isfinite(losses[-1])
        if measured := last or step % max(1, STEPS // 10) == 0:
            val, mean = evaluate(best, val_ids), sum(losses) / len(losses)
            finite = math.isfinite(val) and math.isfinite(mean)
            curve.append([step, mean, val] if finite else [step, None, None])
            last, losses = last or not finite, losses[-1:]
        if measured or live and time.perf_counter() > shown + 0.1:
            shown = time.perf_counter()
            speed = step * BATCH_SIZE * BLOCK_SIZE / seconds
            left = (STEPS - step) * seconds / step
            line = f"{step}/{STEPS}  train {losses[-1]:.3f}  val {val:.4f}  {speed:,.0f} tokens/s  {left:.0f} s left"
            if live:
                width = os.get_terminal_size().columns - 1
                line = f"\r[{'#' * (20 * step // STEPS):.<20}] {line}"[:width].ljust(width)
            print(line, end="\n" if last or not live else "", flush=True)
        if last:
            break
    signal.signal(signal.SIGINT, before)
    return best, curve, seconds


# 5. Looking.
@torch.inference_mode()
def sample(model, ids, n):
    """Ids (T,) and n more, each drawn from what the model predicts after those before it."""
    model.eval()
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(n):
        logits = model(ids[None, -BLOCK_SIZE:].to(DEVICE))[0, -1].float().cpu()  # (V)
        logits = logits / max(TEMPERATURE, 1e-6)  # (V)
        if TOP_K:
            logits[logits < logits.topk(min(TOP_K, len(logits))).values[-1]] = -math.inf
        ids = torch.cat([ids, logits.softmax(-1).multinomial(1, generator=generator)])
    return ids


# 6. The command line.
def parse(argv):
    """The flags that a command line gives, as {"N_HEAD": 1}; --n_head is --n-head."""
    parser = argparse.ArgumentParser("gpt.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class, parser.error = argparse.RawDescriptionHelpFormatter, fail
    for flag, comment in HELP.items():
        kind = type(FULL[flag])
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
        how |= dict(dest=flag, default=argparse.SUPPRESS, help=f"{comment} [{FULL[flag]!r}]")
        parser.add_argument("--" + flag.lower().replace("_", "-"), **how)
    names = [re.match("--[^=]*|", arg)[0] for arg in argv]
    argv = [name.replace("_", "-") + arg[len(name) :] for name, arg in zip(names, argv)]
    return vars(parser.parse_args(argv))


def fail(error):
    """End with one line on standard error and exit status 2."""
    line = " ".join(f"gpt.py: {error}".split())
    print(line.encode("ascii", "backslashreplace").decode(), file=sys.stderr)
    sys.exit(2)


def check():
    """Raise ValueError for a flag that is out of its range or does not go with another."""

    def require(flag, good, right):
        if not good:
            name = flag.lower().replace("_", "-")
            raise ValueError(f"--{name} {globals()[flag]}: must be {right}")

    for flag in ("N_HEAD", "N_EMBD", "BLOCK_SIZE", "BATCH_SIZE"):
        require(flag, globals()[flag] > 0, "1 or more")
    for flag in [flag for flag in FULL if type(FULL[flag]) in (int, float)]:
        require(flag, 0 <= globals()[flag] < 2**63, "0 or more, and finite")
    require("N_HEAD", N_EMBD % N_HEAD == 0, f"a divisor of --n-embd {N_EMBD}")
    even = N_EMBD // N_HEAD % 2 == 0 or not (POSITION and ROTARY)
    require("N_HEAD", even, "--n-embd divided by an even number, or give --no-rotary")
    require("OPTIMIZER", OPTIMIZER in RATES, "adamw or sgd")
    require("DROPOUT", DROPOUT < 1, "below 1")
    folder = Path(SAVE).parent if SAVE else Path()
    free = folder.is_dir() and os.access(folder, os.W_OK) and not Path(SAVE or "x").is_dir()
    require("SAVE", free or not STEPS, "a file in a folder that can be written")
    try:
        torch.zeros(1, device=DEVICE).item()
    except Exception:
        require("DEVICE", False, "cpu, or a device of this machine")


def load():
    """Flags, vocabulary and weights that --save wrote; ValueError if LOAD is another file."""
    try:
        saved = torch.load(LOAD, map_location="cpu", weights_only=True)
        flags = {flag: type(FULL[flag])(saved["flags"][flag]) for flag in MODEL}
        return flags, "" + saved["vocab"], dict(saved["weights"])
    except Exception as error:
        why = f"{type(error).__name__}; give a file that --save wrote"
        raise ValueError(f"--load {LOAD}: can't be used ({why})") from None


def run(given):
    """Train, record, save and sample with the flags given."""
    if given.get("DEVICE", DEVICE).startswith("cuda"):
        FULL.update(ON_CUDA)
    globals().update(FULL | given)
    if LOAD:
        flags, vocab, weights = load()
        globals().update(FULL | flags | {"STEPS": STEPS, "LEARNING_RATE": LEARNING_RATE} | given)
    check()
    if STEPS or not LOAD:
        text = read_text()
        vocab = vocab if LOAD else "".join(sorted(set(text)))
        ids = encode(text, vocab)
        train_ids, val_ids = ids.split([len(ids) * 9 // 10, len(ids) - len(ids) * 9 // 10])
        if len(train_ids) <= BLOCK_SIZE or len(val_ids) < 2:
            raise ValueError(
                f"--data {DATA}: {len(ids)} characters are too few for --block-size {BLOCK_SIZE}"
            )
    prompt = encode(PROMPT or ("\n" if "\n" in vocab else vocab[0]), vocab)
    torch.manual_seed(SEED)
    model = GPT(len(vocab))
    if LOAD:
        try:
            model.load_state_dict(weights)
        except RuntimeError:
            raise ValueError(
                f"--load {LOAD}: its weights are of another shape; give only flags that keep it"
            ) from None
    model.to(DEVICE)
    changes = {flag: globals()[flag] for flag in MODEL + ["LOAD"] if globals()[flag] != FULL[flag]}
    words = [
        "no-" * (v is False) + (k if type(v) is bool else f"{k}={v}") for k, v in changes.items()
    ]
    name = " ".join(words).replace("_", "-").lower() or "full"
    params = sum(p.numel() for p in model.parameters())
    print(
        f"{params:,} parameters: {N_LAYER} layers, {N_HEAD} heads, width {N_EMBD}, context {BLOCK_SIZE}"
    )
    print(f"vocabulary {len(vocab)}, {OPTIMIZER}, batch {BATCH_SIZE}, on {DEVICE}; changed: {name}")
    if STEPS:
        model, curve, seconds = train(model, train_ids, val_ids)
        steps, train_loss, val_loss = curve[-1]
        record = dict(name=name, changes=changes, seed=SEED, steps=steps, params=params)
        record |= dict(train_loss=train_loss, val_loss=val_loss, seconds=round(seconds, 3))
        record |= dict(tokens_per_second=round(steps * BATCH_SIZE * BLOCK_SIZE / seconds))
        record |= dict(device=DEVICE, torch=torch.__version__)
        record |= dict(data=hashlib.sha256(text.encode()).hexdigest()[:12], curve=curve)
        with open("runs.jsonl", "ab+", buffering=0) as file:
            torn = file.tell() and Path("runs.jsonl").read_bytes()[-1:] != b"\n"
            file.write(("\n" * torn + json.dumps(record) + "\n").encode())
        if val_loss is None:
            return print(
                f"Diverged at step {steps}: the loss is no longer a number. Nothing is saved."
            )
        print(f"Validation loss {val_loss:.4f} after {steps} steps in {seconds:.1f} s")
        if SAVE:
            part = f"{SAVE}.{os.getpid()}.part"
            flags = {flag: globals()[flag] for flag in MODEL}
            torch.save(dict(flags=flags, vocab=vocab, weights=model.state_dict()), part)
            os.replace(part, SAVE)
    print(decode(sample(model, prompt, SAMPLE), vocab))


def main(argv=None):
    """Run one command line; bad input ends in one line on standard error and status 2."""
    try:
        run(parse(sys.argv[1:] if argv is None else argv))
    except (OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
