"""Freed memory stays with the process inside `memory.kept`, and is given back after it. Page faults are the oracle."""

import platform
import resource

import pytest
import torch

from sslvit import memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
MEGABYTES = 96


def faults(steps: int = 4) -> int:
    """Pages that `steps` take from the system: two blocks each, one freed before the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        blocks = [torch.ones(MEGABYTES * 2**18) for _ in range(2)]
        del blocks[0], blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> float:
    """MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


@glibc
def test_steps_take_no_new_pages_inside_and_do_outside():
    pages = MEGABYTES * 2**20 // resource.getpagesize()
    with memory.kept():
        faults(8)  # the first take them
        with memory.kept("cpu"):
            pass
        assert faults() < pages / 4, "one within another gives nothing back"
        held = resident()
    assert resident() < held - MEGABYTES / 2, "given back"
    assert faults() > 2 * pages


def test_nothing_changes_for_a_gpu_or_another_c_library(monkeypatch):
    monkeypatch.setattr(memory, "_set", lambda library, values: pytest.fail("the allocator was told something"))
    with memory.kept("cuda"):
        pass
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    with memory.kept("cpu"):
        pass


@glibc
def test_an_error_inside_gives_back_too(monkeypatch):
    told = []
    monkeypatch.setattr(memory, "_set", lambda library, values: told.append(values))
    with pytest.raises(ValueError), memory.kept():
        raise ValueError
    assert told == [memory.KEEP, memory.GIVE_BACK]
