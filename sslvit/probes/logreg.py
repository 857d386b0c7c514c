"""Logistic regression on frozen features (DINOv2's `log_regression` evaluation; DINOv3 does the same by scikit-learn).

L-BFGS in float64 for each C of 10^linspace(-6, 5, 45), from the smallest up, each started from the one before. C is
chosen on 10% of the training images; then the chosen one is fitted again on all of them. The objective is
scikit-learn's: C * sum of cross-entropies + |W|^2 / 2, the intercept not penalised. No augmentation, no scaling.
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
PATIENCE = 10  # stop the search after this many larger C without a better accuracy
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
    x, y = torch.from_numpy(features.astype(np.float64)), torch.from_numpy(ids)
    fitting, choosing = choice_split(ids, seed)
    best, chosen, path = (-1.0, -np.inf), grid[0], start(x, len(classes))
    since_best = 0
    for strength in sorted(grid):
        path = minimise(x[fitting], y[fitting], strength, path)
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
    x, y = torch.from_numpy(features.astype(np.float64)), torch.from_numpy(ids)
    solution = minimise(x, y, strength, start(x, len(classes))).numpy()
    return LogisticRegression(solution[:-1], solution[-1], classes, strength)


def start(x: Tensor, num_classes: int) -> Tensor:
    """Zeros (D + 1, C): the weights and, in the last row, the bias."""
    return torch.zeros(x.shape[1] + 1, num_classes, dtype=torch.float64)


def minimise(x: Tensor, y: Tensor, strength: float, solution: Tensor, max_steps: int = 1000) -> Tensor:
    """L-BFGS from `solution` (D + 1, C) on mean cross-entropy + |W|^2 / (2 n strength); returns the minimum."""
    solution = solution.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=max_steps, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(solution[-1], x, solution[:-1])
        loss = cross_entropy(logits, y) + solution[:-1].square().sum() / (2 * len(x) * strength)
        loss.backward()
        return loss

    optimizer.step(closure)
    return solution.detach()
