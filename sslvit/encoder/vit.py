"""The encoder: timm's VisionTransformer (arXiv:2010.11929), never subclassed, and our one way of running it.

`forward_tokens` computes what timm's `forward_features` computes, and besides replaces masked patches (iBOT,
arXiv:2111.07832, section 3.1), encodes visible patches only (MAE, arXiv:2111.06377, section 3) and leaves out what is
not read. `forward_packed` does it for images of several sizes in one stream. Weights come from `weights.py`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import timm
import torch
from timm.layers import DropPath, resample_abs_pos_embed, trunc_normal_
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from sslvit.encoder.attention import (
    Backend,
    Shapes,
    attention_weights,
    check_backend,
    class_attention,
    first_tokens,
    join,
    self_attention,
)
from sslvit.encoder.config import EncoderConfig
from sslvit.errors import InputError

Encoder: TypeAlias = VisionTransformer | Eva
Paths: TypeAlias = tuple[Tensor | None, Tensor | None]  # factors (T, 1) of a block's two branches
VIT_MODULES = {"vision_transformer", "deit", "eva"}  # of timm.models


@dataclass(frozen=True)
class TokenInput:
    """One pass through the encoder.

    images: (B, C, H, W). mask: (B, N) bool, True = replaced by mask_token (1, 1, D). keep: (B, V) int64, the patches
    that are encoded at all. cls_only: nothing but `Tokens.cls` is read, so the last block computes nothing else.
    """

    images: Tensor
    mask: Tensor | None = None
    mask_token: Tensor | None = None
    keep: Tensor | None = None
    cls_only: bool = False


@dataclass(frozen=True)
class Tokens:
    """What came out: prefix (B, P, D), the class token first, then registers; patches (B, N or V, D).

    After a `cls_only` pass the prefix holds the class token alone and there are no patches.
    """

    prefix: Tensor
    patches: Tensor
    has_class_token: bool
    normed: bool

    @property
    def cls(self) -> Tensor:
        """(B, D): the class token, or the mean patch of an encoder without one."""
        return self.prefix[:, 0] if self.has_class_token else self.mean_patch

    @property
    def mean_patch(self) -> Tensor:
        """(B, D)."""
        return self.patches.mean(dim=1)

    @property
    def all(self) -> Tensor:
        """(B, P + N, D), in timm's order."""
        return torch.cat([self.prefix, self.patches], dim=1)


def model_args(config: EncoderConfig) -> dict[str, Any]:
    """The arguments `timm.create_model(config.name, ...)` takes for a resolved config. All are plain JSON values."""
    num_registers = config.num_registers or 0
    height, width = config.size
    args: dict[str, Any] = {
        "img_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "class_token": config.class_token,
        "global_pool": "token" if config.class_token else "avg",
        "fc_norm": False,  # the final norm comes before pooling, in both forms
        "reg_tokens": num_registers,
        "no_embed_class": True,
        "init_values": 1e-5 if config.init_values is None else config.init_values or None,
        "dynamic_img_size": True,
    }
    if config.act_layer is not None:
        args["act_layer"] = config.act_layer
    elif not config.class_token and num_registers == 0:
        args["act_layer"] = "gelu_tanh"  # the second form, so that it has an exact SigLIP twin
    if config.drop_path_rate:
        args["drop_path_rate"] = config.drop_path_rate
    for key in ("embed_dim", "depth", "num_heads"):
        if getattr(config, key) is not None:
            args[key] = getattr(config, key)
    return args


