"""Train a character-level GPT on Tiny Shakespeare, and delete any part of it with one flag."""

import argparse
import copy
import json
import math
import os
import time
import urllib.request
import zlib
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # two runs at once do not wait for each other

import torch
from torch import nn
from torch.nn import functional as F

# The flags: edit a line, or run gpt.py --no-norm, or in a notebook gpt.main(NORM=False).
ATTENTION = True  # off: each character is computed on alone and never sees another
QUERY_KEY = True  # off: every visible character weighs the same, the plain average of the past
SCALE = True  # off: scores are sqrt(D) times as large: a query sees 6 characters at first, not 43
CAUSAL = True  # off: it reads the answer: the loss collapses, the samples are nonsense
FLASH = True  # off: softmax(QK^T/sqrt(D))V is written out, with the same numbers
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
N_LAYER = 3  # 1: no head can use what another found; 0: the bigram model, wte then lm_head
N_EMBD = 64  # channels of each character's vector, a multiple of 2 * N_HEAD
BLOCK_SIZE = 128  # characters of context
TIE = True  # off: reading and writing characters get a matrix each
BIAS = False  # on: every linear layer and norm adds a vector, as in GPT-2
SCALED_INIT = True  # off: every matrix starts at N(0, 0.02**2): scores near 0, attention an average
OPTIMIZER = "adamw"  # "sgd": one step size for all weights
LEARNING_RATE = 3e-3  # constant, of AdamW at width 64; SGD takes 167 times that, wider models less
AVERAGE = True  # off: the last weights with their noise, not a running average of all steps
BATCH_SIZE = 8  # texts in a step
BFLOAT16 = False  # on: matrix products of training in bfloat16, faster where there is hardware
NOTE = ""  # what you changed in the code; it is part of the run's name
STEPS = 2000  # optimizer steps
SEED = 1  # draws the weights, the batches and the sample
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # "cpu", "cuda" or "mps"
DATA = "input.txt"  # a UTF-8 text; input.txt is fetched if it is not there
CHECKPOINT = "gpt.pt"  # where the run's best model is kept, with its flags
SAMPLE = 500  # how many characters to sample


