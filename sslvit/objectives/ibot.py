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
from sslvit.objectives.dino import Centering, Dino, DinoHead, make_heads, target_health, warmed_up
from sslvit.objectives.passes import Draw, Masking, Pass

NUM_ATTEMPTS = 10  # rectangles tried before a mask counts as full (BEiT)
MIN_AREA = 4  # patches (DINOv2; BEiT's 16 are too many for small grids)
MIN_ASPECT = 0.3


def block_mask(rng: np.random.Generator, grid: tuple[int, int], num_masked: int) -> np.ndarray:
    """A mask of exactly `num_masked` patches made of rectangles: (rows, columns) bool, True = masked.

    Rectangles (BEiT, algorithm 1) have an aspect ratio in (0.3, 1/0.3), drawn log-uniformly, and are added until ten
    in a row do not fit; the rest is filled at random, so that every image of a ratio has the same count.
    """
    mask = np.zeros(grid, dtype=bool)
    while (missing := num_masked - int(mask.sum())) > 0:
        if not any(_add_block(rng, mask, missing) for _ in range(NUM_ATTEMPTS)):
            free = np.flatnonzero(~mask.reshape(-1))
            mask.reshape(-1)[rng.permutation(free)[:missing]] = True
    return mask


def _add_block(rng: np.random.Generator, mask: np.ndarray, missing: int) -> bool:
    """Try one rectangle: masked if it is smaller than the grid and adds between 1 and `missing` patches."""
    rows, columns = mask.shape
    area = rng.uniform(*sorted((MIN_AREA, missing)))
    aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if height >= rows or width >= columns:
        return False
    top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
    block = mask[top : top + height, left : left + width]
    if not 0 < block.size - int(block.sum()) <= missing:
        return False
    block[:] = True
    return True


class Ibot(nn.Module):
    """The iBOT objective: mask token, heads of both networks, the centre and the loss."""

    def __init__(self, config: IbotConfig, embed_dim: int, grid: tuple[int, int], steps: int, num_global: int) -> None:
        """`grid` is the number of patches (rows, columns) of a global crop. A shared head is lent by `share_heads`."""
        super().__init__()
        assert config.num_prototypes and config.teacher_temperature and config.teacher_temperature_start
        assert config.center_momentum is not None
        self.config = config
        self.grid = grid
        self.steps = steps
        self.num_global = num_global
        self._shared: tuple[DinoHead, DinoHead] | None = None  # a tuple, for their parameters are DINO's
        if not config.shared_head:
            self.student_head, self.teacher_head = make_heads(config, embed_dim)
        self.centering = Centering(config.num_prototypes, config.centering, config.center_momentum)

    def share_heads(self, dino: Dino) -> None:
        """Patches go through DINO's heads from now on; the centre stays our own (iBOT, section 3.2)."""
        assert self.config.shared_head and self.config.num_prototypes == dino.config.num_prototypes
        self._shared = (dino.student_head, dino.teacher_head)

    @property
    def heads(self) -> tuple[DinoHead, DinoHead]:
        """The student's and the teacher's, our own or DINO's."""
        return self._shared or (self.student_head, self.teacher_head)

    def masking(self, draw: Draw, view: int, num_patches: int) -> Masking:
        """Block masks of one view, keyed per sample: a share `mask_prob` of the images is masked.

        DINO's student asks for them, too, and they are drawn image by image: once for each view of a step.
        """
        return draw.once("block", view, lambda: self._draw_masks(draw, view, num_patches))

    def _draw_masks(self, draw: Draw, view: int, num_patches: int) -> Masking:
        config = self.config
        masks = []
        for uniform, key in zip(
            draw.noise(view, 2, purpose=1).tolist(), draw.noise(view, 2, purpose=2).double().tolist(), strict=True
        ):
            ratio = config.mask_ratio_min + uniform[1] * (config.mask_ratio_max - config.mask_ratio_min)
            count = int(ratio * num_patches) if uniform[0] < config.mask_prob else 0
            rng = np.random.Generator(np.random.Philox(key=[int(part * 2**24) for part in key]))
            masks.append(block_mask(rng, self.grid, count).reshape(-1))
        return Masking.replacing("block", torch.from_numpy(np.stack(masks)), draw.device)

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

    def teacher_logits(self, passes: list[Pass], tokens: dict[Pass, Tokens]) -> Tensor:
        """Cosines (M, K) of the teacher's tokens where the student's patches are masked."""
        teacher = {p.index: p for p in passes if p.network == "teacher"}
        student = [p for p in passes if p.network == "student"]
        return self.heads[1](torch.cat([tokens[teacher[p.index]].patches[_places(p)] for p in student]))

    def loss(self, tokens: dict[Pass, Tokens], images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy per image averaged over its masked patches, then over images (unmasked ones count 0)."""
        student = [p for p in tokens if p.network == "student"]
        masks = torch.stack([_present(p.masking.mask) for p in student])  # (G, B, N)
        picked = torch.cat([tokens[p].patches[_places(p)] for p in student])
        with torch.no_grad():
            targets = self.centering.targets(self.teacher_logits(list(tokens), tokens), self.temperature(step))
        logits = self.heads[0](picked).float() / self.config.student_temperature
        losses = logits.logsumexp(-1) - (targets * logits).sum(-1)
        shares = (1 / masks.sum(-1, keepdim=True).clamp_min(1)).expand(masks.shape)
        per_patch = torch.cat([share[_places(p)] for p, share in zip(student, shares, strict=True)])
        per_patch = per_patch / (masks.shape[0] * masks.shape[1])
        loss = (losses * per_patch).sum()
        return loss, target_health("ibot", targets, loss, per_patch)

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


def _places(student: Pass) -> tuple[Tensor, Tensor]:
    """Where its patches are masked: indexing by the mask itself would make a GPU tell the host how many there are."""
    assert student.masking.places is not None
    return student.masking.places
