"""How large a distilled teacher is: as it was loaded, or before that by its name or folder. Imports no torch.

A plan is made where weights need not be, so a timm name or the config.json of a timm folder has to do; of what tells
its sizes only when it is opened (checkpoints, Hugging Face folders) nothing is claimed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslvit.objectives.sizes import SIZES, Size, encoder_parameters

if TYPE_CHECKING:
    from sslvit.encoder.vit import Encoder

#: timm's plain ViTs: by image size, or DINOv2's (518 px, LayerScale, perhaps 4 registers).
_NAME = re.compile(r"vit_(\w+?)_patch(\d+)_(?:(\d+)|(reg4_)?dinov2)")
_SWIGLU = ("giant", "gigantic")  # of DINOv2: other MLPs than those of SIZES
_READ = {"embed_dim", "depth", "mlp_ratio", "patch_size", "img_size", "in_chans", "class_token", "reg_tokens"}
_READ |= {"no_embed_class", "init_values"}
_NO_SIZE = {"num_classes", "num_heads", "global_pool", "fc_norm", "dynamic_img_size", "act_layer"}


@dataclass(frozen=True)
class Teacher:
    """An encoder that is distilled, frozen: its sizes, and all its parameters."""

    size: Size
    parameters: int


def teacher_as_loaded(encoder: Encoder) -> Teacher:
    """Of a module. The width of the MLP is that of a plain one with as many weights (SwiGLU has three matrices)."""
    dim, block, patch = encoder.embed_dim, encoder.blocks[0], encoder.patch_embed.proj.weight
    weights = sum(parameter.numel() for parameter in block.parameters() if parameter.ndim > 1)
    size = Size(
        dim=dim,
        depth=len(encoder.blocks),
        hidden=(weights - 4 * dim**2) // (2 * dim),
        patch=patch.shape[-1],
        channels=patch.shape[1],
        prefix=encoder.num_prefix_tokens,
        scaled=hasattr(getattr(block, "ls1", None), "gamma"),
    )
    return Teacher(size, sum(parameter.numel() for parameter in encoder.parameters()))


def teacher_named(spec: str) -> Teacher | None:
    """Of an encoder E that nobody has opened; None where its sizes cannot be told for certain."""
    name, _, options = spec.partition("?")
    folder = next((path for path in (Path(name), Path(name.rpartition("@")[0] or name)) if path.is_dir()), None)
    if folder is None:
        return _built(name, {}) if options in ("", "pretrained=true", "pretrained=false") else None
    if (folder / "checkpoints").is_dir():
        folder = folder / "encoder"  # of a finished run
    try:
        config = json.loads((folder / "config.json").read_text())
        return _built(str(config["architecture"]), config.get("model_args", {}))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _built(name: str, args: Mapping[str, Any]) -> Teacher | None:
    """What `timm.create_model(name, **args)` has, without building it."""
    match = _NAME.fullmatch(name.split(".")[0])
    if match is None or match[1] not in SIZES or (match[3] is None and match[1] in _SWIGLU):
        return None
    if not args.keys() <= _READ | _NO_SIZE:
        return None
    dinov2, (dim, depth, _, hidden) = match[3] is None, SIZES[match[1]]
    width = args.get("embed_dim", dim)
    size = Size(
        dim=width,
        depth=args.get("depth", depth),
        hidden=int(width * args.get("mlp_ratio", hidden / dim)),
        patch=_pair(args.get("patch_size", int(match[2])))[0],
        channels=args.get("in_chans", 3),
        prefix=int(args.get("class_token", True)) + args.get("reg_tokens", 4 if match[4] else 0),
        scaled=bool(args.get("init_values", dinov2)),
    )
    image = args.get("img_size", 518 if dinov2 else int(match[3]))
    positions = 0 if args.get("no_embed_class", bool(match[4])) else size.prefix  # the prefix has some as well
    return Teacher(size, encoder_parameters(size, _pair(image)) + positions * width)


def _pair(value: Any) -> tuple[int, int]:
    """A side, or two of them, as timm takes them."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