# The model: B texts, T characters, C channels, H heads of D = C / H channels, V characters.
def attention(q, k, v, causal=True, scale=True, flash=True):
    """softmax(QKᵀ/√D)·V, all (B, H, T, D); without q and k the mean of V. arXiv:1706.03762"""
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
    """Communication: each character gathers from all up to itself. (B, T, C) to (B, T, C)."""

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
            if self.rotary:  # turn pairs of channels, later characters further; arXiv:2104.09864
                qk = torch.stack([q, k]).float().unflatten(4, (-1, 2))  # (2, B, H, T, D / 2, 2)
                qk = torch.view_as_complex(qk) * self.rotation[: x.size(1)]  # (2, B, H, T, D / 2)
                q, k = torch.view_as_real(qk).flatten(4).type_as(q)  # (B, H, T, D)
        v = self.value(x).unflatten(2, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
        y = attention(q, k, v, **self.options)  # (B, H, T, D)
        return self.projection(y.transpose(1, 2).flatten(2))  # (B, T, C)


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
                if "f.projection" in name and RESIDUAL:
                    std = 0.0  # each sublayer starts as x + 0
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:  # drawn by its name: no part changes how another starts
                generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
                nn.init.normal_(weight, std=std, generator=generator)
        if NORM and SCALED_INIT:
            nn.init.constant_(self.ln_f.weight, N_EMBD**-0.5)  # so the first loss is ln V

    def forward(self, ids):
        x = self.wte(ids)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[: ids.size(1)]  # (B, T, C)
        return self.lm_head(self.ln_f(self.layers(x)))  # (B, T, V)


@torch.no_grad()
def evaluate(model, ids):
    """Mean cross-entropy in nats over the whole windows of ids (N,), of the first 2**17 ids."""
    model.eval()
    windows = ids[: 2**17].unfold(0, model.block_size + 1, model.block_size)  # (N / T, T + 1)
    losses = []
    for window in windows.split(8):
        logits = model(window[:, :-1])  # (B, T, V)
        losses.append(F.cross_entropy(logits.mT, window[:, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


def look(model, best, train_ids, val_ids, step, run):
    """Print a line of the curve. The best model so far is kept, in best and in CHECKPOINT."""
    train_loss = evaluate(model, train_ids[: 2**14 + BLOCK_SIZE])
    val_loss = evaluate(model, val_ids)
    require(math.isfinite(val_loss), f"the loss is no number at step {step}; lower LEARNING_RATE")
    run["curve"].append([step, train_loss, val_loss])
    if val_loss <= run.get("val_loss", math.inf):
        run["val_loss"] = val_loss
        best.load_state_dict(model.state_dict())
        part = f"{CHECKPOINT}.{os.getpid()}.part"
        torch.save({"run": run, "weights": best.state_dict()}, part)
        os.replace(part, CHECKPOINT)
    minutes, seconds = divmod(int((time.time() - run["started"]) / step * (STEPS - step)), 60)
    bar = "=" * min(44, round(30 + 14 * math.log(max(val_loss - 1.3, 0.12))))
    print(f"{step:7}{train_loss:9.3f}{val_loss:9.3f}{minutes:6}:{seconds:02}  {bar}", flush=True)


def train(model, train_ids, val_ids, run):
    """Train until STEPS or Ctrl-C. Returns the model of the lowest validation loss."""
    make, factor = OPTIMIZERS[OPTIMIZER]
    rate = factor * LEARNING_RATE * (64 / N_EMBD) ** 0.5
    optimizer = make(model.parameters(), rate, fused=True)
    shared = {id(buffer): buffer for buffer in model.buffers()}  # only the weights are averaged
    smooth = copy.deepcopy(model, shared) if AVERAGE else model
    best = copy.deepcopy(model).eval()
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    windows = train_ids.unfold(0, BLOCK_SIZE + 1, 1)  # (N - T, T + 1): every text to train on
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
            if AVERAGE:  # step n weighs about n^15; arXiv:1212.1824
                for mean, weight in zip(smooth.parameters(), model.parameters(), strict=True):
                    mean.data.lerp_(weight.data, 16 / (step + 15))
            if step in (100, STEPS) or step % max(100, STEPS // 10) == 0:
                look(smooth, best, train_ids, val_ids, step, run)
    except KeyboardInterrupt:
        if not run["curve"]:
            raise
        run["STEPS"] = step
        look(smooth, best, train_ids, val_ids, step, run)
    return best


def read_text():
    """The text of DATA. Only input.txt is fetched if it is not there."""
    if DATA == "input.txt" and not os.path.lexists(DATA):
        try:
            part = Path(f"{DATA}.{os.getpid()}.part")
            part.write_bytes(urllib.request.urlopen(URL, timeout=10).read())
            part.replace(DATA)
        except Exception as error:
            print(f"Python's own manual stands in for {URL} ({error}); save that as input.txt.")
            return "\n".join(topics.values())
    try:
        return Path(DATA).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"{DATA=} cannot be read ({error}); give a UTF-8 text") from error


def encode(text, vocab):
    """Ids (N,) of N characters: their places in vocab, a sorted string."""
    return torch.tensor([vocab.index(character) for character in text])


@torch.inference_mode()
def sample(model, vocab, prompt="", temperature=1.0):
    """The prompt and SAMPLE characters more, each drawn from what the model predicts."""
    generator = torch.Generator().manual_seed(SEED)
    ids = encode(prompt or vocab[0], vocab)
    model.eval()
    for _ in range(SAMPLE):
        context = ids[None, -model.block_size :].to(model.wte.weight.device)  # (1, T)
        logits = model(context)[0, -1].cpu() / max(temperature, 1e-6)  # (V)
        ids = torch.cat([ids, logits.softmax(-1).multinomial(1, generator=generator)])  # (N + 1)
    return "".join(vocab[place] for place in ids)


# The record: a run is named by what differs from FULL.
FULL = dict(
    ATTENTION=True, QUERY_KEY=True, SCALE=True, CAUSAL=True, FLASH=True, N_HEAD=4, PROJECTION=True,
    POSITION=True, ROTARY=True, MLP=True, GELU=True, RESIDUAL=True, NORM=True, PRE_NORM=True,
    DROPOUT=0.0, N_LAYER=3, N_EMBD=64, BLOCK_SIZE=128, TIE=True, BIAS=False, SCALED_INIT=True,
    OPTIMIZER="adamw", LEARNING_RATE=3e-3, AVERAGE=True, BATCH_SIZE=8, BFLOAT16=False, NOTE="",
)  # fmt: skip
REST = dict(STEPS=2000, SEED=1, DEVICE="cpu", DATA="input.txt", CHECKPOINT="gpt.pt", SAMPLE=500)
OPTIMIZERS = {"adamw": (torch.optim.AdamW, 1), "sgd": (torch.optim.SGD, 500 / 3)}
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
DEVICES = {"cpu", str(torch.accelerator.current_accelerator(check_available=True) or "cpu")}


class BadInput(ValueError):
    """A flag or a file that cannot be used. The message says what would be right."""


def require(condition, message):
    """BadInput with that message, unless condition holds."""
    if not condition:
        raise BadInput(message)


def name_run(flags):
    """What differs from the full model as shipped, as one would type it: NORM=False N_HEAD=1."""
    differs = [f"{flag}={flags[flag]!r}" for flag in FULL if flags[flag] != FULL[flag]]
    return " ".join(differs) or "full"


def compare(run):
    """Print the runs with the same text, STEPS and SEED, best first, with their costs."""
    losses = {}
    for line in Path("runs.jsonl").read_text("utf-8", "replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if all(row[key] == run[key] for key in ("data", "STEPS", "SEED")):
                losses[str(row["name"])] = float(row["val_loss"])
    base = min(losses, key=lambda name: name.count("="))  # differs least from full
    print(f"\n     loss    cost  name ({run['STEPS']:,} steps, seed {run['SEED']})")
    for name, loss in sorted(losses.items(), key=lambda item: item[1]):
        mark = ">" if name == run["name"] else " "
        print(f"{mark}{loss:8.3f}{loss - losses[base]:+8.3f}  {name}")


def main(**flags):
    """Train, record, sample and compare with flags as NORM=False. Returns model, vocab, run."""
    before = {flag: globals()[flag] for flag in FULL | REST}
    try:
        for flag, value in (before | flags).items():
            require(flag in before, f"there is no flag {flag}; the file begins with all there are")
            kind = type((FULL | REST)[flag])
            value = value.item() if hasattr(value, "item") else value  # a number of numpy
            fits = type(value) is kind or (kind is float and type(value) is int)
            require(fits, f"{flag}={value!r}: give a value of type {kind.__name__}")
            least = 1 if flag in ("N_HEAD", "N_EMBD", "BLOCK_SIZE", "BATCH_SIZE", "STEPS") else 0
            require(kind is str or least <= value < 2**31, f"{flag}={value}: give {least} or more")
            globals()[flag] = kind(value)
        require(N_EMBD % (2 * N_HEAD) == 0, f"{N_EMBD=} must be a multiple of 2 * {N_HEAD=}")
        require(DROPOUT <= 1, f"{DROPOUT=}: give a share from 0 to 1")
        require(OPTIMIZER in OPTIMIZERS, f"{OPTIMIZER=}: give one of {[*OPTIMIZERS]}")
        require(DEVICE in DEVICES, f"{DEVICE=} is not here; give one of {DEVICES}")
        usable = CHECKPOINT.endswith(".pt") and os.access(Path(CHECKPOINT).parent, os.W_OK)
        require(usable, f"{CHECKPOINT=}: give a name in .pt in a folder that can be written")
        text = read_text()
        vocab = "".join(sorted(set(text)))
        train_ids, val_ids = encode(text, vocab).to(DEVICE).tensor_split([len(text) * 9 // 10])
        require(len(val_ids) > BLOCK_SIZE, f"a tenth of {DATA=} is too short for {BLOCK_SIZE=}")
        torch.manual_seed(SEED)  # for dropout
        model = GPT(len(vocab)).to(DEVICE)
        run = {
            **{flag: globals()[flag] for flag in before},
            "name": name_run(globals()),
            "data": f"{zlib.crc32(text.encode()):08x}",
            "params": sum(weight.numel() for weight in model.parameters()),
            "vocab": vocab,
            "started": time.time(),
            "curve": [],
        }
        print(f"{run['name']}: {run['params']:,} parameters, {N_LAYER} layers, {N_HEAD} heads")
        print(f"width {N_EMBD}, context {BLOCK_SIZE}, {len(text):,} characters, on {DEVICE}")
        print("\n   step    train      val    left  val loss on a logarithmic scale")
        with open("runs.jsonl", "a") as file:  # what cannot be written is found before training
            model = train(model, train_ids, val_ids, run)
            torn = Path("runs.jsonl").read_bytes()[-1:] not in (b"", b"\n")  # the line before
            file.write(("\n" if torn else "") + json.dumps(run) + "\n")
        print(f"\n{sample(model, vocab)}")
        print(f'\npython tests/lab/sample.py "{CHECKPOINT}" samples from the model again.')
        compare(run)
        return model, vocab, run
    finally:
        globals().update(before)


source = Path(__file__).read_text("utf-8").splitlines()
comments = {line.partition("=")[0].rstrip(): line.partition("# ")[2] for line in source}
parser = argparse.ArgumentParser("gpt.py", argparse.SUPPRESS, __doc__, allow_abbrev=False)
for flag, value in (FULL | REST).items():
    option = f"--{flag.lower().replace('_', '-')}"
    kind = type(value)
    how = {"type": kind} if kind is not bool else {"action": argparse.BooleanOptionalAction}
    about = f"{comments.get(flag, '')} [{globals()[flag]}]".replace("%", "%%")
    parser.add_argument(option, dest=flag, default=argparse.SUPPRESS, help=about, **how)
if __name__ == "__main__":
    try:
        main(**vars(parser.parse_args()))
    except (BadInput, OSError, KeyboardInterrupt) as error:
        parser.error(str(error) or "stopped")
