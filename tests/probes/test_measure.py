"""Every probe on odd sets of made-up features: a clear number or a clear error, never a traceback of torch or faiss."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError
from sslvit.probes import attentive, convex, linear, logreg, protocols
from sslvit.probes.config import EvaluateConfig
from sslvit.probes.features import Examples, Extraction, Features
from sslvit.probes.measure import measure
from sslvit.probes.protocols import CLASS_PROBES

EVERY = sorted(CLASS_PROBES)
ON_FEATURES = sorted(set(CLASS_PROBES) - {"attentive"})  # attentive reads tokens: here patches of noise
CONFIG = EvaluateConfig(linear_steps=3, attentive_steps=2)


class Made:
    """A source without images."""

    def __init__(self, name, labels, class_names=None):
        self.spec, self.has_text, self.labels = name, False, {} if labels is None else {"label": labels}
        self.class_names = {"label": class_names} if class_names else {}
        self.length = len(labels)

    def __len__(self):
        return self.length

    def name(self, index):
        return f"{self.spec}-{index}"

    def read(self, index):
        return np.random.default_rng([len(self.spec), index]).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def made(name, features, labels, class_names=None):
    """Examples whose features are given, on a module that no probe here calls."""
    one = Examples(Made(name, labels, class_names), None, Preprocessing(32), Extraction(num_workers=0), digest=name)
    blocks = [features.astype(np.float32)] * 2
    named = {"label": class_names} if class_names else {}
    names = [one.source.name(i) for i in range(len(labels))]
    one.features = Features(blocks, blocks[0], True, np.arange(len(labels)), names, {"label": labels}, named)
    return one


def clouds(labels, seed=0, dim=6):
    """Features (n, dim) around a centre for each label."""
    labels = np.asarray(labels)
    centres = np.random.default_rng(7).normal(size=(labels.max() - labels.min() + 1, dim))
    return centres[labels - labels.min()] + 0.3 * np.random.default_rng(seed).normal(size=(len(labels), dim))


def numbers(name, train, val):
    return {one.metric: one for one in measure(name, train, val, CONFIG)}


CASES = {
    "one class": (np.zeros(12, int), np.zeros(5, int)),
    "one image per class": (np.arange(8), np.repeat(np.arange(8), 2)),
    "labels with gaps": (np.repeat([3, 70, 900], 7), np.repeat([3, 70, 900], 3)),
    "seven validation images": (np.repeat([0, 1], 20), np.array([0, 0, 0, 0, 1, 1, 1])),
    "fewer training images than k": (np.repeat([0, 1], 3), np.repeat([0, 1], 5)),
    "unseen validation classes": (np.repeat([0, 1], 8), np.repeat([0, 1, 2], 4)),
    "more classes than training images": (np.array([0, 900, 17]), np.repeat([0, 17, 900, 901], 2)),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("case", CASES)
def test_odd_sets_give_numbers_with_intervals(name, case):
    train_labels, val_labels = CASES[case]
    train = made("train", clouds(train_labels), train_labels)
    val = made("validation", clouds(val_labels, seed=1), val_labels)
    for one in measure(name, train, val, CONFIG):
        assert np.isfinite(one.value) and one.ci95 is not None
        assert one.ci95[0] <= one.value <= one.ci95[1] and one.num_images <= len(val_labels)
        if "top1" in one.metric and case == "unseen validation classes":
            assert one.value <= 8 / 12, "an image of a class that train never shows is wrong"


@pytest.mark.parametrize("name", ON_FEATURES)
def test_constant_features_are_chance(name):
    labels = np.repeat([0, 1, 2], 20)
    train, val = made("train", np.ones((60, 5)), labels), made("validation", np.ones((30, 5)), labels[::2])
    scores = numbers(name, train, val)
    for metric, one in scores.items():
        assert np.isfinite(one.value), metric
        if metric.endswith("top1"):
            assert one.value == pytest.approx(1 / 3)
    if name == "cluster":
        assert scores["nmi"].value == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("where", ["train", "val"])
def test_nan_features_are_an_error(name, where):
    labels = np.repeat([0, 1], 10)
    features = {"train": clouds(labels), "val": clouds(labels, seed=1)}
    features[where][3] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        measure(name, made("train", features["train"], labels), made("validation", features["val"], labels), CONFIG)


@pytest.mark.parametrize("name", ["knn", "linear", "fewshot", "retrieval", "cluster"])
def test_a_hundred_thousand_classes(name):
    """One image of nearly each: nothing is images x classes in size."""
    labels = np.concatenate([np.arange(100_000), np.arange(20)])
    config = EvaluateConfig(linear_steps=1, linear_batch_size=4)
    features = np.random.default_rng(0).normal(size=(len(labels), 4))
    rows = np.concatenate([np.arange(20), np.arange(100_000, 100_020)])
    val = made("validation", features[rows] + 1e-4, labels[rows])
    scores = {one.metric: one.value for one in measure(name, made("train", features, labels), val, config)}
    assert all(np.isfinite(value) for value in scores.values())
    if name in ("knn", "linear"):
        assert scores["top5"] >= scores["top1"] >= 0
    if name in ("knn", "fewshot"):
        assert scores["top1" if name == "knn" else "1shot/top1"] > 0.2


class Largest(TorchDispatchMode):
    """Notes the entries of the largest tensor with a class (or several heads of them) along a side."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes, self.entries = num_classes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor) and any(side and side % self.num_classes == 0 for side in one.shape):
                self.entries = max(self.entries, one.numel())
        return made


