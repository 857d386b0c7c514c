"""Settings of the alignment with text. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StageConfig:
    """One stage of alignment. Rates are peaks of a cosine with warm-up; 0 freezes that part. `None` is auto."""

    steps: int | None = None
    batch_size: int | None = None  # images
    connector_lr: float = 0.0
    lm_lr: float = 0.0
    encoder_lr: float = 0.0
    weight_decay: float = 0.05
    warmup: float = 0.03  # share of the stage
    clip_norm: float = 1.0
    num_turns: int = 8  # at most this many question-answer pairs per image and step, each blind to the others
    num_captions: int = 2  # so many of them are captions, where an image has both captions and questions


@dataclass
class LanguageConfig:
    """The bundled Llama-layout language model, trained here from scratch on the pairs' own text."""

    vocab_size: int = 2048  # at most; byte-level BPE
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 512
    max_length: int = 512


@dataclass
class LoraConfig:
    """Low-rank adapters on a given language model (peft)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
