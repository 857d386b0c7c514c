"""The loop: exact resume from every step, exact accumulation, nothing non-finite in a weight; each guard is broken."""

import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_run import Stream, Toy, digest, lines, run

from sslvit import checkpoint, metrics, optim, training
from sslvit.checkpoint import checkpoint_path, checkpoint_steps, latest_checkpoint, load_checkpoint
from sslvit.errors import InputError, Outage, Resumable
from sslvit.metrics import MetricsLog
from sslvit.signals import StopFlag
from sslvit.training import step_seed

STEPS = 12
NAN = float("nan")


class Crash(Exception):
    """Stands for a kill: nothing is saved on the way out."""


class Interrupted(Toy):
    """Sets the flag, or dies, after a given step."""

    def __init__(self, at: int, stop: StopFlag | None = None) -> None:
        super().__init__()
        self.at, self.stop = at, stop

    def before_update(self, step: int) -> None:
        super().before_update(step)
        if step == self.at:
            if self.stop is None:
                raise Crash
            self.stop.received = "SIGTERM"


def run_interrupted(folder: Path, at: int, kind: str, poison: frozenset[int] = frozenset(), **options: Any) -> None:
    stop = StopFlag()
    module = Interrupted(at, stop if kind == "stop" else None)
    stream = Stream(options.get("size", 4), poison)
    if kind == "stop" and at < STEPS - 1:
        with pytest.raises(Resumable, match=f"stopped by SIGTERM after step {at + 1}, saved in .*step_{at + 1:07d}"):
            run(folder, module=module, stream=stream, stop=stop, **options)
    elif kind == "stop":
        run(folder, module=module, stream=stream, stop=stop, **options)
    else:
        with pytest.raises(Crash):
            run(folder, module=module, stream=stream, **options)
    run(folder, stream=Stream(options.get("size", 4), poison), **options)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TensorBoard and no waiting for the disk: a hundred runs below."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(metrics.MetricsLog, "_open_board", lambda self, resumed: None)


@pytest.mark.parametrize("kind", ["stop", "crash"])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2, "size": 2}, {"precision": "bf16"}, {"periodic_every": 5, "best": "knn"}],
    ids=["plain", "accumulate", "bf16", "periodic"],
)
def test_interrupted_after_any_step_the_same_command_ends_the_same(
    tmp_path: Path, options: dict[str, Any], kind: str
) -> None:
    if "best" in options:
        options = {**options, "periodic": lambda step: {"knn": float(step % 7)}}
    run(tmp_path / "whole", **options)
    for at in range(0, STEPS, 3 if options else 1):
        run_interrupted(tmp_path / f"{at}", at, kind, **options)
        assert digest(tmp_path / f"{at}") == digest(tmp_path / "whole"), at


