"""Rows of results: one number with its interval and its protocol. Not the place where anything is measured.

A row is `{"name", "value", "ci95", "protocol", "data", "seed", "step"}`; `results.json` is a list of them, one per
(name, data, seed), kept by `run_folder.add_results`. Intervals are bootstraps over the validation images
(Efron & Tibshirani 1993, ch. 13).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sslvit.errors import InputError

Row = dict[str, Any]

NUM_RESAMPLES = 2000


def row(
    name: str,
    value: float,
    *,
    ci95: tuple[float, float] | None,
    protocol: str,
    data: str,
    seed: int,
    step: int | None = None,
) -> Row:
    """One entry of results.json. `value` is a fraction 0..1 where the measure is one; `ci95` (low, high) or None."""
    interval = None if ci95 is None else [float(ci95[0]), float(ci95[1])]
    return {
        "name": name,
        "value": float(value),
        "ci95": interval,
        "protocol": protocol,
        "data": data,
        "seed": seed,
        "step": step,
    }


def describe(protocol: str, chosen: str, **facts: object) -> str:
    """The protocol printed with a number: its words, the facts it ran on, a hash of both, and what it chose on train.

    Two rows with the same hash were measured alike, on sets of the same size.
    """
    text = "; ".join([protocol, *(f"{key} {value}" for key, value in facts.items())])
    text = f"{text} #{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"{text} (chosen: {chosen})" if chosen else text


def bootstrap_ci(scores: np.ndarray, seed: int, num_resamples: int = NUM_RESAMPLES) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `scores` (n,), one score per validation image.

    Drawing n images with replacement gives each distinct score a multinomial count, so the cost follows the number of
    distinct scores (two for right and wrong), not n.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.size == 0:
        raise InputError("no validation image has a score; give a validation set with at least one labelled image")
    values, counts = np.unique(scores, return_counts=True)
    generator = np.random.default_rng([seed, scores.size])
    num_chunks = max(1, values.size * num_resamples // 20_000_000)
    means = [
        generator.multinomial(scores.size, counts / scores.size, size=len(chunk)) @ values / scores.size
        for chunk in np.array_split(np.empty(num_resamples), num_chunks)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def interval_around(value: float, resampled: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """95% normal interval of a statistic that is no mean: `value` -+ 1.96 standard deviations of its resamples.

    Percentiles would be off: with images drawn twice, ranks fall and clusters look better. None for too few resamples.
    """
    if len(resampled) < 2:
        return None
    half = 1.96 * float(np.std(resampled, ddof=1))
    return value - half, value + half
