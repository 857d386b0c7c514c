"""What a job will take before it is queued: memory of a GPU, FLOPs, hours, checkpoint size. Imports no torch.

The arithmetic is `objectives/cost.py`; here it meets the GPUs of a launch file, and what cannot fit is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sslvit.config import PretrainConfig, load_config
from sslvit.data.bad_files import BadImage
from sslvit.data.decode import decode
from sslvit.data.sources import open_source
from sslvit.errors import InputError
from sslvit.objectives.cost import Cost, cost
from sslvit.objectives.recipe import DataFacts, resolve

GIB = 1 << 30
#: Dense 16-bit TFLOP/s and GiB of memory, from the vendors' data sheets.
GPUS = {
    "t4": (65, 16),
    "v100": (125, 32),
    "rtx3090": (71, 24),
    "rtx4090": (165, 24),
    "a10": (125, 24),
    "l4": (121, 24),
    "l40s": (362, 48),
    "a100-40gb": (312, 40),
    "a100": (312, 80),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 180),
}
ASSUMED = "a100"
FIXED_GIB = 2.0  # CUDA, NCCL, cuBLAS and what the allocator cannot use
USABLE = 0.95
IMAGENET = DataFacts(1_281_167, 375, 3, "cuda")
NUM_PROBED = 16
HOST_GIB_PER_TASK = 6.0  # Python, torch with CUDA, decoded images


@dataclass(frozen=True)
class Hardware:
    """What a launch file gives: processes that share the work, each with one GPU or none, and host memory."""

    tasks: int
    tasks_per_node: int
    gpu: str | None  # a key of GPUS; None: on CPUs
    gpu_known: bool  # said, not assumed
    utilisation: float  # share of the peak that training reaches
    mem_gb: float | None


@dataclass(frozen=True)
class Estimate:
    """A resolved config on some hardware. `micro` is the images of one forward pass of one process."""

    config: PretrainConfig
    cost: Cost
    hardware: Hardware
    micro: int
    seen: str  # what the data facts rest on

    @property
    def bf16(self) -> bool:
        """Whether matrices are computed in bfloat16."""
        return self.config.precision == "bf16"

    def gib(self, micro: int | None = None) -> float:
        """Memory of one GPU at `micro` images."""
        return self.state_gib + self.activation_gib(micro) + self.fixed_gib

    @property
    def fixed_gib(self) -> float:
        """What CUDA itself takes."""
        return 0.0 if self.hardware.gpu is None else FIXED_GIB

    @property
    def state_gib(self) -> float:
        """Weights, gradients, moments, teacher."""
        shards = self.hardware.tasks if self.config.sharded else 1
        return self.cost.state_bytes(self.bf16, shards) / GIB

    def activation_gib(self, micro: int | None = None) -> float:
        """What the backward pass waits for, and the pixels."""
        images = self.micro if micro is None else micro
        return images * (self.cost.activation_bytes_per_image + self.cost.crop_bytes_per_image) / GIB

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.cost.flops_per_image * _required(self.config.batch_size) * _required(self.config.steps)

    @property
    def hours(self) -> float | None:
        """At the stated share of the peak; None on CPUs, whose peak is not known here."""
        if self.hardware.gpu is None:
            return None
        peak = GPUS[self.hardware.gpu][0] * 1e12 * (1.0 if self.bf16 else 0.125)
        return self.flops / (peak * self.hardware.utilisation * self.hardware.tasks) / 3600


def estimate(arguments: Mapping[str, Any], hardware: Hardware) -> Estimate | None:
    """The plan of a checked `pretrain` command, by its arguments; None where the encoder's sizes are not known."""
    keys = {key: value for key, value in arguments.items() if key not in ("config_file", "output_dir")}
    config = load_config(PretrainConfig, arguments.get("config_file"), keys, default="pretrain/auto")
    facts, seen = _look(str(config.data), config.encoder.in_chans, "cpu" if hardware.gpu is None else "cuda")
    config, _ = resolve(config, facts)
    found = cost(config)
    if found is None:
        return None
    batch, share = _required(config.batch_size), hardware.tasks * config.accumulate
    if batch % share:
        raise InputError(
            f"batch_size={batch} is not divisible by {hardware.tasks} processes x accumulate={config.accumulate}; "
            f"take batch_size={math.ceil(batch / share) * share}"
        )
    return Estimate(config, found, hardware, batch // share, seen)


def _look(spec: str, channels: int | None, device: str) -> tuple[DataFacts, str]:
    """The data as seen from here; ImageNet's numbers where they cannot be seen."""
    try:
        source = open_source(spec)
    except (InputError, OSError, ImportError):
        return DataFacts(
            IMAGENET.num_images, IMAGENET.side, channels or 3, device
        ), "data not seen from here: ImageNet's"
    sides, counts = [], []
    for index in range(0, len(source), max(1, len(source) // NUM_PROBED)):
        try:
            image = decode(source.read(index), channels=None)
        except (BadImage, OSError):
            continue
        sides.append(min(image.shape[:2]))
        counts.append(image.shape[2])
    if not sides:
        raise InputError(f"{spec}: none of the images looked at can be read; run check-data")
    middle = sorted(sides)[len(sides) // 2]
    kind = channels or max(set(counts), key=counts.count)
    return DataFacts(len(source), middle, kind, device), f"{len(source):,} images, about {middle} px"


def describe_plan(plan: Estimate) -> str:
    """The plan in a few lines."""
    config, found, hardware = plan.config, plan.cost, plan.hardware
    height, width = config.encoder.size
    sides = f"{height}" if width == height else f"{height} x {width}"
    image = f"{config.encoder.name} at {sides} px, patch {config.encoder.patch_size}"
    distilled = f", {found.frozen / 1e6:,.1f} M distilled" if found.frozen else ""
    lines = [
        f"# plan: {image}, batch {config.batch_size} x {config.steps:,} steps ({plan.seen})",
        f"#   parameters   {found.encoder / 1e6:,.1f} M encoder, {found.student / 1e6:,.1f} M trained, "
        f"{found.teacher / 1e6:,.1f} M teacher" + distilled,
        f"#   memory       {plan.gib():.1f} GiB a process: {plan.state_gib:.2f} weights, gradients, moments, teacher; "
        f"{plan.activation_gib():.2f} activations of {plan.micro} images ({config.precision}); "
        f"{plan.fixed_gib:.1f} CUDA",
        f"#   compute      {found.flops_per_image / 1e9:,.1f} GFLOP an image, {plan.flops:.2e} FLOP in all",
    ]
    if plan.hours is not None:
        peak, memory = GPUS[str(hardware.gpu)]
        known = "" if hardware.gpu_known else ", assumed: say gpu: in the launch file"
        lines.append(
            f"#   time         {_hours(plan.hours)} on {hardware.tasks} x {hardware.gpu} ({peak} TFLOP/s, {memory} GiB"
            f"{known}) at {hardware.utilisation:.0%} of the peak, if the data keep up"
        )
    lines.append(
        f"#   checkpoint   {found.checkpoint_bytes / GIB:.2f} GiB; {config.checkpoint.keep} are kept, "
        f"best and last good may come on top"
    )
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.0f} min"


def refuse_what_cannot_fit(plan: Estimate) -> None:
    """InputError when a GPU or a node has less memory than the plan needs; the remedy is computed."""
    hardware = plan.hardware
    if hardware.gpu is not None:
        _refuse_gpu(plan, GPUS[hardware.gpu][1])
    needed = hardware.tasks_per_node * HOST_GIB_PER_TASK + plan.cost.checkpoint_bytes / GIB
    if hardware.mem_gb is not None and hardware.gpu is not None and needed > hardware.mem_gb:
        raise InputError(
            f"mem_gb is {hardware.mem_gb:g}, but {hardware.tasks_per_node} tasks and the copy of a checkpoint that is "
            f"being written need about {needed:.0f}; set mem_gb: {math.ceil(needed)}"
        )


def _refuse_gpu(plan: Estimate, memory: float) -> None:
    room = USABLE * memory
    if not plan.hardware.gpu_known or plan.gib() <= room:
        return
    need = f"{plan.gib():.1f} GiB a process on {plan.hardware.gpu}, which has {room:.1f} to use"
    accumulate = plan.config.accumulate
    fitting = [n for n in range(2, plan.micro + 1) if plan.micro % n == 0 and plan.gib(plan.micro // n) <= room]
    if fitting:
        raise InputError(f"this needs about {need}; add accumulate={accumulate * fitting[0]}, or take more GPUs")
    raise InputError(
        f"this needs about {need}, {plan.state_gib:.1f} of it without a single image; "
        "take a smaller encoder.name, or a GPU with more memory"
    )


def gpu_named(text: str | None) -> str | None:
    """The key of GPUS that a text such as a constraint names: `h100`, `a100-80gb`, `gpu_a100_40gb`; else None."""
    if not text:
        return None
    words = re.sub(r"[^a-z0-9]+", "-", text.lower())
    found = [name for name in GPUS if re.search(rf"(^|[^a-z0-9]){name}($|[^a-z0-9])", words)]
    return max(found, key=len, default=None)


def _required(value: int | None) -> int:
    assert value is not None
    return value
