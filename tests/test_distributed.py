"""What torchrun and srun tell us, and that one process needs nothing of it."""

import pytest
import torch

from sslvit import distributed
from sslvit.errors import InputError

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_one_process_needs_nothing() -> None:
    tensor = torch.arange(3.0)
    assert distributed.rank() == 0
    assert distributed.world_size() == 1
    assert distributed.is_main()
    assert distributed.all_reduce_sum_(tensor) is tensor
    assert distributed.all_reduce_max_(tensor) is tensor
    assert distributed.all_gather_cat(tensor) is tensor
    assert distributed.broadcast_object("x") == "x"
    distributed.barrier()
    distributed.shutdown()


def test_a_batch_script_is_not_one_of_its_tasks() -> None:
    inside_sbatch = {key: value for key, value in SRUN.items() if not key.startswith("SLURM_STEP")}
    assert distributed._rendezvous(inside_sbatch) is None
    assert distributed._rendezvous({}) is None
    assert distributed._rendezvous({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_srun() -> None:
    found = distributed._rendezvous(SRUN)
    assert found is not None
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    again = distributed._rendezvous({**SRUN, "SLURM_RESTART_COUNT": "1"})
    assert again is not None
    assert again["MASTER_PORT"] != port
    assert all(20000 <= int(p) < 50000 for p in (port, again["MASTER_PORT"]))


def test_torchrun() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert distributed._rendezvous({**SRUN, **torchrun}) == {}
    assert distributed._rendezvous({**torchrun, "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[03-05,9],login", "gpu03"),
        ("n[1,3]-ib", "n1-ib"),
        ("rack-2-node7", "rack-2-node7"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert distributed._first_host(nodes) == first


def test_devices() -> None:
    assert distributed.init("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device='tpu9000' is not a device"):
        distributed.init("tpu9000")
    if not torch.cuda.is_available():
        assert distributed.init() == torch.device("cpu")
        with pytest.raises(InputError, match="no usable CUDA device; use device=cpu"):
            distributed.init("cuda")


def test_a_small_shared_memory_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    usage = type("Usage", (), {"free": 64 << 20})
    monkeypatch.setattr(distributed.shutil, "disk_usage", lambda path: usage)
    distributed._check_shared_memory(1)
    assert not caplog.text
    distributed._check_shared_memory(8)
    assert "/dev/shm has 64 MiB free, 8 processes may need 512: start the container with --shm-size=512m" in caplog.text


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4", True),
        ("Timed out waiting 8000ms for recv operation to complete", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_means_that_another_process_is_gone(monkeypatch: pytest.MonkeyPatch, text: str, lost: bool) -> None:
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    assert distributed._is_of_a_peer(RuntimeError(text)) is lost


def test_an_error_of_ones_own_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="mine"), distributed.joined("cpu"):
        raise RuntimeError("mine")
