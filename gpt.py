# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy"]
# ///
"""Train a character-level GPT on Tiny Shakespeare, and delete any part of it with one flag."""

import signal

if __name__ == "__main__":  # Ctrl-C, but for train, and a closed pipe end it without a traceback
    for name in {"SIGINT", "SIGPIPE"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_DFL)

import argparse, contextlib, hashlib, json, os, re, socket, sys, tempfile, time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

# 1. The flags, a line each here and one where it acts. First the parts: what is lost when one goes?
N_HEAD = 4  # 1: one wide look at the past where there were several narrow ones; divides N_EMBD
POSITION = True  # off: attention sees a bag of characters; all order comes from the causal mask
ROTARY = True  # off: positions are learned and added at the input, not turned into q and k
OPTIMIZER = "adamw"  # "sgd": one step size (its own best) for all weights
LEARNING_RATE = 0.0  # constant, above 0; or 0: the optimizer's own best
AVERAGE = True  # off: the last weights, noise and all, and no schedule; arxiv.org/abs/1212.1824
NORM = True  # off: activations grow or shrink from layer to layer
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
FLASH = True  # off: softmax(QKᵀ/√d)·V written out, with the same numbers
BIAS = False  # on: every linear layer and norm adds a vector, as in GPT-2
DROPOUT = 0.0  # the share of each layer's output that is zeroed in training, 0 to 1; for long runs
N_EMBD = 64  # channels of each character's vector, 1 or more
BLOCK_SIZE = 128  # characters of context, 1 or more
BATCH_SIZE = 8  # texts in a step, 1 or more
LOAD = ""  # a file that --save wrote: sample from it (--steps 0) or train on
STEPS = 3000  # optimizer steps; 0: none, only sample
SEED = 1  # 0 or more: draws the weights, the batches and the sample
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # "cpu", "cuda" or "mps", if it is there
BFLOAT16 = False  # on: matrix products of training in bfloat16
DATA = "input.txt"  # a UTF-8 text; the default is fetched if it is not there
SAVE = "gpt.pt"  # where weights, flags and vocabulary go, if it can be written; "": nowhere
PROMPT = ""  # how the sample begins; default: the vocabulary's first character, a new line
SAMPLE = 500  # how many characters to sample
TEMPERATURE = 1.0  # 0: always the likeliest character; below 1: safe; above 1: wild

HELP = dict(re.findall(r"^([A-Z_\d]+) = .+?  [#] (.+)", Path(__file__).read_text("utf-8"), re.M))
FULL = {flag: globals()[flag] for flag in HELP}
MODEL = list(FULL)[: list(FULL).index("STEPS")]
SIZES = ["N_EMBD", "BLOCK_SIZE", "BATCH_SIZE"]
BARS = "▁▂▃▄▅▆▇█" if (sys.stdout.encoding or "").lower() == "utf-8" else "_.:-=+*#"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# 2. The text.
def read_text():
    """The text of DATA; the default is fetched if it is missing."""
    try:
        if DATA == FULL["DATA"] and not os.path.lexists(DATA):
            socket.setdefaulttimeout(10)
            torch.hub.download_url_to_file(URL, DATA, SHA256, progress=False)
        return Path(DATA).read_bytes().decode("utf-8-sig")
    except Exception as error:
        raise ValueError(f"--data {DATA}: {error}; give a UTF-8 text file") from error


def encode(text, vocab):
    """Ids (N,) of N characters: places in vocab, a sorted string. ValueError for any not there."""
    if unknown := sorted(set(text) - set(vocab)):
        raise ValueError(f"--prompt or --data {text[:20]!r}: not in the vocabulary: {unknown[:20]}")
    return torch.tensor([vocab.index(character) for character in text], dtype=torch.long)


def batch(ids, generator):
    """Random windows of ids (N,): inputs x and targets y, (B, T) each, y one character later."""
    start = torch.randint(len(ids) - BLOCK_SIZE, (BATCH_SIZE, 1), generator=generator)
    window = ids[start + torch.arange(BLOCK_SIZE + 1)].to(DEVICE)  # (B, T + 1)
    return window[:, :-1], window[:, 1:]


# 3. The model: B texts, T characters, C channels, H heads of D = C / H channels, V characters.
def rotate(x):
    """Turn channel pairs of x (B, H, T, D) with the position; https://arxiv.org/abs/2104.09864"""
    half = x.size(-1) // 2
    angle = torch.outer(torch.arange(x.size(-2)), 1e-4 ** (torch.arange(half) / half))  # (T, D / 2)
    cos, sin = angle.cos().to(x.device), angle.sin().to(x.device)  # (T, D / 2)
    a, b, rest = x.tensor_split([half, 2 * half], -1)  # (B, H, T, D / 2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)  # (B, H, T, D)


