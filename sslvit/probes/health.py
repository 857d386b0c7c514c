"""Health of features without labels: do they spread, or have they collapsed? Not a measure of usefulness alone.

RankMe is the exponential of the entropy of the singular values (Garrido et al., arXiv:2210.02885, equation 1).
"""

from __future__ import annotations

import numpy as np

MAX_IMAGES = 25_600  # RankMe's own sample size


def rankme(features: np.ndarray, seed: int = 0) -> float:
    """Effective rank of `features` (n, D), 1..D: exp of the entropy of the singular values. NaN if not finite."""
    if not np.isfinite(features).all():
        return float("nan")
    values = singular_values(_sample(features, seed))
    return effective_rank(values)


def effective_rank(values: np.ndarray) -> float:
    """exp(-sum p log p) with p = values / sum(values), for singular values (D,). 0 when all are 0."""
    total = values.sum()
    if total <= 0:
        return 0.0
    p = values / total + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def singular_values(features: np.ndarray) -> np.ndarray:
    """Singular values (D,) of `features` (n, D), largest first, by the Gram matrix in float64."""
    gram = features.astype(np.float64)
    gram = gram.T @ gram if gram.shape[0] >= gram.shape[1] else gram @ gram.T
    return np.sqrt(np.linalg.eigvalsh(gram)[::-1].clip(min=0))


def feature_std(features: np.ndarray) -> float:
    """Standard deviation of unit-length features (n, D), mean over D; 1/sqrt(D) when spread, 0 when collapsed."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return float(unit.std(axis=0).mean())


def _sample(features: np.ndarray, seed: int) -> np.ndarray:
    if len(features) <= MAX_IMAGES:
        return features
    return features[np.random.default_rng([seed, len(features)]).choice(len(features), MAX_IMAGES, replace=False)]
