"""The one training loop: pretraining and every stage of alignment run through `train`.

It knows steps, not epochs, and nothing of images or objectives. Not a framework: no callbacks besides one periodic
evaluation. What makes a resume exact: everything that lives longer than a step is in the checkpoint (module, optimizer,
data cursor, counters, averages of the log), and everything random is a function of (seed, step, rank) or of the cursor.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from sslvit import distributed
from sslvit.checkpoint import (
    Saving,
    best_step,
    checkpoint_path,
    clean_checkpoints,
    drop_checkpoints_after,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    mark_best,
    optimizer_tensors,
    save_checkpoint,
    verify_checkpoint,
)
from sslvit.errors import InputError, Outage, Resumable
from sslvit.metrics import MetricsLog
from sslvit.optim import apply_schedule, clip_grad_norm_, step_unless
from sslvit.signals import StopFlag

__all__ = ["Batches", "Progress", "Trainable", "step_seed", "train"]

BAD_STEPS = 3  # non-finite steps in a row before the run is rolled back
ROLLBACKS = 2  # the roll-back that is not made: it stops the run

Watch = Callable[[Mapping[str, Any], dict[str, float]], Mapping[str, str]]


class Trainable(Protocol):
    """What `train` asks of an nn.Module. Everything it must remember is in its state_dict().

    forward(batch, step) returns the loss () and values to log; it is called once per micro-batch, with the same step.
    before_update(step) may still change gradients (e.g. set one to None to hold a layer); called once per step.
    after_step(step) follows every update that was applied (moving averages, centres): never after a skipped step, so
    what a forward collects for it must be dropped when a forward of another step begins.
    """

    def forward(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor | float]]: ...  # noqa: D102
    def before_update(self, step: int) -> None: ...  # noqa: D102
    def after_step(self, step: int) -> None: ...  # noqa: D102


class Batches(Protocol):
    """An endless stream of (micro-)batches, each with `.to(device)`, and the cursor after it (samples consumed)."""

    def seek(self, cursor: int) -> None: ...  # noqa: D102
    def __iter__(self) -> Iterator[tuple[Any, int]]: ...


@dataclass
class Progress:
    """Where a run stands, beside its tensors. `step` counts steps done, `cursor` samples consumed by all processes.

    A roll-back goes to `good_step`, the last save that was due; those made on a signal do not count, so that
    interruptions cannot change what a roll-back does. After one, `cursor` is ahead of step x batch for good: the bad
    samples are not drawn again. `bad_steps` tells of the latest skipped steps; `watch` is what the watch remembers.
    """

    step: int = 0
    cursor: int = 0
    good_step: int = 0
    bad_in_a_row: int = 0
    skipped: int = 0
    rollbacks: int = 0
    best_value: float | None = None
    best_step: int | None = None
    bad_steps: list[str] = field(default_factory=list)
    watch: dict[str, float] = field(default_factory=dict)
    first_value: float | None = None  # of what `best` names, at step 0
    last_value: float | None = None


def train(
    module: nn.Module,
    batches: Batches,
    *,
    optimizer: torch.optim.AdamW,
    schedule: Callable[[int], Mapping[str, float]],
    steps: int,
    accumulate: int = 1,
    clip_norm: float = 0.0,
    precision: str = "fp32",
    device: torch.device,
    folder: Path,
    checkpoint_every: int,
    keep: int = 2,
    milestone_every: int = 0,
    metrics: MetricsLog,
    stop: StopFlag,
    seed: int = 0,
    meta: Mapping[str, Any] | None = None,
    periodic: Callable[[int], dict[str, float]] | None = None,
    periodic_every: int = 0,
    best: str | None = None,
    watch: Watch | None = None,
    prepare: Callable[[list[Any], int], None] | None = None,
    max_drop: float = math.inf,
    stage: str = "",
) -> Progress:
    """Trains `module` (a Trainable) to `steps`, from `folder/checkpoints` if it holds a checkpoint.

    schedule(step) gives "lr" and "weight_decay", scaled by each group's lr_scale and wd_scale. `accumulate`
    micro-batches make a step; where a loss needs all of them, prepare(micro-batches, step) sees them first, under the
    same autocast. precision: "fp32" or "bf16" (autocast). `meta` is stored in every checkpoint; every
    `milestone_every` steps (0: never) one is kept for good beside the newest `keep`.
    periodic(step) runs at step 0, every `periodic_every` steps and at the end, on all processes; its values are logged,
    and while `best` names one of them, the step where it was largest keeps its checkpoint (best.json). Once that value
    is more than `max_drop` below what it was at the start, the run ends and goes back to its best checkpoint; with a
    finite `max_drop` it also does so when it ends below its start.
    watch(line, memory) answers to every line with alarms, {name: text}; its memory goes through checkpoints.

    A step whose loss or gradient is not finite is skipped on all processes alike; three in a row roll back to the last
    good checkpoint while the data go on; instead of a second roll-back the run stops with a report and an InputError.
    On a signal, a full disk or data out of reach (Outage): Resumable, after a save wherever one can be made.
    """
    assert precision in ("fp32", "bf16") and checkpoint_every > 0, (precision, checkpoint_every)
    module.to(device).train()
    saver = _Saver(Path(folder) / "checkpoints", module, optimizer, metrics, dict(meta or {}), keep, milestone_every)
    newest = saver.find()
    metrics.begin(steps, None if newest is None else _step_of(newest), stage, device)
    progress = Progress() if newest is None else saver.restore(newest)
    model = _parallel(module)
    batches.seek(progress.cursor)
    stream = _Stream(iter(batches), device, progress)
    if 0 < progress.step < steps:
        metrics.say(f"going on from step {progress.step}")
    try:
        if newest is None:
            if periodic_every:
                _evaluate(periodic, model, metrics, progress, best, watch)
            saver.save(progress)
        while progress.step < steps:
            saver.check(stop, progress)
            step, cursor = progress.step, progress.cursor
            torch.manual_seed(step_seed(seed, step, distributed.rank()))
            apply_schedule(optimizer, values := schedule(step))
            optimizer.zero_grad(set_to_none=True)
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
            taken = [next(stream) for _ in range(accumulate)] if prepare and accumulate > 1 else []
            if prepare and taken:
                with autocast:
                    prepare(taken, step)
            logs = []
            for micro in range(accumulate):
                batch = taken[micro] if taken else next(stream)
                with _no_sync(model, micro + 1 < accumulate):
                    with autocast:
                        loss, parts = model(batch, step)
                    (loss / accumulate).backward()
                logs.append({"loss": loss.detach(), **parts})
            _check_all_used(module)
            module.before_update(step)  # type: ignore[operator]
            norm = clip_grad_norm_(module.parameters(), clip_norm)
            progress.step += 1
            step_unless(optimizer, bad := _not_finite(norm, logs))
            if not bad:  # the one look at a device value in a step, taken while the update still runs
                module.after_step(step)  # type: ignore[operator]
                progress.bad_in_a_row = 0
                metrics.add({**_mean(logs), "grad_norm": norm})
            elif saver.skip(progress, cursor, _what_is_bad(module, logs)):
                continue  # rolled back: what follows was done when that step was first reached
            metrics.tick(progress.step, progress.cursor - cursor, stream.waited())
            if metrics.due(progress.step):
                line = metrics.line(progress.step, {**values, "skipped": progress.skipped})
                _say_alarms(watch, metrics, progress, line)
            improved = False
            if periodic_every and (progress.step % periodic_every == 0 or progress.step == steps):
                improved = _evaluate(periodic, model, metrics, progress, best, watch)
            due = progress.step % checkpoint_every == 0 or saver.is_milestone(progress.step)
            due = due and progress.bad_in_a_row == 0  # never amid bad steps
            if due or improved or progress.step == steps:
                progress.good_step = progress.step
                saver.save(progress)
            if _has_fallen(progress, max_drop, ended=progress.step == steps):
                saver.keep_best(progress, str(best))
                break
        saver.close()
    except _NoData as stopped:
        saver.save_without_data(progress, cursor, stopped)
    except BaseException:
        saver.abandon()
        raise
    finally:
        metrics.end()
    return progress


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of everything random inside the model at this step: equal keys, equal draws; nothing else matters."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class _Saver:
    """Writes and reads the checkpoints of one `train`. The main process writes, every process reads."""

    def __init__(
        self,
        root: Path,
        module: nn.Module,
        optimizer: torch.optim.AdamW,
        metrics: MetricsLog,
        meta: dict[str, Any],
        keep: int,
        milestone_every: int,
    ) -> None:
        self.root, self.module, self.optimizer, self.metrics = root, module, optimizer, metrics
        self.meta, self.keep, self.milestone_every = meta, keep, milestone_every
        self.saving: Saving | None = None
        self.saved_step: int | None = None

    def find(self) -> Path | None:
        """The newest checkpoint that verifies, as the main process sees it."""
        newest = None
        if distributed.is_main():
            clean_checkpoints(self.root)
            newest = latest_checkpoint(self.root)
        return distributed.broadcast_object(newest)

    def restore(self, path: Path) -> Progress:
        tensors, meta = load_checkpoint(path, verify=False)
        state = self.module.state_dict()
        self.module.load_state_dict({k: distributed.shard_like(v, state[k]) for k, v in tensors["model"].items()})
        load_optimizer_tensors(self.optimizer, tensors["optimizer"])
        self.metrics.load_state(tensors["metrics"])
        self.saved_step = meta["step"]
        progress = Progress(**meta["progress"])
        if distributed.is_main() and best_step(self.root) != progress.best_step:
            mark_best(self.root, progress.best_step)  # a kill fell between a checkpoint's rename and this
        return progress

    def save(self, progress: Progress) -> None:
        if self.saved_step == progress.step:
            return
        self.close()
        self.saved_step = progress.step
        averages = self.metrics.state()
        held = {"model": self.module.state_dict(), "optimizer": optimizer_tensors(self.optimizer)}
        copies = {stem: {k: distributed.copied_to_main(v) for k, v in group.items()} for stem, group in held.items()}
        if not distributed.is_main():
            return
        self.metrics.sync()
        tensors = {"metrics": averages}
        for stem, group in copies.items():
            tensors[stem] = {k: copy for k, copy in group.items() if copy is not None}
        meta = {**self.meta, "cursor": progress.cursor, "progress": asdict(progress)}
        self.saving = save_checkpoint(
            self.root,
            progress.step,
            tensors,
            meta,
            keep=self.keep,
            best=progress.best_step,
            spare=[progress.good_step],
            milestone_every=self.milestone_every,
            owned=True,
        )

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of this step is kept for good."""
        return self.milestone_every > 0 and step % self.milestone_every == 0

    def check(self, stop: StopFlag, progress: Progress) -> None:
        """Between steps: has anybody been asked to stop, or could the last checkpoint not be written?"""
        failed = self.saving is not None and self.saving.failed
        verdict = distributed.all_reduce_max_(torch.tensor([float(stop.is_set()), float(failed)]))
        stopping, failing = bool(verdict[0]), bool(verdict[1])
        if failing:
            self._raise_failure()
        if stopping:
            self.save(progress)
            self.close()
            reason = distributed.broadcast_object(stop.received) or "a signal to another process"
            raise Resumable(
                f"stopped by {reason} after step {progress.step}, saved in "
                f"{checkpoint_path(self.root, progress.step)}; run the same command to go on"
            )

    def save_without_data(self, progress: Progress, cursor: int, stopped: _NoData) -> NoReturn:
        """The step that got no data is not made; what was there before it, `cursor` samples in, is saved by all."""
        progress.cursor = cursor
        self.save(progress)
        self.close()
        raise stopped.kind(f"{stopped}; saved in {checkpoint_path(self.root, progress.step)}") from stopped.__cause__

    def skip(self, progress: Progress, first: int, what: str) -> bool:
        """Counts a step that was not applied; the third in a row goes back to the last good checkpoint (True).

        `first` is the step's first sample, `what` names what was not finite.
        """
        progress.skipped += 1
        progress.bad_in_a_row += 1
        told = f"step {progress.step}, samples {first} to {progress.cursor - 1}: {what}"
        progress.bad_steps = [*progress.bad_steps, told][-BAD_STEPS * ROLLBACKS :]
        self.metrics.event(progress.step, "skipped", f"{told} not finite, step skipped")
        if progress.bad_in_a_row < BAD_STEPS:
            return False
        target = self._last_good(progress.good_step)
        if progress.rollbacks + 1 >= ROLLBACKS:
            self._give_up(progress, target)
        kept = {name: getattr(progress, name) for name in ("skipped", "cursor", "bad_steps")}
        reached, rollbacks = progress.step, progress.rollbacks + 1
        vars(progress).update(asdict(self.restore(target)) | kept | {"rollbacks": rollbacks, "bad_in_a_row": 0})
        self.metrics.rewind(progress.step)
        if distributed.is_main():
            drop_checkpoints_after(self.root, progress.step)
        self.metrics.event(  # in the line of the first step that is made again: a resume cuts it off and gets here anew
            progress.step + 1,
            "rolled_back",
            f"rolled back to step {progress.step}; the data go on at sample {progress.cursor}. {BAD_STEPS} steps in a "
            f"row up to {reached} were not finite; should it happen again, lower optim.lr or use precision=fp32",
        )
        return True

    def _give_up(self, progress: Progress, target: Path) -> NoReturn:
        """The report of a run that did not become finite after a roll-back: in train.log, and in one line."""
        run = self.root.parent
        report = [
            f"stopped at step {progress.step}: loss or gradient not finite {BAD_STEPS} times in a row, after "
            f"{progress.rollbacks} roll-back; {progress.skipped} steps were skipped in all, the latest:",
            *(f"  {told}" for told in progress.bad_steps),
            f"no weight was touched by them; the last good state is {target}",
            "the samples count in the order of the run; `sslvit check-data` looks at every image",
            f"to go on: a new run with init={run}@{target.name} and a lower optim.lr, or precision=fp32",
        ]
        self.metrics.event(progress.step, "stopped", report[0])
        for line in report[1:]:
            self.metrics.say(line)
        raise InputError(
            f"loss or gradient not finite {BAD_STEPS} times in a row at step {progress.step} (samples up to "
            f"{progress.cursor}), for the second time; the last good state is {target}: start a new run with "
            f"init={run}@{target.name} and a lower optim.lr or precision=fp32, or look at the data there (train.log)"
        )

    def _last_good(self, good_step: int) -> Path:
        """The checkpoint of `good_step`, or should it be damaged the newest one that is not."""
        self.close()
        chosen = None
        if distributed.is_main():
            chosen = checkpoint_path(self.root, good_step)
            if verify_checkpoint(chosen) is not None:
                chosen = latest_checkpoint(self.root)
        chosen = distributed.broadcast_object(chosen)
        assert chosen is not None, "every run begins with a checkpoint of step 0"
        return chosen

    def keep_best(self, progress: Progress, name: str) -> None:
        """Drops the checkpoints after the best one: whoever opens the run next gets that."""
        self.close()
        assert progress.best_step is not None
        if distributed.is_main():
            drop_checkpoints_after(self.root, progress.best_step)
            mark_best(self.root, progress.best_step, ended_there=True)
        self.metrics.event(
            progress.step,
            "ended",
            f"{name} fell from {progress.first_value:.4f} at the start to {progress.last_value:.4f} at step "
            f"{progress.step}: the run ends and keeps step {progress.best_step}, where it was "
            f"{progress.best_value:.4f}; lower optim.lr, or raise knn.max_drop to go on in spite of that",
        )

    def close(self) -> None:
        """Waits for the writer; every process learns whether it succeeded."""
        if self.saving is not None:
            with contextlib.suppress(Exception):
                self.saving.join()
        failed = self.saving is not None and self.saving.failed
        if bool(distributed.all_reduce_max_(torch.tensor(float(failed)))):
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self.saving is not None:
            self.saving.join()
        raise Resumable("the main process could not save; see its message")

    def abandon(self) -> None:
        """On the way out of an error: lets a running write end, keeps the first error."""
        if self.saving is not None:
            with contextlib.suppress(Exception):
                self.saving.join()


