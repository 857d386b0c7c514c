"""Labels from a CSV file, for images whose set has none: classes, several classes at once, or numbers. No images here.

The first column names the image: its name in the set, or the file name without folders. Every other column is one
label: words or whole numbers are classes, `a|b|c` are several classes at once (multi-label), numbers with a decimal
point are regression targets. An empty cell is unknown.
"""

from __future__ import annotations

import csv
from pathlib import Path, PurePosixPath

import numpy as np

from sslvit.data.sources import Source
from sslvit.errors import InputError
from sslvit.probes.features import own_fingerprint

Labels = tuple[dict[str, np.ndarray], dict[str, list[str]]]


class Labelled:
    """A source with other labels: name -> (n,) int64 classes (-1 unknown), (n,) float64, or (n, C) int64 of 0 and 1."""

    def __init__(self, source: Source, labels: dict[str, np.ndarray], class_names: dict[str, list[str]]) -> None:
        self._source = source
        self.labels, self.class_names = labels, class_names
        self.spec, self.has_text = source.spec, source.has_text

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """As the source."""
        return self._source.name(index)

    def read(self, index: int) -> bytes | np.ndarray:
        """As the source."""
        return self._source.read(index)

    def text(self, index: int) -> dict[str, object] | None:
        """As the source."""
        return self._source.text(index)

    def fingerprint(self) -> str:
        """As the source: features depend on the images alone."""
        return own_fingerprint(self._source)


def read_label_file(file: str | Path) -> tuple[dict[str, list[str]], list[str]]:
    """(name of the image -> its cells, names of the labels). InputError naming file and line."""
    rows: dict[str, list[str]] = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle)
            header = next(reader, [])
            if len(header) < 2:
                raise InputError(f"{file}: the header needs a column of image names and at least one label")
            for row in reader:
                if len(row) != len(header) and row:
                    raise InputError(f"{file}, line {reader.line_num}: {len(row)} cells, the header has {len(header)}")
                if row:
                    rows[row[0].strip()] = [cell.strip() for cell in row[1:]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read as CSV ({error})") from error
    return rows, [name.strip() for name in header[1:]]


def with_label_file(source: Source, file: str | Path) -> Labelled:
    """`source` with the labels of a CSV file. InputError when no image of the source is named in it."""
    rows, names = read_label_file(file)
    found = [_row_of(source.name(i), rows) for i in range(len(source))]
    if not any(row is not None for row in found):
        raise InputError(
            f"{file} names no image of {source.spec} (for example {source.name(0)}); check the first column"
        )
    labels: dict[str, np.ndarray] = {}
    class_names: dict[str, list[str]] = {}
    for column, name in enumerate(names):
        every = {row[column] for row in rows.values()} - {""}
        cells = ["" if row is None else row[column] for row in found]
        labels[name], known = _column(cells, every)
        if known:
            class_names[name] = known
    return Labelled(source, labels, class_names)


def _row_of(name: str, rows: dict[str, list[str]]) -> list[str] | None:
    return rows.get(name) or rows.get(PurePosixPath(name).name)


def _column(cells: list[str], every: set[str]) -> tuple[np.ndarray, list[str]]:
    """The values of one label and its class names; `every` holds all cells of the file, so that sets agree."""
    if any("|" in cell for cell in every):
        known = sorted({part for cell in every for part in cell.split("|") if part})
        present = np.array([[int(name in cell.split("|")) for name in known] for cell in cells], dtype=np.int64)
        present[[cell == "" for cell in cells]] = -1
        return present, known
    if every and any("." in cell for cell in every) and all(_is_number(cell) for cell in every):
        return np.array([float(cell) if cell else np.nan for cell in cells]), []
    known = sorted(every, key=lambda cell: (not cell.isdecimal(), int(cell) if cell.isdecimal() else 0, cell))
    place = {name: number for number, name in enumerate(known)}
    return np.array([place.get(cell, -1) for cell in cells], dtype=np.int64), known


def _is_number(cell: str) -> bool:
    try:
        return np.isfinite(float(cell)).item()
    except ValueError:
        return False
