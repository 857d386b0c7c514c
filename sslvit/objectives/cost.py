"""What a pretraining step costs, from the config alone: parameters, bytes, FLOPs. Imports no torch.

Counts what `forward_packed`, the heads and the decoder do, pass by pass, as `Pretraining.forward` gathers them. A
multiply-add is two FLOPs; norms, softmax and other elementwise work are left out, as in the published counts
(arXiv:2001.08361, section 2.1; attention as in arXiv:2204.02311, appendix B). docs/scaling.md has the same arithmetic
by hand; tests compare it with what small models measure.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sslvit.config import PretrainConfig
from sslvit.objectives.config import DinoConfig, IbotConfig
from sslvit.objectives.distilled import Teacher, teacher_named
from sslvit.objectives.sizes import SIZES, Size, encoder_parameters

STATE_BYTES = 16  # fp32 weight, gradient and two moments of AdamW (arXiv:1910.02054, section 3.1)
SAVED_BYTES = 12  # what a checkpoint holds of a trained parameter: without the gradient


@dataclass(frozen=True)
class Run:
    """One encoder over `views` crops of each image. patches: how many it encodes; whole: the last block in full."""

    teacher: bool
    views: int
    patches: int
    whole: bool


@dataclass(frozen=True)
class Cost:
    """A configuration in numbers. Bytes and FLOPs are of one image of the batch where it says so."""

    student: int  # parameters that are trained, heads and decoder included
    encoder: int  # parameters of one encoder
    teacher: int  # parameters that follow
    frozen: int  # parameters of a distilled teacher: on every device whole, in no checkpoint
    cast: int  # parameters of matrices, which bf16 training keeps a copy of
    flops_per_image: float  # forward and backward, of one optimizer step
    activation_bytes_per_image: float  # kept from forward to backward
    crop_bytes_per_image: float  # pixels on the device

    @property
    def checkpoint_bytes(self) -> int:
        """On disk, and in host memory while it is written."""
        return SAVED_BYTES * self.student + 4 * self.teacher

    def state_bytes(self, bf16: bool, shards: int = 1) -> float:
        """Weights, gradients, moments and teacher on each of `shards` devices that share them (1: each has all).

        The peak is that of a step: a save gathers one tensor at a time, when nothing else is gathered.
        """
        held = (STATE_BYTES * self.student + 4 * self.teacher) / shards + 4 * self.frozen
        gathered = 2 * self.teacher + 2 * (self.student if shards > 1 else self.cast)
        return held + (gathered if bf16 else 2 * gathered if shards > 1 else 0)


def cost(config: PretrainConfig, teacher: Teacher | None = None) -> Cost | None:
    """The cost of a resolved config; None when the sizes of an encoder are not known here.

    `teacher` is the one that is distilled, if it was opened; else its name or folder may tell.
    """
    size = size_of(config)
    if config.teacher is None:
        teacher = None
    elif teacher is None:
        teacher = teacher_named(config.teacher)
    if size is None or (config.teacher is not None and teacher is None):
        return None
    judge = size if teacher is None else teacher.size  # of whose width the heads are
    runs = runs_of(config, size, judge)
    adapter = 0 if teacher is None else (size.dim + 1) * judge.dim
    followed = config.dino is not None or config.ibot is not None
    own = None if config.ibot is not None and config.ibot.shared_head else config.ibot
    head_parameters = sum(_head_parameters(head, judge.dim) for head in (config.dino, own) if head is not None)
    encoder = encoder_parameters(size, config.encoder.size)
    decoder, decoder_cast = _decoder_parameters(config, size)
    mask_token = size.dim if config.ibot is not None else 0
    matrices = size.depth * (4 * size.dim**2 + 2 * size.dim * size.hidden) + size.patch**2 * size.channels * size.dim
    return Cost(
        student=encoder + head_parameters + decoder + mask_token + adapter,
        encoder=encoder,
        teacher=encoder + head_parameters if followed else 0,
        frozen=0 if teacher is None else teacher.parameters,
        cast=matrices + head_parameters + decoder_cast + adapter,
        flops_per_image=sum(_flops(run, judge if run.teacher else size) for run in runs)
        + _objective_flops(config, size, judge.dim)
        + (0 if teacher is None else _adapter_flops(size, judge.dim, runs)),
        activation_bytes_per_image=_activations(config, size, judge.dim, runs),
        crop_bytes_per_image=4 * size.channels * _pixels(config),
    )


def clean_flops(config: PretrainConfig) -> float:
    """FLOPs of encoding one whole image, as an evaluation does, for a config whose `cost` is known."""
    size = size_of(config)
    assert size is not None
    return _flops(Run(True, 1, size.patches(config.encoder.size), True), size)


def size_of(config: PretrainConfig) -> Size | None:
    """From the timm name; given numbers win."""
    encoder = config.encoder
    match = re.match(r"vit_(\w+?)_patch\d+", encoder.name or "")
    known = SIZES.get(match.group(1)) if match and "reg" not in match.group(1) else None
    if known is None or config.init is not None:
        return None
    dim = encoder.embed_dim or known[0]
    return Size(
        dim=dim,
        depth=encoder.depth or known[1],
        hidden=int(dim * known[3] / known[0]),
        patch=_required(encoder.patch_size),
        channels=_required(encoder.in_chans),
        prefix=int(bool(encoder.class_token)) + _required(encoder.num_registers),
        scaled=encoder.init_values != 0,
    )


def runs_of(config: PretrainConfig, size: Size, teacher: Size) -> list[Run]:
    """The distinct passes of one step, as the objectives ask for them."""
    every, local = _required(config.crops.num_global), config.crops.num_local or 0
    full = size.patches(config.encoder.size)
    dino, ibot, mae = config.dino, config.ibot, config.mae
    views = every if ibot is not None else min(_required(dino.num_teacher_views), every) if dino is not None else 0
    runs = [Run(True, views, teacher.patches(config.encoder.size), ibot is not None)] if views else []
    seen: dict[int, tuple[int, bool]] = {}  # patches the student sees of a global view -> (views, read in full)
    if ibot is not None:
        seen[full] = (every, True)
    elif dino is not None:
        ratio = dino.student_visible_ratio if dino.student_visible_ratio is not None else 1.0
        visible = _num_visible(full, 1 - ratio) if ratio < 1 else full
        seen[visible] = (_student_views(dino, every), False)
    if mae is not None:
        visible = _num_visible(full, mae.mask_ratio)
        shared = seen.get(visible, (0, False))[0]  # one group: what MAE reads of a view is computed for all of them
        seen[visible] = (max(shared, min(mae.num_views, every)), True)
    runs += [Run(False, number, patches, whole) for patches, (number, whole) in seen.items() if number]
    if dino is not None and local:
        runs.append(Run(False, local, size.patches(config.crops.local_shape), False))
    return runs


def _num_visible(num_patches: int, mask_ratio: float) -> int:
    """As `passes.num_visible`, which needs torch."""
    return max(1, int(num_patches * (1 - mask_ratio)))


def _student_views(dino: DinoConfig, every: int) -> int:
    """Global views that some other view faces (dino.py)."""
    return every if min(_required(dino.num_teacher_views), every) > 1 else every - 1


def _student_tokens(config: PretrainConfig) -> int:
    """Class tokens of the student that DINO's head reads, of one image."""
    dino, crops = config.dino, config.crops
    return 0 if dino is None else _student_views(dino, _required(crops.num_global)) + (crops.num_local or 0)


