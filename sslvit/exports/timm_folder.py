"""The encoder as a timm folder, `timm.create_model("local-dir:FOLDER")`, that Hugging Face's AutoModel opens too.

config.json, model.safetensors and preprocessor_config.json. Any timm ViT or RoPE encoder, any number of channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sslvit.encoder.weights import LoadedEncoder
from sslvit.exports.files import write_json, write_tensors
from sslvit.exports.processor import image_processor_config


def write_timm_folder(loaded: LoadedEncoder, folder: Path) -> None:
    """Fill `folder` (existing, empty)."""
    write_json(folder / "config.json", timm_config(loaded))
    write_json(folder / "preprocessor_config.json", image_processor_config(loaded.preprocessing))
    write_tensors(folder / "model.safetensors", loaded.module.state_dict())


def check_timm(loaded: LoadedEncoder) -> None:
    """Every encoder we run is a timm model, so none is refused."""


def timm_config(loaded: LoadedEncoder) -> dict[str, Any]:
    """What timm needs to build the module again.

    `num_classes` stands at the top only: inside `model_args` transformers would pass it twice and fail.
    """
    module, preprocessing = loaded.module, loaded.preprocessing
    args = {key: value for key, value in loaded.architecture.args.items() if value is not None and key != "num_classes"}
    return {
        "architecture": loaded.architecture.name,
        "num_classes": 0,
        "num_features": module.num_features,
        "global_pool": module.global_pool,
        "model_args": args,
        "pretrained_cfg": {
            "tag": "sslvit",
            "custom_load": False,
            "input_size": [preprocessing.channels, *preprocessing.size],
            "fixed_input_size": False,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": 0,
            "pool_size": None,
            # timm 1.0.20 takes named weights for RGB ones and adapts them once more
            "first_conv": "patch_embed.proj" if preprocessing.channels == 3 else None,
            "classifier": "head",
            **({"license": loaded.license} if loaded.license else {}),
        },
    }
