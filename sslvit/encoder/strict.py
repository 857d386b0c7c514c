"""Put foreign weights into an encoder, strictly: what matched, what did not, and what had to change shape is reported.

Under 95% matched (by parameter count) is an error. Changes that keep the function: a missing LayerScale becomes ones,
a superfluous one is multiplied in, class positions are added to the class token. Changes that do not: positions are
resampled (bicubic), patches resized (FlexiViT, arXiv:2212.08013), channels summed or repeated (as timm does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from sslvit.encoder.layouts import Tensors, fold_class_position, fold_layer_scale, num_prefix_positions, to_timm
from sslvit.encoder.vit import Encoder
from sslvit.errors import InputError

MATCHED_AT_LEAST = 0.95


@dataclass(frozen=True)
class ImportReport:
    """Names of tensors, timm's. `reshaped` tells what was changed and how; those tensors are matched as well.

    `share` is the matched part of all parameters the encoder and the checkpoint's encoder have between them.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    ignored: list[str] = field(default_factory=list)  # heads, decoders, mask tokens
    layout: str = "timm"
    share: float = 1.0

    @property
    def exact(self) -> bool:
        """Whether every tensor found its place as it was: nothing to tell."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        lines = [
            f"weights ({self.layout}): {len(self.matched)} tensors matched ({self.share:.1%} of the parameters), "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, {len(self.reshaped)} reshaped"
        ]
        for word in ("missing", "unexpected", "reshaped"):
            if names := getattr(self, word):
                lines.append(f"  {word}: {_some(names)}")
        return "\n".join(lines)


def import_weights(
    encoder: Encoder,
    tensors: Mapping[str, Tensor],
    *,
    prefer: str = "teacher",
    grid: tuple[int, int] | None = None,
) -> ImportReport:
    """Load `tensors` of any layout `layouts.to_timm` knows into `encoder`. InputError under 95% matched.

    `grid` (rows, columns) is that of the positions in `tensors`, where it is known; else that of `encoder` or a square.
    """
    state = encoder.state_dict()
    source = to_timm(tensors, prefer, wanted=state)
    given, reshaped = _adapted(source.tensors, encoder, state, grid)
    matched = [name for name in state if name in given and given[name].shape == state[name].shape]
    missing = [name for name in state if name not in matched]
    unexpected = [name for name in given if name not in matched]
    numel = {"matched": _count(state, matched), "missing": _count(state, missing), "other": _count(given, unexpected)}
    share = numel["matched"] / max(1, sum(numel.values()))
    report = ImportReport(matched, missing, unexpected, reshaped, source.ignored, source.layout, share)
    if share < MATCHED_AT_LEAST:
        raise InputError(
            f"only {share:.1%} of the parameters match; missing: {_some(_shapes(missing, state))}; "
            f"unexpected: {_some(_shapes(unexpected, given))}; choose an encoder of the same width, depth and kind"
        )
    encoder.load_state_dict({name: given[name] for name in matched}, strict=False)
    return report


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Patch embedding (D, C, p, p) for another number of channels: their sum for one, else repeated and rescaled."""
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(in_chans / channels), 1, 1)[:, :in_chans]
    return repeated * (channels / in_chans)


def _adapted(
    source: Tensors, encoder: Encoder, state: Mapping[str, Tensor], grid: tuple[int, int] | None
) -> tuple[Tensors, list[str]]:
    """`source` brought to the shapes of `encoder` where that is possible, and what was done, in words."""
    out, notes = _adapt_positions(source, encoder, state, grid)
    for step in (_adapt_layer_scale, _adapt_patches, _adapt_bias, _adapt_final_norm):
        out, said = step(out, state)
        notes += said
    return out, notes


def _adapt_layer_scale(source: Tensors, state: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    wanted = [name for name in state if name.endswith((".ls1.gamma", ".ls2.gamma"))]
    given = any(name.endswith(".ls1.gamma") for name in source)
    if given and not wanted:
        return fold_layer_scale(source), ["LayerScale: multiplied into the linear maps"]
    if wanted and not given and not any(name.endswith(".gamma_1") for name in source):
        return source | {name: torch.ones_like(state[name]) for name in wanted}, ["LayerScale: ones (there was none)"]
    return source, []


def _adapt_positions(
    source: Tensors, encoder: Encoder, state: Mapping[str, Tensor], given: tuple[int, int] | None
) -> tuple[Tensors, list[str]]:
    if "pos_embed" not in source or "pos_embed" not in state:
        return source, []
    out, notes, grid = dict(source), [], encoder.patch_embed.grid_size
    have = num_prefix_positions(source, given or grid)
    wanted = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    if have and not wanted:
        out = fold_class_position(out, have)
        notes.append("pos_embed: class position added to cls_token")
    prefix, table = out["pos_embed"][:, : min(have, wanted)], out["pos_embed"][:, min(have, wanted) :]
    if wanted > have:
        prefix = torch.cat([prefix, table.new_zeros(1, wanted - have, table.shape[-1])], dim=1)
        notes.append("pos_embed: zeros for class token and registers")
    rows, columns = given or _grid_of(table.shape[1], grid)
    if (rows, columns) != tuple(grid):
        table = resample_abs_pos_embed(table, list(grid), [rows, columns], num_prefix_tokens=0)
        notes.append(f"pos_embed: {rows}x{columns} to {grid[0]}x{grid[1]}")
    out["pos_embed"] = torch.cat([prefix, table], dim=1)
    return out, notes


def _adapt_patches(source: Tensors, state: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    name = "patch_embed.proj.weight"
    weight, target, notes = source[name], state[name], []
    if weight.shape[1] != target.shape[1]:
        notes.append(f"{name}: {weight.shape[1]} to {target.shape[1]} channels")
        weight = adapt_channels(weight, target.shape[1])
    if weight.shape[2:] != target.shape[2:]:
        notes.append(f"{name}: patch {tuple(weight.shape[2:])} to {tuple(target.shape[2:])}")
        weight = resample_patch_embed(weight, list(target.shape[2:]))
    return source | {name: weight}, notes


def _adapt_bias(source: Tensors, state: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    """A bias the source was trained without is zero."""
    linear = (".attn.qkv.bias", ".attn.proj.bias", ".mlp.fc1.bias", ".mlp.fc2.bias")
    absent = [
        n for n in state if n.endswith(linear) and n not in source and n.removesuffix("bias") + "weight" in source
    ]
    return source | {n: torch.zeros_like(state[n]) for n in absent}, [f"{n}: zeros (there was none)" for n in absent]


def _adapt_final_norm(source: Tensors, state: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    """The norm after pooling of a source that has no other becomes the norm before it."""
    if "fc_norm.weight" not in source or "norm.weight" in source or "fc_norm.weight" in state:
        return source, []
    moved = {
        name.replace("fc_norm.", "norm.") if name.startswith("fc_norm.") else name: t for name, t in source.items()
    }
    return moved, ["fc_norm: is the final norm now, before pooling instead of after it"]


def _grid_of(count: int, grid: tuple[int, int]) -> tuple[int, int]:
    """That of the encoder where the number of positions agrees, else a square."""
    return grid if count == grid[0] * grid[1] else (math.isqrt(count), math.isqrt(count))


def _count(tensors: Mapping[str, Tensor], names: list[str]) -> int:
    return sum(tensors[name].numel() for name in names)


def _shapes(names: list[str], tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} {tuple(tensors[name].shape)}" for name in names]


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)})" if len(names) > limit else "") if names else "none"
