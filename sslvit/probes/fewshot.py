"""Few labelled images per class: nearest class mean, without any hyper-parameter (SimpleShot, arXiv:1911.04623, CL2N).

Features are centred on the training mean (no labels), brought to unit length, averaged per class; the nearest mean
in Euclidean distance wins. Drawn anew five times; the score of an image is its mean over the draws.
"""

from __future__ import annotations

import numpy as np

from sslvit.probes.knn import check_features, normalised

PROTOCOL = "few-shot (SimpleShot CL2N): nearest class mean, 5 draws"
SHOTS = (1, 5, 10)
SHARES = (0.01, 0.1)
NUM_DRAWS = 5


def draw_shots(labels: np.ndarray, shots: int, seed: int, draw: int) -> np.ndarray:
    """Indices of `shots` images of each class (all of a smaller class), sorted."""
    order, rank, _ = _ranked(labels, seed, draw)
    return np.sort(order[rank < shots])


def draw_share(labels: np.ndarray, share: float, seed: int, draw: int) -> np.ndarray:
    """Indices of `share` of the images of each class, at least one of each, sorted."""
    order, rank, counts = _ranked(labels, seed, draw)
    return np.sort(order[rank < np.maximum(1, np.round(share * counts))])


def _ranked(labels: np.ndarray, seed: int, draw: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A keyed shuffle of all indices sorted by class, the place of each within its class, and the size of its class."""
    order = np.random.default_rng([seed, draw, len(labels)]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    return order, np.arange(len(order)) - np.repeat(first, counts), np.repeat(counts, counts)


def class_means(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means (C, D) of centred unit features (n, D) per class, and the classes (C,)."""
    classes, ids = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), features.shape[1]))
    np.add.at(sums, ids, features)
    return sums / np.bincount(ids)[:, None], classes


def centred(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Unit-length rows of `features` (n, D) minus `mean` (D,)."""
    check_features(features)
    return normalised(features - mean)


def closest(queries: np.ndarray, means: np.ndarray) -> np.ndarray:
    """(m,) which of `means` (C, D) is nearest to each of `queries` (m, D) in Euclidean distance; ties by place."""
    norms = np.square(means).sum(axis=1)
    rows = max(1, 2**24 // len(means))
    parts = [queries[start : start + rows].astype(np.float64) for start in range(0, len(queries), rows)]
    return np.concatenate([(2 * part @ means.T - norms).argmax(axis=1) for part in parts])
