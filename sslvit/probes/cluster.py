"""Do the features fall into the classes by themselves? k-means on unit-length features, as many clusters as classes.

Compared with the labels by normalised mutual information (arithmetic mean of the entropies) and the adjusted Rand
index (Hubert & Arabie 1985), both from the table of how many images fall in each (class, cluster).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import faiss
import numpy as np

from sslvit.probes.knn import check_features, normalised

PROTOCOL = "k-means on unit validation features, one cluster per class, 50 rounds, best of 5 starts"


def kmeans(features: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Cluster (n,) int64 of each of `features` (n, D); at most n clusters."""
    check_features(features)
    unit = normalised(features)
    algorithm = faiss.Kmeans(
        unit.shape[1],
        min(num_clusters, len(unit)),
        niter=50,
        nredo=5,
        spherical=True,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(unit),
    )
    algorithm.train(unit)
    return algorithm.index.search(unit, 1)[1][:, 0]


class Cells(NamedTuple):
    """The cells of a table of classes x clusters that hold an image: their places and counts, each (m,), m <= n."""

    classes: np.ndarray
    clusters: np.ndarray
    counts: np.ndarray


def contingency(labels: np.ndarray, clusters: np.ndarray) -> Cells:
    """How many of the n images are in each (class, cluster); the whole table is never made, it may be larger than n."""
    _, rows = np.unique(labels, return_inverse=True)
    groups, columns = np.unique(clusters, return_inverse=True)
    places, counts = np.unique(rows * len(groups) + columns, return_counts=True)
    return Cells(*np.divmod(places, len(groups)), counts)


def resampled(cells: Cells, num_resamples: int, generator: np.random.Generator) -> Iterator[Cells]:
    """The cells of as many images drawn with replacement, one draw after the other."""
    num_images = int(cells.counts.sum())
    for _ in range(num_resamples):
        yield cells._replace(counts=generator.multinomial(num_images, cells.counts / num_images))


def normalised_mutual_information(cells: Cells) -> float:
    """0..1; 1 when both have one group only."""
    p = cells.counts / cells.counts.sum()
    rows, columns = np.bincount(cells.classes, p), np.bincount(cells.clusters, p)
    entropy = (_entropy(rows) + _entropy(columns)) / 2
    mutual = _entropy(rows) + _entropy(columns) - _entropy(p)
    return float(max(mutual, 0.0) / entropy) if entropy > 1e-12 else 1.0


def adjusted_rand_index(cells: Cells) -> float:
    """At most 1, 0 by chance; 1 when the groupings agree."""
    together = _pairs(cells.counts)
    rows, columns = (_pairs(np.bincount(place, cells.counts)) for place in (cells.classes, cells.clusters))
    expected = rows * columns / max(_pairs(np.array([cells.counts.sum()])), 1.0)
    largest = (rows + columns) / 2
    return float((together - expected) / (largest - expected)) if abs(largest - expected) > 1e-12 else 1.0


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _pairs(counts: np.ndarray) -> float:
    counts = counts.astype(np.float64)
    return float((counts * (counts - 1)).sum() / 2)
