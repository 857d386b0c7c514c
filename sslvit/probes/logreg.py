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
MAX_LOGITS = 2**24  # computed at a time
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


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int = 0,
    grid: Sequence[float] = GRID,
    device: str | torch.device = "cpu",
) -> LogisticRegression:
    """Choose C on a split of `features` (n, D), `labels` (n,), then fit all of them."""
    check_features(features)
    classes, ids = np.unique(labels, return_inverse=True)
    x, y = rotated(features)[0].to(device), torch.from_numpy(ids).to(device)
    fitting, choosing = (torch.from_numpy(part).to(device) for part in choice_split(ids, seed))
    x_fit, y_fit, x_choose, y_choose = x[fitting], y[fitting], x[choosing], y[choosing]
    del x
    best, chosen, path = (-1.0, -np.inf), grid[0], zeros(x_fit, len(classes))
    since_best = 0
    for strength in sorted(grid):
        path = minimise(x_fit, y_fit, strength, path, tolerance=1e-5)
        merit = _merit(x_choose, y_choose, path)
        since_best += 1
        if merit > best:
            best, chosen = merit, strength
            since_best = 0
        if since_best >= PATIENCE:
            break
    return fit_one(features, labels, chosen, device)


def _merit(x: Tensor, y: Tensor, solution: Tensor) -> tuple[float, float]:
    """Accuracy and minus the mean cross-entropy on the choosing images."""
    rows = max(1, MAX_LOGITS // solution.shape[1])
    right, loss = 0, 0.0
    for part, target in zip(x.split(rows), y.split(rows), strict=True):
        logits = torch.addmm(solution[-1], part, solution[:-1])
        right += int((logits.argmax(dim=1) == target).sum())
        loss += float(cross_entropy(logits, target, reduction="sum"))
    return right / len(x), -loss / len(x)


def fit_one(
    features: np.ndarray, labels: np.ndarray, strength: float, device: str | torch.device = "cpu"
) -> LogisticRegression:
    """The regression at one C (`strength`)."""
    classes, ids = np.unique(labels, return_inverse=True)
    x, basis = rotated(features)
    x, y = x.to(device), torch.from_numpy(ids).to(device)
    solution = minimise(x, y, strength, zeros(x, len(classes))).cpu()
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
    return x.new_zeros(x.shape[1] + 1, num_classes)


def minimise(x: Tensor, y: Tensor, strength: float, solution: Tensor, tolerance: float = 1e-7) -> Tensor:
    """L-BFGS from `solution` (D + 1, C) on mean cross-entropy + |W|^2 / (2 n strength); returns the minimum.

    It stops when no gradient exceeds `tolerance`, or after 1000 rounds. Memory does not grow with n * C.
    """
    solution = solution.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=1000,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    decay = 1 / (len(x) * strength)

    @torch.no_grad()
    def closure() -> Tensor:
        loss, gradient = cross_entropy_and_gradient(x, y, solution)
        gradient[:-1] += decay * solution[:-1]
        solution.grad = gradient
        return loss + decay / 2 * solution[:-1].square().sum()

    optimizer.step(closure)
    return solution.detach()


def cross_entropy_and_gradient(x: Tensor, y: Tensor, solution: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of x (n, D), y (n,) and its gradient (D + 1, C), some rows at a time."""
    loss, gradient = x.new_zeros(()), torch.zeros_like(solution)
    rows = max(1, MAX_LOGITS // solution.shape[1])
    for part, target in zip(x.split(rows), y.split(rows), strict=True):
        log_p = torch.addmm(solution[-1], part, solution[:-1]).log_softmax(dim=1)
        loss -= log_p.gather(1, target[:, None]).sum()
        error = log_p.exp_()
        error.scatter_add_(1, target[:, None], error.new_full((len(target), 1), -1.0))
        gradient[:-1].addmm_(part.T, error)
        gradient[-1] += error.sum(dim=0)
    return loss / len(x), gradient / len(x)
