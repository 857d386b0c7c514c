"""Self-distillation of the class token: the student's view predicts the teacher's other view.

DINO, arXiv:2104.14294, algorithm 1 and section 3.1. With `student_visible_ratio` below 1 the student sees only a random
subset of each global view's patches, as in masked siamese networks (arXiv:2204.07141); with MAE at the same ratio both
read one student pass. Sinkhorn-Knopp centering as in SwAV (arXiv:2006.09882) and DINOv2.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslvit import distributed
from sslvit.encoder.vit import Tokens
from sslvit.objectives.config import DinoConfig, IbotConfig
from sslvit.objectives.passes import FULL, Draw, Masking, Pass, num_visible
from sslvit.schedules import linear_warmup


class DinoHead(nn.Module):
    """Three-layer MLP, L2 normalisation, unit-norm prototypes: (..., D) -> (..., K) cosines (DINO, appendix C)."""

    def __init__(self, in_dim: int, num_prototypes: int, hidden_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Cosine similarity of each token to each prototype.

        The products of few tokens are divided by the lengths of the prototypes: a unit-length copy of many prototypes,
        and the way back through it, would cost more than the rest of the head.
        """
        features = F.normalize(self.mlp(tokens), dim=-1, eps=1e-6)
        if features.shape[:-1].numel() > 2 * features.shape[-1]:
            return F.linear(features, F.normalize(self.prototypes, dim=-1))
        lengths = torch.linalg.vector_norm(self.prototypes, dim=-1).clamp_min(1e-12)
        return F.linear(features, self.prototypes) / lengths


def make_heads(config: DinoConfig | IbotConfig, embed_dim: int) -> tuple[DinoHead, DinoHead]:
    """The student's head and its frozen copy, the teacher's."""
    assert config.num_prototypes and config.head_hidden_dim and config.head_bottleneck_dim
    student = DinoHead(embed_dim, config.num_prototypes, config.head_hidden_dim, config.head_bottleneck_dim)
    teacher = copy.deepcopy(student)
    return student, teacher.requires_grad_(False)


def warmed_up(step: int, steps: int, start: float, end: float, share: float) -> float:
    """Linear from `start` to `end` over the first `share` of the run, then constant (DINO's teacher temperature)."""
    return linear_warmup(step, start, end, round(share * steps))


