"""What fitted probes may say about the validation images, and the one place where that meets the labels.

A probe answers without the labels (see protocols.py); `score` compares its answer with them, once. Each score carries
the 95% bootstrap interval over validation images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sslvit.errors import InputError
from sslvit.probes import cluster, retrieval, segmentation
from sslvit.probes.rows import bootstrap_ci, interval_around

NUM_TABLES = 500  # resamples of a table of classes and clusters; twice as many of maps


@dataclass(frozen=True)
class Ranking:
    """Labels (m, r) of each image, the likeliest first; scored by top-1 and, with more than 5 classes, top-5."""

    labels: np.ndarray
    num_classes: int


@dataclass(frozen=True)
class Draws:
    """Predicted labels (m, d) of d repetitions; the score of an image is its mean over them."""

    labels: np.ndarray


@dataclass(frozen=True)
class Neighbours:
    """Indices (m, k) of the other validation images nearest to each."""

    indices: np.ndarray


@dataclass(frozen=True)
class Clusters:
    """Cluster (m,) of each image."""

    assignment: np.ndarray


@dataclass(frozen=True)
class Presence:
    """Score (m, C) of each class being present; labels are 0 or 1, (m, C). Scored by mAP over classes."""

    scores: np.ndarray


@dataclass(frozen=True)
class Estimates:
    """Estimated number (m,) of each image. Scored by R2."""

    values: np.ndarray


@dataclass(frozen=True)
class Maps:
    """Class (m, H, W) uint8 of every pixel. Scored by mIoU against masks."""

    classes: np.ndarray


Said = Ranking | Draws | Neighbours | Clusters | Presence | Estimates | Maps


@dataclass(frozen=True)
class Answer:
    """What a fitted probe says. variant: "" or like "k10/"; protocol: how, in words; chosen: what it chose on train."""

    said: Said
    protocol: str
    variant: str = ""
    chosen: str = ""


@dataclass(frozen=True)
class Score:
    """One number, measured on `num_images`. metric: "top1", ...; per_image (m,): what it is the mean of, if any.

    cases: images worth a look, a dict of names and numbers for each.
    """

    metric: str
    value: float
    ci95: tuple[float, float] | None
    protocol: str
    num_images: int
    per_image: np.ndarray | None = None
    chosen: str = ""
    cases: list[dict[str, object]] | None = None


def score(answers: Sequence[Answer], labels: np.ndarray, seed: int) -> list[Score]:
    """Compare answers with the validation labels: (m,) classes or numbers, or (m, C) of 0 and 1."""
    return [
        replace(measured, chosen=answer.chosen) for answer in answers for measured in _score_one(answer, labels, seed)
    ]


def mean_score(scores: Sequence[Score], seed: int) -> Score:
    """The mean of the same metric over several labels, image by image where that is possible.

    Elsewhere its interval is as wide as the labels' own on average: no mean spreads more than its parts do.
    """
    words = f"mean over {len(scores)} labels; {scores[0].protocol}"
    images = [s.per_image for s in scores if s.per_image is not None]
    if len(images) == len(scores) and len({len(values) for values in images}) == 1:
        return per_image_score(scores[0].metric, np.mean(images, axis=0), words, seed)
    value, num_images = float(np.mean([s.value for s in scores])), min(s.num_images for s in scores)
    intervals = [s.ci95 for s in scores if s.ci95 is not None]
    if len(intervals) < len(scores):
        return Score(scores[0].metric, value, None, words, num_images)
    low, high = np.mean(intervals, axis=0).tolist()
    return Score(scores[0].metric, value, (low, high), words, num_images)


def per_image_score(metric: str, values: np.ndarray, protocol: str, seed: int) -> Score:
    """The mean of `values` (m,), one for each validation image, with its interval."""
    values = values.astype(np.float64)
    return Score(metric, float(values.mean()), bootstrap_ci(values, seed), protocol, len(values), values)


def _score_one(answer: Answer, labels: np.ndarray, seed: int) -> list[Score]:
    said, protocol = answer.said, answer.protocol
    if isinstance(said, Ranking):
        hits = said.labels == labels[:, None]
        scores = [per_image_score(f"{answer.variant}top1", hits[:, 0], protocol, seed)]
        if said.num_classes > 5 and not answer.variant:
            scores.append(per_image_score(f"{answer.variant}top5", hits.any(axis=1), protocol, seed))
        return scores
    if isinstance(said, Draws):
        return [per_image_score(f"{answer.variant}top1", (said.labels == labels[:, None]).mean(axis=1), protocol, seed)]
    if isinstance(said, Neighbours):
        return _score_neighbours(said, labels, protocol, seed)
    if isinstance(said, Clusters):
        return _score_clusters(said, labels, protocol, seed)
    if isinstance(said, Presence):
        return _score_presence(said, labels, protocol, seed)
    if isinstance(said, Maps):
        return [_score_maps(said, labels, protocol, seed, answer.variant)]
    return _score_estimates(said, labels, protocol, seed)


def _score_neighbours(said: Neighbours, labels: np.ndarray, protocol: str, seed: int) -> list[Score]:
    _, ids, counts = np.unique(labels, return_inverse=True, return_counts=True)
    others = counts[ids] - 1
    queries = others > 0
    if not queries.any():
        raise InputError("retrieval needs a class with two validation images; every class here has one")
    relevant = labels[said.indices[queries]] == labels[queries][:, None]
    words = f"{protocol}, {queries.sum()} queries"
    scores = [
        per_image_score(f"r{k}", retrieval.recall_at(relevant, k), words, seed)
        for k in retrieval.RECALL_AT
        if k <= relevant.shape[1]
    ]
    average = retrieval.average_precision_at_r(relevant, others[queries])
    return [*scores, per_image_score("map_at_r", average, f"{words}, R at most {relevant.shape[1]}", seed)]


def _score_clusters(said: Clusters, labels: np.ndarray, protocol: str, seed: int) -> list[Score]:
    cells = cluster.contingency(labels, said.assignment)
    measures = {"nmi": cluster.normalised_mutual_information, "ari": cluster.adjusted_rand_index}
    draws = cluster.resampled(cells, NUM_TABLES, np.random.default_rng([seed, len(labels)]))
    values = np.array([[measure(draw) for measure in measures.values()] for draw in draws])
    return [
        Score(name, measure(cells), interval_around(measure(cells), drawn), protocol, len(labels))
        for (name, measure), drawn in zip(measures.items(), values.T, strict=True)
    ]


def _score_maps(said: Maps, truth: np.ndarray, protocol: str, seed: int, variant: str) -> Score:
    pairs = zip(torch.from_numpy(truth), torch.from_numpy(said.classes), strict=True)
    tables = np.stack([segmentation.confusion(true.long(), guess.long()) for true, guess in pairs]).astype(np.float64)
    flat = tables.reshape(len(tables), -1)
    generator, equal = np.random.default_rng([seed, len(flat)]), np.full(len(flat), 1 / len(flat))
    drawn = np.stack([generator.multinomial(len(flat), equal) @ flat for _ in range(2 * NUM_TABLES)])
    resampled = segmentation.mean_iou(drawn.reshape(-1, *tables.shape[1:]))
    value = float(segmentation.mean_iou(tables.sum(axis=0)))
    return Score(f"{variant}miou", value, interval_around(value, resampled), protocol, len(truth))


def average_precision(scores: np.ndarray, present: np.ndarray) -> float:
    """Area under precision-recall by steps, for one class: `scores` (m,), `present` (m,) bool with at least one True.

    Images of equal score enter together, as in scikit-learn's `average_precision_score`.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(present[order])
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    gained = np.diff(hits[ends], prepend=0)
    return float((gained * hits[ends] / (ends + 1)).sum() / hits[-1])


