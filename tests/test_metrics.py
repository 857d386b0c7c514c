"""The record of a run: averages between lines, cuts on resume, one line when the disk is full."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sslvit import metrics
from sslvit.errors import Resumable
from sslvit.metrics import TIMING_FIELDS, MetricsLog


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(log: MetricsLog, steps: range) -> None:
    for step in steps:
        log.add(
            {
                "loss": torch.tensor(float(step), requires_grad=True),
                "micro": step * 10,
                "half": torch.tensor(0.5).bfloat16(),
            }
        )
        log.tick(step, images=8, waited=0.001)
        if log.due(step):
            log.line(step, {"lr": 0.1 * step})


def test_a_line_holds_the_averages_since_the_last_one(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, log_every=4)
    log.begin(10, None)
    write(log, range(1, 11))
    log.end()
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [4, 8, 10]
    assert [row["loss"] for row in found] == [2.5, 6.5, 9.5]
    assert [row["micro"] for row in found] == [25.0, 65.0, 95.0]
    assert [row["half"] for row in found] == [0.5] * 3
    assert found[1]["lr"] == pytest.approx(0.8)
    assert found[1].keys() >= TIMING_FIELDS - {"mfu", "monitor_s"}
    assert found[1]["images_per_s"] > 0
    assert found[1]["data_wait"] > 0
    assert found[1]["peak_memory_mib"] > 10
    assert found[-1]["eta"] == 0


def test_a_value_that_comes_only_sometimes_is_averaged_over_its_own_steps(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, log_every=3)
    log.begin(3, None)
    for step in (1, 2, 3):
        log.add({"a": torch.tensor(1.0), **({"b": torch.tensor(6.0)} if step == 2 else {})})
    log.line(3, {})
    log.end()
    assert (rows(tmp_path)[0]["a"], rows(tmp_path)[0]["b"]) == (1.0, 6.0)


@pytest.mark.parametrize(("steps", "every"), [(60, 1), (500, 5), (10_000, 100), (300_000, 100)])
def test_about_a_hundred_lines_and_one_every_hundred_steps(tmp_path: Path, steps: int, every: int) -> None:
    log = MetricsLog(tmp_path)
    log.begin(steps, None)
    assert log.log_every == every
    log.end()


def test_a_resumed_stage_writes_the_same_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, log_every=4)
    log.begin(10, None, "connector")
    write(log, range(1, 7))
    state = log.state()
    write(log, range(7, 10))
    log.row(9, {"knn": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # killed in the middle of a line
    log.end()
    again = MetricsLog(tmp_path, log_every=4)
    again.begin(10, 6, "connector")
    again.load_state(state)
    write(again, range(7, 11))
    again.end()
    assert [(row["step"], row["loss"], row["micro"]) for row in rows(tmp_path)] == [
        (4, 2.5, 25.0),
        (8, 6.5, 65.0),
        (10, 9.5, 95.0),
    ]


def test_earlier_stages_stay_and_later_lines_go(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, log_every=1)
    for stage in ("text", "connector", "instruct"):
        log.begin(3, None, stage)
        write(log, range(1, 4))
        log.end()
    log.begin(3, 2, "connector")
    assert [(row["stage"], row["step"]) for row in rows(tmp_path)] == [
        ("text", 1),
        ("text", 2),
        ("text", 3),
        ("connector", 1),
        ("connector", 2),
    ]
    log.begin(3, None, "text")
    assert rows(tmp_path) == []
    log.end()


def test_rewind(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, log_every=1)
    log.begin(5, None)
    write(log, range(1, 5))
    log.rewind(2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    log.end()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_the_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, log_every=2)
    log.begin(4, None, "text")
    write(log, range(1, 5))
    log.end()
    board = EventAccumulator(str(tmp_path / "tb/text"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(2, 1.5), (4, 3.5)]


def test_without_tensorboard_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    log = MetricsLog(tmp_path, log_every=2)
    log.begin(2, None)
    write(log, range(1, 3))
    log.end()
    assert not (tmp_path / "tb").exists()
    assert "tensorboard" not in "".join(capsys.readouterr()).lower()


def test_console_and_train_log(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = MetricsLog(tmp_path, log_every=1)
    log.begin(5, None)
    log.say("hello")
    write(log, range(1, 6))
    log.end()
    said = capsys.readouterr().out.splitlines()
    assert said == (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("  ")[0] for line in said] == ["hello", "step 1", "step 5"]  # seconds apart, not every line
    assert "loss 5" in said[-1]
    assert "eta 0" in said[-1]


def test_progress_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    log = MetricsLog(tmp_path, log_every=1)
    log.begin(5, 2, "text")
    log.say("hello")
    write(log, range(3, 6))
    log.end()
    captured = capsys.readouterr()
    assert "text" in captured.err
    assert "5/5" in captured.err
    assert "hello" in captured.out
    assert "loss 5" in (tmp_path / "train.log").read_text()


class FullBoard:
    def add_scalar(self, name: str, value: float, step: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_under_tensorboard_is_resumable(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, log_every=1)
    log.begin(3, None)
    log._board.close()
    log._board = FullBoard()
    with pytest.raises(Resumable, match="tb: No space left on device"):
        write(log, range(1, 2))
    log.end()


def test_a_full_disk_is_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path, log_every=1)
    log.begin(3, None)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics, "open", refuse, raising=False)
    with pytest.raises(Resumable, match=r"could not write .*metrics\.jsonl: No space left on device; make room"):
        write(log, range(1, 2))
    log.end()


def test_utilisation_is_needed_flops_over_possible_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(metrics, "peak_flops", lambda *key: asked.append(key) or 5e6)
    log = MetricsLog(tmp_path, log_every=2, flops_per_image=1000.0, precision="bf16")
    log.begin(4, None)
    write(log, range(1, 5))
    log.end()
    assert asked == [("cpu", "bf16")]
    for row in rows(tmp_path):
        assert row["mfu"] == pytest.approx(row["images_per_s"] * 1000 / 5e6, abs=1e-4)
    log = MetricsLog(tmp_path / "unknown", log_every=2)
    log.begin(2, None)
    write(log, range(1, 3))
    assert "mfu" not in rows(tmp_path / "unknown")[0]


def wait_for_data(folder: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> list[str]:
    """Lines of train.log that advise, of a run whose lines wait for data these shares of the time."""
    log = MetricsLog(folder, log_every=1, data_advice=lambda: "do this")
    log.begin(len(waits), None)
    for step, wait in enumerate(waits, 1):
        monkeypatch.setattr(log, "_timing", lambda step, wait=wait: {"data_wait": wait})
        log.add({"loss": 1.0})
        log.line(step, {})
    log.end()
    return [line for line in (folder / "train.log").read_text().splitlines() if "do this" in line]


def test_a_run_that_waits_for_data_is_told_once_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = wait_for_data(tmp_path / "a", monkeypatch, [0.9, 0.1, 0.62, 0.7])
    assert said == ["loading limits this run: steps wait for images 62% of the time; do this"]
    assert wait_for_data(tmp_path / "b", monkeypatch, [0.9, 0.1, 0.2]) == [], "the first line holds the start-up"
