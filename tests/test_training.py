"""Training, evaluation and sampling against loops and formulas worked out by hand."""

import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from math import inf, log, nan
from pathlib import Path
from time import time

import pytest
import torch
from conftest import DELETIONS, TINY, build, words
from sample import load
from torch import nn
from torch.nn import functional as F
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode, resolve_name

import gpt

VOCAB = "abcdefghijk"
V = len(VOCAB)
TRAIN = torch.arange(300) ** 2 % 97 % V
VAL = torch.arange(60) ** 3 % 89 % V


def train(model=None, train_ids=TRAIN, val_ids=VAL):
    """gpt.train: the model with its last weights, the best one, and what became of run."""
    model = model or gpt.GPT(V)
    torch.manual_seed(0)  # of dropout
    run = {"curve": [], "started": time()}
    best = gpt.train(model, train_ids, val_ids, run)
    return model, best, run


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def batches(ids=TRAIN):
    """The inputs and targets that a model is to be trained on, in their order, without end."""
    generator = torch.Generator().manual_seed(gpt.SEED)
    while True:
        starts = torch.randint(len(ids) - gpt.BLOCK_SIZE, [gpt.BATCH_SIZE], generator=generator)
        texts = [ids[start : start + gpt.BLOCK_SIZE + 1] for start in starts.tolist()]
        yield torch.stack([x[:-1] for x in texts]), torch.stack([x[1:] for x in texts])


def watched(model, see):
    """The model, which calls see with all inputs that it is given in training."""
    model.register_forward_pre_hook(lambda m, args: see(args[0]) if m.training else None)
    return model


@pytest.fixture
def after_step():
    """after_step(function) has function(optimizer) called after each step of training."""
    hooks = []

    def register(function):
        hook = optimizer.register_optimizer_step_post_hook(lambda made, *_: function(made))
        hooks.append(hook)

    yield register
    for hook in hooks:
        hook.remove()


@pytest.fixture
def losses(monkeypatch):
    """The losses of all steps, as they are worked out."""
    losses, cross_entropy = [], F.cross_entropy

    def recorded(*args, **how):
        result = cross_entropy(*args, **how)
        losses.extend([result.item()] if result.dim() == 0 else [])
        return result

    monkeypatch.setattr(F, "cross_entropy", recorded)
    return losses


def cross_entropy(model, x, y):
    return -model(x).log_softmax(-1).gather(-1, y[..., None]).mean()


def equal(one, two):
    """Whether two models have the same weights and buffers to the last bit."""
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# The validation loss


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18, 100, 32 * 8 + 1, 33 * 8 + 1, 66 * 8 + 5])
@pytest.mark.parametrize("causal", [True, False])
def test_evaluate_is_the_mean_over_whole_windows_one_after_another(flags, length, causal):
    """A naive loop, window by window; what is left at the end is too short for one."""
    flags(CAUSAL=causal)
    model, losses = build(), []
    ids = torch.arange(length) ** 2 % 97 % V
    for start in range(0, length - 8, 8):
        logits = model(ids[None, start : start + 8])[0]
        targets = ids[start + 1 : start + 9].tolist()
        losses += [-logits[t].log_softmax(-1)[target].item() for t, target in enumerate(targets)]
    assert len(losses) == (length - 1) // 8 * 8
    assert gpt.evaluate(model, ids) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_evaluate_is_without_dropout_and_gradients_and_leaves_eval_mode(flags):
    flags(DROPOUT=0.5)
    model, graphs = build().train(), []
    model.register_forward_hook(lambda model, args, logits: graphs.append(logits.requires_grad))
    noisy = gpt.evaluate(model, VAL)
    assert not model.training and graphs == [False]
    flags(DROPOUT=0.0)
    assert noisy == gpt.evaluate(build(), VAL)


