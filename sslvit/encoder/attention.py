"""Which attention kernel runs where. The only file that knows there are several, and the only one that knows xformers.

A stream `(T, D)` holds the tokens of one or several groups of sequences, one after the other; `shapes` says how:
`[(B, N), ...]`, sequences and tokens of each group. Tokens attend within their own sequence only.

Scaled dot-product attention (arXiv:1706.03762, section 3.2.1) is torch's fused kernel, with one exception: in bfloat16
on a CPU its backward pass is slow, and without AMX its forward pass too; softmax(q k^T) v written out is faster while
there are not too many scores.

`auto`, which is all that training asks for, means one call for each group, on every device. Kernels that take all
groups in one call, torch's varlen and xformers' block-diagonal mask, are there for `forward_packed(backend=...)` and
for benchmarks/attention.py, which times them beside the others: none has been measured to be faster for the two or
three sizes of crops there are, so no setting of a run chooses them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from sslvit.errors import InputError

Backend = Literal["auto", "grouped", "varlen", "xformers"]
Shapes = Sequence[tuple[int, int]]

EXPLICIT_MAX_TOKENS = 800  # above it the N x N scores cost more memory than the fused backward costs time
EXPLICIT_MAX_SCORES = 2**27  # of all images and heads together, where no backward pass needs them: 256 MB


def prefers_explicit(query: Tensor, key: Tensor) -> bool:
    """Whether softmax(q k^T) v written out beats the fused kernel: CPU, bfloat16, short sequences.

    Without gradients only where the fused forward pass cannot use AMX.
    """
    short = key.shape[-2] <= EXPLICIT_MAX_TOKENS
    if query.device.type != "cpu" or query.dtype is not torch.bfloat16 or not short:
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return True
    return not _has_amx() and query.shape[:-1].numel() * key.shape[-2] <= EXPLICIT_MAX_SCORES


@functools.cache
def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, dropout_prob: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, written out. Shapes as in `attend`.

    The softmax kernel computes in fp32 and rounds once, to the type of its input; gradients are as close to the exact
    ones as with fp32 weights (the rounding of the scores dominates), in a third less time.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return F.dropout(scores.softmax(dim=-1), dropout_prob) @ value


def attend(query: Tensor, key: Tensor, value: Tensor, dropout_prob: float = 0.0) -> Tensor:
    """Attention of `query (B, heads, Nq, d)` over `key` and `value (B, heads, N, d)`, to `(B, heads, Nq, d)`."""
    if prefers_explicit(query, key):
        return explicit_attention(query, key, value, dropout_prob)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_prob)


def self_attention(module: Attention, x: Tensor, shapes: Shapes, backend: Backend = "auto") -> Tensor:
    """What timm's `Attention` computes, on a stream `(T, D)` of groups `shapes`, to `(T, D)`."""
    qkv = module.qkv(x)
    if backend == "varlen":
        mixed = _varlen(module, qkv, shapes)
    elif backend == "xformers":
        mixed = _xformers(module, qkv, shapes)
    else:
        groups = qkv.split([batch * length for batch, length in shapes])
        mixed = join([_group(module, group, shape) for group, shape in zip(groups, shapes, strict=True)])
    return module.proj_drop(module.proj(module.norm(mixed)))


def class_attention(module: Attention, x: Tensor, shapes: Shapes) -> Tensor:
    """`self_attention` for the first token of each sequence alone: stream `(T, D)` to `(sum of B, D)`."""
    queries = module.q_norm(_heads(_linear_rows(module.qkv, first_tokens(x, shapes), 0, 1), module.num_heads))
    keys_values = _linear_rows(module.qkv, x, 1, 3)
    mixed, start = [], 0
    for part, (batch, length) in zip(keys_values.split([b * n for b, n in shapes]), shapes, strict=True):
        key, value = _split_heads(part, batch, length, 2, module.num_heads).unbind(0)
        query = queries[start : start + batch].unsqueeze(2)
        mixed.append(attend(query, module.k_norm(key), value, _dropout(module)).flatten(1))
        start += batch
    return module.proj_drop(module.proj(module.norm(join(mixed))))