def sinkhorn(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """Teacher targets whose prototypes are used equally over all ranks: (B, K) cosines -> (B, K), rows sum to 1.

    SwAV's algorithm 1 in fp32: alternate the normalisation of columns to 1/K and of rows to 1/B. B may be 0 on a rank.
    """
    logits = logits.float()
    scores = torch.exp((logits - _global_max(logits)) / temperature)
    num_samples = distributed.all_reduce_sum_(logits.new_full((), float(logits.shape[0])))
    for _ in range(num_iterations):
        columns = distributed.all_reduce_sum_(scores.sum(0))
        scores = scores / columns.clamp_min(1e-30) / logits.shape[1]
        scores = scores / scores.sum(1, keepdim=True).clamp_min(1e-30) / num_samples
    return scores * num_samples


def _global_max(values: Tensor) -> Tensor:
    largest = values.max() if values.numel() else values.new_tensor(-math.inf)
    return distributed.all_reduce_max_(largest)


def cross_entropy(
    targets: Sequence[Tensor], logits: Sequence[Tensor], faces: Sequence[tuple[int, ...]], temperature: float
) -> Tensor:
    """Mean over pairs of views, and over samples, of -sum_k target log softmax(logits / temperature), in fp32.

    targets: G x (B, K), logits: S x (B, K); faces: for each student's view the targets it is compared with. A view is
    read once, however many it faces: -sum_k t log softmax(s) = logsumexp(s) - <t, s>, and targets are summed.
    """
    sums = {face: functools.reduce(torch.add, (targets[i] for i in face)) for face in set(faces)}
    total = torch.zeros((), device=targets[0].device)
    for view, face in zip(logits, faces, strict=True):
        scaled = view.float() / temperature
        total = total + len(face) * scaled.logsumexp(-1).mean() - (sums[face] * scaled).sum(-1).mean()
    return total / sum(len(face) for face in faces)


@torch.no_grad()
def target_health(name: str, targets: Tensor, loss: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """What the teacher says, in shares of ln K: targets (B, K) with the weights (B,) they have in `loss`; None: 1/B.

    NAME/target_entropy of one target (1: it says nothing), NAME/usage_entropy of the mean target (0: one prototype
    for everything), NAME/kl from target to student. The loss is entropy + KL; a KL of 0 is collapse (DINO, section
    5.3).
    """
    log_k = math.log(targets.shape[-1])
    if weights is None:
        weights = targets.new_full(targets.shape[:1], 1 / max(1, targets.shape[0]))
    total = weights.sum().clamp_min(1e-12)
    entropy = (torch.special.entr(targets).sum(-1) * weights).sum() / total
    mean = (targets * weights[:, None]).sum(0) / total
    return {
        f"{name}/target_entropy": entropy / log_k,
        f"{name}/usage_entropy": torch.special.entr(mean).sum() / log_k,
        f"{name}/kl": (loss.detach() / total - entropy) / log_k,
    }


class Centering(nn.Module):
    """Teacher targets from teacher logits: softmax around a moving centre, or Sinkhorn-Knopp.

    The centre moves once per optimizer step, by the mean over all ranks and micro-batches of that step.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, method: str, momentum: float) -> None:
        super().__init__()
        assert method in ("softmax", "sinkhorn")
        self.method = method
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.columns: Tensor | None = None  # of Sinkhorn over the micro-batches of this step (accumulation.py)
        self._sum: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def targets(self, logits: Tensor, temperature: float) -> Tensor:
        """(B, K) cosines -> (B, K) probabilities, fp32."""
        logits = logits.float()
        if self.columns is not None:
            return torch.softmax(logits / temperature + self.columns, dim=-1)
        if self.method == "sinkhorn":
            return sinkhorn(logits, temperature)
        batch_sum = logits.sum(0)
        self._sum = batch_sum if self._sum is None else self._sum + batch_sum
        self._count += logits.shape[0]
        return torch.softmax((logits - self.center) / temperature, dim=-1)

    @torch.no_grad()
    def after_step(self) -> None:
        """DINO, equation 4: c <- m c + (1 - m) mean of the batch; it stays where no rank had a token (B = 0)."""
        if self._sum is None:
            return
        total = distributed.all_reduce_sum_(torch.cat([self._sum, self._sum.new_full((1,), float(self._count))]))
        mean, count = total[:-1] / total[-1].clamp_min(1), total[-1]
        self.center.lerp_(mean, (1 - self.momentum) * (count > 0))
        self.discard()

    def discard(self) -> None:
        """Forget the sums of a step that was not applied."""
        self._sum, self._count, self.columns = None, 0, None


class Dino(nn.Module):
    """The DINO objective: heads of both networks, the centre and the loss."""

    def __init__(
        self,
        config: DinoConfig,
        embed_dim: int,
        steps: int,
        num_global: int,
        num_local: int,
        global_masking: Callable[[Draw, int, int], Masking] | None = None,
    ) -> None:
        """`global_masking(draw, view, num_patches)` overrides what the student sees of a global view (iBOT's masks)."""
        super().__init__()
        assert config.num_prototypes and config.teacher_temperature and config.teacher_temperature_start
        assert config.num_teacher_views and config.student_visible_ratio and config.center_momentum is not None
        self.config = config
        self.steps = steps
        self.num_global = num_global
        self.num_local = num_local
        self.num_teacher_views = min(config.num_teacher_views, num_global)
        self.visible_ratio = config.student_visible_ratio
        self.global_masking = global_masking
        self.student_head, self.teacher_head = make_heads(config, embed_dim)
        self.centering = Centering(config.num_prototypes, config.centering, config.center_momentum)

    @property
    def teacher_views(self) -> range:
        """The global views the teacher sees."""
        return range(self.num_teacher_views)

    @property
    def student_views(self) -> list[int]:
        """The global views with at least one other view in front of the teacher."""
        return [view for view in range(self.num_global) if any(other != view for other in self.teacher_views)]

    def _student_masking(self, draw: Draw, view: int, num_patches: int) -> Masking:
        if self.global_masking is not None:
            return self.global_masking(draw, view, num_patches)
        if self.visible_ratio < 1:
            return draw.visible(view, num_patches, num_visible(num_patches, 1 - self.visible_ratio))
        return FULL

    def passes(self, draw: Draw, num_patches: int) -> list[Pass]:
        """Teacher on full global views; student on (masked) global views and on local views."""
        teacher = [Pass("teacher", "global", view) for view in self.teacher_views]
        student = [
            Pass("student", "global", view, self._student_masking(draw, view, num_patches))
            for view in self.student_views
        ]
        local = [Pass("student", "local", view) for view in range(self.num_local)]
        return teacher + student + local

    def temperature(self, step: int) -> float:
        """The teacher's temperature at a step."""
        config = self.config
        assert config.teacher_temperature and config.teacher_temperature_start
        return warmed_up(
            step,
            self.steps,
            config.teacher_temperature_start,
            config.teacher_temperature,
            config.teacher_temperature_warmup,
        )

    def teacher_logits(self, passes: list[Pass], tokens: dict[Pass, Tokens]) -> Tensor:
        """Cosines (G B, K) of the teacher's class tokens to the prototypes."""
        return self.teacher_head(torch.cat([tokens[p].cls for p in passes if p.network == "teacher"]))

    def loss(self, tokens: dict[Pass, Tokens], images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over all (teacher view, other student view) pairs (DINO, equation 3)."""
        with torch.no_grad():
            logits = self.teacher_logits(list(tokens), tokens)
            targets = self.centering.targets(logits, self.temperature(step))
        student = [p for p in tokens if p.network == "student"]
        logits = self.student_head(torch.cat([tokens[p].cls for p in student]))
        faces = [
            tuple(i for i, view in enumerate(self.teacher_views) if p.crop != "global" or p.index != view)
            for p in student
        ]
        facing = targets.chunk(len(self.teacher_views))
        loss = cross_entropy(facing, logits.chunk(len(student)), faces, self.config.student_temperature)
        return loss, target_health("dino", targets, loss)

    def before_update(self, step: int) -> None:
        """The prototypes stand still at the start (DINO, section 3.2: freeze_last_layer)."""
        if step < self.config.freeze_last_layer * self.steps:
            self.student_head.prototypes.grad = None

    def after_step(self, step: int) -> None:
        """Move the centre. The teacher's head follows in `Pretraining`."""
        self.centering.after_step()

    def discard(self) -> None:
        """Drop what a skipped step left behind."""
        self.centering.discard()
