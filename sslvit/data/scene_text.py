"""Captions and questions about a scene, from its graph alone. Never reads pixels.

Questions are chosen so that their words do not tell the answer. Attribute and position are drawn independently of each
other, so most answers are uniform given the words; where they are not (counts, more or fewer, is there), each possible
answer of a template is asked about equally often: an answer that fewer scenes allow sets the rate of all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise, permutations
from typing import TypeVar

import numpy as np

from sslvit.data.scene_graph import (
    COLOUR_NAMES,
    SIZES,
    TEXT,
    SceneGraph,
    SceneObject,
    draw_attributes,
    is_novel,
    scene_keys,
    uniforms,
)
from sslvit.data.scene_shapes import SHAPES
from sslvit.data.turns import Turn

T = TypeVar("T")

FAMILIES = ("count", "colour", "shape", "size", "existence", "relation", "comparison")
MARGIN = 0.15  # of the image side: by how much centres differ along the axis a relation is asked about
MAX_COUNT = 3  # the largest answer to "how many red objects"

ATTRIBUTES = ("size", "colour", "shape")
_VALUES = {"size": SIZES, "colour": COLOUR_NAMES, "shape": SHAPES}
_PLURALS = {"cross": "crosses"}
_AXES = ((("left", "right"), "left or right of"), (("above", "below"), "above or below"))  # along x, along y
_NUMBERS = ("no", "one", "two", "three", "four", "five")


class _Draws:
    """The numbers of one scene's text, taken one after another."""

    def __init__(self, key: np.ndarray) -> None:
        self._numbers = iter(uniforms(key, TEXT, 160)[0].tolist())

    def chance(self) -> float:
        return next(self._numbers)

    def one_of(self, items: Sequence[T]) -> T:
        return items[int(next(self._numbers) * len(items))]

    def some_of(self, items: Sequence[T], num: int) -> list[T]:
        """At most `num` different ones, each equally likely."""
        left = list(items)
        taken: list[T] = []
        while left and len(taken) < num:
            taken.append(left.pop(int(next(self._numbers) * len(left))))
        return taken


# ---- words


def _noun(values: dict[str, str]) -> str:
    """{"colour": "red"} -> "red object"."""
    words = [values[name] for name in ("size", "colour") if name in values]
    return " ".join([*words, values.get("shape", "object")])


def _plural(values: dict[str, str]) -> str:
    shape = values.get("shape", "object")
    words = [values[name] for name in ("size", "colour") if name in values]
    return " ".join([*words, _PLURALS.get(shape, shape + "s")])


def _whole(one: SceneObject) -> str:
    return f"{one.size} {one.colour} {one.shape}"


def _listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _matches(one: SceneObject, values: dict[str, str]) -> bool:
    return all(getattr(one, name) == value for name, value in values.items())


# ---- captions


def captions(graph: SceneGraph) -> list[str]:
    """Phrasings of the whole scene, objects from left to right; the first is the plain list."""
    phrases = [f"a {_whole(one)}" for one in graph.objects]
    there = "is" if len(phrases) == 1 else "are"
    counted = _counted(len(phrases))
    return [_listed(phrases), f"{counted}: {', '.join(phrases)}", f"there {there} {counted}, {_listed(phrases)}"]


def caption_turns(graph: SceneGraph, prompt: str) -> list[Turn]:
    """The plain list, and longer descriptions, each with a prompt of its own so that it has one right answer."""
    plain, counted, _ = captions(graph)
    turns = [(prompt, plain), ("Count and list the objects.", counted), ("Where is each object?", _placed(graph))]
    if len(graph.objects) > 1:
        downwards = sorted(graph.objects, key=lambda one: one.centre[1])
        rows = _listed([f"a {_whole(one)}" for one in downwards])
        turns.append(("Describe the image from top to bottom.", rows))
    related = _related(graph)
    if related:
        turns.append(("How do the objects lie to each other?", related))
    return [Turn(question, answer, "caption") for question, answer in turns]


def _counted(number: int) -> str:
    return f"{_NUMBERS[number]} object{'s' if number > 1 else ''}"


def _placed(graph: SceneGraph) -> str:
    """Each object with the ninth of the image its centre lies in."""
    phrases = []
    for one in graph.objects:
        column, row = (min(2, int(3 * value / graph.image_size)) for value in one.centre)
        place = f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"
        phrases.append(f"a {_whole(one)} at the {place}")
    return _listed(phrases)


