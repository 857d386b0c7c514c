"""The encoder as the image tower of an open_clip model, for contrastive training or LiT (arXiv:2111.07991).

`open_clip.create_model("local-dir:FOLDER", pretrained_image=True)`: our tower with its weights, a new text tower.
open_clip passes no arguments on to timm, so the tower is named by the absolute path of the timm folder inside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sslvit.encoder.weights import LoadedEncoder
from sslvit.errors import InputError
from sslvit.exports.files import write_json
from sslvit.exports.timm_folder import write_timm_folder

CONFIG, TOWER = "open_clip_config.json", "tower"
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}  # open_clip's defaults


def check_open_clip(loaded: LoadedEncoder) -> None:
    """InputError with the reason when open_clip cannot use the encoder as it is."""
    if (count := loaded.preprocessing.channels) != 3:
        expects = "grey images" if count == 1 else f"{count} channels"
        raise InputError(f"open_clip reads RGB images, and the encoder expects {expects}")


def write_open_clip_folder(loaded: LoadedEncoder, folder: Path) -> None:
    """Fill `folder` (existing, empty)."""
    check_open_clip(loaded)
    (folder / TOWER).mkdir()
    write_timm_folder(loaded, folder / TOWER)
    write_json(folder / CONFIG, open_clip_config(loaded, folder / TOWER))


def point_to_tower(folder: Path, place: Path) -> None:
    """Name the tower by where it will lie once `folder` is moved to `place`."""
    config = json.loads((folder / CONFIG).read_text())
    write_json(folder / CONFIG, with_tower(config, f"local-dir:{(place / TOWER).resolve()}"))


def with_tower(config: dict[str, Any], name: str) -> dict[str, Any]:
    """`config` with the tower named `name`, which timm opens."""
    model = config["model_cfg"]
    return config | {"model_cfg": model | {"vision_cfg": model["vision_cfg"] | {"timm_model_name": name}}}


def open_clip_config(loaded: LoadedEncoder, tower: Path) -> dict[str, Any]:
    """Features pass through unprojected (`timm_proj: none`), pooled as timm pools them."""
    preprocessing = loaded.preprocessing
    height, width = preprocessing.size
    return {
        "model_cfg": {
            "embed_dim": loaded.module.num_features,
            "vision_cfg": {
                "image_size": height if height == width else [height, width],
                "timm_model_name": f"local-dir:{tower.resolve()}",
                "timm_model_pretrained": True,
                "timm_pool": loaded.module.global_pool,
                "timm_proj": "none",
            },
            "text_cfg": TEXT,
        },
        "preprocess_cfg": {
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": "bilinear" if preprocessing.interpolation == "bilinear" else "bicubic",
            "resize_mode": "shortest",
        },
    }
