"""kill -9 at every file-system operation of a save, and at many of a whole run; broken savers must be caught."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("crash_points.py")
BROKEN = {
    "no_rename": "is visible but damaged",
    "manifest_first": "the manifest is not written last",
    "delete_first": "lost",
    "no_cleaning": "a temporary already exists",
    "no_fsync": "model.safetensors is not fsynced before the rename",
    "no_directory_fsync": "the parent is not fsynced before the old checkpoint goes",
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: a kill does not depend on the disk, and fsync there costs nothing."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


def crash(folder: Path, *cases: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kill_in_a_save_leaves_old_or_new_and_broken_savers_are_caught(folder: Path) -> None:
    results = crash(folder, "sound", *BROKEN)
    assert results["sound"]["points"] >= 60
    assert results["sound"]["failures"] == []
    for case, complaint in BROKEN.items():
        assert any(complaint in failure for failure in results[case]["failures"]), (case, results[case])


def test_a_run_killed_anywhere_ends_the_same(folder: Path) -> None:
    result = crash(folder, "run29")["run29"]
    assert result["points"] >= 8
    assert result["failures"] == []


@pytest.mark.slow
def test_a_run_killed_at_each_operation_ends_the_same(folder: Path) -> None:
    result = crash(folder, "run2")["run2"]
    assert result["points"] >= 100
    assert result["failures"] == []
