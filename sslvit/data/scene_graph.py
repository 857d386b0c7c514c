"""What is in a scene: attributes, places and boxes, drawn from (seed, split, index) alone. No pixels here.

Every number comes from a counter-based generator (SplitMix64, Steele et al., OOPSLA 2014), so that the attributes of
all scenes of a set are one vectorised computation and scene i needs no other scene. Scenes are symmetric by
construction: shapes, colours and sizes are each uniform, whichever combinations a split holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from sslvit.data.keyed import GOLDEN, splitmix
from sslvit.data.scene_shapes import MAX_ANGLE, SHAPES, extents

COLOURS: dict[str, tuple[float, float, float]] = {  # sRGB, 0..1
    "red": (0.88, 0.10, 0.10),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.13, 0.22, 0.90),
    "yellow": (0.96, 0.86, 0.08),
    "purple": (0.60, 0.12, 0.74),
    "cyan": (0.10, 0.84, 0.88),
    "white": (0.97, 0.97, 0.97),
    "black": (0.03, 0.03, 0.03),
}
COLOUR_NAMES = tuple(COLOURS)
SIZES = ("small", "large")
SPLITS = ("train", "val", "novel")
MAX_OBJECTS = 5
MIN_GAP = 0.02  # between two boxes, as a share of the image side

_RADIUS = (0.115, 0.185)  # of small and large objects, as a share of the image side
_CROWDING = (1.0, 1.0, 1.0, 0.88, 0.75)  # factor on the radius with 1..5 objects
_GROUPS = (0.55, 0.75, 0.95)  # cumulative: all free | one colour | one shape | one colour and shape
_JOIN_PROB = 0.75  # that a further object joins the group
_NOVEL_OFFSETS = (2, 5)  # colour minus shape (mod 8) of the combinations kept for `novel`: each shape and colour twice

# Streams of random numbers of one scene
ATTRIBUTES, PLACES, TEXTURE, TEXT = range(4)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object. Lengths in pixels, origin at the top left corner of the image, x to the right, y down."""

    shape: str
    colour: str
    size: str
    box: tuple[float, float, float, float]  # x0, y0, x1, y1, tight around the outline
    origin: tuple[float, float]  # of the shape's own frame
    radius: float  # half a side of that frame
    angle: int  # degrees, clockwise
    rgb: tuple[float, float, float]  # 0..255, jittered

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box, (x, y)."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True, slots=True)
class SceneGraph:
    """The objects of a scene from left to right, and the side of the image in pixels."""

    objects: tuple[SceneObject, ...]
    image_size: int


@dataclass(frozen=True, slots=True)
class Attributes:
    """Attributes of n scenes: `num_objects` (n,), the others (n, MAX_OBJECTS) as indices; later columns are unused."""

    num_objects: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray


def is_novel(shape: int, colour: int) -> bool:
    """Whether this combination is kept out of train and val."""
    return (colour - shape) % len(COLOURS) in _NOVEL_OFFSETS


def scene_keys(seed: int, split: str, indices: np.ndarray) -> np.ndarray:
    """One uint64 key for each scene, (n,)."""
    words = np.array([seed % 2**64, SPLITS.index(split)], dtype=np.uint64)
    key = splitmix(splitmix(words[:1] + GOLDEN) + words[1:] * GOLDEN)
    return splitmix(key + (indices.astype(np.uint64) + np.uint64(1)) * GOLDEN)


