"""One stage of alignment: which parts learn, from which batches, how fast (LLaVA-1.5, arXiv:2310.03744, table 5).

text: the language model alone on the words of the pairs. connector: the connector alone. instruct: connector and
language model, and the encoder if wanted. All three run through `sslvit.training.train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslvit import memory
from sslvit.data.photometry import normalize
from sslvit.errors import InputError
from sslvit.metrics import MetricsLog
from sslvit.optim import adamw, param_groups
from sslvit.schedules import cosine
from sslvit.signals import StopFlag
from sslvit.training import train
from sslvit.vlm.batches import IN_MEMORY, PairBatch, PairBatches, PairImages
from sslvit.vlm.blocks import IGNORED
from sslvit.vlm.chat import Chat
from sslvit.vlm.config import StageConfig
from sslvit.vlm.model import UNREAD, VisionLanguage, answer_loss, image_tokens

PARTS = ("encoder", "connector", "lm")


@dataclass
class Runtime:
    """What every stage of one alignment shares."""

    device: torch.device
    precision: str
    seed: int
    checkpoint_every: int | None
    keep: int
    stop: StopFlag
    metrics: MetricsLog
    milestone_every: int = 0


class Stage(nn.Module):
    """The `Trainable` of a stage. Parts that learn are its children, so that a checkpoint holds them and nothing else.

    Frozen parts stay outside the module tree: they are neither trained, saved nor switched to training mode.
    """

    def __init__(self, model: VisionLanguage, learns: dict[str, bool], mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.learning = nn.ModuleDict()
        for name in PARTS:
            part = getattr(model, name)
            if part is not None and learns[name]:
                self.learning[name] = adapters_of(part) if hasattr(part, "peft_config") else part
        self.learns = learns
        self._whole = [model]  # in a list, so that it is not registered
        self.mean, self.std = mean, std

    @property
    def model(self) -> VisionLanguage:
        """The whole network."""
        return self._whole[0]

    def forward(self, batch: PairBatch, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Loss in nats per supervised token, and how many of them are guessed right."""
        predictions = self.model.predict(self._tokens(batch), batch.blocks)
        right = (predictions.logits.detach().argmax(-1) == predictions.targets).float().mean()
        return answer_loss(predictions), {"token_accuracy": right}

    def _tokens(self, batch: PairBatch) -> Tensor | None:
        if batch.images is None:
            return batch.tokens
        assert self.model.encoder is not None
        with torch.set_grad_enabled(self.learns["encoder"]):
            return image_tokens(self.model.encoder, normalize(batch.images, self.mean, self.std))

    def before_update(self, step: int) -> None:
        """Nothing to change in the gradients."""

    def after_step(self, step: int) -> None:
        """Nothing follows a step."""


