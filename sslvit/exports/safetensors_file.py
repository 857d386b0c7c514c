"""The encoder as one .safetensors file under timm's key names; architecture and preprocessing stand in its header."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from sslvit.encoder.weights import METADATA_KEY, WEIGHTS_FILE, LoadedEncoder
from sslvit.exports.files import write_tensors


def check_safetensors(loaded: LoadedEncoder) -> None:
    """Every encoder can be written."""


def write_safetensors(loaded: LoadedEncoder, folder: Path) -> None:
    """Write `folder/encoder.safetensors`; `load_encoder` opens it without being told anything else."""
    facts = {
        "architecture": asdict(loaded.architecture),
        "preprocessing": asdict(loaded.preprocessing),
        "license": loaded.license,
    }
    write_tensors(folder / WEIGHTS_FILE, loaded.module.state_dict(), {METADATA_KEY: json.dumps(facts)})