def _teacher_tokens(config: PretrainConfig) -> int:
    dino, every = config.dino, _required(config.crops.num_global)
    return 0 if dino is None else min(_required(dino.num_teacher_views), every)


def _masked_tokens(config: PretrainConfig, ibot: IbotConfig, size: Size) -> float:
    """Masked patches of one image, on average."""
    patches = size.patches(config.encoder.size) * _required(config.crops.num_global)
    return patches * ibot.mask_prob * (ibot.mask_ratio_min + ibot.mask_ratio_max) / 2


def _patch_head(config: PretrainConfig) -> DinoConfig | IbotConfig:
    """The head that masked patches go through."""
    assert config.ibot is not None
    return config.dino if config.ibot.shared_head and config.dino is not None else config.ibot


# ---- parameters -----------------------------------------------------------------------------------------------------


def _head_parameters(head: DinoConfig | IbotConfig, dim: int) -> int:
    wide, narrow = _required(head.head_hidden_dim), _required(head.head_bottleneck_dim)
    layers = dim * wide + wide + wide**2 + wide + wide * narrow + narrow
    return layers + _required(head.num_prototypes) * narrow


def _decoder_parameters(config: PretrainConfig, size: Size) -> tuple[int, int]:
    """(all, those of matrices)."""
    if config.mae is None:
        return 0, 0
    dim, pixels = _required(config.mae.decoder_dim), size.patch**2 * size.channels
    matrices = size.dim * dim + _required(config.mae.decoder_depth) * 12 * dim**2 + dim * pixels
    vectors = 2 * dim + _required(config.mae.decoder_depth) * 13 * dim + 2 * dim + pixels
    return matrices + vectors, matrices


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def _flops(run: Run, size: Size) -> float:
    """Of one pass of one image; a student's backward pass costs its forward pass twice."""
    dim, hidden, length = size.dim, size.hidden, run.patches + size.prefix
    block = 2 * length * (4 * dim**2 + 2 * dim * hidden) + 4 * length**2 * dim
    last = block
    if not run.whole and size.prefix:
        last = 2 * (2 * length + 2) * dim**2 + 4 * dim * hidden + 4 * length * dim
    embed = 2 * run.patches * size.patch**2 * size.channels * dim
    blocks = (size.depth - 1) * block + last
    return run.views * (blocks + embed if run.teacher else 3 * blocks + 2 * embed)  # no gradient of pixels


def _adapter_flops(size: Size, dim: int, runs: list[Run]) -> float:
    """From the student's width to the teacher's, of every token of the student, for those that are compared."""
    return sum(6 * size.dim * dim * _tokens_out(run, size) for run in runs if not run.teacher)


