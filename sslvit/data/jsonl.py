"""`jsonl:FILE`: one JSON object a line, `image` (a path relative to the file) with labels and text beside it.

Paths that lead outside the file's folder are refused, unless `?root=FOLDER` allows another one.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np

from sslvit.data.bad_files import BadImage
from sslvit.data.files import Names, OpenFiles, expand, file_key, read_regular_file
from sslvit.data.records import image_of, labels_of, number_columns, parse_record, text_of
from sslvit.errors import InputError


class JsonlSource:
    """The lines that name an image, in order; `skipped` says which others were left out."""

    def __init__(self, path: str, root: str | None = None) -> None:
        self.spec = f"jsonl:{path}" + (f"?root={root}" if root else "")
        files = expand(path, (".jsonl",))
        self._keys = [file_key(file) for file in files]
        self._files = OpenFiles(files)
        folders = [os.path.dirname(os.path.abspath(file)) for file in files]
        self._roots = [os.path.abspath(os.fsencode(root)) if root else folder for folder in folders]
        self.skipped: list[str] = []
        self._read_lines()
        if not len(self):
            raise InputError(f'no line of {path!r} names an image; expected {{"image": "photo.jpg", ...}} on each')
        self.has_text = any(self.text(index) for index in range(min(10, len(self))))

    def __len__(self) -> int:
        return len(self._lines)

    def name(self, index: int) -> str:
        """The path as the line gives it."""
        return os.fsdecode(self._images[index])

    def read(self, index: int) -> bytes:
        """The bytes of the file; BadImage when it cannot be read or a link leads it outside."""
        root = self._roots[int(self._lines[index, 0])]
        path = os.path.join(root, self._images[index])
        if not _is_inside(os.path.realpath(path), os.path.realpath(root)):
            raise BadImage(f"leads outside {os.fsdecode(root)}; allow its folder with ?root=")
        return read_regular_file(path)

    def text(self, index: int) -> dict[str, Any] | None:
        """The text of the line."""
        file, offset, size = (int(number) for number in self._lines[index])
        return text_of(parse_record(self._files.read(file, offset, size)) or {})

    def fingerprint(self) -> str:
        """Changes when the file is rewritten (not when an image behind it is)."""
        return hashlib.sha256(repr((self._keys, self._roots)).encode()).hexdigest()

    def _read_lines(self) -> None:
        lines: list[tuple[int, int, int]] = []
        images: list[bytes] = []
        labels: list[dict[str, Any]] = []
        for file, path in enumerate(self._files.paths):
            offset = 0
            with open(path, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    record = parse_record(line) if line.strip() else None
                    image = self._image_of(record, os.fsdecode(path), number) if line.strip() else None
                    if image is not None:
                        lines.append((file, offset, len(line)))
                        images.append(image)
                        labels.append(labels_of(record or {}))
                    offset += len(line)
        self._lines = np.array(lines, np.int64).reshape(len(lines), 3)
        self._images = Names.of(images)
        keys = sorted({key for row in labels for key in row})
        columns = {key: [row.get(key) for row in labels] for key in keys}
        self.labels, self.class_names = number_columns(columns, self.spec)

    def _image_of(self, record: dict[str, Any] | None, path: str, number: int) -> bytes | None:
        """The image path of a line, checked without touching the disk; None for a line without one."""
        if record is None:
            raise InputError(f"line {number} of {path!r} is no JSON object")
        image = image_of(record)
        if image is None:
            self.skipped.append(f"line {number} of {path}: no image")
            return None
        root = self._roots[self._files.paths.index(os.fsencode(path))]
        if "\0" in image or not _is_inside(os.path.normpath(os.path.join(root, os.fsencode(image))), root):
            raise InputError(
                f"line {number} of {path!r}: the image {image!r} lies outside {os.fsdecode(root)!r}; "
                "move it inside, or allow its folder with ?root=FOLDER"
            )
        return os.fsencode(image)


def _is_inside(path: bytes, root: bytes) -> bool:
    return path.startswith(root.rstrip(b"/") + b"/")
