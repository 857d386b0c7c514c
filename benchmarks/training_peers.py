"""Whole training from a folder of JPEG files: ours, and the usual way with torchvision v2 in a DataLoader.

Each variant is a stream of batches and a step. It is timed over some steps after one that is not, with its workers
running, so that the pace is that of a run and not of a start.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from data import Jpegs, v2_views
from plain_steps import Batch, PlainDino
from step_peers import STEP, OurStep, StepWork, our_config, our_module
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, read_image

from sslvit.data.config import DINO_PHOTOMETRY, CropsConfig
from sslvit.data.loader import Loader, Views
from sslvit.data.sources import open_source
from sslvit.distributed import compiles
from sslvit.objectives.pretraining import Pretraining
from sslvit.optim import clip_grad_norm_, step_unless


def write_jpegs(folder: Path, count: int, originals: int = 32) -> Path:
    """`count` JPEG files of 500 x 375 made of `originals` pictures, once."""
    if len(list(folder.glob("*.jpg"))) != count:
        folder.mkdir(parents=True, exist_ok=True)
        files = Jpegs(min(originals, count)).files
        for i in range(count):
            (folder / f"{i:06d}.jpg").write_bytes(files[i % len(files)])
    return folder


class V2Views(Dataset):
    """Files through DINO's augmentation in torchvision v2, as it advises: uint8 tensors, floats at last."""

    def __init__(self, folder: Path, crops: CropsConfig, size: int) -> None:
        self.files = sorted(str(path) for path in folder.glob("*.jpg"))
        self.views = v2_views(crops, size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's, of its own reader
            image = read_image(self.files[index], ImageReadMode.RGB)
        return [view(image) for view in self.views]


def runs(work: StepWork, folder: Path, steps: int, workers: int, device: str = "cpu") -> dict[str, Callable[[], None]]:
    """Name -> train `steps` steps. `ours`; our step on torchvision's views; the published step on them.

    The published step is in fp32 on a CPU, as its 16 bits are for CUDA only, and under autocast to bf16 on a GPU.
    """
    torch.manual_seed(0)
    module = our_module(work)
    config = our_config(work)
    plain = PlainDino(module.student, module.objectives["dino"].student_head).to(device)
    module.to(device).compile_blocks(compiles(device))
    on_gpu = device != "cpu"
    colour = module._colour
    ours = OurStep(module, work)
    views = V2Views(folder, config.crops, work.image)

    def train_ours(batches: Iterator[tuple[Views, int]]) -> None:
        module._colour = colour  # type: ignore[method-assign]
        _step(module, ours, next(batches)[0].to(device))

    def train_on_floats(batches: Iterator[list[Tensor]]) -> None:
        module._colour = lambda views: {"global": views.global_crops, "local": views.local_crops}  # type: ignore
        ours.step(_batch(next(batches)).to(device), True)

    def train_plainly(batches: Iterator[list[Tensor]]) -> None:
        plain.step(_batch(next(batches)).to(device), on_gpu)

    def open_ours() -> Iterator[tuple[Views, int]]:
        source = open_source(f"folder:{folder}")
        return iter(Loader(source, config.crops, DINO_PHOTOMETRY, work.image, 3, work.batch, seed=0,
                           num_workers=workers, pin_memory=on_gpu, cache_bytes=0))  # fmt: skip

    def open_v2() -> Iterator[list[Tensor]]:
        return iter(DataLoader(views, work.batch, True, num_workers=workers, drop_last=True, pin_memory=on_gpu))

    return {
        "ours": Paced(open_ours, train_ours, steps),
        "torchvision_v2": Paced(open_v2, train_on_floats, steps),
        "official_torchvision_v2": Paced(open_v2, train_plainly, steps),
    }


def _batch(views: list[Tensor]) -> Batch:
    return Batch(views[:2], views[2:])


def _step(module: Pretraining, ours: OurStep, views: Views) -> None:
    """As `OurStep.step`, with colour."""
    ours.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(views.global_crops.device.type, torch.bfloat16):
        loss, _ = module(views, STEP)
    loss.backward()
    norm = clip_grad_norm_(module.parameters(), ours.clip)
    step_unless(ours.optimizer, (~torch.isfinite(norm)).float())
    module.after_step(STEP)


class Paced:
    """Called, it trains `steps` steps on a stream that `start` has opened and warmed; `start` closes it afterwards."""

    def __init__(self, open_stream: Callable[[], Iterator], step: Callable[[Iterator], None], steps: int) -> None:
        self._open, self._step, self._steps = open_stream, step, steps
        self._stream: Iterator | None = None

    def start(self) -> None:
        """Untimed: workers start, and one step is made."""
        self.stop()
        self._stream = self._open()
        self._step(self._stream)

    def __call__(self) -> None:
        assert self._stream is not None
        for _ in range(self._steps):
            self._step(self._stream)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def stop(self) -> None:
        """Ends the workers, so that they do not run beside another variant."""
        with contextlib.suppress(AttributeError):
            self._stream.close()  # type: ignore[union-attr]
        shutdown = getattr(self._stream, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
        self._stream = None
