"""Peaks of devices: the data sheet's where the name is known, else measured by a product of known size."""

import time

import pytest
import torch

from sslvit import utilisation


@pytest.fixture(autouse=True)
def forget():
    utilisation.peak_flops.cache_clear()
    yield
    utilisation.peak_flops.cache_clear()


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_known_gpus_have_their_data_sheets_number(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert utilisation.peak_flops("cuda:0", "bf16") == tera * 1e12


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "NVIDIA RTX A3000 Laptop GPU", "NVIDIA A1000", "Quadro GV100"])
def test_a_longer_number_is_another_device(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(utilisation, "_measured_flops", lambda device, dtype: 1.0)
    assert utilisation.peak_flops("cuda:0", "bf16") == 1.0, "measured, not A40's or A30's"


def test_no_entry_hides_behind_a_shorter_name():
    names = list(utilisation.BF16_TFLOPS)
    for i, name in enumerate(names):
        assert not any(earlier in name and earlier != name for earlier in names[:i]), name


def test_elsewhere_it_is_what_a_product_reaches(monkeypatch):
    monkeypatch.setattr(utilisation, "_SIDES", {"cpu": 64})
    monkeypatch.setattr(utilisation, "_SECONDS", 0.02)
    matrix = torch.ones(64, 64)
    times = []
    for _ in range(200):
        began = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - began)
    assert 0.2 < utilisation.peak_flops("cpu", "fp32") * min(times) / (2 * 64**3) < 5