def _related(graph: SceneGraph) -> str:
    """From left to right, how each object lies to the next one; "" when fewer than two can be told apart."""
    named = [(one, name) for one in graph.objects if (name := _name(graph, one)) is not None]
    phrases = []
    for (one, name), (other, other_name) in pairwise(named):
        sides = [words[apart > 0] for words, _, apart in _sides(graph, one, other)]
        linked = " and ".join("left of" if side == "left" else side for side in sides)
        phrases.append(f"the {name} is {linked} the {other_name}")
    return _listed(phrases) if phrases else ""


def _sides(graph: SceneGraph, one: SceneObject, other: SceneObject) -> list[tuple[tuple[str, str], str, float]]:
    """The axes along which two objects are clearly apart: words for either side, the question's words, the distance."""
    found = []
    for axis, (words, linked) in enumerate(_AXES):
        apart = one.centre[axis] - other.centre[axis]
        if abs(apart) >= MARGIN * graph.image_size:
            found.append((words, linked, apart))
    return found


# ---- questions


def questions(graph: SceneGraph, key: np.ndarray, split: str, objects: tuple[int, int]) -> list[Turn]:
    """Questions of every family the scene allows, always the same for the same scene."""
    draws = _Draws(key)
    novel = split == "novel"
    return [
        *_count(graph, draws, novel, objects),
        *_attribute(graph, draws, "colour"),
        *_attribute(graph, draws, "shape"),
        *_attribute(graph, draws, "size"),
        *_existence(graph, draws, novel),
        *_relation(graph, draws),
        *_comparison(graph, draws, novel, objects),
    ]


def _count(graph: SceneGraph, draws: _Draws, novel: bool, objects: tuple[int, int]) -> list[Turn]:
    turns = []
    low, high = objects
    if low < high:
        every = tuple(str(number) for number in range(low, high + 1))
        turns.append(Turn("How many objects are there?", str(len(graph.objects)), "count", every))
    choices = tuple(str(number) for number in range(min(MAX_COUNT, high) + 1))
    for name in ATTRIBUTES if high > 1 else draws.some_of(ATTRIBUTES, 1):  # of one object, it only repeats "is there"
        counts = Counter(getattr(one, name) for one in graph.objects)
        allowed = _count_rates(name, novel, objects)
        for number in range(len(choices)):
            fitting = [value for value in _VALUES[name] if counts[value] == number]
            if fitting and draws.chance() < allowed[number]:
                question = f"How many {_plural({name: draws.one_of(fitting)})} are there?"
                turns.append(Turn(question, str(number), "count", choices))
    return turns


def _referring(graph: SceneGraph, one: SceneObject, names: Sequence[str]) -> list[dict[str, str]]:
    """Descriptions by some of the attributes `names` that fit this object and no other."""
    found = []
    for num in range(len(names) + 1):
        for chosen in combinations(names, num):
            values = {name: getattr(one, name) for name in chosen}
            if sum(_matches(other, values) for other in graph.objects) == 1:
                found.append(values)
    return found


def _attribute(graph: SceneGraph, draws: _Draws, asked: str) -> list[Turn]:
    """What colour (shape, size) is the one that ... ? Two at most."""
    others = [name for name in ATTRIBUTES if name != asked]
    pairs = [(one, values) for one in graph.objects for values in _referring(graph, one, others)]
    turns = []
    for one, values in draws.some_of(pairs, 2):
        question = f"What {asked} is the {_noun(values)}?"
        turns.append(Turn(question, getattr(one, asked), asked, _VALUES[asked]))
    return turns


_SOUGHT: tuple[tuple[str, ...], ...] = (
    ("colour",),
    ("shape",),
    ("colour", "shape"),
    ("size", "shape"),
    ("size", "colour"),
)


def _existence(graph: SceneGraph, draws: _Draws, novel: bool) -> list[Turn]:
    """Two kinds of thing, for each one that is there and one that is not."""
    turns = []
    for names in draws.some_of(_SOUGHT, 2):
        present = sorted({tuple(getattr(one, name) for name in names) for one in graph.objects})
        absent = [values for values in _possible(names, novel) if values not in present]
        near = [values for values in absent if any(set(values) & set(there) for there in present)]
        if near and draws.chance() < 0.5:
            absent = near
        for answer, values in (("yes", draws.one_of(present)), ("no", draws.one_of(absent))):
            noun = _noun(dict(zip(names, values, strict=True)))
            turns.append(Turn(f"Is there a {noun}?", answer, "existence", ("yes", "no")))
    return turns


@cache
def _possible(names: tuple[str, ...], novel: bool) -> list[tuple[str, ...]]:
    """Values of these attributes that occur in the split."""
    if names == ("colour", "shape"):
        pairs = ((s, c) for s in range(len(SHAPES)) for c in range(len(COLOUR_NAMES)) if is_novel(s, c) == novel)
        return [(COLOUR_NAMES[c], SHAPES[s]) for s, c in pairs]
    if len(names) == 1:
        return [(value,) for value in _VALUES[names[0]]]
    first, second = names
    return [(a, b) for a in _VALUES[first] for b in _VALUES[second]]