def test_of_a_long_text_evaluate_reads_the_first_2_17_characters(flags):
    """A table of logits stands in for a model; its mean loss is counted from the pairs."""
    torch.manual_seed(0)
    table, ids, given = nn.Embedding(V, V), torch.randint(V, [2**17 + 5000]), []
    table.block_size = 256
    table.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    loss = gpt.evaluate(table, ids)
    read = torch.cat(given).flatten()
    length = len(read)
    assert 2**17 - 256 <= length < 2**17 and torch.equal(read, ids[:length])
    pairs = torch.zeros(V, V).index_put_((read, ids[1 : length + 1]), torch.tensor(1.0), True)
    expected = -(pairs * table.weight.log_softmax(-1)).sum() / length
    assert loss == pytest.approx(expected.item(), rel=1e-5)


# The steps


def test_bigram_reaches_the_conditional_entropy_of_its_text(flags):
    """Nats a character, counted from the pairs of the text; no bigram model can be below that."""
    flags(N_LAYER=0, TIE=False, N_EMBD=16, BATCH_SIZE=64, STEPS=150, LEARNING_RATE=0.03)
    text = words()
    vocab = "".join(sorted(set(text)))
    ids = gpt.encode(text, vocab)
    pairs, firsts = Counter(zip(text, text[1:], strict=False)), Counter(text[:-1])
    entropy = -sum(n * log(n / firsts[a]) for (a, _), n in pairs.items()) / (len(text) - 1)
    *_, run = train(gpt.GPT(len(vocab)), ids, ids)
    assert entropy - 0.002 < run["val_loss"] < entropy + 0.02


@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_one_seed_gives_one_run_and_the_same_batches_for_all_flags(flags, deletion):
    flags(STEPS=3, **deletion)
    given, runs = [], []
    for _ in range(2):
        model, best, run = train(watched(gpt.GPT(V), given.append))
        runs.append((run["curve"], weights(model).tolist(), weights(best).tolist()))
    assert runs[0] == runs[1]
    expected = [x for (x, _), _ in zip(batches(), range(3), strict=False)]
    assert all(torch.equal(x, y) for x, y in zip(given, expected * 2, strict=True))


def test_another_seed_draws_other_batches(flags):
    given = []
    for seed in (1, 2):
        flags(SEED=seed)
        train(watched(gpt.GPT(V), given.append))
    assert not torch.equal(given[0], given[2])


def test_batches_reach_both_ends_of_the_text(flags):
    flags(STEPS=1, BATCH_SIZE=50)
    given = []
    train(watched(gpt.GPT(V), given.append), torch.arange(V))
    assert set(given[0][:, 0].tolist()) == set(range(V - gpt.BLOCK_SIZE))


@pytest.mark.parametrize("average", [True, False])
def test_average_follows_its_formula(flags, after_step, average):
    """mean += 16 / (n + 15) · (w - mean) over the weights w of every step n = 1, 2, …"""
    flags(AVERAGE=average, STEPS=9)
    model, steps = gpt.GPT(V), []
    after_step(lambda _: steps.append(weights(model)))
    _, best, run = train(model)
    mean = 0
    for n, last in enumerate(steps, 1):
        mean = mean + 16 / (n + 15) * (last - mean)
    assert torch.equal(weights(model), steps[-1]) and len(steps) == 9
    torch.testing.assert_close(weights(best), mean if average else steps[-1])
    assert (mean - steps[-1]).abs().max() > 1e-3
    assert gpt.evaluate(best, VAL) == run["curve"][-1][2]