def create_encoder(config: EncoderConfig, further_args: Mapping[str, Any] | None = None) -> VisionTransformer:
    """A VisionTransformer with random weights (from torch's global generator) for a config without `auto` values.

    `further_args` of timm's are those that the config does not speak of.
    """
    assert config.name and config.patch_size and config.image_size and config.in_chans, "resolve the config first"
    assert config.num_registers is not None and config.class_token is not None, "resolve the config first"
    for key, side in zip(("image_size", "image_width"), config.size, strict=True):
        if side % config.patch_size:
            raise InputError(
                f"encoder.{key}={side} is not a multiple of encoder.patch_size={config.patch_size}; "
                f"take {side // config.patch_size * config.patch_size or config.patch_size}"
            )
    if config.embed_dim is not None and config.num_heads is not None and config.embed_dim % config.num_heads:
        raise InputError(
            f"encoder.embed_dim={config.embed_dim} is not a multiple of encoder.num_heads={config.num_heads}"
        )
    encoder = create_timm(config.name, {**(further_args or {}), **model_args(config)})
    if not isinstance(encoder, VisionTransformer):
        raise InputError(
            f"encoder.name={config.name}: only timm's VisionTransformer is pretrained; take vit_small_patch16_224"
        )
    if config.weight_init == "xavier":
        init_xavier(encoder)
    return encoder


@torch.no_grad()
def init_xavier(encoder: nn.Module) -> None:
    """Xavier-uniform linear maps and patch embedding, zero biases, sine-cosine positions (MAE, arXiv:2111.06377, A.1).

    timm's default, DINO's normal of std 0.02, is 2.5 times smaller at width 192: narrow encoders start slowly.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear | PatchEmbed):
            linear = module.proj if isinstance(module, PatchEmbed) else module
            nn.init.xavier_uniform_(linear.weight.flatten(1))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
    if isinstance(encoder, VisionTransformer) and encoder.no_embed_class and encoder.pos_embed is not None:
        encoder.pos_embed.copy_(sincos_positions(encoder.patch_embed.grid_size, encoder.embed_dim))


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (MAE, appendix A.1; Vaswani et al. 2017, section 3.5): (N, dim), row-major.

    Half of the channels encode the column, half the row; wavelengths from 2 pi to 10000 * 2 pi.
    """
    assert dim % 4 == 0, f"decoder width {dim} must be a multiple of 4"
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def create_timm(name: str, args: dict[str, Any]) -> Encoder:
    """`timm.create_model(name, num_classes=0, **args)` without released weights; InputError for what is no ViT."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(["vit_*", "eva*"]), n=1)
        raise InputError(f"timm has no model named {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if not timm.models.is_model_in_modules(name, VIT_MODULES):
        raise InputError(f"{name!r} is no timm VisionTransformer or Eva; choose a vit_* or eva* model")
    try:
        encoder = timm.create_model(name, pretrained=False, num_classes=0, **args)
    except (TypeError, AssertionError) as error:
        raise InputError(f"timm cannot build {name!r} with {args}: {error}") from error
    check_encoder(encoder)
    if encoder.no_embed_class:
        _init_prefix(encoder)
    return encoder


def is_vit(name: str) -> bool:
    """Whether timm's model of this name is one that `forward_tokens` runs."""
    return timm.models.is_model_in_modules(name, VIT_MODULES) and "distilled" not in name


def create_pooled(name: str, args: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """Any model of timm without its classifier; InputError for arguments it does not take."""
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **args)
    except (TypeError, AssertionError) as error:
        raise InputError(f"timm cannot build {name!r} with {dict(args)}: {error}") from error


def check_encoder(encoder: nn.Module) -> None:
    """Raise InputError for a module `forward_tokens` cannot run exactly."""
    if (reason := _why_pooled(encoder)) is not None:
        raise InputError(reason)


def is_pooled(module: nn.Module) -> bool:
    """Whether this model of timm is no ViT as `forward_tokens` runs it: all it says is one vector for the image."""
    return _why_pooled(module) is not None


def _why_pooled(module: nn.Module) -> str | None:
    name = type(module).__name__
    if not isinstance(module, VisionTransformer | Eva):
        return f"{name} is no timm VisionTransformer or Eva; choose a vit_* or eva* model"
    if getattr(module, "dist_token", None) is not None:
        return f"{name} has a distillation token, which is not supported; choose a plain vit_* model"
    if type(module.patch_embed) is not PatchEmbed:
        return f"{name} with {type(module.patch_embed).__name__} (hybrid stem) is not supported"
    return None


