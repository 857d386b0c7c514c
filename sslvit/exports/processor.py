"""preprocessor_config.json: the preprocessing as Hugging Face's BitImageProcessor writes it. JSON only."""

from __future__ import annotations

import math
from typing import Any

from sslvit.encoder.config import Preprocessing

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def image_processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """Resize the shorter side, crop the centre, scale to 0..1, normalise per channel.

    That processor knows no "until it covers a rectangle": an image for one that is no square is resized to it.
    """
    height, width = preprocessing.size
    resized = {name: math.floor(side / preprocessing.crop_pct) for name, side in (("height", height), ("width", width))}
    return {
        # transformers 4 has two, and only the one called fast reads grey pictures; version 5 takes either name
        "image_processor_type": "BitImageProcessorFast" if preprocessing.channels == 1 else "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": resized["height"]} if height == width else resized,
        "resample": RESAMPLE[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_pct": preprocessing.crop_pct,  # for our own loader: the share that rounding of the edge above loses
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "do_convert_rgb": preprocessing.channels == 3,
        **({"value_range": preprocessing.value_range} if preprocessing.value_range else {}),  # for our own loader
    }