class BatchNorm(nn.Module):
    """What a reader may put in the place of a LayerNorm. (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(TINY["N_EMBD"])

    def forward(self, x):
        return self.norm(x.mT).mT


@pytest.mark.parametrize("average", [True, False])
def test_buffers_are_carried_over_and_looks_do_not_change_them(flags, average):
    flags(AVERAGE=average, STEPS=20, N_LAYER=0)
    model = gpt.GPT(V)
    model.ln_f = BatchNorm()
    _, best, _ = train(model)
    kept = torch.load(gpt.CHECKPOINT)["weights"]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        statistic = getattr(model.ln_f.norm, name)
        assert torch.equal(getattr(best.ln_f.norm, name), statistic), name
        assert torch.equal(kept[f"ln_f.norm.{name}"], statistic), name
    assert model.ln_f.norm.num_batches_tracked == 20
    assert torch.equal(best.ln_f.norm.weight, model.ln_f.norm.weight) != average


@pytest.mark.parametrize("average", [True, False])
def test_the_best_model_has_the_buffers_of_its_look(flags, monkeypatch, average):
    flags(AVERAGE=average, STEPS=200, N_LAYER=0)
    losses = [2.0, 1.0, 2.0, 3.0]  # of the texts to train on and to validate on, at two looks
    monkeypatch.setattr(gpt, "evaluate", lambda model, ids: losses.pop(0))
    model = gpt.GPT(V)
    model.ln_f = BatchNorm()
    _, best, _ = train(model)
    assert best.ln_f.norm.num_batches_tracked == 100
    assert model.ln_f.norm.num_batches_tracked == 200


def test_sgd_training_is_a_hand_written_loop(flags):
    """Every weight less rate · gradient."""
    flags(OPTIMIZER="sgd", LEARNING_RATE=6e-4, AVERAGE=False, STEPS=10)
    rate = 0.1 * (64 / TINY["N_EMBD"]) ** 0.5  # 0.1 = 6e-4 * 500 / 3 at width 64
    trained, _, run = train()
    model = gpt.GPT(V)
    for (x, y), _ in zip(batches(), range(10), strict=False):
        grads = torch.autograd.grad(cross_entropy(model, x, y), [*model.parameters()])
        for weight, grad in zip(model.parameters(), grads, strict=True):
            weight.data -= rate * grad
    torch.testing.assert_close(weights(trained), weights(model))
    expected = [10, gpt.evaluate(model, TRAIN), gpt.evaluate(model, VAL)]
    assert run["curve"] == [pytest.approx(expected, rel=1e-4)]


def test_adamw_training_is_a_hand_written_loop(flags):
    """Decay 0.01, betas 0.9 and 0.999, both means without their bias to zero."""
    flags(LEARNING_RATE=0.01, AVERAGE=False, STEPS=5, SCALED_INIT=False)
    rate = 0.01 * (64 / TINY["N_EMBD"]) ** 0.5
    trained, *_ = train()
    model = gpt.GPT(V)
    first = [torch.zeros_like(weight) for weight in model.parameters()]
    second = [torch.zeros_like(weight) for weight in model.parameters()]
    for (x, y), step in zip(batches(), range(1, 6), strict=False):
        grads = torch.autograd.grad(cross_entropy(model, x, y), [*model.parameters()])
        for weight, m, v, grad in zip(model.parameters(), first, second, grads, strict=True):
            m += 0.1 * (grad - m)
            v += 0.001 * (grad**2 - v)
            change = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            weight.data = weight.data * (1 - rate * 0.01) - rate * change
    torch.testing.assert_close(weights(trained), weights(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name, own", [("adamw", 3e-3), ("sgd", 0.5)])
def test_the_rate_is_constant_and_falls_with_the_root_of_the_width(flags, after_step, name, own):
    rates = []
    after_step(lambda made: rates.append(made.param_groups[0]["lr"]))
    for n_embd, rate in ((64, 3e-3), (16, 3e-3), (256, 3e-3), (64, 6e-3), (16, 0.0)):
        flags(OPTIMIZER=name, N_EMBD=n_embd, LEARNING_RATE=rate)
        train()
    expected = [own, 2 * own, own / 2, 2 * own, 0.0]
    assert rates[::2] == rates[1::2] == pytest.approx(expected)


def test_an_optimizer_that_a_reader_adds_is_trained_with(flags, monkeypatch, after_step):
    made = []
    after_step(lambda optimizer: made.append((type(optimizer), optimizer.param_groups[0]["lr"])))
    monkeypatch.setitem(gpt.OPTIMIZERS, "adam", (torch.optim.Adam, 2))
    flags(OPTIMIZER="adam", N_EMBD=64, STEPS=1)
    train()
    assert made == [(torch.optim.Adam, 6e-3)]


def test_bfloat16_rounds_the_training_and_nothing_else(flags, losses):
    for bfloat16, kind in ((False, torch.float32), (True, torch.bfloat16)):
        flags(BFLOAT16=bfloat16, STEPS=1)
        model, kinds = gpt.GPT(V), set()
        model.register_forward_hook(
            lambda model, args, logits, kinds=kinds: kinds.add((model.training, logits.dtype))
        )
        _, best, _ = train(model)
        gpt.evaluate(model, VAL)
        assert kinds == {(True, kind), (False, torch.float32)}
        assert {weight.dtype for weight in best.parameters()} == {torch.float32}
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)


def test_dropout_is_on_in_every_step_and_drawn_by_no_look(flags, after_step):
    """The looks leave the model of AVERAGE=False in eval mode; the steps after them do not."""
    flags(DROPOUT=0.5, AVERAGE=False, STEPS=110, N_LAYER=1)
    given, states = [], []
    after_step(lambda _: states.append(torch.get_rng_state()))
    train(watched(gpt.GPT(V), given.append))
    assert len(given) == 110
    for one, two in zip(states, states[1:], strict=False):
        assert not torch.equal(one, two)
    flags(DROPOUT=0.0, AVERAGE=False)
    train()
    assert torch.equal(states[110], states[111])


@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_gradients_agree_with_finite_differences(flags, monkeypatch, deletion):
    """In float64, each weight along a random direction."""
    flags(**deletion)
    model, (x, y) = build().double(), next(batches())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for layer in model.modules():
        if hasattr(layer, "rotation"):
            layer.rotation = layer.rotation.to(torch.complex128)
    F.cross_entropy(model(x).mT, y).backward()
    for name, weight in model.named_parameters():
        direction = torch.randn_like(weight) * 1e-5
        with torch.no_grad():
            weight += direction
            above = F.cross_entropy(model(x).mT, y)
            weight -= 2 * direction
            below = F.cross_entropy(model(x).mT, y)
            weight += direction
        slope = (weight.grad * direction).sum()
        torch.testing.assert_close(above - below, 2 * slope, rtol=1e-4, atol=1e-11, msg=name)
        assert slope != 0, name


READS = "item tolist numpy cpu to cuda type nonzero unique masked_select __bool__ __int__"
READS = {*READS.split(), *"__float__ __index__ __repr__ __format__ __array__ equal".split()}
MAKES = {"tensor", "as_tensor", "scalar_tensor", "from_numpy", "rand", "randn", "randint"}
MAKES |= {"randperm", "arange", "linspace", "zeros", "ones", "full", "empty", "eye"}


class Waits(TorchFunctionMode):
    """Counts what would make a GPU wait: reading a tensor's numbers, making one elsewhere."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_function__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = (resolve_name(operation) or getattr(operation, "__name__", "")).rpartition(".")[2]
        makes_elsewhere = name in MAKES and str(kwargs.get("device")) != gpt.DEVICE
        if name in READS or makes_elsewhere:
            self.count[name] += 1
        return operation(*args, **kwargs)