def _name(graph: SceneGraph, one: SceneObject) -> str | None:
    """The way relations speak of an object: "red star", with its size only where that is needed; None for a twin."""
    for names in (("colour", "shape"), ATTRIBUTES):
        values = {name: getattr(one, name) for name in names}
        if sum(_matches(other, values) for other in graph.objects) == 1:
            return _noun(values)
    return None


def _named_pairs(graph: SceneGraph, draws: _Draws) -> list[tuple[SceneObject, str, SceneObject, str]]:
    """Every pair of objects that can be spoken of, in random order within the pair and among the pairs."""
    named = [(one, name) for one in graph.objects if (name := _name(graph, one)) is not None]
    pairs = []
    for (one, name), (other, other_name) in draws.some_of(list(combinations(named, 2)), 10):
        pairs.append((one, name, other, other_name) if draws.chance() < 0.5 else (other, other_name, one, name))
    return pairs


def _relation(graph: SceneGraph, draws: _Draws) -> list[Turn]:
    """Left or right, above or below, where the centres are clearly apart. Three at most."""
    turns = []
    for one, name, other, other_name in _named_pairs(graph, draws):
        for words, linked, apart in _sides(graph, one, other):
            question = f"Is the {name} {linked} the {other_name}?"
            turns.append(Turn(question, words[apart > 0], "relation", words))
    return draws.some_of(turns, 3)


def _comparison(graph: SceneGraph, draws: _Draws, novel: bool, objects: tuple[int, int]) -> list[Turn]:
    """More, fewer or as many of one kind as of another; larger or smaller."""
    turns = []
    for name in ("colour", "shape"):
        counts = Counter(getattr(one, name) for one in graph.objects)
        allowed = _comparison_rates(name, novel, objects)
        for answer in ("more", "fewer", "same"):
            fitting = [(a, b) for a, b in permutations(_VALUES[name], 2) if _compare(counts[a], counts[b]) == answer]
            if fitting and draws.chance() < allowed[answer]:
                a, b = draws.one_of(fitting)
                first, second = _plural({name: a}), _plural({name: b})
                question = f"Are there more, fewer or the same number of {first} as {second}?"
                turns.append(Turn(question, answer, "comparison", ("more", "fewer", "same")))
    sizes = []
    for one, first, other, second in _named_pairs(graph, draws):
        if one.size != other.size:
            answer = "larger" if one.size == "large" else "smaller"
            question = f"Is the {first} larger or smaller than the {second}?"
            if not first.startswith(SIZES) and not second.startswith(SIZES):
                sizes.append(Turn(question, answer, "comparison", ("larger", "smaller")))
    return turns + draws.some_of(sizes, 1)


def _compare(a: int, b: int) -> str | None:
    """None for two counts that are not worth comparing: a single object against none is a question of existence."""
    if a + b < 2:
        return None
    return "same" if a == b else "more" if a > b else "fewer"


# ---- how often each answer may be asked about, so that none stands out


@cache
def _sample_counts(name: str, novel: bool, objects: tuple[int, int]) -> np.ndarray:
    """(n, values): how many objects of each value 20,000 scenes of this kind hold."""
    split = "novel" if novel else "train"
    drawn = draw_attributes(scene_keys(0, split, np.arange(20_000)), split, objects)
    column = getattr(drawn, name)
    present = np.arange(column.shape[1]) < drawn.num_objects[:, None]
    return np.stack([((column == value) & present).sum(axis=1) for value in range(len(_VALUES[name]))], axis=1)


def _equalised(feasible: list[float]) -> list[float]:
    """Chances of asking, given how many scenes allow each answer, such that every answer is asked equally often."""
    rarest = min(feasible)
    return [rarest / share if share else 0.0 for share in feasible]


@cache
def _count_rates(name: str, novel: bool, objects: tuple[int, int]) -> list[float]:
    counts = _sample_counts(name, novel, objects)
    top = min(MAX_COUNT, objects[1])
    return _equalised([float((counts == number).any(axis=1).mean()) for number in range(top + 1)])


@cache
def _comparison_rates(name: str, novel: bool, objects: tuple[int, int]) -> dict[str, float]:
    counts = np.sort(_sample_counts(name, novel, objects), axis=1)[:, ::-1]
    equal = (counts[:, :-1] == counts[:, 1:]) & (counts[:, 1:] > 0)
    more, same = float((counts[:, 0] >= 2).mean()), float(equal.any(axis=1).mean())
    rates = _equalised([more, more, same])
    return dict(zip(("more", "fewer", "same"), rates, strict=True))
