"""The doctor: says what is there, and asks where something is missing."""

import collections
import importlib.util
import shutil

import pytest

import sslvit
from sslvit.commands import EXTRAS
from sslvit.verbs import doctor as doctor_module


def test_it_speaks_of_everything():
    said = sslvit.doctor()
    for topic in ("sslvit", "packages", "extras", "processor", "memory", "GPU", "attention", "faiss", "disk", "slurm"):
        assert any(line[2:].startswith(topic) for line in said.splitlines()), topic
    assert "torch 2." in said and "finds neighbours" in said


def test_a_missing_extra_comes_with_its_command(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
    sentences = [sentence for _, sentence in doctor_module._extras()]
    assert any("transformers not installed" in text and "pip install 'sslvit[vlm]'" in text for text in sentences)


def test_a_missing_package_is_asked_for(monkeypatch):
    version = doctor_module._version
    monkeypatch.setattr(doctor_module, "_version", lambda name: None if name == "faiss-cpu" else version(name))
    assert any(text.startswith("! missing: faiss-cpu") for _, text in doctor_module._software())


def test_a_small_shared_memory_and_a_full_disk_are_noticed(monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64 * 2**20, 0, 2**20))
    shared = [text for topic, text in doctor_module._memory() if topic == "/dev/shm"]
    if shared:
        assert shared[0].startswith("! only 64 MiB")
    assert next(text for topic, text in doctor_module._places() if topic == "disk").startswith("! 0.0 GiB free")


def test_a_broken_faiss_is_noticed(monkeypatch):
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(faiss, "knn", lambda *args, **options: 1 / 0)
    assert next(doctor_module._faiss())[1].startswith("! does not work: ZeroDivisionError")


def test_it_counts_what_it_asks_for(monkeypatch):
    monkeypatch.setattr(doctor_module, "_faiss", lambda: iter([("faiss", "! broken")]))
    assert "! faiss      broken" in sslvit.doctor() and "thing(s) above" in sslvit.doctor()


def test_extras_are_those_of_setup_cfg_and_something_uses_them():
    import configparser
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    extras = set(setup["options.extras_require"])
    assert set(EXTRAS.values()) <= extras
    assert extras - set(EXTRAS.values()) == {"serve", "docs", "bench", "dev"}  # nothing of these is imported by sslvit
    files = [*(root / "sslvit").rglob("*.py"), *(root / "benchmarks").glob("*.py")]
    code = "".join(file.read_text() for file in files if file.name != "commands.py")
    for module in EXTRAS:
        assert module in code, f"nothing uses {module}"