def waits(steps):
    gpt.STEPS = steps
    with Waits() as waits:
        train()
    return waits.count


@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_no_step_reads_a_tensor_or_makes_one_on_another_device(flags, deletion):
    """Only the looks do, and there is one of them whether there are 3 steps or 5."""
    flags(**deletion)
    three = waits(3)
    assert three["item"] >= 2  # the two losses of the look
    assert three == waits(5)


@pytest.mark.parametrize(
    "read",
    [
        lambda logits: logits.sum().item(),
        lambda logits: bool(logits.detach().sum() > 0),
        lambda logits: torch.zeros(3, device="meta"),
    ],
    ids=["item", "bool", "elsewhere"],
)
def test_a_step_that_reads_a_tensor_or_makes_one_elsewhere_is_seen(flags, monkeypatch, read):
    flags()
    forward = gpt.GPT.forward

    def wrong(model, ids):
        logits = forward(model, ids)
        read(logits)
        return logits

    monkeypatch.setattr(gpt.GPT, "forward", wrong)
    assert waits(3) != waits(5)


# The looks and the best model


@pytest.mark.parametrize(
    "steps, looks",
    [
        (1, [1]),
        (100, [100]),
        (101, [100, 101]),
        (250, [100, 200, 250]),
        (1005, [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1005]),
        (1500, [100, 150, 300, 450, 600, 750, 900, 1050, 1200, 1350, 1500]),
    ],
)
def test_looks_are_a_tenth_of_the_steps_apart_and_at_least_100(flags, steps, looks):
    flags(STEPS=steps, N_LAYER=0, BATCH_SIZE=1, AVERAGE=False, OPTIMIZER="sgd")
    *_, run = train()
    assert [row[0] for row in run["curve"]] == looks