def attention_weights(module: Attention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of timm's `Attention` on `x (B, N, D)`: `(B, heads, N, N)`, in fp32, for looking at."""
    query, key, _ = _split_heads(module.qkv(x), x.shape[0], x.shape[1], 3, module.num_heads).unbind(0)
    scores = module.q_norm(query).float() @ module.k_norm(key).float().transpose(-2, -1)
    return (scores * query.shape[-1] ** -0.5).softmax(dim=-1)


def first_tokens(x: Tensor, shapes: Shapes) -> Tensor:
    """The first token of every sequence of a stream `(T, D)`: `(sum of B, D)`."""
    groups = x.split([batch * length for batch, length in shapes])
    return join([group[::length] for group, (_, length) in zip(groups, shapes, strict=True)])


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension; a single part is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def check_backend(backend: str, device: torch.device) -> None:
    """Raise InputError in one line when `backend` cannot run on `device`."""
    if backend in ("auto", "grouped"):
        return
    if backend not in ("varlen", "xformers"):
        raise InputError(f"attention backend {backend!r} is unknown; choose auto, grouped, varlen or xformers")
    if device.type != "cuda":
        raise InputError(f"attention backend {backend!r} needs a CUDA device, not {device}; use auto")
    if importlib.util.find_spec("xformers" if backend == "xformers" else "torch.nn.attention.varlen") is None:
        raise InputError(f"attention backend {backend!r} is not installed here; use auto")


def _group(module: Attention, qkv: Tensor, shape: tuple[int, int]) -> Tensor:
    batch, length = shape
    heads = _split_heads(qkv, batch, length, 3, module.num_heads)
    if prefers_explicit(heads[0], heads[1]):
        heads = heads.contiguous()  # at once, where each product would copy what it reads
    query, key, value = heads.unbind(0)
    mixed = attend(module.q_norm(query), module.k_norm(key), value, _dropout(module))
    return mixed.transpose(1, 2).reshape(batch * length, -1)


def _split_heads(x: Tensor, batch: int, length: int, parts: int, num_heads: int) -> Tensor:
    """`(B * N, parts * D)` to `(parts, B, heads, N, d)`."""
    return x.reshape(batch, length, parts, num_heads, -1).permute(2, 0, 3, 1, 4)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1))


def _linear_rows(qkv: nn.Module, x: Tensor, start: int, stop: int) -> Tensor:
    """Thirds `start` to `stop` of the fused projection of `x (T, D)`, computed alone where it is a bare Linear."""
    if type(qkv) is not nn.Linear:
        third = (full := qkv(x)).shape[-1] // 3
        return full[..., start * third : stop * third]
    third = qkv.out_features // 3
    rows = slice(start * third, stop * third)
    return F.linear(x, qkv.weight[rows], None if qkv.bias is None else qkv.bias[rows])


def _dropout(module: Attention) -> float:
    return module.attn_drop.p if module.training else 0.0


def _varlen(module: Attention, qkv: Tensor, shapes: Shapes) -> Tensor:
    """All groups in one call of torch's variable-length kernel (CUDA, 16 bit, no dropout)."""
    from torch.nn.attention.varlen import varlen_attn

    assert _dropout(module) == 0.0, "the variable-length kernel has no dropout"
    lengths = [length for batch, length in shapes for _ in range(batch)]
    ends = torch.tensor([0, *lengths], device=qkv.device).cumsum(0).to(torch.int32)
    query, key, value = qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    query, key = module.q_norm(query), module.k_norm(key)
    mixed = varlen_attn(query, key, value, ends, ends, max(lengths), max(lengths))
    assert isinstance(mixed, Tensor)
    return mixed.flatten(1)


def _xformers(module: Attention, qkv: Tensor, shapes: Shapes) -> Tensor:
    """All groups in one call under xformers' block-diagonal mask, as DINOv2 does it."""
    import xformers.ops as xops

    lengths = [length for batch, length in shapes for _ in range(batch)]
    mask = xops.fmha.BlockDiagonalMask.from_seqlens(lengths)
    query, key, value = qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    query, key = module.q_norm(query), module.k_norm(key)
    parts = (query[None], key[None], value[None])
    return xops.memory_efficient_attention(*parts, attn_bias=mask, p=_dropout(module))[0].flatten(1)
