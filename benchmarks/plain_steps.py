"""The training steps of DINO and MAE as their authors published them, written out plainly, to be timed beside ours.

DINO: arXiv:2104.14294, algorithm 1 and appendix C; MAE: arXiv:2111.06377, section 3. As in the released code: attention
as softmax(q k^T) v, all crops of one size at a time, the whole last block, AdamW and the moving average in a loop over
parameters, gradients clipped one by one, and one look at the loss in every step. Names are timm's, so that timm's
weights load.

Held alike for all, because losses are compared: no drop path, positions of smaller crops resampled with antialiasing,
no weight decay on tokens and positions, constant rates, prototypes that are never frozen, gradients never clipped.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LR, WEIGHT_DECAY, BETAS = 5e-4, 0.04, (0.9, 0.999)
CLIP = 1e6  # norms are computed and compared, as in training; acting, the published rule and ours would differ
MOMENTUM, CENTER_MOMENTUM, STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.996, 0.9, 0.1, 0.04
TOKENS = ("cls_token", "pos_embed", "mask_token")


@dataclass
class Batch:
    """What every step of every variant reads: normalised crops, and for MAE noise whose order masks the patches.

    noise: (B, N), of the one global crop; the same in every step.
    """

    global_crops: list[Tensor]  # each (B, 3, H, W)
    local_crops: list[Tensor] = field(default_factory=list)  # each (B, 3, h, w)
    noise: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the crops are."""
        return self.global_crops[0].device

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        crops = ([crop.to(device) for crop in crops] for crops in (self.global_crops, self.local_crops))
        return Batch(*crops, None if self.noise is None else self.noise.to(device))


# ---- the encoder ----------------------------------------------------------------------------------------------------


class PlainAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1)) * (dim // self.num_heads) ** -0.5
        mixed = weights.softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class PlainMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PlainBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn, self.mlp = PlainAttention(dim, num_heads), PlainMlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainVit(nn.Module):
    """A ViT with a class token that has a position of its own."""

    def __init__(self, timm_vit: nn.Module) -> None:
        super().__init__()
        dim, heads = timm_vit.embed_dim, timm_vit.blocks[0].attn.num_heads
        self.patch_embed = nn.Module()
        conv = timm_vit.patch_embed.proj
        self.patch_embed.proj = nn.Conv2d(3, dim, conv.kernel_size, conv.stride)
        self.cls_token = nn.Parameter(torch.empty_like(timm_vit.cls_token))
        self.pos_embed = nn.Parameter(torch.empty_like(timm_vit.pos_embed))
        self.blocks = nn.ModuleList(PlainBlock(dim, heads, timm_vit.blocks[0].norm1.eps) for _ in timm_vit.blocks)
        self.norm = nn.LayerNorm(dim, timm_vit.norm.eps)
        self.load_state_dict(timm_vit.state_dict())

    def embed(self, images: Tensor) -> Tensor:
        """Patches with their positions, (B, N, D)."""
        x = self.patch_embed.proj(images)
        grid = x.shape[-2:]
        return x.flatten(2).transpose(1, 2) + self.positions(grid)

    def positions(self, grid: torch.Size) -> Tensor:
        table = self.pos_embed[:, 1:]
        side = int(table.shape[1] ** 0.5)
        if grid != (side, side):
            square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            square = F.interpolate(square, size=tuple(grid), mode="bicubic", antialias=True)
            table = square.permute(0, 2, 3, 1).flatten(1, 2)
        return table

    def encode(self, patches: Tensor) -> Tensor:
        """(B, V, D) to (B, 1 + V, D), the class token first."""
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        x = torch.cat([first, patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(self.embed(images))[:, 0]


# ---- DINO -----------------------------------------------------------------------------------------------------------


class PlainHead(nn.Module):
    """The projection head with a weight-normed last layer of norm 1."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.mlp = copy.deepcopy(ours.mlp)
        self.direction = nn.Parameter(ours.prototypes.detach().clone())
        self.register_buffer("length", torch.ones(len(self.direction), 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x), dim=-1)
        return F.linear(x, torch._weight_norm(self.direction, self.length, 0))


class PlainDino(nn.Module):
    """`step` is one iteration of the published training loop."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.student = nn.ModuleList([PlainVit(encoder), PlainHead(head)])
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, len(head.prototypes)))
        self.optimizer = plain_adamw(self.student)

    @staticmethod
    def _forward(network: nn.ModuleList, batch: Batch, with_local: bool) -> Tensor:
        """Crops of one size together, the head on all."""
        groups = [batch.global_crops] + ([batch.local_crops] if with_local and batch.local_crops else [])
        return network[1](torch.cat([network[0](torch.cat(crops)) for crops in groups]))

    def loss(self, student: Tensor, teacher: Tensor, num_crops: int) -> Tensor:
        """Cross-entropy over all pairs of a global view and another view; moves the centre."""
        students = (student / STUDENT_TEMPERATURE).chunk(num_crops)
        targets = F.softmax((teacher - self.center) / TEACHER_TEMPERATURE, dim=-1).detach().chunk(2)
        total, terms = student.new_zeros(()), 0
        for i, target in enumerate(targets):
            for j, logits in enumerate(students):
                if i != j:
                    total = total + torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
                    terms += 1
        with torch.no_grad():
            mean = teacher.float().mean(dim=0, keepdim=True)
            self.center = self.center * CENTER_MOMENTUM + mean * (1 - CENTER_MOMENTUM)
        return total / terms

    def step(self, batch: Batch, bf16: bool = False) -> float:
        num_crops = len(batch.global_crops) + len(batch.local_crops)
        with autocast(batch, bf16):
            with torch.no_grad():
                teacher = self._forward(self.teacher, batch, with_local=False)
            student = self._forward(self.student, batch, with_local=True)
            loss = self.loss(student, teacher, num_crops)
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        clip_one_by_one(self.student.parameters())
        self.optimizer.step()
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(MOMENTUM).add_((1 - MOMENTUM) * new.detach())
        return value


# ---- MAE ------------------------------------------------------------------------------------------------------------


class PlainMae(nn.Module):
    """Masks, encodes what is left, puts mask tokens back in place, predicts every patch."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, mask_ratio: float) -> None:
        """`decoder`: our objective, whose weights are taken."""
        super().__init__()
        self.mask_ratio, self.patch_size = mask_ratio, decoder.patch_size
        self.encoder = PlainVit(encoder)
        self.encoder.pos_embed.requires_grad_(False)
        dim, block = decoder.embed.out_features, decoder.blocks[0]
        self.embed, self.predict, self.norm = (copy.deepcopy(m) for m in (decoder.embed, decoder.predict, decoder.norm))
        self.mask_token = nn.Parameter(decoder.mask_token.detach().clone())
        positions = decoder.positions.reshape(1, -1, dim)
        self.register_buffer("positions", torch.cat([positions.new_zeros(1, 1, dim), positions], dim=1))
        self.blocks = nn.ModuleList(PlainBlock(dim, block.attn.num_heads, block.norm1.eps) for _ in decoder.blocks)
        self.blocks.load_state_dict(decoder.blocks.state_dict())
        self.optimizer = plain_adamw(self)

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        patches = self.encoder.embed(images)
        batch, length, dim = patches.shape
        num_visible = int(length * (1 - self.mask_ratio))
        shuffle = noise.argsort(dim=1, stable=True)
        restore = shuffle.argsort(dim=1)
        keep = shuffle[:, :num_visible]
        visible = patches.gather(1, keep[..., None].expand(-1, -1, dim))
        mask = torch.ones(batch, length, device=images.device)
        mask[:, :num_visible] = 0
        mask = mask.gather(1, restore)
        x = self.embed(self.encoder.encode(visible))
        masked = self.mask_token.to(x.dtype).expand(batch, length - num_visible, -1)
        whole = torch.cat([x[:, 1:], masked], dim=1).gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], whole], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        predicted = self.predict(self.norm(x))[:, 1:]
        per_patch = (predicted - self.targets(images)).square().mean(dim=-1)
        return (per_patch * mask).sum() / mask.sum()

    def targets(self, images: Tensor) -> Tensor:
        """Patches with zero mean and unit variance, channels last within a patch."""
        batch, channels, height, width = images.shape
        size = self.patch_size
        x = images.reshape(batch, channels, height // size, size, width // size, size)
        x = torch.einsum("nchpwq->nhwpqc", x).reshape(batch, -1, size**2 * channels)
        return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + 1e-6) ** 0.5

    def step(self, batch: Batch, bf16: bool = False) -> float:
        with autocast(batch, bf16):
            loss = self.loss(batch.global_crops[0], batch.noise)
        value = loss.item()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value


# ---- the optimizer --------------------------------------------------------------------------------------------------


def plain_adamw(module: nn.Module) -> torch.optim.AdamW:
    """torch's AdamW as it comes, no decay on what has one dimension nor on tokens and positions."""
    decayed, free = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim <= 1 or name.endswith(TOKENS) else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)


def clip_one_by_one(parameters: Iterable[Tensor]) -> None:
    """Each gradient to a norm of at most CLIP."""
    for parameter in parameters:
        if parameter.grad is not None:
            norm = parameter.grad.norm(2)
            scale = CLIP / (norm + 1e-6)
            if scale < 1:
                parameter.grad.mul_(scale)


def autocast(batch: Batch, bf16: bool) -> contextlib.AbstractContextManager:
    """bf16 where asked for, on the batch's device."""
    return torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16)
