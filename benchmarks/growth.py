"""How time grows: images a second with the number of listed files, a step with batch, crops and prototypes; a plot."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rounds import Timing, measure
from step_peers import OurStep, StepWork, make_batch, our_module
from training_peers import write_jpegs

from sslvit.data.config import DINO_PHOTOMETRY, CropsConfig
from sslvit.data.folder import CACHE_FROM
from sslvit.data.loader import Loader
from sslvit.data.sources import open_source

FILES_PER_FOLDER = 1000
LINKS = 2000  # hard links of one file: below what any file system refuses

SETTLED = 4.0  # seconds after which an index of a folder is trusted, and kept

Curve = tuple[list[float], list[float]]  # sizes, seconds or images a second


def linked_folder(root: Path, count: int) -> Path:
    """`count` JPEG files in class folders; they are links to a few, so that a million cost no disk."""
    folder, done = root / f"listed-{count}", root / f"listed-{count}.done"
    if done.exists():
        return folder
    originals = sorted(write_jpegs(root / "originals", max(32, -(-count // LINKS))).glob("*.jpg"))
    for i in range(count):
        if i % FILES_PER_FOLDER == 0:
            place = folder / f"{i // FILES_PER_FOLDER:05d}"
            place.mkdir(parents=True, exist_ok=True)
        target = place / f"{i % FILES_PER_FOLDER:04d}.jpg"
        if not target.exists():
            os.link(originals[i // LINKS], target)
    done.touch()
    return folder


def listing(root: Path, counts: Sequence[int], seconds: float) -> dict[str, Curve]:
    """images_per_second of the loader, and seconds to list a folder first and to open it again, by number of files."""
    first, again, loaders = [], [], {}
    crops = CropsConfig(num_global=2, global_scale=[0.4, 1.0], num_local=6, local_size=32)
    for count in counts:
        folder = linked_folder(root, count)
        time.sleep(SETTLED)
        took = [_seconds(lambda folder=folder: open_source(f"folder:{folder}")) for _ in range(4)]
        first.append(took[0])
        again.append(min(took[1:]))
        source = open_source(f"folder:{folder}")
        assert len(source) == count
        loader = Loader(source, crops, DINO_PHOTOMETRY, 64, 3, 32, seed=0, num_workers=0, cache_bytes=0)
        stream = iter(loader)
        loaders[str(count)] = lambda stream=stream: next(stream)
    timings = measure(loaders, seconds=seconds)
    sizes = [float(count) for count in counts]
    return {
        "images_per_second": (sizes, [32 / timings[str(count)].median for count in counts]),
        "first_listing": (sizes, first),
        "reopening": (sizes, again),
    }


def _seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def step_times(base: StepWork, seconds: float, bf16: bool, quick: bool) -> dict[str, Curve]:
    """Seconds of our step against batch, number of local crops and number of prototypes, one varied at a time."""
    batches = [2, 4, 8] if quick else [4, 8, 16, 32, 64]
    local = [0, 2, 6] if quick else [0, 2, 4, 6, 8, 10]
    prototypes = [1024, 4096] if quick else [1024, 4096, 16384, 65536]
    works = {
        "batch": [(n, replace(base, batch=n)) for n in batches],
        "crops": [(n, replace(base, num_local=n)) for n in local],
        "prototypes": [(n, replace(base, prototypes=n)) for n in prototypes],
    }
    return {name: _curve(cases, seconds / len(works), bf16) for name, cases in works.items()}


def _curve(cases: Sequence[tuple[int, StepWork]], seconds: float, bf16: bool) -> Curve:
    variants = {}
    for size, work in cases:
        torch.manual_seed(0)
        step, batch = OurStep(our_module(work), work).step, make_batch(work)
        variants[str(size)] = lambda step=step, batch=batch: step(batch, bf16)
    timings: dict[str, Timing] = measure(variants, seconds=seconds)
    return [float(size) for size, _ in cases], [timings[str(size)].median for size, _ in cases]


def exponent(curve: Curve) -> float:
    """Of size in value ~ size^exponent over the second half of a curve, where constant costs weigh less; 1: linear."""
    sizes, values = curve
    middle = (len(sizes) - 1) // 2
    return math.log(values[-1] / values[middle]) / math.log(sizes[-1] / sizes[middle])


#: What stands on the axes of a curve: sizes, values.
AXES = {
    "images_per_second": ("listed files", "images/s"),
    "first_listing": ("listed files", "seconds to list them"),
    "reopening": ("listed files", f"seconds to open again\n(an index is kept from {CACHE_FROM:,} on)"),
    "batch": ("images in a batch", "seconds a step"),
    "crops": ("local crops", "seconds a step"),
    "prototypes": ("prototypes", "seconds a step"),
}


def plot(curves: dict[str, Curve], file: Path) -> bool:
    """All curves, three in a row; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = math.ceil(len(curves) / 3)
    figure = Figure(figsize=(10, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flatten()
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    for axis, (name, (sizes, values)) in zip(axes, curves.items(), strict=False):
        axis.plot(sizes, values, marker="o")
        axis.set_xlabel(AXES[name][0], fontsize=9)
        axis.set_ylabel(AXES[name][1], fontsize=9)
        axis.grid(alpha=0.3)
        listed = AXES[name][0] == "listed files"
        axis.set_xscale("log" if listed else "linear")
        if listed and name != "images_per_second":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0, top=1.1 * max(values))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    return True
