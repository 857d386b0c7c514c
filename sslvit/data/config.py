"""Settings of crops and photometry. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CropsConfig:
    """Random resized crops (DINO, arXiv:2104.14294, section 3.1). Scales are shares of the image area.

    The side of a global crop is `encoder.image_size` (by `encoder.image_width`). `None` is auto.
    """

    num_global: int = 2
    global_scale: list[float] | None = None  # auto: (.4, 1) with local crops, (.2, 1) without
    num_local: int | None = None
    local_size: int | None = None  # pixels
    local_width: int | None = None  # pixels, where it is not local_size; auto: as much of image_width
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.4])
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])  # width to height, beside that of the view
    horizontal_flip_prob: float = 0.5

    @property
    def local_shape(self) -> tuple[int, int]:
        """(height, width) of a local crop in pixels; (0, 0) where there are none."""
        side = self.local_size or 0
        return side, self.local_width or side


@dataclass
class PhotometryConfig:
    """Colour operations in DINO's order and strengths; lists over global crops run first, second, (further).

    Images that are not RGB get what means something for them: brightness, contrast and blur.
    """

    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_prob: float = 0.2
    global_blur_prob: list[float] = field(default_factory=lambda: [1.0, 0.1])
    local_blur_prob: float = 0.5
    global_solarize_prob: list[float] = field(default_factory=lambda: [0.0, 0.2])
