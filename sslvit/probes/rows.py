"""Rows of results: one number with its interval and its protocol. Not the place where anything is measured.

A row is `{"name", "value", "ci95", "protocol", "data", "seed", "step"}`; `results.json` is a list of them, one per
(name, data, seed). Intervals are percentile bootstraps over the validation images (Efron & Tibshirani 1993, ch. 13).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sslvit.errors import InputError

try:  # not on Windows: there the last writer of one results.json wins
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]

NUM_RESAMPLES = 2000


def row(
    name: str,
    value: float,
    *,
    ci95: tuple[float, float] | None,
    protocol: str,
    data: str,
    seed: int,
    step: int | None = None,
) -> Row:
    """One entry of results.json. `value` is a fraction 0..1 where the measure is one; `ci95` (low, high) or None."""
    interval = None if ci95 is None else [float(ci95[0]), float(ci95[1])]
    return {
        "name": name,
        "value": float(value),
        "ci95": interval,
        "protocol": protocol,
        "data": data,
        "seed": seed,
        "step": step,
    }


def describe(protocol: str, **facts: object) -> str:
    """The protocol printed with a number: its words, the facts it ran on, and a hash of both.

    Two rows whose strings end in the same hash were measured alike, on sets of the same size.
    """
    text = "; ".join([protocol, *(f"{key} {value}" for key, value in facts.items() if value is not None)])
    return f"{text} #{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def bootstrap_ci(scores: np.ndarray, seed: int, num_resamples: int = NUM_RESAMPLES) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `scores` (n,), one score per validation image.

    Drawing n images with replacement gives each distinct score a multinomial count, so the cost follows the number of
    distinct scores (two for right and wrong), not n.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.size == 0:
        raise InputError("no validation image has a score; give a validation set with at least one labelled image")
    values, counts = np.unique(scores, return_counts=True)
    generator = np.random.default_rng([seed, scores.size])
    num_chunks = max(1, values.size * num_resamples // 20_000_000)
    means = [
        generator.multinomial(scores.size, counts / scores.size, size=len(chunk)) @ values / scores.size
        for chunk in np.array_split(np.empty(num_resamples), num_chunks)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def merge_rows(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`old` with every row of `new` added, or put in the place of the row with the same (name, data, seed)."""
    merged = {(entry["name"], entry["data"], entry["seed"]): entry for entry in old}
    merged.update({(entry["name"], entry["data"], entry["seed"]): entry for entry in new})
    return list(merged.values())


def add_results(file: Path, rows: Sequence[Row]) -> None:
    """Merge `rows` into `file` (a results.json, made if missing): atomic, and safe beside other writers of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(file.with_name(f".{file.name}.lock")):
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(json.dumps(merge_rows(read_results(file), rows), indent=1) + "\n")
        os.replace(partial, file)


def read_results(file: Path) -> list[Row]:
    """The rows of a results.json; none when the file does not exist. InputError when it is not such a list."""
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}); move it away and run again") from error
    if not isinstance(rows, list) or not all(isinstance(entry, dict) and "name" in entry for entry in rows):
        raise InputError(f"{file} is not a list of result rows; move it away and run again")
    return rows


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Hold an advisory lock on `lock` (same machine and most shared file systems)."""
    with lock.open("w") as handle:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: last writer wins
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
