"""Where images come from: `open_source(SPEC)` gives any collection the same few methods.

Specs: `folder:PATH`, `parquet:GLOB`, `tar:GLOB` (or URLs), `jsonl:FILE`, `torchvision:NAME?root=..&split=..`,
`hf:NAME?split=..`, `scenes:?..`, or a bare path, recognised by what it holds. Nothing is decoded here (decode.py does).
"""

from __future__ import annotations

import glob
import logging
import os
import re
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sslvit.data.files import split_options
from sslvit.data.records import image_of, parse_record
from sslvit.data.remote import is_remote
from sslvit.errors import InputError

logger = logging.getLogger(__name__)

_FORMS = ("folder", "parquet", "tar", "jsonl", "torchvision", "hf", "scenes")
_SHARDS = ("parquet", "tar", "jsonl")
_SPLITS = "train|training|validation|valid|val|dev|test"


@runtime_checkable
class Source(Protocol):
    """Images by index. Reads may come from any number of threads, and the object survives fork and pickle."""

    @property
    def spec(self) -> str:
        """The data spec that opens this source."""

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """Name -> one label of all images; a single one is called "label"; {} when there are none.

        Classes: (n,) int64, -1 where unknown. Numbers: (n,) float64, NaN where unknown. Several classes at once: (n, C)
        int8 of 0 and 1, a row of -1 where unknown.
        """

    @property
    def class_names(self) -> dict[str, list[str]]:
        """Name -> the names of its classes by number, for those labels that have names."""

    @property
    def has_text(self) -> bool:
        """Whether `text` says anything."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What the image is called in reports; bytes that are no UTF-8 are surrogate escapes."""

    def read(self, index: int) -> bytes | np.ndarray:
        """The bytes of an image file, or pixels (H, W, C); not decoded. Raises BadImage with the reason."""

    def text(self, index: int) -> dict[str, Any] | None:
        """Any of `captions` (list of str), `conversations`, `question` and `answer`; None when there is no text."""


def open_source(spec: str) -> Source:
    """Opens a data spec. Raises InputError, with the remedy, for what is missing, empty or not recognised."""
    form, colon, rest = spec.partition(":")
    if not colon or form not in _FORMS:
        return _open_bare(spec)
    if form == "scenes":
        from sslvit.data.scenes import Scenes

        return Scenes.from_spec(rest)
    if form == "folder":
        from sslvit.data.folder import FolderSource

        return FolderSource(split_options(rest, ())[0])
    if form == "parquet":
        from sslvit.data.parquet import ParquetSource

        return ParquetSource(split_options(rest, ())[0])
    if form == "tar":
        from sslvit.data.tar import TarSource

        return TarSource(rest if is_remote(rest) else split_options(rest, ())[0])
    if form == "jsonl":
        from sslvit.data.jsonl import JsonlSource

        path, options = split_options(rest, ("root",))
        return JsonlSource(path, options.get("root"))
    if form == "torchvision":
        from sslvit.data.torchvision_sets import TorchvisionSource

        name, options = split_options(rest, ("root", "split"))
        return TorchvisionSource(name, options.get("root"), options.get("split", "train"))
    from sslvit.data.hub_sets import HubSource

    name, options = split_options(rest, ("split", "config"))
    return HubSource(name, options.get("split", "train"), options.get("config"))


def _open_bare(spec: str) -> Source:
    """Recognises a path by what it holds."""
    path, options = split_options(spec, ("split",))
    full = os.path.expanduser(path)
    if os.path.isdir(full):
        return open_source(_form_of_folder(full, options.get("split")))
    for form in _SHARDS:
        if path.endswith(f".{form}"):
            return open_source(f"{form}:{path}")
    if os.path.exists(full):
        raise InputError(f"{path!r} is a file but no .parquet, .tar or .jsonl; give a folder of images or a data spec")
    raise InputError(f"no such path: {path!r}; data is a path or a spec such as folder:PATH, tar:GLOB, scenes:?n=512")


def _form_of_folder(path: str, split: str | None) -> str:
    """The spec of a folder: shards when it, or one folder below it, holds more of them than images."""
    from sslvit.data.folder import EXTENSIONS

    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise InputError(f"cannot read the folder {path!r}: {error.strerror}; check who may read it") from None
    folders = [name for name in names if os.path.isdir(os.path.join(path, name)) and not name.startswith(".")]
    below = [os.path.join(folder, name) for folder in folders[:20] for name in _listdir(os.path.join(path, folder))]
    for level in (names, below):
        images = sum(name.rpartition(".")[2].lower() in EXTENSIONS for name in level)
        for form in _SHARDS:
            files = [name for name in level if name.endswith(f".{form}")]
            if len(files) > images and (form != "jsonl" or _names_images(os.path.join(path, files[0]))):
                return _spec_of_files(form, path, _one_split(files, split, path))
        if images:
            break
    if split is not None or (len(folders) > 1 and all(_split_of(folder) for folder in folders)):
        return f"folder:{os.path.join(path, _one_split(folders, split, path)[0])}"
    return f"folder:{path}"


def _listdir(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _names_images(path: str) -> bool:
    """Whether the first line of a jsonl file is a row with an image: such files also hold other things."""
    try:
        with open(path, "rb") as file:
            return image_of(parse_record(file.readline(1 << 20)) or {}) is not None
    except OSError:
        return False


def _split_of(name: str) -> str:
    """`val` for val-00000.tar, val_1.tar or val/0.tar; "" when the name tells no split."""
    matches = (re.match(rf"({_SPLITS})(?![A-Za-z])", part) for part in name.split(os.sep))
    return next((match[1] for match in matches if match), "")


def _one_split(names: list[str], split: str | None, path: str) -> list[str]:
    """Those of one split, where names tell several apart; train unless asked otherwise."""
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split_of(name), []).append(name)
    held = ", ".join(sorted(filter(None, splits)))
    if split is not None:
        if split not in splits:
            raise InputError(f"no split {split!r} in {path!r}; it holds {held or 'files without split names'}")
        return splits[split]
    if len(splits) > 1 and "train" in splits:
        logger.warning("%s holds the splits %s: reading train; ask for another with ?split=NAME", path, held)
        return splits["train"]
    return names


def _spec_of_files(form: str, path: str, names: list[str]) -> str:
    """The shortest spec of these files: a pattern where one matches exactly them, else their list."""
    paths = [os.path.join(path, name) for name in names]
    start = os.path.commonprefix(paths)  # noqa: RUF071 (of the text, not of folders)
    pattern = f"{start}*.{form}" if len(paths) > 1 else paths[0]
    exact = glob.escape(start) == start and sorted(glob.glob(pattern)) == sorted(paths)
    return f"{form}:{pattern if exact else ','.join(paths)}"
