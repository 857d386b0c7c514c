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

from sslvit.probes.knn import check_features
from sslvit.probes.linear import choice_split

GRID = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45))
PATIENCE = 6  # stop the search after this many larger C without a better accuracy
PROTOCOL = "logistic regression (DINOv2): L-BFGS, 45 values of C chosen on 10% of train, refitted on all of it"


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


def fit(features: np.ndarray, labels: np.ndarray, *, seed: int = 0, grid: Sequence[float] = GRID) -> LogisticRegression:
    """Choose C on a split of `features` (n, D), `labels` (n,), then fit all of them."""
    check_features(features)
    classes, ids = np.unique(labels, return_inverse=True)
    x, y = rotated(features)[0], torch.from_numpy(ids)
    fitting, choosing = choice_split(ids, seed)
    best, chosen, path = (-1.0, -np.inf), grid[0], zeros(x, len(classes))
    since_best = 0
    for strength in sorted(grid):
        path = minimise(x[fitting], y[fitting], strength, path, tolerance=1e-5)
        logits = x[choosing] @ path[:-1] + path[-1]
        merit = (
            (logits.argmax(dim=1) == y[choosing]).double().mean().item(),
            -cross_entropy(logits, y[choosing]).item(),
        )
        since_best += 1
        if merit > best:
            best, chosen = merit, strength
            since_best = 0
        if since_best >= PATIENCE:
            break
    return fit_one(features, labels, chosen)


def fit_one(features: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    """The regression at one C (`strength`)."""
    classes, ids = np.unique(labels, return_inverse=True)
    (x, basis), y = rotated(features), torch.from_numpy(ids)
    solution = minimise(x, y, strength, zeros(x, len(classes)))
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


def zeros(x: Tensor, num_classes: int) -> Tensor:
    """Zeros (D + 1, C): the weights and, in the last row, the bias."""
    return torch.zeros(x.shape[1] + 1, num_classes, dtype=torch.float64)


def minimise(x: Tensor, y: Tensor, strength: float, solution: Tensor, tolerance: float = 1e-7) -> Tensor:
    """L-BFGS from `solution` (D + 1, C) on mean cross-entropy + |W|^2 / (2 n strength); returns the minimum.

    It stops when no gradient exceeds `tolerance`, or after 1000 rounds.
    """
    solution = solution.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=1000, tolerance_grad=tolerance, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(solution[-1], x, solution[:-1])
        loss = cross_entropy(logits, y) + solution[:-1].square().sum() / (2 * len(x) * strength)
        loss.backward()
        return loss

    optimizer.step(closure)
    return solution.detach()
