"""The encoder as a Hugging Face vision model, in the one class that computes exactly the same: plain JSON and tensors.

`dinov2_with_registers` (class token and registers; equal at any size), `dinov2` (class token and LayerScale), `vit`
(class token alone), or SigLIP (neither, see siglip_folder.py). transformers is not needed to write them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.layers import QuickGELU
from timm.layers.activations import GELU, GELUTanh
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from sslvit.encoder.layouts import fold_class_position, to_hf
from sslvit.encoder.vit import Encoder
from sslvit.encoder.weights import LoadedEncoder
from sslvit.errors import InputError
from sslvit.exports.files import write_json, write_tensors
from sslvit.exports.processor import image_processor_config

ARCHITECTURES = {
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov2": "Dinov2Model",
    "vit": "ViTModel",
    "siglip_vision_model": "SiglipVisionModel",
}
ANY_SIZE = ("dinov2_with_registers",)  # the others resize positions without antialiasing in transformers


def hf_class(encoder: Encoder) -> str:
    """The model_type that is exact for this encoder; InputError with the reason when there is none."""
    reason = no_plain_vit(encoder)
    if reason is not None:
        raise InputError(
            f"no Hugging Face class computes this encoder: {reason}; export timm instead, AutoModel opens it too"
        )
    if encoder.cls_token is None:
        if encoder.reg_token is not None:
            raise InputError("no Hugging Face class has registers without a class token; export timm instead")
        return "siglip_vision_model"
    if encoder.reg_token is None and not hasattr(encoder.blocks[0].ls1, "gamma"):
        return "vit"
    if encoder.blocks[0].mlp.fc1.out_features % encoder.embed_dim:
        raise InputError("DINOv2 in transformers wants a whole mlp_ratio; export timm instead, AutoModel opens it too")
    return "dinov2" if encoder.reg_token is None else "dinov2_with_registers"


def check_hf(loaded: LoadedEncoder) -> None:
    """InputError with the reason when no Hugging Face class is exact for the encoder."""
    hf_class(loaded.module)


def hf_state(encoder: Encoder, model_type: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors under the files' keys) of the exact class; `model_type` asks for one in particular."""
    kind = hf_class(encoder)
    if model_type not in (None, kind):
        raise InputError(f"the encoder is no {model_type} but exactly a {kind}")
    source = dict(encoder.state_dict())
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    if kind == "dinov2_with_registers":
        if prefix:
            source = fold_class_position(source, prefix)
        for index in range(len(encoder.blocks)):  # the class always has LayerScale
            for name in (f"blocks.{index}.ls1.gamma", f"blocks.{index}.ls2.gamma"):
                source.setdefault(name, torch.ones(encoder.embed_dim))
    layout = "siglip" if kind == "siglip_vision_model" else kind
    return _config(encoder, kind), to_hf(source, layout)


def write_hf_folder(loaded: LoadedEncoder, folder: Path, model_type: str | None = None) -> None:
    """Fill `folder` (existing, empty)."""
    config, tensors = hf_state(loaded.module, model_type)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", image_processor_config(loaded.preprocessing))
    write_tensors(folder / "model.safetensors", tensors)


def no_plain_vit(encoder: Encoder) -> str | None:
    """Why the encoder is none of the plain ViTs the Hugging Face classes compute; None if it is."""
    if not isinstance(encoder, VisionTransformer):
        return f"{type(encoder).__name__} has rotary positions"
    patches = encoder.patch_embed
    if type(patches) is not PatchEmbed or not isinstance(patches.norm, nn.Identity) or patches.proj.bias is None:
        return "its patch embedding is not a plain convolution with bias"
    if encoder.pos_embed is None or not isinstance(encoder.norm_pre, nn.Identity):
        return "it has no learned positions, or a norm before the blocks"
    if len(set(patches.patch_size)) > 1 or len(set(patches.img_size)) > 1:
        return f"images of {patches.img_size} in patches of {patches.patch_size} are not square"
    if not isinstance(encoder.norm, nn.LayerNorm) or not isinstance(encoder.fc_norm, nn.Identity):
        return "its final norm comes after pooling"
    if encoder.attn_pool is not None:
        return "it pools with attention"
    return next((reason for block in encoder.blocks if (reason := _no_plain_block(block))), None)


def _no_plain_block(block: Any) -> str | None:
    if type(block) is not Block or type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
        return f"its blocks are {type(block).__name__} with {type(block.attn).__name__}"
    norms = (block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm)
    if not all(isinstance(norm, nn.Identity) for norm in norms):
        return "it normalises queries and keys, or inside attention or MLP"
    if type(block.mlp) is not Mlp or activation_of(block) is None:
        return f"its MLP is {type(block.mlp).__name__} with {type(block.mlp.act).__name__}"
    if any(linear.bias is None for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)):
        return "its linear maps have no bias"
    return None


def activation_of(block: Any) -> str | None:
    """The name transformers gives the MLP's activation, None where it has none."""
    act = block.mlp.act
    if type(act) is GELUTanh or (type(act) is nn.GELU and act.approximate == "tanh"):
        return "gelu_pytorch_tanh"
    if type(act) is QuickGELU:
        return "quick_gelu"
    return "gelu" if type(act) in (nn.GELU, GELU) else None


def _config(encoder: Encoder, kind: str) -> dict[str, Any]:
    first = encoder.blocks[0]
    hidden = first.mlp.fc1.out_features
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": activation_of(first),
        "image_size": encoder.patch_embed.img_size[0],
        "patch_size": encoder.patch_embed.patch_size[0],
        "num_channels": encoder.patch_embed.proj.in_channels,
        "layer_norm_eps": encoder.norm.eps,
        "torch_dtype": "float32",
    }
    if kind == "siglip_vision_model":
        return config | {"intermediate_size": hidden, "attention_dropout": 0.0, "vision_use_head": False}
    config |= {
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
    }
    if kind == "vit":
        return config | {"intermediate_size": hidden}
    config |= {
        "mlp_ratio": hidden // encoder.embed_dim,
        "use_swiglu_ffn": False,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
    }
    if kind == "dinov2_with_registers":
        config["num_register_tokens"] = encoder.reg_token.shape[1]
    return config
