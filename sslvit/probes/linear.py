"""Linear classification on frozen features (DINOv2, arXiv:2304.07193, section 7.1 and its released evaluation).

A grid of 13 learning rates x {last block, last 4 blocks} x {class token, with the mean patch} = 52 heads is trained at
once: heads that read the same input are one matrix product. SGD with momentum .9, no weight decay, cosine to 0,
12,500 steps of 128 images, learning rates scaled by batch / 256. Differs from the release in two ways, both stated in
the protocol: features are cached without augmentation, and the head is chosen on 10% of the training images (the
release takes the best on the validation set); the heads have seen the other 90%. Not regularised, not standardised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslvit.probes.knn import check_features

LEARNING_RATES = (*(m * 10.0**e for e in (-5, -4, -3, -2) for m in (1, 2, 5)), 0.1)
PROTOCOL = "linear (DINOv2 grid): heads on cached features without augmentation, SGD .9, cosine, chosen on 10% of train"
MOMENTUM = 0.9


@dataclass(frozen=True)
class Inputs:
    """What a group of heads reads: a name for the protocol and the arrays that are put side by side."""

    name: str
    parts: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Head:
    """The chosen head. weight: (D, classes), bias: (classes,), fitted on the fitting part of train."""

    inputs: str
    learning_rate: float
    weight: np.ndarray
    bias: np.ndarray
    classes: np.ndarray
    choice_accuracy: float

    def logits(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """(m, classes) from the same parts of another set."""
        rows = range(0, len(parts[0]), 16_384)
        return np.concatenate(
            [np.concatenate([p[r : r + 16_384] for p in parts], axis=1) @ self.weight + self.bias for r in rows]
        )


def input_variants(blocks: Sequence[np.ndarray], mean_patch: np.ndarray, has_class_token: bool) -> list[Inputs]:
    """DINOv2's choices of input from the class tokens of the last blocks (last first) and the last mean patch."""
    last4 = tuple(blocks[:4])
    variants = [Inputs("last 1 block", (blocks[0],))]
    if len(last4) > 1:
        variants.append(Inputs(f"last {len(last4)} blocks", last4))
    if has_class_token:
        variants += [Inputs(f"{v.name} + mean patch", (*v.parts, mean_patch)) for v in variants]
    return variants


def choice_split(labels: np.ndarray, seed: int, share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Indices to fit on and indices to choose on: `share` of `labels` (n,), stratified; a class's only image is fitted.

    Both halves are the whole set when no class has two images to part: then the choice is made on what was fitted.
    """
    generator = np.random.default_rng([seed, len(labels)])
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled within
    _, counts = np.unique(labels, return_counts=True)
    order = order[np.repeat(counts > 1, counts)]
    if len(order) == 0:
        return np.arange(len(labels)), np.arange(len(labels))
    stride = max(2, round(1 / share))
    chosen = order[generator.integers(min(stride, len(order))) :: stride]
    return np.setdiff1d(np.arange(len(labels)), chosen), np.sort(chosen)


def batches(num_images: int, batch_size: int, steps: int, seed: int) -> list[np.ndarray]:
    """`steps` batches of indices: reshuffled passes over the images, one after the other."""
    batch_size = min(batch_size, num_images)
    passes = -(-steps * batch_size // num_images)
    stream = np.concatenate([np.random.default_rng([seed, p]).permutation(num_images) for p in range(passes)])
    return np.split(stream[: steps * batch_size], steps)


def fit(
    variants: Sequence[Inputs],
    labels: np.ndarray,
    *,
    seed: int = 0,
    steps: int = 12_500,
    batch_size: int = 128,
    learning_rates: Sequence[float] = LEARNING_RATES,
    device: str | torch.device = "cpu",
) -> Head:
    """Train every head on 90% of the training set, choose one on the other 10%. Never sees validation images."""
    for variant in variants:
        check_features(*variant.parts)
    classes, ids = np.unique(labels, return_inverse=True)
    fitting, choosing = choice_split(ids, seed)
    best: tuple[float, float] | None = None
    head: Head | None = None
    for variant in variants:
        inputs = torch.from_numpy(np.concatenate(variant.parts, axis=1)).to(device)
        targets = torch.from_numpy(ids).to(device)
        weights, biases = train_heads(
            inputs[fitting],
            targets[fitting],
            len(classes),
            learning_rates,
            seed=seed,
            steps=steps,
            batch_size=batch_size,
        )
        accuracy, loss = score_heads(inputs[choosing], targets[choosing], weights, biases)
        for i, rate in enumerate(learning_rates):
            merit = (float(accuracy[i]), -float(loss[i]))
            if np.isfinite(merit[1]) and (best is None or merit > best):
                best = merit
                w, b = weights[i].cpu().numpy(), biases[i].cpu().numpy()
                head = Head(variant.name, rate, w, b, classes, merit[0])
    assert head is not None, "the smallest learning rates never diverge on finite features"
    return head


def train_heads(
    inputs: Tensor,
    targets: Tensor,
    num_classes: int,
    learning_rates: Sequence[float],
    *,
    seed: int,
    steps: int,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Train one head per learning rate on `inputs` (n, D), `targets` (n,): weights (H, D, C) and biases (H, C).

    All heads see the same batches and start from the same keyed draw, so a head does not depend on its company.
    The gradient of the cross-entropy is written out: inputs.T @ (softmax - one hot) / batch.
    """
    num_heads, width, device = len(learning_rates), inputs.shape[1], inputs.device
    start = torch.empty(width, num_classes).normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
    weight = start.repeat(1, num_heads).to(device)  # (D, H * C)
    bias = torch.zeros(num_heads * num_classes, device=device)
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    order = batches(len(inputs), batch_size, steps, seed)
    size = len(order[0])
    rates = torch.tensor(learning_rates, device=device).repeat_interleave(num_classes) * size / 256
    row = torch.arange(size, device=device)
    for step, indices in enumerate(order):
        index = torch.from_numpy(indices).to(device)
        x, y = inputs[index], targets[index]
        error = torch.addmm(bias, x, weight).view(size, num_heads, num_classes).softmax(dim=2)
        error[row, :, y] -= 1
        error = error.view(size, num_heads * num_classes)
        scale = rates * (0.5 * (1 + np.cos(np.pi * step / steps)))
        weight_speed.mul_(MOMENTUM).addmm_(x.T, error, alpha=1 / size)
        bias_speed.mul_(MOMENTUM).add_(error.sum(dim=0), alpha=1 / size)
        weight.addcmul_(weight_speed, scale, value=-1)
        bias.addcmul_(bias_speed, scale, value=-1)
    weights = weight.view(width, num_heads, num_classes).permute(1, 0, 2).contiguous()
    return weights, bias.view(num_heads, num_classes)


def score_heads(inputs: Tensor, targets: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy (H,) and mean cross-entropy (H,) of each head on `inputs` (n, D)."""
    correct, loss = torch.zeros(len(weights)), torch.zeros(len(weights))
    for start in range(0, len(inputs), 4096):
        x, y = inputs[start : start + 4096], targets[start : start + 4096]
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            logits = torch.addmm(bias, x, weight)
            correct[i] += (logits.argmax(dim=1) == y).sum().cpu()
            loss[i] += torch.nn.functional.cross_entropy(logits, y, reduction="sum").cpu()
    return correct / len(inputs), loss / len(inputs)
