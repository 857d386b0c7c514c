"""Colour operations: drawn as rows of numbers in a worker, applied to whole batches on the training device.

Brightness, contrast, saturation and hue (torchvision's `ColorJitter`, in a drawn order), grayscale, Gaussian blur and
solarize, in the order and strengths of DINO (arXiv:2104.14294, section 3.1; BYOL, arXiv:2006.07733, appendix B).

Everything up to grayscale is linear in the pixel once the image's mean is known, so it is composed into one 3x4 affine
map per image. Two things differ from torchvision for that. Values are clamped to 0..1 once, after the colour map, not
after each operation. Hue is a rotation about the grey axis: HSV's hue shift at multiples of a third of the circle, in
between it keeps the mean of the three channels. On CIFAR-10 at hue +-0.1 it is on average 4.6 grey levels away from
torchvision's (the shift itself moves 6.8; a YIQ rotation is 8 away). Not here: crops and flips (`crops.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from sslvit.data.config import PhotometryConfig
from sslvit.distributed import copied_to

# Columns of a row of photometric parameters.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAYSCALE, BLUR, SOLARIZE = range(8)
NUM_PARAMETERS = 8
IDENTITY = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
NUM_UNIFORMS = 11  # that `draw` consumes

ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))  # ORDER is an index into this
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision
SOLARIZE_THRESHOLD = 128 / 255
BLUR_SIGMA = (0.1, 2.0)  # pixels
_SLAB_ELEMENTS = 2**17  # float32 that, three times over, stay in a core's cache


def draw(uniforms: np.ndarray, config: PhotometryConfig, kind: str, view: int, channels: int) -> np.ndarray:
    """Rows of parameters (..., 8) float32 from uniforms in [0, 1) of shape (..., NUM_UNIFORMS).

    kind is "global" or "local", view the index among the views of that kind: it picks from the lists of
    probabilities, the last entry standing for all further views. Images that are not RGB get brightness, contrast and
    blur: saturation, hue, grayscale and solarize (an inversion of light) mean nothing for bands of other kinds.
    """
    assert config.jitter_prob is not None and config.hue is not None and config.grayscale_prob is not None
    assert config.brightness is not None and config.contrast is not None and config.saturation is not None
    assert config.global_blur_prob and config.local_blur_prob is not None and config.global_solarize_prob
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
    blur_prob, solarize_prob = config.local_blur_prob, 0.0
    if kind == "global":
        blur_prob = config.global_blur_prob[min(view, len(config.global_blur_prob) - 1)]
        solarize_prob = config.global_solarize_prob[min(view, len(config.global_solarize_prob) - 1)]
    low, high = BLUR_SIGMA
    rows[..., BLUR] = np.where(u[..., 7] < blur_prob, low + (high - low) * u[..., 8], 0)
    if channels != 3:
        rows[..., SATURATION], rows[..., HUE] = 1, 0
        return rows
    rows[..., GRAYSCALE] = u[..., 6] < config.grayscale_prob
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
    """Gaussian blur of images (B, C, H, W), float, each with its own sigma (B,) in pixels, on the CPU; 0: untouched.

    The kernel of `kernel_size` as two passes along one axis each; edges are reflected.
    """
    halves = [min(kernel_size(side), 2 * side - 1) // 2 for side in images.shape[-2:]]
    if images.is_cuda:
        return _blur_by_convolution(images, copied_to(sigma, images.device), halves)
    return _blur_by_shifts(images, sigma, halves)


def _taps(sigma: torch.Tensor, half: int) -> torch.Tensor:
    """Weights (B, half + 1) of the centre and of one side of a normalised kernel of 2 half + 1 taps."""
    distance = torch.arange(half + 1, device=sigma.device)
    side = torch.exp(-0.5 * (distance / sigma[:, None].clamp(min=1e-3)) ** 2)
    return side / (2 * side.sum(1, keepdim=True) - side[:, :1])


def _blur_by_shifts(images: torch.Tensor, sigma: torch.Tensor, halves: list[int]) -> torch.Tensor:
    """A sum of shifted images without the taps beyond 3.5 sigma (< 5e-4 of the sum).

    On CPU 2 to 8 times faster than grouped convolutions or banded matrices.
    """
    reach = max(1, math.ceil(3.5 * float(sigma.max())))
    scratch = torch.empty_like(images)
    for axis, half in zip((2, 3), halves, strict=True):
        images = _blur_axis(images, _taps(sigma, min(half, reach)), axis, scratch)
    return images


def _blur_axis(x: torch.Tensor, taps: torch.Tensor, axis: int, scratch: torch.Tensor) -> torch.Tensor:
    half, length = taps.shape[1] - 1, x.shape[axis]
    padded = F.pad(x, (0, 0, half, half) if axis == 2 else (half, half, 0, 0), mode="reflect")
    weights = taps[:, :, None, None, None]
    out = padded.narrow(axis, half, length) * weights[:, 0]
    for j in range(1, half + 1):
        torch.add(padded.narrow(axis, half - j, length), padded.narrow(axis, half + j, length), out=scratch)
        out.addcmul_(scratch, weights[:, j])
    return out


def _blur_by_convolution(images: torch.Tensor, sigma: torch.Tensor, halves: list[int]) -> torch.Tensor:
    """Two depthwise convolutions over all images at once: few launches, for CUDA."""
    batch, channels, height, width = images.shape
    vertical, horizontal = halves
    x = F.pad(images, (horizontal, horizontal, vertical, vertical), mode="reflect").view(
        1, batch * channels, height + 2 * vertical, width + 2 * horizontal
    )
    for half, shape in ((vertical, (-1, 1, 2 * vertical + 1, 1)), (horizontal, (-1, 1, 1, 2 * horizontal + 1))):
        side = _taps(sigma, half)
        kernel = torch.cat([side.flip(1), side[:, 1:]], 1).repeat_interleave(channels, 0)
        x = F.conv2d(x, kernel.view(shape), groups=batch * channels)
    return x.view(images.shape)


def apply(images: torch.Tensor, rows: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Colour and normalise uint8 images (B, C, H, W) by rows (B, 8); float32 (B, C, H, W) on the images' device.

    mean and std are per channel on the 0..1 scale. Keep `rows` on the CPU: what each image needs is then known
    without waiting for the device.
    """
    rows = rows.cpu()
    maps, offsets = colour_maps(rows, images.shape[1])
    centre, scale = _standard(images, mean, std)
    out = torch.empty(images.shape, device=images.device)
    for slab in _slabs(images, rows[:, BLUR]):
        here, some = copied_to(slab, images.device), rows[slab]
        x = _colour(images.index_select(0, here), maps[slab], offsets[slab])
        if some[-1, BLUR] > 0:
            x = blur(x, some[:, BLUR])
        if some[:, SOLARIZE].any():
            chosen = copied_to(some[:, SOLARIZE] > 0, images.device)[:, None, None, None]
            x = torch.where((x >= SOLARIZE_THRESHOLD) & chosen, 1 - x, x)
        _put(out, here, x.sub_(centre).mul_(scale))
    return out