def _has_fallen(progress: Progress, max_drop: float, ended: bool) -> bool:
    """Whether the watched value is too far below its start; at the end of a watched run, below it at all."""
    if progress.first_value is None or progress.last_value is None or not math.isfinite(max_drop):
        return False
    return progress.last_value < progress.first_value - (0.0 if ended else max_drop)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _parallel(module: nn.Module) -> nn.Module:
    if distributed.world_size() == 1 or isinstance(module, FSDPModule):
        return module
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    model.broadcast_buffers = False  # an attribute, because the argument's name changes within the torch we support
    return model


def _no_sync(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are averaged over processes with the last micro-batch only."""
    if wanted and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not wanted)
    return contextlib.nullcontext()


def _check_all_used(module: nn.Module) -> None:
    """Gradients are averaged as they appear, so with several processes every trainable parameter must get one."""
    if distributed.world_size() > 1:
        unused = [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]
        assert not unused, f"{unused[0]} and {len(unused) - 1} others take no part in the loss: freeze them"


def _not_finite(norm: Tensor, logs: list[dict[str, Any]]) -> Tensor:
    """1. if the gradient norm or a loss of this step is not finite on any process, else 0.; still on the device."""
    values = torch.stack([norm.float(), *(entry["loss"].float() for entry in logs)])
    return distributed.all_reduce_max_((~torch.isfinite(values)).any().float())


def _what_is_bad(module: nn.Module, logs: list[dict[str, Any]]) -> str:
    """Names what was not finite in a step that was skipped, the same words on all processes."""
    parts = {name: [entry[name] for entry in logs] for name in sorted(logs[0]) if name == "loss" or "/loss" in name}
    gradients = {name: [value.grad] for name, value in module.named_parameters() if value.grad is not None}
    named = {**parts, **gradients}
    flags = [any(not bool(torch.isfinite(value).all()) for value in values) for values in named.values()]
    everywhere = distributed.all_reduce_max_(torch.tensor(flags, dtype=torch.float32)).tolist()
    bad = [name for name, flag in zip(named, everywhere, strict=True) if flag]
    losses, weights = [name for name in bad if name in parts], [name for name in bad if name in gradients]
    if losses:
        return " and ".join(losses)
    more = f" and {len(weights) - 1} others" if len(weights) > 1 else ""
    return f"gradient of {weights[0]}{more}" if weights else "the gradient's norm"


def _mean(logs: list[dict[str, Tensor | float]]) -> dict[str, Tensor | float]:
    if len(logs) == 1:
        return logs[0]
    return {name: sum(entry[name] for entry in logs) / len(logs) for name in logs[0]}


class _NoData(Exception):
    """Some process got no batch; raised on all of them at the same step. `kind` is what to raise instead."""

    def __init__(self, text: str, kind: type[Resumable]) -> None:
        super().__init__(text)
        self.kind = kind


class _Stream:
    """Batches on the device; keeps the run's cursor, and counts the seconds spent waiting for data."""

    def __init__(self, batches: Iterator[tuple[Any, int]], device: torch.device, progress: Progress) -> None:
        self._batches, self._device, self._progress = batches, device, progress
        self._waited = 0.0

    def __next__(self) -> Any:
        began = time.monotonic()
        problem: Resumable | None = None
        try:
            batch, self._progress.cursor = next(self._batches)
        except Resumable as error:
            problem = error
        _agree_on_data(problem)
        self._waited += time.monotonic() - began
        return batch.to(self._device)

    def waited(self) -> float:
        """Seconds since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited


def _agree_on_data(problem: Resumable | None) -> None:
    """_NoData on every process when one has a problem: a step is made by all, and a save too."""
    number = float(distributed.rank() + 1)
    mine = [number * (problem is not None), number * isinstance(problem, Outage)]
    failed, away = distributed.all_reduce_max_(torch.tensor(mine)).int().tolist()
    if failed:
        text = f"process {failed - 1} got no data (see its message)" if problem is None else str(problem)
        raise _NoData(text, Outage if away else Resumable) from problem


def _say_alarms(watch: Watch | None, metrics: MetricsLog, progress: Progress, line: Mapping[str, Any]) -> None:
    if watch is not None:
        for name, text in watch(line, progress.watch).items():
            metrics.alarm(progress.step, name, text)


def _evaluate(
    periodic: Callable[[int], dict[str, float]] | None,
    model: nn.Module,
    metrics: MetricsLog,
    progress: Progress,
    best: str | None,
    watch: Watch | None,
) -> bool:
    """Runs the periodic evaluation; True if its value named `best` is the largest so far."""
    if periodic is None:
        return False
    values = distributed.broadcast_object(periodic(progress.step))
    model.train()
    if values:
        metrics.row(progress.step, values)
        _say_alarms(watch, metrics, progress, {"step": progress.step, **values})
    if best is None or best not in values or not math.isfinite(values[best]):
        return False
    progress.last_value = values[best]
    if progress.step == 0:
        progress.first_value = values[best]
    if progress.best_value is not None and values[best] <= progress.best_value:
        return False
    progress.best_value, progress.best_step = values[best], progress.step
    return True