def _score_presence(said: Presence, labels: np.ndarray, protocol: str, seed: int) -> list[Score]:
    def mean_average_precision(rows: np.ndarray) -> float:
        present = labels[rows] > 0
        columns = np.flatnonzero(present.any(axis=0))
        return float(np.mean([average_precision(said.scores[rows, c], present[:, c]) for c in columns]))

    if not (labels > 0).any():
        raise InputError("no class is present in any validation image, so mAP is undefined; check the labels")
    return [score_resampled("map", mean_average_precision, len(labels), protocol, seed)]


def _score_estimates(said: Estimates, labels: np.ndarray, protocol: str, seed: int) -> list[Score]:
    def r2(rows: np.ndarray) -> float:
        spread = np.square(labels[rows] - labels[rows].mean()).sum()
        return float(1 - np.square(labels[rows] - said.values[rows]).sum() / spread) if spread > 0 else float("nan")

    if np.ptp(labels) == 0:
        raise InputError("all validation images have the same number as label, so R2 is undefined")
    return [score_resampled("r2", r2, len(labels), protocol, seed)]


def score_resampled(
    metric: str,
    measure: Callable[[np.ndarray], float],
    num_images: int,
    protocol: str,
    seed: int,
    num_resamples: int = 200,
) -> Score:
    """A statistic `measure(rows)` of all images at once, bootstrapped over images; undefined draws are left out."""
    generator = np.random.default_rng([seed, num_images])
    draws = [generator.integers(0, num_images, num_images) for _ in range(num_resamples)]
    with np.errstate(all="ignore"):
        values = [value for value in map(measure, draws) if np.isfinite(value)]
        whole = measure(np.arange(num_images))
    return Score(metric, whole, interval_around(whole, values), protocol, num_images)
