"""Batches of views from a source: keyed order, decode, crops, in threads; and clean images for evaluation.

The stream is a function of (seed, cursor): sample p of the global stream belongs to epoch p // n and is image
`permute(p % n)` of that epoch's keyed permutation. A batch is the next `world * batch_size` samples, of which a rank
takes its slice, so neither the number of threads nor of ranks changes what is seen, and a resume needs one integer.

Threads, not processes: decoding, resizing and copying release the GIL, nothing is pickled or copied between
processes, and decoded images are shared. Colour happens on the training device (`photometry.py`).
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sslvit.data import crops as geometry
from sslvit.data.config import CropsConfig, PhotometryConfig
from sslvit.data.decode import BadFiles, BadImage, decode
from sslvit.data.sources import Source
from sslvit.data.workers import Job, Workers
from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError

CACHE_BYTES = 1536 * 2**20
_CACHE_PROBE = 64  # images measured before deciding whether the decoded set fits
_PREFETCH = 2  # batches ready or in work ahead of the one in use
_HELD_BYTES = 32 * 2**20  # decoded pixels a thread holds before it cuts them; drawing for many at once is cheaper
_FEISTEL_TURNS = 8
_ORDER, _REPLACEMENT, _STATISTICS = -1, -2, -3  # in place of a view in the key: draws that belong to no view


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


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Images at places `index` (B,) of the permutations of range(n) named by uint64 keys (B,).

    A Feistel network on the smallest even number of bits that holds n, walked until it lands below n (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): no table, so any place of a billion is found at once.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    shift = np.uint64(half)
    turns = geometry.splitmix(key + np.arange(1, _FEISTEL_TURNS + 1, dtype=np.uint64)[:, None] * geometry.GOLDEN)
    out = index.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        left, right = out[walking] >> shift, out[walking] & mask
        for turn in turns[:, walking]:
            left, right = right, left ^ (geometry.splitmix(right + turn) & mask)
        out[walking] = left << shift | right
        walking = walking[out[walking] >= n]
    return out.astype(np.int64)


def default_workers() -> int:
    """Loading threads when nothing else is asked for: the cores this process may use less one, from 1 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores - 1))


class DecodedImages:
    """The decoded images of a source, kept in memory when all of them fit; shared by the threads."""

    def __init__(
        self, source: Source, channels: int | None, min_side: int | None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._source, self._channels, self._min_side = source, channels, min_side
        self._budget = cache_bytes
        self._kept: dict[int, np.ndarray] | None = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W, C) uint8; raises BadImage or OSError."""
        kept = self._kept
        if kept is not None and (image := kept.get(index)) is not None:
            return image
        image = decode(self._source.read(index), channels=self._channels, min_side=self._min_side)
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
    ) -> None:
        if len(source) == 0:
            raise InputError(f"{source.spec} holds no images; point `data` at a folder or file that does")
        self._source, self._crops, self._photometry = source, crops, photometry
        self._sides = (geometry.height_width(global_size), geometry.height_width(crops.local_size or 0))
        self._channels, self._batch_size = channels, batch_size
        self._seed, self._rank, self._world = seed, rank, world
        self._num_workers = default_workers() if num_workers is None else num_workers
        self._bad_files = BadFiles() if bad_files is None else bad_files
        self._pin_memory = pin_memory
        self._images = DecodedImages(source, channels, geometry.min_side(crops, global_size), cache_bytes // world)
        self.cursor = 0

    def seek(self, cursor: int) -> None:
        """The next iteration starts with sample `cursor` of the global stream."""
        self.cursor = cursor

    def ids_at(self, cursor: int) -> tuple[np.ndarray, np.ndarray]:
        """(image ids, epochs), both (B,), of this rank's slice of the global batch that starts at `cursor`."""
        n = len(self._source)
        places = cursor + self._rank * self._batch_size + np.arange(self._batch_size)
        epochs = places // n
        keys = geometry.hash_key(self._seed, epochs, _ORDER)
        return permute(places % n, n, keys), epochs

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
        num_local = self._crops.num_local or 0
        ids, epochs = self.ids_at(cursor)

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=self._pin_memory)

        views = Views(
            empty(self._crops.num_global, batch, channels, *self._sides[0], dtype=torch.uint8),
            empty(num_local, batch, channels, *self._sides[1], dtype=torch.uint8),
            torch.empty(self._crops.num_global, batch, geometry.photometry.NUM_PARAMETERS),
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
        views = batch.views
        plans = geometry.plan_views(
            np.array([image.shape[:2] for image in images]),
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
            shown = int(geometry.hash_key(self._seed, epoch, sample, _REPLACEMENT, attempt)[0] % np.uint64(n))
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
    """(images (B, C, size, size) uint8, their indices (B,) int64) in order, cut as `eval_transform`; B may be smaller.

    Unreadable images are left out (the indices tell) and recorded in `bad_files`.
    """
    order = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    shorter = int(preprocessing.image_size / preprocessing.crop_pct)
    images = DecodedImages(source, preprocessing.channels, shorter, cache_bytes=0)

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


def measure_statistics(source: Source, channels: int, n: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel on the 0..1 scale over the pixels of up to `n` images drawn by a fixed key.

    Every image weighs the same whatever its size; unreadable ones are passed over.
    """
    total = len(source)
    places = np.arange(min(n, total))
    chosen = permute(places, total, np.broadcast_to(geometry.hash_key(0, _STATISTICS), places.shape))
    images = DecodedImages(source, channels, 64, cache_bytes=0)
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
        raise InputError(f"{source.spec}: none of {len(places)} images could be read; `sslvit check-data` says why")
    first, second = (np.mean([pair[i] for pair in moments], axis=0) for i in range(2))
    std = np.sqrt(np.maximum(second - first**2, 1e-6))
    return tuple(first.tolist()), tuple(std.tolist())
