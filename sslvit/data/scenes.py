"""The built-in data set: images of a few simple objects, with graph, masks, captions and questions. Works offline.

`scenes:?n=512&seed=0&size=64&split=train&objects=1-3&label=shape`. Scene i depends on (seed, split, objects, i) alone;
at another `size` it is the same scene. `val` is more of `train`, `novel` holds the combinations of shape and colour that
train and val never show.
"""

from __future__ import annotations

import difflib
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
_DEFAULTS = {"n": "512", "seed": "0", "size": "64", "split": "train", "objects": "1-3", "label": ""}
_CLASSES = {"shape": SHAPES, "colour": COLOUR_NAMES, "size": SIZES}


class Scenes:
    """A data source (see sources.Source) of `n` rendered scenes."""

    def __init__(
        self,
        n: int = 512,
        seed: int = 0,
        size: int = 64,
        split: str = "train",
        objects: tuple[int, int] = (1, 3),
        label: tuple[str, ...] = (),
    ) -> None:
        self.n, self.seed, self.size, self.split, self.objects = n, seed, size, split, objects
        self._label_names = label or (tuple(_CLASSES) if objects == (1, 1) else ("count",))
        self._keys = scene_keys(seed, split, np.arange(n))
        low, high = objects
        count = str(low) if low == high else f"{low}-{high}"
        self.spec = f"scenes:?n={n}&seed={seed}&size={size}&split={split}&objects={count}"
        if label:
            self.spec += f"&label={','.join(label)}"

    @classmethod
    def from_spec(cls, rest: str) -> Scenes:
        """From what follows `scenes:`, e.g. "?n=512&seed=0"; empty for the defaults. InputError for anything unknown."""
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
        return cls(
            _number("n", values["n"], 1, 2**31),
            _number("seed", values["seed"], 0, 2**63),
            _number("size", values["size"], *SIZE_LIMITS),
            _one_of("split", values["split"], SPLITS),
            _range(values["objects"]),
            label,
        )

    def __len__(self) -> int:
        return self.n

    def name(self, i: int) -> str:
        return f"{self.split}-{self.seed}-{self._at(i):07d}"

    def read(self, i: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return draw(self.graph(i), self._key(i))

    def graph(self, i: int) -> SceneGraph:
        """What scene i shows, without drawing it."""
        return draw_graph(self._key(i), self.split, self.objects, self.size)

    def masks(self, i: int) -> np.ndarray:
        """(num_objects, H, W) bool, in the order of the graph; no two overlap."""
        return draw_masks(self.graph(i))

    def captions(self, i: int) -> list[str]:
        """Several phrasings of the whole scene; the first is the plain list from left to right."""
        return scene_text.captions(self.graph(i))

    def caption_turns(self, i: int, prompt: str) -> list[Turn]:
        """Captions as turns; `prompt` asks for the plain list."""
        return scene_text.caption_turns(self.graph(i), prompt)

    def questions(self, i: int) -> list[Turn]:
        """Questions of all families the scene allows; their words do not tell the answers."""
        return scene_text.questions(self.graph(i), self._key(i), self.split, self.objects)

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
        return np.array([classes.index(getattr(self.graph(i).objects[0], name)) for i in range(self.n)], dtype=np.int64)

    @property
    def class_names(self) -> dict[str, list[str]]:
        """Name -> what each label number means."""
        low, high = self.objects
        names = {**_CLASSES, "count": tuple(str(number) for number in range(low, high + 1))}
        return {name: list(names[name]) for name in self._label_names}

    def _at(self, i: int) -> int:
        if not -self.n <= i < self.n:
            raise IndexError(f"scene {i} of {self.n}")
        return int(i) % self.n

    def _key(self, i: int) -> np.ndarray:
        i = self._at(i)
        return self._keys[i : i + 1]


def _number(key: str, text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise InputError(f"scenes: {key}={text} is not a whole number from {low} to {high}")
    return int(text)


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
