"""Settings of evaluation. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from sslvit.errors import InputError

PROTOCOLS = (
    "knn",
    "linear",
    "linear_dino",
    "linear_mae",
    "logreg",
    "attentive",
    "fewshot",
    "retrieval",
    "cluster",
    "segmentation",
    "health",
)
CONTROLS = ("random_init", "pixels")


@dataclass
class KnnMonitorConfig:
    """k-NN on clean images while pretraining. Without `train` and `val` the labels of `data` and `val_data` serve.

    A run that stops when k-NN falls (`max_drop`) holds images of its train set out where no labelled set is given.
    """

    every: int | None = None  # steps; auto: ten times a run, or as often as 3% of its time allows; 0: never
    train: str | None = None  # data specs
    val: str | None = None
    num_images: int | None = None  # at most this many of each; auto: 5000, or as many as 3% of the time allow
    max_drop: float | None = None  # a run whose k-NN falls this far below its start stops; auto: .02 with init, else 1


@dataclass
class EvaluateConfig:
    """`sslvit evaluate`: judge an encoder on labelled images."""

    encoder: str | None = None
    train_dataset: str | None = None
    val_dataset: str | None = None
    protocol: list[str] = field(default_factory=lambda: ["knn", "linear"])
    controls: list[str] = field(default_factory=lambda: ["random_init", "pixels"])
    label_file: str | None = None  # CSV of image names and labels, for sets without labels of their own
    image_size: int | None = None  # auto: what the encoder states
    crop_pct: float | None = None  # share of the resized shorter side that is kept; auto: what the encoder states
    batch_size: int = 256
    seed: int = 0
    device: str | None = None
    precision: str | None = None  # bf16 | fp32; auto: bf16 where the device computes it natively
    num_workers: int | None = None
    overwrite: bool = False
    augment: bool = False  # linear: re-run the encoder on random crops, as the published protocols do
    num_images: int | None = None  # at most this many of each set
    linear_steps: int = 12500  # DINOv2's 10 x 1250
    linear_batch_size: int = 128  # DINOv2's on one GPU
    attentive_steps: int = 2500


@dataclass
class EmbedConfig:
    """`sslvit embed`: one feature vector per image."""

    encoder: str | None = None
    data: str | None = None
    output_file: str | None = None  # F.npz or F.parquet
    batch_size: int = 256
    device: str | None = None
    precision: str | None = None  # bf16 | fp32; auto: bf16 where the device computes it natively
    num_workers: int | None = None
    index: bool = False  # also a faiss index beside the file


def check_evaluate(config: EvaluateConfig) -> None:
    """InputError for an unknown protocol or control, and for counts that cannot be."""
    for key, known in (("protocol", PROTOCOLS), ("controls", CONTROLS)):
        for name in getattr(config, key):
            if name not in known:
                raise InputError(f"{key}: {name!r} is unknown; there are {', '.join(known)}")
    if not config.protocol:
        raise InputError(f"protocol is empty; give at least one of {', '.join(PROTOCOLS)}")
    if config.crop_pct is not None and not 0 < config.crop_pct <= 1:
        raise InputError(f"crop_pct is {config.crop_pct:g}; it must be above 0 and at most 1")
    for key in ("linear_steps", "linear_batch_size", "attentive_steps"):
        value = getattr(config, key)
        if value < 1:
            raise InputError(f"{key} is {value}; it must be at least 1")
