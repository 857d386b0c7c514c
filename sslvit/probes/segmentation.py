"""Semantic segmentation from frozen patch tokens: a linear head and k-NN on patches, scored by mIoU over pixels.

Targets of a patch are the shares of its pixels in each class: the linear head (L-BFGS, as logreg.py) is fitted to
them, k-NN (k 30, cosine, votes exp(sim/.07); CAPI, arXiv:2502.08769, section 4 has both) votes with them. Patch scores
are enlarged bilinearly to pixels. Truth comes from sets that hold masks: sslvit's scenes, whose classes are the
background and the shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sslvit.data.scene_shapes import SHAPES
from sslvit.data.scenes import Scenes
from sslvit.data.sources import Source
from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError
from sslvit.probes import convex
from sslvit.probes.features import Examples, choose_indices
from sslvit.probes.knn import nearest, vote_shares
from sslvit.probes.unfinished import Unfinished

NUM_CLASSES = 1 + len(SHAPES)
MAX_PATCHES = 200_000  # of the training set
NUM_NEIGHBOURS = 30
MAX_STEPS = 200  # of L-BFGS
STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)  # C of the linear head, chosen on 10% of the training images
PROTOCOL_LINEAR = "segmentation, linear on patches: L-BFGS, C chosen on 10% of train, bilinear to pixels"
PROTOCOL_KNN = f"segmentation, k-NN on patches: k {NUM_NEIGHBOURS}, cosine, votes exp(sim/.07), bilinear to pixels"


Method = Callable[[Tensor], Tensor]  # tokens (B, N, D) to class scores (B, N, K)


@dataclass(frozen=True)
class Patches:
    """tokens (n, D) float32 of all patches of some images; shares (n, K) of their pixels in each class."""

    tokens: np.ndarray
    shares: np.ndarray


def check_masks(*sources: Source) -> None:
    """InputError for a set without masks."""
    for source in sources:
        if not isinstance(source, Scenes):
            raise InputError(f"{source.spec} has no masks; segmentation is measured on scenes: only")


def class_map(source: Source, index: int, preprocessing: Preprocessing) -> Tensor:
    """(height, width) int64, cut as the encoder sees the (square) image: 0 background, 1 + the number of the shape."""
    assert isinstance(source, Scenes)
    whole = np.zeros((source.size, source.size), dtype=np.uint8)
    for one, mask in zip(source.graph(index).objects, source.masks(index), strict=True):
        whole[mask] = 1 + SHAPES.index(one.shape)
    height, width = preprocessing.size
    side = int(max(preprocessing.size) / preprocessing.crop_pct)  # of the image, resized to cover both
    maps = interpolate(torch.from_numpy(whole)[None, None], size=(side, side), mode="nearest-exact")[0, 0]
    top, left = round((side - height) / 2), round((side - width) / 2)
    return maps[top : top + height, left : left + width].long()


def shares_of(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Shares (B, N, K) of the pixels of each patch in each class, from class maps (B, H, W)."""
    one_hot = torch.nn.functional.one_hot(maps, NUM_CLASSES).permute(0, 3, 1, 2).float()
    return torch.nn.functional.adaptive_avg_pool2d(one_hot, grid).flatten(2).transpose(1, 2)


def training_patches(train: Examples, truth: Source, rows: np.ndarray) -> Patches:
    """Patches and targets of the images at `rows` of train.features."""
    tokens, shares = [], []
    for layers, indices in train.tokens(train.features.indices[rows]):
        patches = layers[0].patches
        maps = torch.stack([class_map(truth, int(i), train.preprocessing) for i in indices])
        tokens.append(patches.flatten(0, 1).cpu())
        shares.append(shares_of(maps, train.grid).flatten(0, 1))
    return Patches(torch.cat(tokens).numpy(), torch.cat(shares).numpy())


def affordable_rows(train: Examples, seed: int) -> np.ndarray:
    """Rows of train whose patches are at most MAX_PATCHES: all, or a keyed sample."""
    layers, _ = next(iter(train.tokens(train.features.indices[:1])))
    return choose_indices(len(train.features), max(2, MAX_PATCHES // layers[0].patches.shape[1]), seed)


class LinearHead:
    """Class scores of patches by a linear map of standardised tokens."""

    def __init__(self, patches: Patches, num_choosing: int, unfinished: Unfinished | None = None) -> None:
        """Fit for each C without the last `num_choosing` patches, which choose; then the chosen C on all."""
        self.mean = patches.tokens.mean(axis=0)
        self.scale = 1 / (patches.tokens.std(axis=0) + 1e-6)
        x = torch.from_numpy((patches.tokens - self.mean) * self.scale)
        y = torch.from_numpy(patches.shares)
        last = len(x) - num_choosing
        slopes, start = convex.share_slopes, convex.zeros(x, y.shape[1])
        merit = convex.minus_loss(slopes)
        parts = (x[:last], y[:last]), (x[last:], y[last:])
        self.strength = convex.best_strength(
            *parts, slopes, STRENGTHS, merit, start, max_steps=MAX_STEPS, unfinished=unfinished
        )
        self.solution = convex.minimise(x, y, slopes, self.strength, max_steps=MAX_STEPS, unfinished=unfinished)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Log scores (B, N, K) of tokens (B, N, D)."""
        x = (tokens - torch.from_numpy(self.mean)) * torch.from_numpy(self.scale)
        return x @ self.solution[:-1] + self.solution[-1]


class NearestPatches:
    """Class shares of patches by the shares of the training patches most like them."""

    def __init__(self, patches: Patches) -> None:
        self.patches = patches

    def __call__(self, tokens: Tensor) -> Tensor:
        """Shares (B, N, K) of tokens (B, N, D)."""
        similarities, indices = nearest(self.patches.tokens, tokens.flatten(0, 1).numpy(), NUM_NEIGHBOURS)
        votes = np.einsum("mk,mkc->mc", vote_shares(similarities), self.patches.shares[indices])
        return torch.from_numpy(votes.astype(np.float32)).view(*tokens.shape[:2], -1)


def to_pixels(scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Class of each pixel, (B, *size), from the scores (B, N, K) of a `grid` of patches."""
    maps = scores.transpose(1, 2).unflatten(2, grid)
    return interpolate(maps, size=size, mode="bilinear", align_corners=False).argmax(dim=1)


def confusion(truth: Tensor, said: Tensor) -> np.ndarray:
    """(K, K) counts of pixels, truth by row, from two maps of classes of one shape."""
    flat = torch.bincount((truth * NUM_CLASSES + said).flatten(), minlength=NUM_CLASSES**2)
    return flat.view(NUM_CLASSES, NUM_CLASSES).numpy()


def mean_iou(tables: np.ndarray) -> np.ndarray:
    """Mean intersection over union over the classes that occur, of confusion tables (..., K, K)."""
    hits = np.diagonal(tables, axis1=-2, axis2=-1)
    union = tables.sum(axis=-1) + tables.sum(axis=-2) - hits
    with np.errstate(invalid="ignore"):
        return np.nanmean(np.where(union > 0, hits / union, np.nan), axis=-1)
