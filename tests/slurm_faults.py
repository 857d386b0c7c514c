"""Interruptions of a real pretraining job on a real Slurm, one function each. Not a test: test_slurm.py and
benchmarks/chaos.py run them.

Each submits a job of two tasks on two nodes, interrupts it and waits until it is done without touching it again. It
must end with the bytes of an uninterrupted job; where it was told to save, it must go on from the very step it was at.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from slurm_lab import NODES, Lab, processes, wait_until

STEPS = 120
SECONDS = 480.0
KEYS = [
    *("data=scenes:?n=64&size=32", f"steps={STEPS}", "batch_size=8", "device=cpu", "precision=fp32", "num_workers=1"),
    *("encoder.image_size=32", "encoder.patch_size=8", "encoder.name=vit_tiny_patch16_224", "encoder.depth=1"),
    *("encoder.embed_dim=32", "encoder.num_heads=2", "crops.num_local=0", "knn.every=0", "dino.num_prototypes=16"),
    *("dino.head_hidden_dim=16", "dino.head_bottleneck_dim=8", "mae.decoder_dim=32", "mae.decoder_depth=1"),
    *("mae.decoder_num_heads=2", "checkpoint.keep=3"),
]
LAUNCH = "cluster: slurm\nnodes: 2\ngpus_per_node: 0\ntasks_per_node: 1\nhours: {hours}\nsignal_delay_s: {delay}\n"
LAUNCH += "setup: ['export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1']\n"


class Job:
    """One submitted run."""

    def __init__(self, lab: Lab, out: Path, *, every: int = 1000, hours: float = 0.5, delay: int = 20) -> None:
        self.lab, self.out = lab, out
        out.parent.mkdir(parents=True, exist_ok=True)
        launch = out.with_suffix(".yaml")
        launch.write_text(LAUNCH.format(hours=hours, delay=delay))
        words = ["submit", "--launch", str(launch), "pretrain", "--output-dir", str(out)]
        command = [sys.executable, "-m", "sslvit", *words, *KEYS, f"checkpoint.every={every}"]
        environment = {**lab.environment, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        (record,) = [json.loads(file.read_text()) for file in (out / "jobs").glob("[0-9]*.json") if file.stem.isdigit()]
        self.id = record["id"]

    def step(self) -> int:
        """The last step in metrics.jsonl, 0 before any."""
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            return int(json.loads((self.out / "metrics.jsonl").read_text().splitlines()[-1])["step"])
        return 0

    def state(self) -> str:
        return self.lab.say("squeue", "-h", "-t", "all", "-o", "%T", "-j", self.id).strip()

    def note(self) -> dict:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.out / "jobs" / f"{self.id}_state.json").read_text())
        return {}

    def log(self) -> str:
        """What rank 0 said, of all its starts."""
        files = sorted((self.out / "jobs").glob(f"{self.id}_0_log.*"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def until_step(self, step: int) -> None:
        self._until(lambda: self.step() >= step, f"step {step} is not reached")

    def until_running(self) -> None:
        self._until(lambda: self.state() == "RUNNING", "the job does not start")

    def until_done(self, seconds: float = SECONDS) -> None:
        self._until(lambda: self.note().get("state") == "done" and self.state() == "COMPLETED", "not done", seconds)

    def _until(self, condition: Callable[[], bool], problem: str, seconds: float = SECONDS) -> None:
        def reached() -> bool:
            ended = self.state() in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not ended, f"{problem}: the job is {self.state()}, {self.note()}\n{self.log()[-3000:]}"
            return condition()

        try:
            wait_until(reached, seconds, problem)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.state()} {self.note()}\n{self.log()[-3000:]}") from None

    def signal(self, name: str) -> None:
        self.lab.say("scancel", f"--signal={name}", self.id)

    def digest(self) -> str:
        return digest(self.out)

    def resumed_at(self) -> list[int]:
        """The steps from which starts went on, by the run's own log."""
        return [int(step) for step in re.findall(r"going on from step (\d+)", (self.out / "train.log").read_text())]

    def stopped_at(self) -> list[int]:
        """The steps after which it was stopped and saved."""
        return [int(step) for step in re.findall(r"stopped by \w+ .*?after step (\d+)", self.log())]


