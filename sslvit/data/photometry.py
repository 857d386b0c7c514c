"""Colour operations: drawn as rows of numbers in a worker, applied to whole batches on the training device.

Brightness, contrast, saturation and hue (torchvision's `ColorJitter`, in a drawn order), grayscale, Gaussian blur and
solarize, in the order and strengths of DINO (arXiv:2104.14294, section 3.1; BYOL, arXiv:2006.07733, appendix B).

Everything up to grayscale is linear in the pixel once the image's mean is known, so it is composed into one 3x4 affine
map per image. Two things differ from torchvision for that: values are clamped to 0..1 once, after the colour map, not
after each operation; hue is a rotation about the grey axis, which agrees with HSV's hue shift at multiples of a third
of the circle and keeps the mean of the three channels. Not here: crops and flips (`crops.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from sslvit.data.config import PhotometryConfig

# Columns of a row of photometric parameters.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAYSCALE, BLUR, SOLARIZE = range(8)
NUM_PARAMETERS = 8
IDENTITY = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
NUM_UNIFORMS = 11  # that `draw` consumes

ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))  # ORDER is an index into this
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision
SOLARIZE_THRESHOLD = 128 / 255
BLUR_SIGMA = (0.1, 2.0)  # pixels


def draw(uniforms: np.ndarray, config: PhotometryConfig, kind: str, view: int, channels: int) -> np.ndarray:
    """Rows of parameters (..., 8) float32 from uniforms in [0, 1) of shape (..., NUM_UNIFORMS).

    kind is "global" or "local", view the index among the views of that kind: it picks from the lists of
    probabilities, the last entry standing for all further views. Images that are not RGB get brightness and
    contrast only.
    """
    u = np.asarray(uniforms)
    rows = np.empty((*u.shape[:-1], NUM_PARAMETERS), np.float32)
    rows[...] = IDENTITY
    jitter = u[..., 0] < config.jitter_prob
    strengths = (config.brightness, config.contrast, config.saturation)
    for column, strength in zip((BRIGHTNESS, CONTRAST, SATURATION), strengths, strict=True):
        low, high = max(0.0, 1 - strength), 1 + strength
        rows[..., column] = np.where(jitter, low + (high - low) * u[..., 1 + column], 1)
    rows[..., HUE] = np.where(jitter, config.hue * (2 * u[..., 4] - 1), 0)
    rows[..., ORDER] = np.floor(u[..., 5] * len(ORDERS))
    if channels != 3:
        rows[..., SATURATION], rows[..., HUE] = 1, 0
        return rows
    blur_prob, solarize_prob = config.local_blur_prob, 0.0
    if kind == "global":
        blur_prob = config.global_blur_prob[min(view, len(config.global_blur_prob) - 1)]
        solarize_prob = config.global_solarize_prob[min(view, len(config.global_solarize_prob) - 1)]
    low, high = BLUR_SIGMA
    rows[..., GRAYSCALE] = u[..., 6] < config.grayscale_prob
    rows[..., BLUR] = np.where(u[..., 7] < blur_prob, low + (high - low) * u[..., 8], 0)
    rows[..., SOLARIZE] = u[..., 9] < solarize_prob
    return rows


def hue_matrix(turns: torch.Tensor) -> torch.Tensor:
    """Rotations (B, 3, 3) of RGB about the grey axis by `turns` (B,) of the circle; +1/3 takes red to green."""
    angle = 2 * math.pi * turns
    cos, sin = torch.cos(angle), torch.sin(angle) / math.sqrt(3)
    same, next_, previous = cos + (1 - cos) / 3, (1 - cos) / 3 + sin, (1 - cos) / 3 - sin
    return torch.stack([same, previous, next_, next_, same, previous, previous, next_, same], -1).view(-1, 3, 3)


def _grey_matrix(channels: int) -> torch.Tensor:
    """(C, C): a pixel to its grey value in every channel; several or single bands are each their own grey."""
    return torch.tensor([LUMA] * 3) if channels == 3 else torch.eye(channels)


def colour_maps(rows: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, T), both (B, C, C): an image x with channel means m becomes A x + T m (before clamping)."""
    rows = rows.float()
    eye, grey = torch.eye(channels), _grey_matrix(channels)
    step = eye.expand(len(rows), 4, channels, channels).clone()
    step[:, BRIGHTNESS] *= rows[:, BRIGHTNESS, None, None]
    step[:, CONTRAST] *= rows[:, CONTRAST, None, None]
    step[:, SATURATION] = grey + rows[:, SATURATION, None, None] * (eye - grey)
    if channels == 3:
        step[:, HUE] = hue_matrix(rows[:, HUE])
    order = torch.tensor(ORDERS)[rows[:, ORDER].long()]
    index = torch.arange(len(rows))
    a, t = eye.expand(len(rows), -1, -1), torch.zeros(len(rows), channels, channels)
    for place in range(4):
        operation = order[:, place]
        mean_share = torch.where(operation == CONTRAST, 1 - rows[:, CONTRAST], 0.0)[:, None, None]
        t, a = step[index, operation] @ t + mean_share * (grey @ (a + t)), step[index, operation] @ a
    to_grey = torch.where(rows[:, GRAYSCALE, None, None] > 0, grey, eye)
    return to_grey @ a, to_grey @ t


