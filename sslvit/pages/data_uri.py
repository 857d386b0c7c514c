"""Pictures inside the page: pixels to `data:` addresses, small enough that the whole page stays small."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

LOSSLESS_SIDE = 64  # px; below, every pixel counts and costs little


@dataclass(frozen=True)
class Encoding:
    """How pictures are stored: no side above `max_side` px, WebP at `quality` (0..100)."""

    max_side: int
    quality: int


def data_uri(pixels: np.ndarray, encoding: Encoding) -> str:
    """(H, W, 3) uint8 as a `data:image/...;base64,` address."""
    image = Image.fromarray(pixels)
    if max(image.size) > encoding.max_side:
        image.thumbnail((encoding.max_side, encoding.max_side), Image.Resampling.LANCZOS)
    small = max(image.size) <= LOSSLESS_SIDE
    file, kind = io.BytesIO(), "webp" if features.check("webp") else "png"
    if kind == "webp":
        image.save(file, "WEBP", lossless=small, quality=encoding.quality, method=4)
    else:
        image.save(file, "PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
