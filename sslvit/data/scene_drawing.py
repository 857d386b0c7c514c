"""A scene graph to pixels: a textured, subdued background, noise, and anti-aliased objects. Pure numpy, no state.

Backgrounds are products of small matrices (waves and smooth noise are of low rank), objects are drawn in their own
window, and the fine noise is cut from a fixed bank, which together makes thousands of images a second at 64 px.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from sslvit.data.scene_graph import TEXTURE, SceneGraph, SceneObject, uniforms
from sslvit.data.scene_shapes import signed_distance

_KNOTS = 6  # of the smooth noise, along each side
_SMOOTH = 16  # where its numbers begin among those of a texture
_NOISE_OFFSETS = 1 << 16
_GROUND = (36, 205)  # darkest and brightest background: black and white objects stay visible


@lru_cache(maxsize=8)
def _pixel_centres(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.float32) + 0.5


@lru_cache(maxsize=8)
def _knot_weights(size: int) -> np.ndarray:
    """(size, _KNOTS): how much of each knot's value a pixel takes, smoothly blended between neighbours."""
    position = _pixel_centres(size) / size * (_KNOTS - 1)
    distance = np.abs(position[:, None] - np.arange(_KNOTS, dtype=np.float32))
    return np.where(distance < 1, 0.5 + 0.5 * np.cos(math.pi * distance), 0.0).astype(np.float32)


@lru_cache(maxsize=4)
def _noise_bank(size: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(size))
    return generator.standard_normal(3 * size * size + _NOISE_OFFSETS, dtype=np.float32)


def _wave(size: int, cycles: float, direction: float, phase: float) -> np.ndarray:
    """(size, size) sine wave with `cycles` across the image, as the product of (size, 2) and (2, size)."""
    scale = 2 * math.pi * cycles / size
    along_x = _pixel_centres(size) * np.float32(scale * math.cos(direction)) + np.float32(2 * math.pi * phase)
    along_y = _pixel_centres(size) * np.float32(scale * math.sin(direction))
    rows = np.stack([np.sin(along_y), np.cos(along_y)], axis=1)
    return rows @ np.stack([np.cos(along_x), np.sin(along_x)])


def _smooth_noise(size: int, u: np.ndarray) -> np.ndarray:
    knots = (2 * u[: _KNOTS * _KNOTS] - 1).astype(np.float32).reshape(_KNOTS, _KNOTS)
    weights = _knot_weights(size)
    return weights @ knots @ weights.T


def _pattern(size: int, u: np.ndarray) -> np.ndarray:
    """(size, size) in about [-1, 1]: gradient, stripes, checks, clouds, patches or nearly flat."""
    kind, direction, cycles, phase, edge = u[0] * 6, math.pi * u[1], 2 + 5 * u[2], u[3], 1 + 5 * u[4]
    if kind < 1:
        return _wave(size, 0.3 + 0.3 * u[2], 2 * direction, phase)
    if kind < 2:
        return np.clip(edge * _wave(size, cycles, direction, phase), -1, 1)
    if kind < 3:
        other = _wave(size, cycles, direction + math.pi / 2, u[5])
        return np.clip(2 * edge * _wave(size, cycles, direction, phase) * other, -1, 1)
    if kind < 4:
        return 1.5 * _smooth_noise(size, u[_SMOOTH:])
    if kind < 5:
        return np.clip(2 * edge * _smooth_noise(size, u[_SMOOTH:]), -1, 1)
    return 0.3 * _smooth_noise(size, u[_SMOOTH:])


def _background(size: int, u: np.ndarray, clutter: float) -> np.ndarray:
    """(size, size, 3) float32 in 0..255. Little colour and never quite dark or bright, so that every object stands out.

    At full clutter its brightness differs more from image to image than an object changes it: raw pixels say little.
    """
    base = 255 * (0.48 + clutter * (0.38 * (u[8] - 0.5) + 0.14 * (u[9:12] - 0.5)))
    swing = 255 * clutter * (0.05 + 0.11 * u[12]) * (1 + 0.7 * (u[13:16] - 0.5))
    ground = _pattern(size, u)[:, :, None] * swing.astype(np.float32) + base.astype(np.float32)
    return np.clip(ground, *_GROUND, out=ground)


def _window(one: SceneObject, size: int) -> tuple[slice, slice]:
    """Rows and columns that hold the object and the soft rim around it."""
    x0, y0, x1, y1 = one.box
    rows = slice(max(0, math.floor(y0 - 1)), min(size, math.ceil(y1 + 1)))
    columns = slice(max(0, math.floor(x0 - 1)), min(size, math.ceil(x1 + 1)))
    return rows, columns


def _depth(one: SceneObject, size: int, window: tuple[slice, slice]) -> np.ndarray:
    """How far, in pixels, the centres of the window's pixels are inside the outline (h, w)."""
    angle = math.radians(one.angle)
    cos, sin = np.float32(math.cos(angle) / one.radius), np.float32(math.sin(angle) / one.radius)
    centres = _pixel_centres(size)
    y = centres[window[0], None] - np.float32(one.origin[1])
    x = centres[window[1]] - np.float32(one.origin[0])
    return signed_distance(one.shape, cos * x + sin * y, cos * y - sin * x) * np.float32(-one.radius)


def draw(graph: SceneGraph, key: np.ndarray, clutter: float = 1.0) -> np.ndarray:
    """(H, W, 3) uint8 of the scene; background and noise come from its key (1,). clutter 0..1: how busy it is."""
    size = graph.image_size
    u = uniforms(key, TEXTURE, _SMOOTH + _KNOTS * _KNOTS)[0]
    canvas = _background(size, u, clutter)
    for one in graph.objects:
        window = _window(one, size)
        cover = np.clip(_depth(one, size, window) + np.float32(0.5), 0, 1)[:, :, None]
        area = canvas[window]
        area += cover * (np.array(one.rgb, dtype=np.float32) - area)
    start = int(u[6] * _NOISE_OFFSETS)
    level = np.float32(2 + 8 * u[7] * u[7])
    canvas += _noise_bank(size)[start : start + canvas.size].reshape(canvas.shape) * level
    return np.clip(canvas, 0, 255).astype(np.uint8)


def draw_masks(graph: SceneGraph) -> np.ndarray:
    """(num_objects, H, W) bool: pixels whose centre lies inside each object, in the order of the graph."""
    masks = np.zeros((len(graph.objects), graph.image_size, graph.image_size), dtype=bool)
    for mask, one in zip(masks, graph.objects, strict=True):
        window = _window(one, graph.image_size)
        mask[window] = _depth(one, graph.image_size, window) > 0
    return masks
