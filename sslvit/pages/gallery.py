"""Which images of a gallery are worth a look: the most alike, the misplaced, the repeated. Makes no pictures.

A gallery is some images of one set with their features; every image is compared with all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sslvit.probes.duplicates import NUM_CANDIDATES, Pair, alike_pairs
from sslvit.probes.features import PIXEL_SIZE
from sslvit.probes.knn import normalised, vote_shares
from sslvit.probes.retrieval import leave_one_out

NUM_VOTERS = 20


@dataclass(frozen=True)
class Misplaced:
    """An image (by row) whose neighbours say `said`; shares of their votes for that class and for its own."""

    row: int
    said: int
    share: float
    own_share: float


def most_alike(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of `features` (n, D) the k others nearest by cosine: similarities and rows, (n, min(k, n - 1)) each."""
    index = leave_one_out(features, k)
    unit = normalised(features)
    return np.einsum("nd,nkd->nk", unit, unit[index]), index


def misplaced(features: np.ndarray, labels: np.ndarray) -> list[Misplaced]:
    """Images whose neighbours vote most surely for another class than theirs, `labels` (n,), the surest first.

    Leave-one-out k-NN, k 20. Left out are images without a label (-1) and those alone in their class.
    """
    classes, ids, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rows = np.flatnonzero((labels >= 0) & (counts[ids] > 1))
    if len(rows) < 2:
        return []
    similarities, index = most_alike(features[rows], NUM_VOTERS)
    votes = np.zeros((len(rows), len(classes)))
    np.add.at(votes, (np.arange(len(rows))[:, None], ids[rows][index]), vote_shares(similarities))
    own = votes[np.arange(len(rows)), ids[rows]]
    found = [
        Misplaced(int(rows[i]), int(classes[votes[i].argmax()]), float(votes[i].max()), float(own[i]))
        for i in np.flatnonzero(votes.argmax(axis=1) != ids[rows])
    ]
    return sorted(found, key=lambda one: (one.own_share - one.share, one.row))


def repeated(features: np.ndarray, images: Tensor) -> list[Pair]:
    """Pairs of near-duplicates among `images` (n, C, S, S) uint8 with `features` (n, D); each pair once."""
    small = [
        interpolate(part.float(), size=(PIXEL_SIZE, PIXEL_SIZE), mode="bilinear", antialias=True)
        for part in images.split(64)
    ]
    thumbnails = dict(enumerate(torch.cat(small).round().clamp(0, 255).to(torch.uint8).numpy()))
    candidates = dict(enumerate(leave_one_out(features, NUM_CANDIDATES)))
    pairs = alike_pairs(candidates, thumbnails, thumbnails)
    return list({frozenset((pair.row, pair.other)): pair for pair in reversed(pairs)}.values())[::-1]
