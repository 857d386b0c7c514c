"""Frozen features of a set of images: extracted once, cached by content, used by every probe. Not a probe itself.

Features are taken on clean images (resize, centre crop, no augmentation), after the final norm, from the last blocks
(`get_intermediate_layers` of DINO). The class token stands for the image; for an encoder without one, the mean patch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sslvit import memory
from sslvit.data.decode import BadImage
from sslvit.data.loader import clean_batches
from sslvit.data.photometry import normalize
from sslvit.data.sources import Source
from sslvit.distributed import native_bf16
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.vit import Tokens, forward_layers, forward_pooled, is_pooled, patch_grid
from sslvit.errors import InputError, Resumable
from sslvit.probes.unfinished import Parts, Unfinished
from sslvit.run_folder import partial_of
from sslvit.signals import StopFlag

CACHE_VERSION = 1
NUM_BLOCKS = 4  # what the linear grid reads
PIXEL_SIZE, PIXEL_PATCH = 32, 4  # px, of the control without an encoder
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Extraction:
    """How features are computed. Only precision, num_images and seed can change them."""

    batch_size: int = 256
    device: str = "cpu"
    precision: str = "fp32"  # fp32 | bf16
    num_workers: int | None = None
    num_images: int | None = None  # at most this many, a sample keyed by seed
    seed: int = 0
    cache_dir: Path | None = None
    parts_dir: Path | None = None  # where unfinished features are put aside; None: cache_dir
    class_token_only: bool = False  # of the last block: all that `embed` writes
    stop: StopFlag | None = None  # looked at between batches
    progress: Progress | None = None


@dataclass
class Features:
    """What the encoder says about n images. Arrays are float32 and not normalised.

    blocks: per block, the last one first, (n, D): the class token after the final norm (mean patch without one).
    mean_patch: (n, D), the mean of the last block's normed patches; equal to blocks[0] without a class token, and
    (n, 0) where nothing but class tokens was asked for.
    indices: (n,) place of each image in its source; images that could not be read are missing.
    labels: name -> (n,), empty without labels; class_names: name -> names of the classes 0, 1, ...
    """

    blocks: list[np.ndarray]
    mean_patch: np.ndarray
    has_class_token: bool
    indices: np.ndarray
    names: list[str] = field(default_factory=list)
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.blocks[0])

    @property
    def cls(self) -> np.ndarray:
        """(n, D) of the last block: what k-NN compares and `embed` writes."""
        return self.blocks[0]


class Subset:
    """Some images of a source, by place; without their labels. A data source itself."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source, self._indices = source, indices
        self.spec, self.has_text = source.spec, False
        self.labels: dict[str, np.ndarray] = {}
        self.class_names: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        """The image's name in the whole source."""
        return self._source.name(int(self._indices[index]))

    def read(self, index: int) -> bytes | np.ndarray:
        """As the whole source."""
        return self._source.read(int(self._indices[index]))

    def text(self, index: int) -> None:
        """A subset is for its images."""
        return None


