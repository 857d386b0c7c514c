"""Does the fast augmentation train as well as the published one? k-NN after equally many steps with either.

    python benchmarks/augmentation.py [--steps 1000] [--seeds 0 1 2] [--quick] [--json FILE] [--output-dir OUT]
        [--train-dataset SPEC --val-dataset SPEC]

Both arms are `sslvit pretrain` with the same recipe (DINO on a ViT of 4 blocks of width 96), weights and order of
images. `ours` cuts crops in uint8 and colours them in batches by one affine map per image; `reference` is DINO's
pipeline on Pillow images, one by one (dino_views in data.py). Real images come from SSLVIT_DATA (CIFAR-10) or the two
specs.

Rows: `augmentation/{ours,reference}/knn/top1` for each seed, and `augmentation/difference`, the mean over seeds of ours
minus the reference, with a t interval: 0 should lie within it. OUT holds a run for each arm and seed; finished ones are
not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from data import dino_views
from PIL import Image
from stored import store
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import sslvit
from sslvit.data.decode import decode
from sslvit.data.loader import Loader, Views
from sslvit.data.photometry import NUM_PARAMETERS
from sslvit.data.sources import Source
from sslvit.encoder.config import IMAGENET_MEAN, IMAGENET_STD
from sslvit.errors import EXIT_INPUT, InputError
from sslvit.objectives.pretraining import Pretraining
from sslvit.probes.rows import describe, row

BATCH_SIZE = 128
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided quantiles of Student's t, by number of seeds
RECIPE: dict[str, Any] = {
    "batch_size": BATCH_SIZE,
    "encoder": {"name": "vit_tiny_patch16_224", "embed_dim": 96, "depth": 4, "num_heads": 3}
    | {"image_size": 32, "patch_size": 4},
    "dino": {"weight": 1.0, "student_visible_ratio": 1.0, "num_teacher_views": 2},
    "crops": {"num_local": 4, "local_size": 16, "global_scale": [0.4, 1.0]},
}


class ReferenceViews(Dataset):
    """Each image through DINO's augmentation: a list of normalised float views."""

    def __init__(self, source: Source, config: Any) -> None:
        self.source, self.views = source, dino_views(config.crops, config.encoder.image_size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = Image.fromarray(decode(self.source.read(index), channels=3))
        return [view(image) for view in self.views]


class ReferenceBatches:
    """The batches of our loader's order, with reference views: coloured and normalised floats."""

    def __init__(self, loader: Loader, source: Source, config: Any) -> None:
        self.loader, self.config, self.views = loader, config, ReferenceViews(source, config)

    def seek(self, cursor: int) -> None:
        self.loader.seek(cursor)

    def advice(self) -> str:
        """For the log; the reference is slow by design."""
        return "the reference augmentation is slow"

    def _order(self) -> Iterator[list[int]]:
        cursor = self.loader.cursor
        while True:
            yield self.loader.ids_at(cursor)[0].tolist()
            cursor += self.config.batch_size

    def __iter__(self) -> Iterator[tuple[Views, int]]:
        cursor, num_global = self.loader.cursor, self.config.crops.num_global
        generator = torch.Generator().manual_seed(self.config.seed + cursor)  # of the workers' seeds
        order = Endless(self._order())
        stream = DataLoader(self.views, batch_sampler=order, num_workers=2, generator=generator)
        for views in stream:
            ids = torch.from_numpy(self.loader.ids_at(cursor)[0].copy())
            cursor += self.config.batch_size
            crops = (torch.stack(views[:num_global]), torch.stack(views[num_global:]))
            rows = [torch.zeros(len(group), len(ids), NUM_PARAMETERS) for group in crops]
            yield Views(*crops, *rows, ids, torch.zeros_like(ids)), cursor


class Endless:
    """An endless batch sampler."""

    def __init__(self, order: Iterator[list[int]]) -> None:
        self._order = order

    def __iter__(self) -> Iterator[list[int]]:
        return self._order


def train(arm: str, seed: int, options: argparse.Namespace) -> Path:
    """One run; the reference arm has loader and colour replaced, and nothing else."""
    folder = options.output_dir / "cells" / f"{arm}-seed{seed}-{options.steps}"
    keys = {**RECIPE, "steps": options.steps, "seed": seed, "device": "cpu", "knn": {"every": options.steps}}
    keys |= {"val_data": options.val_dataset, "mae": None, **options.smaller}
    with augmented_by(arm):
        return sslvit.pretrain(data=options.train_dataset, output_dir=folder, **keys)


@contextlib.contextmanager
def augmented_by(arm: str) -> Iterator[None]:
    """For the reference: our loader's order with other views, and colours that are there already."""
    if arm == "ours":
        yield
        return
    verb = importlib.import_module("sslvit.verbs.pretrain")
    ours = verb._loader

    def loader(config: Any, source: Source, *more: Any) -> ReferenceBatches:
        return ReferenceBatches(ours(config, source, *more), source, config)

    with mock.patch.object(verb, "_loader", loader), mock.patch.object(Pretraining, "_colour_crops", renormalized):
        yield


def renormalized(module: Pretraining, crops: Tensor, rows: Tensor) -> Tensor:
    """From ImageNet's mean and std, which `dino_views` uses, to those of the run."""
    theirs, own = (IMAGENET_MEAN, IMAGENET_STD), (module.preprocessing.mean, module.preprocessing.std)
    (mean, std), (own_mean, own_std) = ([torch.tensor(v).view(-1, 1, 1) for v in pair] for pair in (theirs, own))
    return (crops * std + mean - own_mean) / own_std


def top1(run: Path) -> float:
    """k-NN at the end of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["knn/top1"] for line in reversed(lines) if "knn/top1" in line)


def difference(ours: list[float], reference: list[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean of the paired differences and its 95% t interval; None with one seed."""
    apart = [a - b for a, b in zip(ours, reference, strict=True)]
    mean = statistics.fmean(apart)
    if len(apart) not in T_95:
        return mean, None
    half = T_95[len(apart)] * statistics.stdev(apart) / math.sqrt(len(apart))
    return mean, (mean - half, mean + half)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parse(arguments)
    if not (options.train_dataset and options.val_dataset):
        print("skipped: SSLVIT_DATA is not set; set it, or give --train-dataset and --val-dataset")
        return 0
    try:
        found = {arm: [top1(train(arm, seed, options)) for seed in options.seeds] for arm in ("ours", "reference")}
    except InputError as error:
        print(error, file=sys.stderr)
        return EXIT_INPUT
    words = describe(
        f"DINO, ViT of width 96 and depth 4 at 32 px, {options.steps} steps of {BATCH_SIZE}; k-NN, k 20", ""
    )
    rows = [
        row(f"augmentation/{arm}/knn/top1", value, ci95=None, protocol=words, data=options.val_dataset, seed=seed)
        for arm, values in found.items()
        for seed, value in zip(options.seeds, values, strict=True)
    ]
    mean, interval = difference(found["ours"], found["reference"])
    rows.append(
        row(
            "augmentation/difference",
            mean,
            ci95=interval,
            protocol=words,
            data=options.val_dataset,
            seed=options.seeds[0],
        )
    )
    print(f"\n{markdown(rows)}")
    store(rows, markdown(rows), options.json)
    return 0


def markdown(rows: list[dict]) -> str:
    """k-NN of each arm and seed, and how far the arms are apart."""
    *measured, apart = rows
    seeds = list(dict.fromkeys(row["seed"] for row in measured))
    lines = [f"{apart['data']}; {apart['protocol']}", ""]
    lines += [f"| k-NN | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |", "|---" * (len(seeds) + 2) + "|"]
    for arm in ("ours", "reference"):
        values = [100 * row["value"] for row in measured if row["name"].split("/")[1] == arm]
        lines.append(f"| {arm} | {' | '.join(f'{value:.1f}' for value in values)} | {np.mean(values):.1f} |")
    interval = apart["ci95"]
    told = "one seed" if interval is None else f"95% interval {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"
    return "\n".join([*lines, "", f"Ours minus the reference: {100 * apart['value']:+.1f} points, {told}."])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="default 1000; 6 with --quick")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2; 0 with --quick")
    parser.add_argument("--quick", action="store_true", help="a few steps of a small encoder: a trial")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="all rows, in the form of results.json; the table beside"
    )
    parser.add_argument("--output-dir", type=Path, metavar="OUT", default=Path("runs/benchmark-augmentation"))
    parser.add_argument("--train-dataset", metavar="SPEC", help="default: CIFAR-10 under SSLVIT_DATA")
    parser.add_argument("--val-dataset", metavar="SPEC")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (6 if options.quick else 1000)
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    options.smaller = {"encoder": {**RECIPE["encoder"], "depth": 1}, "batch_size": 8} if options.quick else {}
    root = os.environ.get("SSLVIT_DATA")
    if root:
        options.train_dataset = options.train_dataset or f"parquet:{root}/cifar10/train-*.parquet"
        options.val_dataset = options.val_dataset or f"parquet:{root}/cifar10/test-*.parquet"
    return options


if __name__ == "__main__":
    sys.exit(main())
