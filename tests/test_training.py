"""Training, evaluation and sampling against loops and formulas worked by hand; other texts."""

import copy
from collections import Counter
from math import ceil, isfinite, isnan, log
from pathlib import Path

import pytest
import torch
from conftest import DELETIONS, TINY, build, words
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode, resolve_name

import gpt

VOCAB = "abcdefghijk"
V = len(VOCAB)
TRAIN = torch.arange(300) ** 2 % 97 % V
VAL = torch.arange(60) ** 3 % 89 % V


def new():
    """The model that train starts from."""
    torch.manual_seed(0)
    return gpt.GPT(V)


def train():
    """gpt.train on a new model: the model with its last weights, and all that gpt.train returns."""
    model = new()
    return model, *gpt.train(model, TRAIN, VAL, VOCAB)


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


def cross_entropy(model, x, y):
    return -model(x).log_softmax(-1).gather(-1, y[..., None]).mean()


# The validation loss


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18, 100, 32 * 8 + 1, 33 * 8 + 1, 66 * 8 + 5])
@pytest.mark.parametrize("causal", [True, False])
def test_evaluate_is_the_mean_over_whole_windows_one_after_another(flags, length, causal):
    """A naive loop, window by window; what is left at the end is too short for one."""
    flags(CAUSAL=causal)
    model, losses = build(), []
    ids = torch.arange(length) ** 2 % 97 % V
    for n in range((length - 1) // 8):
        logits = model(ids[None, 8 * n : 8 * n + 8])[0]
        targets = ids[8 * n + 1 : 8 * n + 9].tolist()
        losses += [-logits[t].log_softmax(-1)[target].item() for t, target in enumerate(targets)]
    expected = sum(losses) / len(losses)
    assert gpt.evaluate(model, ids) == pytest.approx(expected, rel=1e-5)


def test_evaluate_is_without_dropout_and_goes_back_to_training(flags):
    flags(DROPOUT=0.5)
    noisy = gpt.evaluate(model := build(), VAL)
    assert model.training
    flags(DROPOUT=0.0)
    assert noisy == gpt.evaluate(build(), VAL)


def test_of_a_long_text_evaluate_reads_the_first_2_17_characters(flags):
    """A table of logits stands in for a model; its mean loss is counted from the pairs."""
    flags(BLOCK_SIZE=256)
    torch.manual_seed(0)
    table, ids, given = nn.Embedding(V, V), torch.randint(V, [2**17 + 5000]), []
    table.flags = {"BLOCK_SIZE": 256}
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
    flags(N_LAYER=0, TIE=False, N_EMBD=32, BATCH_SIZE=64, STEPS=200, LEARNING_RATE=0.03)
    text = words()
    vocab = "".join(sorted(set(text)))
    ids = gpt.encode(text, vocab)
    pairs, firsts = Counter(zip(text, text[1:], strict=False)), Counter(text[:-1])
    entropy = -sum(n * log(n / firsts[a]) for (a, _), n in pairs.items()) / (len(text) - 1)
    _, curve = gpt.train(gpt.GPT(len(vocab)), ids, ids, vocab)
    assert entropy - 0.002 < min(row[2] for row in curve) < entropy + 0.02


@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_one_seed_gives_one_curve_and_the_same_batches_for_all_flags(flags, deletion):
    flags(STEPS=3, **deletion)
    given, curves = [], []
    for _ in range(2):
        model = watched(new(), given.append)
        best, curve = gpt.train(model, TRAIN, VAL, VOCAB)
        curves.append((curve, weights(model).tolist(), weights(best).tolist()))
    assert curves[0] == curves[1]
    expected = [x for (x, _), _ in zip(batches(), range(3), strict=False)]
    assert all(torch.equal(x, y) for x, y in zip(given, expected * 2, strict=True))


def test_another_seed_draws_other_batches(flags):
    curves = []
    for seed in (1, 2):
        flags(SEED=seed)
        curves.append(train()[-1])
    assert curves[0] != curves[1]


def test_batches_reach_both_ends_of_the_text(flags):
    flags(STEPS=1, BATCH_SIZE=50)
    given = []
    gpt.train(watched(new(), given.append), torch.arange(V), VAL, VOCAB)
    assert set(given[0][:, 0].tolist()) == set(range(V - gpt.BLOCK_SIZE))


@pytest.mark.parametrize("average", [True, False])
def test_average_follows_its_formula(flags, monkeypatch, average):
    """mean += 16 / (n + 15) · (w - mean) over the weights w of every step n = 1, 2, …"""
    means, mean = [], 0
    for n in range(1, 10):
        flags(AVERAGE=False, STEPS=n)
        last = weights(train()[0])
        mean = mean + 16 / (n + 15) * (last - mean)
        means.append(mean if average else last)
    flags(AVERAGE=average, STEPS=9)
    looks = []
    monkeypatch.setattr(gpt, "evaluate", lambda model, ids: looks.append(weights(model)) or 1.0)
    model, *_ = train()
    assert torch.equal(weights(model), last)
    for look, expected in zip(looks, means, strict=True):
        torch.testing.assert_close(look, expected)
    assert (mean - last).abs().max() > 1e-3


def test_sgd_training_is_a_hand_written_loop(flags):
    """Every weight less rate · gradient."""
    flags(OPTIMIZER="sgd", LEARNING_RATE=0.1, AVERAGE=False, STEPS=10)
    trained, _, curve = train()
    model, losses = new(), []
    for (x, y), step in zip(batches(), range(1, 11), strict=False):
        loss = cross_entropy(model, x, y)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, [*model.parameters()])
        for weight, grad in zip(model.parameters(), grads, strict=True):
            weight.data -= 0.1 * grad
        expected = [step, sum(losses) / step, gpt.evaluate(model, VAL)]
        assert curve[step - 1] == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(weights(trained), weights(model))
    assert len(curve) == 10


