"""Settings of evaluation. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class KnnMonitorConfig:
    """k-NN on clean images while pretraining. Without `train` and `val` the labels of `data` and `val_data` serve."""

    every: int | None = None  # steps; auto: ten times a run; 0: never
    train: str | None = None  # data specs
    val: str | None = None
    num_images: int = 5000  # at most this many of each


@dataclass
class EvaluateConfig:
    """`sslvit evaluate`: judge an encoder on labelled images."""

    encoder: str | None = None
    train_dataset: str | None = None
    val_dataset: str | None = None
    protocol: list[str] = field(default_factory=lambda: ["knn", "linear"])
    controls: list[str] = field(default_factory=lambda: ["random_init", "pixels"])
    image_size: int | None = None  # auto: what the encoder states
    batch_size: int = 256
    seed: int = 0
    device: str | None = None
    precision: str | None = None
    num_workers: int | None = None
    overwrite: bool = False
    augment: bool = False  # linear: re-run the encoder on random crops, as the published protocols do
    num_images: int | None = None  # at most this many of each set
    linear_steps: int = 12500  # DINOv2's 10 x 1250
    linear_batch_size: int = 128