def test_a_look_is_the_loss_of_texts_to_train_on_and_of_those_to_validate_on(flags):
    """Of a long text it is that of the first 2**14 characters."""
    flags(N_LAYER=0)
    long, run = torch.arange(2**14 + 3000) ** 2 % 97 % V, {"curve": [], "started": time()}
    model = build()
    expected = [gpt.evaluate(model, ids) for ids in (TRAIN, VAL, long[: 2**14 + 1])]
    lengths = []
    model.register_forward_pre_hook(lambda model, args: lengths.append(args[0].numel()))
    gpt.look(model, copy.deepcopy(model), TRAIN, VAL, 1, run)
    assert run["curve"] == [[1, *expected[:2]]]
    lengths.clear()
    gpt.look(model, copy.deepcopy(model), long, VAL, 2, run)
    assert run["curve"][1] == [2, expected[2], expected[1]]
    assert sum(lengths) == 2**14 + (len(VAL) - 1) // 8 * 8


def check_checkpoint(best, run):
    """CHECKPOINT, the only file left, holds the best model and its run."""
    assert [path.name for path in Path().iterdir()] == [gpt.CHECKPOINT]
    checkpoint = torch.load(gpt.CHECKPOINT)
    loaded = copy.deepcopy(best)
    loaded.load_state_dict(checkpoint["weights"])
    assert checkpoint["run"]["val_loss"] == run["val_loss"] and equal(loaded, best)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("losses", [[5, 3, 4, 1, 2, 9], [1, 2, 3], [3, 2, 1]], ids=str)
def test_the_weights_kept_are_those_of_the_look_with_the_lowest_loss(
    flags, monkeypatch, average, losses
):
    flags(STEPS=100 * len(losses), AVERAGE=average, N_LAYER=0)
    looks, run = [], {"curve": [], "started": time()}

    def evaluate(model, ids):
        if ids is not VAL:
            return 2.5
        if looks:  # after the look before this one
            check_checkpoint(looks[losses.index(min(losses[: len(looks)]))], run)
        looks.append(copy.deepcopy(model))
        return losses[len(looks) - 1]

    monkeypatch.setattr(gpt, "evaluate", evaluate)
    best = gpt.train(gpt.GPT(V), TRAIN, VAL, run)
    assert equal(best, looks[losses.index(min(losses))])
    assert [row[1:] for row in run["curve"]] == [[2.5, loss] for loss in losses]
    assert run["val_loss"] == min(losses)
    check_checkpoint(best, run)


def test_of_a_run_that_overfits_the_best_model_is_kept(flags):
    flags(STEPS=200, LEARNING_RATE=0.01, N_LAYER=1)
    model, best, run = train()
    losses = [row[2] for row in run["curve"]]
    assert min(losses) < losses[-1] - 0.05
    assert gpt.evaluate(best, VAL) == run["val_loss"] == min(losses)
    assert gpt.evaluate(model, VAL) > min(losses) + 0.05
    check_checkpoint(best, run)


@pytest.mark.parametrize("lost", [nan, inf])
@pytest.mark.parametrize("good", [0, 1])
def test_a_loss_that_is_no_number_ends_training(flags, monkeypatch, lost, good):
    """After as many good looks, whose best model stays in CHECKPOINT."""
    flags(STEPS=300, N_LAYER=0)
    losses, run = [2.0] * good + [lost, 1.0], {"curve": [], "started": time()}
    monkeypatch.setattr(gpt, "evaluate", lambda m, ids: losses.pop(0) if ids is VAL else 2.5)
    with pytest.raises(gpt.BadInput, match=f"no number at step {100 * good + 100}"):
        gpt.train(gpt.GPT(V), TRAIN, VAL, run)
    assert run["curve"] == [[100, 2.5, 2.0]][:good]
    assert Path(gpt.CHECKPOINT).exists() == bool(good)


