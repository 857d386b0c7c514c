"""The record of a run: `metrics.jsonl`, `train.log`, TensorBoard when installed, and a progress line with rate and ETA.

Not an evaluator. Values stay tensors on their device and are averaged there between lines, so that logging makes no
step wait; they are read only when a line is due. Lines fall on fixed steps, and their averages go through checkpoints,
so that an interrupted run leaves the same lines as an uninterrupted one, apart from the fields about time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvit.distributed import all_reduce_sum_, is_main, world_size
from sslvit.errors import Resumable
from sslvit.run_folder import peak_memory_bytes
from sslvit.utilisation import peak_flops

__all__ = ["TIMING_FIELDS", "MetricsLog"]

TIMING_FIELDS = frozenset({"seconds", "images_per_s", "data_wait", "mfu", "peak_memory_mib", "eta", "monitor_s"})
WAITING = 0.3  # share of the time without data from which the loader is what limits the run
CONSOLE_SECONDS = 10.0  # a plain log gets a line at most this often


class MetricsLog:
    """One per run; `begin` opens a stage of it (pretraining is one stage with an empty name)."""

    def __init__(
        self,
        folder: Path,
        *,
        log_every: int | None = None,
        flops_per_image: float | None = None,
        precision: str = "fp32",
        data_advice: Callable[[], str] | None = None,
    ) -> None:
        """log_every: steps between lines; None gives about a hundred lines, and one at least every 100 steps.

        flops_per_image: what the model needs for an image and step, in `precision`; lines then hold "mfu", the share of
        the devices' peak. data_advice() says what to change once steps wait for data.
        """
        self.folder = Path(folder)
        self._flops_per_image, self._precision = flops_per_image, precision
        self._data_advice = data_advice
        self._wanted_every = log_every
        self._main = is_main()
        self._board: Any = None
        self._bar: Any = None
        if self._main:
            self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, steps: int, resumed: int | None, stage: str = "", device: torch.device | None = None) -> None:
        """Starts or resumes a stage; lines of it after step `resumed` (None: all of them) are cut off."""
        self.steps, self.stage = steps, stage
        self.device = device or torch.device("cpu")
        self.log_every = self._wanted_every or max(1, min(100, steps // 100))
        self._sums: dict[str, Tensor] = {}  # tensors stay on their device, numbers become float64 on the CPU
        self._counts: dict[str, int] = {}
        self._begun_at, self._begun_step = time.monotonic(), resumed or 0
        self._window = _Window(self._begun_at)
        self._said_at = -math.inf
        self._lines, self._advised = 0, False
        self._peak = 0.0
        if self._flops_per_image is not None:  # measured before loading and training share the machine
            self._peak = world_size() * peak_flops(str(self.device), self._precision)
        if self._main:
            _cut(self.folder / "metrics.jsonl", stage, -1 if resumed is None else resumed)
            self._open_board(-1 if resumed is None else resumed)
            self._open_bar(resumed or 0)

    def rewind(self, step: int) -> None:
        """Cuts the lines after `step`: the run was rolled back to it and will write them again."""
        if self._main:
            _cut(self.folder / "metrics.jsonl", self.stage, step)

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Takes one step's values (0-d tensors or numbers) into the averages of the next line."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                term = value.detach().to(self.device, torch.float32, non_blocking=True)
            else:
                term = torch.tensor(value, dtype=torch.float64)
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._counts[name] = self._counts.get(name, 0) + 1

    def tick(self, step: int, images: int, waited: float) -> None:
        """Counts one step: its images over all processes, and the seconds it waited for data."""
        self._window.images += images
        self._window.waited += waited
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def due(self, step: int) -> bool:
        """Whether a line falls on this step."""
        return step % self.log_every == 0 or step == self.steps

    def line(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Writes the averages since the last line beside `values`, which belong to this very step. Collective.

        Returns the line; apart from the fields about time it is the same on every process.
        """
        averages, timing = self._take_averages(), self._timing(step)
        row = {
            "step": step,
            **({"stage": self.stage} if self.stage else {}),
            **averages,
            **values,
            **timing,
        }
        self._window = _Window(time.monotonic())
        if self._main:
            self._write(row)
            self._board_add(step, row)
            self._show(step, row)
        self._advise(timing["data_wait"])
        return row

    def alarm(self, step: int, name: str, text: str) -> None:
        """Writes and says that something is wrong: {"step", "alarm", "text"}."""
        self._note(step, {"alarm": name, "text": text})
        self.say(f"alarm at step {step}, {name}: {text}")

    def event(self, step: int, name: str, text: str) -> None:
        """Writes and says what happened to the run itself: {"step", "event", "text"}."""
        self._note(step, {"event": name, "text": text})
        self.say(text)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the result of an evaluation at this step."""
        row = {"step": step, **({"stage": self.stage} if self.stage else {}), **values}
        if self._main:
            self._write(row)
            self._board_add(step, row)
            self.say(_plain(row))

    def _note(self, step: int, words: Mapping[str, str]) -> None:
        if self._main:
            self._write({"step": step, **({"stage": self.stage} if self.stage else {}), **words})

    def say(self, text: str) -> None:
        """One line for people: on the console and in train.log."""
        if not self._main:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)
        self._append("train.log", text + "\n")

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs so that the next line is the same after a resume. A collective call."""
        counts = {f"count/{name}": torch.tensor(count) for name, count in self._counts.items()}
        means = {f"sum/{name}": all_reduce_sum_(total.clone()) / world_size() for name, total in self._sums.items()}
        return {**means, **counts}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `state`."""
        self._sums, self._counts = {}, {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "count":
                self._counts[name] = int(value)
            else:
                self._sums[name] = value.clone() if value.dtype == torch.float64 else value.to(self.device, copy=True)

    def sync(self) -> None:
        """Makes the lines durable; called before a checkpoint that says they exist."""
        path = self.folder / "metrics.jsonl"
        if self._main and path.exists():
            with _resumable(path), open(path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())
        if self._board is not None:
            with _resumable(self.folder / "tb"):
                self._board.flush()

    def end(self) -> None:
        """Closes the stage's progress bar and TensorBoard file."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._board is not None:
            with contextlib.suppress(OSError):  # a full disk was reported where it was met
                self._board.close()
            self._board = None

    def _take_averages(self) -> dict[str, float]:
        """Over steps and processes, the loss first; the only place where values are read."""
        averages = dict.fromkeys(sorted(self._sums, key=lambda name: (name != "loss", name)), 0.0)
        for dtype in (torch.float32, torch.float64):
            names = [name for name, total in self._sums.items() if total.dtype == dtype]
            if names:
                sums = all_reduce_sum_(torch.stack([self._sums[name] for name in names]))
                averages |= {
                    name: total / (self._counts[name] * world_size())
                    for name, total in zip(names, sums.tolist(), strict=True)
                }
        self._sums, self._counts = {}, {}
        return averages

    def _timing(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        span = max(1e-9, now - self._window.since)
        done = max(1, step - self._begun_step)
        rate = self._window.images / span
        return {
            "images_per_s": round(rate, 2),
            "data_wait": round(self._window.waited / span, 4),
            **self._utilisation(rate),
            "seconds": round(now - self._begun_at, 3),
            "peak_memory_mib": _peak_memory_mib(self.device),
            "eta": round((now - self._begun_at) / done * (self.steps - step), 1),
        }

    def _utilisation(self, images_per_s: float) -> dict[str, float]:
        """{"mfu": share of the peak of all processes' devices}, {} where the model's FLOPs are not known."""
        if self._flops_per_image is None:
            return {}
        return {"mfu": round(images_per_s * self._flops_per_image / self._peak, 4)}

    def _advise(self, data_wait: float) -> None:
        """Says once per stage that steps wait for data, and what to change; the first line holds the start-up too."""
        self._lines += 1
        if self._data_advice is None or self._advised or self._lines < 2 or data_wait < WAITING:
            return
        self._advised = True
        self.say(f"loading limits this run: steps wait for images {data_wait:.0%} of the time; {self._data_advice()}")

    def _write(self, row: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", json.dumps(row) + "\n")

    def _append(self, name: str, text: str) -> None:
        path = self.folder / name
        with _resumable(path), open(path, "a", encoding="utf-8") as file:
            file.write(text)

    def _show(self, step: int, row: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {row.get('loss', math.nan):.4f}")
            self._append("train.log", _plain(row) + "\n")
        elif time.monotonic() - self._said_at >= CONSOLE_SECONDS or step == self.steps:
            self._said_at = time.monotonic()
            self.say(_plain(row))

    def _open_bar(self, resumed: int) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.steps, initial=resumed, desc=self.stage or "train", unit="step")

    def _open_board(self, resumed: int) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.folder / "tb" / self.stage), purge_step=resumed + 1)

    def _board_add(self, step: int, row: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        with _resumable(self.folder / "tb"):
            for name, value in row.items():
                if name not in ("step", "stage"):
                    self._board.add_scalar(name, value, step)


class _Window:
    """What happened since the last line."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.images = 0
        self.waited = 0.0


@contextlib.contextmanager
def _resumable(path: Path) -> Iterator[None]:
    """A disk error inside becomes one line and exit code 75."""
    try:
        yield
    except OSError as error:
        raise Resumable(
            f"could not write {path}: {error.strerror or error}; make room and run the same command again"
        ) from error


def _cut(path: Path, stage: str, step: int) -> None:
    """Cuts metrics.jsonl before the first line of `stage` past `step`, and before a half-written last line."""
    if not path.exists():
        return
    end = 0
    with open(path, "rb") as file:
        for text in file:
            try:
                row = json.loads(text)
            except ValueError:
                break
            if not text.endswith(b"\n") or (row.get("stage", "") == stage and row["step"] > step):
                break
            end += len(text)
    os.truncate(path, end)


def _plain(row: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(peak_memory_bytes() / 2**20, 1)
