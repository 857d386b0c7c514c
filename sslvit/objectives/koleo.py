"""Spread of the student's class tokens over the sphere (KoLeo).

Sablayrolles et al., arXiv:1806.03198, equation 4; used per global view, before the head, as in DINOv2
(arXiv:2304.07193, section 4). In fp32: with half-precision distances the logarithm of a tiny distance is infinite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslvit import distributed
from sslvit.encoder.vit import Tokens
from sslvit.objectives.config import KoleoConfig
from sslvit.objectives.passes import Draw, Pass


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean_i log min_{j != i} |x_i - x_j| over L2-normalised features of all ranks: (B, D) -> scalar, fp32.

    Every rank has the same value. As a neighbour of other ranks' features, a feature has a gradient from them too; the
    gradient is scaled by the number of ranks, because it is averaged over them.
    """
    local = F.normalize(features.float(), dim=-1, eps=1e-6)
    parts = list(distributed.all_gather_cat(local.detach()).split(local.shape[0]))
    parts[distributed.rank()] = local
    everyone = torch.cat(parts)
    with torch.autocast(everyone.device.type, enabled=False):  # in bf16 near neighbours are as near as others
        similarity = (everyone @ everyone.T).detach().fill_diagonal_(-2.0)
    distance = (everyone - everyone[similarity.argmax(1)]).square().sum(-1).add(eps**2).sqrt()
    loss = -(distance + eps).log().mean()
    return loss.detach() + distributed.world_size() * (loss - loss.detach())


class Koleo(nn.Module):
    """The KoLeo objective on the student's passes over global views that DINO or iBOT reads already, one of each."""

    def __init__(self, config: KoleoConfig) -> None:
        super().__init__()
        self.config = config

    def passes(self, draw: Draw, num_patches: int) -> list[Pass]:
        """None of its own."""
        return []

    def loss(self, tokens: dict[Pass, Tokens], images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the global views; two views of one image never meet."""
        views = [t.cls for p, t in tokens.items() if p.network == "student" and p.crop == "global"]
        return torch.stack([koleo_loss(view) for view in views]).mean(), {}

    def before_update(self, step: int) -> None:
        """Nothing stands still."""

    def after_step(self, step: int) -> None:
        """Nothing follows."""

    def discard(self) -> None:
        """Nothing is kept between steps."""
