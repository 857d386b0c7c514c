"""Long work put aside between two of its parts, so that the same command goes on there. Knows no probe.

A part ends where what follows depends on nothing but what is put aside: after some batches of images, or after a step
of training. So work that was interrupted gives the same bits as work that was not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sslvit.errors import Resumable
from sslvit.run_folder import partial_of
from sslvit.signals import StopFlag

logger = logging.getLogger(__name__)

SECONDS = 60.0  # at most this much work is lost to a kill, or one part where that takes longer
MAX_IMAGES = 4096  # in a part of features


class Unfinished:
    """The state of one fit, in `folder` (None: nothing is put aside). `stop` is looked at between parts."""

    def __init__(self, folder: Path | None = None, stop: StopFlag | None = None) -> None:
        self.folder, self.stop = folder, stop
        self._since = time.monotonic()

    def named(self, name: str) -> Unfinished:
        """The same for one of several fits."""
        return Unfinished(None if self.folder is None else self.folder / re.sub(r"[^\w.-]", "_", name), self.stop)

    def check(self) -> None:
        """Resumable when this process was asked to stop."""
        if self.stop is not None and self.stop.is_set():
            self._raise()

    def _raise(self) -> NoReturn:
        assert self.stop is not None
        raise Resumable(f"stopped by {self.stop.received}; the same command goes on from there")

    def offer(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Put a state aside if it is time, or this process was asked to stop: then Resumable."""
        stopping = self.stop is not None and self.stop.is_set()
        if self.folder is not None and (stopping or time.monotonic() - self._since >= SECONDS):
            data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"facts": json.dumps(facts)})
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{name}.safetensors"
            partial = partial_of(file)
            try:
                partial.write_bytes(data)
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)
            self._since = time.monotonic()
        if stopping:
            self._raise()

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of a state; None when there is none, or it is damaged."""
        if self.folder is None:
            return None
        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def resume(self, name: str, tensors: Mapping[str, Tensor]) -> int:
        """The number of steps done, whose outcome is written into `tensors`; 0 when nothing was put aside."""
        found = self.load(name)
        if found is None or {k: v.shape for k, v in found[0].items()} != {k: v.shape for k, v in tensors.items()}:
            return 0
        for key, tensor in tensors.items():
            tensor.detach().copy_(found[0][key])
        step = int(found[1]["step"])
        print(f"{name.partition('-')[0]}: going on from step {step}", flush=True)
        return step

    def drop(self, name: str) -> None:
        """Forget one state."""
        if self.folder is not None:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all: the work is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()  # the last one


class Parts:
    """Features of consecutive images, part by part: `folder/START-STOP.npz`, places in the selection of images.

    Several processes may write into one folder: whatever stands there is what any of them would have computed.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._since = time.monotonic()

    def read(self) -> tuple[list[dict[str, np.ndarray]], int]:
        """The parts from the first image on without a gap, and how many images of the selection they cover."""
        parts: list[dict[str, np.ndarray]] = []
        reached = 0
        while (found := self._next(reached)) is not None:
            parts.append(found[0])
            reached = found[1]
        return parts, reached

    def _next(self, start: int) -> tuple[dict[str, np.ndarray], int] | None:
        if self.folder is None:
            return None
        for path in sorted(self.folder.glob(f"{start:010d}-*.npz"), reverse=True):  # the longest first
            try:
                with np.load(path, allow_pickle=False) as file:
                    return {name: file[name] for name in file.files}, int(path.stem.partition("-")[2])
            except (OSError, ValueError, EOFError, zipfile.BadZipFile):
                path.unlink(missing_ok=True)
        return None

    def due(self, num_images: int) -> bool:
        """Whether so many images are to be written now."""
        enough = num_images >= MAX_IMAGES or time.monotonic() - self._since >= SECONDS
        return self.folder is not None and num_images > 0 and enough

    def write(self, start: int, stop: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the features of the images at `start` to `stop` of the selection; visible only when complete."""
        if self.folder is None:
            return
        path = self.folder / f"{start:010d}-{stop:010d}.npz"
        partial = partial_of(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                np.savez(file, **dict(arrays))  # type: ignore[arg-type]
            os.replace(partial, path)
        except FileNotFoundError:
            pass  # another process has all of them and removed the folder
        except PermissionError as error:
            logger.warning("%s: unfinished features cannot be put aside (%s)", self.folder, error.strerror)
            self.folder = None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self._since = time.monotonic()

    def remove(self) -> None:
        """The whole is kept, or of no use."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
