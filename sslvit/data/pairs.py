"""Images with text as question-answer turns: captions, LLaVA conversations, questions with answers, or scenes.

Knows nothing of tokens or prompts' markup; vlm/ makes model input of the turns. Every turn stands alone: the turns of
a conversation are separate questions about the same image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np

from sslvit.data.scene_text import FAMILIES
from sslvit.data.scenes import Scenes
from sslvit.data.sources import Source, open_source
from sslvit.data.turns import Turn
from sslvit.errors import InputError

__all__ = [
    "CAPTION_PROMPT",
    "FAMILY_ORDER",
    "Pairs",
    "Turn",
    "open_pairs",
    "parse_turns",
    "split_by_image",
    "text_corpus",
]

CAPTION_PROMPT = "Describe the image."
FAMILY_ORDER = (*FAMILIES, "question", "conversation", "caption")

_IMAGE_MARK = "<image>"


class Pairs:
    """Images of `source` with their turns, at least one each.

    rows: for every image the rows of the source that speak of it; its pixels come from the first.
    skipped: how many rows of the source had no usable text.
    """

    def __init__(
        self, source: Source, rows: Sequence[Sequence[int]], turns_of: Callable[[int], list[Turn]], skipped: int = 0
    ) -> None:
        self.source, self.rows, self.skipped = source, rows, skipped
        self.spec = source.spec
        self._turns_of = turns_of

    def __len__(self) -> int:
        return len(self.rows)

    def turns(self, i: int) -> list[Turn]:
        """All turns of image i, always in the same order."""
        return [turn for row in self.rows[i] for turn in self._turns_of(row)]

    def references(self, i: int) -> list[str]:
        """All captions of image i: what may be answered to CAPTION_PROMPT."""
        return [turn.answer for turn in self.turns(i) if turn.question == CAPTION_PROMPT]

    def name(self, i: int) -> str:
        """The name `source` gives the image."""
        return self.source.name(self.rows[i][0])

    def read(self, i: int) -> bytes | np.ndarray:
        """The raw image, as `Source.read` gives it."""
        return self.source.read(self.rows[i][0])

    def families(self, num_images: int = 200) -> list[str]:
        """Families among the first images, in the order of tables: questions first, captions last."""
        found = {turn.family for i in range(min(num_images, len(self))) for turn in self.turns(i)}
        return [name for name in FAMILY_ORDER if name in found] + sorted(found.difference(FAMILY_ORDER))

    def select(self, chosen: Iterable[int]) -> Pairs:
        """Only the images at these positions."""
        return Pairs(self.source, [self.rows[int(i)] for i in chosen], self._turns_of)


def open_pairs(spec: str) -> Pairs:
    """Pairs from any data spec whose images come with text; InputError when none do."""
    source = open_source(spec)
    if isinstance(source, Scenes):
        return Pairs(source, [(i,) for i in range(len(source))], _scene_turns(source))
    return pairs_of(source)


def pairs_of(source: Any) -> Pairs:
    """Pairs of a source with `has_text` and `text(i)`; rows without a complete question and answer are left out."""
    if not source.has_text:
        raise InputError(
            f"{source.spec}: images without text; align needs captions, conversations, or questions with answers"
        )
    usable = [i for i in range(len(source)) if parse_turns(source.text(i))]
    if not usable:
        raise InputError(f"{source.spec}: none of the {len(source)} rows has a caption, or a question with an answer")
    rows: Sequence[Sequence[int]] = [(i,) for i in usable]
    if source.spec.startswith("jsonl:"):  # there, and only there, a name is the image file, and rows may share it
        by_image: dict[str, list[int]] = {}
        for i in usable:
            by_image.setdefault(source.name(i), []).append(i)
        rows = list(by_image.values())
    return Pairs(source, rows, lambda i: parse_turns(source.text(i)), skipped=len(source) - len(usable))


def _scene_turns(scenes: Scenes) -> Callable[[int], list[Turn]]:
    return lambda i: scenes.caption_turns(i, CAPTION_PROMPT) + scenes.questions(i)


def parse_turns(text: Mapping[str, Any] | None) -> list[Turn]:
    """Turns of one row of text, in any of its forms; what is empty or malformed is left out.

    {"captions": [...]} | {"text": "..."} | {"question": q, "answer": a} (perhaps with "family" and "choices") |
    {"conversations": [{"from": "human", "value": "<image> q"}, {"from": "gpt", "value": a}, ...]} (LLaVA,
    arXiv:2304.08485); several forms may stand side by side.
    """
    if not text:
        return []
    captions = [*_strings(text.get("captions")), *_strings(text.get("text"))]
    turns = [_turn(CAPTION_PROMPT, caption, "caption") for caption in captions]
    family, choices = text.get("family") or "question", tuple(_strings(text.get("choices")))
    turns.append(_turn(text.get("question"), text.get("answer"), str(family), choices))
    turns.extend(_turn(asked, said, "conversation") for asked, said in _exchanges(text.get("conversations")))
    return [turn for turn in turns if turn is not None]


def _turn(question: Any, answer: Any, family: str, choices: tuple[str, ...] = ()) -> Turn | None:
    question, answer = _clean(question), _clean(answer)
    return Turn(question, answer, family, choices) if question and answer else None


def _exchanges(messages: Any) -> Iterator[tuple[Any, Any]]:
    """Each human message that an answer follows at once, with that answer."""
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        return
    for asked, said in pairwise(messages):
        if asked.get("from") in ("human", "user") and said.get("from") in ("gpt", "assistant"):
            yield asked.get("value"), said.get("value")


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [cleaned for item in values if (cleaned := _clean(item))]


def _clean(text: Any) -> str:
    """Text without image marks and outer blanks; a number as written; "" for what is no text."""
    if isinstance(text, bool):
        return "yes" if text else "no"
    if not isinstance(text, str | int | float) or text != text:
        return ""
    return str(text).replace(_IMAGE_MARK, "").strip()


def split_by_image(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """(train, val) with about `fraction` of the images in val, by a hash of (seed, name). Rows of one image stay
    together, and an image keeps its side when others are added. Both sides hold at least one image.
    """
    if not 0 < fraction < 1:
        raise InputError(f"val_fraction={fraction} is not between 0 and 1")
    names = [pairs.name(i) for i in range(len(pairs))]
    draws = np.array([_hash_fraction(seed, name) for name in names])
    in_val = draws < fraction
    if in_val.all() or not in_val.any():
        if len(set(names)) < 2:
            raise InputError(f"{pairs.spec}: one image cannot be split into train and val; give val_data")
        in_val = draws == draws.min() if not in_val.any() else draws < draws.max()
    return pairs.select(np.flatnonzero(~in_val)), pairs.select(np.flatnonzero(in_val))


def _hash_fraction(seed: int, name: str) -> float:
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def text_corpus(pairs: Pairs, limit: int) -> Iterator[str]:
    """At most `limit` strings "question answer", image after image in an order that is random but always the same."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(pairs))
    lines = (f"{turn.question} {turn.answer}" for i in order for turn in pairs.turns(int(i)))
    return islice(lines, limit)