@pytest.mark.parametrize("rate", [1.0, 1e30])
def test_a_rate_that_is_far_too_high_ends_training(flags, rate):
    flags(NORM=False, OPTIMIZER="sgd", LEARNING_RATE=rate, STEPS=200, AVERAGE=False)
    model = gpt.GPT(V)
    with pytest.raises(gpt.BadInput, match="LEARNING_RATE"):
        train(model)
    assert not weights(model).isfinite().all() and not list(Path().iterdir())


@pytest.mark.parametrize(
    "moment, when, step",
    [("forward", 150, 150), ("backward", 150, 150), ("evaluate", 3, 200), ("evaluate", 4, 200)],
)
def test_ctrl_c_ends_training_with_one_more_look(
    flags, monkeypatch, after_step, moment, when, step
):
    """In the forward of step 150, after its backward, or in either half of the look after it."""
    flags(STEPS=250, AVERAGE=False, N_LAYER=0)
    count, evaluate = Counter(), gpt.evaluate

    def stop(what):
        count[what] += 1
        if what == moment and count[what] == when:
            raise KeyboardInterrupt

    def evaluated(model, ids):
        stop("evaluate")
        return evaluate(model, ids)

    monkeypatch.setattr(gpt, "evaluate", evaluated)
    after_step(lambda _: stop("backward"))
    model, best, run = train(watched(gpt.GPT(V), lambda _: stop("forward")))
    assert [row[0] for row in run["curve"]] == [100, step] and run["STEPS"] == step
    assert run["curve"][1][1:] == [evaluate(model, TRAIN), evaluate(model, VAL)]
    assert evaluate(best, VAL) == run["val_loss"] == min(row[2] for row in run["curve"])
    check_checkpoint(best, run)


def test_ctrl_c_before_the_first_look_touches_nothing(flags):
    flags(STEPS=100)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(watched(gpt.GPT(V), stop))
    assert not list(Path().iterdir())


def test_after_ctrl_c_the_last_look_is_kept_though_nobody_reads_what_is_printed(
    flags, monkeypatch, after_step
):
    """As in gpt.py | tee, where Ctrl-C ends tee too."""
    flags(STEPS=200, LEARNING_RATE=0.01, N_LAYER=0)
    steps, run = [], {"curve": [], "started": time()}

    def broken(*_, **__):
        raise BrokenPipeError

    def stop(_):
        steps.append(1)
        if len(steps) == 150:
            monkeypatch.setattr(gpt, "print", broken, raising=False)
            raise KeyboardInterrupt

    after_step(stop)
    with pytest.raises(BrokenPipeError):
        gpt.train(gpt.GPT(V), TRAIN, TRAIN, run)
    assert [row[0] for row in run["curve"]] == [100, 150]
    kept = torch.load(gpt.CHECKPOINT)["run"]
    assert kept["val_loss"] == run["curve"][1][2] < run["curve"][0][2] and kept["STEPS"] == 150


# The printed line


def printed(monkeypatch, capsys, step=100, train_loss=2.5, val_loss=2.5, seconds=60.0):
    """The line of a look in a run that began so many seconds ago."""
    losses = [train_loss, val_loss]
    monkeypatch.setattr(gpt, "evaluate", lambda model, ids: losses.pop(0))
    monkeypatch.setattr(gpt.time, "time", lambda: 1000.0 + seconds)
    model = gpt.GPT(V)
    run = {"curve": [], "started": 1000.0}
    gpt.look(model, copy.deepcopy(model), TRAIN, VAL, step, run)
    line = capsys.readouterr().out
    assert line.endswith("\n") and line.count("\n") == 1
    return line[:-1]


