"""What stands beside an image in a row of a tar, Parquet or jsonl file: its labels and its text.

It makes no questions and no prompts of them (pairs.py does).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

UNKNOWN = -1  # in place of a class: the image has no label
CAPTION_KEYS = ("captions", "caption", "text", "sentences", "texts")
_DIALOGUE_KEYS = ("conversations", "question", "answer", "choices", "family")


def image_of(record: Mapping[str, Any]) -> str | None:
    """The path of a row's image, under `image` (or `file_name`, as in HF image folders); None when there is none."""
    image = record.get("image", record.get("file_name"))
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    return image if isinstance(image, str) and image else None


def text_of(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Any of `captions` (list of str), `conversations`, `question` + `answer` in a row; None when there is no text."""
    text: dict[str, Any] = {}
    captions: list[str] = []
    for key in sorted(record, key=_caption_order):
        if _caption_order(key)[0] < len(CAPTION_KEYS):
            captions += _strings(record[key])
    if captions:
        text["captions"] = captions
    if record.get("conversations") or (record.get("question") and record.get("answer") is not None):
        text.update({key: record[key] for key in _DIALOGUE_KEYS if record.get(key) is not None})
    return text or None


def is_text_key(key: str) -> bool:
    """Whether a column of this name is read by `text_of`."""
    return _caption_order(key)[0] < len(CAPTION_KEYS) or key in _DIALOGUE_KEYS


def _caption_order(key: str) -> tuple[int, str]:
    """`caption_0`, `caption_1` ... count as captions, in order."""
    stem = key.rstrip("0123456789").rstrip("_")
    return (CAPTION_KEYS.index(stem) if stem in CAPTION_KEYS else len(CAPTION_KEYS), key)


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [item.strip() for item in values if isinstance(item, str) and item.strip()]


def labels_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The labels of a row: `label`, or `labels`: a dict of several, or a list of classes."""
    several = record.get("labels")
    if isinstance(several, Mapping):
        return dict(several)
    if record.get("label") is not None:
        return {"label": record["label"]}
    return {"label": several} if isinstance(several, list) else {}


def parse_record(data: bytes) -> dict[str, Any] | None:
    """A JSON object, or None for anything else."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def number_columns(
    columns: Mapping[str, Sequence[Any]], spec: str
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Labels and class names of a source from its columns; what can be no label is left out with a warning."""
    labels, class_names = {}, {}
    for name, values in columns.items():
        numbered = number_labels(values)
        if numbered is None:
            logger.warning("%s: %s is left out of the labels, it holds no numbers, words or lists of them", spec, name)
            continue
        labels[name], names = numbered
        if names:
            class_names[name] = names
    return labels, class_names


def number_labels(values: Sequence[Any]) -> tuple[np.ndarray, list[str]] | None:
    """One label of n images: values and class names ([] when the values are numbers already); None for what is none.

    Whole numbers: int64 (n,), -1 where there is none. Numbers with a decimal point: float64 (n,), NaN where there is
    none; whether they mean classes, one set alone cannot tell (see `as_classes`). Words: int64 in their sorted order.
    Lists: int8 (n, C) of 0 and 1, a row of -1 where there is none.
    """
    present = [value for value in values if value is not None]
    if any(isinstance(value, list | tuple | np.ndarray) for value in present):
        return _number_sets(values)
    if not all(isinstance(value, str | int | float | np.number | np.bool_) for value in present):
        return None
    if all(_is_whole(value) and abs(int(value)) < 2**63 for value in present):
        return np.array([UNKNOWN if value is None else int(value) for value in values], np.int64), []
    if not any(isinstance(value, str) for value in present) and not all(_is_whole(value) for value in present):
        return np.array([math.nan if value is None else float(value) for value in values], np.float64), []
    names = sorted({str(value) for value in present})
    number = {name: label for label, name in enumerate(names)}
    return np.array([-1 if value is None else number[str(value)] for value in values], np.int64), names


def _number_sets(values: Sequence[Any]) -> tuple[np.ndarray, list[str]] | None:
    """Several classes at once: lists of names or numbers, or rows of 0 and 1, one for each class."""
    rows = [
        value if value is None else list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
        for value in values
    ]
    held = [row for row in rows if row is not None]
    if not all(isinstance(item, str) or _is_whole(item) for row in held for item in row):
        return None
    if _are_flags(held):
        names = [str(place) for place in range(len(held[0]))]
        flags = [[-1] * len(names) if row is None else [int(item) for item in row] for row in rows]
        return np.array(flags, np.int8), names
    said = [None if row is None else {_name_of(item) for item in row} for row in rows]
    if not any(held):
        return None
    names = _in_order(set().union(*(row for row in said if row is not None)))
    place = {name: column for column, name in enumerate(names)}
    present = np.zeros((len(rows), len(names)), np.int8)
    for line, row in zip(present, said, strict=True):
        line[...] = -1 if row is None else 0
        line[[place[name] for name in row or ()]] = 1
    return present, names


def _are_flags(rows: Sequence[Sequence[Any]]) -> bool:
    """Whether lists are rows of 0 and 1, one for each class: of one length, and with repeats no list of classes has."""
    flags = all(_is_whole(item) and item in (0, 1) for row in rows for item in row)
    return flags and len({len(row) for row in rows}) == 1 and any(len(set(row)) < len(row) for row in rows)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer | np.bool_)


def _name_of(item: Any) -> str:
    return item if isinstance(item, str) else str(int(item))


def _in_order(names: Iterable[str]) -> list[str]:
    """Sorted, whole numbers first and by their size."""
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def as_classes(values: np.ndarray) -> np.ndarray:
    """Whole numbers as int64, -1 where there is none (tables with gaps keep classes as floats); others as given."""
    if values.dtype.kind != "f":
        return values
    known = values[~np.isnan(values)]
    if not np.all((known == np.rint(known)) & (np.abs(known) < 2**53)):
        return values
    return np.where(np.isnan(values), -1.0, values).astype(np.int64)


def is_known(values: np.ndarray) -> np.ndarray:
    """(n,) bool: is the label of the image known?"""
    if values.dtype.kind == "f":
        return np.isfinite(values)
    return values.min(axis=1) >= 0 if values.ndim == 2 else values != UNKNOWN


def number_in_text(text: str) -> int | float | str:
    """`7` and `0.5` as numbers, everything else as it is."""
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) else text
