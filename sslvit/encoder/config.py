"""Settings of the encoder (timm's VisionTransformer) and the preprocessing it expects. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class EncoderConfig:
    """Which ViT to build. `None` is auto: as `init` has it, else resolved from the data, and printed with the reason.

    With a class token (the default) the encoder is exactly HF `dinov2_with_registers`; with
    `class_token=false num_registers=0` it uses tanh GELU and has an exact SigLIP twin.
    """

    name: str | None = None  # timm name, e.g. vit_small_patch16_224
    patch_size: int | None = None
    image_size: int | None = None  # pixels; side (height) of a global crop and of the position grid
    class_token: bool | None = None  # auto: true
    num_registers: int | None = None  # auto: 4 with a class token, 0 without
    in_chans: int | None = None
    embed_dim: int | None = None  # embed_dim, depth, num_heads: auto = what the timm name says
    depth: int | None = None
    num_heads: int | None = None
    init_values: float | None = None  # LayerScale at the start, 0: none; auto: 1e-5 (DINOv2), 0.1 for short runs
    weight_init: str | None = None  # xavier (MAE) or trunc_normal (DINO); auto: xavier with mae and for short runs
    drop_path_rate: float = 0.0
    image_width: int | None = None  # pixels, where it is not image_size
    act_layer: str | None = None  # gelu | gelu_tanh | quick_gelu; auto: gelu, gelu_tanh without class token

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a global crop in pixels."""
        assert self.image_size is not None, "resolve the config first"
        return self.image_size, self.image_width or self.image_size


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder wants to see: resized in proportion until it covers size / crop_pct, centre crop, normalise.

    mean and std are per channel on the 0..1 scale; image_size, and image_width where it differs, are in pixels.
    value_range is what becomes 0 and 1 of pixels deeper than 8 bits: (lows, highs), per channel; None: see decode.py.
    """

    image_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    image_width: int | None = None
    value_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size, self.image_width or self.image_size

    @property
    def channels(self) -> int:
        """How many channels an image has."""
        return len(self.mean)
