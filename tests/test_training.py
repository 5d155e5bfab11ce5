"""Training, evaluation and sampling against loops and formulas worked by hand; other texts."""

import json
from collections import Counter
from math import isfinite, log
from pathlib import Path

import pytest
import torch
from conftest import DELETIONS, TINY, build, words
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gpt

CPU = TINY | {"DEVICE": "cpu"}
V = 11
TRAIN = torch.arange(300) ** 2 % 97 % V
VAL = torch.arange(60) ** 3 % 89 % V


def train(seed=0):
    """gpt.train on a new model: the model itself, and all that gpt.train returns."""
    torch.manual_seed(seed)
    model = gpt.GPT(V)
    return model, *gpt.train(model, TRAIN, VAL)


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def batches():
    """The batches that gpt.train sees, in their order, without end."""
    generator = torch.Generator().manual_seed(gpt.SEED)
    while True:
        yield gpt.batch(TRAIN, generator)


# The validation loss


@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 18, 100, 64 * 8 + 1, 66 * 8 + 5])
@pytest.mark.parametrize("causal", [True, False])
def test_evaluate_is_the_mean_over_each_target_once(flags, length, causal):
    """Windows one after another, the last one short: a naive loop, window by window."""
    flags(CAUSAL=causal)
    model, total = build(), 0
    ids = torch.arange(length) ** 2 % 97 % V
    for start in range(0, length - 1, gpt.BLOCK_SIZE):
        x, y = ids[:-1][start:][: gpt.BLOCK_SIZE], ids[1:][start:][: gpt.BLOCK_SIZE]
        for logits, target in zip(model(x[None])[0], y, strict=True):
            total -= logits.log_softmax(-1)[target].item()
    assert gpt.evaluate(model, ids) == pytest.approx(total / (length - 1), rel=1e-5)


def test_evaluate_is_without_dropout_and_goes_back_to_training(flags):
    flags(DROPOUT=0.5)
    model = build()
    noisy = gpt.evaluate(model, VAL)
    flags(DROPOUT=0.0)
    assert noisy == gpt.evaluate(model, VAL)
    assert model.training


# Training


def test_bigram_reaches_the_conditional_entropy_of_its_text(flags):
    """Nats a character, counted from the pairs of the text; no bigram model can be below that."""
    flags(N_LAYER=0, TIE=False, N_EMBD=32, BATCH_SIZE=64, STEPS=400, LEARNING_RATE=0.03)
    text = words()
    vocab = "".join(sorted(set(text)))
    ids = gpt.encode(text, vocab)
    pairs, firsts = Counter(zip(text, text[1:], strict=False)), Counter(text[:-1])
    entropy = -sum(n * log(n / firsts[a]) for (a, _), n in pairs.items()) / (len(text) - 1)
    model, _, curve = gpt.train(gpt.GPT(len(vocab)), ids, ids)
    assert entropy < curve[-1][2] < entropy + 0.02
    assert curve[-1][2] == gpt.evaluate(model, ids)


@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_one_seed_gives_one_curve_and_the_same_batches_for_all_flags(flags, monkeypatch, deletion):
    seen, batch = [], gpt.batch

    def recorded(*args):
        seen.append(batch(*args))
        return seen[-1]

    flags(STEPS=3, **deletion)
    expected = [xy for xy, _ in zip(batches(), range(3), strict=False)]
    monkeypatch.setattr(gpt, "batch", recorded)
    (one, *_, curve), (two, *_, again) = train(), train()
    assert curve == again and torch.equal(weights(one), weights(two))
    assert all(
        torch.equal(a, b)
        for xy, zw in zip(seen, expected * 2, strict=True)
        for a, b in zip(xy, zw, strict=True)
    )


def test_another_seed_draws_other_batches(flags):
    curves = []
    for seed in (1, 2):
        flags(SEED=seed)
        curves.append(train()[-1])
    assert curves[0] != curves[1]


@pytest.mark.parametrize("average", [True, False])
def test_average_follows_its_formula(flags, average):
    """mean += 16 / (n + 16) · (w - mean) over the weights w of every step n = 0, 1, …"""
    mean = 0
    for n in range(12):
        flags(AVERAGE=False, STEPS=n + 1)
        model, best, *_ = train()
        assert best is model
        last = weights(model)
        mean = mean + 16 / (n + 16) * (last - mean)
    flags(AVERAGE=average, STEPS=12)
    model, best, _, curve = train()
    assert torch.equal(weights(model), last)
    torch.testing.assert_close(weights(best), mean if average else last)
    assert (mean - last).abs().max() > 1e-3
    assert curve[-1][2] == gpt.evaluate(best, VAL)