def attention(q, k, v):
    """softmax(QKᵀ/√d)·V, all (B, H, T, D): the weighted mean of what each position sees.
    Without QUERY_KEY q and k are None. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762"""
    scale = q.size(-1) ** -0.5 if QUERY_KEY and SCALE else 1.0
    if FLASH and QUERY_KEY:
        return F.scaled_dot_product_attention(q, k, v, is_causal=CAUSAL, scale=scale)
    scores = q @ k.mT * scale if QUERY_KEY else v.new_zeros(v.size(-2), v.size(-2))  # (B, H, T, T)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)  # (B, H, T, T)
    scores = scores.masked_fill(future, -torch.inf) if CAUSAL else scores  # (B, H, T, T)
    return scores.softmax(-1) @ v  # (B, H, T, D)


class Attention(nn.Module):
    """Communication: each character gathers from those before it. (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(N_EMBD, N_EMBD * (3 if QUERY_KEY else 1), bias=BIAS)
        self.proj = nn.Linear(N_EMBD, N_EMBD, bias=BIAS) if PROJECTION else nn.Identity()

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (-1, N_HEAD, N_EMBD // N_HEAD))  # (B, T, 3, H, D)
        *qk, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        qk = [rotate(x) if POSITION and ROTARY else x for x in qk] or (None, None)
        return self.proj(attention(*qk, v).transpose(1, 2).flatten(2))  # (B, T, C)


def feed_forward():
    """Computation: a multilayer perceptron on each character alone. (B, T, C) to (B, T, C)."""
    up, proj = nn.Linear(N_EMBD, 4 * N_EMBD, BIAS), nn.Linear(4 * N_EMBD, N_EMBD, BIAS)
    return nn.Sequential(OrderedDict(up=up, gelu=nn.GELU() if GELU else nn.ReLU(), proj=proj))


class GPT(nn.Module):
    """Ids (B, T) to the logits (B, T, V) of each next character."""

    def __init__(self, vocab_size):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, N_EMBD)
        self.wpe = nn.Embedding(BLOCK_SIZE, N_EMBD) if POSITION and N_LAYER and not ROTARY else None
        block = [Attention] * ATTENTION + [feed_forward] * MLP
        norm = nn.LayerNorm if NORM else nn.Identity  # https://arxiv.org/abs/1607.06450
        self.layers = nn.ModuleList(layer() for layer in block * N_LAYER)
        self.norms = nn.ModuleList(norm(N_EMBD, bias=BIAS) for _ in self.layers)
        self.norm = norm(N_EMBD, bias=BIAS)
        self.head = nn.Linear(N_EMBD, vocab_size, bias=False)
        self.head.weight = self.wte.weight if TIE else self.head.weight
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                silent = RESIDUAL and "proj" in name  # at first no layer adds anything to x
                std = 0.02 if not SCALED_INIT else 0 if silent else weight.size(1) ** -0.5
                nn.init.normal_(weight, 0, std)

    def forward(self, ids):
        x = self.wte(ids)  # (B, T, C)
        x = x + self.wpe.weight[: ids.size(1)] if self.wpe else x  # (B, T, C)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = F.dropout(layer(norm(x)), DROPOUT, self.training)  # (B, T, C)
            x = x + y if RESIDUAL else y  # (B, T, C)
        return self.head(self.norm(x))  # (B, T, V)


# 4. Training.
@torch.no_grad()
def evaluate(model, ids):
    """Mean cross-entropy in nats a character over every window of ids (N,), each target once."""
    model.eval()
    n, total = len(ids) - 1, 0.0
    cuts = sorted({*range(0, n, 32 * BLOCK_SIZE), n - n % BLOCK_SIZE} - {0, n})  # 32 windows each
    for x, y in zip(ids[:-1].tensor_split(cuts), ids[1:].tensor_split(cuts), strict=True):
        logits = model(x.view(-1, min(BLOCK_SIZE, len(x))).to(DEVICE)).flatten(0, 1)  # (B * T, V)
        total += F.cross_entropy(logits, y.to(DEVICE), reduction="sum").item()
    model.train()
    return total / n


def train(model, train_ids, val_ids):
    """Train for STEPS steps, or until Ctrl-C or divergence. Returns the model to use, the seconds
    in steps, and rows of [step, train loss, validation loss], both None where it diverged."""
    make, rate = {"adamw": (torch.optim.AdamW, 3e-3), "sgd": (torch.optim.SGD, 0.5)}[OPTIMIZER]
    optimizer = make(model.parameters(), LEARNING_RATE or rate * (64 / N_EMBD) ** 0.5)
    average = AveragedModel(model, avg_fn=lambda mean, new, n: mean.lerp(new, 16 / (n + 16)))
    best = average.module if AVERAGE else model
    generator = torch.Generator().manual_seed(SEED)
    live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    curve, seconds, train_loss, val_loss, stops = [], 0.0, 0.0, np.nan, []
    before = signal.signal(signal.SIGINT, lambda *_: stops.append(signal.signal(2, before)))
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        x, y = batch(train_ids, generator)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=BFLOAT16):
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if AVERAGE:
            average.update_parameters(model)
        train_loss += (loss.item() - train_loss) / min(step, 50)
        seconds += time.perf_counter() - start
        last = step == STEPS or stops or not np.isfinite(train_loss)
        if measured := last or step == 1 or step % max(1, STEPS // 10) == 0:
            val_loss = evaluate(best, val_ids) + 0 * train_loss
            curve.append([step, *((train_loss, val_loss) if np.isfinite(val_loss) else [None] * 2)])
        if measured or live and step % 10 == 0:
            speed, left = step * x.numel() / seconds, (STEPS - step) * seconds / step
            line = f"[{'#' * (10 * step // STEPS):.<10}] {step}/{STEPS}  train {train_loss:.3f}"
            line += f"  val {val_loss:.4f}  {speed:,.0f} tokens/s  {left:.0f} s left"
            line = f"\r{line[: os.get_terminal_size().columns - 1]}\033[K" if live else line
            print(line, end="" if live and not last else "\n", flush=True)
        if last or curve[-1][2] is None:
            break
    signal.signal(signal.SIGINT, before)
    return best, seconds, curve


# 5. Looking.
@torch.inference_mode()
def sample(model, ids):
    """Ids (T,) and SAMPLE more, each drawn from what the model predicts after those before it."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(SAMPLE):
        logits = model(ids[None, -BLOCK_SIZE:].to(DEVICE))[0, -1].cpu()  # (V)
        p = (logits / max(TEMPERATURE, 1e-6)).softmax(-1)  # (V)
        ids = torch.cat([ids, p.multinomial(1, generator=generator)])
    return ids


