"""In which order images come: a keyed permutation of an epoch, a function of (seed, place) without a table.

Where images lie in blocks that are dear to reach (row groups of a large Parquet set, stretches of a remote shard), the
blocks are permuted, and then the images within windows of so many neighbouring blocks as fit in memory: every block is
read once an epoch, and every image still comes once, at a place that any process can compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from sslvit.data.keyed import hash_key, permute
from sslvit.data.sources import Source

_ORDER, _BLOCKS, _WINDOW = -1, -4, -5  # in place of a view in the key: draws that belong to no view


@dataclass(frozen=True)
class Blocks:
    """Images that are read together: `ends` (m,) int64, the number of images up to each block's end."""

    ends: np.ndarray
    at_once: int  # blocks in a window


@runtime_checkable
class Blocked(Protocol):
    """A source that may say how its images lie."""

    def blocks(self) -> Blocks | None:
        """None: any image is as near as any other."""


class Order:
    """Which image of a source stands where in an epoch."""

    def __init__(self, source: Source, seed: int) -> None:
        self._n, self._seed = len(source), seed
        self._blocks = source.blocks() if isinstance(source, Blocked) else None
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of an epoch: its blocks in order, their ends

    def __call__(self, places: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Images (B,) int64 at places (B,) of epochs (B,)."""
        if self._blocks is None:
            return permute(places, self._n, hash_key(self._seed, epochs, _ORDER))
        out = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = self._in_blocks(self._blocks, places[here], epoch)
        return out

    def _in_blocks(self, blocks: Blocks, places: np.ndarray, epoch: int) -> np.ndarray:
        order, ends = self._blocks_of(blocks, epoch)
        windows = np.searchsorted(ends, places, side="right") // blocks.at_once
        shuffled = np.empty_like(places)
        for window in np.unique(windows).tolist():
            first, last = window * blocks.at_once, min((window + 1) * blocks.at_once, len(ends)) - 1
            start = int(ends[first - 1]) if first else 0
            here = windows == window
            key = np.broadcast_to(hash_key(self._seed, epoch, _WINDOW, window), int(here.sum()))
            shuffled[here] = start + permute(places[here] - start, int(ends[last]) - start, key)
        at = np.searchsorted(ends, shuffled, side="right")
        offsets = shuffled - np.where(at > 0, ends[at - 1], 0)
        begins = np.concatenate([[0], blocks.ends[:-1]])
        return begins[order[at]] + offsets

    def _blocks_of(self, blocks: Blocks, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            count = len(blocks.ends)
            key = np.broadcast_to(hash_key(self._seed, epoch, _BLOCKS), count)
            order = permute(np.arange(count), count, key)
            sizes = np.diff(blocks.ends, prepend=0)
            self._epochs = {epoch - 1: self._epochs[epoch - 1]} if epoch - 1 in self._epochs else {}
            self._epochs[epoch] = order, np.cumsum(sizes[order])
        return self._epochs[epoch]


def sample(source: Source, count: int, seed: int) -> np.ndarray:
    """Up to `count` images (n,) int64, ascending, drawn by a key; from few blocks, where there are blocks."""
    places = np.arange(min(count, len(source)))
    return np.sort(Order(source, seed)(places, np.zeros_like(places)))
