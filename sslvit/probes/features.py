"""Frozen features of a set of images: extracted once, cached by content, used by every probe. Not a probe itself.

Features are taken on clean images (resize, centre crop, no augmentation), after the final norm, from the last blocks
(`get_intermediate_layers` of DINO). The class token stands for the image; for an encoder without one, the mean patch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sslvit.data.loader import clean_batches
from sslvit.data.photometry import normalize
from sslvit.data.sources import Source
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.vit import forward_layers
from sslvit.errors import InputError

CACHE_VERSION = 1
Progress = Callable[[int, int], None]


@dataclass
class Features:
    """What the encoder says about n images. Arrays are float32 and not normalised.

    blocks: per block, the last one first, (n, D): the class token after the final norm (mean patch without one).
    mean_patch: (n, D), the mean of the last block's normed patches; equal to blocks[0] without a class token.
    labels: name -> (n,) int64, empty without labels; class_names: name -> names of the classes 0, 1, ...
    """

    blocks: list[np.ndarray]
    mean_patch: np.ndarray
    has_class_token: bool
    names: list[str]
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.blocks[0])

    @property
    def cls(self) -> np.ndarray:
        """(n, D) of the last block: what k-NN compares and `embed` writes."""
        return self.blocks[0]


def choose_indices(num_images: int, at_most: int | None, seed: int = 0) -> np.ndarray:
    """All indices, or a sorted keyed sample of `at_most` of them, (n,) int64."""
    if at_most is None or at_most >= num_images:
        return np.arange(num_images)
    return np.sort(np.random.default_rng([seed, num_images]).choice(num_images, at_most, replace=False))


def extract(
    module: nn.Module,
    preprocessing: Preprocessing,
    source: Source,
    *,
    fingerprint: str | None = None,
    num_blocks: int = 1,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    num_workers: int = 0,
    num_images: int | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Features:
    """Features of the images of `source` (unreadable ones are left out), from the last `num_blocks` blocks.

    `fingerprint` names the encoder's weights; with it and `cache_dir` the features are stored and found again by
    everything they depend on. InputError when there is no readable image or a feature is not finite.
    """
    indices = choose_indices(len(source), num_images, seed)
    entry = None
    if cache_dir is not None and fingerprint is not None:
        facts = [
            CACHE_VERSION,
            fingerprint,
            asdict(preprocessing),
            num_blocks,
            precision,
            source_digest(source, indices),
        ]
        entry = cache_dir / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        cached = _read_entry(entry)
        if cached is not None:
            return with_labels(cached, source)
    features = _run(
        module,
        preprocessing,
        source,
        indices,
        num_blocks,
        batch_size,
        torch.device(device),
        precision,
        num_workers,
        progress,
    )
    _check_finite(features, source)
    if entry is not None:
        _write_entry(entry, features)
    return with_labels(features, source)


@dataclass
class _Raw:
    """Features with the index of each image in its source, before labels and names are attached."""

    blocks: list[np.ndarray]
    mean_patch: np.ndarray
    has_class_token: bool
    indices: np.ndarray


@torch.no_grad()
def _run(
    module: nn.Module,
    preprocessing: Preprocessing,
    source: Source,
    indices: np.ndarray,
    num_blocks: int,
    batch_size: int,
    device: torch.device,
    precision: str,
    num_workers: int,
    progress: Progress | None,
) -> _Raw:
    was_training = module.training
    module.eval().to(device)
    blocks: list[list[torch.Tensor]] = [[] for _ in range(num_blocks)]
    patches: list[torch.Tensor] = []
    kept: list[np.ndarray] = []
    has_class_token = True
    for images, batch_indices in clean_batches(source, preprocessing, batch_size, num_workers, indices):
        pixels = normalize(images.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            layers = forward_layers(module, pixels, num_blocks)
        for block, tokens in zip(blocks, reversed(layers), strict=True):
            block.append(tokens.cls.float().cpu())
        patches.append(layers[-1].mean_patch.float().cpu())
        has_class_token = layers[-1].has_class_token
        kept.append(np.asarray(batch_indices, dtype=np.int64))
        if progress is not None:
            progress(sum(map(len, kept)), len(indices))
    module.train(was_training)
    if not kept:
        raise InputError(f"{source.spec} has no readable image; `sslvit check-data` lists the reasons")
    return _Raw(
        [torch.cat(block).numpy() for block in blocks],
        torch.cat(patches).numpy(),
        has_class_token,
        np.concatenate(kept),
    )


def with_labels(raw: _Raw, source: Source) -> Features:
    """Attach the names and labels that `source` gives to the images that were read."""
    return Features(
        blocks=raw.blocks,
        mean_patch=raw.mean_patch,
        has_class_token=raw.has_class_token,
        names=[source.name(int(i)) for i in raw.indices],
        labels={name: np.asarray(values)[raw.indices] for name, values in source.labels.items()},
        class_names=dict(source.class_names),
    )


def pixel_features(
    source: Source,
    size: int = 32,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    num_images: int | None = None,
    seed: int = 0,
) -> Features:
    """The control without an encoder: images at `size` px, flattened, on the scale -1..1, (n, 3 * size * size)."""
    preprocessing = Preprocessing(image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    indices = choose_indices(len(source), num_images, seed)
    pixels, kept = [], []
    for images, batch_indices in clean_batches(source, preprocessing, batch_size, num_workers, indices):
        pixels.append((images.float() / 127.5 - 1).flatten(1).numpy())
        kept.append(np.asarray(batch_indices, dtype=np.int64))
    if not kept:
        raise InputError(f"{source.spec} has no readable image; `sslvit check-data` lists the reasons")
    flat = np.concatenate(pixels)
    return with_labels(_Raw([flat], flat, False, np.concatenate(kept)), source)


def source_digest(source: Source, indices: np.ndarray, num_samples: int = 64) -> str:
    """A fingerprint of the chosen images: their names, and the bytes of up to `num_samples` of them."""
    digest = hashlib.sha256(f"{source.spec} {len(source)} {len(indices)}".encode())
    for i in indices:
        digest.update(source.name(int(i)).encode(errors="surrogateescape"))
    for i in indices[np.linspace(0, len(indices) - 1, min(num_samples, len(indices))).astype(int)]:
        data = source.read(int(i))
        digest.update(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes())
    return digest.hexdigest()


def _check_finite(raw: _Raw, source: Source) -> None:
    for values in [*raw.blocks, raw.mean_patch]:
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            name = source.name(int(raw.indices[bad[0]]))
            raise InputError(
                f"{bad.size} of {len(values)} images of {source.spec} have NaN or infinite features (first: {name}); "
                "the encoder's weights are damaged or diverged, use an earlier checkpoint or precision=fp32"
            )


def _write_entry(entry: Path, raw: _Raw) -> None:
    """Store `raw` under `entry`, visible only when complete."""
    partial = entry.with_name(f"{entry.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, values in enumerate(raw.blocks):
        np.save(partial / f"block_{number}.npy", values)
    np.save(partial / "mean_patch.npy", raw.mean_patch)
    np.save(partial / "indices.npy", raw.indices)
    facts = {"num_blocks": len(raw.blocks), "has_class_token": raw.has_class_token, "saved": time.time()}
    (partial / "facts.json").write_text(json.dumps(facts))
    try:
        os.replace(partial, entry)
    except OSError:  # another process stored the same features first
        shutil.rmtree(partial)


def _read_entry(entry: Path) -> _Raw | None:
    """The stored features, memory-mapped; None when there are none or they are damaged."""
    try:
        facts = json.loads((entry / "facts.json").read_text())
        blocks = [np.load(entry / f"block_{i}.npy", mmap_mode="r") for i in range(facts["num_blocks"])]
        mean_patch = np.load(entry / "mean_patch.npy", mmap_mode="r")
        return _Raw(blocks, mean_patch, facts["has_class_token"], np.load(entry / "indices.npy"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        shutil.rmtree(entry, ignore_errors=True)
        return None
