"""What `auto` means in an alignment: steps, batch sizes, precision, from the pairs and the machine. Trains nothing."""

from __future__ import annotations

from dataclasses import replace

import torch

from sslvit.config import AlignConfig
from sslvit.distributed import native_bf16
from sslvit.errors import InputError
from sslvit.vlm.config import StageConfig

STAGES = ("text", "connector", "instruct")
CONTROLS = ("blind", "shuffled", "random_encoder")
BATCH_SIZE = 64
TEXT_STEPS, CONNECTOR_STEPS = 300, 200
INSTRUCT_EPOCHS, INSTRUCT_STEPS = 5, (500, 20_000)


def resolve(config: AlignConfig, num_images: int) -> tuple[AlignConfig, dict[str, str]]:
    """A config without `auto`, and the reason of each value that was filled in, by its dotted key."""
    reasons: dict[str, str] = {}
    stages: dict[str, StageConfig] = {}
    for name in STAGES:
        stage: StageConfig = getattr(config, name)
        if stage.batch_size is None:
            stage = replace(stage, batch_size=BATCH_SIZE)
            reasons[f"{name}.batch_size"] = "images a step, each with several turns"
        if config.steps is not None:
            stage = replace(stage, steps=config.steps)
            reasons[f"{name}.steps"] = f"steps={config.steps} sets every stage"
        elif stage.steps is None:
            steps, reason = _steps(name, config, stage, num_images)
            stage = replace(stage, steps=steps)
            reasons[f"{name}.steps"] = reason
        stages[name] = stage
    device = config.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reasons["device"] = "what this machine has"
    precision = config.precision
    if precision is None:
        native = native_bf16(device)
        precision = "bf16" if native else "fp32"
        spared = "autocast; losses, softmax and scores stay in fp32"
        reasons["precision"] = spared if native else f"this {device} only emulates bf16"
    resolved = replace(config, **stages, precision=precision, device=device)  # type: ignore[arg-type]
    return resolved, reasons


def _steps(name: str, config: AlignConfig, stage: StageConfig, num_images: int) -> tuple[int, str]:
    assert stage.batch_size
    if name == "text":
        if config.lm is not None:
            return 0, "the given language model has learned to write already"
        return TEXT_STEPS, "enough for the words of small sets; images teach the rest"
    if name == "connector":
        return CONNECTOR_STEPS, "the connector alone settles quickly"
    low, high = INSTRUCT_STEPS
    wanted = INSTRUCT_EPOCHS * num_images // stage.batch_size
    return min(max(wanted, low), high), f"{INSTRUCT_EPOCHS} times through {num_images} images, {low} to {high}"


def check(config: AlignConfig) -> None:
    """InputError for settings that contradict each other, before anything is read; ranges are `check_config`'s."""
    unknown = [name for name in config.controls if name not in CONTROLS]
    if unknown:
        raise InputError(f"controls={unknown[0]}: unknown; known are {', '.join(CONTROLS)}")
    if config.lora is not None and config.lm is None:
        raise InputError("lora: the bundled language model starts from nothing and has nothing to adapt; give lm=PATH")
    if config.num_val_images < 1:
        raise InputError(f"num_val_images={config.num_val_images}: must be at least 1")
    for name in STAGES:
        stage: StageConfig = getattr(config, name)
        _check_stage(name, stage)
    if config.text.connector_lr or config.text.encoder_lr:
        raise InputError("text.connector_lr, text.encoder_lr: the text stage has no image; set both to 0")


def _check_stage(name: str, stage: StageConfig) -> None:
    if stage.num_turns < 1:
        raise InputError(f"{name}.num_turns={stage.num_turns}: must be at least 1")
    if not 0 <= stage.warmup < 1:
        raise InputError(f"{name}.warmup={stage.warmup}: is a share of the stage, at least 0 and below 1")
