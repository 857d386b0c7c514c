"""Random resized crops and flips of one decoded image.

Multi-crop of DINO (arXiv:2104.14294, section 3.1) with torchvision's `RandomResizedCrop` rule: ten tries, then the
largest centre crop of an allowed ratio. All uint8; colour is in `photometry.py`, the draws come from `keyed.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from sslvit.data import photometry
from sslvit.data.config import CropsConfig, PhotometryConfig
from sslvit.data.keyed import uniforms
from sslvit.encoder.config import Preprocessing

Size = int | tuple[int, int]  # pixels: a side, or (height, width)

_NUM_TRIES = 10
_CROP_UNIFORMS = 2 * _NUM_TRIES + 3
_VIEW_UNIFORMS = _CROP_UNIFORMS + photometry.NUM_UNIFORMS


def height_width(size: Size) -> tuple[int, int]:
    """A side stands for a square."""
    return (size, size) if isinstance(size, int) else size


def crop_boxes(
    u: np.ndarray, height: np.ndarray, width: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Boxes (..., 4) int64 of top, left, height, width from uniforms (..., 22) and image sizes (...), in pixels."""
    area = (height * width)[..., None] * (scale[0] + (scale[1] - scale[0]) * u[..., :_NUM_TRIES])
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(log_low + (log_high - log_low) * u[..., _NUM_TRIES : 2 * _NUM_TRIES])
    heights, widths = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (heights > 0) & (widths > 0) & (heights <= height[..., None]) & (widths <= width[..., None])
    first = fits.argmax(-1)[..., None]
    h, w = (np.take_along_axis(sizes, first, -1)[..., 0] for sizes in (heights, widths))
    top, left = np.floor(u[..., -2] * (height - h + 1)), np.floor(u[..., -1] * (width - w + 1))
    boxes = np.stack([top, left, h, w], -1).astype(np.int64)
    return np.where(fits.any(-1)[..., None], boxes, _centre_boxes(height, width, ratio))


def _centre_boxes(height: np.ndarray, width: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The largest centre box whose width / height lies within `ratio`."""
    h = np.where(width < ratio[0] * height, np.rint(width / ratio[0]), height)
    w = np.where(width > ratio[1] * height, np.rint(height * ratio[1]), width)
    h, w = np.clip(h, 1, height), np.clip(w, 1, width)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], -1).astype(np.int64)


def min_side(crops: CropsConfig, global_size: Size) -> int:
    """The shorter side, in pixels, below which a reduced-scale decode would make some crop smaller than its output."""
    assert crops.global_scale is not None
    kinds = [(max(height_width(global_size)), crops.global_scale[0])]
    if crops.num_local:
        assert crops.local_size is not None
        kinds.append((max(crops.local_shape), crops.local_scale[0]))
    narrowest = min(crops.ratio[0], 1 / crops.ratio[1])
    return max(math.ceil(size / math.sqrt(scale * narrowest)) for size, scale in kinds)


@dataclass(frozen=True)
class ViewPlan:
    """Where to cut and what to draw, for a batch of B images and one kind of view, V of them."""

    boxes: np.ndarray  # (B, V, 4) int64: top, left, height, width
    flips: np.ndarray  # (B, V) bool
    photometry: np.ndarray  # (V, B, P) float32


def plan_views(
    sizes: np.ndarray,
    sides: Sequence[tuple[int, int]],
    crops: CropsConfig,
    colours: PhotometryConfig,
    channels: int,
    seed: int,
    epochs: np.ndarray,
    samples: np.ndarray,
) -> tuple[ViewPlan, ViewPlan]:
    """Plans of the global and of the local views for images of `sizes` (B, 2), keyed by epochs (B,) and samples (B,).

    `sides` are (height, width) of both kinds: `crops.ratio` is that of a box to the view it becomes, so that views that
    are no squares are stretched no more than squares are.
    View v of the key counts the global views first, then the local ones.
    """
    assert crops.num_global and crops.num_local is not None and crops.global_scale is not None
    views = np.arange(crops.num_global + crops.num_local)
    u = uniforms(seed, epochs[:, None], samples[:, None], views, _VIEW_UNIFORMS)
    split = crops.num_global
    return (
        _plan_kind(
            u[:, :split], sizes, _ratio(crops, sides[0]), crops, crops.global_scale, colours, "global", channels
        ),
        _plan_kind(u[:, split:], sizes, _ratio(crops, sides[1]), crops, crops.local_scale, colours, "local", channels),
    )


def _ratio(crops: CropsConfig, side: tuple[int, int]) -> tuple[float, float]:
    aspect = side[1] / side[0] if side[0] else 1.0
    return crops.ratio[0] * aspect, crops.ratio[1] * aspect


def _plan_kind(
    u: np.ndarray,
    sizes: np.ndarray,
    ratio: tuple[float, float],
    crops: CropsConfig,
    scale: list[float],
    colours: PhotometryConfig,
    kind: str,
    channels: int,
) -> ViewPlan:
    batch, num_views = u.shape[:2]
    height, width = (np.broadcast_to(side[:, None], (batch, num_views)) for side in (sizes[:, 0], sizes[:, 1]))
    boxes = crop_boxes(u[..., : _CROP_UNIFORMS - 1], height, width, (scale[0], scale[1]), ratio)
    rows = np.empty((num_views, batch, photometry.NUM_PARAMETERS), np.float32)
    for view in range(num_views):
        rows[view] = photometry.draw(u[:, view, _CROP_UNIFORMS:], colours, kind, view, channels)
    return ViewPlan(boxes, u[..., _CROP_UNIFORMS - 1] < crops.horizontal_flip_prob, rows)


def cut_views(image: np.ndarray, boxes: np.ndarray, flips: np.ndarray, out: list[torch.Tensor]) -> None:
    """Cut boxes (V, 4) out of an image (H, W, C) uint8, resize (bicubic, antialiased), flip, into V x (C, h, w)."""
    pixels = _as_tensor(image)
    for (top, left, height, width), flip, target in zip(boxes.tolist(), flips.tolist(), out, strict=True):
        view = resize(pixels[:, :, top : top + height, left : left + width], target.shape[-2], target.shape[-1])
        target.copy_(view[0].flip(-1) if flip else view[0])


def _as_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 to (1, C, H, W), channels last, without a copy unless the array is read-only."""
    return torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)[None]


