"""The built-in data set: images of a few simple objects, with graph, masks, captions and questions. Works offline.

`scenes:?n=512&seed=0&size=64&split=train&objects=1-3&label=shape&clutter=1&scale=1`. Scene i depends on (seed, split,
objects, scale, i) alone; at another `size` it is the same scene. `clutter` (0 to 1) says how busy its background is,
`scale` (0.5 to 1.2) how large its objects are. `val` is more of `train`, `novel` holds the combinations of shape and
colour that train and val never show.
"""

from __future__ import annotations

import difflib
import math
from functools import cached_property
from urllib.parse import parse_qsl

import numpy as np

from sslvit.data import scene_text
from sslvit.data.scene_drawing import draw, draw_masks
from sslvit.data.scene_graph import (
    COLOUR_NAMES,
    MAX_OBJECTS,
    SIZES,
    SPLITS,
    SceneGraph,
    draw_attributes,
    draw_graph,
    scene_keys,
)
from sslvit.data.scene_shapes import SHAPES
from sslvit.data.turns import Turn
from sslvit.errors import InputError

SIZE_LIMITS = (32, 2048)
SCALE_LIMITS = (0.5, 1.2)  # above, two large objects find no place
MAX_SCENES = 10_000_000
_DEFAULTS = {
    "n": "512",
    "seed": "0",
    "size": "64",
    "split": "train",
    "objects": "1-3",
    "label": "",
    "clutter": "1",
    "scale": "1",
}
_CLASSES = {"shape": SHAPES, "colour": COLOUR_NAMES, "size": SIZES}


class Scenes:
    """A data source (see sources.Source) of `n` rendered scenes."""

    has_text = True

    def __init__(
        self,
        n: int = 512,
        seed: int = 0,
        size: int = 64,
        split: str = "train",
        objects: tuple[int, int] = (1, 3),
        label: tuple[str, ...] = (),
        clutter: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        self.n, self.seed, self.size, self.split, self.objects = n, seed, size, split, objects
        self._label_names = label or (tuple(_CLASSES) if objects == (1, 1) else ("count",))
        self._keys = scene_keys(seed, split, np.arange(n))
        low, high = objects
        count = str(low) if low == high else f"{low}-{high}"
        self.spec = f"scenes:?n={n}&seed={seed}&size={size}&split={split}&objects={count}"
        self.clutter = clutter
        if clutter != 1:
            self.spec += f"&clutter={clutter:g}"
        self.scale = scale
        if scale != 1:
            self.spec += f"&scale={scale:g}"
        if label:
            self.spec += f"&label={','.join(label)}"

    @classmethod
    def from_spec(cls, rest: str) -> Scenes:
        """From what follows `scenes:`, e.g. "?n=512&seed=0"; empty: the defaults. InputError for anything unknown."""
        query = rest.removeprefix("scenes:").lstrip("?")
        given = dict(parse_qsl(query, keep_blank_values=True))
        for key in given:
            if key not in _DEFAULTS:
                near = difflib.get_close_matches(key, _DEFAULTS, n=1, cutoff=0.0)[0]
                raise InputError(f"scenes: has no key {key!r}; did you mean {near!r}? keys are {', '.join(_DEFAULTS)}")
        values = {**_DEFAULTS, **given}
        label = tuple(name for name in values["label"].split(",") if name)
        for name in label:
            _one_of("label", name, (*_CLASSES, "count"))
        objects, scale = _range(values["objects"]), _real("scale", values["scale"], SCALE_LIMITS)
        if scale > 1 and objects[1] == MAX_OBJECTS:
            raise InputError(f"scenes: {MAX_OBJECTS} objects of scale={scale:g} find no place; take scale=1")
        return cls(
            _number("n", values["n"], 1, MAX_SCENES),
            _number("seed", values["seed"], 0, 2**63 - 1),
            _number("size", values["size"], *SIZE_LIMITS),
            _one_of("split", values["split"], SPLITS),
            objects,
            label,
            _real("clutter", values["clutter"], (0, 1)),
            scale,
        )

    def __len__(self) -> int:
        return self.n

    def name(self, index: int) -> str:
        """Unique among all scenes."""
        return f"{self.split}-{self.seed}-{self._at(index):07d}"

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return draw(self.graph(index), self._key(index), self.clutter)

    def graph(self, index: int) -> SceneGraph:
        """What scene i shows, without drawing it."""
        return draw_graph(self._key(index), self.split, self.objects, self.size, self.scale)

    def masks(self, index: int) -> np.ndarray:
        """(num_objects, H, W) bool, in the order of the graph; no two overlap."""
        return draw_masks(self.graph(index))

    def captions(self, index: int) -> list[str]:
        """Several phrasings of the whole scene; the first is the plain list from left to right."""
        return scene_text.captions(self.graph(index))

    def text(self, index: int) -> dict[str, list[str]]:
        """What a row of a captioned data set would hold."""
        return {"captions": self.captions(index)}

    def caption_turns(self, index: int, prompt: str) -> list[Turn]:
        """Captions as turns; `prompt` asks for the plain list."""
        return scene_text.caption_turns(self.graph(index), prompt)

    def questions(self, index: int) -> list[Turn]:
        """Questions of all families the scene allows; their words do not tell the answers."""
        return scene_text.questions(self.graph(index), self._key(index), self.split, self.objects)

    @cached_property
    def labels(self) -> dict[str, np.ndarray]:
        """Name -> (n,) int64. In scenes of several objects, attributes are those of the leftmost one."""
        drawn = draw_attributes(self._keys, self.split, self.objects)
        labels = {}
        for name in self._label_names:
            if name == "count":
                labels[name] = drawn.num_objects - self.objects[0]
            elif self.objects == (1, 1):
                labels[name] = getattr(drawn, name)[:, 0]
            else:
                labels[name] = self._leftmost(name)
        return labels

    def _leftmost(self, name: str) -> np.ndarray:
        classes = _CLASSES[name]
        found = (getattr(self.graph(index).objects[0], name) for index in range(self.n))
        return np.array([classes.index(value) for value in found], dtype=np.int64)

    @property
    def class_names(self) -> dict[str, list[str]]:
        """Name -> what each label number means."""
        low, high = self.objects
        names = {**_CLASSES, "count": tuple(str(number) for number in range(low, high + 1))}
        return {name: list(names[name]) for name in self._label_names}

    def _at(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(f"scene {index} of {self.n}")
        return int(index)

    def _key(self, index: int) -> np.ndarray:
        index = self._at(index)
        return self._keys[index : index + 1]


def _number(key: str, text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise InputError(f"scenes: {key}={text} is not a whole number from {low} to {high}")
    return int(text)


def _real(key: str, text: str, limits: tuple[float, float]) -> float:
    low, high = limits
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise InputError(f"scenes: {key}={text} is not a number from {low:g} to {high:g}")
    return value


def _one_of(key: str, text: str, known: tuple[str, ...]) -> str:
    if text not in known:
        raise InputError(f"scenes: {key}={text} is none of {', '.join(known)}")
    return text


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    high = high or low
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) <= MAX_OBJECTS):
        raise InputError(f"scenes: objects={text} is neither a number from 1 to {MAX_OBJECTS} nor a range such as 1-3")
    return int(low), int(high)