def run_stage(
    name: str,
    config: StageConfig,
    model: VisionLanguage,
    images: PairImages,
    chat: Chat,
    folder: Path,
    runtime: Runtime,
) -> None:
    """Trains `model` in place; goes on from, or ends with, the checkpoints in `folder`. A finished stage only loads."""
    assert config.steps is not None and config.batch_size is not None
    learns = _prepare(model, config, runtime.device)
    if not config.steps or not any(learns.values()):
        return
    stage = Stage(model, learns, images.preprocessing.mean, images.preprocessing.std)
    batches = make_batches(name, config, model, images, chat, runtime)
    check_first_batch(name, batches)
    with memory.kept(runtime.device):
        train(
            stage,
            batches,
            optimizer=adamw(_groups(model, config), lr=_highest_rate(config), betas=(0.9, 0.99)),
            schedule=StageSchedule(config),
            steps=config.steps,
            clip_norm=config.clip_norm,
            precision=runtime.precision,
            device=runtime.device,
            folder=folder,
            checkpoint_every=runtime.checkpoint_every or max(1, config.steps // 5),
            keep=runtime.keep,
            milestone_every=runtime.milestone_every,
            metrics=runtime.metrics,
            stop=runtime.stop,
            seed=runtime.seed,
            stage=name,
        )
    model.eval()


def adapters_of(lm: nn.Module) -> nn.ModuleDict:
    """The LoRA layers of a language model: all of it that learns."""
    kinds = ("lora_A", "lora_B", "lora_dropout")
    named = {name: module for name, module in lm.named_modules() if name.rpartition(".")[2] in kinds}
    return nn.ModuleDict({name.replace(".", "-"): module for name, module in named.items()})


class StageSchedule:
    """Warm-up, then cosine to a hundredth, of the highest rate; the other parts' groups hold their share of it."""

    def __init__(self, config: StageConfig):
        assert config.steps
        self.peak = _highest_rate(config)
        self.steps, self.weight_decay = config.steps, config.weight_decay
        self.warmup_steps = min(round(config.warmup * config.steps), config.steps - 1)

    def __call__(self, step: int) -> dict[str, float]:
        """{"lr", "weight_decay"} of a step counted from 0."""
        return {
            "lr": cosine(step, self.steps, self.peak, 0.01 * self.peak, warmup_steps=self.warmup_steps),
            "weight_decay": self.weight_decay,
        }


def make_batches(
    name: str, config: StageConfig, model: VisionLanguage, images: PairImages, chat: Chat, runtime: Runtime
) -> PairBatches:
    """The stage's stream. A frozen encoder reads each image once if the stage sees all images and they fit."""
    assert config.steps and config.batch_size
    see, encode, length = "nothing", None, len(model.before)
    if model.encoder is not None:
        see, encode = "images", None
        shape = encoded(model, images, [0], runtime.device).shape
        length += shape[1]
        fits = len(images) * shape[1] * shape[2] * 4 <= IN_MEMORY
        if not config.encoder_lr and fits and config.steps * config.batch_size >= len(images):
            see, encode = "tokens", _Encode(model, images, runtime.device)
    room = longest_text(model.lm) - length
    if room < 2:
        raise InputError(
            f"an image takes {length} tokens, the language model has room for {longest_text(model.lm)}; "
            "raise language.max_length or use larger patches"
        )
    return PairBatches(
        images,
        chat,
        batch_size=config.batch_size,
        num_turns=config.num_turns,
        num_captions=config.num_captions,
        max_tokens=room,
        seed=runtime.seed,
        see=see,
        whole=name == "text",
        encode=encode,
    )


def longest_text(lm: Any) -> int:
    """How many tokens the language model takes, image included."""
    return int(getattr(lm.config, "max_position_embeddings", 2**31))


class _Encode:
    """uint8 images (B, C, H, W) to image tokens (B, P, D), fp32, without gradients."""

    def __init__(self, model: VisionLanguage, images: PairImages, device: torch.device):
        self.model, self.preprocessing, self.device = model, images.preprocessing, device

    def __call__(self, pixels: Tensor) -> Tensor:
        encoder = self.model.encoder
        assert encoder is not None
        encoder.to(self.device).eval()
        with torch.no_grad():
            mean, std = self.preprocessing.mean, self.preprocessing.std
            return image_tokens(encoder, normalize(pixels.to(self.device), mean, std))


def encoded(model: VisionLanguage, images: PairImages, numbers: list[int], device: torch.device) -> Tensor:
    """Image tokens (n, P, D) of some images (unreadable ones stand for the next readable)."""
    return _Encode(model, images, device)(torch.stack([image for _, image in images.readable_all(numbers)]))


def check_first_batch(name: str, batches: PairBatches) -> None:
    """InputError before step 1 when nothing would be learned: every answer empty or too long for the model."""
    batch, _ = next(iter(batches))
    batches.seek(0)
    if not bool((batch.blocks.targets != IGNORED).any()):
        raise InputError(
            f"{batches.images.pairs.spec}: stage {name} has no answer to learn from; all turns of the first batch are "
            f"empty or longer than {batches.max_tokens} tokens: raise language.max_length or shorten them"
        )


def _prepare(model: VisionLanguage, config: StageConfig, device: torch.device) -> dict[str, bool]:
    """Moves the model to the device, sets what takes gradients, and says which parts learn."""
    model.to(device).eval()
    rates = {"encoder": config.encoder_lr, "connector": config.connector_lr, "lm": config.lm_lr}
    learns = {}
    for name, rate in rates.items():
        part = getattr(model, name)
        learns[name] = part is not None and rate > 0
        if part is not None:
            adapters = hasattr(part, "peft_config")
            for parameter_name, parameter in part.named_parameters():
                read = name != "encoder" or not parameter_name.startswith(UNREAD)
                parameter.requires_grad_(learns[name] and read and (not adapters or "lora_" in parameter_name))
    return learns


def _highest_rate(config: StageConfig) -> float:
    return max(config.encoder_lr, config.connector_lr, config.lm_lr)


def _groups(model: VisionLanguage, config: StageConfig) -> list[dict]:
    """Parameter groups of the parts that learn; lr_scale is a part's share of the highest rate."""
    groups = []
    for name, rate in (("encoder", config.encoder_lr), ("connector", config.connector_lr), ("lm", config.lm_lr)):
        part = getattr(model, name)
        if part is None or not rate:
            continue
        for group in param_groups(part, config.weight_decay):
            named = [(f"{name}.{n}", parameter) for n, parameter in group["params"]]
            groups.append({**group, "params": named, "lr_scale": rate / _highest_rate(config) * group["lr_scale"]})
    return groups
