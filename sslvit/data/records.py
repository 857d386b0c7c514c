"""What stands beside an image in a row of a tar, Parquet or jsonl file: its labels and its text.

It makes no questions and no prompts of them (pairs.py does).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
    """The labels of a row: `label`, or a dict `labels` of several."""
    several = record.get("labels")
    if isinstance(several, Mapping):
        return dict(several)
    return {"label": record["label"]} if record.get("label") is not None else {}


def parse_record(data: bytes) -> dict[str, Any] | None:
    """A JSON object, or None for anything else."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def number_labels(values: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """Labels as int64 (n,), -1 where there is none, and the class names (empty when the labels are numbers already).

    Strings are numbered in sorted order. Numbers with a fraction come back as float64, for regression.
    """
    present = [value for value in values if value is not None]
    if all(isinstance(value, int | np.integer) for value in present):
        return np.array([-1 if value is None else int(value) for value in values], np.int64), []
    if all(isinstance(value, int | float | np.number) for value in present):
        numbers = np.array([math.nan if value is None else float(value) for value in values], np.float64)
        whole = np.nan_to_num(numbers, nan=-1.0)
        return (whole.astype(np.int64), []) if np.all(whole == np.rint(whole)) else (numbers, [])
    names = sorted({str(value) for value in present})
    number = {name: label for label, name in enumerate(names)}
    return np.array([-1 if value is None else number[str(value)] for value in values], np.int64), names