@pytest.mark.parametrize(
    "loss, signs",
    [
        (0.0, 0),
        (1.42, 0),
        (1.5, 7),
        (1.7, 17),
        (2.0, 25),
        (2.3, 30),
        (3.0, 37),
        (3.9, 43),
        (4.2, 44),
        (99.0, 44),
    ],
)
def test_a_bar_is_a_logarithm_of_the_loss_above_1_3(flags, monkeypatch, capsys, loss, signs):
    """30 signs at 2.3, and 14 more or fewer where the difference is e times larger or smaller."""
    flags()
    line = printed(monkeypatch, capsys, val_loss=loss)
    assert line.count("=") == signs
    assert line.partition("=")[0].split()[:3] == ["100", "2.500", f"{loss:.3f}"]


@pytest.mark.parametrize(
    "steps, step, seconds, left",
    [(300, 100, 60.0, "2:00"), (100, 100, 60.0, "0:00"), (2000, 200, 7.0, "1:03")],
)
def test_time_left_is_that_of_the_steps_to_come(
    flags, monkeypatch, capsys, steps, step, seconds, left
):
    flags(STEPS=steps)
    assert f" {left} " in printed(monkeypatch, capsys, step=step, seconds=seconds)


@pytest.mark.parametrize("loss", [4.2, 99999.0])
def test_a_line_has_at_most_80_columns(flags, monkeypatch, capsys, loss):
    """Even of a run of a month and a loss that is far too high."""
    flags(STEPS=10**6)
    line = printed(monkeypatch, capsys, 10**5, loss, loss, 2.5e5)
    assert len(line) <= 80 and line.isascii()


# Sampling


def sampled(model, prompt, temperature=1.0, **changes):
    vars(gpt).update(changes)
    return gpt.sample(model, VOCAB, prompt, temperature)


def test_temperature_0_takes_the_likeliest(flags):
    """Against argmax after the last BLOCK_SIZE characters."""
    flags()
    model, text = build(), "bad"
    for _ in range(30):
        ids = torch.tensor([[VOCAB.index(c) for c in text[-gpt.BLOCK_SIZE :]]])
        text += VOCAB[model(ids)[0, -1].argmax()]
    for seed in (1, 2):
        assert sampled(model, "bad", 0.0, SAMPLE=30, SEED=seed) == text
    assert len(set(text)) > 2 and sampled(model, "bad") != text


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_drawn_from_the_softmax(flags, temperature):
    """What follows each character of a bigram, counted: χ² within five deviations of its mean."""
    flags(N_LAYER=0, SAMPLE=2000)
    model, vocab = build(5), VOCAB[:5]
    p = (model(torch.arange(5)[:, None])[:, 0] / temperature).softmax(-1)
    ids = torch.tensor([vocab.index(c) for c in gpt.sample(model, vocab, "a", temperature)])
    seen = torch.zeros(5, 5).index_put_((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)
    seen, p = seen[seen.sum(-1) > 0], p[seen.sum(-1) > 0]
    expected = p * seen.sum(-1, keepdim=True)
    free = 4 * len(p)
    chi = ((seen - expected) ** 2 / expected).sum().item()
    assert abs(chi - free) < 5 * (2 * free) ** 0.5


def test_the_temperature_is_1_where_none_is_given(flags):
    flags(SAMPLE=30)
    model = build()
    assert gpt.sample(model, VOCAB, "a") == sampled(model, "a") != sampled(model, "a", 2.0)


def test_context_is_cropped_to_the_block_size_of_the_model(flags):
    flags(ROTARY=False, SAMPLE=20)
    model, prompt = build(), "".join(VOCAB[i] for i in TRAIN[:30])
    flags(BLOCK_SIZE=99, SAMPLE=20)
    long = gpt.sample(model, VOCAB, prompt)
    flags(BLOCK_SIZE=3, SAMPLE=20)
    assert long[22:] == gpt.sample(model, VOCAB, prompt[22:]) and long[:30] == prompt


def test_sampling_is_without_dropout(flags):
    flags(DROPOUT=0.5)
    noisy = sampled(build().train(), "abc", SAMPLE=40)
    flags(DROPOUT=0.0)
    assert noisy == sampled(build(), "abc", SAMPLE=40)


def test_seed_fixes_the_sample_and_sample_0_returns_the_prompt(flags):
    flags()
    model = build()
    one, two = sampled(model, "abc", SAMPLE=40), sampled(model, "abc")
    assert one == two and len(one) == 43
    assert one != sampled(model, "abc", SEED=2)
    assert sampled(model, "abc", SAMPLE=0) == "abc"
    assert sampled(model, "") == gpt.sample(model, VOCAB) == "a"


# Models side by side


@pytest.fixture
def models(flags):
    """Two models of other flags and sizes, under flags that fit neither, and their samples."""
    flags(NORM=False, N_HEAD=1, N_EMBD=4, BLOCK_SIZE=16, ROTARY=False)
    one = build()
    flags(DROPOUT=0.5, PRE_NORM=False, RESIDUAL=False)
    two = build()
    flags(SAMPLE=20, CAUSAL=False, SCALE=False, BLOCK_SIZE=3)
    texts = [gpt.sample(model, VOCAB, "abc") for model in (one, two)]
    assert texts[0] != texts[1]
    return [one, two], texts


def sample(model):
    return gpt.sample(model, VOCAB, "abc")


def test_models_sample_in_turn_and_in_threads_each_as_alone(models):
    models, texts = models
    assert [sample(model) for model in models] == texts
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(sample, models * 5)) == texts * 5


