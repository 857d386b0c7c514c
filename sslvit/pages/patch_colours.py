"""Patch features as colours: the first three principal components of the patches of several images, as RGB.

The picture of DINOv2 (arXiv:2304.07193, figure 1) without its foreground mask: one projection for all images, so that
equal colours mean similar features. Not a segmentation.
"""

from __future__ import annotations

import numpy as np

TRIM = 0.02  # share of the values beyond the ends of the colour scale, on each side


def principal_components(rows: np.ndarray, count: int) -> np.ndarray:
    """Projections (n, count) of centred rows (n, D) on their first principal axes, by the covariance in float64.

    The sign of an axis is free; it is chosen so that its largest weight is positive. Missing axes give zeros.
    """
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :count]
    strongest = np.abs(axes).argmax(axis=0)
    axes = axes * np.sign(axes[strongest, np.arange(axes.shape[1])])
    projected = centred @ axes
    return np.pad(projected, ((0, 0), (0, count - projected.shape[1])))


def patch_colours(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Patch features (B, N, D) to pictures (B, rows, columns, 3) uint8 with one colour scale for all."""
    batch, length, width = patches.shape
    projected = principal_components(patches.reshape(batch * length, width), 3)
    low, high = np.quantile(projected, [TRIM, 1 - TRIM], axis=0)
    shares = np.where(high > low, (projected - low) / np.where(high > low, high - low, 1), 0.5)
    return np.rint(255 * shares.clip(0, 1)).astype(np.uint8).reshape(batch, *grid, 3)
