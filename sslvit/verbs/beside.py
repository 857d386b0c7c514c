"""The random-encoder control of `align`, trained in a process of its own while the model itself is trained.

Models of this size use one core as well as two, so on a CPU both get half of the threads and are done in about three
quarters of the time. The child only writes the control's checkpoints; whatever it leaves undone, `align` does itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sslvit import distributed
from sslvit.config import AlignConfig
from sslvit.errors import Resumable
from sslvit.signals import StopFlag

CONTROL = "random_encoder"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
CHILD = "import sys; from sslvit.verbs.align import train_control; train_control(*sys.argv[1:3], int(sys.argv[3]))"
GRACE = 60.0  # seconds a stopped child has to save


def runs_beside(config: AlignConfig, device: torch.device) -> bool:
    """Whether there is a control to train and there are cores to share. Never depends on what is finished already."""
    wanted = CONTROL in config.controls and sys.platform == "linux"
    return wanted and device.type == "cpu" and distributed.world_size() == 1 and torch.get_num_threads() > 1


@contextmanager
def half_the_threads(shared: bool) -> Iterator[None]:
    """What shares the cores computes with half of the threads, alone or not: the same numbers however it is resumed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // 2 if shared else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def control_beside(path: Path, config_file: Path, shared: bool, stop: StopFlag) -> Iterator[None]:
    """Train the control of the run in `path` while the body runs; at its end wait for it, after an error stop it.

    config_file: the settings of the run, as its folder keeps them.
    """
    if not shared:
        yield
        return
    folder = path / "controls" / CONTROL
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "train.log"  # the child's own; what goes wrong stands in errors.log
    threads = torch.get_num_threads() // 2
    with open(folder / "errors.log", "w") as errors, half_the_threads(True):
        words = [sys.executable, "-c", CHILD, str(path), str(config_file), str(os.getpid())]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        print(f"the control with a random encoder is trained beside it: {log}", flush=True)
        try:
            yield
            _wait(child, stop, folder / "errors.log")
        finally:
            _end(child)


def _wait(child: subprocess.Popen[bytes], stop: StopFlag, errors: Path) -> None:
    while child.poll() is None:
        if stop.is_set():
            raise Resumable(f"stopped by {stop.received}; the same command goes on")
        time.sleep(0.2)
    if child.returncode:
        print(f"warning: the control stopped with code {child.returncode}, see {errors}; going on here", flush=True)


def _end(child: subprocess.Popen[bytes]) -> None:
    """A child that still runs is asked to save and stop."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def die_with(parent: int) -> None:
    """The kernel kills this process when `parent` is gone: two processes never write one control's folder."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
