"""Few-shot, retrieval, clusters, health and regression: each against its definition."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestCentroid

from sslvit.errors import InputError
from sslvit.probes import cluster, fewshot, health, regression, retrieval


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- few-shot -------------------------------------------------------------------------------------------------------


def test_shots_are_that_many_of_each_class_and_all_of_smaller_ones():
    labels = np.repeat([4, 9, 11], [20, 3, 50])
    chosen = fewshot.draw_shots(labels, 5, seed=0, draw=0)
    assert np.bincount(labels[chosen], minlength=12)[[4, 9, 11]].tolist() == [5, 3, 5]
    assert not np.array_equal(chosen, fewshot.draw_shots(labels, 5, seed=0, draw=1))
    assert np.array_equal(chosen, fewshot.draw_shots(labels, 5, seed=0, draw=0))
    share = fewshot.draw_share(labels, 0.1, seed=0, draw=0)
    assert np.bincount(labels[share], minlength=12)[[4, 9, 11]].tolist() == [2, 1, 5]


def test_nearest_mean_equals_scikit_learn():
    labels = np.random.default_rng(1).integers(0, 5, 80)
    unit = fewshot.centred(normal(80, 6), np.zeros(6, np.float32))
    queries = fewshot.centred(normal(30, 6, seed=2), np.zeros(6, np.float32))
    means, classes = fewshot.class_means(unit, labels)
    said = classes[fewshot.closest(queries, means)]
    assert np.array_equal(said, NearestCentroid().fit(unit, labels).predict(queries))


# ---- retrieval ------------------------------------------------------------------------------------------------------


def test_leave_one_out_never_finds_itself():
    features = np.concatenate([normal(30, 5), np.repeat(normal(1, 5, seed=3), 20, axis=0)])  # 20 duplicates
    found = retrieval.leave_one_out(features, 4)
    assert not (found == np.arange(50)[:, None]).any()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for i in range(30):
        order = sorted((j for j in range(50) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        assert found[i].tolist()[:1] == order[:1] or unit[order[0]] @ unit[i] == pytest.approx(
            unit[found[i][0]] @ unit[i]
        )
    assert retrieval.leave_one_out(features[:3]).shape == (3, 2)


# ---- clusters -------------------------------------------------------------------------------------------------------


def test_kmeans_finds_separate_groups_and_takes_more_clusters_than_images():
    labels = np.repeat(np.arange(3), 30)
    features = np.eye(3, 8, dtype=np.float32)[labels] + 0.05 * normal(90, 8)
    table = cluster.contingency(labels, cluster.kmeans(features, 3, seed=0))
    assert cluster.adjusted_rand_index(table) == pytest.approx(1.0)
    assert len(np.unique(cluster.kmeans(features[:4], 10, seed=0))) <= 4


# ---- health ---------------------------------------------------------------------------------------------------------


def test_rankme_is_its_formula():
    features = normal(200, 12) * np.linspace(0.1, 2, 12, dtype=np.float32)
    sigma = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert health.rankme(features) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-6)
    assert health.rankme(features[:5]) == pytest.approx(health.effective_rank(np.linalg.svd(features[:5])[1]), rel=1e-3)


def test_rankme_of_known_ranks():
    orthogonal = np.linalg.qr(normal(64, 16))[0].astype(np.float32)
    assert health.rankme(orthogonal) == pytest.approx(16, rel=1e-3)
    assert health.rankme(np.ones((50, 16), np.float32)) == pytest.approx(1, rel=1e-2)
    assert health.rankme(np.zeros((50, 16), np.float32)) == 0
    assert math.isnan(health.rankme(np.full((5, 3), np.nan, np.float32)))


def test_feature_std_tells_spread_from_collapse():
    assert health.feature_std(normal(2000, 64)) == pytest.approx(1 / 8, rel=0.05)
    assert health.feature_std(np.ones((50, 64), np.float32)) == pytest.approx(0, abs=1e-6)


def test_alignment_and_uniformity_are_their_formulas():
    first, second = normal(40, 6), normal(40, 6, seed=1)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second)]
    assert health.alignment(first, second) == pytest.approx(
        np.mean([np.sum((a - b) ** 2) for a, b in zip(*unit, strict=True)]), rel=1e-5
    )
    assert health.alignment(first, first * 3) == pytest.approx(0, abs=1e-10)
    expected = math.log(np.mean(np.exp(-2 * pdist(unit[0].astype(np.float64)) ** 2)))
    assert health.uniformity(first) == pytest.approx(expected, rel=1e-5)


def test_spectrum_decay_recovers_a_power_law():
    basis = np.linalg.qr(normal(400, 20))[0]
    basis -= basis.mean(axis=0)
    basis = np.linalg.qr(basis)[0]
    features = (basis * np.arange(1, 21) ** -0.75).astype(np.float32)  # eigenvalues i^-1.5
    assert health.spectrum_decay(features) == pytest.approx(1.5, rel=1e-2)
    assert health.spectrum_decay(features + 0.5) == pytest.approx(1.5, rel=1e-2), "of the covariance: centred"
    assert math.isnan(health.spectrum_decay(np.ones((10, 4), np.float32)))


# ---- several classes at once, and numbers ---------------------------------------------------------------------------


def test_ridge_equals_scikit_learn_at_each_penalty():
    x, queries = normal(90, 7) * np.arange(1, 8, dtype=np.float32), normal(20, 7, seed=1)
    y = x @ np.arange(7) + normal(90, seed=2)
    standard = (x - x.mean(0)) / x.std(0)
    for penalty, predict in zip((0.01, 1.0), regression.ridge_path(x, y, [0.01, 1.0]), strict=True):
        expected = Ridge(alpha=penalty * 90).fit(standard, y).predict((queries - x.mean(0)) / x.std(0))
        np.testing.assert_allclose(predict(queries), expected, rtol=1e-3, atol=1e-2)


def test_ridge_learns_and_few_images_do_no_harm():
    x = normal(300, 10)
    y = x @ normal(10, seed=1) + 5
    predict, _ = regression.fit_ridge(x[:200], y[:200], seed=0)
    assert np.corrcoef(predict(x[200:]), y[200:])[0, 1] > 0.99
    assert np.isfinite(regression.fit_ridge(x[:2], y[:2], seed=0)[0](x)).all()


def test_presence_equals_scikit_learn_class_by_class():
    x = normal(150, 6)
    present = (x @ normal(6, 3, seed=1) + normal(150, 3, seed=2) > 0.3).astype(int)
    predict, strength = regression.fit_presence(x, present, seed=0)
    for c in range(3):
        theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(x.astype(np.float64), present[:, c])
        np.testing.assert_allclose(predict(x)[:, c], theirs.decision_function(x), rtol=0.02, atol=0.02)


def test_knn_mean_is_the_weighted_mean_of_labels():
    train, values, queries = normal(60, 5), normal(60, seed=1), normal(8, 5, seed=2)
    unit, asked = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (train, queries))
    for said, q in zip(regression.knn_mean(train, values, queries), asked, strict=True):
        similar = unit @ q
        near = np.argsort(-similar)[:20]
        weights = np.exp(similar[near] / 0.07)
        assert said == pytest.approx((weights * values[near]).sum() / weights.sum(), rel=1e-3)


def test_nan_features_are_refused_everywhere():
    bad = np.full((5, 3), np.nan, np.float32)
    for call in (
        lambda: cluster.kmeans(bad, 2, 0),
        lambda: retrieval.leave_one_out(bad),
        lambda: regression.fit_ridge(bad, np.arange(5.0), 0),
        lambda: fewshot.centred(bad, np.zeros(3, np.float32)),
    ):
        with pytest.raises(InputError, match="NaN"):
            call()
