"""One question and its answer about one image. Not a conversation: turns of an image never see each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """`family` is what it tests ("count", "caption", ...); `choices` all possible answers, when they are few."""

    question: str
    answer: str
    family: str
    choices: tuple[str, ...] = ()
