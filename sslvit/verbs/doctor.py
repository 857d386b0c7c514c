"""`sslvit doctor`: what this machine can do, in words. Looks and measures for a second or two; changes nothing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from sslvit.commands import EXTRAS

CORE = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "omegaconf",
    "submitit",
    "faiss-cpu",
    "xformers",
    "safetensors",
    "pillow",
    "pyarrow",
    "simplejpeg",
)
GIB = 1024**3
Finding = tuple[str, str]  # topic, sentence; a sentence that asks for something begins with "! "


def doctor() -> str:
    """The findings, a paragraph per topic; lines marked `!` ask for something."""
    findings = [*_software(), *_extras(), *_processor(), *_memory(), *_devices(), *_attention(), *_faiss(), *_places()]
    lines = []
    for topic, sentence in findings:
        mark, text = ("!", sentence[2:]) if sentence.startswith("! ") else (" ", sentence)
        lines.append(f"{mark} {topic:<10} {text}")
    asks = sum(line.startswith("!") for line in lines)
    lines.append(f"\n{asks} thing(s) above, marked !, could be better." if asks else "\nNothing to complain about.")
    return "\n".join(lines)


def _software() -> Iterator[Finding]:
    yield "sslvit", f"{_version('sslvit')} on Python {platform.python_version()}, {platform.platform()}"
    found = {name: _version(name) for name in CORE}
    yield "packages", ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = [name for name, version in found.items() if not version]
    if missing == ["xformers"]:
        yield "packages", "xformers is not installed; nothing needs it"
    elif missing:
        yield "packages", f"! missing: {', '.join(missing)}; pip install sslvit brings them"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> Iterator[Finding]:
    """Which optional parts are there, and how to get the others."""
    for extra in dict.fromkeys(EXTRAS.values()):
        modules = [module for module, of in EXTRAS.items() if of == extra]
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            yield "extras", f"{extra}: {', '.join(missing)} not installed; pip install 'sslvit[{extra}]'"
        else:
            yield "extras", f"{extra}: installed"


def usable_cpus() -> float:
    """Cores this process may use: the affinity mask, and a container's quota when that is less."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    return min(count, int(quota) / int(period)) if quota.isdigit() and period.strip().isdigit() else count


def _processor() -> Iterator[Finding]:
    import torch

    model = next((line.split(":")[1].strip() for line in _cpu_lines("model name")), platform.machine())
    yield "processor", f"{model}, {usable_cpus():g} of {os.cpu_count()} cores usable, {torch.get_num_threads()} threads"
    flags = set(next(iter(_cpu_lines("flags")), "").split())
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    ratio = _bf16_speed()
    known = ", ".join(sets) or "no known vector instructions"
    words = f"{known}; matrix products in bf16 run at {ratio:.1f} x the speed of fp32"
    yield "processor", words if ratio >= 1 else f"{words}, so precision=fp32 is faster on this CPU"


def _cpu_lines(key: str) -> list[str]:
    return [line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith(key)]


def _bf16_speed(size: int = 512) -> float:
    """How much faster a matrix product is in bfloat16 than in float32, best of five."""
    import torch

    def seconds(matrix: torch.Tensor) -> float:
        matrix @ matrix
        times = []
        for _ in range(5):
            began = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - began)
        return min(times)

    matrix = torch.ones(size, size)
    return seconds(matrix) / seconds(matrix.bfloat16())


def _memory() -> Iterator[Finding]:
    facts = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    if "MemTotal" not in facts:
        return
    total, free = (int(facts[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    text = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB available"
    yield "memory", f"{text}; this container may use {int(limit) / GIB:.1f} GiB" if limit.isdigit() else text
    if free < 3 * GIB:
        yield "memory", "! less than 3 GiB available; the demo needs up to 6 GiB"
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        if size < 256 * 1024**2:
            yield (
                "/dev/shm",
                f"! only {size / 2**20:.0f} MiB; libraries that share memory may fail (docker: --shm-size=2g)",
            )
        else:
            yield "/dev/shm", f"{size / GIB:.1f} GiB"


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if torch.version.cuda is None else "the driver shows none"
        yield "GPU", f"none usable ({why}); everything runs on the CPU"
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            yield "GPU", "! nvidia-smi is here, but torch is built without CUDA; install torch's CUDA build"
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no fast bf16: precision=fp32"
        capability = f"compute capability {facts.major}.{facts.minor}"
        yield "GPU", f"cuda:{index} {facts.name}, {facts.total_memory / GIB:.0f} GiB, {capability}, {bf16}"
    yield (
        "GPU",
        f"torch's CUDA is {torch.version.cuda}; NCCL is {'' if torch.distributed.is_nccl_available() else 'not '}there",
    )


def _attention() -> Iterator[Finding]:
    """What `encoder/attention.py` would choose here, asked of itself."""
    import torch

    from sslvit.encoder.attention import EXPLICIT_MAX_TOKENS, prefers_explicit

    if torch.cuda.is_available():
        yield "attention", "torch's fused kernel (SDPA), each crop size its own group"
        return
    query = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    if prefers_explicit(query, query):
        yield (
            "attention",
            f"training in bf16: written out up to {EXPLICIT_MAX_TOKENS} tokens, since the fused backward "
            "pass is slow on CPUs; else torch's fused kernel (SDPA)",
        )
    else:
        yield "attention", "torch's fused kernel (SDPA)"


def _faiss() -> Iterator[Finding]:
    """A search of known answer: a build for another processor fails here and not after an hour."""
    import numpy as np

    try:
        import faiss

        rows = np.eye(4, dtype=np.float32)
        _, found = faiss.knn(rows, rows, 1, metric=faiss.METRIC_INNER_PRODUCT)
    except Exception as error:
        yield "faiss", f"! does not work: {type(error).__name__}: {error}"
        return
    right = found[:, 0].tolist() == [0, 1, 2, 3]
    yield "faiss", f"{faiss.__version__} finds neighbours" if right else "! finds wrong neighbours; reinstall faiss-cpu"


def _places() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / GIB:.1f} GiB free in {Path.cwd()}"
    yield "disk", text if free > 5 * GIB else f"! {text}; runs with their checkpoints may need more"
    if not os.access(Path.cwd(), os.W_OK):
        yield "disk", f"! {Path.cwd()} cannot be written; give --output-dir"
    if shutil.which("sbatch"):
        yield "slurm", "sbatch is here: sslvit submit --launch launch/slurm.yaml ..."
    else:
        yield "slurm", "none here: sslvit submit --launch launch/local.yaml ..."


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
