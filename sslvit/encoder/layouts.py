"""How the same ViT is named elsewhere: key names of checkpoints, to timm's and back. Tensors only, no modules.

Read: timm, the original DINO, iBOT, MAE, DINOv2 and DINOv3, open_clip's own and timm towers, Hugging Face `vit`,
`dinov2`, `dinov2_with_registers`, `siglip`, `dinov3_vit` and towers inside larger models. Written: the five Hugging
Face forms, with the keys their files hold on disk. A name missing here is never guessed: it stays in the report as
unexpected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sslvit.errors import InputError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class HfNames:
    """Names of one Hugging Face class: stems outside blocks, stems inside them, and the split of timm's qkv."""

    patch_embed: str
    norm: str
    block: str
    inner: dict[str, str]
    qkv: tuple[str, str, str]


_VIT_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
HF_NAMES = {
    "vit": HfNames(
        patch_embed="embeddings.patch_embeddings.projection",
        norm="layernorm",
        block="encoder.layer.{}.",
        inner={
            "norm1": "layernorm_before",
            "attn.proj": "attention.output.dense",
            "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        },
        qkv=_VIT_QKV,
    ),
    "dinov2": HfNames(
        patch_embed="embeddings.patch_embeddings.projection",
        norm="layernorm",
        block="encoder.layer.{}.",
        inner={
            "norm1": "norm1",
            "attn.proj": "attention.output.dense",
            "ls1.gamma": "layer_scale1.lambda1",
            "norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
            "ls2.gamma": "layer_scale2.lambda1",
        },
        qkv=_VIT_QKV,
    ),
    "siglip": HfNames(
        patch_embed="embeddings.patch_embedding",
        norm="post_layernorm",
        block="encoder.layers.{}.",
        inner={
            "norm1": "layer_norm1",
            "attn.proj": "self_attn.out_proj",
            "norm2": "layer_norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
}
HF_NAMES["dinov2_with_registers"] = HF_NAMES["dinov2"]
HF_NAMES["dinov3_vit"] = HfNames(  # timm's names are those of its Eva
    patch_embed="embeddings.patch_embeddings",
    norm="norm",
    block="layer.{}.",
    inner={
        "norm1": "norm1",
        "attn.proj": "attention.o_proj",
        "gamma_1": "layer_scale1.lambda1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "gamma_2": "layer_scale2.lambda1",
    },
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
)
_GATED = {"mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj"}  # instead of mlp.fc1 in DINOv3's SwiGLU
_SWIGLU_OF_DINOV3 = {".mlp.w1.": ".mlp.fc1_g.", ".mlp.w2.": ".mlp.fc1_x.", ".mlp.w3.": ".mlp.fc2."}

_OPEN_CLIP = (  # of open_clip's own tower (and OpenAI's), in this order
    ("transformer.resblocks.", "blocks."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".ls_1.", ".ls1."),
    (".ls_2.", ".ls2."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("conv1.", "patch_embed.proj."),
)

_MARKERS = {
    "patch_embed.proj.weight": "timm",
    "embeddings.patch_embeddings.projection.weight": "hf",
    "embeddings.patch_embedding.weight": "siglip",
    "embeddings.patch_embeddings.weight": "dinov3_vit",
    "conv1.weight": "open_clip",  # and a class_embedding beside it: a CLIP ResNet has none
}
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_NOT_ENCODER = re.compile(
    r"^(mask_token$|masked_embed$|decoder|head|pooler|attn_pool|projection|proj$|.*(dino|ibot)_head"
    r"|rope_embed\.|local_cls_norm\.|.*\.qkv\.bias_mask$)"
)


@dataclass(frozen=True)
class Recognised:
    """Tensors under timm's names, where they came from, and the names that belong to heads or decoders."""

    tensors: Tensors
    layout: str
    prefix: str
    ignored: list[str]


def to_timm(tensors: Mapping[str, Tensor], prefer: str = "teacher", wanted: Iterable[str] = ()) -> Recognised:
    """Find the one ViT in a checkpoint and give its tensors timm's names, in fp32.

    Of several (`student.`, `teacher.`) the one whose prefix contains `prefer` is taken. Names in `wanted` are never
    ignored. Raises InputError when there is no ViT, or its layout is not known.
    """
    clean = {_unwrapped(name): tensor for name, tensor in tensors.items()}
    prefix, layout = _find(clean, prefer)
    inside = {name.removeprefix(prefix): t for name, t in clean.items() if name.startswith(prefix)}
    ignored = sorted(name for name in inside if _NOT_ENCODER.match(name) and name not in set(wanted))
    rope = "rope_embed.periods" in inside or "storage_tokens" in inside
    inside = {name: t.float() if t.is_floating_point() else t for name, t in inside.items() if name not in ignored}
    if layout == "timm":
        inside, layout = (_from_dinov3(inside, ignored), "dinov3") if rope else _from_original(inside)
    elif layout == "open_clip":
        inside = _from_open_clip(inside)
    else:
        inside, layout = _from_hf(inside, layout)
    return Recognised(inside, layout, prefix, ignored)


def depth_of(tensors: Iterable[str]) -> int:
    """How many blocks timm-named tensors have."""
    return 1 + max((int(m.group(1)) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)


def to_hf(tensors: Mapping[str, Tensor], layout: str) -> Tensors:
    """timm-named tensors under the names of the class `layout`. Bit for bit, except that SigLIP has no LayerScale.

    Expects an encoder `exports` found exact for that class: positions for the patches alone, or with the class token.
    """
    names, source = HF_NAMES[layout], dict(tensors)
    if layout == "siglip":
        source = fold_layer_scale(source)
    depth = depth_of(source)
    out = _embeddings_to_hf(source, layout)
    for timm_stem, hf_stem in _stems(names, depth, gated=any(".mlp.fc1_g." in name for name in source)).items():
        for suffix in ("", ".weight", ".bias"):
            if timm_stem + suffix in source:
                out[hf_stem + suffix] = source.pop(timm_stem + suffix)
    for index in range(depth):
        for suffix in ("weight", "bias"):
            if (qkv := source.pop(f"blocks.{index}.attn.qkv.{suffix}", None)) is not None:
                for stem, part in zip(names.qkv, qkv.chunk(3), strict=True):
                    out[f"{names.block.format(index)}{stem}.{suffix}"] = part.clone()
        for bias, stem in (("q_bias", names.qkv[0]), ("v_bias", names.qkv[2])):  # DINOv3's keys have none
            if (value := source.pop(f"blocks.{index}.attn.{bias}", None)) is not None:
                out[f"{names.block.format(index)}{stem}.bias"] = value
    assert not source, f"no place for {sorted(source)} in {layout}"
    prefix = "vision_model." if layout == "siglip" else ""
    return {prefix + name: tensor.contiguous() for name, tensor in out.items()}


def fold_layer_scale(tensors: Mapping[str, Tensor]) -> Tensors:
    """Multiply each LayerScale into the linear map before it, and drop it: the same function without it."""
    out = dict(tensors)
    for index in range(depth_of(tensors)):
        for scale, linear in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            if (gamma := out.pop(f"blocks.{index}.{scale}.gamma", None)) is None:
                continue
            stem = f"blocks.{index}.{linear}"
            out[f"{stem}.weight"] = out[f"{stem}.weight"] * gamma[:, None]
            if f"{stem}.bias" in out:
                out[f"{stem}.bias"] = out[f"{stem}.bias"] * gamma
    return out


def fold_class_position(tensors: Tensors, num_positions: int) -> Tensors:
    """Add the first `num_positions` of `pos_embed` to class token and registers, and drop them: the same function."""
    out, table = dict(tensors), tensors["pos_embed"]
    out["pos_embed"] = table[:, num_positions:]
    out["cls_token"] = out["cls_token"] + table[:, :1]
    if num_positions > 1:
        out["reg_token"] = out["reg_token"] + table[:, 1:num_positions]
    return out


def num_prefix_positions(tensors: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> int:
    """How many entries of `pos_embed` belong to class token and registers; the rest must fill `grid` or a square."""
    length = tensors["pos_embed"].shape[1]
    classes = 1 if "cls_token" in tensors else 0
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    candidates = sorted({0, classes, classes + registers})
    if grid is not None and length - grid[0] * grid[1] in candidates:
        return length - grid[0] * grid[1]
    for count in candidates:
        if length > count and math.isqrt(length - count) ** 2 == length - count:
            return count
    raise InputError(f"pos_embed has {length} entries, which is no square grid; give ?img_size=HEIGHTxWIDTH")


def _find(tensors: Mapping[str, Tensor], prefer: str) -> tuple[str, str]:
    """(prefix, layout) of the ViT in a checkpoint."""
    found = [
        (name.removesuffix(marker), layout)
        for name in tensors
        for marker, layout in _MARKERS.items()
        if name.endswith(marker) and (name == marker or name[-len(marker) - 1] == ".")
        if layout != "open_clip" or name.removesuffix(marker) + "class_embedding" in tensors
    ]
    if not found:
        sample = ", ".join(list(tensors)[:3]) or "nothing"
        raise InputError(
            f"no ViT in the checkpoint (it holds {sample}, ...); known: timm, DINO, iBOT, MAE, DINOv2, DINOv3, "
            "open_clip, Hugging Face"
        )
    order = {"teacher": 1, "ema": 2, "student": 4} | {prefer: 0}
    return min(found, key=lambda item: (min((r for w, r in order.items() if w in item[0]), default=3), len(item[0])))


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _from_original(tensors: Tensors) -> tuple[Tensors, str]:
    """The originals use timm's names but for DINOv2's registers, SwiGLU and block chunks."""
    names = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): name for name in tensors}
    out = {
        new.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): tensors[old]
        for new, old in names.items()
    }
    if "register_tokens" not in out:
        return out, "timm"
    out["reg_token"] = out.pop("register_tokens")  # they stand behind the class token and have no positions
    return fold_class_position(out, 1), "dinov2"


def _from_dinov3(tensors: Tensors, ignored: Iterable[str]) -> Tensors:
    """The original DINOv3 to timm's Eva. Its keys have no bias: that third of qkv.bias is masked, or zero."""
    out: Tensors = {}
    masked = any(name.endswith(".qkv.bias_mask") for name in ignored)
    for name, tensor in tensors.items():
        new = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        for old, timm in (*_SWIGLU_OF_DINOV3.items(), (".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2")):
            new = new.replace(old, timm)
        query, key, value = tensor.chunk(3) if new.endswith(".attn.qkv.bias") else (tensor, None, None)
        if key is not None and value is not None and (masked or not key.any()):
            stem = new.removesuffix("qkv.bias")
            out |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
        else:
            out["reg_token" if new == "storage_tokens" else new] = tensor
    return out


def _from_open_clip(tensors: Tensors) -> Tensors:
    """open_clip's own vision transformer to timm's pre-norm ViT."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in _OPEN_CLIP:
            if old in name and (old[0] in "._" or name.startswith(old)):
                name = name.replace(old, new)
        out[name] = tensor
    out["cls_token"] = out.pop("class_embedding").reshape(1, 1, -1)
    if "positional_embedding" in out:
        out["pos_embed"] = out.pop("positional_embedding").unsqueeze(0)
    return out


def _from_hf(tensors: Tensors, marker: str) -> tuple[Tensors, str]:
    """Hugging Face names to timm's; q, k and v are joined, and a class position that is zero is dropped."""
    rest = dict(tensors)
    layout = marker
    if marker == "hf":
        layout = "vit" if any("layernorm_before" in name for name in tensors) else "dinov2"
    if marker == "dinov3_vit":
        rest = {re.sub(r"^model\.layer\.", "layer.", name): tensor for name, tensor in rest.items()}
    names, out = HF_NAMES[layout], _embeddings_from_hf(rest)
    depth = _hf_depth(rest, names.block)
    for timm_stem, hf_stem in _stems(names, depth, gated=any(".mlp.gate_proj." in name for name in rest)).items():
        for suffix in ("", ".weight", ".bias"):
            if hf_stem + suffix in rest:
                out[timm_stem + suffix] = rest.pop(hf_stem + suffix)
    for index in range(depth):
        for suffix in ("weight", "bias"):
            parts = [f"{names.block.format(index)}{stem}.{suffix}" for stem in names.qkv]
            if all(part in rest for part in parts):
                out[f"blocks.{index}.attn.qkv.{suffix}"] = torch.cat([rest.pop(part) for part in parts])
        if layout == "dinov3_vit":
            for bias, stem in (("q_bias", names.qkv[0]), ("v_bias", names.qkv[2])):
                if (value := rest.pop(f"{names.block.format(index)}{stem}.bias", None)) is not None:
                    out[f"blocks.{index}.attn.{bias}"] = value
    if layout == "dinov3_vit":
        return {**out, **rest}, layout
    out = _swiglu_from_hf(rest, out)
    if "cls_token" in out and ("reg_token" in out or not out["pos_embed"][:, 0].any()):
        out = fold_class_position(out, 1)
    return {**out, **rest}, "dinov2_with_registers" if "reg_token" in out else layout


def _embeddings_from_hf(rest: Tensors) -> Tensors:
    """Take tokens and positions out of `rest`."""
    rest.pop("embeddings.mask_token", None)
    rest.pop("embeddings.position_ids", None)
    places = {
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
    }
    out = {name: rest.pop(place) for name, place in places.items() if place in rest}
    out = {name: tensor for name, tensor in out.items() if tensor.numel()}  # DINOv3 writes no registers as (1, 0, D)
    if (table := rest.pop("embeddings.position_embedding.weight", None)) is not None:
        out["pos_embed"] = table.unsqueeze(0)
    return out


def _embeddings_to_hf(source: Tensors, layout: str) -> Tensors:
    """Take tokens and positions out of `source`."""
    if layout == "dinov3_vit":  # rotary positions: no table
        token = source.pop("cls_token")
        registers = source.pop("reg_token", token[:, :0])
        mask = torch.zeros_like(token)
        return {
            "embeddings.cls_token": token,
            "embeddings.register_tokens": registers,
            "embeddings.mask_token": mask,
        }
    table = source.pop("pos_embed")
    if layout == "siglip":
        return {"embeddings.position_embedding.weight": table[0]}
    out = {"embeddings.cls_token": source.pop("cls_token")}
    if layout == "dinov2_with_registers":
        out["embeddings.register_tokens"] = source.pop("reg_token")
    if num_prefix_positions({"pos_embed": table, "cls_token": out["embeddings.cls_token"]}) == 0:
        table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    out["embeddings.position_embeddings"] = table
    if layout != "vit":
        out["embeddings.mask_token"] = torch.zeros(1, table.shape[-1])
    return out


def _swiglu_from_hf(rest: Tensors, out: Tensors) -> Tensors:
    """DINOv2-giant's feed-forward layer."""
    for name in list(rest):
        if match := re.match(r"encoder\.layer\.(\d+)\.mlp\.weights_(in|out)\.(weight|bias)$", name):
            index, side, suffix = match.groups()
            out[f"blocks.{index}.mlp.{'fc1' if side == 'in' else 'fc2'}.{suffix}"] = rest.pop(name)
    return out


def _stems(names: HfNames, depth: int, gated: bool) -> dict[str, str]:
    """From timm stem to Hugging Face stem of everything that is renamed only."""
    stems = {"patch_embed.proj": names.patch_embed, "norm": names.norm}
    inner = {timm: hf for timm, hf in names.inner.items() if timm != "mlp.fc1"} | _GATED if gated else names.inner
    for index in range(depth):
        block = names.block.format(index)
        stems |= {f"blocks.{index}.{timm}": block + hf for timm, hf in inner.items()}
    return stems


def _hf_depth(names: Iterable[str], block: str) -> int:
    pattern = re.compile(re.escape(block).replace(r"\{\}", r"(\d+)"))
    return 1 + max((int(m.group(1)) for name in names if (m := pattern.match(name))), default=-1)
