"""The keyed randomness that every part of the data shares: a draw is a function of its key, never a state.

SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) started from a hash of the key, computed for a whole batch at once, and the
same on any machine and NumPy. `objectives/passes.py` has the same function in torch, for draws beside the model.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_TURNS = 8


def splitmix(z: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64: a bijection of uint64 arrays, each input bit moves half of the output bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_key(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 hashes of integer keys; array parts broadcast, so one call keys a whole batch."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        words = np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64)
        state = splitmix((state + GOLDEN) ^ splitmix(words + GOLDEN))
    return state


def uniforms(
    seed: int, epoch: int | np.ndarray, sample: int | np.ndarray, view: int | np.ndarray, count: int
) -> np.ndarray:
    """(..., count) float64 in [0, 1) from the key; `...` is the broadcast shape of the key's array parts."""
    state = hash_key(seed, epoch, sample, view)
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    values = (splitmix(state[..., None] + steps) >> np.uint64(11)) * 2.0**-53
    return values if any(np.ndim(part) for part in (epoch, sample, view)) else values[0]


def rng(seed: int, epoch: int, sample: int, view: int) -> np.random.Generator:
    """A NumPy generator from the same key, for draws of unknown number."""
    return np.random.Generator(np.random.Philox(key=hash_key(seed, epoch, sample, view)[0]))


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Images at places `index` (B,) of the permutations of range(n) named by uint64 keys (B,).

    A Feistel network on the smallest even number of bits that holds n, walked until it lands below n (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): no table, so any place of a billion is found at once.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    shift = np.uint64(half)
    turns = splitmix(key + np.arange(1, _FEISTEL_TURNS + 1, dtype=np.uint64)[:, None] * GOLDEN)
    out = index.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        left, right = out[walking] >> shift, out[walking] & mask
        for turn in turns[:, walking]:
            left, right = right, left ^ (splitmix(right + turn) & mask)
        out[walking] = left << shift | right
        walking = walking[out[walking] >= n]
    return out.astype(np.int64)
