"""The minimum of a convex loss of linear scores plus a penalty, by L-BFGS: what three probes fit. Knows no protocol.

A solution (D + 1, C) holds the weights and, in its last row, the bias, which is not penalised. The objective is
scikit-learn's: mean loss over n rows + |W|^2 / (2 n C). What the loss is, its slopes say: from scores (b, C) and
targets the summed loss and its gradient by the scores, so that no graph is kept and memory does not grow with n * C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from sslvit.probes.unfinished import Unfinished

MAX_SCORES = 2**24  # computed at a time
PATIENCE = 6  # stop the search after this many larger C without a better merit
UNTIL = f"from the smallest up until {PATIENCE} in a row are no better"  # what a protocol says of it

Slopes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Merit = Callable[[Tensor, Tensor, Tensor], tuple[float, ...]]  # x, y, solution -> the larger the better


def class_slopes(scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy with one class (b,) of each row."""
    log_p = scores.log_softmax(dim=1)
    loss = -log_p.gather(1, classes[:, None]).sum()
    return loss, log_p.exp_().scatter_add_(1, classes[:, None], scores.new_full((len(classes), 1), -1.0))


def share_slopes(scores: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy with shares (b, C) of the classes, which sum to 1."""
    log_p = scores.log_softmax(dim=1)
    return -(shares * log_p).sum(), log_p.exp_() - shares


def presence_slopes(scores: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic loss of each class by itself, `present` (b, C) of 0 and 1."""
    return binary_cross_entropy_with_logits(scores, present, reduction="sum"), scores.sigmoid() - present


def zeros(x: Tensor, num_classes: int) -> Tensor:
    """The solution (D + 1, C) that says nothing."""
    return x.new_zeros(x.shape[1] + 1, num_classes)


def scores_of(x: Tensor, solution: Tensor) -> Tensor:
    """(n, C) of x (n, D)."""
    return torch.addmm(solution[-1], x, solution[:-1])


def loss_and_gradient(x: Tensor, y: Tensor, solution: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor]:
    """Mean loss over the rows of x (n, D) and its gradient (D + 1, C), some rows at a time."""
    loss, gradient = x.new_zeros(()), torch.zeros_like(solution)
    rows = max(1, MAX_SCORES // solution.shape[1])
    for part, target in zip(x.split(rows), y.split(rows), strict=True):
        summed, slope = slopes(scores_of(part, solution), target)
        loss += summed
        gradient[:-1].addmm_(part.T, slope)
        gradient[-1] += slope.sum(dim=0)
    return loss / len(x), gradient / len(x)


def minimise(
    x: Tensor,
    y: Tensor,
    slopes: Slopes,
    strength: float,
    start: Tensor | None = None,
    *,
    tolerance: float = 1e-7,
    max_steps: int = 1000,
    unfinished: Unfinished | None = None,
) -> Tensor:
    """The minimum (D + 1, C) for one C (`strength`), from `start`, else from zeros as wide as the targets (n, C).

    Ends when no entry of the gradient exceeds `tolerance`, or after `max_steps` rounds. Resumable between two of them.
    """
    solution = (zeros(x, y.shape[1]) if start is None else start.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=max_steps,
        tolerance_grad=tolerance,
        tolerance_change=1e-12 if x.dtype == torch.float64 else 1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    decay = 1 / (len(x) * strength)

    @torch.no_grad()
    def closure() -> Tensor:
        if unfinished is not None:
            unfinished.check()
        loss, gradient = loss_and_gradient(x, y, solution, slopes)
        gradient[:-1] += decay * solution[:-1]
        solution.grad = gradient
        return loss + decay / 2 * solution[:-1].square().sum()

    optimizer.step(closure)
    return solution.detach()


def minus_loss(slopes: Slopes) -> Merit:
    """The merit of a solution is a small mean loss on the choosing rows."""
    return lambda x, y, solution: (-float(loss_and_gradient(x, y, solution, slopes)[0]),)


def best_strength(
    fitting: tuple[Tensor, Tensor],
    choosing: tuple[Tensor, Tensor],
    slopes: Slopes,
    grid: Sequence[float],
    merit: Merit,
    start: Tensor,
    *,
    max_steps: int = 1000,
    unfinished: Unfinished | None = None,
) -> float:
    """The C of `grid` whose minimum on the `fitting` rows (x, y) has the best merit on the `choosing` rows.

    From the smallest up, each started from the one before, until PATIENCE in a row are no better; ties by the smaller.
    """
    unfinished = unfinished or Unfinished()
    best: tuple[float, ...] | None = None
    chosen, since_best, done = min(grid), 0, 0
    if (put_aside := unfinished.load("strengths")) is not None:
        start, facts = put_aside[0]["solution"].to(start), put_aside[1]
        best, chosen, since_best, done = tuple(facts["best"]), facts["chosen"], facts["since_best"], facts["done"]
    for strength in sorted(grid)[done:]:
        if since_best >= PATIENCE:
            break
        start = minimise(*fitting, slopes, strength, start, tolerance=1e-5, max_steps=max_steps, unfinished=unfinished)
        found, done, since_best = merit(*choosing, start), done + 1, since_best + 1
        if best is None or found > best:
            best, chosen, since_best = found, strength, 0
        facts = {"best": best, "chosen": chosen, "since_best": since_best, "done": done}
        unfinished.offer("strengths", {"solution": start}, facts)
    return chosen