def uniforms(keys: np.ndarray, stream: int, num: int) -> np.ndarray:
    """(n, num) numbers in [0, 1) of one stream of each scene."""
    counters = np.arange(1, num + 1, dtype=np.uint64) + np.uint64(stream << 32)
    bits = splitmix(keys[:, None] + counters * GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@cache
def _colours_of(novel: bool) -> np.ndarray:
    """(shapes, m): the colours each shape may have."""
    num = len(COLOURS)
    return np.array([[c for c in range(num) if is_novel(s, c) == novel] for s in range(len(SHAPES))])


@cache
def _shapes_of(novel: bool) -> np.ndarray:
    """(colours, m): the shapes each colour may have."""
    num = len(SHAPES)
    return np.array([[s for s in range(num) if is_novel(s, c) == novel] for c in range(len(COLOURS))])


def draw_attributes(keys: np.ndarray, split: str, objects: tuple[int, int]) -> Attributes:
    """Number, shapes, colours and sizes of each scene; objects of a group share a colour, a shape or both."""
    u = uniforms(keys, ATTRIBUTES, 2 + 4 * MAX_OBJECTS)
    low, high = objects
    num_objects = low + (u[:, 0] * (high - low + 1)).astype(np.int64)
    group = np.searchsorted(_GROUPS, u[:, 1], side="right")[:, None]
    joins = u[:, 2 : 2 + MAX_OBJECTS] < _JOIN_PROB
    joins[:, 0] = False
    picks = u[:, 2 + MAX_OBJECTS :].reshape(len(keys), MAX_OBJECTS, 3)
    colours_of, shapes_of = _colours_of(split == "novel"), _shapes_of(split == "novel")
    choice = (picks[:, :, 1] * colours_of.shape[1]).astype(np.int64)
    shape = (picks[:, :, 0] * len(SHAPES)).astype(np.int64)
    colour = colours_of[shape, choice]
    same_colour, same_shape, same_both = (joins & (group == kind) for kind in (1, 2, 3))
    shape = np.where(same_colour, shapes_of[colour[:, :1], choice], shape)
    colour = np.where(same_colour, colour[:, :1], colour)
    colour = np.where(same_shape, colours_of[shape[:, :1], choice], colour)
    shape = np.where(same_shape, shape[:, :1], shape)
    shape = np.where(same_both, shape[:, :1], shape)
    colour = np.where(same_both, colour[:, :1], colour)
    size = (picks[:, :, 2] * len(SIZES)).astype(np.int64)
    return Attributes(num_objects, shape, colour, size)


def draw_graph(
    key: np.ndarray, split: str, objects: tuple[int, int], image_size: int, scale: float = 1.0
) -> SceneGraph:
    """The scene of one key (1,), its objects `scale` times as large as usual."""
    drawn = draw_attributes(key, split, objects)
    num = int(drawn.num_objects[0])
    shapes, colours, sizes = (column[0, :num].tolist() for column in (drawn.shape, drawn.colour, drawn.size))
    u = uniforms(key, PLACES, 256)[0].tolist()
    looks = [u[5 * i : 5 * i + 5] for i in range(num)]
    crowding = _CROWDING[num - 1] * scale
    radii = [_RADIUS[size] * crowding * (0.95 + 0.1 * look[0]) for size, look in zip(sizes, looks, strict=True)]
    places = _place(radii, u[5 * MAX_OBJECTS :])
    found = []
    for shape, colour, size, radius, place, look in zip(shapes, colours, sizes, radii, places, looks, strict=True):
        found.append(_object(SHAPES[shape], COLOUR_NAMES[colour], SIZES[size], radius, place, look, image_size))
    found.sort(key=lambda one: one.box[0] + one.box[2])
    return SceneGraph(tuple(found), image_size)


def _object(
    shape: str,
    colour: str,
    size: str,
    radius: float,
    place: tuple[float, float],
    look: list[float],
    image_size: int,
) -> SceneObject:
    angle = int(look[1] * (2 * MAX_ANGLE + 1)) - MAX_ANGLE
    radius, x, y = radius * image_size, place[0] * image_size, place[1] * image_size
    x0, y0, x1, y1 = extents(shape)[angle + MAX_ANGLE]
    box = (x + x0 * radius, y + y0 * radius, x + x1 * radius, y + y1 * radius)
    red, green, blue = (
        255.0 * min(1.0, max(0.0, level + 0.12 * (jitter - 0.5)))
        for level, jitter in zip(COLOURS[colour], look[2:], strict=True)
    )
    return SceneObject(shape, colour, size, box, (x, y), radius, angle, (red, green, blue))


def _place(radii: list[float], u: list[float]) -> list[tuple[float, float]]:
    """Origins (x, y) in image sides such that frames, taken as squares, keep MIN_GAP; large ones first.

    Starts over when one finds no room; when the numbers run out, the cells of a grid always have room.
    """
    order = sorted(range(len(radii)), key=lambda i: -radii[i])
    numbers = iter(u)
    places: dict[int, tuple[float, float]] = {}
    failures = 0
    for x, y in zip(numbers, numbers, strict=False):
        one = order[len(places)]
        edge = radii[one] + MIN_GAP
        x, y = edge + x * (1 - 2 * edge), edge + y * (1 - 2 * edge)
        if all(max(abs(x - ox), abs(y - oy)) >= edge + radii[i] for i, (ox, oy) in places.items()):
            places[one] = (x, y)
            if len(places) == len(radii):
                return [places[i] for i in range(len(radii))]
            failures = 0
        elif (failures := failures + 1) == 10:
            places, failures = {}, 0
    side = 2 if len(radii) <= 4 else 3
    cells = sorted(range(side * side), key=lambda cell: u[cell])
    grid = []
    for i, (cell, radius) in enumerate(zip(cells, radii, strict=False)):
        row, column = divmod(cell, side)
        slack = 0.5 / side - MIN_GAP / 2 - radius
        x, y = (column + 0.5) / side + slack * (2 * u[9 + i] - 1), (row + 0.5) / side + slack * (2 * u[19 + i] - 1)
        grid.append((x, y))
    return grid