def _tokens_out(run: Run, size: Size) -> int:
    """Tokens that leave the encoder."""
    return run.views * (run.patches + size.prefix if run.whole or not size.prefix else 1)


def _objective_flops(config: PretrainConfig, size: Size, width: int) -> float:
    """`width` is that of the tokens that the heads read."""
    total = 0.0
    if config.dino is not None:
        total += _head_flops(config.dino, width) * (3 * _student_tokens(config) + _teacher_tokens(config))
    if config.ibot is not None:
        total += _head_flops(_patch_head(config), width) * 4 * _masked_tokens(config, config.ibot, size)
    if config.mae is not None:
        dim, depth = _required(config.mae.decoder_dim), _required(config.mae.decoder_depth)
        full = size.patches(config.encoder.size)
        visible = _num_visible(full, config.mae.mask_ratio)
        length = full + size.prefix
        block = 24 * length * dim**2 + 4 * length**2 * dim
        ends = 2 * (visible + size.prefix) * size.dim * dim + 2 * (full - visible) * dim * size.patch**2 * size.channels
        total += 3 * min(config.mae.num_views, _required(config.crops.num_global)) * (depth * block + ends)
    return total


def _head_flops(head: DinoConfig | IbotConfig, dim: int) -> int:
    wide, narrow = _required(head.head_hidden_dim), _required(head.head_bottleneck_dim)
    return 2 * (dim * wide + wide**2 + wide * narrow + narrow * _required(head.num_prototypes))


# ---- memory ---------------------------------------------------------------------------------------------------------


def _activations(config: PretrainConfig, size: Size, width: int, runs: list[Run]) -> float:
    """Bytes that the backward pass waits for, of one image: the inputs of every linear map, norm, GELU and softmax."""
    unit = 2 if config.precision == "bf16" else 4
    packed = sum(not run.teacher for run in runs) > 1
    total = 0.0
    for run in runs:
        if run.teacher:
            continue
        tokens = run.views * (run.patches + size.prefix)
        per_block = _block_bytes(size.dim, size.hidden, unit, packed, size.scaled)
        blocks = size.depth - 1 + (1.0 if run.whole or not size.prefix else 0.0)
        total += tokens * blocks * per_block
        if not run.whole and size.prefix:  # the last block keeps norm1's input and output, keys and values
            total += tokens * size.dim * (4 + 3 * unit) + run.views * per_block
        total += run.views * run.patches * size.patch**2 * size.channels * unit
        total += (tokens if run.whole else run.views) * size.dim * 4
        if config.teacher is not None:  # what the adapter reads
            total += _tokens_out(run, size) * size.dim * unit
    return total + _objective_bytes(config, size, width, unit)


def _block_bytes(dim: int, hidden: int, unit: int, packed: bool, scaled: bool) -> float:
    """Of one token: two inputs of norms in fp32; norm1, q, k, v, mixed (twice where passes are packed), norm2 and, with
    LayerScale, the two branches; both sides of the GELU.
    """
    return 8 * dim + unit * dim * (6 + packed + 2 * scaled) + 2 * unit * hidden


def _objective_bytes(config: PretrainConfig, size: Size, width: int, unit: int) -> float:
    """`width` is that of the tokens that the heads read."""
    total = 0.0
    if config.dino is not None:
        dino, teacher = config.dino, _teacher_tokens(config)
        tokens, prototypes = _student_tokens(config), _required(dino.num_prototypes)
        total += tokens * _head_bytes(dino, width, unit)
        total += prototypes * ((4 + unit) * tokens + 4 * (teacher + 1))  # products, scaled logits; targets, their sum
    if config.ibot is not None:
        tokens_masked = _masked_tokens(config, config.ibot, size)
        prototypes = _required(config.ibot.num_prototypes)
        total += tokens_masked * (_head_bytes(_patch_head(config), width, unit) + 8 * prototypes)
    if config.mae is not None:
        dim, depth = _required(config.mae.decoder_dim), _required(config.mae.decoder_depth)
        full = size.patches(config.encoder.size)
        visible, pixels = _num_visible(full, config.mae.mask_ratio), size.patch**2 * size.channels
        length = full + size.prefix
        one = depth * length * _block_bytes(dim, 4 * dim, unit, False, False)
        one += (visible + size.prefix) * size.dim * unit + (full - visible) * (dim * (4 + unit) + 4 * pixels)
        total += min(config.mae.num_views, _required(config.crops.num_global)) * one
    return total


def _head_bytes(head: DinoConfig | IbotConfig, dim: int, unit: int) -> int:
    """Of one token, without its logits."""
    return unit * (dim + 4 * _required(head.head_hidden_dim) + 3 * _required(head.head_bottleneck_dim))


def _pixels(config: PretrainConfig) -> int:
    """Of all crops of one image, once coloured and once joined for the encoder."""
    crops = config.crops
    once = _required(crops.num_global) * math.prod(config.encoder.size)
    return 2 * (once + (crops.num_local or 0) * math.prod(crops.local_shape))


def _required(value: int | None) -> int:
    assert value is not None
    return value