def digest(out: Path) -> str:
    folder = out / "checkpoints" / f"step_{STEPS:07d}"
    parts = [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def check(job: Job, wanted: str, lost_at_most: int | None = 0) -> None:
    """Done, the same bytes, restarted, and (with a warning) nothing or few steps lost."""
    assert job.digest() == wanted, "other weights than uninterrupted"
    assert job.note()["restarts"] >= 1, "it was never interrupted"
    if lost_at_most is not None:
        stops, starts = job.stopped_at(), job.resumed_at()
        assert stops, f"it never stopped in order\n{job.log()[-2000:]}"
        assert all(any(0 <= stop - start <= lost_at_most for start in starts) for stop in stops), (stops, starts)


def reference(lab: Lab, folder: Path) -> str:
    """The digest of an uninterrupted job."""
    job = Job(lab, folder / "reference")
    job.until_done()
    assert job.note()["restarts"] == 0
    return job.digest()


def time_limit(lab: Lab, folder: Path, wanted: str) -> None:
    """Slurm's own USR2 before a limit of two minutes. The tasks stand still until it has come: no machine is too fast
    for it, and Slurm, which counts in minutes, may send it at any second.
    """
    job = Job(lab, folder / "run", hours=2 / 60, delay=30)
    job.until_step(10)
    assert "TimeLimit=00:02:00" in lab.say("scontrol", "show", "job", job.id)
    held = tasks(job)
    send(held, signal.SIGSTOP)
    try:
        wait_until(lambda: job.note().get("restarts", 0) >= 1 or all(map(is_told, held)), 150, "no signal came")
    finally:
        send(held, signal.SIGCONT)
    job.until_done()
    check(job, wanted)


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def is_told(pid: int) -> bool:
    """Whether USR2 waits for a process, or it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    return any(
        int(line.split()[1], 16) >> (signal.SIGUSR2 - 1) & 1 for line in lines if line[:6] in ("SigPnd", "ShdPnd")
    )


def preemption(lab: Lab, folder: Path, wanted: str) -> None:
    job = Job(lab, folder / "run")
    job.until_step(20)
    lab.say("srun", "-p", "high", "-N2", "-n2", "--exclusive", "sleep", "2", seconds=120)
    job.until_done()
    check(job, wanted)


def requeue(lab: Lab, folder: Path, wanted: str) -> None:
    """By an administrator, with Slurm's TERM and KILL."""
    job = Job(lab, folder / "run")
    job.until_step(20)
    lab.say("scontrol", "requeue", job.id)
    job.until_done()
    check(job, wanted)


def term(lab: Lab, folder: Path, wanted: str) -> None:
    """TERM to the tasks of a job that Slurm goes on with."""
    job = Job(lab, folder / "run")
    job.until_step(20)
    job.signal("TERM")
    job.until_done()
    check(job, wanted)


def node_down(lab: Lab, folder: Path, wanted: str) -> None:
    """The second node loses power; no warning, so the last periodic save is what is left."""
    job = Job(lab, folder / "run", every=10)
    job.until_step(30)
    lab.kill_node(NODES[1])
    time.sleep(3)
    lab.start_node(NODES[1])
    job.until_done()
    check(job, wanted, lost_at_most=None)
    assert max(job.resumed_at()) >= 20, job.resumed_at()


def signal_in_import(lab: Lab, folder: Path, wanted: str) -> None:
    """USR2 as soon as the tasks exist, long before they listen."""
    job = Job(lab, folder / "run")
    wait_until(lambda: len(tasks(job)) == 2, 60, "no tasks")
    job.signal("USR2")
    job.until_done()
    check(job, wanted, lost_at_most=None)


def signal_twice(lab: Lab, folder: Path, wanted: str) -> None:
    job = Job(lab, folder / "run")
    job.until_step(20)
    job.signal("USR2")
    job.signal("USR2")
    job.until_done()
    check(job, wanted)


def signal_in_save(lab: Lab, folder: Path, wanted: str) -> None:
    """USR2 while a checkpoint is being written: every step saves."""
    job = Job(lab, folder / "run", every=1)
    job.until_step(20)
    root = job.out / "checkpoints"
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if any(name.endswith(".tmp") for name in os.listdir(root)):
                break
    job.signal("USR2")
    job.until_done()
    check(job, wanted)


def tasks(job: Job) -> list[int]:
    """The processes of both tasks on this machine."""
    return [
        pid
        for pid, words in processes().items()
        if "submitit.core._submit" in words
        and str(job.out) in words
        and "srun" not in words
        and "env " not in words[:8]
    ]


FAULTS: dict[str, Callable[[Lab, Path, str], None]] = {
    "signal_twice": signal_twice,
    "time_limit": time_limit,
    "preemption": preemption,
    "requeue": requeue,
    "term": term,
    "node_down": node_down,
    "signal_in_import": signal_in_import,
    "signal_in_save": signal_in_save,
}


def main(names: list[str], folder: Path) -> int:
    """Bring a Slurm up, run the named faults (all without names), print a line each; the number that failed."""
    failed = 0
    with Lab() as lab:
        began = time.monotonic()
        wanted = reference(lab, folder)
        print(f"reference {time.monotonic() - began:.0f} s", flush=True)
        for name in names or FAULTS:
            began, problem = time.monotonic(), ""
            shutil.rmtree(folder / name, ignore_errors=True)
            try:
                lab.idle()
                FAULTS[name](lab, folder / name, wanted)
            except Exception as error:
                problem, failed = f": {error}", failed + 1
            print(f"{name} {'FAILED' if problem else 'passed'} {time.monotonic() - began:.0f} s{problem}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], Path(sys.argv[1]).absolute()))
