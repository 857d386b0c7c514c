"""Linear classification on frozen features, by three published recipes. Nothing here sees a validation image.

`fit` is DINOv2's (arXiv:2304.07193, section 7.1, and its released evaluation): a grid of 13 learning rates x {last
block, last 4 blocks} x {class token, with the mean patch} = 52 heads trained at once; heads that read the same input
are one matrix product. SGD with momentum .9, no weight decay, cosine to 0, 12,500 steps of 128 images (128 on each of
its GPUs, eight unless said otherwise), learning rates times batch / 256. The release chooses the best head on the
validation set; here 10% of the training images choose and the heads have seen the other 90%. Features are cached
without augmentation unless a stream of crops is given.

`fit_dino` is DINO's single head and `fit_mae` MAE's, after a batch norm without affine parameters: fixed recipes,
fitted on all training images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslvit.probes.knn import check_features
from sslvit.probes.unfinished import Unfinished

LEARNING_RATES = (*(m * 10.0**e for e in (-5, -4, -3, -2) for m in (1, 2, 5)), 0.1)
MOMENTUM = 0.9
MAX_NUMBERS = 2**27  # weights or logits at once; with very many classes the grid is trained in parts
MAX_STREAMED = 2**29  # the same for a stream of crops, where every part runs the encoder again
PROTOCOL = "linear (DINOv2 grid): SGD .9, cosine, chosen on 10% of train, fitted on 90%"
PROTOCOL_DINO = "linear (DINO): one head, SGD .9, lr .001 per 256, cosine, 100 epochs, all of train"
PROTOCOL_MAE = "linear (MAE): batch norm without affine, LARS .1 per 256, warm-up 10 of 90 epochs, cosine, all of train"

Batch = tuple[list[Tensor], Tensor]  # one (B, D) per variant, and targets (B,)


@dataclass(frozen=True)
class Inputs:
    """What a group of heads reads: a name for the protocol and the arrays that are put side by side."""

    name: str
    parts: tuple[np.ndarray, ...]

    def matrix(self) -> np.ndarray:
        """(n, D) float32."""
        return np.concatenate(self.parts, axis=1)


@dataclass(frozen=True)
class Head:
    """A fitted head. weight: (D, C), bias: (C,); classes: the label of each column; inputs: the variant it reads."""

    inputs: str
    learning_rate: float
    weight: np.ndarray
    bias: np.ndarray
    classes: np.ndarray

    def logits(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """(m, C) from the parts of its variant, of other images."""
        return np.concatenate(parts, axis=1) @ self.weight + self.bias


def input_variants(blocks: Sequence[np.ndarray], mean_patch: np.ndarray, has_class_token: bool) -> list[Inputs]:
    """DINOv2's choices of input from the class tokens of the last blocks (last first) and the last mean patch."""
    last4 = tuple(blocks[:4])
    variants = [Inputs("last block", (blocks[0],))]
    if len(last4) > 1:
        variants.append(Inputs(f"last {len(last4)} blocks", last4))
    if has_class_token:
        variants += [Inputs(f"{v.name} + mean patch", (*v.parts, mean_patch)) for v in variants]
    return variants


