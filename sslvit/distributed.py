"""Several processes that act as one: start-up from torchrun or Slurm, and the few collectives the project needs.

Not a wrapper of torch.distributed: everything here is a no-op in a single process, so callers never ask. Small control
values (stop flags, results of an evaluation) travel over gloo as CPU tensors, so that agreeing on them never makes a
GPU wait.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslvit.errors import InputError

__all__ = [
    "all_gather_cat",
    "all_reduce_max_",
    "all_reduce_sum_",
    "barrier",
    "broadcast_object",
    "choose_device",
    "init",
    "is_main",
    "local_rank",
    "native_bf16",
    "rank",
    "shutdown",
    "world_size",
]

TIMEOUT = timedelta(minutes=10)


def init(device: str | None = None) -> torch.device:
    """Joins the process group that torchrun or srun started, if any, and returns this process's device.

    device: "cpu", "cuda", "cuda:1" ...; None takes CUDA when there is one. InputError if it is not there.
    """
    chosen = choose_device(device)
    environment = _rendezvous(os.environ)
    if environment is not None and not dist.is_initialized():
        os.environ.update(environment)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method="env://", timeout=TIMEOUT)
    return chosen


def native_bf16(device: torch.device | str) -> bool:
    """Whether the device computes bf16 itself; where it is emulated, fp32 is faster."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 in a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes act together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine; it chooses the GPU."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def is_main() -> bool:
    """True in the one process that writes files."""
    return rank() == 0


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        all_reduce_sum_(torch.zeros(1))


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Replaces `tensor` by its sum over processes and returns it. Not differentiable."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max_(tensor: Tensor) -> Tensor:
    """Replaces `tensor` by its maximum over processes and returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_gather_cat(tensor: Tensor) -> Tensor:
    """(n, ...) on each process -> (sum of n, ...) on every process, in rank order; n may differ. Not differentiable."""
    if world_size() == 1:
        return tensor
    counts = torch.zeros(world_size(), dtype=torch.int64, device=tensor.device)
    counts[rank()] = len(tensor)
    sizes: list[int] = all_reduce_sum_(counts).tolist()
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def broadcast_object(value: Any) -> Any:
    """The main process's value, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def choose_device(device: str | None) -> torch.device:
    """The device a name means in this process; None takes CUDA when there is one. InputError if it is not there."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device={name!r} is not a device; use cpu or cuda") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device={name!r}, but this machine has no usable CUDA device; use device=cpu")
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank() % torch.cuda.device_count())
        elif chosen.index >= torch.cuda.device_count():
            raise InputError(f"device={name!r}, but this machine's last one is cuda:{torch.cuda.device_count() - 1}")
        torch.cuda.set_device(chosen)
    return chosen


def _rendezvous(environment: Mapping[str, str]) -> dict[str, str] | None:
    """What init_process_group reads, from torchrun's variables or srun's; None when there is one process.

    srun's *step* variables decide, because a batch script sees SLURM_NTASKS without being one of the tasks. The port
    depends on the job and on how often it was requeued, so that a restart never meets its own dead socket.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return {} if int(environment["WORLD_SIZE"]) > 1 else None
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        return None
    job, restarts = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + (job * 31 + restarts * 7) % 30000),
    }


def _first_host(nodes: str) -> str:
    """The first name in a Slurm host list: `gpu[03-05,9],login` -> `gpu03`, `a,b` -> `a`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    assert match, nodes
    head, number, tail = match.groups()
    return head + (number or "") + (tail or "")
