"""`parquet:GLOB`: HF-style tables, an image column (struct of bytes and path, or plain bytes), labels and text beside.

Row groups are read as needed and kept: all of them when the images take up to 2 GiB, else the last few.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sslvit.data.bad_files import BadImage
from sslvit.data.files import expand, file_key
from sslvit.data.kept import Kept
from sslvit.data.order import Blocks
from sslvit.data.records import is_text_key, number_columns, text_of
from sslvit.errors import InputError

WHOLE_BYTES = 2 << 30
KEPT_BYTES = 512 << 20
_IMAGE_NAMES = ("image", "img", "images", "jpg", "png", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "cls", "class", "target")


class ParquetSource:
    """Rows of Parquet files, in the order of the files.

    Labels are the columns that the HF metadata call ClassLabel, or named label, labels, cls, class, target, or *_label;
    a single one is `labels["label"]`, several keep their names.
    """

    def __init__(self, pattern: str) -> None:
        self.spec = f"parquet:{pattern}"
        self._paths = expand(pattern, (".parquet",))
        self._keys = [file_key(path) for path in self._paths]
        self._metadata = [_open(path).metadata for path in self._paths]
        schema = self._metadata[0].schema.to_arrow_schema()
        features = _features(schema)
        self._image, self._has_paths = _image_column(schema, features, pattern)
        self._text_columns = [name for name in schema.names if is_text_key(name) and name != self._image]
        self._groups = [
            (file, group) for file, meta in enumerate(self._metadata) for group in range(meta.num_row_groups)
        ]
        sizes = [self._metadata[file].row_group(group).num_rows for file, group in self._groups]
        self._group_ends = np.cumsum(sizes, dtype=np.int64)
        self._kept: Kept[Any] = Kept(self._limit())
        self._handles = threading.local()
        if not len(self):
            raise InputError(f"no rows in the Parquet files of {pattern!r}")
        self.labels, self.class_names = self._read_labels(schema, features)
        self.has_text = bool(self._text_columns) and any(self.text(index) for index in range(min(10, len(self))))

    def __len__(self) -> int:
        return int(self._group_ends[-1]) if len(self._group_ends) else 0

    def name(self, index: int) -> str:
        """The image's path in the table where it has one, else `file.parquet/row`."""
        group, row = self._locate(index)
        if self._has_paths:
            path = self._column(group, "path")[row].as_py()
            if path:
                return str(path)
        file = self._groups[group][0]
        rows_before = sum(meta.num_rows for meta in self._metadata[:file])
        return f"{os.fsdecode(os.path.basename(self._paths[file]))}/{index - rows_before}"

    def read(self, index: int) -> bytes:
        """The bytes of the image file; BadImage when the row holds none."""
        group, row = self._locate(index)
        try:
            data = self._column(group, "bytes")[row].as_py()
        except (OSError, pa.ArrowException) as error:
            raise BadImage(f"cannot read the row group: {str(error).splitlines()[0]}") from error
        if data is None:
            raise BadImage("the row holds no image bytes")
        return bytes(data)

    def text(self, index: int) -> dict[str, Any] | None:
        """The text of the row."""
        if not self._text_columns:
            return None
        group, row = self._locate(index)
        table = self._kept.get((group, "text"), lambda: self._read_group(group, self._text_columns))
        return text_of({name: table[name][row].as_py() for name in self._text_columns})

    def blocks(self) -> Blocks | None:
        """Row groups, where they do not all stay in memory; a window of them takes up to half of what does."""
        if self._limit() == WHOLE_BYTES:
            return None
        largest = max(self._metadata[file].row_group(group).total_byte_size for file, group in self._groups)
        return Blocks(self._group_ends, max(1, KEPT_BYTES // 2 // max(1, largest)))

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or rewritten."""
        return hashlib.sha256(repr(self._keys).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_kept", "_handles")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept = Kept(self._limit())
        self._handles = threading.local()

    def _locate(self, index: int) -> tuple[int, int]:
        """(row group, row in it)."""
        group = int(np.searchsorted(self._group_ends, index, side="right"))
        return group, int(index - (self._group_ends[group - 1] if group else 0))

    def _limit(self) -> int:
        total = sum(
            meta.row_group(group).total_byte_size for meta in self._metadata for group in range(meta.num_row_groups)
        )
        return WHOLE_BYTES if total <= WHOLE_BYTES else KEPT_BYTES

    def _column(self, group: int, part: str) -> pa.ChunkedArray:
        """The bytes or the paths of the images of a row group."""
        return self._kept.get((group, part), lambda: self._read_images(group, part))

    def _read_images(self, group: int, part: str) -> pa.ChunkedArray:
        name = f"{self._image}.{part}" if self._has_paths else self._image
        column = self._read_group(group, [name]).column(0)
        return pa.chunked_array([chunk.flatten()[0] for chunk in column.chunks]) if self._has_paths else column

    def _read_group(self, group: int, columns: list[str]) -> pa.Table:
        file, number = self._groups[group]
        handles = self._handles.__dict__.setdefault("open", {})  # a ParquetFile serves one thread at a time
        if file not in handles:
            handles[file] = pq.ParquetFile(os.fsdecode(self._paths[file]), metadata=self._metadata[file])
        return handles[file].read_row_group(number, columns=columns, use_threads=False)

    def _read_labels(self, schema: pa.Schema, features: dict[str, Any]) -> tuple[dict, dict]:
        chosen = [name for name in schema.names if _is_label(schema.field(name), features.get(name, {}))]
        labels, class_names = {}, {}
        for name in chosen:
            key = "label" if len(chosen) == 1 else name
            tables = [pq.read_table(os.fsdecode(path), columns=[name], use_threads=False) for path in self._paths]
            column, named = pa.concat_tables(tables).column(0), _class_names(features.get(name, {}))
            if pa.types.is_integer(column.type):
                labels[key], names = column.fill_null(-1).to_numpy().astype(np.int64), named
            else:
                numbered, names_found = number_columns({key: _with_names(column.to_pylist(), named)}, self.spec)
                labels |= numbered
                names = names_found.get(key, [])
            if names:
                class_names[key] = [str(item) for item in names]
        return labels, class_names


def _open(path: bytes) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(os.fsdecode(path))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{os.fsdecode(path)!r} is no readable Parquet file: {str(error).splitlines()[0]}") from error


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The HF `features` of the schema's metadata, {} when there are none."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"]
        features = {name: {"feature": f[0]} if isinstance(f, list) and f else f for name, f in features.items()}
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _image_column(schema: pa.Schema, features: dict[str, Any], pattern: str) -> tuple[str, bool]:
    """(name, whether it is a struct of bytes and path)."""

    def form(name: str) -> bool | None:
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return True
        return False if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None

    typed = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    named = [name for name in _IMAGE_NAMES if name in schema.names]
    for name in [*(n for n in named if n in typed), *typed, *named, *schema.names]:
        is_struct = form(name)
        if is_struct is not None:
            return name, is_struct
    raise InputError(
        f"no image column in {pattern!r} (its columns: {', '.join(schema.names)}); expected image{{bytes, path}}"
    )


def _class_names(feature: Any) -> list[str]:
    """The names of a ClassLabel, or of a list of them (`Sequence`, `List`), else []."""
    if not isinstance(feature, dict):
        return []
    if feature.get("_type") == "ClassLabel":
        return [str(name) for name in feature.get("names") or []]
    return _class_names(feature.get("feature"))


def _with_names(values: list[Any], names: list[str]) -> list[Any]:
    """Lists of class numbers as lists of their names, where a table names them."""

    def named(item: Any) -> Any:
        return names[item] if isinstance(item, int) and 0 <= item < len(names) else item

    return [[named(item) for item in value] if isinstance(value, list) else value for value in values]


def _is_label(column: pa.Field, feature: dict[str, Any]) -> bool:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type  # several classes at once
    simple = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    simple = simple or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return simple and (bool(_class_names(feature)) or column.name in _LABEL_NAMES or column.name.endswith("_label"))
