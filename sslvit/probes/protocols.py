"""The probes as `evaluate` runs them. A probe is fitted on labelled train features and then answers for other features.

The shape of the interface is the guard against leaks: `fit` is given the training set alone, the fitted probe is given
features alone, and only `score` below sees the validation labels, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sslvit.probes import knn, linear
from sslvit.probes.config import EvaluateConfig
from sslvit.probes.features import Features


@dataclass(frozen=True)
class Answer:
    """What a fitted probe says: labels (m, r), the likeliest first. variant: "" or "k10/"; protocol: in words."""

    variant: str
    ranking: np.ndarray
    protocol: str


Fitted = Callable[[Features], list[Answer]]
Fit = Callable[[Features, np.ndarray, EvaluateConfig], Fitted]


@dataclass(frozen=True)
class Score:
    """One measured number. metric: "top1", "k10/top1"; per_image (m,): what the value is the mean of."""

    metric: str
    per_image: np.ndarray
    protocol: str


def fit_knn(train: Features, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """DINO's k-NN; nothing is fitted."""
    token = _token(train)

    def answer(val: Features) -> list[Answer]:
        rankings = knn.knn(train.cls, labels, val.cls)
        return [
            Answer("" if k == 20 else f"k{k}/", ranking, f"{knn.PROTOCOL}, {token}, k {k}{_clipped(k, len(train))}")
            for k, ranking in rankings.items()
        ]

    return answer


def fit_linear(train: Features, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """DINOv2's grid of heads; see linear.py."""
    variants = linear.input_variants(train.blocks, train.mean_patch, train.has_class_token)
    head = linear.fit(
        variants, labels, seed=config.seed, steps=config.linear_steps, batch_size=config.linear_batch_size
    )
    num_heads = len(variants) * len(linear.LEARNING_RATES)
    words = (
        f"{linear.PROTOCOL}; {num_heads} heads, {config.linear_steps} steps of {config.linear_batch_size}; "
        f"{_token(train)}; chosen: lr {head.learning_rate:g}, {head.inputs}"
    )

    def answer(val: Features) -> list[Answer]:
        chosen = next(
            v for v in linear.input_variants(val.blocks, val.mean_patch, val.has_class_token) if v.name == head.inputs
        )
        return [Answer("", best_first(head.logits(chosen.parts), head.classes), words)]

    return answer


PROBES: dict[str, Fit] = {"knn": fit_knn, "linear": fit_linear}


def best_first(logits: np.ndarray, classes: np.ndarray, places: int = 5) -> np.ndarray:
    """Labels (m, r) of the largest logits (m, C), ties by label."""
    return classes[np.argsort(-logits, axis=1, kind="stable")[:, :places]]


def score(answers: list[Answer], labels: np.ndarray, num_classes: int) -> list[Score]:
    """Top-1 of every answer and, with more than 5 classes, top-5, against the validation labels (m,)."""
    scores = []
    for answer in answers:
        hits = answer.ranking == labels[:, None]
        scores.append(Score(f"{answer.variant}top1", hits[:, 0], answer.protocol))
        if num_classes > 5:
            scores.append(Score(f"{answer.variant}top5", hits.any(axis=1), answer.protocol))
    return scores


def _token(features: Features) -> str:
    return "class token" if features.has_class_token else "mean patch"


def _clipped(k: int, num_train: int) -> str:
    return "" if k <= num_train else f" (clipped to the {num_train} training images)"