def kernel_size(side: int) -> int:
    """Taps of the blur: a tenth of the side (SimCLR, arXiv:2002.05709, appendix A): 23 at 224 pixels, 3 at least."""
    return max(3, 2 * round((side * 23 / 224 - 1) / 2) + 1)


def blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of images (B, C, H, W), float, each with its own sigma (B,) in pixels; edges are reflected."""
    images = _blur_rows(images, sigma).transpose(-1, -2)
    return _blur_rows(images, sigma).transpose(-1, -2)


def _blur_rows(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """One pass down the height, as a sum of shifted images: on CPU faster than a grouped convolution."""
    height = x.shape[-2]
    half = min(kernel_size(height), 2 * height - 1) // 2
    taps = torch.exp(-0.5 * (torch.arange(half + 1, device=x.device) / sigma[:, None]) ** 2)
    taps = (taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1]))[:, :, None, None, None]
    padded = F.pad(x, (0, 0, half, half), mode="reflect")
    out = padded[:, :, half : half + height] * taps[:, 0]
    for j in range(1, half + 1):
        both = padded[:, :, half - j : half - j + height] + padded[:, :, half + j : half + j + height]
        out.addcmul_(both, taps[:, j])
    return out


def apply(images: torch.Tensor, rows: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Colour and normalise uint8 images (B, C, H, W) by rows (B, 8); float32 (B, C, H, W) on the images' device.

    mean and std are per channel on the 0..1 scale. Keep `rows` on the CPU: which images need blur or solarize is then
    known without waiting for the device.
    """
    batch, channels, height, width = images.shape
    rows = rows.cpu()
    device = images.device
    a, t = (m.to(device, non_blocking=True) for m in colour_maps(rows, channels))
    pixels = images.float().view(batch, channels, -1)
    offset = t @ (pixels.mean(-1, keepdim=True) / 255)
    out = torch.baddbmm(offset, a / 255, pixels).clamp_(0, 1).view(batch, channels, height, width)
    blurred = torch.nonzero(rows[:, BLUR] > 0)[:, 0]
    if len(blurred):
        index = blurred.to(device, non_blocking=True)
        out[index] = blur(out[index], rows[blurred, BLUR].to(device, non_blocking=True))
    solarized = torch.nonzero(rows[:, SOLARIZE] > 0)[:, 0]
    if len(solarized):
        index = solarized.to(device, non_blocking=True)
        some = out[index]
        out[index] = torch.where(some >= SOLARIZE_THRESHOLD, 1 - some, some)
    return _standardize(out, mean, std)


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 images (B, C, H, W) to float32, (x / 255 - mean) / std per channel."""
    return _standardize(images.float().div_(255), mean, std)


def _standardize(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    assert x.shape[1] == len(mean) == len(std), (x.shape, mean, std)
    means = torch.tensor(mean, device=x.device).view(-1, 1, 1)
    scales = 1 / torch.tensor(std, device=x.device).view(-1, 1, 1)
    return x.sub_(means).mul_(scales)