@pytest.mark.parametrize(("accumulate", "away"), [(1, 22), (2, 20), (2, 22), (1, 0)])
def test_data_out_of_reach_stop_the_run_without_losing_a_step(tmp_path: Path, accumulate: int, away: int) -> None:
    """22 // 4 = 5 steps are done, none of which was due for a save after the fourth."""
    options: dict[str, Any] = {"size": 4 // accumulate, "accumulate": accumulate, "checkpoint_every": 4}
    run(tmp_path / "whole", **options)
    for kind in (Outage, Resumable):
        folder = tmp_path / kind.__name__
        with pytest.raises(kind, match=f"the network is away; saved in .*step_{away // 4:07d}$") as caught:
            run(folder, stream=Stream(options["size"], away=away, kind=kind), **options)
        assert type(caught.value) is kind
        stream = Stream(options["size"])
        run(folder, stream=stream, **options)
        assert stream.seen[0] == away // 4 * 4 and digest(folder) == digest(tmp_path / "whole")


def test_stopped_after_every_single_step_each_sample_is_seen_once(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    seen: list[int] = []
    for step in range(STEPS - 1):
        stop = StopFlag()
        stream = Stream(4)
        with pytest.raises(Resumable):
            run(tmp_path / "parts", module=Interrupted(step, stop), stream=stream, stop=stop)
        seen += stream.seen
    stream = Stream(4)
    run(tmp_path / "parts", stream=stream)
    assert seen + stream.seen == list(range(STEPS * 4))
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    first = Toy()
    run(tmp_path, module=first)
    before, second, stream = digest(tmp_path), Toy(), Stream(4)
    progress = run(tmp_path, module=second, stream=stream)
    assert (progress.step, progress.cursor) == (STEPS, STEPS * 4)
    assert stream.seen == []
    assert digest(tmp_path) == before
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_asked_to_stop_before_the_first_step(tmp_path: Path) -> None:
    stop = StopFlag()
    stop.received = "SIGUSR2"
    with pytest.raises(Resumable, match=r"stopped by SIGUSR2 after step 0, saved in .*step_0000000"):
        run(tmp_path, stop=stop)
    assert checkpoint_steps(tmp_path / "checkpoints") == [0]


def test_a_real_signal(tmp_path: Path) -> None:
    module = Toy()
    after_step = module.after_step

    def signalled(step: int) -> None:
        after_step(step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    module.after_step = signalled  # type: ignore[method-assign]
    with StopFlag() as stop, pytest.raises(Resumable, match="stopped by SIGTERM after step 5"):
        run(tmp_path, module=module, stop=stop)
    assert checkpoint_steps(tmp_path / "checkpoints")[-1] == 5


def test_a_damaged_newest_checkpoint_costs_time_not_the_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "whole")
    stop = StopFlag()
    with pytest.raises(Resumable):
        run(tmp_path / "a", module=Interrupted(9, stop), stop=stop)
    weights = checkpoint_path(tmp_path / "a/checkpoints", 10) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    run(tmp_path / "a")
    assert "step_0000010 is damaged" in caplog.text
    assert digest(tmp_path / "a") == digest(tmp_path / "whole")


def lose_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(training, "load_optimizer_tensors", lambda optimizer, tensors: None)


def lose_cursor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "seek", lambda self, cursor: None)


def lose_entries(patch: pytest.MonkeyPatch, prefix: str) -> None:
    load = nn.Module.load_state_dict

    def load_part(self: nn.Module, state: dict[str, Tensor]) -> object:
        kept = {name: value for name, value in state.items() if not name.startswith(prefix)}
        return load(self, kept, strict=False)

    patch.setattr(nn.Module, "load_state_dict", load_part)


def lose_seed(patch: pytest.MonkeyPatch) -> None:
    seed = torch.manual_seed
    patch.setattr(torch, "manual_seed", lambda value: seed(value) if value == 0 else None)


def lose_bad_steps(patch: pytest.MonkeyPatch) -> None:
    restore = training._Saver.restore

    def forget(self: Any, path: Path) -> training.Progress:
        progress = restore(self, path)
        progress.bad_in_a_row = 0
        return progress

    patch.setattr(training._Saver, "restore", forget)


def lose_memory(patch: pytest.MonkeyPatch) -> None:
    restore = training._Saver.restore

    def forget(self: Any, path: Path) -> training.Progress:
        progress = restore(self, path)
        progress.watch = {}
        return progress

    patch.setattr(training._Saver, "restore", forget)


def every_second_line(row: Any, memory: dict[str, float]) -> dict[str, str]:
    """A watch that must remember: it raises an alarm at every second line."""
    memory["lines"] = memory.get("lines", 0) + 1
    return {"second": f"line {memory['lines']}"} if memory["lines"] % 2 == 0 else {}


def lose_averages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MetricsLog, "load_state", lambda self, state: None)


