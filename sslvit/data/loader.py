"""Batches of views from a source: keyed order, decode, crops, in threads; and clean images for evaluation.

The stream is a function of (seed, cursor): sample p of the global stream belongs to epoch p // n and is the image at
place p % n of that epoch's keyed permutation (order.py). A batch is the next `world * batch_size` samples, of which a
rank takes its slice, so neither the number of threads nor of ranks changes what is seen; a resume needs one integer.

Threads, not processes: decoding, resizing and copying release the GIL, nothing is pickled or copied between
processes, and decoded images are shared. Colour happens on the training device (`photometry.py`).
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sslvit.data import crops as geometry
from sslvit.data.config import CropsConfig, PhotometryConfig
from sslvit.data.decode import BadFiles, BadImage, ValueRange, decode, deep_pixels
from sslvit.data.keyed import hash_key
from sslvit.data.order import Order, sample
from sslvit.data.sources import Source
from sslvit.data.workers import Job, Workers
from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError

CACHE_BYTES = 1536 * 2**20
_CACHE_PROBE = 64  # images measured before deciding whether the decoded set fits
_PREFETCH = 2  # batches ready or in work ahead of the one in use
_HELD_BYTES = 32 * 2**20  # decoded pixels a thread holds before it cuts them; drawing for many at once is cheaper
_REPLACEMENT = -2  # in place of a view in the key: a draw that belongs to no view
_STATISTICS = -3  # in place of the seed: which images are measured depends on the set alone


@dataclass
class Views:
    """One batch of crops, uint8, with the parameters of their colouring; G or L views of B images each."""

    global_crops: torch.Tensor  # (G, B, C, H, W) uint8
    local_crops: torch.Tensor  # (L, B, C, h, w) uint8; L may be 0
    global_photometry: torch.Tensor  # (G, B, P) float32, see photometry.py
    local_photometry: torch.Tensor  # (L, B, P) float32
    sample_ids: torch.Tensor  # (B,) int64, the image each column shows
    epochs: torch.Tensor  # (B,) int64

    def to(self, device: torch.device | str) -> Views:
        """The crops on `device`; the small rest stays on the CPU, where `photometry.apply` wants it."""
        move = {name: getattr(self, name).to(device, non_blocking=True) for name in ("global_crops", "local_crops")}
        return dataclasses.replace(self, **move)


def usable_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Loading threads when nothing else is asked for: the cores this process may use less one, from 1 to 16."""
    return max(1, min(16, usable_cores() - 1))


