"""Retrieval among the validation images, each in turn the query. No training set is involved.

R@k: the share of queries with an image of their class among the k nearest (cosine). mAP@R: R is the number of other
images of the query's class; the mean over ranks 1..R of the precision at each rank that holds one of them, divided
by R (Musgrave et al., arXiv:2003.08505, section 4.1). Queries whose class has no other image are left out.
"""

from __future__ import annotations

import numpy as np

from sslvit.probes.knn import check_features, nearest

PROTOCOL = "retrieval, leave-one-out among validation images, cosine"
RECALL_AT = (1, 5, 10)
MAX_NEIGHBOURS = 1000  # R of mAP@R is at most this


def leave_one_out(features: np.ndarray, k: int = MAX_NEIGHBOURS) -> np.ndarray:
    """Indices (n, min(k, n - 1)) of the images nearest to each of `features` (n, D), itself left out."""
    check_features(features)
    k = min(k, len(features) - 1)
    _, indices = nearest(features, features, k + 1, borders=(k,))
    itself = indices == np.arange(len(features))[:, None]
    itself[~itself.any(axis=1), -1] = True  # behind more than k duplicates: any one of them may go
    return indices[~itself].reshape(len(features), k)


def recall_at(relevant: np.ndarray, k: int) -> np.ndarray:
    """(n,) bool: is one of the first k relevant? relevant: (n, K) bool, nearest first."""
    return np.any(relevant[:, :k], axis=1)


def average_precision_at_r(relevant: np.ndarray, num_relevant: np.ndarray) -> np.ndarray:
    """(n,) of mAP@R: relevant (n, K) bool, nearest first; num_relevant (n,) >= 1, R (at most K counts)."""
    r = np.minimum(num_relevant, relevant.shape[1])
    ranks = np.arange(1, relevant.shape[1] + 1)
    hits = relevant & (ranks <= r[:, None])
    precision = np.cumsum(hits, axis=1) / ranks
    return (precision * hits).sum(axis=1) / r