@pytest.mark.parametrize("name", ["linear", "linear_dino", "linear_mae", "logreg", "attentive"])
def test_no_probe_makes_a_table_of_images_and_classes(monkeypatch, name):
    """700 images of 199 classes are 139,300 scores; never more than a batch or a chunk of them at once."""
    limits = ((linear, "MAX_NUMBERS"), (convex, "MAX_SCORES"), (attentive, "MAX_LOGITS"), (protocols, "MAX_LOGITS"))
    for module, limit in limits:
        monkeypatch.setattr(module, limit, 10_000)
    monkeypatch.setattr(linear, "mae_batch_size", lambda n: 600)
    monkeypatch.setattr(attentive, "fit", partial(attentive.fit, learning_rates=(1e-3,)))
    monkeypatch.setattr(logreg, "fit", partial(logreg.fit, grid=(1e-3,)))
    labels = np.arange(700) % 199
    train, val = made("train", clouds(labels), labels), made("validation", clouds(labels, seed=1), labels)
    with Largest(199) as largest:
        config = EvaluateConfig(linear_steps=2, linear_batch_size=64, attentive_steps=2)
        scores = measure(name, train, val, config)
    assert 0 < largest.entries <= (64 if name == "attentive" else 256) * 199, "a batch"
    assert all(np.isfinite(one.value) for one in scores)


def test_rankings_are_made_some_images_at_a_time(monkeypatch):
    logits = np.random.default_rng(0).normal(size=(50, 20))
    monkeypatch.setattr(protocols, "MAX_LOGITS", 100)
    asked = []
    ranking = protocols.best_first(lambda rows: asked.append(rows) or logits[rows], 50, np.arange(20) * 3)
    assert np.array_equal(ranking.labels, 3 * np.argsort(-logits, axis=1)[:, :5])
    assert all(len(logits[rows]) * 20 <= 100 for rows in asked) and len(asked) == 10


@pytest.mark.parametrize("name", ["knn", "linear", "logreg"])
def test_the_same_images_are_no_validation_set(name):
    labels = np.repeat([0, 1], 10)
    same = made("train", clouds(labels), labels)
    with pytest.raises(InputError, match="the same images"):
        measure(name, same, same, CONFIG)


@pytest.mark.parametrize("name", ["retrieval", "cluster"])
def test_probes_without_training_take_one_set(name):
    labels = np.repeat([0, 1], 10)
    same = made("train", clouds(labels), labels)
    assert "duplicates" not in numbers(name, same, same)


def test_a_mean_over_labels_always_has_an_interval():
    """Clusters have no value per image: the mean's interval is the labels' own on average."""
    labels = np.repeat([0, 1, 2], 10)
    train, val = made("train", clouds(labels), labels), made("validation", clouds(labels, seed=1), labels)
    for one in (train, val):
        one.source.labels["other"] = one.features.labels["other"] = labels % 2
    scores = numbers("cluster", train, val)
    low, high = scores["nmi"].ci95
    assert (low, high) == pytest.approx(np.mean([scores[f"{n}/nmi"].ci95 for n in ("label", "other")], axis=0))
