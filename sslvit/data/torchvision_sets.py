"""`torchvision:NAME?root=..&split=..`: the data sets of torchvision that lie on this disk already. Never downloads."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sslvit.data.bad_files import BadImage
from sslvit.data.files import cache_key, cache_root, file_key
from sslvit.data.records import number_labels
from sslvit.errors import InputError

_LABEL_FIELDS = ("targets", "labels", "_labels", "y")
_SAMPLE_FIELDS = ("samples", "_samples", "imgs")


class TorchvisionSource:
    """A torchvision data set. Images come as arrays (H, W, C) uint8."""

    def __init__(self, name: str, root: str | None = None, split: str = "train") -> None:
        root = root or os.environ.get("SSLVIT_DATA") or "data"
        self.spec = f"torchvision:{name}?root={root}&split={split}"
        self._name, self._split = name, split
        self._data = _open(name, Path(root).expanduser(), split)
        self.has_text = False
        self.labels, self.class_names = self._read_labels()

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """`NAME/split/number`."""
        return f"{self._name}/{self._split}/{index}"

    def read(self, index: int) -> np.ndarray:
        """(H, W, C) uint8; BadImage when torchvision cannot read it."""
        array = self._array()
        if array is not None:
            image = np.asarray(array[index])
            return image.transpose(1, 2, 0) if image.ndim == 3 and image.shape[0] in (1, 3) else image
        try:
            image = self._data[index][0]
            return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        except Exception as error:  # a decoder's
            raise BadImage(f"{type(error).__name__}: {error}") from error

    def text(self, index: int) -> None:
        """Torchvision's captions are not read."""
        return None

    def fingerprint(self) -> str:
        """The spec: torchvision checks its own files."""
        return hashlib.sha256(self.spec.encode()).hexdigest()

    def _array(self) -> Any:
        """All images in one array, where the set keeps them so (MNIST, CIFAR, SVHN, STL10)."""
        array: Any = getattr(self._data, "data", None)
        return array if getattr(array, "ndim", 0) in (3, 4) and len(array) == len(self) else None

    def _read_labels(self) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        for field in (*_LABEL_FIELDS, *_SAMPLE_FIELDS):
            found: Any = getattr(self._data, field, None)
            if found is not None and len(found) == len(self):
                values = np.asarray([sample[1] for sample in found] if field in _SAMPLE_FIELDS else found)
                break
        else:
            return {}, {}
        if values.ndim != 1:
            return {}, {}
        numbered = number_labels(values.tolist())
        if numbered is None:
            return {}, {}
        labels, names = numbered
        names = names or [str(item) for item in getattr(self._data, "classes", [])]
        return {"label": labels}, {"label": names} if names else {}


def _open(name: str, root: Path, split: str) -> Any:
    import torchvision.datasets

    if name not in torchvision.datasets.__all__:
        raise InputError(
            f"torchvision has no data set {name!r}; the names are those of torchvision.datasets, as CIFAR10"
        )
    kind = getattr(torchvision.datasets, name)
    parameters = inspect.signature(kind.__init__).parameters
    options: dict[str, Any] = {}
    if "train" in parameters:
        if split not in ("train", "test"):
            raise InputError(f"torchvision:{name} has the splits train and test, not {split!r}")
        options["train"] = split == "train"
    elif "split" in parameters:
        options["split"] = split
    if "download" in parameters:
        options["download"] = False
    try:
        return kind(str(_with_unpacked(root, name)), **options)
    except Exception as error:  # torchvision raises RuntimeError, ValueError, OSError ... each set its own
        reason = " ".join(str(error).split())
        raise InputError(f"cannot open torchvision:{name} split {split} below {str(root)!r}: {reason}") from error


def _with_unpacked(root: Path, name: str) -> Path:
    """The root itself, or a copy in the cache where `NAME/raw` holds only the .gz files of an MNIST-like set."""
    raw = root / name / "raw"
    packed = sorted(raw.glob("*-ubyte.gz")) if raw.is_dir() else []
    if not packed or all(path.with_suffix("").exists() for path in packed):
        return root
    entry = cache_root() / "torchvision" / cache_key("torchvision-1", [file_key(os.fsencode(path)) for path in packed])
    if not entry.is_dir():
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
        (scratch / name / "raw").mkdir(parents=True)
        for path in packed:
            with gzip.open(path) as source, open(scratch / name / "raw" / path.stem, "wb") as copy:
                shutil.copyfileobj(source, copy)
        try:
            os.rename(scratch, entry)
        except OSError:  # another process was first
            shutil.rmtree(scratch, ignore_errors=True)
    return entry
