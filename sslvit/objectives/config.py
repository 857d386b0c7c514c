"""Settings of the objectives. A section that is present is switched on. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DinoConfig:
    """Self-distillation of the class token (DINO, arXiv:2104.14294, algorithm 1). `None` is auto."""

    weight: float | None = None  # auto: 1; small beside MAE on a small budget
    num_prototypes: int | None = None
    head_hidden_dim: int | None = None  # auto: DINO's 2048 and 256, a quarter and a half of them on a small budget
    head_bottleneck_dim: int | None = None
    student_temperature: float = 0.1
    teacher_temperature: float | None = None
    teacher_temperature_start: float | None = None
    teacher_temperature_warmup: float = 0.3  # share of the run
    centering: str = "softmax"  # softmax (DINO) | sinkhorn (SwAV, DINOv2)
    center_momentum: float | None = None  # auto: DINO's .9, less in runs below 660 steps
    freeze_last_layer: float = 0.01  # share of the run during which the prototypes stand still
    num_teacher_views: int | None = None  # how many of the global views the teacher sees; auto: 2, 1 if masked
    # Below 1 the student sees only this share of each global view's patches (MSN); auto: 1, or MAE's share on a small
    # budget, so that one student pass serves both.
    student_visible_ratio: float | None = None


@dataclass
class IbotConfig:
    """Self-distillation of masked patches (iBOT, arXiv:2111.07832). `None` is auto."""

    weight: float = 1.0
    shared_head: bool = False  # patches go through DINO's heads, as in the published iBOT and DINOv2's short recipe
    num_prototypes: int | None = None
    head_hidden_dim: int | None = None
    head_bottleneck_dim: int | None = None
    student_temperature: float = 0.1
    teacher_temperature: float | None = None
    teacher_temperature_start: float | None = None
    teacher_temperature_warmup: float = 0.3
    centering: str = "softmax"
    center_momentum: float | None = None  # auto: DINO's .9, less in runs below 660 steps
    mask_prob: float = 0.5  # share of images that are masked
    mask_ratio_min: float = 0.1
    mask_ratio_max: float = 0.5


@dataclass
class KoleoConfig:
    """Spread of class tokens by the Kozachenko-Leonenko entropy (arXiv:1806.03198; DINOv2, section 4)."""

    weight: float = 0.1  # of the mean over the global views; DINOv2's code weighs their sum


@dataclass
class MaeConfig:
    """Reconstruction of masked patches (MAE, arXiv:2111.06377). `None` is auto."""

    weight: float = 1.0
    mask_ratio: float = 0.75
    num_views: int = 1  # how many global crops are reconstructed
    decoder_dim: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    norm_pixels: bool = True