def keep_lines(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(metrics, "_cut", lambda path, stage, step: None)


def save_late(patch: pytest.MonkeyPatch) -> None:
    """A counter off by one."""
    save = training.save_checkpoint

    def shifted(root: Path, step: int, tensors: Any, meta: Any, **options: Any) -> Any:
        meta = {**meta, "progress": {**meta["progress"], "step": max(0, step - 1)}}
        return save(root, step, tensors, meta, **options)

    patch.setattr(training, "save_checkpoint", shifted)


BREAKAGES = {
    "optimizer": lose_optimizer,
    "cursor": lose_cursor,
    "centre": lambda patch: lose_entries(patch, "centre"),
    "teacher": lambda patch: lose_entries(patch, "teacher"),
    "seed": lose_seed,
    "bad steps": lose_bad_steps,
    "memory of alarms": lose_memory,
    "averages": lose_averages,
    "lines": keep_lines,
    "step": save_late,
}


@pytest.mark.parametrize("breakage", [None, *BREAKAGES])
def test_whatever_is_not_restored_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breakage: str | None
) -> None:
    """Bad samples make steps 8, 9 and 10 bad; the run is cut after step 9, and once more without a save."""
    poison = frozenset({33, 37, 41})
    options: dict[str, Any] = {"watch": every_second_line}
    run(tmp_path / "whole", stream=Stream(4, poison), **options)
    assert [row["step"] for row in lines(tmp_path / "whole") if "alarm" in row] == [6, 12]
    if breakage is not None:
        BREAKAGES[breakage](monkeypatch)
    folder, stop = tmp_path / "cut", StopFlag()
    with pytest.raises(Resumable):
        run(folder, module=Interrupted(9, stop), stream=Stream(4, poison), stop=stop, **options)
    with pytest.raises(Crash):
        run(folder, module=Interrupted(11), stream=Stream(4, poison), **options)
    run(folder, stream=Stream(4, poison), **options)
    assert (digest(folder) == digest(tmp_path / "whole")) == (breakage is None)


