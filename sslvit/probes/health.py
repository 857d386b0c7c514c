"""Health of features without labels: do they spread, or have they collapsed? Not a measure of usefulness alone.

RankMe is the exponential of the entropy of the singular values (Garrido et al., arXiv:2210.02885, equation 1); the
spectrum's decay is alpha-ReQ (Agrawal et al., arXiv:2202.05808); alignment and uniformity are those of Wang & Isola
(arXiv:2005.10242, section 4.1.2), two random crops of an image being its positive pair.
"""

from __future__ import annotations

import numpy as np

PROTOCOL = "health of training features, no labels"
MAX_IMAGES = 25_600  # RankMe's own sample size
MAX_PAIRED = 2048  # images of which all pairs are compared


def rankme(features: np.ndarray, seed: int = 0) -> float:
    """Effective rank of `features` (n, D), 1..D: exp of the entropy of the singular values. NaN if not finite."""
    if not np.isfinite(features).all():
        return float("nan")
    return effective_rank(singular_values(sample(features, MAX_IMAGES, seed)))


def effective_rank(values: np.ndarray) -> float:
    """exp(-sum p log p) with p = values / sum(values) + 1e-7, for singular values (D,). 0 when all are 0."""
    total = values.sum()
    if total <= 0:
        return 0.0
    p = values / total + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def singular_values(features: np.ndarray) -> np.ndarray:
    """Singular values (min(n, D),) of `features` (n, D), largest first, by the Gram matrix in float64."""
    values = features.astype(np.float64)
    gram = values.T @ values if values.shape[0] >= values.shape[1] else values @ values.T
    return np.sqrt(np.linalg.eigvalsh(gram)[::-1].clip(min=0))


def spectrum_decay(features: np.ndarray) -> float:
    """Exponent alpha of eigenvalue_i ~ i^-alpha for the covariance of `features` (n, D), by least squares in logs.

    Near 1 is best for linear readout in that paper; large is collapse. NaN for fewer than two directions.
    """
    values = singular_values(features - features.mean(axis=0, dtype=np.float64)) ** 2
    values = values[values > values.max(initial=0) * 1e-9]
    if len(values) < 2:
        return float("nan")
    slope = np.polyfit(np.log(np.arange(1, len(values) + 1)), np.log(values), 1)[0]
    return float(-slope)


def feature_std(features: np.ndarray) -> float:
    """Standard deviation of unit-length features (n, D), mean over D; 1/sqrt(D) when spread, 0 when collapsed."""
    return float(_unit(features).std(axis=0).mean())


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared distance of unit features of two views (n, D) each; 0 is perfect, 4 opposite."""
    return float(np.square(_unit(first) - _unit(second)).sum(axis=1).mean())


def uniformity(features: np.ndarray) -> float:
    """Log of the mean of exp(-2 distance^2) over pairs of unit features (n, D); 0 when collapsed, about -4 at best."""
    unit = _unit(features)
    products = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    return float(np.log(np.exp(4 * products - 4).mean())) if len(products) else float("nan")


def sample(features: np.ndarray, at_most: int, seed: int) -> np.ndarray:
    """All rows, or a keyed choice of `at_most` of them."""
    if len(features) <= at_most:
        return features
    return features[np.sort(np.random.default_rng([seed, len(features)]).choice(len(features), at_most, replace=False))]


def _unit(features: np.ndarray) -> np.ndarray:
    values = features.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
