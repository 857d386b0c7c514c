"""`hf:NAME?split=..&config=..`: a data set of the Hugging Face hub, through the package `datasets`."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from sslvit.data.bad_files import BadImage
from sslvit.data.records import is_text_key, text_of
from sslvit.errors import InputError


class HubSource:
    """A split of a hub data set; images stay encoded until they are read."""

    def __init__(self, name: str, split: str = "train", config: str | None = None) -> None:
        try:
            import datasets
        except ImportError as error:
            raise InputError(f"hf:{name} needs the package datasets; pip install datasets") from error
        self.spec = f"hf:{name}?split={split}" + (f"&config={config}" if config else "")
        try:
            data = datasets.load_dataset(name, config, split=split)
        except Exception as error:  # of the hub, of the network, of the set itself
            reason = " ".join(str(error).split())
            raise InputError(f"cannot open hf:{name} split {split}: {reason}") from error
        self._image = next((k for k, f in data.features.items() if isinstance(f, datasets.Image)), None)
        if self._image is None:
            raise InputError(f"hf:{name} has no image column (its columns: {', '.join(data.features)})")
        self._data = data.cast_column(self._image, datasets.Image(decode=False))
        self._text_columns = [key for key in data.features if is_text_key(key)]
        self.labels: dict[str, np.ndarray] = {}
        self.class_names: dict[str, list[str]] = {}
        typed = [key for key, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
        for key in typed:
            label = "label" if len(typed) == 1 else key
            self.labels[label] = np.array([-1 if value is None else value for value in self._data[key]], np.int64)
            self.class_names[label] = list(data.features[key].names)
        self.has_text = bool(self._text_columns) and self.text(0) is not None

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """The image's path where the set keeps it, else the row."""
        return str(self._data[index][self._image].get("path") or index)

    def read(self, index: int) -> bytes:
        """The bytes of the image file; BadImage when the row holds none."""
        data = self._data[index][self._image].get("bytes")
        if data is None:
            raise BadImage("the row holds no image bytes")
        return bytes(data)

    def text(self, index: int) -> dict[str, Any] | None:
        """The text of the row."""
        if not self._text_columns:
            return None
        row = self._data[index]
        return text_of({key: row[key] for key in self._text_columns})

    def fingerprint(self) -> str:
        """Changes with the data behind the name."""
        return hashlib.sha256(f"{self.spec} {self._data._fingerprint}".encode()).hexdigest()