def resize(images: torch.Tensor, height: int, width: int, mode: str = "bicubic") -> torch.Tensor:
    """uint8 images (B, C, H, W) to (B, C, height, width), antialiased, in integer arithmetic; fastest channels-last."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode=mode, antialias=True)


@dataclass(frozen=True)
class SampleViews:
    """All views of one image: crops uint8 and their photometric rows (see `photometry.py`)."""

    global_crops: torch.Tensor  # (G, C, H, W) uint8
    local_crops: torch.Tensor  # (L, C, h, w) uint8
    global_photometry: torch.Tensor  # (G, P) float32
    local_photometry: torch.Tensor  # (L, P) float32


def make_views(
    image: np.ndarray,
    crops: CropsConfig,
    global_size: Size,
    colours: PhotometryConfig,
    seed: int,
    epoch: int,
    sample: int,
) -> SampleViews:
    """The views that the loader would make of this decoded image (H, W, C) uint8, alone."""
    channels = image.shape[2]
    sides = (height_width(global_size), crops.local_shape)
    plans = plan_views(
        np.array([image.shape[:2]]), sides, crops, colours, channels, seed, np.array([epoch]), np.array([sample])
    )
    cut = []
    for plan, side in zip(plans, sides, strict=True):
        views = torch.empty(len(plan.photometry), channels, *side, dtype=torch.uint8)
        cut_views(image, plan.boxes[0], plan.flips[0], list(views))
        cut.append(views)
    rows = [torch.from_numpy(plan.photometry[:, 0].copy()) for plan in plans]
    return SampleViews(cut[0], cut[1], rows[0], rows[1])


def eval_transform(image: np.ndarray, preprocessing: Preprocessing) -> torch.Tensor:
    """An image (H, W, C) uint8 as an encoder wants to see it, before normalisation: (C, height, width) uint8.

    It is resized in proportion until it just covers size / crop_pct (for squares: the shorter side goes there), then
    the centre is cut (as timm does).
    """
    rows, columns = preprocessing.size
    least_height, least_width = (math.floor(side / preprocessing.crop_pct) for side in (rows, columns))
    height, width = image.shape[:2]
    if least_height * width >= least_width * height:
        new_height, new_width = least_height, least_height * width // height
    else:
        new_height, new_width = least_width * height // width, least_width
    pixels = _as_tensor(image)
    resized = resize(pixels, new_height, new_width, preprocessing.interpolation)[0]
    top, left = round((new_height - rows) / 2), round((new_width - columns) / 2)
    return resized[:, top : top + rows, left : left + columns].contiguous()
