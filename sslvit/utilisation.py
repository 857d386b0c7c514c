"""How fast a device could compute, and the share of it that a model's own arithmetic takes (MFU).

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B): FLOPs a second that the model needs over those the device
can do. What is computed twice (gradient checkpointing) and what is no matrix product does not count as needed.
"""

from __future__ import annotations

import functools
import re
import time

import torch

__all__ = ["peak_flops"]

#: Dense bf16 FLOPs a second by NVIDIA's data sheets, in TFLOP/s; the first whose words are in a device's name counts.
BF16_TFLOPS = {
    "B300": 2250,
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "A30": 165,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "4090": 165,
    "3090": 71,
}
_SIDES = {"cpu": 1024, "cuda": 8192}  # of the product that is timed: large enough to be limited by arithmetic
_SECONDS = 0.2


@functools.cache
def peak_flops(device: str, precision: str) -> float:
    """FLOPs a second of `device` ("cpu", "cuda:0") in "bf16" or "fp32".

    A data sheet's number for a GPU that is known in bf16; else what a large matrix product reaches, best of 0.2 s.
    """
    if device.startswith("cuda") and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        known = next((tera for words, tera in BF16_TFLOPS.items() if re.search(rf"\b{words}\b", name)), None)
        if known is not None:
            return known * 1e12
    return _measured_flops(torch.device(device), torch.bfloat16 if precision == "bf16" else torch.float32)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDES.get(device.type, 1024)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    matrix @ matrix
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        fastest = min(fastest, _seconds_of_product(matrix))
    return 2 * side**3 / fastest


def _seconds_of_product(matrix: torch.Tensor) -> float:
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    began = time.perf_counter()
    matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - began
