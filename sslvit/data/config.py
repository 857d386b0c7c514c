"""Settings of crops and photometry. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CropsConfig:
    """Random resized crops (DINO, arXiv:2104.14294, section 3.1). Scales are shares of the image area.

    The side of a global crop is `encoder.image_size` (by `encoder.image_width`). `None` is auto.
    """

    num_global: int | None = None  # auto: 2; for MAE alone as many as it reconstructs
    global_scale: list[float] | None = None  # auto: (.4, 1) with local crops, (.2, 1) for MAE alone
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
    """Colour operations in DINO's order; lists over global crops run first, second, (further).

    Images that are not RGB get what means something for them: brightness, contrast and blur. `None` is auto: DINO's
    strengths where views are compared (DINO, iBOT), nothing for MAE alone.
    """

    jitter_prob: float | None = None
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    grayscale_prob: float | None = None
    global_blur_prob: list[float] | None = None
    local_blur_prob: float | None = None
    global_solarize_prob: list[float] | None = None


#: DINO's (arXiv:2104.14294, section 3.1), which are BYOL's.
DINO_PHOTOMETRY = PhotometryConfig(0.8, 0.4, 0.4, 0.2, 0.1, 0.2, [1.0, 0.1], 0.5, [0.0, 0.2])
#: MAE's (arXiv:2111.06377, section 4 and table 1e): crops and flips, colours as they are.
NO_PHOTOMETRY = PhotometryConfig(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, [0.0], 0.0, [0.0])
