"""Eight interruptions of a job on a real Slurm of two nodes (`make test-slurm`): it ends unattended, bytes equal."""

import os
from pathlib import Path

import pytest
import slurm_faults
import slurm_lab

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("fault", slurm_faults.FAULTS)
def test_it_ends_unattended_with_the_same_bytes(lab, wanted: str, tmp_path: Path, fault: str) -> None:
    lab.idle()
    slurm_faults.FAULTS[fault](lab, tmp_path, wanted)
