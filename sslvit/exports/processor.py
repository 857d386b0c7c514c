"""preprocessor_config.json: the preprocessing as Hugging Face's BitImageProcessor writes it. JSON only."""

from __future__ import annotations

import math
from typing import Any

from sslvit.encoder.config import Preprocessing

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def image_processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """Resize the shorter side, crop the centre, scale to 0..1, normalise per channel."""
    size = preprocessing.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": math.floor(size / preprocessing.crop_pct)},
        "resample": RESAMPLE[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_pct": preprocessing.crop_pct,  # for our own loader: the share that rounding of the edge above loses
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "do_convert_rgb": preprocessing.channels == 3,
    }
