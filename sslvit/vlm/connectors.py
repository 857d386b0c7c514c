"""The connector: from encoder tokens to the language model's width (LLaVA-1.5, arXiv:2310.03744, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MlpConnector(nn.Module):
    """Linear, GELU, Linear with biases: `LlavaMultiModalProjector` name for name. (B, P, D) to (B, P, H)."""

    def __init__(self, vision_dim: int, language_dim: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear_1 = nn.Linear(vision_dim, language_dim)
            self.act = nn.GELU()
            self.linear_2 = nn.Linear(language_dim, language_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Each image token on its own."""
        return self.linear_2(self.act(self.linear_1(tokens)))
