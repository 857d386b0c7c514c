"""Shared by all tests: one thread, no network, a private cache."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    """Indices and features of the tests never touch the user's cache."""
    os.environ["SSLVIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data():
    """The folder of real images, or a skip that says why."""
    folder = os.environ.get("SSLVIT_DATA")
    if not folder:
        pytest.skip("SSLVIT_DATA is unset: no real images here")
    return folder
