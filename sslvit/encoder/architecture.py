"""What `timm.create_model` needs to build an encoder again: a name and plain arguments, given or inferred from shapes.

Weights are not here, and no file is read. Every argument is a JSON value, so that it can stand in a folder's config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from timm.layers import QuickGELU
from timm.layers.activations import GELU, GELUTanh
from torch import Tensor, nn

from sslvit.encoder.config import EncoderConfig
from sslvit.encoder.layouts import depth_of, num_prefix_positions
from sslvit.encoder.vit import Encoder, create_pooled, create_timm, init_xavier, is_vit
from sslvit.errors import InputError

_HEADS_OF_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # So400m, H, g, G: all others have 64 channels per head
CLIP_NORM_EPS = 1e-5  # torch's LayerNorm, in open_clip's own towers
_TIMM_NORM_EPS = 1e-6  # of the names inferred here
_DINOV3_HEADS = {4096: 32}  # the 7B: all others have 64 channels per head, the 1280 wide one too
_NAME_OF_WIDTH = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large"}


@dataclass(frozen=True)
class Architecture:
    """`timm.create_model(name, **args)`, and the epsilon of its layer norms where it is not that of the name."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    norm_eps: float | None = None

    def build(self, seed: int = 0) -> Encoder:
        """The module with random weights that depend on `seed` alone; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if not is_vit(self.name):  # see load_encoder(pooled=True)
                return cast(Encoder, create_pooled(self.name, self.args))
            encoder = create_timm(self.name, self.args)
            init_xavier(encoder)
        if self.norm_eps is not None:
            for module in encoder.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = self.norm_eps
        return encoder


def infer_architecture(
    tensors: Mapping[str, Tensor],
    *,
    name: str | None = None,
    num_heads: int | None = None,
    img_size: tuple[int, int] | None = None,
    act_layer: str | None = None,
    init_values: float = 1e-5,
    norm_eps: float | None = None,
) -> Architecture:
    """The ViT whose timm-named `tensors` these are. Given facts win; the rest follows from shapes.

    The number of heads cannot be seen: 64 channels per head is the rule of every ViT up to L (and of ours).
    """
    if any(name.startswith("rope") or ".gamma_1" in name or ".attn.q_bias" in name for name in tensors):
        raise InputError("these are weights of a RoPE encoder (timm Eva); open them by timm name or as a timm folder")
    dim, in_chans, *patch = tensors["patch_embed.proj.weight"].shape
    hidden, swiglu = _feed_forward(tensors)
    args: dict[str, Any] = {
        "img_size": _plain(img_size or _image_size(tensors, (patch[0], patch[1]))),
        "patch_size": _plain((patch[0], patch[1])),
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": depth_of(tensors),
        "num_heads": num_heads or _num_heads(tensors, dim),
        "mlp_ratio": hidden / dim,
        "class_token": "cls_token" in tensors,
        "global_pool": "token" if "cls_token" in tensors else "avg",
        "fc_norm": "fc_norm.weight" in tensors,
        "reg_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "no_embed_class": _positions_of_patches_only(tensors, img_size, (patch[0], patch[1])),
        "init_values": init_values if "blocks.0.ls1.gamma" in tensors else None,
        "dynamic_img_size": True,
    }
    args |= _rarer_args(tensors)
    if act_layer is not None and (name is not None or act_layer != "gelu"):
        args["act_layer"] = act_layer
    assert int(dim * args["mlp_ratio"]) == hidden, (dim, hidden)
    if name is None and not swiglu and norm_eps == CLIP_NORM_EPS:  # a name that has it, so that every export has it
        return Architecture("vit_base_patch16_clip_224", {"pre_norm": False, **args})
    base = "vit_giant_patch14_dinov2" if swiglu else f"{_NAME_OF_WIDTH.get(dim, 'vit_base')}_patch16_224"
    return Architecture(name or base, args, None if norm_eps == _TIMM_NORM_EPS else norm_eps)


def infer_dinov3(
    tensors: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    img_size: tuple[int, int] | None = None,
    rope_theta: float = 100.0,
    norm_eps: float | None = None,
) -> Architecture:
    """The timm Eva whose `tensors` these are: DINOv3 (arXiv:2508.10104), rotary positions and registers."""
    dim, in_chans, *patch = tensors["patch_embed.proj.weight"].shape
    gated = "blocks.0.mlp.fc1_g.weight" in tensors
    if not gated and "blocks.0.mlp.fc1.weight" not in tensors:
        raise InputError("the checkpoint has no feed-forward layer of DINOv3 (fc1, or w1 and w2)")
    hidden = tensors["blocks.0.mlp.fc1_g.weight" if gated else "blocks.0.mlp.fc1.weight"].shape[0]
    args = {
        "img_size": _plain(img_size or (256, 256)),
        "patch_size": _plain((patch[0], patch[1])),
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": depth_of(tensors),
        "num_heads": num_heads or _DINOV3_HEADS.get(dim, dim // 64),
        "mlp_ratio": hidden / dim,
        "qkv_bias": "blocks.0.attn.q_bias" in tensors,
        "num_reg_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "rope_temperature": rope_theta,
        "global_pool": "token",
        "dynamic_img_size": True,
    }
    return Architecture("vit_small_plus_patch16_dinov3" if gated else "vit_small_patch16_dinov3", args, norm_eps)


def config_of(encoder: Encoder, name: str) -> EncoderConfig:
    """The facts of an encoder as an `EncoderConfig` without `auto` values."""
    attention, (height, width) = encoder.blocks[0].attn, encoder.patch_embed.img_size
    return EncoderConfig(
        name=name,
        patch_size=encoder.patch_embed.patch_size[0],
        image_size=height,
        image_width=None if width == height else width,
        act_layer=activation_of(encoder),
        class_token=encoder.cls_token is not None,
        num_registers=0 if encoder.reg_token is None else encoder.reg_token.shape[1],
        in_chans=encoder.patch_embed.proj.in_channels,
        embed_dim=encoder.embed_dim,
        depth=len(encoder.blocks),
        num_heads=attention.num_heads,
        init_values=1e-5 if hasattr(getattr(encoder.blocks[0], "ls1", None), "gamma") else 0.0,
    )


def activation_of(encoder: Encoder) -> str | None:
    """The activation in plain MLPs: gelu, gelu_tanh or quick_gelu; None for any other."""
    act = getattr(encoder.blocks[0].mlp, "act", None)
    if isinstance(act, QuickGELU):
        return "quick_gelu"
    if isinstance(act, GELUTanh) or (isinstance(act, nn.GELU) and act.approximate == "tanh"):
        return "gelu_tanh"
    return "gelu" if isinstance(act, nn.GELU | GELU) else None


def heads_of_name(name: str) -> int:
    """How many heads timm's model of that name has."""
    with torch.device("meta"):
        return create_timm(name, {"depth": 1}).blocks[0].attn.num_heads


