"""Probes for labels that are not one class: several classes at once (scored by mAP) and numbers (scored by R2).

Linear: ridge regression in closed form for each of 13 penalties (numbers), one-vs-rest logistic regression by L-BFGS
for each of 12 C (several classes); chosen on 10% of the training images, then fitted on all. k-NN: the mean of the
labels of the k = 20 nearest images, weighted as in knn.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sslvit.probes import convex
from sslvit.probes.knn import check_features, nearest, vote_shares
from sslvit.probes.linear import choice_split
from sslvit.probes.unfinished import Unfinished

PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(-6, 7))  # of standardised features, times n
STRENGTHS = tuple(float(c) for c in 10.0 ** np.arange(-6, 6))
PROTOCOL_RIDGE = "ridge regression on standardised features, 13 penalties chosen on 10% of train, refitted on all of it"
PROTOCOL_PRESENCE = (
    f"one-vs-rest logistic regression, C chosen on 10% of train of {len(STRENGTHS)} values, {convex.UNTIL}, refitted "
    "on all of it"
)
PROTOCOL_KNN = "k-NN mean of labels: cosine, weights exp(sim/.07), k 20"

Predictor = Callable[[np.ndarray], np.ndarray]  # features (m, D) to values (m,) or (m, C)


def knn_mean(train: np.ndarray, values: np.ndarray, queries: np.ndarray, k: int = 20) -> np.ndarray:
    """Weighted mean of `values` (n,) or (n, C) over the k nearest of `train` (n, D), for each query (m, D)."""
    check_features(train, queries)
    similarities, indices = nearest(train, queries, k)
    weights = vote_shares(similarities)
    return np.einsum("mk,mk...->m...", weights, values[indices].astype(np.float64))


def fit_ridge(features: np.ndarray, values: np.ndarray, seed: int) -> tuple[Predictor, float]:
    """Predictor of numbers and its penalty, from `features` (n, D) and `values` (n,)."""
    check_features(features)
    fitting, choosing = choice_split(np.zeros(len(values)), seed)
    errors = [
        np.square(predict(features[choosing]) - values[choosing]).mean()
        for predict in ridge_path(features[fitting], values[fitting], PENALTIES)
    ]
    chosen = PENALTIES[int(np.argmin(errors))]
    return ridge_path(features, values, [chosen])[0], chosen


def ridge_path(features: np.ndarray, values: np.ndarray, penalties: tuple[float, ...] | list[float]) -> list[Predictor]:
    """A predictor per penalty: minimises |y - Xw - b|^2 + n penalty |w|^2 on standardised features."""
    mean, scale = features.mean(axis=0, dtype=np.float64), 1 / (features.std(axis=0, dtype=np.float64) + 1e-6)
    x, offset = (features - mean) * scale, values.mean()
    spectrum, basis = np.linalg.eigh(x.T @ x / len(x))
    projected = basis.T @ (x.T @ (values - offset)) / len(x)

    def predictor(penalty: float) -> Predictor:
        weight = basis @ (projected / (spectrum.clip(min=0) + penalty))
        return lambda queries: (queries - mean) * scale @ weight + offset

    return [predictor(penalty) for penalty in penalties]


def fit_presence(
    features: np.ndarray, present: np.ndarray, seed: int, unfinished: Unfinished | None = None
) -> tuple[Predictor, float]:
    """Predictor of scores (m, C) and its C, from `features` (n, D) and `present` (n, C) of 0 and 1."""
    check_features(features)
    x, y = torch.from_numpy(features.astype(np.float64)), torch.from_numpy(present.astype(np.float64))
    fit_on, choose_on = ((x[rows], y[rows]) for rows in choice_split(np.zeros(len(x)), seed))
    slopes, start = convex.presence_slopes, convex.zeros(x, y.shape[1])
    chosen = convex.best_strength(
        fit_on, choose_on, slopes, STRENGTHS, convex.minus_loss(slopes), start, unfinished=unfinished
    )
    solution = convex.minimise(x, y, slopes, chosen, unfinished=unfinished).numpy()
    return lambda queries: queries.astype(np.float64) @ solution[:-1] + solution[-1], chosen