def _put(out: torch.Tensor, places: torch.Tensor, images: torch.Tensor) -> None:
    """out[places] = images; on CPU `index_copy_` takes three times as long as copying a few large images singly."""
    if out.is_cuda or len(places) > 8:
        out.index_copy_(0, places, images)
    else:
        for place, image in zip(places.tolist(), images, strict=True):
            out[place].copy_(image)


def _slabs(images: torch.Tensor, sigma: torch.Tensor) -> list[torch.Tensor]:
    """The images' places (n,), those of similar sigma together, in shares that stay in a core's cache.

    A GPU wants large shares: all that need no blur, all that do.
    """
    order = torch.argsort(sigma, stable=True)
    if images.is_cuda:
        num_sharp = int((sigma == 0).sum())
        return [places for places in (order[:num_sharp], order[num_sharp:]) if len(places)]
    return list(order.split(max(1, _SLAB_ELEMENTS // max(1, images[:1].numel()))))


def _colour(images: torch.Tensor, maps: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """uint8 (B, C, H, W) through `colour_maps`, clamped to 0..1 float32."""
    maps, offsets = (copied_to(m, images.device) for m in (maps / 255, offsets / 255))
    pixels = images.float().flatten(2)
    shift = offsets @ pixels.mean(-1, keepdim=True)
    return torch.bmm(maps, pixels).add_(shift).clamp_(0, 1).view(images.shape)


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 images (B, C, H, W) to float32, (x / 255 - mean) / std per channel."""
    centre, scale = _standard(images, mean, std)
    return images.float().sub_(255 * centre).mul_(scale / 255)


def _standard(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, 1 / std), both (C, 1, 1) on the images' device."""
    assert images.shape[1] == len(mean) == len(std), (images.shape, mean, std)
    centre, spread = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return copied_to(centre, images.device), copied_to(1 / spread, images.device)
