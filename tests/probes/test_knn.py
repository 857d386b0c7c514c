"""k-NN against plain loops, scikit-learn and DINO's own evaluation."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from sslvit.errors import InputError
from sslvit.probes import knn as module
from sslvit.probes.knn import knn, nearest


def features(n, dim, seed):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def unit(x, dtype=np.float32):
    x = np.asarray(x, dtype=dtype)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def loop_ranking(train, labels, query, k, temperature=0.07):
    """The definition: sort by (similarity, index), add up votes in a dict, sort classes by (share, label)."""
    train, query = unit(train, np.float64), unit(query[None], np.float64)[0]
    similar = [round(math.fsum(a * b for a, b in zip(row, query, strict=True)), 9) for row in train]
    order = sorted(range(len(train)), key=lambda i: (-similar[i], i))[:k]
    votes = {int(c): 0.0 for c in labels}
    for i in order:
        votes[int(labels[i])] += math.exp((similar[i] - similar[order[0]]) / temperature)
    total = sum(votes.values())
    return sorted(votes, key=lambda c: (-round(votes[c] / total, 9), c))[: min(5, k)]


def loop(train, labels, queries, k):
    return np.array([loop_ranking(train, labels, q, k) for q in queries])


@pytest.mark.parametrize(("n", "classes", "k"), [(40, 3, 1), (40, 7, 10), (60, 60, 20), (12, 8, 20), (1, 1, 10)])
def test_equals_brute_force(n, classes, k):
    train, val = features(n, 6, 0), features(15, 6, 1)
    labels = np.random.default_rng(2).integers(0, classes, n) * 5 - 3  # gaps and negative numbers
    expected = loop(train, labels, val, k)
    assert np.array_equal(knn(train, labels, val, ks=(k,))[k], expected)


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_ties_equal_brute_force(distinct, monkeypatch):
    """Few distinct rows, many copies with different labels: every border is a tie that runs off what was fetched."""
    rng = np.random.default_rng(3)
    rows = features(distinct, 5, 4)
    train = rows[rng.integers(0, distinct, 90)] * rng.choice([1.0, 2.0], size=(90, 1)).astype(np.float32)
    labels, val = rng.integers(0, 9, 90), np.concatenate([rows, features(4, 5, 5)])
    for block in (1000, 13):
        monkeypatch.setattr(module, "TRAIN_BLOCK", block)
        monkeypatch.setattr(module, "EXACT_TRAIN_BLOCK", block)
        got = knn(train, labels, val, ks=(1, 10, 20))
        for k in (1, 10, 20):
            assert np.array_equal(got[k], loop(train, labels, val, k))


def test_a_tie_at_the_border_is_broken_by_index():
    """Every direction twice, at two lengths: an odd k parts the last pair, and float32 says either of them."""
    rng = np.random.default_rng(20)
    train = np.repeat(features(30, 48, 21), 2, axis=0) * rng.uniform(1, 3, (60, 1)).astype(np.float32)
    val = features(40, 48, 22)
    unit_train, unit_val = unit(train, np.float64), unit(val, np.float64)
    exact = np.argsort(-np.round(unit_val @ unit_train.T, 9), axis=1, kind="stable")
    for k in (1, 5):
        assert np.array_equal(np.sort(nearest(train, val, k)[1], axis=1), np.sort(exact[:, :k], axis=1))


def test_without_the_float64_pass_ties_go_wrong(monkeypatch):
    """The guard fails when its mechanism is removed."""
    rng = np.random.default_rng(3)
    train = features(2, 48, 4)[rng.integers(0, 2, 400)] * rng.uniform(1, 3, (400, 1)).astype(np.float32)
    labels, val = rng.integers(0, 9, 400), features(20, 48, 5)
    assert np.array_equal(knn(train, labels, val, ks=(10,))[10], loop(train, labels, val, 10))
    monkeypatch.setattr(module, "_doubtful", lambda best, *_: (np.zeros(len(best), bool), np.zeros(len(best), bool)))
    assert not np.array_equal(knn(train, labels, val, ks=(10,))[10], loop(train, labels, val, 10))


def test_blocks_do_not_change_the_answer(monkeypatch):
    train, val = features(300, 8, 6), features(50, 8, 7)
    labels = np.random.default_rng(8).integers(0, 7, 300)
    whole, ranking = nearest(train, val, 20), knn(train, labels, val)
    monkeypatch.setattr(module, "TRAIN_BLOCK", 37)
    monkeypatch.setattr(module, "QUERY_BLOCK", 11)
    parts = nearest(train, val, 20)
    assert np.array_equal(whole[1], parts[1])
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-6)
    again = knn(train, labels, val)
    assert all(np.array_equal(ranking[k], again[k]) for k in ranking)


def test_neighbours_equal_scikit_learn():
    train, val = features(500, 16, 8), features(80, 16, 9)
    distance, index = NearestNeighbors(n_neighbors=20, algorithm="brute", metric="cosine").fit(train).kneighbors(val)
    similarities, indices = nearest(train, val, 20)
    assert np.array_equal(indices, index)
    np.testing.assert_allclose(similarities, 1 - distance, atol=1e-5)


def dino_eval(train, train_labels, test, test_labels, k, temperature, num_classes):
    """DINO's k-NN evaluation, restated: one-hot votes, exp(sim / T), classes sorted by votes, top-5 from min(5, k)."""
    train, test = torch.from_numpy(unit(train)), torch.from_numpy(unit(test))
    top1 = top5 = 0.0
    for query, target in zip(test, test_labels, strict=True):
        similarity, index = (train @ query).topk(k, largest=True, sorted=True)
        votes = torch.zeros(num_classes, dtype=torch.float64)
        for s, i in zip(similarity, index, strict=True):
            votes[train_labels[i]] += math.exp(s.item() / temperature)
        predictions = votes.sort(descending=True, stable=True).indices
        top1 += float(predictions[0] == target)
        top5 += float((predictions[: min(5, k)] == target).any())
    return top1 / len(test), top5 / len(test)