class DecodedImages:
    """The decoded images of a source, kept in memory when all of them fit; shared by the threads."""

    def __init__(
        self,
        source: Source,
        channels: int | None,
        min_side: int | None,
        cache_bytes: int = CACHE_BYTES,
        value_range: ValueRange | None = None,
    ) -> None:
        self._source, self.min_side = source, min_side
        self._how: dict[str, Any] = {"channels": channels, "min_side": min_side, "value_range": value_range}
        self._budget = cache_bytes
        self._kept: dict[int, np.ndarray] | None = {}
        self._bytes = 0
        self._lock = threading.Lock()
        self.seconds = {"read": 0.0, "decode": 0.0, "cut": 0.0}  # of all threads together

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W, C) uint8; raises BadImage or OSError."""
        kept = self._kept
        if kept is not None and (image := kept.get(index)) is not None:
            return image
        began = time.perf_counter()
        file = self._source.read(index)
        read = time.perf_counter()
        image = decode(file, **self._how)
        self.seconds["read"] += read - began
        self.seconds["decode"] += time.perf_counter() - read
        if kept is not None:
            self._keep(index, image)
        return image

    def _keep(self, index: int, image: np.ndarray) -> None:
        with self._lock:
            if self._kept is None or index in self._kept:
                return
            self._kept[index] = image
            self._bytes += image.nbytes
            expected = self._bytes / len(self._kept) * len(self._source)
            if self._bytes > self._budget or (len(self._kept) >= _CACHE_PROBE and expected > self._budget):
                self._kept = None


class Loader:
    """Endless batches of views; iterate for (Views, cursor after the batch).

    `batch_size` is that of one micro-batch on one rank. `cursor` counts samples of the global stream; `seek` costs
    nothing. An unreadable image is recorded in `bad_files` and replaced by a keyed draw: its column then shows, and
    `sample_ids` names, the replacement, cropped by the draws of the image it stands for.
    """

    def __init__(
        self,
        source: Source,
        crops: CropsConfig,
        photometry: PhotometryConfig,
        global_size: geometry.Size,
        channels: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        num_workers: int | None = None,
        bad_files: BadFiles | None = None,
        pin_memory: bool = False,
        cache_bytes: int = CACHE_BYTES,
        value_range: ValueRange | None = None,
    ) -> None:
        if len(source) == 0:
            raise InputError(f"{source.spec} holds no images; point `data` at a folder or file that does")
        self._source, self._crops, self._photometry = source, crops, photometry
        self._sides = (geometry.height_width(global_size), crops.local_shape)
        self._channels, self._batch_size = channels, batch_size
        self._seed, self._rank, self._world = seed, rank, world
        self._order = Order(source, seed)
        self._num_workers = default_workers() if num_workers is None else num_workers
        self._bad_files = BadFiles() if bad_files is None else bad_files
        self._pin_memory = pin_memory
        least = geometry.min_side(crops, global_size)
        self._images = DecodedImages(source, channels, least, cache_bytes // world, value_range)
        self.cursor = 0

    def seek(self, cursor: int) -> None:
        """The next iteration starts with sample `cursor` of the global stream."""
        self.cursor = cursor

    def ids_at(self, cursor: int) -> tuple[np.ndarray, np.ndarray]:
        """(image ids, epochs), both (B,), of this rank's slice of the global batch that starts at `cursor`."""
        n = len(self._source)
        places = cursor + self._rank * self._batch_size + np.arange(self._batch_size)
        epochs = places // n
        return self._order(places % n, epochs), epochs

    def __iter__(self) -> Iterator[tuple[Views, int]]:
        stride = self._batch_size * self._world
        with Workers(self._num_workers, self._source.name) as workers:
            pending: deque[tuple[_Batch, list[Job], int]] = deque()
            head = self.cursor
            while True:
                while len(pending) < (_PREFETCH + 1 if self._num_workers else 1):
                    batch = self._new_batch(head)
                    head += stride
                    jobs = [workers.submit(self._fill, batch, part) for part in self._parts()]
                    pending.append((batch, jobs, head))
                batch, jobs, self.cursor = pending.popleft()
                for job in jobs:
                    workers.wait(job)
                yield batch.views, self.cursor

    def _parts(self) -> list[slice]:
        """The columns of a batch in contiguous shares, one per thread."""
        share = -(-self._batch_size // max(1, self._num_workers))
        return [slice(low, min(low + share, self._batch_size)) for low in range(0, self._batch_size, share)]

    def _new_batch(self, cursor: int) -> _Batch:
        batch, channels = self._batch_size, self._channels
        num_global, num_local = self._crops.num_global or 0, self._crops.num_local or 0
        ids, epochs = self.ids_at(cursor)

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=self._pin_memory)

        views = Views(
            empty(num_global, batch, channels, *self._sides[0], dtype=torch.uint8),
            empty(num_local, batch, channels, *self._sides[1], dtype=torch.uint8),
            torch.empty(num_global, batch, geometry.photometry.NUM_PARAMETERS),
            torch.empty(num_local, batch, geometry.photometry.NUM_PARAMETERS),
            torch.from_numpy(ids.copy()),
            torch.from_numpy(epochs),
        )
        return _Batch(views, ids)

    def _fill(self, batch: _Batch, part: slice, report: Callable[[int], None]) -> None:
        """Decode and cut the images of some columns of a batch; what a worker does."""
        images: list[np.ndarray] = []
        held = 0
        for column in range(part.start, part.stop):
            image, shown = self._read(int(batch.ids[column]), int(batch.views.epochs[column]), report)
            batch.views.sample_ids[column] = shown
            images.append(image)
            held += image.nbytes
            if column + 1 == part.stop or held > _HELD_BYTES:
                self._cut(batch, slice(column + 1 - len(images), column + 1), images)
                images, held = [], 0

    def _cut(self, batch: _Batch, part: slice, images: list[np.ndarray]) -> None:
        """Write the views of decoded images into their columns."""
        began = time.perf_counter()
        views = batch.views
        plans = geometry.plan_views(
            np.array([image.shape[:2] for image in images]),
            self._sides,
            self._crops,
            self._photometry,
            self._channels,
            self._seed,
            views.epochs[part].numpy(),
            batch.ids[part],
        )
        rows = (views.global_photometry, views.local_photometry)
        for plan, crops, row in zip(plans, (views.global_crops, views.local_crops), rows, strict=True):
            row[:, part] = torch.from_numpy(plan.photometry)
            for i, image in enumerate(images):
                geometry.cut_views(image, plan.boxes[i], plan.flips[i], list(crops[:, part.start + i]))
        self._images.seconds["cut"] += time.perf_counter() - began

    def advice(self, cores: int | None = None) -> str:
        """Where the threads' time went, and what to change should the run wait for them."""
        seconds, cores = self._images.seconds, usable_cores() if cores is None else cores
        total = sum(seconds.values()) or 1.0
        most = max(seconds, key=lambda kind: seconds[kind])
        share = f"{seconds[most] / total:.0%} of loading is"
        if most == "read":
            return f"{share} reading files: move the images to a local disk, or into tar or parquet shards"
        if self._num_workers < cores - 1:
            return f"raise num_workers from {self._num_workers} to {cores} (this process may use {cores} cores)"
        if most == "decode":
            side = self._images.min_side
            store = f"with a shorter side of {side} px" if side else "smaller"
            return f"{share} decoding, on every core there is: store the images {store}, or ask for more cores"
        return f"{share} cutting crops, on every core there is: lower crops.num_local, or ask for more cores"

    def _read(self, sample: int, epoch: int, report: Callable[[int], None]) -> tuple[np.ndarray, int]:
        """The image and its id, or that of the first readable replacement."""
        n = len(self._source)
        shown = sample
        for attempt in range(100):
            report(shown)
            try:
                image = self._images[shown]
            except (BadImage, OSError) as error:
                if isinstance(error.__cause__, MemoryError):  # no fault of the image
                    raise error.__cause__ from None
                self._bad_files.add(self._source.name(shown), str(error))
            else:
                self._bad_files.saw()
                return image, shown
            shown = int(hash_key(self._seed, epoch, sample, _REPLACEMENT, attempt)[0] % np.uint64(n))
        raise InputError(
            f"{self._source.spec}: a hundred draws in a row were unreadable; `sslvit check-data` names them"
        )


