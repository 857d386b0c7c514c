"""Shared by all tests: one thread, no network, a private cache, and folders reopened in this process."""

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # `formats.py` makes the encoders that exports are tested on

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    """Indices and features of the tests never touch the user's cache."""
    os.environ["SSLVIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _reopen_here(request, monkeypatch):
    """What an export starts a fresh process for happens in this one, but in tests named `fresh`: seconds for each."""
    if "fresh" in request.node.name:
        return
    for room in ("exports.verify", "vlm.folder"):
        if module := sys.modules.get(f"sslvit.{room}"):
            reopen = module.__name__.rpartition(".")[0] + ".reopen"
            monkeypatch.setattr(module, "_run_process", lambda job, *_, name=reopen: import_module(name).main(job))


def beside(name):
    """The interpreter of the environment `make beside` puts next to .venv, or a skip that says why."""
    python = Path(os.environ.get(f"SSLVIT_{name.upper()}", ROOT / f".venv-{name}" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"requirements/{name}.txt is not installed; make beside")
    return str(python)


@pytest.fixture(scope="session")
def oldest_python():
    """An interpreter with the oldest libraries we support."""
    return beside("oldest")


@pytest.fixture(scope="session")
def downstream_python():
    """An interpreter with what docs/downstream.md uses beyond the extras."""
    return beside("downstream")


@pytest.fixture(scope="session")
def real_data():
    """The folder of real images, or a skip that says why."""
    folder = os.environ.get("SSLVIT_DATA")
    if not folder:
        pytest.skip("SSLVIT_DATA is unset: no real images here")
    return folder
