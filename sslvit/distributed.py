"""Several processes that act as one: start-up from torchrun or Slurm, and the few collectives the project needs.

Not a wrapper of torch.distributed: everything here is a no-op in a single process, so callers never ask. Small control
values (stop flags, results of an evaluation) travel over gloo as CPU tensors, so that agreeing on them never makes a
GPU wait.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sslvit.errors import InputError, RankLost

__all__ = [
    "all_gather_cat",
    "all_reduce_max_",
    "all_reduce_sum_",
    "barrier",
    "broadcast_object",
    "choose_device",
    "compiles",
    "copied_to",
    "copied_to_main",
    "full",
    "init",
    "is_main",
    "joined",
    "local_rank",
    "native_bf16",
    "rank",
    "shard",
    "shard_like",
    "shutdown",
    "unsharded",
    "whole",
    "world_size",
]

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)  # how long a collective waits for a process that does not answer
BEAT_SECONDS = 1.0  # between two signs of life
SILENT_SECONDS = 5.0  # without one, a process counts as gone
SETTLE_SECONDS = 5.0  # at most, for gloo's threads at the end
SHARED_MEMORY = 64 << 20  # bytes of /dev/shm that NCCL may need for each process of a machine


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[torch.device]:
    """Within it this process is one of the run's: `init` before, `shutdown` after.

    When another one dies or stops answering, whatever collective notices raises RankLost, which names it.
    """
    chosen = init(device)
    try:
        yield chosen
    except RuntimeError as error:
        if not _is_of_a_peer(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise RankLost(f"{_lost()}; run the same command to go on from the last checkpoint ({reason})") from error
    finally:
        shutdown()


def init(device: str | None = None) -> torch.device:
    """Joins the process group that torchrun or srun started, if any, and returns this process's device.

    device: "cpu", "cuda", "cuda:1" ...; None takes CUDA when there is one. InputError if it is not there.
    """
    chosen = choose_device(device)
    environment = _rendezvous(os.environ)
    if environment is not None and not dist.is_initialized():
        os.environ.update(environment)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        if chosen.type == "cuda":
            _check_shared_memory(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        _join(backend)
    return chosen


def _join(backend: str) -> None:
    """init_process_group over a store that is kept, for the signs of life."""
    global _heart
    timeout = timedelta(seconds=float(os.environ.get("SSLVIT_COLLECTIVE_SECONDS", TIMEOUT.total_seconds())))
    store, number, size = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=timeout)
    _heart = _Heart(store, number, size)


class _Heart:
    """Each process says in the common store that it lives; asked after a failure, it tells who went silent."""

    def __init__(self, store: dist.Store, number: int, size: int) -> None:
        self.number, self.size = number, size
        self._store = dist.PrefixStore("alive", store.clone() if hasattr(store, "clone") else store)
        self._stopping = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heart")
        self._thread.start()

    def _beat(self) -> None:
        self._store.add(str(self.number), 1)

    def _run(self) -> None:
        while not self._stopping.wait(BEAT_SECONDS):
            try:
                self._beat()
            except RuntimeError:  # the store went with rank 0
                return

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=2 * BEAT_SECONDS)

    def silent(self) -> list[int]:
        """The processes that give no sign of life for a few seconds; rank 0 when the store itself is gone."""
        others = [number for number in range(self.size) if number != self.number]
        try:
            before = {number: self._store.add(str(number), 0) for number in others}
            end = time.monotonic() + SILENT_SECONDS
            while others and time.monotonic() < end:
                time.sleep(BEAT_SECONDS / 4)
                others = [number for number in others if self._store.add(str(number), 0) == before[number]]
        except RuntimeError:
            return [0]
        return others


_heart: _Heart | None = None


def _is_of_a_peer(error: RuntimeError) -> bool:
    """Whether an error of a collective means that another process is gone; gloo says so in words alone."""
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
    return dist.is_initialized() and (isinstance(error, dist.DistError) or any(word in str(error) for word in words))


def _lost() -> str:
    silent = [] if _heart is None else _heart.silent()
    if not silent:
        return f"another of the {world_size()} processes ended with an error of its own"
    names = " and ".join(str(number) for number in silent)
    return f"process {names} of {world_size()} (counted from 0) is gone or does not answer"


def _check_shared_memory(processes: int) -> None:
    """Processes of one machine talk through /dev/shm (NCCL); a container's 64 MiB may end them without words."""
    place = Path("/dev/shm")
    needed = SHARED_MEMORY * processes
    if processes > 1 and place.is_dir() and (free := shutil.disk_usage(place).free) < needed:
        log.warning(
            "/dev/shm has %d MiB free, %d processes may need %d: start the container with --shm-size=%dm or --ipc=host",
            *(free >> 20, processes, needed >> 20, needed >> 20),
        )


