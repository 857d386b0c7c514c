"""Timing on a machine whose speed changes from one second to the next: variants take turns, a matrix product judges.

All variants run in one process, round after round. A matrix product before and after every run says how fast the
machine is just then; a timing counts when both reached GATE of the best ever seen. Ratios are of medians, and the ratio
of minima stands beside them as a check. Means and maxima say nothing here. One thread is timed by the processor's clock
(`own_clock`), which stands still while somebody else has the core.
"""

from __future__ import annotations

import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

GATE = 0.72  # of the best speed seen
WANTED = 7  # timings of each variant that count, before a measurement ends early
Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant: those that count, how many were made, and whether any passed the gate."""

    seconds: tuple[float, ...]
    made: int
    gated: bool = True

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        """Seconds."""
        return min(self.seconds)

    def words(self) -> str:
        """`median of 7 of 12, 1.20 to 1.31 s`, for the protocol of a row."""
        kind = "" if self.gated else " (none passed the gate)"
        return (
            f"median of {len(self.seconds)} of {self.made}{kind}, {_short(self.least)} to {_short(max(self.seconds))}"
        )


class Probe:
    """Called, it multiplies two matrices of `side` and returns how fast: FLOPs a second by `clock`; `best` so far."""

    def __init__(
        self,
        side: int = 768,
        clock: Callable[[], float] = time.perf_counter,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self._matrix, self._clock = torch.ones(side, side, dtype=dtype, device=device), clock
        self._flops = 2 * side**3
        self.best = 0.0
        self()

    def __call__(self) -> float:
        began = self._clock()
        self._matrix @ self._matrix
        if self._matrix.is_cuda:
            torch.cuda.synchronize()
        speed = self._flops / max(1e-9, self._clock() - began)
        self.best = max(self.best, speed)
        return speed


def own_clock() -> Callable[[], float]:
    """Processor time where this process computes in one thread, so that others' turns do not count; else wall time."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def children_clock() -> float:
    """Processor time of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine() -> str:
    """The device that computes, for the protocol of a row."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model} with {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def measure(
    variants: Mapping[str, Run],
    *,
    seconds: float,
    wanted: int = WANTED,
    probe: Probe | None = None,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Time each variant in turn until all have `wanted` timings that count, or `seconds` by `clock` are over.

    Each runs once untimed. before(name) runs untimed before each run. At least two rounds are made.
    """
    probe = probe or Probe(clock=clock)
    for name, run in variants.items():
        _prepare(before, name)
        run()
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    end, rounds = clock() + seconds, 0
    while rounds < 2 or (clock() < end and not _enough(seen, probe.best, wanted)):
        for name, run in variants.items():
            _prepare(before, name)
            speed, began = probe(), clock()
            run()
            took = clock() - began
            seen[name].append((min(speed, probe()), took))
        rounds += 1
    return {name: _timing(pairs, probe.best) for name, pairs in seen.items()}


def ratio(slower: Timing, faster: Timing) -> tuple[float, float]:
    """How many times faster: of medians, and of minima."""
    return slower.median / faster.median, slower.least / faster.least


def _prepare(before: Callable[[str], object] | None, name: str) -> None:
    gc.collect()
    if before is not None:
        before(name)


def _enough(seen: Mapping[str, list[tuple[float, float]]], best: float, wanted: int) -> bool:
    return all(sum(speed >= GATE * best for speed, _ in pairs) >= wanted for pairs in seen.values())


def _timing(pairs: list[tuple[float, float]], best: float) -> Timing:
    kept = tuple(took for speed, took in pairs if speed >= GATE * best)
    return Timing(kept or tuple(took for _, took in pairs), len(pairs), bool(kept))


def _short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