def test_adamw_training_is_a_hand_written_loop(flags):
    """Decay 0.01, betas 0.9 and 0.999, both means without their bias to zero."""
    flags(LEARNING_RATE=0.01, AVERAGE=False, STEPS=5, SCALED_INIT=False)
    trained, *_ = train()
    model = new()
    first, second = ([torch.zeros_like(weight) for weight in model.parameters()] for _ in "12")
    for (x, y), step in zip(batches(), range(1, 6), strict=False):
        grads = torch.autograd.grad(cross_entropy(model, x, y), [*model.parameters()])
        for weight, m, v, grad in zip(model.parameters(), first, second, grads, strict=True):
            m += 0.1 * (grad - m)
            v += 0.001 * (grad**2 - v)
            change = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            weight.data = weight.data * (1 - 0.01 * 0.01) - 0.01 * change
    torch.testing.assert_close(weights(trained), weights(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer, full", [("adamw", 3e-3), ("sgd", 0.5)])
def test_the_rate_is_constant_and_its_default_falls_with_the_root_of_the_width(
    flags, optimizer, full
):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    for n_embd, rate in ((64, 0.0), (16, 0.0), (16, 0.125)):
        flags(OPTIMIZER=optimizer, N_EMBD=n_embd, LEARNING_RATE=rate)
        train()
    hook.remove()
    assert rates == pytest.approx([full] * 2 + [2 * full] * 2 + [0.125] * 2)


def test_bfloat16_rounds_the_training_and_nothing_else(flags):
    curves = []
    for bfloat16 in (False, True):
        flags(BFLOAT16=bfloat16, STEPS=1, LEARNING_RATE=1e-9)
        curves.append(train()[-1][0])
    assert curves[0][1] != curves[1][1] == pytest.approx(curves[0][1], rel=0.01)
    assert curves[0][2] == pytest.approx(curves[1][2], rel=1e-6)


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


class Watch(TorchFunctionMode):
    """Counts what would make a GPU wait: reading a tensor's numbers, making one elsewhere."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        elsewhere = name in MAKES and str(kwargs.get("device")) != gpt.DEVICE
        self.seen[name] += name in READS or elsewhere
        return func(*args, **kwargs)


def waits(steps):
    gpt.STEPS = steps
    with Watch() as watch:
        train()
    return +watch.seen


@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_no_step_reads_a_tensor_or_makes_one_on_another_device(flags, deletion):
    """Only the looks do, and there are ten of them whether there are 10 steps or 12."""
    flags(**deletion)
    ten = waits(10)
    assert ten["item"] >= 20  # two losses a look
    assert ten == waits(12)


@pytest.mark.parametrize(
    "read",
    [
        lambda logits: logits.sum().item(),
        lambda logits: logits.tolist(),
        lambda logits: logits.detach().numpy(),
        lambda logits: logits.cpu(),
        lambda logits: logits.to("cpu"),
        lambda logits: bool(logits.detach().sum() > 0),
        lambda logits: float(logits.detach().sum()),
        lambda logits: f"{logits.sum():.3f}",
        lambda logits: repr(logits),
        lambda logits: torch.tensor([1]),
        lambda logits: torch.arange(3),
        lambda logits: torch.zeros(3, device="meta"),
    ],
    ids=range(12),
)
def test_a_step_that_reads_a_tensor_or_makes_one_elsewhere_is_seen(flags, monkeypatch, read):
    flags()
    forward = gpt.GPT.forward

    def wrong(model, ids):
        logits = forward(model, ids)
        read(logits)
        return logits

    monkeypatch.setattr(gpt.GPT, "forward", wrong)
    assert waits(10) != waits(12)


# The looks and the best model


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 9, 10, 11, 19, 25, 99, 100, 104])
def test_it_looks_ten_times_and_at_each_step_below_ten(flags, steps):
    flags(STEPS=steps, N_LAYER=0)
    curve = train()[-1]
    assert [row[0] for row in curve] == sorted({ceil(n * steps / 10) for n in range(1, 11)})


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


def mean_of_last_50(losses):
    return pytest.approx(sum(losses[-50:]) / len(losses[-50:]), rel=1e-5)


def test_a_train_loss_is_the_mean_of_the_last_50_steps(flags, losses):
    flags(STEPS=130, N_LAYER=1)
    curve = train()[-1]
    assert len(losses) == 130
    for step, train_loss, _ in curve:
        assert train_loss == mean_of_last_50(losses[:step])


def saved():
    """The flags, the vocabulary and the weights in CHECKPOINT, the only file left."""
    assert [path.name for path in Path().iterdir()] == [gpt.CHECKPOINT]
    return torch.load(gpt.CHECKPOINT)


def equal(one, two):
    """Whether two models have the same weights and buffers to the last bit."""
    return all(torch.equal(x, y) for x, y in zip(one.values(), two.values(), strict=True))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("losses", [[5, 3, 4, 1, 2, 1, 9], [1, 2, 3], [3, 2, 1], [2, float("nan")]])
def test_the_weights_kept_are_those_of_the_look_with_the_lowest_loss(
    flags, monkeypatch, average, losses
):
    flags(STEPS=len(losses), AVERAGE=average)
    looks, left = [], list(losses)

    def evaluate(model, ids):
        assert ids is VAL
        if looks:
            kept.append(saved()[2])
        looks.append(copy.deepcopy(model.state_dict()))
        return left.pop(0)

    kept = []
    monkeypatch.setattr(gpt, "evaluate", evaluate)
    _, best, curve = train()
    places = [losses[: n + 1].index(min(losses[: n + 1])) for n in range(len(losses))]
    for place, state in zip(places, [*kept, best.state_dict()], strict=True):
        assert equal(state, looks[place])
    flags_saved, vocab, state = saved()
    assert flags_saved == best.flags and vocab == VOCAB and equal(state, best.state_dict())
    assert [str(row[2]) for row in curve] == list(map(str, losses))


@pytest.mark.parametrize("average", [True, False])
def test_of_a_run_that_overfits_the_best_model_is_kept(flags, average):
    """12,000 characters whose last part, the one for validation, is written backwards: which
    characters are frequent is soon learnt and helps; what follows what comes later and harms."""
    flags(STEPS=300, LEARNING_RATE=1e-3, AVERAGE=average)
    text = words(10_800) + words(1200)[::-1]
    vocab = "".join(sorted(set(text)))
    train_ids, val_ids = gpt.encode(text, vocab).split(10_800)
    model = gpt.GPT(len(vocab))
    best, curve = gpt.train(model, train_ids, val_ids, vocab)
    losses = [row[2] for row in curve]
    assert losses[0] > min(losses) < losses[-1] - 0.05
    assert gpt.evaluate(best, val_ids) == min(losses)
    assert gpt.evaluate(model, val_ids) > min(losses) + 0.05
    flags_saved, vocab_saved, state = saved()
    vars(gpt).update(flags_saved)
    loaded = gpt.GPT(len(vocab_saved))
    loaded.load_state_dict(state)
    assert gpt.evaluate(loaded, val_ids) == min(losses) and vocab_saved == vocab


@pytest.mark.parametrize("rate, good", [(30.0, True), (1e30, False)])
def test_a_run_that_diverges_goes_on_to_its_end_and_keeps_what_was_best(flags, rate, good):
    flags(NORM=False, OPTIMIZER="sgd", LEARNING_RATE=rate, STEPS=10, AVERAGE=False)
    model, best, curve = train()
    assert [row[0] for row in curve] == list(range(1, 11))
    assert isnan(curve[-1][2])
    assert isfinite(curve[0][2]) == good == Path(gpt.CHECKPOINT).exists()
    if good:
        finite = [row[2] for row in curve if isfinite(row[2])]
        assert gpt.evaluate(best, VAL) == min(finite) and equal(saved()[2], best.state_dict())
    assert weights(best).isfinite().all() and not weights(model).isfinite().all()


@pytest.mark.parametrize("moment", ["step", "backward", "look"])
@pytest.mark.parametrize("step", [1, 2, 15, 20])
def test_ctrl_c_ends_training_with_one_more_look(flags, monkeypatch, losses, moment, step):
    """In the forward of a step, after its backward, or in the look after it."""
    flags(STEPS=20, AVERAGE=False)
    count, evaluate = Counter(), gpt.evaluate

    def stop(what, when):
        count[what] += 1
        if what == moment and count[what] == when:
            raise KeyboardInterrupt

    def looked(model, ids):
        stop("look", ceil(step / 2))
        return evaluate(model, ids)

    model = watched(new(), lambda _: stop("step", step))
    hook = register_optimizer_step_pre_hook(lambda *_: stop("backward", step))
    monkeypatch.setattr(gpt, "evaluate", looked)
    best, curve = gpt.train(model, TRAIN, VAL, VOCAB)
    hook.remove()
    last = 2 * ceil(step / 2) if moment == "look" else step
    assert [row[0] for row in curve] == [*range(2, last, 2), last]
    done = losses[: last if moment == "look" else step - 1]
    assert isnan(curve[-1][1]) or curve[-1][1] == mean_of_last_50(done)
    assert curve[-1][2] == evaluate(model, VAL)
    assert evaluate(best, VAL) == min(row[2] for row in curve)
    assert equal(saved()[2], best.state_dict())


# Sampling


def sampled(model, prompt, vocab=VOCAB, **changes):
    vars(gpt).update(changes)
    return gpt.sample(model, vocab, prompt)


def test_temperature_0_takes_the_likeliest(flags):
    """Against argmax after the last BLOCK_SIZE characters."""
    flags()
    model, text = build(), "bad"
    for _ in range(30):
        ids = torch.tensor([[VOCAB.index(c) for c in text[-gpt.BLOCK_SIZE :]]])
        text += VOCAB[model(ids)[0, -1].argmax()]
    for top_k in (0, 1, 3):
        assert sampled(model, "bad", SAMPLE=30, TEMPERATURE=0.0, TOP_K=top_k) == text
    assert sampled(model, "bad", TEMPERATURE=2.0, TOP_K=1) == text
    assert len(set(text)) > 2


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("top_k", [0, 2, 4, 99])
def test_samples_are_drawn_from_the_softmax_over_the_top_k(flags, temperature, top_k):
    """What follows each character of a bigram, counted: χ² within five deviations of its mean."""
    flags(N_LAYER=0, SAMPLE=2000, TEMPERATURE=temperature, TOP_K=top_k)
    model, vocab = build(5), VOCAB[:5]
    p = (model(torch.arange(5)[:, None])[:, 0] / temperature).softmax(-1)
    for row in p:
        for place in row.argsort()[: 5 - top_k] if top_k else []:
            row.data[place] = 0
    p = p / p.sum(-1, keepdim=True)
    ids = torch.tensor([vocab.index(c) for c in gpt.sample(model, vocab, "a")])
    seen = torch.zeros(5, 5).index_put_((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)
    expected = p * seen.sum(-1, keepdim=True)
    assert seen[p == 0].sum() == 0
    kept = (expected > 0).sum().item()
    free = kept - (seen.sum(-1) > 0).sum().item()
    chi = ((seen - expected) ** 2 / expected)[expected > 0].sum().item()
    assert abs(chi - free) < 5 * (2 * free) ** 0.5
    assert kept == (seen.sum(-1) > 0).sum().item() * (min(top_k, 5) or 5)


def test_a_top_k_of_0_or_more_than_the_vocabulary_is_all(flags):
    flags(SAMPLE=100)
    model = build()
    texts = {k: sampled(model, "a", TOP_K=k) for k in (0, V, V + 1, 10**6, V - 1, 2)}
    assert texts[0] == texts[V] == texts[V + 1] == texts[10**6]
    assert len({texts[0], texts[V - 1], texts[2]}) == 3


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
    assert sampled(model, "") == "a"


# Whole runs


EDGES = [{"STEPS": 1}, {"BLOCK_SIZE": 1}, {"BATCH_SIZE": 1}, {"N_HEAD": TINY["N_EMBD"] // 2}]
EDGES += [{"N_EMBD": 2, "N_HEAD": 1}, {"N_LAYER": 0}, {"SAMPLE": 0}, {"TEMPERATURE": 1e-9}]
EDGES += [{"PROMPT": "to be " * 9}, {"DROPOUT": 1.0}, {"DROPOUT": 1}, {"SEED": 0}, {"TOP_K": 1}]


def run(capsys, text, **changes):
    """gpt.main on text, in the current folder: the model, its vocabulary and the record."""
    Path("data.txt").write_bytes(text.encode())
    model, vocab, record = gpt.main(**{"DEVICE": "cpu", "DATA": "data.txt"} | TINY | changes)
    sample = gpt.sample(model, vocab, gpt.PROMPT)
    assert f"\n{sample}\n" in "\n" + capsys.readouterr().out
    prompt = changes.get("PROMPT") or min(text)
    assert len(sample) == len(prompt) + gpt.SAMPLE and sample.startswith(prompt)
    assert vocab == "".join(sorted(set(text.replace("\r\n", "\n"))))
    return model, vocab, record


@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_sizes_at_their_edges(text, capsys, edge):
    model, _, record = run(capsys, text, **edge)
    assert record["val_loss"] < 10 and record["steps"] == edge.get("STEPS", 2)
    again, _, nothing = run(capsys, text, **edge | {"STEPS": 0})
    assert equal(again.state_dict(), model.state_dict()) and nothing is None


@pytest.mark.parametrize("text", ["a" * 100, words(81)], ids=["one character", "just enough"])
@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_texts_at_their_edges(tmp_path, monkeypatch, capsys, text, deletion):
    """One character has nothing to predict; 81 are 72 to train on and 9 to evaluate, one window."""
    monkeypatch.chdir(tmp_path)
    *_, record = run(capsys, text, **deletion)
    assert 0 < record["val_loss"] < 10 if len(set(text)) > 1 else record["val_loss"] == 0


def test_one_character_less_is_too_short(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(capsys, words(80))
    error = capsys.readouterr().err
    assert end.value.code == 2 and "data.txt" in error and "BLOCK_SIZE=8" in error


TEXTS = {
    "source code": Path(gpt.__file__).read_text("utf-8"),
    "Chinese": "道可道,非常道。名可名,非常名。\n" * 60,
    "CSV": "id,name,value\r\n" + "".join(f'{i},"n {i % 7}",{i / 8}\r\n' for i in range(200)),
    "one line": " ".join(words().split()) * 50,
    "every plane": "".join(
        chr(plane * 65536 + i) for i in range(0x400, 0x480) for plane in range(17)
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_other_texts(tmp_path, monkeypatch, capsys, name):
    """Trained, loaded and sampled; better than knowing the vocabulary and nothing else."""
    monkeypatch.chdir(tmp_path)
    text = TEXTS[name]
    model, vocab, record = run(capsys, text, STEPS=60, SAMPLE=100, LEARNING_RATE=0.01)
    assert record["val_loss"] < log(len(vocab)) + (name == "every plane")
    again, *_ = run(capsys, text, STEPS=0, SAMPLE=100, PROMPT=text[-20:].replace("\r", ""))
    assert equal(again.state_dict(), model.state_dict())


def test_a_loaded_model_has_the_flags_of_its_making_and_gives_the_same_logits(text, restored):
    flags = TINY | dict(N_HEAD=4, NORM=False, BIAS=True, PRE_NORM=False)
    model, vocab, _ = gpt.main(**flags | {"DEVICE": "cpu"})
    loaded, again, run = gpt.main(STEPS=0, N_HEAD=2, NORM=True, BIAS=False, N_EMBD=64, N_LAYER=3)
    assert loaded.flags == model.flags and again == vocab and run is None
    assert {flag: getattr(gpt, flag) for flag in flags} == flags | {"STEPS": 0}
    ids = gpt.encode(text[:8], vocab)[None]
    assert torch.equal(model(ids), loaded(ids))


def test_models_of_one_process_evaluate_and_sample_in_turn(text):
    """As in a notebook that makes them one after the other, of other sizes."""
    how = dict(DEVICE="cpu", CHECKPOINT="one.pt") | TINY
    one, vocab, record = gpt.main(**how)
    changes = dict(RESIDUAL=False, N_HEAD=1, N_EMBD=4, BLOCK_SIZE=16, CHECKPOINT="two.pt")
    two, _, other = gpt.main(**how | changes)
    ids = gpt.encode(text, vocab)[1800:]
    texts = [gpt.sample(model, vocab, "to be") for model in (one, two)]
    assert texts[0] != texts[1]
    for _ in range(2):
        for model, run in ((one, record), (two, other)):
            assert gpt.evaluate(model, ids) == pytest.approx(run["val_loss"], abs=1e-6)
        assert [gpt.sample(model, vocab, "to be") for model in (one, two)] == texts