def test_sgd_training_is_a_hand_written_loop(flags):
    """Every weight less rate · gradient; the train loss is the mean of the last steps' losses."""
    flags(OPTIMIZER="sgd", LEARNING_RATE=0.1, AVERAGE=False, STEPS=10)
    trained, _, seconds, curve = train()
    torch.manual_seed(0)
    model, losses = gpt.GPT(V), []
    for (x, y), step in zip(batches(), range(1, 11), strict=False):
        loss = -model(x).log_softmax(-1).gather(-1, y[..., None]).mean()
        losses.append(loss.item())
        for weight, grad in zip(
            model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
        ):
            weight.data -= 0.1 * grad
        expected = [step, sum(losses) / step, gpt.evaluate(model, VAL)]
        assert curve[step - 1] == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(weights(trained), weights(model))
    assert len(curve) == 10 and seconds > 0


def test_adamw_step_follows_its_formula(flags):
    """The first step: decay 0.01, and the gradient over its own size."""
    flags(LEARNING_RATE=0.01, AVERAGE=False, STEPS=1, SCALED_INIT=False)
    after = weights(train()[0])
    torch.manual_seed(0)
    model = gpt.GPT(V)
    x, y = next(batches())
    F.cross_entropy(model(x).mT, y).backward()
    grad = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    before = weights(model)
    expected = before * (1 - 0.01 * 0.01) - 0.01 * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_rate_is_constant_and_its_default_falls_with_the_root_of_the_width(flags, optimizer):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    for n_embd, rate in ((64, 0.0), (16, 0.0), (16, 0.125)):
        flags(OPTIMIZER=optimizer, N_EMBD=n_embd, LEARNING_RATE=rate)
        train()
    hook.remove()
    assert rates == [rates[0]] * 2 + [2 * rates[0]] * 2 + [0.125] * 2