def choice_split(labels: np.ndarray, seed: int, share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Indices to fit on and indices to choose on: `share` of `labels` (n,), stratified; a class's only image is fitted.

    Both are the whole set when no class has two images to part: then the choice is made on what was fitted.
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


def batches(num_images: int, batch_size: int, steps: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Batches of indices `first` to `steps`: reshuffled passes over the images, one after the other."""
    size = min(batch_size, num_images)
    rest, epoch = np.empty(0, dtype=np.int64), 0
    for step in range(steps):
        if len(rest) < size:
            rest = np.concatenate([rest, np.random.default_rng([seed, epoch]).permutation(num_images)])
            epoch += 1
        if step >= first:
            yield rest[:size]
        rest = rest[size:]


class Heads:
    """One head per learning rate on one input, trained together: weight (D, H * C), bias (H * C,).

    All start from the same keyed draw and see the same batches, so a head does not depend on its company. The gradient
    of the cross-entropy is written out: inputs.T @ (softmax - one hot) / batch.
    """

    def __init__(
        self, width: int, num_classes: int, learning_rates: Sequence[float], seed: int, device: torch.device
    ) -> None:
        start = torch.empty(width, num_classes).normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
        self.num_heads, self.num_classes = len(learning_rates), num_classes
        self.weight = start.repeat(1, self.num_heads).to(device)
        self.bias = torch.zeros(self.num_heads * num_classes, device=device)
        self.weight_speed, self.bias_speed = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.rates = torch.tensor(learning_rates, device=device).repeat_interleave(num_classes)

    def step(self, x: Tensor, y: Tensor, scale: float) -> None:
        """One SGD step on inputs (B, D), targets (B,), at `scale` times each head's learning rate."""
        size = len(x)
        error = torch.addmm(self.bias, x, self.weight).view(size, self.num_heads, self.num_classes).softmax(dim=2)
        error.scatter_add_(
            2, y[:, None, None].expand(size, self.num_heads, 1), error.new_full((1,), -1).expand_as(error)
        )
        error = error.view(size, -1)
        rates = self.rates * scale
        self.weight_speed.addmm_(x.T, error, beta=MOMENTUM, alpha=1 / size)
        self.bias_speed.mul_(MOMENTUM).add_(error.sum(dim=0), alpha=1 / size)
        self.weight.addcmul_(self.weight_speed, rates, value=-1)
        self.bias.addcmul_(self.bias_speed, rates, value=-1)

    def state(self) -> dict[str, Tensor]:
        """All that a step changes."""
        names = ("weight", "bias", "weight_speed", "bias_speed")
        return {name: getattr(self, name) for name in names}

    def head(self, i: int) -> tuple[Tensor, Tensor]:
        """Weight (D, C) and bias (C,) of head `i`."""
        columns = slice(i * self.num_classes, (i + 1) * self.num_classes)
        return self.weight[:, columns], self.bias[columns]

    def score(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy (H,) and mean cross-entropy (H,) of each head on `inputs` (n, D)."""
        correct, loss = torch.zeros(self.num_heads), torch.zeros(self.num_heads)
        rows = max(1, min(4096, 2**26 // self.num_classes))
        for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
            for i in range(self.num_heads):
                weight, bias = self.head(i)
                logits = torch.addmm(bias, x, weight)
                correct[i] += (logits.argmax(dim=1) == y).sum().cpu()
                loss[i] += torch.nn.functional.cross_entropy(logits, y, reduction="sum").cpu()
        return correct / len(inputs), loss / len(inputs)


def train_heads(
    groups: Sequence[Heads],
    stream: Iterable[Batch],
    steps: int,
    batch_size: int,
    *,
    first: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """Train groups of heads up to `steps` on a stream, one input per group; cosine from lr * batch / 256 to 0.

    The stream begins with the batch of step `first`; `after` every step it is told how many are done.
    """
    for step, (inputs, targets) in zip(range(first, steps), stream, strict=False):
        scale = batch_size / 256 * 0.5 * (1 + np.cos(np.pi * step / steps))
        for heads, x in zip(groups, inputs, strict=True):
            heads.step(x, targets, scale)
        after(step + 1)


def train_resumably(
    groups: Sequence[Heads],
    stream: Callable[[int], Iterable[Batch]],
    steps: int,
    batch_size: int,
    unfinished: Unfinished,
    name: str,
) -> None:
    """`train_heads` from where it was put aside as `name`; stream(first) gives the batches from step `first` on."""
    tensors = {f"{i}.{key}": value for i, heads in enumerate(groups) for key, value in heads.state().items()}
    first = unfinished.resume(name, tensors)

    def after(done: int) -> None:
        unfinished.offer(name, tensors, {"step": done})

    train_heads(groups, stream(first), steps, batch_size, first=first, after=after)


def fit(
    variants: Sequence[Inputs],
    labels: np.ndarray,
    *,
    seed: int = 0,
    steps: int = 12_500,
    batch_size: int = 128,
    learning_rates: Sequence[float] = LEARNING_RATES,
    device: str | torch.device = "cpu",
    unfinished: Unfinished | None = None,
) -> Head:
    """Train every head on 90% of the training features, choose one on the other 10%."""
    classes, ids = np.unique(labels, return_inverse=True)
    fitting, choosing = choice_split(ids, seed)
    size = min(batch_size, len(fitting))
    device, unfinished = torch.device(device), unfinished or Unfinished()
    targets = torch.from_numpy(ids).to(device)
    choice = Choice(classes, unfinished)
    for number, variant in enumerate(variants):  # one after the other: only one copy of the features at a time
        check_features(*variant.parts)
        inputs = torch.from_numpy(variant.matrix()).to(device)

        def stream(first: int, inputs: Tensor = inputs) -> Iterator[Batch]:
            for rows in batches(len(fitting), size, steps, seed, first):
                index = torch.from_numpy(fitting[rows]).to(device)
                yield [inputs[index]], targets[index]

        for rates in _affordable(learning_rates, max(inputs.shape[1], size) * len(classes), MAX_NUMBERS):
            name = f"heads-{number}-{rates[0]:g}"
            if choice.has_considered(name):
                continue
            heads = Heads(inputs.shape[1], len(classes), rates, seed, device)
            train_resumably([heads], stream, steps, size, unfinished, name)
            choice.consider(variant.name, heads, rates, inputs[choosing], targets[choosing])
            choice.put_aside(name)
    return choice.made()


def _affordable(learning_rates: Sequence[float], numbers_per_head: int, limit: int) -> list[Sequence[float]]:
    """The learning rates in groups that are trained at once: all, unless weights or logits exceed the limit."""
    at_once = max(1, min(len(learning_rates), limit // numbers_per_head))
    return [learning_rates[i : i + at_once] for i in range(0, len(learning_rates), at_once)]


@dataclass(frozen=True)
class _Share:
    """Some heads of the grid, trained in the same pass as others: the variant they read and their learning rates."""

    variant: int
    rates: Sequence[float]


def _passes(widths: Sequence[int], num_classes: int, size: int) -> list[list[_Share]]:
    """The whole grid in as few passes as keep to MAX_STREAMED numbers each."""
    passes: list[list[_Share]] = [[]]
    held = 0
    for variant, width in enumerate(widths):
        per_head = max(width, size) * num_classes
        for rates in _affordable(LEARNING_RATES, per_head, MAX_STREAMED):
            if passes[-1] and held + len(rates) * per_head > MAX_STREAMED:
                passes.append([])
                held = 0
            passes[-1].append(_Share(variant, rates))
            held += len(rates) * per_head
    return passes


def fit_stream(
    variants: Sequence[Inputs],
    labels: np.ndarray,
    stream: Callable[[int], Iterable[Batch]],
    choosing: np.ndarray,
    *,
    seed: int = 0,
    steps: int = 12_500,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    unfinished: Unfinished | None = None,
) -> Head:
    """As `fit`, on a stream of augmented batches of `batch_size` images; stream(first) begins with batch `first`.

    `variants` of clean features serve for the choice on `choosing`.
    """
    classes, ids = np.unique(labels, return_inverse=True)
    device, unfinished = torch.device(device), unfinished or Unfinished()
    widths = [sum(part.shape[1] for part in variant.parts) for variant in variants]
    targets = torch.from_numpy(ids[choosing]).to(device)
    choice = Choice(classes, unfinished)
    for number, shares in enumerate(_passes(widths, len(classes), batch_size)):
        name = f"heads-{number}"
        if choice.has_considered(name):
            continue
        groups = [Heads(widths[share.variant], len(classes), share.rates, seed, device) for share in shares]

        def read(first: int, shares: Sequence[_Share] = shares) -> Iterator[Batch]:
            for inputs, batch_targets in stream(first):
                yield [inputs[share.variant] for share in shares], batch_targets

        train_resumably(groups, read, steps, batch_size, unfinished, name)
        for share, heads in zip(shares, groups, strict=True):
            variant = variants[share.variant]
            inputs = torch.from_numpy(np.concatenate([part[choosing] for part in variant.parts], axis=1)).to(device)
            choice.consider(variant.name, heads, share.rates, inputs, targets)
        choice.put_aside(name)
    return choice.made()


class Choice:
    """Keeps the head with the best accuracy on the choosing images; ties by cross-entropy, then the first."""

    def __init__(self, classes: np.ndarray, unfinished: Unfinished) -> None:
        self.classes, self.unfinished = classes, unfinished
        self.merit: tuple[float, float] = (-1.0, -np.inf)
        self.head: Head | None = None
        self.considered: list[str] = []
        if (found := unfinished.load("choice")) is not None:
            tensors, facts = found
            parts = tensors["weight"].numpy(), tensors["bias"].numpy()
            self.head = Head(facts["inputs"], facts["learning_rate"], *parts, classes)
            self.merit, self.considered = tuple(facts["merit"]), facts["considered"]

    def has_considered(self, name: str) -> bool:
        """Whether the heads called so were judged before an interruption."""
        return name in self.considered

    def put_aside(self, name: str) -> None:
        """Note that the heads called `name` are judged."""
        self.considered.append(name)
        head = self.made()
        facts = {"inputs": head.inputs, "learning_rate": head.learning_rate, "merit": self.merit}
        tensors = {"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)}
        self.unfinished.offer("choice", tensors, facts | {"considered": self.considered})

    def consider(self, name: str, heads: Heads, rates: Sequence[float], inputs: Tensor, targets: Tensor) -> None:
        """Score trained heads on the choosing images, `inputs` (n, D) and `targets` (n,)."""
        accuracy, loss = heads.score(inputs, targets)
        for i, rate in enumerate(rates):
            merit = (float(accuracy[i]), -float(loss[i]))
            if np.isfinite(merit[1]) and merit > self.merit:
                self.merit = merit
                weight, bias = (part.cpu().numpy().copy() for part in heads.head(i))
                self.head = Head(name, rate, weight, bias, self.classes)

    def made(self) -> Head:
        """The chosen head."""
        assert self.head is not None, "the smallest learning rates do not diverge on finite features"
        return self.head


def fit_dino(
    inputs: Inputs,
    labels: np.ndarray,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    unfinished: Unfinished | None = None,
) -> Head:
    """DINO's head on one input: batch 256, learning rate .001, 100 epochs."""
    check_features(*inputs.parts)
    classes, ids = np.unique(labels, return_inverse=True)
    device = torch.device(device)
    x, y = torch.from_numpy(inputs.matrix()).to(device), torch.from_numpy(ids).to(device)
    size = min(256, len(x))
    steps = max(1, 100 * len(x) // size)
    heads = Heads(x.shape[1], len(classes), [0.001], seed, device)

    def stream(first: int) -> Iterator[Batch]:
        for rows in batches(len(x), size, steps, seed, first):
            index = torch.from_numpy(rows).to(device)
            yield [x[index]], y[index]

    train_resumably([heads], stream, steps, size, unfinished or Unfinished(), "head")
    weight, bias = heads.head(0)
    return Head(inputs.name, 0.001, weight.cpu().numpy(), bias.cpu().numpy(), classes)


def mae_batch_size(num_images: int) -> int:
    """MAE's 16,384 images, but at least 64 batches in an epoch."""
    return min(16_384, max(1, num_images // 64))


def fit_mae(
    inputs: Inputs,
    labels: np.ndarray,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    unfinished: Unfinished | None = None,
) -> Head:
    """MAE's linear probe (arXiv:2111.06377, table 10): LARS on features normalised by the statistics of train.

    With features fixed, those statistics are what the running ones of its batch norm tend to. The norm is folded into
    the head that is returned.
    """
    check_features(*inputs.parts)
    classes, ids = np.unique(labels, return_inverse=True)
    device = torch.device(device)
    x, y = torch.from_numpy(inputs.matrix()).to(device), torch.from_numpy(ids).to(device)
    mean, scale = x.mean(dim=0), (x.var(dim=0, correction=0) + 1e-6).rsqrt()
    generator, unfinished = torch.Generator().manual_seed(seed), unfinished or Unfinished()
    weight = torch.empty(x.shape[1], len(classes)).normal_(0, 0.01, generator=generator).to(device)
    bias = torch.zeros(len(classes), device=device)
    speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
    state = {"weight": weight, "bias": bias, "weight_speed": speeds[0], "bias_speed": speeds[1]}
    size = mae_batch_size(len(x))
    per_epoch = max(1, len(x) // size)
    first = unfinished.resume("head", state)
    for step, indices in enumerate(batches(len(x), size, 90 * per_epoch, seed, first), first):
        slope, bias_slope = _slopes(x, y, torch.from_numpy(indices).to(device), (mean, scale), weight, bias)
        rate = 0.1 * size / 256 * _mae_schedule(step / per_epoch)
        _lars_step(weight, slope, speeds[0], rate, adapt=True)
        _lars_step(bias, bias_slope, speeds[1], rate, adapt=False)
        unfinished.offer("head", state, {"step": step + 1})
    folded = weight * scale[:, None]
    return Head(inputs.name, 0.1, folded.cpu().numpy(), (bias - mean @ folded).cpu().numpy(), classes)


def _slopes(
    x: Tensor, y: Tensor, index: Tensor, norm: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients (D, C) and (C,) of the mean cross-entropy over the images at `index`, some of them at a time."""
    slope, bias_slope = torch.zeros_like(weight), torch.zeros_like(bias)
    for rows in index.split(max(1, MAX_NUMBERS // len(bias))):
        inputs = (x[rows] - norm[0]) * norm[1]
        error = torch.addmm(bias, inputs, weight).softmax(dim=1)
        error[torch.arange(len(rows), device=x.device), y[rows]] -= 1
        slope.addmm_(inputs.T, error, alpha=1 / len(index))
        bias_slope += error.sum(dim=0) / len(index)
    return slope, bias_slope


def _mae_schedule(epoch: float) -> float:
    """Share of the peak: linear warm-up over 10 epochs, then a cosine to 0 at epoch 90."""
    return epoch / 10 if epoch < 10 else 0.5 * (1 + np.cos(np.pi * (epoch - 10) / 80))


def _lars_step(weight: Tensor, gradient: Tensor, speed: Tensor, rate: float, *, adapt: bool) -> None:
    """One LARS step (You et al., arXiv:1708.03888) as MAE uses it: trust coefficient .001, momentum .9, decay 0."""
    if adapt:
        norm, size = weight.norm(), gradient.norm()
        gradient = gradient * torch.where((norm > 0) & (size > 0), 0.001 * norm / size, 1.0)
    speed.mul_(MOMENTUM).add_(gradient)
    weight.sub_(speed, alpha=rate)