class Examples:
    """The images of one source as one encoder sees them: what a probe is fitted on, or answers for.

    `module` None is the control without an encoder: features are the pixels of the images at 32 px. `fingerprint`
    names the weights; with it and `extraction.cache_dir`, features are stored and found again by all they depend on.
    """

    def __init__(
        self,
        source: Source,
        module: nn.Module | None,
        preprocessing: Preprocessing,
        extraction: Extraction,
        fingerprint: str | None = None,
        digest: str | None = None,
    ) -> None:
        self.source, self.module, self.extraction, self.fingerprint = source, module, extraction, fingerprint
        self.preprocessing, self._digest = preprocessing, digest
        self.unfinished = Unfinished(stop=extraction.stop)  # of what is fitted to these images
        if module is None:
            self.preprocessing = Preprocessing(PIXEL_SIZE, (0.5,) * 3, (0.5,) * 3)
        self.device = torch.device(extraction.device)

    @cached_property
    def features(self) -> Features:
        """Features of every readable image. InputError when there is none, or one has features that are not finite.

        Resumable when this process was asked to stop: what is extracted is put aside, and the same call goes on there.
        """
        entry, parts = self._cache_entry(), self._parts()
        raw = self._read_cache()
        if raw is None:
            with memory.kept(self.device):
                raw = self._extract(parts)
            try:
                _check_finite(raw, self.source)
            except InputError:
                parts.remove()
                raise
            if entry is not None:
                _write_entry(entry, raw)
                parts.remove()
        raw.names = [self.source.name(int(i)) for i in raw.indices]
        raw.labels = {name: np.asarray(values)[raw.indices] for name, values in self.source.labels.items()}
        raw.class_names = dict(self.source.class_names)
        return raw

    def take(self, rows: np.ndarray, *, labels: bool) -> Examples:
        """The images at `rows` of the features, as examples of their own; without `labels`, nobody can look at them."""
        part = Examples(
            self.source if labels else Subset(self.source, np.arange(len(self.source))),
            self.module,
            self.preprocessing,
            self.extraction,
            self.fingerprint,
        )
        part.unfinished = self.unfinished
        whole = self.features
        every = len(rows) == len(whole)
        part.features = Features(
            [block if every else block[rows] for block in whole.blocks],
            whole.mean_patch if every else whole.mean_patch[rows],
            whole.has_class_token,
            whole.indices[rows],
            [whole.names[i] for i in rows],
            {name: values[rows] for name, values in whole.labels.items()} if labels else {},
            whole.class_names if labels else {},
        )
        return part

    @cached_property
    def digest(self) -> str:
        """The fingerprint of the images that are used; computed unless it was given."""
        return self._digest or source_digest(self.source, self.selection)

    @cached_property
    def selection(self) -> np.ndarray:
        """Places in the source of the images that are used, (n,) int64, readable or not."""
        return choose_indices(len(self.source), self.extraction.num_images, self.extraction.seed)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        if self.module is None:
            return (PIXEL_SIZE // PIXEL_PATCH,) * 2
        return patch_grid(self.module, self.preprocessing.size)

    def tokens(self, indices: np.ndarray, num_blocks: int = 1) -> Iterator[tuple[list[Tokens], np.ndarray]]:
        """(tokens of the last blocks, the last one first, on the device; their indices) batch by batch, in order."""
        batches = clean_batches(
            self.source, self.preprocessing, self.extraction.batch_size, self.extraction.num_workers, indices
        )
        done = 0
        for images, batch_indices in batches:
            yield self.encode(images, num_blocks), np.asarray(batch_indices, dtype=np.int64)
            done += len(images)
            if self.extraction.progress is not None:
                self.extraction.progress(done, len(indices))
            self.unfinished.check()

    def encode(self, images: Tensor, num_blocks: int = 1) -> list[Tokens]:
        """Tokens of uint8 images (B, C, H, W), float32, of the last blocks, the last one first."""
        images = images.to(self.device, non_blocking=True)
        pixels = normalize(images, self.preprocessing.mean, self.preprocessing.std)
        if self.module is None:
            return [_pixel_tokens(pixels)]
        return forward_clean(self.module, pixels, num_blocks, self.extraction.precision)

    @property
    def _num_blocks(self) -> int:
        if self.module is None or self.extraction.class_token_only or is_pooled(self.module):
            return 1
        return min(NUM_BLOCKS, len(self.module.blocks))  # type: ignore[arg-type]

    def _extract(self, parts: Parts) -> Features:
        """Part by part; batches are the same ones wherever it goes on."""
        if self.module is not None:
            self.module.to(self.device)
        done, start = parts.read()
        reached = start
        fresh: list[dict[str, np.ndarray]] = []
        if start:
            print(f"{self.source.spec}: going on from image {start} of {len(self.selection)}", flush=True)

        def put_aside() -> None:
            nonlocal fresh, start
            if fresh:
                done.append(_joined(fresh))
                parts.write(start, reached, done[-1])
                fresh, start = [], reached

        try:
            for layers, indices in self.tokens(self.selection[start:], self._num_blocks):
                fresh.append(self._arrays(layers) | {"indices": indices})
                reached = self._end_of_batch(indices[-1], reached)
                if parts.due(sum(len(part["indices"]) for part in fresh)):
                    put_aside()
        except Resumable as stopped:
            put_aside()
            raise type(stopped)(f"{stopped} ({reached} of {len(self.selection)} images are done)") from stopped
        parts_of_all = [*done, *fresh]
        if not parts_of_all:
            raise InputError(f"{self.source.spec} has no readable image; `sslvit check-data` lists the reasons")
        return _as_features(_joined(parts_of_all))

    def _arrays(self, layers: list[Tokens]) -> dict[str, np.ndarray]:
        """What is kept of one batch, as in the cache; mean_patch where it differs from the class token."""
        if self.module is None:
            return {"block_0": _array(layers[0].patches.flatten(1))}
        arrays = {f"block_{number}": _array(tokens.cls) for number, tokens in enumerate(layers)}
        if layers[0].has_class_token:
            one = layers[0]
            arrays["mean_patch"] = _array(one.cls[:, :0] if self.extraction.class_token_only else one.mean_patch)
        return arrays

    def _end_of_batch(self, last: int, reached: int) -> int:
        """Where in the selection the batch of image `last` ends; images before and after it may be unreadable."""
        place, size = int(np.searchsorted(self.selection, last)), self.extraction.batch_size
        return min(reached + ((place - reached) // size + 1) * size, len(self.selection))

    def _cache_entry(self, class_token_only: bool | None = None) -> Path | None:
        return self._place(self.extraction.cache_dir, class_token_only)

    def _parts(self) -> Parts:
        place = self._place(self.extraction.parts_dir or self.extraction.cache_dir)
        return Parts(None if place is None else place.with_name(f"{place.name}.parts"))

    def _place(self, folder: Path | None, class_token_only: bool | None = None) -> Path | None:
        """In `folder`, a name that says everything the features depend on."""
        if folder is None or self.fingerprint is None:
            return None
        only = self.extraction.class_token_only if class_token_only is None else class_token_only
        facts = [
            CACHE_VERSION,
            self.fingerprint,
            asdict(self.preprocessing),
            1 if only else NUM_BLOCKS,
            self.extraction.precision,
            self.digest,
        ]
        return folder / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def _read_cache(self) -> Features | None:
        """Stored features; those with all blocks serve where class tokens are all that is asked for."""
        for only in sorted({self.extraction.class_token_only, False}):
            entry = self._cache_entry(only)
            if entry is not None and (found := _read_entry(entry)) is not None:
                return found
        return None


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of consecutive parts, put together; one array at a time is held twice, and `parts` is used up."""
    return {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}


def _as_features(arrays: dict[str, np.ndarray]) -> Features:
    blocks = [arrays[f"block_{number}"] for number in range(sum(name.startswith("block_") for name in arrays))]
    return Features(blocks, arrays.get("mean_patch", blocks[0]), "mean_patch" in arrays, arrays["indices"])


@torch.no_grad()
def forward_clean(module: nn.Module, pixels: Tensor, num_blocks: int, precision: str) -> list[Tokens]:
    """Tokens of the last blocks, the last one first, in float32; the module is in evaluation mode meanwhile.

    Of a model without class token or patches, its pooled features (B, D) stand for an only patch. Prefixes
    are copies: whoever keeps a class token would otherwise keep every patch of its batch in memory.
    """
    was_training = module.training
    module.eval()
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        layers = [forward_pooled(module, pixels)] if is_pooled(module) else forward_layers(module, pixels, num_blocks)
    module.train(was_training)
    return [
        Tokens(t.prefix.to(torch.float32, copy=True), t.patches.float(), t.has_class_token, t.normed)
        for t in reversed(layers)
    ]


def default_precision(device: torch.device | str) -> str:
    """bf16 where the device computes it natively, else fp32."""
    return "bf16" if native_bf16(device) else "fp32"


def shared_cache() -> Path | None:
    """Where features are kept for all runs: $SSLVIT_CACHE/features, None when that is unset."""
    root = os.environ.get("SSLVIT_CACHE")
    return Path(root) / "features" if root else None


def choose_indices(num_images: int, at_most: int | None, seed: int = 0) -> np.ndarray:
    """All indices, or a sorted keyed sample of `at_most` of them, (n,) int64."""
    if at_most is None or at_most >= num_images:
        return np.arange(num_images)
    return np.sort(np.random.default_rng([seed, num_images]).choice(num_images, at_most, replace=False))


def own_fingerprint(source: Source) -> str:
    """What the source says of itself; its spec and size where it has no word for that (scenes: the spec is all)."""
    own = getattr(source, "fingerprint", None)
    return own() if own is not None else f"{source.spec} {len(source)}"


def source_digest(source: Source, indices: np.ndarray, num_samples: int = 16) -> str:
    """A fingerprint of the chosen images: what the source says of itself, and the bytes of a few of them."""
    digest = hashlib.sha256(own_fingerprint(source).encode())
    digest.update(np.ascontiguousarray(indices, dtype=np.int64).tobytes())
    for i in indices[np.linspace(0, len(indices) - 1, min(num_samples, len(indices))).astype(int)]:
        with contextlib.suppress(BadImage, OSError):
            data = source.read(int(i))
            digest.update(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes())
    return digest.hexdigest()


def _pixel_tokens(pixels: Tensor) -> Tokens:
    """Images (B, C, H, W) as patches of 4 px, without a class token."""
    patches = nn.functional.unfold(pixels, PIXEL_PATCH, stride=PIXEL_PATCH).transpose(1, 2)
    return Tokens(patches[:, :0], patches, has_class_token=False, normed=True)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _check_finite(raw: Features, source: Source) -> None:
    for values in [*raw.blocks, raw.mean_patch]:
        bad = np.flatnonzero(~np.isfinite(values.sum(axis=1, dtype=np.float64)))
        if bad.size:
            name = source.name(int(raw.indices[bad[0]]))
            raise InputError(
                f"{bad.size} of {len(values)} images of {source.spec} have NaN or infinite features (first: {name}); "
                "the encoder's weights are damaged or diverged, use an earlier checkpoint or precision=fp32"
            )


def _write_entry(entry: Path, raw: Features) -> None:
    """Store arrays under `entry`, visible only when complete."""
    partial = partial_of(entry)
    arrays = {f"block_{number}": values for number, values in enumerate(raw.blocks)} | {"indices": raw.indices}
    if raw.has_class_token:
        arrays["mean_patch"] = raw.mean_patch
    facts = {"num_blocks": len(raw.blocks), "has_class_token": raw.has_class_token}
    try:
        partial.mkdir(parents=True)
        for name, values in arrays.items():
            np.save(partial / f"{name}.npy", values)
        (partial / "facts.json").write_text(json.dumps(facts))
    except OSError:  # a full disk: what is there would only make it fuller
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        os.replace(partial, entry)
    except OSError:  # another process stored the same features first
        shutil.rmtree(partial)


def _read_entry(entry: Path) -> Features | None:
    """The stored arrays, memory-mapped; None when there are none or they are damaged."""
    try:
        facts = json.loads((entry / "facts.json").read_text())
        blocks = [np.load(entry / f"block_{i}.npy", mmap_mode="r") for i in range(facts["num_blocks"])]
        mean_patch = np.load(entry / "mean_patch.npy", mmap_mode="r") if facts["has_class_token"] else blocks[0]
        indices = np.load(entry / "indices.npy")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        shutil.rmtree(entry, ignore_errors=True)
        return None
    return Features(list(blocks), mean_patch, facts["has_class_token"], indices)
