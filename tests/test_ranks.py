"""Two gloo processes agree with one process at the same global batch, and with each other about everything."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_checks import monitor
from toy_run import Stream, Toy, digest, lines, run

from sslvit.errors import Resumable
from sslvit.signals import StopFlag

SCRIPT = Path(__file__).with_name("rank_checks.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def begin_alone(folder: Path) -> None:
    """Five steps at global batch 8, then a stop."""
    stop = StopFlag()
    module = Toy(dropout=0.0)
    after_step = module.after_step

    def stopping(step: int) -> None:
        after_step(step)
        if step == 4:
            stop.received = "SIGTERM"

    module.after_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Resumable):
        run(folder, module=module, stream=Stream(8), stop=stop)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    begin_alone(folder / "begun")
    commands = [[sys.executable, "-W", "error", str(SCRIPT), str(rank), "2", str(folder)] for rank in range(2)]
    processes = [
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", ["plain", "accumulated", "sharded"])
def test_two_processes_are_one_at_the_same_global_batch(
    tmp_path: Path, together: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, results = together
    alone = Toy(dropout=0.0)
    run(tmp_path, module=alone, size=8)
    flat = torch.cat([value.double().flatten() for value in alone.state_dict().values()])
    assert torch.allclose(torch.tensor(results[name]).double(), flat, atol=1e-5)
    if name == "plain":
        for ours, theirs in zip(lines(folder / "plain"), lines(tmp_path), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-5)


def test_a_run_of_one_process_goes_on_with_two_and_with_one_again(
    tmp_path: Path, together: tuple[Path, dict[str, Any]]
) -> None:
    folder, results = together
    alone = Toy(dropout=0.0)
    run(tmp_path / "alone", module=alone, size=8)
    flat = torch.cat([value.double().flatten() for value in alone.state_dict().values()])
    assert torch.allclose(torch.tensor(results["other_world"]).double(), flat, atol=1e-5)
    shutil.copytree(folder / "begun", tmp_path / "begun")
    back = Toy(dropout=0.0)
    progress = run(tmp_path / "begun", module=back, size=8)
    assert progress.cursor == 12 * 8
    assert digest(tmp_path / "begun") == results["digest"]


def test_the_monitor_of_two_processes_tells_what_one_would(
    tmp_path: Path, together: tuple[Path, dict[str, Any]]
) -> None:
    assert together[1]["monitor"] == pytest.approx(monitor(tmp_path), rel=1e-4)


LATE = """
import glob, os, sys, time
import torch
import torch.distributed as dist
from sslvit import distributed

class Late:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
kept = dist.group.WORLD
distributed.all_reduce_sum_(torch.ones(3))
sys.setswitchinterval(100.0)
for task in glob.glob("/proc/self/task/*"):
    if open(task + "/comm").read().startswith("pt_gloo_runloop"):
        os.sched_setscheduler(int(os.path.basename(task)), os.SCHED_IDLE, os.sched_param(0))
distributed.all_reduce_sum_(torch.ones(3))
distributed.shutdown()
late = Late()
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="threads are slowed down as Linux does it")
def test_the_end_waits_for_threads_that_still_hold_tensors(tmp_path: Path) -> None:
    """A mesh keeps the group alive; its threads come late and find an interpreter that ends: abort, exit code 134."""
    ends = [
        subprocess.Popen([sys.executable, "-c", LATE, str(rank), str(tmp_path / "meet")], env=ENVIRONMENT)
        for rank in range(2)
    ]
    assert [process.wait(timeout=200) for process in ends] == [0, 0]


@pytest.mark.slow
def test_torchrun_starts_us(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os\n"
        "import torch\n"
        "from sslvit import distributed\n"
        "distributed.init('cpu')\n"
        "distributed.init('cpu')\n"
        "total = distributed.all_reduce_sum_(torch.tensor(distributed.rank() + 1.0))\n"
        "os.write(1, f'{distributed.world_size()} {float(total)}\\n'.encode())\n"
        "distributed.shutdown()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=True)
    assert sorted(done.stdout.split()) == sorted(["2", "3.0", "2", "3.0"])