@pytest.mark.parametrize("k", [10, 20, 100, 200])
def test_equals_dino_evaluation(k):
    rng = np.random.default_rng(10)
    centres = features(20, 12, 11)
    train_labels, val_labels = rng.integers(0, 20, 400), rng.integers(0, 20, 90)
    train = centres[train_labels] + 1.5 * features(400, 12, 12)
    val = centres[val_labels] + 1.5 * features(90, 12, 13)
    hits = knn(train, train_labels, val)[k] == val_labels[:, None]
    expected = dino_eval(train, train_labels, val, val_labels, k, 0.07, 20)
    assert (hits[:, 0].mean(), hits.any(axis=1).mean()) == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected[0] < expected[1] < 1  # a task on which protocols differ
    wrong = knn(train, train_labels, val, temperature=10.0)[k]
    if k == 200:  # almost uniform votes are another protocol
        assert (wrong[:, 0] == val_labels).mean() != expected[0]


def test_many_classes():
    train = features(3000, 8, 14)
    labels = np.random.default_rng(15).permutation(100_000)[:3000]
    ranking = knn(train, labels, train[:50], ks=(1, 20))
    assert np.array_equal(ranking[1][:, 0], labels[:50])
    assert ranking[20].shape == (50, 5)


@pytest.mark.slow
def test_memory_stays_near_that_of_the_features():
    """A million rows of 384: the search adds less than half of what they take."""
    code = """
import resource
import numpy as np
from sslvit.probes.knn import knn
rng = np.random.default_rng(0)
train = np.empty((1_000_000, 384), np.float32)
for part in np.array_split(train, 20):
    rng.standard_normal(out=part, dtype=np.float32)
labels = rng.integers(0, 1000, len(train))
queries = train[:1000] + 0.1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ranking = knn(train, labels, queries)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert (ranking[20][:, 0] == labels[:1000]).mean() > 0.9
print((peak - before) / train.nbytes)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 0.5


def test_collapsed_features_give_the_answer_of_the_tie_rule():
    """Constant up to float noise: all neighbours tie, so the first k rows of train vote."""
    train = np.ones((400, 16), np.float32) * np.linspace(1, 2, 400, dtype=np.float32)[:, None]
    labels = np.repeat([2, 1], 200)
    ranking = knn(train, labels, train[:30], ks=(20, 200))
    assert (ranking[20][:, 0] == 2).all()
    assert (ranking[200][:, 0] == 2).all()


def test_bad_features_are_refused():
    good, bad = features(10, 4, 0), features(10, 4, 0)
    bad[3, 2] = np.nan
    with pytest.raises(InputError, match="1 of 10 feature rows"):
        knn(bad, np.zeros(10, int), good)
    with pytest.raises(InputError, match="empty"):
        knn(good, np.zeros(10, int), good[:0])