def forward_pooled(module: nn.Module, images: Tensor) -> Tokens:
    """The features before the classifier of any timm model, made with `num_classes=0`, as an only patch (B, 1, D)."""
    try:
        pooled = module(images)
    except (AssertionError, RuntimeError) as error:
        if "memory" in str(error):
            raise
        height, width = _size(images)
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InputError(f"{type(module).__name__} takes no images of {height}x{width} ({reason})") from error
    if not isinstance(pooled, Tensor) or pooled.ndim != 2:
        raise InputError(f"{type(module).__name__} gives no vector for an image; choose another model of timm")
    return Tokens(pooled[:, None, :0], pooled[:, None], has_class_token=False, normed=True)


def patch_size(encoder: Encoder) -> tuple[int, int]:
    """(height, width) of a patch in pixels."""
    return encoder.patch_embed.patch_size


def patch_grid(encoder: Encoder, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of an image of `size` (H, W) in pixels."""
    (height, width), (rows, columns) = size, patch_size(encoder)
    if height % rows or width % columns:
        raise InputError(f"image size {height}x{width} is not a multiple of the patch size {rows}x{columns}")
    return height // rows, width // columns


def num_patches(encoder: Encoder, size: tuple[int, int]) -> int:
    """How many patches an image of `size` (H, W) in pixels has."""
    rows, columns = patch_grid(encoder, size)
    return rows * columns


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) to (B, N, p * p * C), channels last within a patch, as MAE orders them."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    tiles = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches: Tensor, patch_size: int, size: tuple[int, int], channels: int) -> Tensor:
    """The inverse of `patchify`: (B, N, p * p * C) to (B, C, H, W) with `size` = (H, W)."""
    rows, columns = size[0] // patch_size, size[1] // patch_size
    tiles = patches.reshape(patches.shape[0], rows, columns, patch_size, patch_size, channels)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], channels, *size)


def forward_tokens(
    encoder: Encoder,
    images: Tensor,
    *,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    keep: Tensor | None = None,
    cls_only: bool = False,
    norm: bool = True,
) -> Tokens:
    """Run the encoder on `images (B, C, H, W)`; see `TokenInput` for the options.

    Equal to timm's `forward_features` when nothing but `images` is given. `norm=False` leaves the final norm out.
    """
    return forward_packed(encoder, [TokenInput(images, mask, mask_token, keep, cls_only)], norm=norm)[0]


def forward_packed(
    encoder: Encoder,
    inputs: Sequence[TokenInput],
    *,
    norm: bool = True,
    backend: Backend = "auto",
    compiled: bool = False,
) -> list[Tokens]:
    """`forward_tokens` for several inputs, perhaps of several sizes, in one stream through norms, linears and MLPs.

    Attention stays within each image. Equal to separate calls to float error (drop path draws in the order of inputs).
    `compiled` runs each block through torch.compile, once per shape of the stream and not per block.
    """
    check_backend(backend, inputs[0].images.device)
    groups = [_embed(encoder, item) for item in inputs]
    has_class = encoder.cls_token is not None
    only = [item.cls_only and has_class for item in inputs]
    last = len(encoder.blocks) - 1
    sequences, ropes = [x for x, _ in groups], [rope for _, rope in groups]
    if not all(map(_is_walkable, encoder.blocks)):
        outputs = _run_whole_blocks(encoder, sequences, ropes)
        outputs = [x[:, :1] if cls else x for x, cls in zip(outputs, only, strict=True)]
    else:
        stream, shapes = _pack(sequences)
        for block in encoder.blocks[:last]:
            paths = _draw_paths(block, stream, shapes)
            stream = _run(encoder, _maybe_compiled(_block, compiled), block, stream, shapes, backend, paths)
        outputs = _last_block(encoder, stream, shapes, only, backend, compiled)
    return [_tokens(encoder, x, norm, cls) for x, cls in zip(_norm(encoder, outputs, norm), only, strict=True)]


def forward_layers(encoder: Encoder, images: Tensor, num_blocks: int) -> list[Tokens]:
    """Tokens after each of the last `num_blocks` blocks, the last block last, each through the final norm.

    DINO's `get_intermediate_layers`. `images (B, C, H, W)`.
    """
    depth = len(encoder.blocks)
    if not 1 <= num_blocks <= depth:
        raise InputError(f"num_blocks={num_blocks}: the encoder has {depth} blocks")
    x, rope = _embed(encoder, TokenInput(images))
    layers = []
    for index, block in enumerate(encoder.blocks):
        x = _run(encoder, forward_block, block, x, _rope_of_block(encoder, rope, index))
        if index >= depth - num_blocks:
            layers.append(_tokens(encoder, encoder.norm(x), True, False))
    return layers


def class_attention_maps(encoder: Encoder, images: Tensor) -> Tensor:
    """How much the class token of the last block attends to each patch: (B, heads, rows, columns), for looking at.

    Without a class token: the attention of all patches, averaged. Plain `VisionTransformer` blocks only.
    """
    block = encoder.blocks[-1]
    if not _is_walkable(block):
        raise InputError(f"{type(encoder).__name__}: attention maps are shown for plain ViT blocks only")
    x, rope = _embed(encoder, TokenInput(images))
    for index, earlier in enumerate(encoder.blocks[:-1]):
        x = forward_block(earlier, x, _rope_of_block(encoder, rope, index))
    weights = attention_weights(block.attn, block.norm1(x))
    rows = weights[:, :, 0] if encoder.cls_token is not None else weights.mean(dim=2)
    return rows[..., encoder.num_prefix_tokens :].unflatten(-1, patch_grid(encoder, _size(images)))


def _init_prefix(encoder: Encoder) -> None:
    """Start class token and registers at 0.02, where a position of their own would put them.

    timm starts them at 1e-6. Without a position to add, that is far below the norms' epsilon of 1e-6 (a variance): what
    leaves the final norm is then 1e-3 instead of 1, and gradients of the class token are 1e4 instead of 1.
    """
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            trunc_normal_(token, std=0.02)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _embed(encoder: Encoder, item: TokenInput) -> tuple[Tensor, Tensor | None]:
    """Patches, mask tokens, positions, prefix: (B, P + V, D), and the rotary embedding of the V patches, if any."""
    if encoder.training and isinstance(patch_drop := getattr(encoder, "patch_drop", None), nn.Module):
        assert isinstance(patch_drop, nn.Identity), "patch dropout: pass keep=... instead"
    grid = patch_grid(encoder, _size(item.images))
    prefix_positions, positions = _positions(encoder, grid)
    rope = None if getattr(encoder, "rope", None) is None else encoder.rope.get_embed(shape=grid)
    x = _embed_patches(encoder.patch_embed, item.images, grid, item.keep)
    if item.mask is not None:
        assert item.mask_token is not None, "a mask needs a mask_token"
        mask = item.mask if item.keep is None else item.mask.gather(1, item.keep)
        x = torch.where(mask.unsqueeze(-1), item.mask_token.to(x.dtype), x)
    if positions is not None:
        # A lookup: the backward pass of positions[0][keep] adds with atomics, in another order each time.
        x = x + (positions if item.keep is None else embedding(item.keep, positions[0]))
    x = torch.cat([*_prefix(encoder, prefix_positions, len(x)), x], dim=1)
    if rope is not None and item.keep is not None:
        rope = _keep_rope(rope, item.keep)
    return encoder.norm_pre(encoder.pos_drop(x)), rope


def _embed_patches(embed: PatchEmbed, images: Tensor, grid: tuple[int, int], keep: Tensor | None) -> Tensor:
    """`patch_embed` as a linear map of the patches (all, or those in `keep (B, V)`): (B, N or V, D)."""
    batch, channels = images.shape[:2]
    (rows, columns), (height, width) = grid, embed.patch_size
    tiles = images.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    if keep is not None:
        images_index = torch.arange(batch, device=images.device).unsqueeze(1)
        tiles = tiles[images_index, keep // columns, keep % columns]
    weight = embed.proj.weight.flatten(1)
    flat = tiles.reshape(batch, -1, weight.shape[1])
    return embed.norm(linear(flat, weight, embed.proj.bias))


def _positions(encoder: Encoder, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Position embeddings of the prefix (1, P, D) and of the patches (1, N, D), resampled to `grid` where needed."""
    table = encoder.pos_embed
    if table is None:
        return None, None
    num_prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    if grid != encoder.patch_embed.grid_size:
        table = resample_abs_pos_embed(table, grid, encoder.patch_embed.grid_size, num_prefix_tokens=num_prefix)
    return (table[:, :num_prefix] if num_prefix else None), table[:, num_prefix:]


def _prefix(encoder: Encoder, positions: Tensor | None, batch: int) -> list[Tensor]:
    """[(B, P, D)]: class token and registers, with their positions where they have any; empty without a prefix."""
    tokens = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    if not tokens:
        return []
    prefix = torch.cat(tokens, dim=1)
    prefix = prefix if positions is None else prefix + positions
    return [prefix.expand(batch, -1, -1)]


def _keep_rope(rope: Tensor, keep: Tensor) -> Tensor:
    """Rotary embeddings of the kept patches: (N, d) to (B, 1, V, d), or (L, heads, N, d) to (L, B, heads, V, d)."""
    if rope.ndim == 2:
        return rope[keep].unsqueeze(1)
    return rope[:, :, keep].transpose(1, 2)


def _rope_of_block(encoder: Encoder, rope: Tensor | None, index: int) -> Tensor | None:
    return rope[index] if rope is not None and getattr(encoder, "rope_mixed", False) else rope


def _is_walkable(block: nn.Module) -> bool:
    """Whether `_block` computes what the block's own forward computes."""
    return type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None


def _pack(sequences: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """[(B, N, D), ...] to the stream (T, D) and its shapes."""
    return join([x.flatten(0, 1) for x in sequences]), [(x.shape[0], x.shape[1]) for x in sequences]


def _unpack(stream: Tensor, shapes: Shapes) -> list[Tensor]:
    parts = stream.split([batch * length for batch, length in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _run(encoder: Encoder, function: Any, *inputs: Any) -> Any:
    """Call, recomputing in the backward pass instead of storing when gradient checkpointing is on."""
    if encoder.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def _maybe_compiled(function: Any, compiled: bool) -> Any:
    return _compiled(function) if compiled else function


@functools.cache
def _compiled(function: Any) -> Any:
    """`function` of a block through torch.compile; one graph serves all blocks of a shape, their weights are inputs."""
    return torch.compile(function, dynamic=False)


def _block(block: Block, x: Tensor, shapes: Shapes, backend: Backend, paths: Paths) -> Tensor:
    """`Block.forward` of timm on a stream (T, D)."""
    x = x + _scaled(block.ls1(self_attention(block.attn, block.norm1(x), shapes, backend)), paths[0])
    return x + _scaled(block.ls2(block.mlp(block.norm2(x))), paths[1])


def _class_block(block: Block, x: Tensor, shapes: Shapes, paths: Paths) -> Tensor:
    """`_block` for the first token of each sequence alone: (T, D) to (sum of B, D)."""
    mixed = class_attention(block.attn, block.norm1(x), shapes)
    x = first_tokens(x, shapes) + _scaled(block.ls1(mixed), paths[0])
    return x + _scaled(block.ls2(block.mlp(block.norm2(x))), paths[1])


def _last_block(
    encoder: Encoder, stream: Tensor, shapes: Shapes, only: list[bool], backend: Backend, compiled: bool
) -> list[Tensor]:
    """The last block: whole sequences (B, N, D), and (B, 1, D) for groups of which only the class token is read."""
    block = encoder.blocks[-1]
    parts = _unpack(stream, shapes)
    outputs: dict[int, Tensor] = {}
    if whole := [i for i, cls in enumerate(only) if not cls]:
        x, sizes = (stream, list(shapes)) if len(whole) == len(parts) else _pack([parts[i] for i in whole])
        paths = _draw_paths(block, x, sizes)
        x = _run(encoder, _maybe_compiled(_block, compiled), block, x, sizes, backend, paths)
        outputs.update(zip(whole, _unpack(x, sizes), strict=True))
    if firsts := [i for i, cls in enumerate(only) if cls]:
        x, sizes = (stream, list(shapes)) if len(firsts) == len(parts) else _pack([parts[i] for i in firsts])
        alone = [(batch, 1) for batch, _ in sizes]
        paths = _draw_paths(block, x, alone)
        x = _run(encoder, _maybe_compiled(_class_block, compiled), block, x, sizes, paths)
        outputs.update(zip(firsts, _unpack(x, alone), strict=True))
    return [outputs[i] for i in range(len(parts))]


def _draw_paths(block: Block, x: Tensor, shapes: Shapes) -> Paths:
    """Stochastic depth of a block's two branches; drawn outside of what is compiled, so that draws are the same."""
    return _draw_path(block.drop_path1, x, shapes), _draw_path(block.drop_path2, x, shapes)


def _draw_path(module: nn.Module, x: Tensor, shapes: Shapes) -> Tensor | None:
    """Stochastic depth (arXiv:1603.09382) per sequence of a stream, timm's draws: factors (T, 1), None to keep all."""
    if not isinstance(module, DropPath) or not module.training or not module.drop_prob:
        return None
    keep_prob = 1 - module.drop_prob
    draws = [x.new_empty(batch, 1, 1).bernoulli_(keep_prob).expand(batch, length, 1) for batch, length in shapes]
    factors = join([draw.reshape(-1, 1) for draw in draws])
    return factors / keep_prob if module.scale_by_keep else factors


def _scaled(x: Tensor, factors: Tensor | None) -> Tensor:
    return x if factors is None else x * factors


def forward_block(block: nn.Module, x: Tensor, rope: Tensor | None = None, *, compiled: bool = False) -> Tensor:
    """What `block(x)` computes on (B, N, D), for a block of any kind, with the attention that is fastest here."""
    if _is_walkable(block):
        stream, shapes = x.flatten(0, 1), [(x.shape[0], x.shape[1])]
        paths = _draw_paths(block, stream, shapes)
        return _maybe_compiled(_block, compiled)(block, stream, shapes, "auto", paths).view_as(x)
    return block(x) if rope is None else block(x, rope=rope)


def _run_whole_blocks(encoder: Encoder, groups: list[Tensor], ropes: list[Tensor | None]) -> list[Tensor]:
    """Each group (B, N, D) through blocks of any kind by their own forward (RoPE, post-norm, parallel...)."""
    outputs = []
    for x, rope in zip(groups, ropes, strict=True):
        for index, block in enumerate(encoder.blocks):
            x = _run(encoder, forward_block, block, x, _rope_of_block(encoder, rope, index))
        outputs.append(x)
    return outputs


def _norm(encoder: Encoder, groups: list[Tensor], norm: bool) -> list[Tensor]:
    if not norm:
        return groups
    stream, shapes = _pack(groups)
    return _unpack(encoder.norm(stream), shapes)


def _tokens(encoder: Encoder, x: Tensor, normed: bool, cls_only: bool) -> Tokens:
    num_prefix = 1 if cls_only else encoder.num_prefix_tokens
    return Tokens(x[:, :num_prefix], x[:, num_prefix:], encoder.cls_token is not None, normed)
