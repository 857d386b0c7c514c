"""The outlines of the scenes' shapes as signed distances. Not a general geometry kit.

Every shape lives in a frame of its own: x to the right, y down, within [-1, 1] on both axes at any rotation of at most
`MAX_ANGLE` degrees. Distances are negative inside, right near the outline, and in units of that frame.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "heart", "moon")
MAX_ANGLE = 15  # degrees, either way: more would turn a cross into an x and a moon into another

_STAR_STEP = 2 * math.pi / 5
_STAR_INNER = 0.42


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.9


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.67) - 0.27


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.78


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Corners (0, -.9) and (+-.84, .64): below both slanted sides and above the base."""
    side = (np.abs(x) * 1.54 - (y + 0.9) * 0.84) / math.hypot(1.54, 0.84)
    return np.maximum(side, y - 0.64)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.92, np.minimum(x, y) - 0.3)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: fold the plane onto half a point, then one straight edge from the tip to the notch."""
    angle = np.abs((np.arctan2(x, -y) + _STAR_STEP / 2) % _STAR_STEP - _STAR_STEP / 2)
    radius = np.hypot(x, y)
    notch_x, notch_y = _STAR_INNER * math.cos(_STAR_STEP / 2), _STAR_INNER * math.sin(_STAR_STEP / 2)
    normal_x, normal_y = notch_y, 1.0 - notch_x
    along, across = radius * np.cos(angle) - 1.0, radius * np.sin(angle)
    return (along * normal_x + across * normal_y) / math.hypot(normal_x, normal_y)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square standing on its corner with a disc on each of its upper sides."""
    x, y = np.abs(x) / 1.5, 0.55 - y / 1.5
    square = (x + np.abs(y - 0.5) - 0.5) / math.sqrt(2)
    disc = np.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    return 1.5 * np.minimum(square, disc)


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x - 0.18, y) - 0.95, 0.72 - np.hypot(x - 0.6, y))


_OUTLINES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "ring": _ring,
    "heart": _heart,
    "moon": _moon,
}


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of each point to the outline of `shape` (same shape as x and y broadcast); negative inside."""
    return _OUTLINES[shape](x, y)


@cache
def extents(shape: str) -> list[tuple[float, float, float, float]]:
    """(x0, y0, x1, y1) of the shape's outline for the rotations -MAX_ANGLE, ..., MAX_ANGLE degrees."""
    line = np.linspace(-1.1, 1.1, 441)
    x, y = np.meshgrid(line, line)
    distance = signed_distance(shape, x, y)
    rim = (distance <= 0) & (distance > -0.02)  # from inside: the zero line is only right there at a sharp tip
    x, y = x[rim], y[rim]
    boxes = []
    for degrees in range(-MAX_ANGLE, MAX_ANGLE + 1):
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turned_x, turned_y = cos * x - sin * y, sin * x + cos * y
        boxes.append((float(turned_x.min()), float(turned_y.min()), float(turned_x.max()), float(turned_y.max())))
    return boxes
