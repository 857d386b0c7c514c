"""The numbers that an encoder's cost follows from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

#: timm's names: width, depth, heads, width of the MLP.
SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}


@dataclass(frozen=True)
class Size:
    """The numbers of an encoder: widths, depth, patch size and prefix tokens (class token and registers)."""

    dim: int
    depth: int
    hidden: int
    patch: int
    channels: int
    prefix: int
    scaled: bool  # LayerScale

    def patches(self, shape: tuple[int, int]) -> int:
        """How many patches an image of `shape` (height, width) in pixels has."""
        height, width = shape
        return (height // self.patch) * (width // self.patch)


def encoder_parameters(size: Size, shape: tuple[int, int]) -> int:
    """Of an encoder without a head, its positions made for images of `shape` (height, width) in pixels."""
    dim, hidden = size.dim, size.hidden
    block = 4 * dim**2 + 4 * dim + 2 * dim * hidden + hidden + dim + 4 * dim + (2 * dim if size.scaled else 0)
    embed = size.patch**2 * size.channels * dim + dim + size.patches(shape) * dim + size.prefix * dim
    return embed + size.depth * block + 2 * dim
