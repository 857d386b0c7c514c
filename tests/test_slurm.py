"""Eight interruptions of a job on a real Slurm of two nodes (`make test-slurm`): it ends unattended, bytes equal.

And, without a Slurm, that these checks fail for jobs that do less than that.
"""

import json
import os
from pathlib import Path

import pytest
import slurm_faults
import slurm_lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if why := slurm_lab.missing():
        pytest.skip(why)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    with slurm_lab.Lab() as lab:
        lab.environment = {**environment, "SLURM_CONF": lab.environment["SLURM_CONF"]}
        yield lab


@pytest.fixture(scope="module")
def wanted(lab, tmp_path_factory) -> str:
    return slurm_faults.reference(lab, tmp_path_factory.mktemp("reference"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", slurm_faults.FAULTS)
def test_it_ends_unattended_with_the_same_bytes(lab, wanted: str, tmp_path: Path, fault: str) -> None:
    lab.idle()
    slurm_faults.FAULTS[fault](lab, tmp_path, wanted)


def recorded(folder: Path, *, state="COMPLETED", restarts=1, stop: int | None = 20, start=20, weights=b"right"):
    """A job that is over, by what it and Slurm left: stopped after a step, gone on from another."""
    job = object.__new__(slurm_faults.Job)
    job.out, job.id = folder / "run", "7"
    job.lab = type("Lab", (), {"say": lambda self, *words: state})()
    newest = job.out / "checkpoints" / f"step_{slurm_faults.STEPS:07d}"
    newest.mkdir(parents=True)
    (job.out / "jobs").mkdir()
    for name in ("model.safetensors", "optimizer.safetensors"):
        (newest / name).write_bytes(weights)
    note = {"state": "done" if state == "COMPLETED" else "running", "restarts": restarts}
    (job.out / "jobs" / "7_state.json").write_text(json.dumps(note))
    (job.out / "jobs" / "7_0_log.err").write_text(
        "" if stop is None else f"stopped by SIGUSR2 after step {stop}, saved"
    )
    (job.out / "train.log").write_text(f"going on from step {start}")
    return job


def test_an_interrupted_job_that_lost_nothing_passes(tmp_path: Path) -> None:
    job = recorded(tmp_path)
    job.until_done(1)
    slurm_faults.check(job, job.digest())


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"stop": None}, "never stopped in order"),  # it ignores the signal and dies at the limit
        ({"stop": 20, "start": 10}, r"\[20\], \[10\]"),  # it saves nothing when told to stop
        ({"state": "TIMEOUT"}, "the job is TIMEOUT"),  # nobody queues it again
        ({"restarts": 0}, "never interrupted"),
        ({"weights": b"wrong"}, "other weights"),
    ],
)
def test_a_job_that_does_less_is_noticed(tmp_path: Path, facts: dict, complaint: str) -> None:
    wanted = recorded(tmp_path / "whole").digest()
    job = recorded(tmp_path, **facts)
    with pytest.raises(AssertionError, match=complaint):
        job.until_done(1)
        slurm_faults.check(job, wanted)
