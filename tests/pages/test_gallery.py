"""The choice of images to look at, against plain loops."""

import math

import numpy as np
import pytest
import torch

from sslvit.pages.gallery import misplaced, most_alike, repeated


def gallery(n=60, dim=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def similarity(features):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit @ unit.T


def test_most_alike_is_brute_force():
    features = gallery()
    similar = similarity(features)
    np.fill_diagonal(similar, -2)
    cosines, index = most_alike(features, 4)
    assert np.array_equal(index, np.argsort(-similar, axis=1)[:, :4])
    np.testing.assert_allclose(cosines, -np.sort(-similar, axis=1)[:, :4], atol=1e-5)


def test_misplaced_is_leave_one_out_voting():
    features = gallery(80)
    labels = np.random.default_rng(1).integers(0, 3, 80) * 4
    labels[[7, 9]] = -1, 99  # unknown, alone in its class
    expected = {}
    voters = [i for i in range(80) if i not in (7, 9)]
    similar = similarity(features)
    for i in voters:
        near = sorted((j for j in voters if j != i), key=lambda j: -similar[i, j])[:20]
        votes = {c: sum(math.exp(similar[i, j] / 0.07) for j in near if labels[j] == c) for c in (0, 4, 8)}
        said, total = max(votes, key=votes.get), sum(votes.values())
        if said != labels[i]:
            expected[i] = (said, votes[said] / total, votes[labels[i]] / total)
    found = misplaced(features, labels)
    assert {one.row for one in found} == set(expected)
    for one in found:
        assert (one.said, one.share, one.own_share) == pytest.approx(expected[one.row], rel=1e-3, abs=1e-6)
    margins = [one.share - one.own_share for one in found]
    assert margins == sorted(margins, reverse=True)


def test_nothing_is_misplaced_without_two_images_of_a_class():
    assert misplaced(gallery(4), np.array([0, 1, 2, -1])) == []


def test_each_repeated_pair_once():
    images = torch.randint(0, 256, (10, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[8] = images[2]
    features = gallery(10)
    features[8] = features[2] + 0.01
    pairs = repeated(features, images)
    assert [{pair.row, pair.other} for pair in pairs] == [{2, 8}]
