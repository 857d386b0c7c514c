"""On a CPU the memory that a step frees stays with the process, for the next step.

glibc gives a large free block back to the system at once, and the next step gets it again page by page: some 60,000
page faults in a step of a ViT-S, a seventh of its time (benchmarks/LOG.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

import torch

__all__ = ["kept"]

# Parameters of mallopt(3).
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}  # everything from the heap, and the heap never shrinks
GIVE_BACK = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}  # where glibc's own rule ends


_depth = 0  # how many `kept` are open


@contextlib.contextmanager
def kept(device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, freed memory is kept, if work is done on the CPU and the C library is glibc; then it is given back.

    One within another changes nothing.
    """
    global _depth
    library = _glibc() if torch.device(device).type == "cpu" else None
    if library is None:
        yield
        return
    _depth += 1
    _set(library, KEEP)
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _set(library, GIVE_BACK)
            library.malloc_trim(0)


def _set(library: ctypes.CDLL, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        library.mallopt(parameter, value)


def _glibc() -> ctypes.CDLL | None:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