def compare(run):
    """Print run beside those in runs.jsonl of the same data, steps and sizes, the best first."""
    kinds, seen = {}, []
    for line in Path("runs.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a half-written line
            other = json.loads(line)
            if all(other[key] == run[key] for key in ("data", "steps", "sizes")):
                kinds.setdefault(other["name"], {})[other["seed"]] = other
                seen += [row[2] for row in other["curve"][1:] if other["val_loss"]]
    losses = {k: np.array([run["val_loss"] for run in kinds[k].values()], float) for k in kinds}
    full = losses.get("full", np.array([np.nan]))
    ends = np.percentile(seen or [0, 9], [5, 95])
    print(f"\n{'':15}   params    loss    cost spread seeds  curve")
    for name in sorted(losses, key=lambda name: np.nan_to_num(losses[name].mean(), nan=99)):
        loss, last = losses[name], list(kinds[name].values())[-1]
        cost, spread = loss.mean() - full.mean(), np.ptp(loss)
        bars = np.interp([r[2] for r in last["curve"] if r[2] is not None], ends, [0, 7])
        note = "within noise" if 0 < abs(cost) < max(spread, np.ptp(full)) else ""
        row = f"{name:15}{last['params']:9,}{loss.mean():8.3f}{cost:+8.3f}{spread:7.3f}"
        row += f"{loss.size:6}  {''.join(BARS[round(bar)] for bar in bars):12}"
        print(row.replace("+nan", "   ?") + ("diverged" if np.isnan(loss).any() else note))


# 6. The command line.
def parse(argv):
    """The flags given, as {"N_HEAD": 1}, by the lines above; --n_head is --n-head."""
    parser = argparse.ArgumentParser("gpt.py", argparse.SUPPRESS, __doc__, allow_abbrev=False)
    for flag, comment in HELP.items():
        kind = type(FULL[flag])
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        how |= {"dest": flag, "default": argparse.SUPPRESS, "help": f"{comment} [{FULL[flag]!r}]"}
        parser.add_argument("--" + flag.lower().replace("_", "-"), **how)
    dashed = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), arg) for arg in argv]
    return vars(parser.parse_args(dashed))