@pytest.mark.parametrize("average", [True, False])
def test_sampling_while_another_model_is_trained_changes_neither(models, after_step, average):
    """Nor does it change the training of the model that is sampled itself."""
    models, texts = models
    vars(gpt).update(STEPS=4, DROPOUT=0.2, AVERAGE=average)
    alone, best_alone, run_alone = train()
    trained, seen = gpt.GPT(V), []

    def hook(_):
        sample(trained)
        seen.extend(sample(model) for model in models)

    after_step(hook)
    _, best, run = train(trained)
    assert seen == texts * 4
    assert equal(trained, alone) and equal(best, best_alone)
    assert run["curve"] == run_alone["curve"]


# Whole runs


EDGES = [
    {"STEPS": 1},
    {"BLOCK_SIZE": 1},
    {"BATCH_SIZE": 1},
    {"N_HEAD": TINY["N_EMBD"] // 2},
    {"N_EMBD": 2, "N_HEAD": 1},
    {"N_LAYER": 0},
    {"SAMPLE": 0},
    {"DROPOUT": 1.0},
    {"SEED": 0},
    {"BIAS": True, "TIE": False, "NORM": False, "ROTARY": False},
]


@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_a_run_at_the_edges_of_its_sizes_trains_samples_and_is_loaded(text, capsys, edge):
    """Loaded under the flags as they are, the model has its own, and gives the same logits."""
    model, vocab, run = gpt.main(**TINY | edge)
    out = capsys.readouterr().out
    assert 0 < run["val_loss"] < 10 and vocab == "".join(sorted(set(text)))
    again, vocab_again, _ = load("gpt.pt")
    ids = gpt.encode(text[: model.block_size], vocab)[None]
    assert equal(again, model) and torch.equal(again(ids), model(ids)) and vocab_again == vocab
    gpt.SAMPLE, gpt.SEED = run["SAMPLE"], run["SEED"]
    sample = gpt.sample(again, vocab)
    assert f"\n\n{sample}\n\n" in out and len(sample) == 1 + run["SAMPLE"]


@pytest.mark.parametrize("text", ["a" * 100, words(81), words(80)])
def test_texts_at_their_edges(tmp_path, monkeypatch, text):
    """One character has nothing to predict; 81 are 72 to train on and 9 to evaluate, one window;
    80 are too few."""
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text(text, "utf-8")
    if len(text) == 80:
        with pytest.raises(gpt.BadInput, match="data.txt.*BLOCK_SIZE=8"):
            gpt.main(**TINY, DATA="data.txt")
    else:
        *_, run = gpt.main(**TINY, DATA="data.txt")
        assert 0 <= run["val_loss"] < 10
        assert (run["val_loss"] == 0) == (len(set(text)) == 1)
