"""Do the features fall into the classes by themselves? k-means on unit-length features, as many clusters as classes.

Compared with the labels by normalised mutual information (arithmetic mean of the entropies) and the adjusted Rand
index (Hubert & Arabie 1985), both from the table of how many images fall in each (class, cluster).
"""

from __future__ import annotations

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


def contingency(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(classes, clusters): how many images are in both."""
    classes, rows = np.unique(labels, return_inverse=True)
    groups, columns = np.unique(clusters, return_inverse=True)
    flat = np.bincount(rows * len(groups) + columns, minlength=len(classes) * len(groups))
    return flat.reshape(len(classes), len(groups))


def normalised_mutual_information(table: np.ndarray) -> float:
    """0..1 from a table of counts (classes, clusters); 1 when both have one group only."""
    p = table / table.sum()
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    entropy = (_entropy(rows) + _entropy(columns)) / 2
    mutual = _entropy(rows) + _entropy(columns) - _entropy(p.ravel())
    return float(max(mutual, 0.0) / entropy) if entropy > 1e-12 else 1.0


def adjusted_rand_index(table: np.ndarray) -> float:
    """At most 1, 0 by chance, from a table of counts (classes, clusters); 1 when the groupings agree."""
    together = _pairs(table.ravel())
    rows, columns = _pairs(table.sum(axis=1)), _pairs(table.sum(axis=0))
    expected = rows * columns / max(_pairs(np.array([table.sum()])), 1.0)
    largest = (rows + columns) / 2
    return float((together - expected) / (largest - expected)) if abs(largest - expected) > 1e-12 else 1.0


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _pairs(counts: np.ndarray) -> float:
    counts = counts.astype(np.float64)
    return float((counts * (counts - 1)).sum() / 2)
