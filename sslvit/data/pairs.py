"""Images with text as question-answer turns: captions, LLaVA conversations, questions with answers, or scenes.

Knows nothing of tokens or prompts' markup; vlm/ turns the turns into model input. Every turn stands alone: the turns of a
conversation are separate questions about the same image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sslvit.data.scene_text import FAMILIES
from sslvit.data.scenes import Scenes
from sslvit.data.sources import Source, open_source
from sslvit.data.turns import Turn
from sslvit.errors import InputError

__all__ = ["CAPTION_PROMPT", "FAMILY_ORDER", "Pairs", "Turn", "open_pairs", "parse_turns", "split_by_image", "text_corpus"]

CAPTION_PROMPT = "Describe the image."
FAMILY_ORDER = (*FAMILIES, "question", "conversation", "caption")

_IMAGE_MARK = "<image>"


class Pairs:
    """The images of `source` at `indices` (n,), each with at least one turn. `skipped` counts rows without usable text."""

    def __init__(
        self, source: Source, indices: np.ndarray, turns_of: Callable[[int], list[Turn]], skipped: int = 0
    ) -> None:
        self.source, self.indices, self.skipped = source, indices, skipped
        self._turns_of = turns_of

    def __len__(self) -> int:
        return len(self.indices)

    def turns(self, i: int) -> list[Turn]:
        """All turns of image i of these pairs, always in the same order."""
        return self._turns_of(int(self.indices[i]))

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))

    def read(self, i: int) -> bytes | np.ndarray:
        """The raw image, as `Source.read` gives it."""
        return self.source.read(int(self.indices[i]))

    def families(self, num_images: int = 200) -> list[str]:
        """Families among the first images, in the order of tables: questions first, captions last."""
        found = {turn.family for i in range(min(num_images, len(self))) for turn in self.turns(i)}
        return [name for name in FAMILY_ORDER if name in found] + sorted(found.difference(FAMILY_ORDER))

    def select(self, chosen: np.ndarray | Sequence[int]) -> Pairs:
        """Only the images at these positions."""
        return Pairs(self.source, self.indices[np.asarray(chosen, dtype=np.int64)], self._turns_of)


def open_pairs(spec: str) -> Pairs:
    """Pairs from any data spec whose images come with text; InputError when none do."""
    source = open_source(spec)
    if isinstance(source, Scenes):
        return Pairs(source, np.arange(len(source)), _scene_turns(source))
    return pairs_of(source)


def pairs_of(source: Any) -> Pairs:
    """Pairs of a source with `has_text` and `text(i)`; rows without a complete question and answer are left out."""
    if not getattr(source, "has_text", False):
        raise InputError(
            f"{source.spec}: images without text; align needs captions, conversations, or questions with answers"
        )
    usable = np.array([i for i in range(len(source)) if parse_turns(source.text(i))], dtype=np.int64)
    if not len(usable):
        raise InputError(f"{source.spec}: none of the {len(source)} rows has a question with an answer, or a caption")
    return Pairs(source, usable, lambda i: parse_turns(source.text(i)), skipped=len(source) - len(usable))


def _scene_turns(scenes: Scenes) -> Callable[[int], list[Turn]]:
    return lambda i: scenes.caption_turns(i, CAPTION_PROMPT) + scenes.questions(i)


def parse_turns(text: Mapping[str, Any] | None) -> list[Turn]:
    """Turns of one row of text, in any of its forms; what is empty or malformed is left out.

    {"captions": [...]} | {"text": "..."} | {"question": q, "answer": a} | {"conversations": [{"from": "human", "value":
    "<image>\\nq"}, {"from": "gpt", "value": a}, ...]} (LLaVA, arXiv:2304.08485); several forms may stand side by side.
    """
    if not text:
        return []
    captions = text.get("captions") or []
    turns = [(CAPTION_PROMPT, caption, "caption") for caption in ([captions] if isinstance(captions, str) else captions)]
    turns.append((CAPTION_PROMPT, text.get("text"), "caption"))
    turns.append((text.get("question"), text.get("answer"), text.get("family") or "question"))
    turns.extend((asked, said, "conversation") for asked, said in _exchanges(text.get("conversations") or []))
    cleaned = [(_clean(question), _clean(answer), str(family)) for question, answer, family in turns]
    return [Turn(question, answer, family) for question, answer, family in cleaned if question and answer]


def _exchanges(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, Any]]:
    """Each human message that an answer follows at once, with that answer."""
    for asked, said in zip(messages, messages[1:], strict=False):
        if asked.get("from") in ("human", "user") and said.get("from") in ("gpt", "assistant"):
            yield asked.get("value"), said.get("value")


def _clean(text: Any) -> str:
    """Text without image marks and outer blanks; "" for what is no text."""
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        return ""
    return str(text).replace(_IMAGE_MARK, "").strip()


def split_by_image(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """(train, val) with about `fraction` of the images in val, by a hash of (seed, name): rows of one image stay together,
    and an image keeps its side when others are added. Both sides hold at least one image.
    """
    if not 0 < fraction < 1:
        raise InputError(f"val_fraction={fraction} is not between 0 and 1")
    names = [pairs.name(i) for i in range(len(pairs))]
    draws = np.array([_hash_fraction(seed, name) for name in names])
    in_val = draws < fraction
    if in_val.all() or not in_val.any():
        if len(set(names)) < 2:
            raise InputError(f"{pairs.source.spec}: one image cannot be split into train and val; give val_data")
        in_val = draws == draws.min() if not in_val.any() else draws < draws.max()
    return pairs.select(np.flatnonzero(~in_val)), pairs.select(np.flatnonzero(in_val))


def _hash_fraction(seed: int, name: str) -> float:
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def text_corpus(pairs: Pairs, limit: int) -> Iterator[str]:
    """At most `limit` strings "question answer", from images spread evenly over the set."""
    left = limit
    stride = max(1, len(pairs) * 4 // max(1, limit))
    for start in range(stride):
        for i in range(start, len(pairs), stride):
            for turn in pairs.turns(i):
                if left <= 0:
                    return
                left -= 1
                yield f"{turn.question} {turn.answer}"
