"""Keyed draws against the generator's published numbers; the permutation against what a permutation is."""

import time

import numpy as np
import pytest

from sslvit.data import keyed


def test_uniforms_are_splitmix64():
    state = np.array([1234567], np.uint64)  # the generator's published test vector
    steps = np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert keyed.splitmix(state + steps).tolist() == published


def test_uniforms_depend_on_the_whole_key_and_nothing_else():
    keys = [(s, e, i, v) for s in (0, 1) for e in (0, 1, 2) for i in (0, 1, 7) for v in (0, 1, 2)]
    drawn = {key: keyed.uniforms(*key, 8) for key in keys}
    assert len({tuple(u) for u in drawn.values()}) == len(keys)
    samples, views = np.array([0, 1, 7]), np.array([0, 1, 2])
    batch = keyed.uniforms(1, 2, samples[:, None], views, 8)
    assert batch.shape == (3, 3, 8)
    for i, sample in enumerate(samples):
        for j, view in enumerate(views):
            np.testing.assert_array_equal(batch[i, j], drawn[1, 2, sample, view])
    np.testing.assert_array_equal(keyed.uniforms(1, 2, 7, 1, 3), drawn[1, 2, 7, 1][:3])


def test_uniforms_are_uniform_and_neighbouring_keys_unrelated():
    u = keyed.uniforms(0, 0, np.arange(4000)[:, None], np.arange(4), 10)
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    expected = u.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 85.4  # chi-square, 49 degrees of freedom, p = 0.001
    flat = u.reshape(4000, -1)
    assert np.abs(np.corrcoef(flat.T) - np.eye(40)).max() < 0.09
    assert np.abs(np.corrcoef(flat[:-1, 0], flat[1:, 0])[0, 1]) < 0.06


def test_rng_is_keyed():
    draw = keyed.rng(3, 1, 4, 1).random(4)
    np.testing.assert_array_equal(draw, keyed.rng(3, 1, 4, 1).random(4))
    assert not np.array_equal(draw, keyed.rng(3, 1, 4, 2).random(4))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 65, 1000])
def test_permute_is_a_permutation_for_every_key(n):
    for epoch in range(3):
        keys = np.broadcast_to(keyed.hash_key(0, epoch), n)
        places = keyed.permute(np.arange(n), n, keys)
        np.testing.assert_array_equal(np.sort(places), np.arange(n))
        np.testing.assert_array_equal(keyed.permute(np.arange(n)[::-1], n, keys), places[::-1])


def test_permute_mixes():
    n, epochs = 12, 6000
    keys = keyed.hash_key(7, np.arange(epochs))
    counts = np.zeros((n, n))
    for place in range(n):
        images = keyed.permute(np.full(epochs, place), n, keys)
        counts[place] = np.bincount(images, minlength=n)
    expected = epochs / n
    assert ((counts - expected) ** 2 / expected).sum() < 121 + 4 * np.sqrt(2 * 121)  # chi-square, (n - 1)^2 freedoms
    big = keyed.permute(np.arange(5000), 5000, np.broadcast_to(keyed.hash_key(1), 5000))
    assert abs(np.corrcoef(big, np.arange(5000))[0, 1]) < 0.06
    assert (np.abs(np.diff(big)) == 1).mean() < 0.01


def test_permute_reaches_anywhere_in_a_billion_at_once():
    start = time.perf_counter()
    places = keyed.permute(np.array([0, 999_999_999]), 1_000_000_000, np.broadcast_to(keyed.hash_key(1), 2))
    assert ((places >= 0) & (places < 1_000_000_000)).all()
    assert time.perf_counter() - start < 0.5