def native_bf16(device: torch.device | str) -> bool:
    """Whether the device computes bf16 itself; where it is emulated, fp32 is faster."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compiles(device: torch.device | str) -> bool:
    """Whether torch.compile has what it needs for the device, and pays there: CUDA, with Triton and a C compiler."""
    if torch.device(device).type != "cuda":
        return False
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and importlib.util.find_spec("triton") is not None


def copied_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`. To a GPU it goes from pinned memory, in turn with the kernels, and nobody waits for it."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    global _heart
    if _heart is not None:
        _heart.stop()
        _heart = None
    if dist.is_initialized():
        dist.destroy_process_group()
        _settle()


def _settle() -> None:
    """Waits until gloo's threads have let go of the last collective's tensors.

    They need the interpreter for that. A mesh (FSDP2) keeps the group and its threads beyond destroy_process_group; one
    that comes too late, while the interpreter ends, aborts the process, and a scheduler calls a finished run failed.
    """
    end = time.monotonic() + SETTLE_SECONDS
    time.sleep(0.05)  # a thread that waits for the interpreter has it now
    while _busy_workers() and time.monotonic() < end:
        time.sleep(0.05)


def _busy_workers() -> int:
    """How many of gloo's threads have work and no processor; 0 where the system does not tell."""
    busy = 0
    for task in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it ended
            name, _, rest = task.read_text().partition("(")[2].rpartition(")")
            busy += name == "pt_gloo_runloop" and rest.split()[0] == "R"
    return busy


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
    counts = torch.zeros(world_size(), dtype=torch.int64)  # on the CPU: no GPU waits for it
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


# ---- weights that are shared out (FSDP2) ----------------------------------------------------------------------------


def shard(module: nn.Module, bf16: bool) -> None:
    """Shares out weights, gradients and whatever the optimizer keeps of them over all processes; before the optimizer.

    One group (torch's fully_shard): the whole module is gathered when its forward begins and let go after its backward,
    in bfloat16 where the device has autocast for every layer (CUDA); gradients are reduced in fp32. The few gigabytes
    that a gathered ViT-g takes are worth the simplicity: the code may touch any weight. No-op in a single process.
    """
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = next(module.parameters()).device.type
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 and kind == "cuda" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    fully_shard(module, mesh=init_device_mesh(kind, (world_size(),)), mp_policy=policy)


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within it the module's weights are there in full, for an evaluation; one that is not shared stays as it is."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def unsharded(tensor: Tensor) -> Tensor:
    """The part of a shared tensor that this process holds, as a plain one; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a shared tensor, on every process that calls (all must); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copied_to_main(tensor: Tensor) -> Tensor | None:
    """A whole copy in the main process's host memory, None elsewhere; of a shared tensor, when all processes call.

    One that is shared is whole on every device until this returns: no longer than its copy takes.
    """
    gathered = full(tensor.detach())
    return gathered.to("cpu", copy=True) if is_main() else None


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A copy of a whole tensor on `other`'s device, shared out as `other` is where the shapes agree."""
    if isinstance(other, DTensor) and tensor.shape == other.shape:
        placed = tensor.to(other.device)
        return distribute_tensor(placed, other.device_mesh, other.placements, src_data_rank=None)
    return tensor.to(other.device, copy=True)


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