def _plain(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _image_size(tensors: Mapping[str, Tensor], patch: tuple[int, int]) -> tuple[int, int]:
    if "pos_embed" not in tensors:
        return 224, 224
    side = math.isqrt(tensors["pos_embed"].shape[1] - num_prefix_positions(tensors))
    return side * patch[0], side * patch[1]


def _positions_of_patches_only(
    tensors: Mapping[str, Tensor], img_size: tuple[int, int] | None, patch: tuple[int, int]
) -> bool:
    if "pos_embed" not in tensors:
        return True
    grid = None if img_size is None else (img_size[0] // patch[0], img_size[1] // patch[1])
    return num_prefix_positions(tensors, grid) == 0


def _num_heads(tensors: Mapping[str, Tensor], dim: int) -> int:
    if "blocks.0.attn.q_norm.weight" in tensors:
        return dim // tensors["blocks.0.attn.q_norm.weight"].shape[0]
    if dim % 64 and dim not in _HEADS_OF_WIDTH:
        raise InputError(f"the number of heads of a ViT of width {dim} cannot be inferred; append ?num_heads=N")
    return _HEADS_OF_WIDTH.get(dim, dim // 64)


def _feed_forward(tensors: Mapping[str, Tensor]) -> tuple[int, bool]:
    """Rows of the first linear map, and whether it is DINOv2-giant's SwiGLU, where half of them are gates."""
    if "blocks.0.mlp.fc1.weight" not in tensors:
        raise InputError("the checkpoint has no blocks.0.mlp.fc1.weight; it is no plain ViT")
    first, second = tensors["blocks.0.mlp.fc1.weight"], tensors["blocks.0.mlp.fc2.weight"]
    return first.shape[0], first.shape[0] == 2 * second.shape[1]


def _rarer_args(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments that are left out while they have timm's default."""
    args: dict[str, Any] = {}
    if "blocks.0.attn.qkv.bias" not in tensors:
        args["qkv_bias"] = False
    if "blocks.0.attn.proj.bias" not in tensors:
        args["proj_bias"] = False
    if "blocks.0.attn.q_norm.weight" in tensors:
        args["qk_norm"] = True
    if "norm_pre.weight" in tensors:
        args["pre_norm"] = True
    if "pos_embed" not in tensors:
        args["pos_embed"] = "none"
    return args
