"""Attentive classification on frozen patch tokens: what is in the patches, not only in the class token.

A few learned queries attend to the patches of the last block; each pools its own slice of a value projection, and a
linear layer reads the pooled vector (Efficient Probing, Psomas et al., arXiv:2506.10178, which needs no keys). One head
per learning rate, trained at once by AdamW on the same batches; the choice is made on 10% of the training images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslvit.probes.features import Examples, choose_indices
from sslvit.probes.linear import batches, choice_split
from sslvit.probes.unfinished import Unfinished

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
NUM_QUERIES = 8
MAX_BYTES = 4 * 2**30  # of training tokens kept in memory, float16
MAX_LOGITS = 2**26  # at once
PROTOCOL = f"attentive (Efficient Probing): {NUM_QUERIES} queries on patches, AdamW, cosine, chosen on 10% of train"


class AttentiveHeads(nn.Module):
    """H heads of M queries, D dimensions, C classes; none depends on another."""

    def __init__(self, num_heads: int, width: int, num_classes: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        num_queries = next(m for m in range(min(NUM_QUERIES, width), 0, -1) if width % m == 0)

        def drawn(*shape: int, std: float) -> nn.Parameter:
            one = torch.empty(shape).normal_(0, std, generator=generator)
            return nn.Parameter(one.repeat(num_heads, *(1 for _ in shape)))

        self.queries = drawn(num_queries, width, std=0.02)
        self.values = drawn(num_queries, width, width // num_queries, std=width**-0.5)
        self.weight = drawn(width, num_classes, std=0.01)
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (H, B, C) of patch tokens (B, N, D)."""
        attention = torch.einsum("bnd,hmd->bhmn", tokens, self.queries).mul(tokens.shape[2] ** -0.5).softmax(dim=3)
        pooled = torch.einsum("bhmn,bnd->hbmd", attention, tokens)
        slices = torch.einsum("hbmd,hmdv->hbmv", pooled, self.values)
        return slices.flatten(2) @ self.weight + self.bias


def patch_tokens(examples: Examples, rows: np.ndarray) -> Tensor:
    """Patches of the last block, (n, N, D) float16 on the CPU, of the images at `rows` of examples.features."""
    parts = [layers[0].patches.half().cpu() for layers, _ in examples.tokens(examples.features.indices[rows])]
    return torch.cat(parts)


def affordable_rows(examples: Examples, seed: int) -> np.ndarray:
    """All rows, or a keyed sample whose tokens fit in MAX_BYTES."""
    one = patch_tokens(examples, np.arange(1))
    return choose_indices(len(examples.features), max(1, MAX_BYTES // (one.numel() * 2)), seed)


def fit(
    tokens: Tensor,
    labels: np.ndarray,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    device: torch.device,
    learning_rates: Sequence[float] = LEARNING_RATES,
    unfinished: Unfinished | None = None,
) -> tuple[AttentiveHeads, int, np.ndarray]:
    """Train all heads on 90% of `tokens` (n, N, D), `labels` (n,): the heads, the chosen one, the classes."""
    classes, ids = np.unique(labels, return_inverse=True)
    fitting, choosing = choice_split(ids, seed)
    targets = torch.from_numpy(ids)
    heads = AttentiveHeads(len(learning_rates), tokens.shape[2], len(classes), seed).to(device)
    rates = torch.tensor(learning_rates, device=device)
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in heads.parameters()}
    named = {name: (parameter, *moments[parameter]) for name, parameter in heads.named_parameters()}
    state = {f"{name}.{i}": tensor for name, tensors in named.items() for i, tensor in enumerate(tensors)}
    unfinished = unfinished or Unfinished()
    first = unfinished.resume("heads", state)
    for step, order in enumerate(batches(len(fitting), batch_size, steps, seed, first), first):
        index = torch.from_numpy(fitting[order])
        logits = heads(tokens[index].to(device).float())
        y = targets[index].to(device)
        loss = torch.stack([cross_entropy(one, y) for one in logits]).sum()  # a sum: heads stay apart
        gradients = torch.autograd.grad(loss, list(moments))
        scale = min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + np.cos(np.pi * step / steps))
        _adam_step(moments, gradients, rates * scale, step + 1)
        unfinished.offer("heads", state, {"step": step + 1})
    right, losses = _merits(heads, tokens, targets, torch.from_numpy(choosing), device)
    merits = [(one, -other, -i) for i, (one, other) in enumerate(zip(right, losses, strict=True))]
    return heads, -max(merits)[2], classes


def _merits(
    heads: AttentiveHeads, tokens: Tensor, targets: Tensor, chosen: Tensor, device: torch.device
) -> tuple[list[float], list[float]]:
    """Right answers and summed cross-entropy of each head on the `chosen` images."""
    right, loss = (torch.zeros(len(heads.bias), dtype=torch.float64) for _ in range(2))
    for rows in chosen.split(_rows_at_once(heads)):
        logits, y = predict(heads, tokens[rows], device), targets[rows]
        right += (logits.argmax(dim=2) == y).sum(dim=1)
        loss += torch.stack([cross_entropy(one, y, reduction="sum") for one in logits])
    return right.tolist(), loss.tolist()


def _rows_at_once(heads: AttentiveHeads) -> int:
    return max(1, min(512, MAX_LOGITS // heads.bias.numel()))


@torch.no_grad()
def _adam_step(
    moments: dict[nn.Parameter, tuple[Tensor, Tensor]], gradients: Sequence[Tensor], rates: Tensor, count: int
) -> None:
    """Adam (arXiv:1412.6980, algorithm 1) with one learning rate per head, the first dimension of each parameter."""
    for (parameter, (first, second)), gradient in zip(moments.items(), gradients, strict=True):
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        update = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        parameter.sub_(update * rates.view(-1, *(1 for _ in parameter.shape[1:])))


@torch.no_grad()
def predict(heads: AttentiveHeads, tokens: Tensor, device: torch.device) -> Tensor:
    """Logits (H, n, C) on the CPU."""
    return torch.cat([heads(part.to(device).float()).cpu() for part in tokens.split(_rows_at_once(heads))], dim=1)
