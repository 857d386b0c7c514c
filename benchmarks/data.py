"""Images to views on one core: ours beside DINO's published pipeline on Pillow and beside torchvision v2 on uint8.

    python benchmarks/data.py [--quick] [--json benchmarks/results/data.json]

Works: `jpeg` makes 2 x 224 + 8 x 96 views of 500 x 375 JPEGs, decoding included; `tiny` makes 2 x 32 + 4 x 16 views of
32 x 32 images in memory. All variants run round-robin in one process on one thread, timed by the processor time they
take (rounds.py); the ratio is that of medians. `workers` makes the views of `jpeg` on every core, in wall time: in the
`threads` of our loader and in `processes` of torch's, which call the same functions.
Rows: `data/WORK/VARIANT/images_per_second`, `data/{jpeg,tiny}/{geometry,full}/ratio` over DINO's and
`data/workers/threads/ratio` over processes, above 1 is faster.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from rounds import Probe, measure
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from sslvit.data.config import DINO_PHOTOMETRY, CropsConfig
from sslvit.data.crops import make_views
from sslvit.data.decode import decode
from sslvit.data.loader import Loader, usable_cores
from sslvit.data.photometry import apply
from sslvit.encoder.config import IMAGENET_MEAN, IMAGENET_STD

JPEG_CROPS = CropsConfig(num_global=2, global_scale=[0.4, 1.0], num_local=8, local_size=96)
TINY_CROPS = CropsConfig(num_global=2, global_scale=[0.4, 1.0], num_local=4, local_size=16)
WORKS = ("jpeg", "tiny", "workers")
PACE = 16  # batches in one timing of workers, several times what they keep ready
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


class Jpegs:
    """Synthetic photographs (1/f noise with grain) as JPEG files in memory."""

    spec, labels, class_names, has_text = "synthetic 500 x 375 JPEGs", {}, {}, False

    def __init__(self, n: int = 32) -> None:
        random = np.random.default_rng(0)
        self.files = [self._file(random) for _ in range(n)]

    def _file(self, random: np.random.Generator) -> bytes:
        down, across = np.fft.fftfreq(375)[:, None, None], np.fft.rfftfreq(500)[None, :, None]
        spectrum = np.fft.rfft2(random.normal(size=(375, 500, 3)), axes=(0, 1)) / (np.hypot(down, across) + 2e-3) ** 1.3
        picture = np.fft.irfft2(spectrum, s=(375, 500), axes=(0, 1))
        picture = 128 + 50 * picture / picture.std() + random.normal(scale=3, size=picture.shape)
        file = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
        return file.getvalue()

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> bytes:
        return self.files[index]


class Tiny(Jpegs):
    """32 x 32 images in memory."""

    spec = "32 x 32 arrays"

    def __init__(self, n: int = 512) -> None:
        self.files = list(np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))


def dino_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(1).uniform_(0.1, 2.0))))


def dino_views(crops: CropsConfig, size: int) -> list[Callable[[Image.Image], torch.Tensor]]:
    """The published augmentation (2104.14294, section 3.1), a callable for each view, in torchvision's classes."""

    def view(side: int, scale: list[float], blur: float, solarize: float) -> v1.Compose:
        steps = [
            v1.RandomResizedCrop(side, scale=scale, interpolation=InterpolationMode.BICUBIC),
            v1.RandomHorizontalFlip(0.5),
            v1.RandomApply([v1.ColorJitter(**JITTER)], p=0.8),
            v1.RandomGrayscale(0.2),
            v1.RandomApply([v1.Lambda(dino_blur)], p=blur),
            v1.RandomApply([v1.Lambda(lambda image: ImageOps.solarize(image, 128))], p=solarize),
            v1.ToTensor(),
            v1.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        return v1.Compose(steps)

    local = view(crops.local_size, crops.local_scale, 0.5, 0.0)
    return [view(size, crops.global_scale, 1.0, 0.0), view(size, crops.global_scale, 0.1, 0.2)] + [
        local
    ] * crops.num_local


def v2_views(crops: CropsConfig, size: int) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The same in torchvision v2 on uint8 tensors."""

    def view(side: int, scale: list[float], blur: float, solarize: float) -> v2.Compose:
        taps = max(3, 2 * (side // 20) + 1)
        steps = [
            v2.RandomResizedCrop(side, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(**JITTER)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(taps, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        return v2.Compose(steps)

    local = view(crops.local_size, crops.local_scale, 0.5, 0.0)
    return [view(size, crops.global_scale, 1.0, 0.0), view(size, crops.global_scale, 0.1, 0.2)] + [
        local
    ] * crops.num_local


def variants(source: Jpegs, crops: CropsConfig, size: int, batch: int) -> dict[str, Callable[[], None]]:
    """Name -> a function that makes the views of `batch` images."""
    keep = 2**30 if isinstance(source, Tiny) else 0
    geometry, full = (
        iter(Loader(source, crops, DINO_PHOTOMETRY, size, 3, batch, seed=0, num_workers=0, cache_bytes=keep))
        for _ in range(2)
    )
    pillow, tensor = dino_views(crops, size), v2_views(crops, size)
    state = {"next": 0}

    def indices() -> list[int]:
        state["next"] += batch
        return [(state["next"] + i) % len(source) for i in range(batch)]

    def open_pillow(data: bytes | np.ndarray) -> Image.Image:
        return Image.fromarray(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data)).convert("RGB")

    def dino() -> None:
        made = []
        for i in indices():
            image = open_pillow(source.read(i))
            made.append([view(image) for view in pillow])
        for views in zip(*made, strict=True):
            torch.stack(views)

    def torchvision() -> None:
        made = []
        for i in indices():
            image = torch.from_numpy(decode(source.read(i))).permute(2, 0, 1)
            made.append([view(image) for view in tensor])
        for views in zip(*made, strict=True):
            torch.stack(views)

    def ours_full() -> None:
        views, _ = next(full)
        for images, rows in (
            (views.global_crops, views.global_photometry),
            (views.local_crops, views.local_photometry),
        ):
            apply(images.flatten(0, 1), rows.flatten(0, 1), IMAGENET_MEAN, IMAGENET_STD)

    return {"dino_pillow": dino, "torchvision_v2": torchvision, "geometry": lambda: next(geometry), "full": ours_full}


class ViewsDataset(Dataset):
    """All views of an image, made by our functions; for torch's DataLoader."""

    def __init__(self, source: Jpegs, crops: CropsConfig, size: int) -> None:
        self.source, self.crops, self.size = source, crops, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        made = make_views(decode(self.source.read(index)), self.crops, self.size, DINO_PHOTOMETRY, 0, 0, index)
        return list(vars(made).values())


def by_workers(source: Jpegs, crops: CropsConfig, size: int, batch: int, cores: int) -> dict[str, Callable[[], None]]:
    """Name -> a function that takes PACE batches from workers that are running."""
    loader = Loader(source, crops, DINO_PHOTOMETRY, size, 3, batch, seed=0, num_workers=cores, cache_bytes=0)
    threads = iter(loader)
    dataset = ViewsDataset(source, crops, size)
    endless = RandomSampler(dataset, replacement=True, num_samples=10**9)
    processes = iter(DataLoader(dataset, batch, sampler=endless, num_workers=cores))

    def take(stream: Iterator) -> None:
        for _ in range(PACE):
            next(stream)

    return {"threads": lambda: take(threads), "processes": lambda: take(processes)}


def rates_of(
    work: dict[str, Callable[[], None]], batch: int, seconds: float, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Images a second of each variant, the timings that count."""
    timings = measure(work, seconds=seconds, wanted=10_000, probe=Probe(512, clock), clock=clock)
    return {name: [batch / took for took in timing.seconds] for name, timing in timings.items()}


def row(name: str, value: float, rates: list[float], data: str) -> dict:
    protocol = f"median of {len(rates)} gated timings, one thread, from {min(rates):.1f} to {max(rates):.1f} images/s"
    return {"name": name, "value": value, "ci95": None, "protocol": protocol, "data": data, "seed": 0, "step": 0}


def rows_of(work: str, rates: dict[str, list[float]], data: str) -> list[dict]:
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    rows = [row(f"data/{work}/{name}/images_per_second", medians[name], rates[name], data) for name in rates]
    others = {"geometry": "dino_pillow", "full": "dino_pillow", "threads": "processes"}
    for name in rates.keys() & others.keys():
        rows.append(row(f"data/{work}/{name}/ratio", medians[name] / medians[others[name]], rates[name], data))
    return rows


def run(work: str, seconds: float) -> list[dict]:
    """The rows of a work."""
    if work == "workers":
        source, batch, cores = Jpegs(), 16, usable_cores()
        made = by_workers(source, JPEG_CROPS, 224, batch, cores)
        rates = rates_of(made, PACE * batch, seconds, time.perf_counter)
        return rows_of(work, rates, f"{source.spec}, {cores} workers")
    source, crops, size, batch = {"jpeg": (Jpegs(), JPEG_CROPS, 224, 8), "tiny": (Tiny(), TINY_CROPS, 32, 64)}[work]
    return rows_of(work, rates_of(variants(source, crops, size, batch), batch, seconds), source.spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 seconds a work instead of 120")
    parser.add_argument("--json", type=Path, help="where rows go; works whose rows are there are not run again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    for work in WORKS:
        if any(entry["name"].startswith(f"data/{work}/") for entry in done):
            continue
        done += run(work, 20 if options.quick else 120)
        if options.json:
            options.json.write_text(json.dumps(done, indent=1) + "\n")
    for entry in done:
        print(f"{entry['name']:45s} {entry['value']:10.2f}   {entry['protocol']}")


if __name__ == "__main__":
    main()
