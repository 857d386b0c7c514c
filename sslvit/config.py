"""The configuration of each verb: dataclasses <- YAML <- `key=value`. Imports no torch.

Each room keeps its own dataclasses in its `config.py`; here they are composed and loaded. `None` (in YAML: `auto`)
is resolved from the data before the run starts and printed with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sslvit.data.config import CropsConfig, PhotometryConfig
from sslvit.encoder.config import EncoderConfig
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig
from sslvit.probes.config import EvaluateConfig, KnnMonitorConfig
from sslvit.vlm.config import LanguageConfig, LoraConfig, StageConfig

__all__ = ["AlignConfig", "CheckpointConfig", "EvaluateConfig", "OptimConfig", "PretrainConfig"]


@dataclass
class CheckpointConfig:
    """When to save, in steps, and how many to keep. Never changes results."""

    every: int | None = None  # auto: ten times a run
    keep: int = 2


@dataclass
class OptimConfig:
    """AdamW with cosine schedules. No weight decay on biases, norms, tokens and positions."""

    lr: float | None = None  # peak; auto: the published rule from the global batch size
    min_lr: float = 1e-6
    warmup: float = 0.1  # share of the run
    weight_decay: float = 0.04
    weight_decay_end: float | None = None  # cosine from weight_decay; None: constant
    beta1: float = 0.9
    beta2: float | None = None  # auto: .95 for MAE alone, else .999
    clip_norm: float = 3.0  # global norm; 0: off
    layer_decay: float = 1.0
    momentum: float | None = None  # the teacher's at the start; auto: from the half-life in images
    momentum_end: float = 1.0


@dataclass
class PretrainConfig:
    """`sslvit pretrain`: images to encoder."""

    data: str | None = None
    val_data: str | None = None
    steps: int | None = None
    batch_size: int | None = None  # global
    accumulate: int = 1  # micro-batches per step
    seed: int = 0
    init: str | None = None  # an encoder E to start from; None: random
    device: str | None = None
    precision: str | None = None  # bf16 | fp32
    num_workers: int | None = None
    overwrite: bool = False
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    photometry: PhotometryConfig = field(default_factory=PhotometryConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    dino: DinoConfig | None = None
    ibot: IbotConfig | None = None
    koleo: KoleoConfig | None = None
    mae: MaeConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    knn: KnnMonitorConfig = field(default_factory=KnnMonitorConfig)


@dataclass
class AlignConfig:
    """`sslvit align`: an encoder and pairs to a vision-language model, in the stages text, connector, instruct."""

    encoder: str | None = None
    data: str | None = None
    val_data: str | None = None
    val_fraction: float = 0.1  # by image, when val_data is not given
    lm: str | None = None  # a local or hub HF causal model; None: the bundled one
    language: LanguageConfig = field(default_factory=LanguageConfig)
    lora: LoraConfig | None = None
    text: StageConfig = field(default_factory=lambda: StageConfig(lm_lr=2e-3))
    connector: StageConfig = field(default_factory=lambda: StageConfig(connector_lr=1e-3))
    instruct: StageConfig = field(default_factory=lambda: StageConfig(connector_lr=1e-3, lm_lr=1e-3))
    controls: list[str] = field(default_factory=lambda: ["blind", "shuffled", "random_encoder"])
    num_val_images: int = 1000  # at most this many are asked about
    steps: int | None = None  # sets every stage
    seed: int = 0
    device: str | None = None
    precision: str | None = None
    num_workers: int | None = None
    overwrite: bool = False
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
