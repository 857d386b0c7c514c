"""Logistic regression on frozen features (DINOv2's `log_regression` evaluation; DINOv3 does the same by scikit-learn).

L-BFGS in float64 for each C of 10^linspace(-6, 5, 45), from the smallest up, each started from the one before, until
six in a row are no better. C is chosen on 10% of the training images; then the chosen one is fitted again on all of
them. The objective is scikit-learn's: C * sum of cross-entropies + |W|^2 / 2, the intercept not penalised. No
augmentation, no scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sslvit.probes import convex
from sslvit.probes.knn import check_features
from sslvit.probes.linear import choice_split
from sslvit.probes.unfinished import Unfinished

GRID = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45))
PROTOCOL = (
    f"logistic regression (DINOv2): L-BFGS, C chosen on 10% of train of {len(GRID)} values, {convex.UNTIL}, "
    "refitted on all of it"
)


@dataclass(frozen=True)
class LogisticRegression:
    """A fitted regression. weight: (D, C), bias: (C,) float64; classes: the label of each column."""

    weight: np.ndarray
    bias: np.ndarray
    classes: np.ndarray
    strength: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(m, C) of features (m, D)."""
        return features.astype(np.float64) @ self.weight + self.bias


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int = 0,
    grid: Sequence[float] = GRID,
    device: str | torch.device = "cpu",
    unfinished: Unfinished | None = None,
) -> LogisticRegression:
    """Choose C on a split of `features` (n, D), `labels` (n,), then fit all of them."""
    check_features(features)
    classes, ids = np.unique(labels, return_inverse=True)
    x, y = rotated(features)[0].to(device), torch.from_numpy(ids).to(device)
    fitting, choosing = (torch.from_numpy(part).to(device) for part in choice_split(ids, seed))
    start, fit_on, choose_on = convex.zeros(x, len(classes)), (x[fitting], y[fitting]), (x[choosing], y[choosing])
    del x
    chosen = convex.best_strength(fit_on, choose_on, convex.class_slopes, grid, _merit, start, unfinished=unfinished)
    del fit_on, choose_on
    return fit_one(features, labels, chosen, device, unfinished)


def _merit(x: Tensor, y: Tensor, solution: Tensor) -> tuple[float, float]:
    """Accuracy and minus the mean cross-entropy on the choosing images."""
    rows = max(1, convex.MAX_SCORES // solution.shape[1])
    right, loss = 0, 0.0
    for part, target in zip(x.split(rows), y.split(rows), strict=True):
        logits = convex.scores_of(part, solution)
        right += int((logits.argmax(dim=1) == target).sum())
        loss += float(cross_entropy(logits, target, reduction="sum"))
    return right / len(x), -loss / len(x)


def fit_one(
    features: np.ndarray,
    labels: np.ndarray,
    strength: float,
    device: str | torch.device = "cpu",
    unfinished: Unfinished | None = None,
) -> LogisticRegression:
    """The regression at one C (`strength`)."""
    classes, ids = np.unique(labels, return_inverse=True)
    x, basis = rotated(features)
    x, y = x.to(device), torch.from_numpy(ids).to(device)
    start = convex.zeros(x, len(classes))
    solution = convex.minimise(x, y, convex.class_slopes, strength, start, unfinished=unfinished).cpu()
    weight = solution[:-1] if basis is None else basis @ solution[:-1]
    return LogisticRegression(weight.numpy(), solution[-1].numpy(), classes, strength)


def rotated(features: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """`features` (n, D) in float64; with more dimensions than rows, in a basis (D, n) of the rows' span, and the basis.

    The minimum lies in that span, and rotation leaves the objective as it is.
    """
    x = torch.from_numpy(features.astype(np.float64))
    if x.shape[1] <= len(x):
        return x, None
    basis = torch.linalg.svd(x, full_matrices=False).Vh.T
    return x @ basis, basis
