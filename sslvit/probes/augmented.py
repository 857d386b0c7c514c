"""Random crops and flips through a frozen encoder, for the probes that want them. No colours, nothing is trained.

Crops are those of the published linear evaluations: `RandomResizedCrop` with its default scale (.08, 1), and flips.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sslvit.data.config import NO_PHOTOMETRY, CropsConfig
from sslvit.data.loader import Loader
from sslvit.probes.features import Examples, Subset

SCALE = (0.08, 1.0)


def crop_batches(
    examples: Examples, rows: np.ndarray, batch_size: int, seed: int, *, num_crops: int = 1, first: int = 0
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Endless (crops (G, B, C, H, W) uint8, rows (B,)) of the images at `rows` of examples.features.

    `first`: how many batches are left out. Resumable between two when this process was asked to stop.
    """
    preprocessing, subset = examples.preprocessing, Subset(examples.source, examples.features.indices[rows])
    crops = CropsConfig(num_global=num_crops, global_scale=list(SCALE), num_local=0)
    loader = Loader(
        subset,
        crops,
        NO_PHOTOMETRY,
        preprocessing.size,
        preprocessing.channels,
        min(batch_size, len(rows)),
        seed=seed,
        num_workers=examples.extraction.num_workers,
        value_range=preprocessing.value_range,
    )
    loader.seek(first * min(batch_size, len(rows)))
    for views, _ in loader:
        yield views.global_crops, rows[views.sample_ids.numpy()]
        examples.unfinished.check()


def linear_stream(
    examples: Examples, labels: np.ndarray, rows: np.ndarray, seed: int, batch_size: int, first: int = 0
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Endless batches for the linear grid, from batch `first` on: a (B, D) for each of `linear.input_variants`, and
    targets (B,).
    """
    targets = torch.from_numpy(np.unique(labels, return_inverse=True)[1]).to(examples.device)
    num_blocks = len(examples.features.blocks)
    for crops, batch_rows in crop_batches(examples, rows, batch_size, seed, first=first):
        layers = examples.encode(crops[0], num_blocks)
        blocks = [tokens.cls for tokens in layers]
        inputs = [blocks[0]] if num_blocks == 1 else [blocks[0], torch.cat(blocks, dim=1)]
        if layers[0].has_class_token:
            inputs += [torch.cat([x, layers[0].mean_patch], dim=1) for x in inputs]
        yield inputs, targets[torch.from_numpy(batch_rows).to(examples.device)]


def two_views(examples: Examples, at_most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Class tokens of two random crops of each of up to `at_most` images: (n, D) twice."""
    rows = np.arange(len(examples.features))
    first: list[np.ndarray] = []
    second: list[np.ndarray] = []
    wanted = min(at_most, len(rows))
    for crops, _ in crop_batches(examples, rows, min(256, wanted), seed, num_crops=2):
        for views, parts in zip(crops, (first, second), strict=True):
            parts.append(examples.encode(views)[0].cls.cpu().numpy())
        if sum(map(len, first)) >= wanted:
            break
    return np.concatenate(first)[:wanted], np.concatenate(second)[:wanted]
