"""The control beside the model: the same weights whoever trains it, and no process that outlives its parent."""

import os
import subprocess
import sys
import time

import pytest
import torch
from tiny_vlm import settings

from sslvit.checkpoint import checkpoint_path, checkpoint_steps
from sslvit.config import AlignConfig
from sslvit.run_folder import RunFolder
from sslvit.verbs import beside
from sslvit.verbs.align import align
from sslvit.verbs.demo import DemoConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes die with their parents on Linux alone")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def last_checkpoint(run):
    root = run / "controls" / "random_encoder" / "stages" / "instruct" / "checkpoints"
    return (checkpoint_path(root, max(checkpoint_steps(root))) / "manifest.json").read_bytes()


def test_a_child_leaves_the_weights_that_align_itself_would(tmp_path, monkeypatch, capsys, two_threads):
    short = settings(controls=["random_encoder"], steps=3)
    one = align(output_dir=tmp_path / "child", **short)
    told = capsys.readouterr().out
    assert "trained beside it" in told and "warning: the control stopped" not in told
    monkeypatch.setattr(beside, "CHILD", "raise SystemExit(3)")
    other = align(output_dir=tmp_path / "alone", **short)
    assert "stopped with code 3" in capsys.readouterr().out
    assert last_checkpoint(one) == last_checkpoint(other)
    assert torch.get_num_threads() == 2


def test_a_child_knows_its_settings_as_a_guest_in_another_folder(tmp_path, capsys, two_threads):
    with RunFolder.open(tmp_path, "demo", DemoConfig()):
        align(output_dir=tmp_path, **settings(controls=["random_encoder"], steps=2))
    told = capsys.readouterr().out
    assert "trained beside it" in told and "warning: the control stopped" not in told


def test_only_a_cpu_with_cores_to_share_trains_two_models_at_once(two_threads):
    config = AlignConfig(controls=["random_encoder"])
    assert beside.runs_beside(config, torch.device("cpu"))
    assert not beside.runs_beside(config, torch.device("cuda"))
    assert not beside.runs_beside(AlignConfig(controls=["blind"]), torch.device("cpu"))
    torch.set_num_threads(1)
    assert not beside.runs_beside(config, torch.device("cpu"))


def test_a_killed_parent_takes_the_child_with_it(tmp_path):
    child = (
        "import sys, time; from sslvit.verbs.beside import die_with\n"
        "die_with(int(sys.argv[1])); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_orphan_leaves_before_it_writes():
    words = [sys.executable, "-c", "from sslvit.verbs.beside import die_with; die_with(1)"]
    assert subprocess.run(words, env=os.environ).returncode == 1
