"""The second form of our encoder (no class token, no registers) as its exact SigLIP twin, the vision form every serving
stack takes. LayerScale is multiplied into the linear maps before it, since SigLIP (arXiv:2303.15343) has none.
"""

from __future__ import annotations

from pathlib import Path

from sslvit.encoder.weights import LoadedEncoder
from sslvit.errors import InputError
from sslvit.exports.hf_folder import hf_class, write_hf_folder


def check_siglip(loaded: LoadedEncoder) -> None:
    """InputError with the reason when the encoder has no exact SigLIP twin."""
    encoder = loaded.module
    if encoder.cls_token is not None or encoder.reg_token is not None:
        raise InputError(
            "SigLIP has no class token and no registers; pretrain with encoder.class_token=false, or export hf"
        )
    hf_class(encoder)


def write_siglip_folder(loaded: LoadedEncoder, folder: Path) -> None:
    """Fill `folder` (existing, empty)."""
    check_siglip(loaded)
    write_hf_folder(loaded, folder, "siglip_vision_model")
