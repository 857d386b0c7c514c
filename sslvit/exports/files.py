"""The two kinds of file an export is made of: JSON and safetensors, both without dates, hosts or pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, keys in the given order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Floating tensors as fp32, each with memory of its own, to a .safetensors file."""
    own = {name: _plain(tensor) for name, tensor in tensors.items()}
    save_file(own, str(path), metadata={"format": "pt", **(metadata or {})})


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.clone(memory_format=torch.contiguous_format)