def test_divergence_is_noticed_at_the_step_at_which_it_happens(flags):
    flags(NORM=False, OPTIMIZER="sgd", LEARNING_RATE=30.0, STEPS=100)
    *_, curve = train()
    torch.manual_seed(0)
    model, losses = gpt.GPT(V), [0.0]
    optimizer, endless = torch.optim.SGD(model.parameters(), 30.0), batches()
    while isfinite(losses[-1]):
        x, y = next(endless)
        loss = F.cross_entropy(model(x).mT, y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert curve[-1] == [len(losses) - 1, None, None] and 2 < len(losses) < 100
    assert all(None not in row for row in curve[:-1])


def test_a_last_step_that_diverges_is_no_good_result(flags):
    """Its loss was finite before the step; what the step left is not."""
    flags(NORM=False, OPTIMIZER="sgd", LEARNING_RATE=1e30, STEPS=1)
    assert train()[-1] == [[1, None, None]]


def test_bfloat16_rounds_the_training_and_nothing_else(flags):
    curves = []
    for bfloat16 in (False, True):
        flags(BFLOAT16=bfloat16, STEPS=1, LEARNING_RATE=1e-9)
        curves.append(train()[-1][0])
    assert curves[0][1] != curves[1][1] == pytest.approx(curves[0][1], rel=0.01)
    assert curves[0][2] == pytest.approx(curves[1][2], rel=1e-6)


@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_gradients_agree_with_finite_differences(flags, deletion):
    """In float64, each weight along a random direction."""
    flags(**deletion)
    model, (x, y) = build().double(), next(batches())
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


# Sampling


def sampled(model, prompt, **changes):
    vars(gpt).update(changes)
    return gpt.sample(model, prompt)


def test_temperature_0_takes_the_likeliest(flags):
    """Against argmax after the last BLOCK_SIZE characters."""
    flags()
    model, ids = build(), TRAIN[:3]
    for _ in range(30):
        ids = torch.cat([ids, model(ids[None, -gpt.BLOCK_SIZE :])[0, -1].argmax()[None]])
    assert torch.equal(sampled(model, TRAIN[:3], SAMPLE=30, TEMPERATURE=0.0), ids)
    assert len(set(ids.tolist())) > 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_drawn_from_the_softmax(flags, temperature):
    """What follows each character of a bigram, counted: χ² within five deviations of its mean."""
    flags(N_LAYER=0, SAMPLE=4000, TEMPERATURE=temperature)
    model = build(5)
    p = (model(torch.arange(5)[:, None])[:, 0] / temperature).softmax(-1)
    ids = gpt.sample(model, torch.tensor([0]))
    seen = torch.zeros(5, 5).index_put_((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)
    expected = p * seen.sum(-1, keepdim=True)
    assert seen[p == 0].sum() == 0
    free = (p > 0).sum().item() - 5
    chi = ((seen - expected) ** 2 / expected)[p > 0].sum().item()
    assert abs(chi - free) < 5 * (2 * free) ** 0.5


def test_context_is_cropped_to_the_block_size(flags):
    flags(ROTARY=False, SAMPLE=20)
    model = build()
    long, short = gpt.sample(model, TRAIN[:30]), gpt.sample(model, TRAIN[22:30])
    assert torch.equal(long[22:], short) and torch.equal(long[:30], TRAIN[:30])


def test_seed_fixes_the_sample_and_sample_0_returns_the_prompt(flags):
    flags()
    model, prompt = build(), TRAIN[:3]
    one, two = sampled(model, prompt, SAMPLE=40), sampled(model, prompt)
    assert torch.equal(one, two) and len(one) == 43
    assert not torch.equal(one, sampled(model, prompt, SEED=2))
    assert torch.equal(sampled(model, prompt, SAMPLE=0), prompt)


# Whole runs


EDGES = [{"STEPS": 1}, {"BLOCK_SIZE": 1}, {"BATCH_SIZE": 1}, {"N_HEAD": TINY["N_EMBD"]}]
EDGES += [{"N_EMBD": 1, "N_HEAD": 1}, {"N_LAYER": 0}, {"STEPS": 0}, {"SAMPLE": 0}]
EDGES += [{"PROMPT": "to be " * 9}, {"DROPOUT": 1.0}, {"SEED": 0}, {"TEMPERATURE": 1e-9}]


def run(capsys, text, **changes):
    """gpt.main on text, in the current folder: the record of the run, if any, and the sample."""
    Path("data.txt").write_bytes(text.encode())
    gpt.main(CPU | {"DATA": "data.txt"} | changes)
    sample, *_ = capsys.readouterr().out.split("\n\n" + 18 * " " + "params")  # the table
    sample = sample.removesuffix("\n")
    prompt = changes.get("PROMPT") or min(text)
    sample = sample[-len(prompt) - gpt.SAMPLE :]
    assert sample.startswith(prompt) and set(sample) <= set(text)
    records = Path("runs.jsonl").read_text("utf-8").splitlines() if gpt.STEPS else ["null"]
    return json.loads(records[-1])


@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_sizes_at_their_edges(text, capsys, edge):
    record = run(capsys, text, **edge)
    assert record is None if edge.get("STEPS") == 0 else record["val_loss"] < 10


@pytest.mark.parametrize("text", ["a" * 100, "to be or no"], ids=["one character", "just enough"])
@pytest.mark.parametrize("deletion", [{}, *DELETIONS], ids=str)
def test_texts_at_their_edges(tmp_path, monkeypatch, capsys, text, deletion):
    """One character has nothing to predict; 11 are 9 to train on, one window, and 2 to evaluate."""
    monkeypatch.chdir(tmp_path)
    record = run(capsys, text, **deletion)
    assert record["val_loss"] < 10 if len(set(text)) > 1 else record["val_loss"] == 0


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
    """Trained, saved, loaded and sampled; better than knowing the vocabulary and nothing else."""
    monkeypatch.chdir(tmp_path)
    text = TEXTS[name]
    record = run(capsys, text, STEPS=60, SAMPLE=100, LEARNING_RATE=0.01)
    saved = torch.load("gpt.pt", weights_only=True)
    assert saved["vocab"] == "".join(sorted(set(text)))
    assert record["val_loss"] < log(len(set(text))) + (name == "every plane")
    prompt = text[-20:]
    assert run(capsys, text, LOAD="gpt.pt", STEPS=0, SAMPLE=100, PROMPT=prompt) is None


def test_loaded_weights_give_the_same_logits_and_train_on(text, monkeypatch):
    seen, train = [], gpt.train

    def spied(model, *args):
        seen.append(weights(model))
        return train(model, *args)

    monkeypatch.setattr(gpt, "train", spied)
    monkeypatch.setattr(gpt, "sample", lambda model, ids: seen.append(model) or ids)
    gpt.main(CPU | {"N_HEAD": 4, "NORM": False})
    gpt.main({"DEVICE": "cpu", "LOAD": "gpt.pt", "STEPS": 0})
    assert gpt.N_HEAD == 4 and not gpt.NORM and gpt.N_EMBD == TINY["N_EMBD"]
    _, saved, loaded = seen
    ids = gpt.encode(text[:8], "".join(sorted(set(text))))[None]
    assert torch.equal(saved(ids), loaded(ids))
    gpt.main({"DEVICE": "cpu", "LOAD": "gpt.pt", "STEPS": 2, "SAVE": "more.pt"})
    *_, start, more = seen
    assert torch.equal(start, weights(saved)) and not torch.equal(weights(more), start)
    assert torch.load("more.pt", weights_only=True)["flags"]["N_HEAD"] == 4