@dataclass
class _Batch:
    views: Views
    ids: np.ndarray  # (B,) as drawn, before replacements


def clean_batches(
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    num_workers: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    bad_files: BadFiles | None = None,
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """(images (B, C, height, width) uint8, their indices (B,) int64) in order, cut as `eval_transform`.

    B may be smaller. Unreadable images are left out (the indices tell) and recorded in `bad_files`.
    """
    order = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    shorter = int(max(preprocessing.size) / preprocessing.crop_pct)
    images = DecodedImages(source, preprocessing.channels, shorter, 0, preprocessing.value_range)

    def fill(ids: np.ndarray, report: Callable[[int], None]) -> tuple[list[torch.Tensor], list[int]]:
        made, kept = [], []
        for index in ids.tolist():
            report(index)
            try:
                made.append(geometry.eval_transform(images[index], preprocessing))
                kept.append(index)
            except (BadImage, OSError) as error:
                if bad_files is not None:
                    bad_files.add(source.name(index), str(error))
        return made, kept

    threads = default_workers() if num_workers is None else num_workers
    with Workers(threads, source.name) as workers:
        starts = iter(range(0, len(order), batch_size))
        pending: deque[Job] = deque()
        while True:
            while len(pending) <= threads + 1 and (start := next(starts, None)) is not None:
                pending.append(workers.submit(fill, order[start : start + batch_size]))
            if not pending:
                return
            made, kept = workers.wait(pending.popleft())
            if made:
                yield torch.stack(made), np.array(kept, np.int64)


def measure_range(source: Source, n: int = 200) -> ValueRange | None:
    """Per band the 0.1th and 99.9th percentile of up to `n` images deeper than 8 bits; None when there are none.

    Such files seldom use what their bits could say (a satellite's 12 bits in 16, floats of any unit), and a range of
    each image's own would make dark and bright ones look alike. Red, green and blue share one: colours stay.
    """
    taken: list[np.ndarray] = []
    for index in sample(source, n, _STATISTICS).tolist():
        try:
            pixels = deep_pixels(source.read(index))
        except (BadImage, OSError):
            continue
        if pixels is not None and (not taken or _bands(pixels) == taken[0].shape[1]):
            values = pixels.reshape(-1, _bands(pixels))
            taken.append(values[:: max(1, len(values) // 10_000)].astype(np.float32))
    if not taken:
        return None
    values = np.nan_to_num(np.concatenate(taken), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = np.percentile(values, (0.1, 99.9), axis=0)
    if len(low) == 3:
        low[:], high[:] = low.min(), high.max()
    return tuple(low.tolist()), tuple(high.tolist())


def _bands(pixels: np.ndarray) -> int:
    return 1 if pixels.ndim == 2 else pixels.shape[2]


def measure_statistics(
    source: Source, channels: int, n: int = 1000, value_range: ValueRange | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel on the 0..1 scale over the pixels of up to `n` images drawn by a fixed key.

    Every image weighs the same whatever its size; unreadable ones are passed over.
    """
    chosen = sample(source, n, _STATISTICS)
    images = DecodedImages(source, channels, 64, 0, value_range)
    moments = []
    for index in chosen.tolist():
        try:
            image = images[index]
        except (BadImage, OSError):
            continue
        stride = max(1, min(image.shape[:2]) // 256)
        pixels = image[::stride, ::stride].reshape(-1, channels) / 255.0
        moments.append((pixels.mean(0), (pixels**2).mean(0)))
    if not moments:
        raise InputError(f"{source.spec}: none of {len(chosen)} images could be read; `sslvit check-data` says why")
    first, second = (np.mean([pair[i] for pair in moments], axis=0) for i in range(2))
    std = np.sqrt(np.maximum(second - first**2, 1e-6))
    return tuple(first.tolist()), tuple(std.tolist())
