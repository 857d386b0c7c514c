"""Near-duplicates: images that show the same picture but for size and compression. Reads no labels.

Features propose, pixels decide: of the few images nearest by cosine, one is a near-duplicate when the thumbnails of
both (32 px) have a concordance of at least .99, Lin's 2 cov / (var + var + (difference of means)^2) (Biometrics 45,
1989). So the verdict on a pair does not depend on the encoder, only whether the pair is looked at does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sslvit.data.loader import clean_batches
from sslvit.encoder.config import Preprocessing
from sslvit.probes.features import PIXEL_SIZE, Examples
from sslvit.probes.knn import nearest

ALIKE = 0.99
NUM_CANDIDATES = 3  # nearest images that are looked at
MAX_CHECKED = 4096  # images whose candidates are looked at: those with the nearest ones
NOISE = (2 / 255) ** 2  # variance below which an image is blank: two of one grey level are alike
PROTOCOL = (
    f"near-duplicates: concordance of {PIXEL_SIZE} px thumbnails at least {ALIKE:g} with one of the {NUM_CANDIDATES} "
    "nearest training images"
)


@dataclass(frozen=True)
class Pair:
    """An image and the one it repeats, by row of the features; cosine of the features, concordance of the pixels."""

    row: int
    other: int
    cosine: float
    concordance: float


def concordance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,) of images (n, C, H, W) uint8: 1 for the same pixels, about 0 for unrelated ones, -1 for a negative.

    Means are taken channel by channel, so that a common tint is no likeness.
    """
    a, b = (images.reshape(*images.shape[:2], -1).astype(np.float64) / 255 for images in (first, second))
    means = a.mean(axis=2), b.mean(axis=2)
    a, b = a - means[0][..., None], b - means[1][..., None]
    shared, spread = (a * b).mean(axis=(1, 2)), (a**2 + b**2).mean(axis=(1, 2))
    return (2 * shared + NOISE) / (spread + ((means[0] - means[1]) ** 2).mean(axis=1) + NOISE)


def near_duplicates(train: Examples, val: Examples) -> list[Pair]:
    """The validation images with a near-duplicate in train, the surest first; `row` is of val, `other` of train."""
    cosines, candidates = nearest(train.features.cls, val.features.cls, NUM_CANDIDATES)
    rows = np.sort(np.argsort(-cosines[:, 0], kind="stable")[:MAX_CHECKED])
    wanted = np.unique(candidates[rows])
    shown, known = thumbnails(val, rows), thumbnails(train, wanted)
    pairs = []
    for row in rows.tolist():
        others = [int(other) for other in candidates[row] if int(other) in known] if row in shown else []
        if others:
            stacked = np.stack([known[other] for other in others])
            alike = concordance(np.broadcast_to(shown[row], stacked.shape), stacked)
            best = int(alike.argmax())
            place = int(np.flatnonzero(candidates[row] == others[best])[0])
            pairs.append(Pair(row, others[best], float(cosines[row, place]), float(alike[best])))
    return sorted((pair for pair in pairs if pair.concordance >= ALIKE), key=lambda pair: -pair.concordance)


def thumbnails(examples: Examples, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Row of the features -> (C, 32, 32) uint8; images that can no longer be read are missing."""
    channels = examples.preprocessing.channels
    small = Preprocessing(PIXEL_SIZE, (0.5,) * channels, (0.5,) * channels)
    indices = examples.features.indices[rows]
    row_of = dict(zip(indices.tolist(), rows.tolist(), strict=True))
    extraction = examples.extraction
    batches = clean_batches(examples.source, small, extraction.batch_size, extraction.num_workers, indices)
    return {
        row_of[int(index)]: image.numpy()
        for images, found in batches
        for index, image in zip(found, images, strict=True)
    }