def main(given):
    """Train or load, save, record, sample and compare with the flags given, as {"N_HEAD": 1}."""
    globals().update(FULL | given)
    if LOAD:
        try:
            saved = torch.load(LOAD, map_location="cpu", weights_only=True)
            globals().update({flag: saved["flags"][flag] for flag in MODEL} | given)
            model, vocab = GPT(len(saved["vocab"])), saved["vocab"]
            model.load_state_dict(saved["weights"])
        except Exception:
            raise ValueError(f"--load {LOAD}: not what --save wrote for these flags") from None
    free = not os.path.isdir(SAVE) and SAVE not in (DATA, "runs.jsonl")
    good = {"SAVE": not STEPS or free and os.access(f"{os.path.dirname(SAVE) or '.'}/.", os.W_OK)}
    good["DEVICE"] = DEVICE in ("cpu", "cuda", "mps") and getattr(torch, DEVICE).is_available()
    good |= {"N_HEAD": N_HEAD > 0 and N_EMBD % N_HEAD == 0, "DROPOUT": DROPOUT <= 1}
    good["OPTIMIZER"] = OPTIMIZER in ("adamw", "sgd")
    for flag, comment in HELP.items():
        value, low = globals()[flag], "1 or more" in comment
        if not good.get(flag, True) or type(value) is not str and not low <= value < 2**31:
            raise ValueError(f"--{flag.lower()} {value} can't be; {flag} is {comment}")
    if STEPS or not LOAD:
        text = read_text()
        vocab = vocab if LOAD else "".join(sorted(set(text)))
        train_ids, val_ids = encode(text, vocab).tensor_split([len(text) * 9 // 10])
        if len(train_ids) <= BLOCK_SIZE or len(val_ids) < 2:
            raise ValueError(f"--data {DATA}: too short; a text of {2 * BLOCK_SIZE + 20} will do")
    prompt = encode(PROMPT or vocab[0], vocab)
    torch.manual_seed(SEED)
    model = (model if LOAD else GPT(len(vocab))).to(DEVICE)
    flags = {flag: globals()[flag] for flag in MODEL}
    changes = {k: v for k, v in flags.items() if v != FULL[k] and k not in SIZES}
    words = ["no-" * (v is False) + k + f"={v}" * (type(v) is not bool) for k, v in changes.items()]
    name = " ".join(words).replace("_", "-").lower() or "full"
    params = sum(p.numel() for p in model.parameters())
    print(f"{name}: {params:,} parameters, {N_LAYER} layers, {N_HEAD} heads, width {N_EMBD}")
    print(f"context {BLOCK_SIZE}, batch {BATCH_SIZE}, {len(vocab)} characters, on {DEVICE}")
    if STEPS:
        model, seconds, curve = train(model, train_ids, val_ids)
        steps, train_loss, val_loss = curve[-1]
        if SAVE and val_loss is not None:
            with tempfile.TemporaryDirectory(dir=Path(SAVE).parent) as part:
                whole = {"flags": flags, "vocab": vocab, "weights": model.state_dict()}
                torch.save(whole, f"{part}/whole.pt")
                os.replace(f"{part}/whole.pt", SAVE)
        run = dict(name=name, changes=changes, seed=SEED, params=params, device=DEVICE, curve=curve)
        run |= dict(steps=STEPS if val_loss is None else steps, sizes={f: flags[f] for f in SIZES})
        run |= dict(train_loss=train_loss, val_loss=val_loss, seconds=seconds)
        run |= dict(tokens_per_second=steps * BATCH_SIZE * BLOCK_SIZE / seconds)
        run |= dict(data=hashlib.sha256(text.encode()).hexdigest()[:12], torch=torch.__version__)
        with open("runs.jsonl", "ab") as file:
            torn = Path("runs.jsonl").read_bytes()[-1:] not in (b"", b"\n")
            file.write(("\n" * torn + json.dumps(run) + "\n").encode())
    if not STEPS or val_loss is not None:
        print("".join(vocab[i] for i in sample(model.eval(), prompt)))
    if STEPS:
        compare(run)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    try:
        main(parse(sys.argv[1:]))
    except (OSError, RuntimeError, ValueError) as error:
        argparse.ArgumentParser("gpt.py", argparse.SUPPRESS).error(" ".join(str(error).split()))
