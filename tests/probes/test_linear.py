"""The grid of heads against separate runs by torch's own SGD, and the recipes of DINO and MAE against theirs."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from sslvit.errors import InputError
from sslvit.probes import linear
from sslvit.probes.linear import Inputs, batches, choice_split, fit, input_variants


def problem(n=300, dim=12, classes=5, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return (centres[labels] + noise * rng.normal(size=(n, dim))).astype(np.float32), labels


def separate_run(x, y, num_classes, rate, seed, steps, batch_size):
    """One head trained by torch.optim.SGD and CosineAnnealingLR, as the released evaluation does."""
    weight = torch.empty(x.shape[1], num_classes).normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
    weight, bias = weight.requires_grad_(), torch.zeros(num_classes).requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr=rate * batch_size / 256, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    for index in batches(len(x), batch_size, steps, seed):
        optimizer.zero_grad()
        cross_entropy(x[index] @ weight + bias, y[index]).backward()
        optimizer.step()
        scheduler.step()
    return weight.detach(), bias.detach()


def grid_heads(variant, labels, seed, steps, batch_size):
    fitting, _ = choice_split(labels, seed)
    heads = linear.Heads(variant.matrix().shape[1], 5, linear.LEARNING_RATES, seed, torch.device("cpu"))
    x, y = torch.from_numpy(variant.matrix()[fitting]), torch.from_numpy(labels[fitting])
    linear.train_heads([heads], (([x[i]], y[i]) for i in batches(len(x), batch_size, steps, seed)), steps, batch_size)
    return heads, x, y


def test_52_heads_equal_52_separate_runs():
    cls, labels = problem()
    blocks = [cls, cls * 0.5 + 1, cls[:, ::-1].copy(), np.tanh(cls)]
    variants = input_variants(blocks, np.abs(cls), has_class_token=True)
    assert len(variants) * len(linear.LEARNING_RATES) == 52
    for variant in variants:
        heads, x, y = grid_heads(variant, labels, 3, 25, 32)
        for i, rate in enumerate(linear.LEARNING_RATES):
            weight, bias = separate_run(x, y, 5, rate, 3, 25, 32)
            np.testing.assert_allclose(heads.head(i)[0], weight, atol=1e-4)
            np.testing.assert_allclose(heads.head(i)[1], bias, atol=1e-4)


def test_a_constant_rate_would_be_seen(monkeypatch):
    """The guard fails when the cosine is removed."""
    cls, labels = problem()
    monkeypatch.setattr(linear.np, "cos", lambda _: 1.0)
    heads, x, y = grid_heads(Inputs("a", (cls,)), labels, 3, 25, 32)
    weight, _ = separate_run(x, y, 5, 0.1, 3, 25, 32)
    assert not np.allclose(heads.head(12)[0], weight, atol=1e-4)


def test_learning_rates_and_inputs_are_dinov2s():
    assert len(linear.LEARNING_RATES) == 13
    np.testing.assert_allclose(linear.LEARNING_RATES[:4], [1e-5, 2e-5, 5e-5, 1e-4])
    np.testing.assert_allclose(linear.LEARNING_RATES[-2:], [5e-2, 1e-1])
    blocks = [np.full((2, 3), i, np.float32) for i in range(4)]
    widths = [v.matrix().shape[1] for v in input_variants(blocks, blocks[0], has_class_token=True)]
    assert widths == [3, 12, 6, 15]
    read = [v.matrix()[0, ::3].tolist() for v in input_variants(blocks, blocks[0] + 9, has_class_token=True)]
    assert read == [[0], [0, 1, 2, 3], [0, 9], [0, 1, 2, 3, 9]], "class tokens, the last block first, then the mean"
    assert len(input_variants(blocks, blocks[0], has_class_token=False)) == 2
    assert len(input_variants(blocks[:1], blocks[0], has_class_token=False)) == 1


def test_choice_is_the_best_head_on_the_split_alone():
    """Re-train every head and look: the chosen one has the best accuracy on the 10%, whatever the rest says."""
    cls, labels = problem(noise=2.0)
    head = fit([Inputs("a", (cls,))], labels, seed=1, steps=60, batch_size=32)
    heads, _, _ = grid_heads(Inputs("a", (cls,)), labels, 1, 60, 32)
    _, choosing = choice_split(labels, 1)
    x, y = torch.from_numpy(cls[choosing]), torch.from_numpy(labels[choosing])
    accuracies = [float(((x @ heads.head(i)[0] + heads.head(i)[1]).argmax(1) == y).float().mean()) for i in range(13)]
    chosen = linear.LEARNING_RATES.index(head.learning_rate)
    assert accuracies[chosen] == max(accuracies)
    np.testing.assert_allclose(head.weight, heads.head(chosen)[0], atol=1e-5)


def test_learns_and_predicts_labels_with_gaps():
    x, labels = problem(seed=0)
    val, val_labels = problem(n=200, seed=5)
    head = fit([Inputs("a", (x,))], labels * 10 - 7, steps=200, batch_size=32)
    predicted = head.classes[head.logits([val]).argmax(axis=1)]
    assert (predicted == val_labels * 10 - 7).mean() > 0.9


@pytest.mark.parametrize("counts", [[100, 100], [3, 50], [2, 2], [1, 9], [10, 1, 1]])
def test_split_is_stratified_disjoint_and_keyed(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    fitting, choosing = choice_split(labels, 0)
    assert sorted([*fitting, *choosing]) == list(range(len(labels)))
    assert len(choosing) >= 1
    assert set(labels[fitting]) == set(labels)  # a class's only image is fitted
    if min(counts) >= 100:
        assert np.bincount(labels[choosing]).tolist() == [10, 10]
    assert np.array_equal(choosing, choice_split(labels, 0)[1])


def test_one_image_per_class_chooses_on_what_it_fits():
    fitting, choosing = choice_split(np.arange(6), 0)
    assert np.array_equal(fitting, choosing)
    assert len(fitting) == 6
    x = np.eye(6, dtype=np.float32)
    head = fit([Inputs("a", (x,))], np.arange(6), steps=300)
    assert np.array_equal(head.classes[head.logits([x]).argmax(1)], np.arange(6))


def test_batches_pass_over_all_images_in_turn():
    drawn = np.concatenate(list(batches(10, 4, 5, 0)))
    assert len(drawn) == 20
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert all(len(b) == 3 for b in batches(3, 128, 4, 0))


def test_constant_features_give_a_result_and_nan_an_error():
    x, labels = np.ones((60, 4), np.float32), np.arange(60) % 3
    head = fit([Inputs("a", (x,))], labels, steps=20)
    assert np.isfinite(head.logits([x])).all()
    x[5] = np.nan
    with pytest.raises(InputError, match="NaN"):
        fit([Inputs("a", (x,))], labels, steps=20)


def test_one_class_is_always_right():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    head = fit([Inputs("a", (x,))], np.full(30, 7), steps=10)
    assert (head.classes[head.logits([x]).argmax(1)] == 7).all()


def test_stream_trains_as_cached_features_do(monkeypatch):
    x, labels = problem()
    variants = [Inputs("a", (x,)), Inputs("b", (x, x))]
    fitting, choosing = choice_split(labels, 0)
    order = [fitting[i] for i in batches(len(fitting), 32, 30, 0)]

    def stream(first):
        passes.append(first)
        return (([torch.from_numpy(v.matrix()[i]) for v in variants], torch.from_numpy(labels[i])) for i in order)

    def train():
        return linear.fit_stream(variants, labels, stream, choosing, steps=30, batch_size=32)

    passes = []
    streamed, cached = train(), fit(variants, labels, steps=30, batch_size=32)
    assert passes == [0]
    assert (streamed.inputs, streamed.learning_rate) == (cached.inputs, cached.learning_rate)
    np.testing.assert_allclose(streamed.weight, cached.weight, atol=1e-6)
    held = []
    monkeypatch.setattr(linear, "MAX_STREAMED", 20 * 32 * 5)
    made = linear.Heads.__init__
    monkeypatch.setattr(linear.Heads, "__init__", lambda self, *a: held.append(len(a[2])) or made(self, *a))
    parts = train()
    assert (passes, held) == ([0, 0, 0], [13, 13]), "26 heads of 32 x 5 logits, 20 at once"
    assert (parts.inputs, parts.learning_rate) == (cached.inputs, cached.learning_rate)
    np.testing.assert_allclose(parts.weight, cached.weight, atol=1e-6)


def test_grid_in_parts_is_the_grid(monkeypatch):
    """With very many classes the heads are trained a few at a time."""
    x, labels = problem()
    whole = fit([Inputs("a", (x,))], labels, steps=30, batch_size=32)
    monkeypatch.setattr(linear, "MAX_NUMBERS", 3 * 32 * 5)
    parts = fit([Inputs("a", (x,))], labels, steps=30, batch_size=32)
    assert whole.learning_rate == parts.learning_rate
    np.testing.assert_allclose(whole.weight, parts.weight, atol=1e-6)


def test_dino_head_equals_its_plain_run():
    x, labels = problem(n=260)
    head = linear.fit_dino(Inputs("a", (x,)), labels, seed=2)
    weight, bias = separate_run(torch.from_numpy(x), torch.from_numpy(labels), 5, 0.001, 2, 100 * 260 // 256, 256)
    np.testing.assert_allclose(head.weight, weight, atol=1e-5)
    np.testing.assert_allclose(head.bias, bias, atol=1e-5)


def test_mae_head_equals_its_plain_run(monkeypatch):
    """LARS as in MAE's code, batch norm by torch with the statistics of the set, the norm not folded."""
    monkeypatch.setattr(linear, "mae_batch_size", lambda n: 30)
    x, labels = problem(n=60, noise=3.0)
    head = linear.fit_mae(Inputs("a", (x * 3 + 5,)), labels, seed=4)
    inputs, targets = torch.from_numpy(x * 3 + 5), torch.from_numpy(labels)
    norm = torch.nn.BatchNorm1d(12, affine=False, eps=1e-6, momentum=None)
    norm.train()(inputs)
    norm.running_var *= 59 / 60  # torch keeps the unbiased variance, normalises by the biased
    norm.eval()
    layer = torch.nn.Linear(12, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.empty(12, 5).normal_(0, 0.01, generator=torch.Generator().manual_seed(4)).T)
        layer.bias.zero_()
    speeds = {p: torch.zeros_like(p) for p in layer.parameters()}
    for step, index in enumerate(batches(60, 30, 180, 4)):
        epoch = step / 2
        share = epoch / 10 if epoch < 10 else 0.5 * (1 + math.cos(math.pi * (epoch - 10) / 80))
        layer.zero_grad()
        cross_entropy(layer(norm(inputs[index])), targets[index]).backward()
        with torch.no_grad():
            for p, speed in speeds.items():
                update = p.grad
                if p.ndim > 1:
                    update = update * (0.001 * p.norm() / update.norm())
                speed.mul_(0.9).add_(update)
                p.sub_(0.1 * 30 / 256 * share * speed)
    expected = layer(norm(inputs)).detach().numpy()
    np.testing.assert_allclose(head.logits([x * 3 + 5]), expected, atol=2e-4)
