"""Near-duplicates: images that show the same picture but for size and compression. Reads no labels.

Features propose, pixels decide: of the few images nearest by cosine, one is a near-duplicate when the thumbnails of
both (32 px) have a concordance of at least .99, Lin's 2 cov / (var + var + (difference of means)^2) (Biometrics 45,
1989). So the verdict on a pair does not depend on the encoder, only whether the pair is looked at does.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """An image and the one it repeats, by row of the features, and the concordance of their thumbnails."""

    row: int
    other: int
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
    known = thumbnails(train, np.unique(candidates[rows]))
    return alike_pairs({int(row): candidates[row] for row in rows}, thumbnails(val, rows), known)


def alike_pairs(
    candidates: Mapping[int, np.ndarray], shown: Mapping[int, np.ndarray], known: Mapping[int, np.ndarray]
) -> list[Pair]:
    """Of each row's candidates the one most like it, where it is a near-duplicate, the surest first.

    shown, known: thumbnails (C, 32, 32) uint8 by row and by candidate; a missing one cannot be compared.
    """
    pairs = []
    for row, wanted in candidates.items():
        others = [other for other in wanted.tolist() if other in known]
        if others and row in shown:
            stacked = np.stack([known[other] for other in others])
            alike = concordance(np.broadcast_to(shown[row], stacked.shape), stacked)
            pairs.append(Pair(row, others[int(alike.argmax())], float(alike.max())))
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
