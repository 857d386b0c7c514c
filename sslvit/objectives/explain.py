"""Every value of a resolved recipe with its reason: what `sslvit pretrain --explain` prints. Imports no torch.

A value is auto (resolved from the data), given (by the config file or the command) or a default, whose source is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from sslvit.config import PretrainConfig

_DINO = "DINO (arXiv:2104.14294)"
_DISTILLATION = {
    "student_temperature": "DINO, section 3.2",
    "teacher_temperature_warmup": "DINO: 30 of 100 to 300 epochs",
    "centering": "DINO, equation 4; sinkhorn: SwAV, DINOv2",
}
#: Where the defaults come from, by key or by section.
SOURCES = {
    "seed": "keys the order of the data, crops, masks and first weights",
    "accumulate": "micro-batches per step",
    "max_bad_rate": "the run stops when more of the images cannot be read",
    "init": "null: random weights",
    "teacher": "null: the student's own moving average",
    "encoder.image_width": "null: square views",
    "encoder.act_layer": "null: GELU; its tanh form without class token",
    "encoder.drop_path_rate": "off; the published ImageNet recipes set it",
    "encoder": "null: what the timm name says",
    "crops.local_scale": "DINO's multi-crop",
    "crops": "torchvision's RandomResizedCrop, as all of the papers",
    "optim.min_lr": _DINO,
    "optim.warmup": "DINO: 10 of 100 epochs",
    "optim.weight_decay": _DINO,
    "optim.weight_decay_end": "null: constant",
    "optim.beta1": "AdamW",
    "optim.clip_norm": "DINO's 3.0, over all gradients together",
    "optim.heads_lr": "null: no step on a frozen encoder",
    "optim.momentum_end": "DINO, section 3.2",
    **{f"{name}.{key}": source for name in ("dino", "ibot") for key, source in _DISTILLATION.items()},
    "dino.freeze_last_layer": "DINO: the first of 100 epochs",
    "ibot.weight": "iBOT, equation 4",
    "ibot.shared_head": "DINOv2 on large sets; the published iBOT shares",
    "ibot": "iBOT (arXiv:2111.07832), section 4.1",
    "koleo.weight": "DINOv2 (arXiv:2304.07193), section 4",
    "mae.mask_ratio": "MAE (arXiv:2111.06377), section 4.1",
    "mae.norm_pixels": "MAE, section 3",
    "mae": "MAE, section 3",
    "checkpoint": "never changes results",
    "knn.train": "null: data itself",
    "knn.val": "null: val_data",
    "knn": "the monitor; changes results through max_drop alone",
}
#: Shares of the run, also shown in steps.
_SHARES = ("optim.warmup", "optim.freeze_encoder", "teacher_temperature_warmup", "freeze_last_layer")
_NO_RECIPE = ("data", "val_data", "device", "num_workers", "overwrite", "sharded")


def explain(given: PretrainConfig, resolved: PretrainConfig, reasons: Mapping[str, str]) -> list[str]:
    """Lines `KEY = VALUE  kind: why`, one for every value that is in force; kind is auto, given or default."""
    rows = [(key, _shown(value), _why(key, value, given, resolved, reasons)) for key, value in _leaves(resolved)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{key:<{widths[0]}} = {value:<{widths[1]}}  {why}" for key, value, why in rows]


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; of sections that are switched off only the name."""
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        elif key not in _NO_RECIPE:
            yield key, value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _why(key: str, value: Any, given: PretrainConfig, resolved: PretrainConfig, reasons: Mapping[str, str]) -> str:
    if key in reasons:
        return f"auto: {reasons[key].removeprefix(f'{value}: ')}"
    if value is None and key in ("dino", "ibot", "koleo", "mae"):
        return "switched off"
    steps = f"; {round(value * resolved.steps)} of {resolved.steps} steps" if _is_share(key) and resolved.steps else ""
    if _at(_defaults(given), key) != value:
        return f"given{steps}"
    source = SOURCES.get(key) or SOURCES.get(key.partition(".")[0])
    return "default" + (f": {source}" if source else "") + steps


def _is_share(key: str) -> bool:
    return key.endswith(_SHARES)


def _defaults(given: PretrainConfig) -> PretrainConfig:
    """The schema's own values, with the sections switched on that are in use."""
    sections = {name: type(getattr(given, name)) for name in ("dino", "ibot", "koleo", "mae") if getattr(given, name)}
    return PretrainConfig(**{name: section() for name, section in sections.items()})


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