def test_accumulation_is_exact(tmp_path: Path) -> None:
    results = {}
    for accumulate in (1, 2, 4):
        module = Toy(dropout=0.0)
        run(tmp_path / f"{accumulate}", module=module, size=8 // accumulate, accumulate=accumulate)
        results[accumulate] = module.state_dict()
        assert module.applied == list(range(STEPS))
    for accumulate in (2, 4):
        for name, value in results[1].items():
            assert torch.allclose(results[accumulate][name], value, atol=1e-6), name
        losses = [[row["loss"] for row in lines(tmp_path / f"{a}")] for a in (1, accumulate)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Faulty(Toy):
    """Goes wrong at given steps: in the loss only, in a gradient only, or by a spike of 100 times."""

    def __init__(self, kind: str, at: set[int]) -> None:
        super().__init__()
        self.kind, self.at = kind, at

    def forward(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, logs = super().forward(batch, step)
        if step in self.at and self.kind == "loss":
            loss = loss + torch.tensor(NAN)
        if step in self.at and self.kind == "spike":
            loss = loss * 100
        return loss, logs

    def before_update(self, step: int) -> None:
        super().before_update(step)
        if step in self.at and self.kind == "gradient":
            grad = self.student[0].weight.grad
            assert grad is not None
            grad[0, 0] = float("inf")


def assert_checkpoints_finite(folder: Path) -> None:
    for step in checkpoint_steps(folder / "checkpoints"):
        tensors = load_checkpoint(checkpoint_path(folder / "checkpoints", step))[0]
        assert all(torch.isfinite(value.float()).all() for group in tensors.values() for value in group.values())


@pytest.mark.parametrize("kind", ["loss", "gradient", "input"])
def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, kind: str) -> None:
    module = Toy() if kind == "input" else Faulty(kind, {5})
    stream = Stream(4, frozenset({5 * 4 + 1}) if kind == "input" else frozenset())
    progress = run(tmp_path, module=module, stream=stream, checkpoint_every=1, keep=99)
    assert (progress.step, progress.skipped, progress.rollbacks) == (STEPS, 1, 0)
    assert module.applied == [step for step in range(STEPS) if step != 5]
    assert_checkpoints_finite(tmp_path)
    assert checkpoint_steps(tmp_path / "checkpoints") == [s for s in range(STEPS + 1) if s != 6]  # not amid bad steps
    trained = [row for row in lines(tmp_path) if "event" not in row]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in trained)
    assert [row["skipped"] for row in trained] == [0, 1, 1, 1]
    assert [(row["step"], row["event"]) for row in lines(tmp_path) if "event" in row] == [(6, "skipped")]
    what = "gradient of student.0.weight" if kind == "gradient" else "loss"
    assert f"step 6, samples 20 to 23: {what} not finite, step skipped" in (tmp_path / "train.log").read_text()


def test_without_the_guard_it_reaches_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_not_finite", lambda norm, logs: torch.zeros(()))
    module = Faulty("gradient", {5})
    run(tmp_path, module=module)
    assert any(torch.isnan(value).any() for value in module.state_dict().values())


def test_a_spike_is_clipped(tmp_path: Path) -> None:
    module, calm = Faulty("spike", {5}), Toy()
    progress = run(tmp_path / "spike", module=module)
    run(tmp_path / "calm", module=calm)
    assert progress.skipped == 0
    for a, b in zip(module.parameters(), calm.parameters(), strict=True):
        assert (a - b).abs().max() < 0.02  # the clipped step is one step of ordinary length


def test_three_in_a_row_roll_back_and_the_data_go_on(tmp_path: Path) -> None:
    poison = frozenset({29, 33, 37})  # steps 7, 8 and 9
    stream = Stream(4, poison)
    module = Toy()
    log = MetricsLog(tmp_path, log_every=2)
    options: dict[str, Any] = {"metrics": log, "periodic": lambda step: {"knn": float(step)}, "periodic_every": 4}
    progress = run(tmp_path, module=module, stream=stream, **options)
    assert module.applied == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 11]
    assert stream.seen == list(range(4 * (10 + 8)))  # ten steps, back to step 4, eight more; no sample twice
    assert (progress.step, progress.cursor, progress.skipped, progress.rollbacks) == (STEPS, 72, 3, 1)
    assert_checkpoints_finite(tmp_path)
    assert [row["step"] for row in lines(tmp_path) if "loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in lines(tmp_path) if "knn" in row] == [0, 4, 8, 12]
    assert "rolled back to step 4; the data go on at sample 40" in (tmp_path / "train.log").read_text()
    told = [(row["step"], row["event"]) for row in lines(tmp_path) if "event" in row]
    assert told == [(5, "rolled_back")], "the skipped steps themselves were undone"


@pytest.mark.parametrize("kind", ["stop", "crash"])
def test_a_rolled_back_run_resumes_exactly(tmp_path: Path, kind: str) -> None:
    poison = frozenset({29, 33, 37})
    run(tmp_path / "whole", stream=Stream(4, poison))
    for at in (3, 6, 7, 8, 9, 10):
        folder = tmp_path / f"{at}"
        stop = StopFlag()
        module = Interrupted(at, stop if kind == "stop" else None)
        with pytest.raises(Resumable if kind == "stop" else Crash):
            run(folder, module=module, stream=Stream(4, poison), stop=stop)
        run(folder, stream=Stream(4, poison))
        assert digest(folder) == digest(tmp_path / "whole"), at


def test_the_second_roll_back_stops_with_a_report(tmp_path: Path) -> None:
    module = Faulty("loss", set(range(6, 99)))
    with pytest.raises(InputError) as caught:
        run(tmp_path, module=module)
    text = str(caught.value)
    assert "\n" not in text
    assert "3 times in a row at step 9 (samples up to 56), for the second time" in text
    assert f"the last good state is {checkpoint_path(tmp_path / 'checkpoints', 4)}" in text
    assert "lower optim.lr" in text and f"init={tmp_path}@step_0000004" in text
    assert_checkpoints_finite(tmp_path)
    report = (tmp_path / "train.log").read_text()
    assert "stopped at step 9: loss or gradient not finite 3 times in a row, after 1 roll-back; 6 steps" in report
    told = [line for line in report.splitlines() if line.startswith("  step ")]
    assert [line.split(":")[0] for line in told] == [
        *(f"  step {step}, samples {4 * step - 4} to {4 * step - 1}" for step in (7, 8, 9)),
        *(f"  step {step}, samples {4 * step + 16} to {4 * step + 19}" for step in (7, 8, 9)),
    ], "after the roll-back to step 4 the data went on at sample 36"


def test_bad_samples_drawn_again_would_stop_the_run(tmp_path: Path) -> None:
    """What the cursor is for: with the data rewound too, the same three steps are bad again."""
    poison = frozenset({29, 33, 37})
    assert run(tmp_path / "on", stream=Stream(4, poison)).rollbacks == 1

    class Rewinding(Stream):
        def __iter__(self) -> Any:
            for batch, cursor in super().__iter__():
                if cursor == 44:  # the first batch after the roll-back
                    self.cursor = 16
                    batch, cursor = next(super().__iter__())
                yield batch, cursor

    with pytest.raises(InputError, match="for the second time"):
        run(tmp_path / "again", stream=Rewinding(4, poison))


def test_milestones_are_kept_for_good(tmp_path: Path) -> None:
    run(tmp_path, steps=30, checkpoint_every=4, keep=1, milestone_every=10)
    assert checkpoint_steps(tmp_path / "checkpoints") == [10, 20, 30]
    assert all(checkpoint.verify_checkpoint(checkpoint_path(tmp_path / "checkpoints", s)) is None for s in (10, 20))
    run(tmp_path / "none", steps=30, checkpoint_every=10, keep=1)
    assert checkpoint_steps(tmp_path / "none/checkpoints") == [30]


@pytest.mark.parametrize("background", [True, False])
def test_steps_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    """The save of step 4 ends only when step 7 is done; written in the foreground, it would wait in vain."""
    module, went_on = Toy(), threading.Event()
    after_step, write, save = module.after_step, checkpoint._write_checkpoint, training.save_checkpoint

    def stepped(step: int) -> None:
        after_step(step)
        if step == 6:
            went_on.set()

    def slow(path: Path, *rest: Any) -> None:
        if path.name == "step_0000004":
            waited.append(went_on.wait(timeout=2.0 if background else 0.05))
        write(path, *rest)

    waited: list[bool] = []
    module.after_step = stepped  # type: ignore[method-assign]
    monkeypatch.setattr(checkpoint, "_write_checkpoint", slow)
    monkeypatch.setattr(training, "save_checkpoint", lambda *a, **k: save(*a, **k, background=background))
    run(tmp_path / "slow", module=module)
    assert waited == [background]
    monkeypatch.setattr(checkpoint, "_write_checkpoint", write)
    run(tmp_path / "quick")
    assert digest(tmp_path / "slow") == digest(tmp_path / "quick"), "what was saved is the state of step 4"


def test_micro_batches_are_prepared_together_where_a_loss_needs_it(tmp_path: Path) -> None:
    seen: list[tuple[int, list[int]]] = []
    run(tmp_path, size=2, accumulate=3, prepare=lambda batches, step: seen.append((step, [len(b) for b in batches])))
    assert seen == [(step, [2, 2, 2]) for step in range(STEPS)]
    seen.clear()
    run(tmp_path / "one", prepare=lambda batches, step: seen.append((step, [])))
    assert seen == [], "one micro-batch is the whole batch"


def refuse(*args: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_stops_resumably_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    for full_at in (4, 8, 12):
        folder = tmp_path / f"{full_at}"
        write = checkpoint._write_checkpoint

        def full(path: Path, *rest: Any, at: int = full_at, write: Any = write) -> None:
            with pytest.MonkeyPatch.context() as patch:
                if path.name == f"step_{at:07d}":
                    patch.setattr(os, "write", refuse)
                write(path, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_write_checkpoint", full)
            with pytest.raises(Resumable, match=rf"could not save .*step_{full_at:07d} \(\d+ bytes\): No space left"):
                run(folder)
        assert checkpoint_steps(folder / "checkpoints")[-1] == full_at - 4
        assert not list((folder / "checkpoints").glob("*.tmp"))
        run(folder)
        assert digest(folder) == digest(tmp_path / "whole")


def test_an_error_of_the_module_comes_out_as_it_is_and_the_write_ends(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(tmp_path, module=Interrupted(4), checkpoint_every=1)
    assert latest_checkpoint(tmp_path / "checkpoints") == checkpoint_path(tmp_path / "checkpoints", 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_never_the_best(tmp_path: Path, bad: float) -> None:
    values = {0: bad, 5: 0.9, 10: bad, 12: 0.5}
    progress = run(tmp_path, periodic=lambda step: {"knn": values[step]}, periodic_every=5, best="knn")
    assert (progress.best_step, progress.best_value) == (5, 0.9)


def test_the_periodic_evaluation_and_the_best_checkpoint(tmp_path: Path) -> None:
    called = []
    values = {0: 0.1, 5: 0.9, 10: 0.4, 12: 0.5}

    class Watched(Toy):
        def forward(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
            assert self.training
            return super().forward(batch, step)

    module = Watched()

    def periodic(step: int) -> dict[str, float]:
        called.append(step)
        module.eval()
        torch.manual_seed(123)
        return {"knn/top1": values[step]}

    progress = run(tmp_path / "a", module=module, periodic=periodic, periodic_every=5, best="knn/top1")
    assert called == [0, 5, 10, 12]
    assert (progress.best_step, progress.best_value) == (5, 0.9)
    assert checkpoint.best_step(tmp_path / "a/checkpoints") == 5
    assert checkpoint_steps(tmp_path / "a/checkpoints") == [5, 8, 12]
    found = [(row["step"], row["knn/top1"]) for row in lines(tmp_path / "a") if "knn/top1" in row]
    assert found == list(values.items())
    plain = Toy()
    run(tmp_path / "b", module=plain)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("left", [5, None])
def test_a_kill_just_before_the_last_mark_leaves_no_older_best_step(tmp_path: Path, left: int | None) -> None:
    options = {"periodic": lambda step: {"knn": float(step)}, "periodic_every": 5, "best": "knn"}
    run(tmp_path, **options)
    root = tmp_path / "checkpoints"
    assert checkpoint.best_step(root) == STEPS
    (root / "best.json").unlink()
    if left is not None:
        checkpoint.mark_best(root, left)
    run(tmp_path, **options)
    assert checkpoint.best_step(root) == STEPS


def test_a_gradient_taken_away_holds_its_layer(tmp_path: Path) -> None:
    module = Toy()
    start = module.student[-1].weight.detach().clone()
    stop = StopFlag()
    interrupted = Interrupted(1, stop)
    with pytest.raises(Resumable):
        run(tmp_path, module=interrupted, stop=stop)
    assert torch.equal(interrupted.student[-1].weight, start)
    assert not torch.equal(interrupted.student[0].weight, module.student[0].weight)


def test_the_checkpoint_alone_says_what_it_holds(tmp_path: Path) -> None:
    run(tmp_path, meta={"encoder": {"name": "toy"}})
    tensors, meta = load_checkpoint(checkpoint_path(tmp_path / "checkpoints", STEPS))
    assert (meta["step"], meta["cursor"], meta["encoder"]) == (STEPS, STEPS * 4, {"name": "toy"})
    assert {name.split(".")[0] for name in tensors["model"]} == {"student", "teacher", "centre"}
    assert "student.0.weight/exp_avg" in tensors["optimizer"]


def test_bf16_keeps_float32_weights_and_learns(tmp_path: Path) -> None:
    module = Toy()
    run(tmp_path / "bf16", module=module, precision="bf16", steps=30)
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    losses = [row["loss"] for row in lines(tmp_path / "bf16")]
    assert losses[-1] < 0.8 * losses[0]
    run(tmp_path / "fp32", steps=30)
    assert losses == pytest.approx([row["loss"] for row in lines(tmp_path / "fp32")], rel=0.05)


def test_stages_share_one_log(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, log_every=6)
    for stage in ("text", "connector"):
        run(tmp_path / stage, metrics=log, stage=stage)
    assert [(row["stage"], row["step"]) for row in lines(tmp_path)] == [
        ("text", 6),
        ("text", 12),
        ("connector", 6),
        ("connector", 12),
    ]


def test_seeds_of_steps() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(20) for rank in range(4)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(1, 11, 1) != step_seed(11, 1, 1)


def test_frozen_parts_take_no_part(tmp_path: Path) -> None:
    module = Toy()
    module.student[0].requires_grad_(False)
    start = module.student[0].weight.clone()
    run(tmp_path, module=module, optimizer=optim.adamw(optim.param_groups(module, 0.1), 1e-2))
    assert torch.equal(module.student[0].weight, start)
    names = load_checkpoint(checkpoint_path(tmp_path / "checkpoints", STEPS))[0]["optimizer"]
    assert not any(name.startswith(("student.0", "teacher")) for name in names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_resumes_and_skips(tmp_path: Path) -> None:
    device, poison = torch.device("cuda"), frozenset({21})
    for precision in ("fp32", "bf16"):
        whole, cut = tmp_path / precision, tmp_path / f"{precision}-cut"
        run(whole, stream=Stream(4, poison), device=device, precision=precision)
        stop = StopFlag()
        with pytest.raises(Resumable):
            run(
                cut,
                module=Interrupted(6, stop),
                stream=Stream(4, poison),
                stop=stop,
                device=device,
                precision=precision,
            )
        progress = run(cut, stream=Stream(4, poison), device=device, precision=precision)
        assert progress.skipped == 1
        ends = [json.loads(json.dumps(lines(folder)[-1]))["loss"] for folder in (whole, cut)]
        assert ends[1] == pytest.approx(ends[0], rel=1e-3)
