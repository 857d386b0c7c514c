"""Intervals against their definition, and the protocol's hash."""

import numpy as np
import pytest

from sslvit.errors import InputError
from sslvit.probes.rows import bootstrap_ci, describe, interval_around


def plain_bootstrap(scores, seed, resamples=4000):
    rng = np.random.default_rng(seed)
    means = [scores[rng.integers(0, len(scores), len(scores))].mean() for _ in range(resamples)]
    return np.percentile(means, [2.5, 97.5])


@pytest.mark.parametrize("distinct", [2, 40])
def test_interval_equals_a_plain_bootstrap(distinct):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, distinct, 300) / (distinct - 1)
    np.testing.assert_allclose(bootstrap_ci(scores, 0), plain_bootstrap(scores, 1), atol=0.008)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(300):
        low, high = bootstrap_ci(rng.random(200) < 0.7, trial)
        inside += low <= 0.7 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_sure_scores_have_no_spread_and_seven_images_a_wide_one():
    assert bootstrap_ci(np.ones(50), 0) == (1.0, 1.0)
    low, high = bootstrap_ci(np.array([1, 1, 1, 1, 0, 0, 0]), 0)
    assert high - low > 0.5


def test_no_images_is_the_users_error():
    with pytest.raises(InputError, match="no validation image"):
        bootstrap_ci(np.empty(0), 0)


def test_interval_around_holds_the_value():
    low, high = interval_around(3.0, [1.0, 1.2, 0.8])
    assert low < 3.0 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2)
    assert interval_around(3.0, []) is None


def test_the_hash_tells_protocols_apart_and_ignores_what_was_chosen():
    def hashed(text):
        return text.split("#")[1][:8]

    first = describe("k-NN", "", n=5)
    assert hashed(first) == hashed(describe("k-NN", "C 3", n=5))
    assert hashed(first) != hashed(describe("k-NN", "", n=6))
    assert describe("k-NN", "C 3", n=5).endswith("(chosen: C 3)")
