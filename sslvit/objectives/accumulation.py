"""What losses over a whole effective batch need when it comes in micro-batches, so that accumulation is exact.

Sinkhorn-Knopp balances prototypes over all samples, and KoLeo looks for neighbours among all of them. So the
micro-batches are looked at twice: first without gradient, to find the scaling of Sinkhorn's columns (K numbers) and the
gradient of KoLeo in the class tokens (a gradient cache, GradCache, arXiv:2101.06983); then one by one as ever. What
is kept in between is tokens, never logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sslvit import distributed
from sslvit.encoder.vit import Tokens
from sslvit.objectives.koleo import Koleo
from sslvit.objectives.passes import Pass


@dataclass
class Prepared:
    """Of one micro-batch: what each objective reads, teacher tokens that need not be computed again, KoLeo's part."""

    wanted: dict[str, list[Pass]] = field(default_factory=dict)
    tokens: dict[Pass, Tokens] = field(default_factory=dict)
    koleo: CachedKoleo | None = None


@dataclass
class CachedKoleo:
    """KoLeo over the whole batch, and its gradient in the class tokens (B, D) of each pass of a micro-batch."""

    value: Tensor
    gradients: dict[Pass, Tensor]
    num_batches: int

    def loss(self, tokens: dict[Pass, Tokens]) -> Tensor:
        """The whole batch's value, with the gradient this micro-batch has in it (times `num_batches`, as a mean)."""
        pulled = torch.stack([(tokens[p].cls.float() * grad).sum() for p, grad in self.gradients.items()]).sum()
        return self.value + self.num_batches * (pulled - pulled.detach())


def cache_koleo(koleo: Koleo, batches: Sequence[dict[Pass, Tokens]], step: int) -> list[CachedKoleo]:
    """KoLeo and its gradient over all micro-batches; each is {student pass over a global view: tokens}."""
    leaves = {p: torch.cat([tokens[p].cls for tokens in batches]).float().requires_grad_() for p in batches[0]}
    with torch.enable_grad():
        joined = {p: Tokens(leaf[:, None], leaf[:, None, :][:, :0], True, True) for p, leaf in leaves.items()}
        value, _ = koleo.loss(joined, torch.empty(0), step)
    gradients = torch.autograd.grad(value, list(leaves.values()))
    sizes = [len(next(iter(tokens.values())).cls) for tokens in batches]
    parts = {p: gradient.split(sizes) for p, gradient in zip(leaves, gradients, strict=True)}
    return [
        CachedKoleo(value.detach(), {p: part[i] for p, part in parts.items()}, len(batches))
        for i in range(len(batches))
    ]


@torch.no_grad()
def sinkhorn_columns(chunks: Callable[[], Iterable[Tensor]], temperature: float, num_iterations: int = 3) -> Tensor:
    """Log of the column scaling (K,) at which Sinkhorn-Knopp ends on the logits of all chunks and ranks.

    Sinkhorn's last act normalises rows, so softmax(logits / temperature + scaling) are its targets for any row.
    `chunks()` yields the logits (B, K) again each time it is called; only one chunk is held at once.
    """
    largest = torch.stack([_largest(logits) for logits in chunks()]).max()
    largest = distributed.all_reduce_max_(largest)
    scaling: Tensor | None = None
    for _ in range(num_iterations):
        columns: Tensor | None = None
        for logits in chunks():
            scores = torch.exp((logits.float() - largest) / temperature)
            if scaling is not None:
                scores = scores / (scores @ scaling).clamp_min(1e-30)[:, None]
            columns = scores.sum(0) if columns is None else columns + scores.sum(0)
        assert columns is not None
        scaling = 1 / distributed.all_reduce_sum_(columns).clamp_min(1e-30)
    assert scaling is not None
    return scaling.log()


def _largest(logits: Tensor) -> Tensor:
    return logits.float().max() if logits.numel() else torch.tensor(-torch.inf, device=logits.device)
