"""A training run of milliseconds with everything that must survive: student, teacher, centre, dropout, skipped steps.

Not a test: the training tests, and the processes they kill, import it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslvit import distributed, optim
from sslvit.checkpoint import best_step, latest_checkpoint, load_checkpoint
from sslvit.errors import Outage
from sslvit.metrics import TIMING_FIELDS, MetricsLog
from sslvit.schedules import cosine
from sslvit.signals import StopFlag
from sslvit.training import Progress, train

WIDTH = 6


class Toy(nn.Module):
    """The student follows a moving teacher whose outputs are centred, as in DINO."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.teacher = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Identity(), nn.Linear(16, 8))
        self.teacher.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(8))
        self._collected: list[Tensor] = []
        self._collected_step = -1
        self.applied: list[int] = []

    def forward(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        if self._collected_step != step:
            self._collected, self._collected_step = [], step
        output = self.student(batch)
        with torch.no_grad():
            target = self.teacher(batch)
            self._collected.append(target.float().mean(0))
        loss = ((output - (target - self.centre).tanh()) ** 2).mean() + ((output - 1) ** 2).mean()
        return loss, {"size": output.detach().norm(), "micro": float(len(batch))}

    def before_update(self, step: int) -> None:
        if step < 2:
            self.student[-1].weight.grad = None  # a layer that stands still at first, as DINO's prototypes

    def after_step(self, step: int) -> None:
        mean = distributed.all_reduce_sum_(torch.stack(self._collected).mean(0)) / distributed.world_size()
        self.centre.mul_(0.9).add_(mean, alpha=0.1)
        optim.ema_(self.teacher.parameters(), self.student.parameters(), 0.9)
        self.applied.append(step)


class Stream:
    """Sample i is a function of i; poisoned ones are NaN, `away` cannot be read. Each process takes its slice."""

    def __init__(
        self, size: int, poison: frozenset[int] = frozenset(), away: int | None = None, kind: type[Exception] = Outage
    ) -> None:
        self.size, self.poison, self.away, self.kind = size, poison, away, kind
        self.cursor = 0
        self.seen: list[int] = []

    def seek(self, cursor: int) -> None:
        self.cursor = cursor

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        while True:
            first = self.cursor + distributed.rank() * self.size
            self.cursor += self.size * distributed.world_size()
            ids = range(first, first + self.size)
            if self.away in ids:
                raise self.kind("the network is away")
            self.seen += ids
            yield torch.stack([self.sample(i) for i in ids]), self.cursor

    def sample(self, index: int) -> Tensor:
        if index in self.poison:
            return torch.full((WIDTH,), float("nan"))
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


def run(
    folder: Path,
    *,
    module: nn.Module | None = None,
    stream: Stream | None = None,
    steps: int = 12,
    size: int = 4,
    stop: StopFlag | None = None,
    **options: Any,
) -> Progress:
    module = module or Toy()
    settings: dict[str, Any] = {
        "optimizer": optim.adamw(optim.param_groups(module, 0.1), 1e-2),
        "schedule": lambda step: {
            "lr": cosine(step, steps, 2e-2, 1e-4, warmup_steps=2),
            "weight_decay": cosine(step, steps, 0.1, 0.4),
        },
        "steps": steps,
        "clip_norm": 0.5,
        "device": torch.device("cpu"),
        "folder": folder,
        "checkpoint_every": 4,
        "metrics": MetricsLog(folder, log_every=3),
        "stop": stop or StopFlag(),
        **options,
    }
    return train(module, stream or Stream(size), **settings)


def digest(folder: Path) -> str:
    """SHA-256 over everything a run leaves that is not about time: newest checkpoint, meta, best step, metrics."""
    root = Path(folder) / "checkpoints"
    path = latest_checkpoint(root)
    assert path is not None
    tensors, meta = load_checkpoint(path)
    content = hashlib.sha256(json.dumps([path.name, meta, best_step(root)], sort_keys=True).encode())
    for stem in sorted(tensors):
        for name in sorted(tensors[stem]):
            content.update(f"{stem}/{name}".encode())
            content.update(tensors[stem][name].contiguous().numpy().tobytes())
    content.update(json.dumps(lines(folder)).encode())
    return content.hexdigest()


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING_FIELDS} for row in rows]
