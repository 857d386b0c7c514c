"""Self-distillation of masked patches: the student predicts the teacher's token where its own patch was replaced.

iBOT, arXiv:2111.07832, equation 2, with block-wise masks (BEiT, arXiv:2106.08254, algorithm 1) on a share of
the images.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from sslvit.encoder.vit import Tokens
from sslvit.objectives.config import IbotConfig
from sslvit.objectives.dino import Centering, make_heads, warmed_up
from sslvit.objectives.passes import Draw, Masking, Pass


def block_mask(rng: np.random.Generator, grid: tuple[int, int], num_masked: int) -> np.ndarray:
    """A mask of exactly `num_masked` patches made of rectangles: (rows, columns) bool, True = masked.

    Rectangles have an aspect ratio in (0.3, 1/0.3), drawn log-uniformly; what they cannot fill is filled at random.
    """
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    for _ in range(10):
        missing = num_masked - int(mask.sum())
        if missing < 1:
            break
        area = rng.uniform(min(4, missing), missing)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = mask[top : top + height, left : left + width]
        if block.size - int(block.sum()) <= missing:
            block[:] = True
    free = np.flatnonzero(~mask.reshape(-1))
    missing = num_masked - int(mask.sum())
    mask.reshape(-1)[rng.permutation(free)[:missing]] = True
    return mask


class Ibot(nn.Module):
    """The iBOT objective: mask token, heads of both networks, the centre and the loss."""

    def __init__(self, config: IbotConfig, embed_dim: int, grid: tuple[int, int], steps: int, num_global: int) -> None:
        """`grid` is the number of patches (rows, columns) of a global crop."""
        super().__init__()
        assert config.num_prototypes and config.teacher_temperature and config.teacher_temperature_start
        self.config = config
        self.grid = grid
        self.steps = steps
        self.num_global = num_global
        self.student_head, self.teacher_head = make_heads(config, embed_dim)
        self.centering = Centering(config.num_prototypes, config.centering, config.center_momentum)

    def masking(self, draw: Draw, view: int, num_patches: int) -> Masking:
        """Block masks of one view, keyed per sample: a share `mask_prob` of the images is masked."""
        config = self.config
        masks = []
        for uniform, key in zip(
            draw.noise(view, 2, purpose=1).tolist(), draw.noise(view, 2, purpose=2).double().tolist(), strict=True
        ):
            ratio = config.mask_ratio_min + uniform[1] * (config.mask_ratio_max - config.mask_ratio_min)
            count = int(ratio * num_patches) if uniform[0] < config.mask_prob else 0
            rng = np.random.Generator(np.random.Philox(key=[int(part * 2**24) for part in key]))
            masks.append(block_mask(rng, self.grid, count).reshape(-1))
        return Masking("block", mask=torch.from_numpy(np.stack(masks)).to(draw.device))

    def passes(self, draw: Draw, num_patches: int) -> list[Pass]:
        """Teacher on full global views, student on masked ones."""
        views = range(self.num_global)
        teacher = [Pass("teacher", "global", view) for view in views]
        student = [Pass("student", "global", view, self.masking(draw, view, num_patches)) for view in views]
        return teacher + student

    def temperature(self, step: int) -> float:
        """The teacher's temperature at a step."""
        config = self.config
        assert config.teacher_temperature and config.teacher_temperature_start
        start, end = config.teacher_temperature_start, config.teacher_temperature
        return warmed_up(step, self.steps, start, end, config.teacher_temperature_warmup)

    def loss(self, tokens: dict[Pass, Tokens], images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy per image averaged over its masked patches, then over images (unmasked ones count 0)."""
        student = [p for p in tokens if p.network == "student"]
        teacher = {p.index: p for p in tokens if p.network == "teacher"}
        masks = torch.stack([_present(p.masking.mask) for p in student])  # (G, B, N)
        picked = torch.cat([tokens[p].patches[mask] for p, mask in zip(student, masks, strict=True)])
        with torch.no_grad():
            seen = [tokens[teacher[p.index]].patches[mask] for p, mask in zip(student, masks, strict=True)]
            targets = self.centering.targets(self.teacher_head(torch.cat(seen)), self.temperature(step))
        logits = self.student_head(picked).float() / self.config.student_temperature
        losses = logits.logsumexp(-1) - (targets * logits).sum(-1)
        per_patch = (1 / masks.sum(-1, keepdim=True).clamp_min(1)).expand(masks.shape)[masks]
        return (losses * per_patch).sum() / (masks.shape[0] * masks.shape[1]), {}

    def before_update(self, step: int) -> None:
        """Nothing stands still."""

    def after_step(self, step: int) -> None:
        """Move the centre."""
        self.centering.after_step()

    def discard(self) -> None:
        """Drop what a skipped step left behind."""
        self.centering.discard()


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
