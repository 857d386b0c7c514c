"""k-NN, linear heads and feature extraction: ours, the published evaluation written out, scikit-learn, timm."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from knn_million import by_torch, clouds
from torch import Tensor, nn

from sslvit.encoder.vit import forward_layers
from sslvit.probes.knn import TEMPERATURE, knn
from sslvit.probes.linear import LEARNING_RATES, MOMENTUM, Heads, batches, train_heads

# ---- k-NN -----------------------------------------------------------------------------------------------------------


def knn_ways(rows: int, queries: int, dim: int = 384) -> dict[str, Callable[[], np.ndarray]]:
    """Name -> the predicted label of each query at k = 20, (queries,)."""
    train, labels = clouds(rows, dim, seed=1)
    asked, _ = clouds(queries, dim, seed=2)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "ours": lambda: knn(train, labels, asked)[20][:, 0],
        "official": lambda: by_torch(train, labels, asked)[20][:, 0],
    }
    if importlib.util.find_spec("sklearn") is not None:
        ways["sklearn"] = lambda: _by_sklearn(train, labels, asked)
    return ways


def _by_sklearn(train: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Its brute-force classifier with DINO's weights, on unit vectors; one k only, where the others answer for four."""
    from sklearn.neighbors import KNeighborsClassifier

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def weights(distances: np.ndarray) -> np.ndarray:  # euclidean, of unit vectors: cos = 1 - d^2 / 2
        return np.exp((1 - distances**2 / 2) / TEMPERATURE)

    return KNeighborsClassifier(20, weights=weights, algorithm="brute").fit(unit(train), labels).predict(unit(asked))


def knn_memory(way: str, rows: int, queries: int, dim: int = 384) -> float:
    """MB at the peak above the features of a search, in a process of its own. way: ours or torch."""
    sizes = {"rows": rows, "dim": dim, "queries": queries}
    code = "import json, sys, pathlib, knn_million; way, sizes, folder = sys.argv[1:]; "
    code += "knn_million.measure(way, json.loads(sizes), pathlib.Path(folder))"
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", code, way, json.dumps(sizes), folder]
        subprocess.run(words, check=True, cwd=Path(__file__).parent)
        facts = json.loads((Path(folder) / f"{way}.json").read_text())
    data = 4 * dim * (rows + queries)
    return max(0.0, facts["memory"] * 4 * dim * rows - data) / 1e6


# ---- linear heads ---------------------------------------------------------------------------------------------------


class LinearHeads:
    """DINOv2's grid of 52 heads on cached features of four inputs, trained at once and one by one, on equal batches."""

    def __init__(self, images: int, steps: int, classes: int = 100, width: int = 384, batch: int = 128) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = [torch.randn(images, width * n, generator=generator) for n in (1, 4, 2, 5)]
        self.labels = torch.randint(classes, (images,), generator=generator)
        self.classes, self.steps, self.batch = classes, steps, batch
        self.order = [torch.from_numpy(index) for index in batches(images, batch, steps, seed=0)]

    @property
    def num_heads(self) -> int:
        """52."""
        return len(self.inputs) * len(LEARNING_RATES)

    def together(self) -> list[Tensor]:
        """Weights (D, C) of every head."""
        made = []
        for x in self.inputs:
            heads = Heads(x.shape[1], self.classes, LEARNING_RATES, 0, torch.device("cpu"))
            train_heads([heads], (([x[i]], self.labels[i]) for i in self.order), self.steps, self.batch)
            made += [heads.head(i)[0] for i in range(len(LEARNING_RATES))]
        return made

    def one_by_one(self) -> list[Tensor]:
        """The same from torch's Linear, cross-entropy, SGD and cosine schedule, a run for each head."""
        return [self._alone(x, rate) for x in self.inputs for rate in LEARNING_RATES]

    def _alone(self, x: Tensor, rate: float) -> Tensor:
        head = nn.Linear(x.shape[1], self.classes)
        start = torch.empty(x.shape[1], self.classes).normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            head.weight.copy_(start.T)
            head.bias.zero_()
        optimizer = torch.optim.SGD(head.parameters(), lr=rate * self.batch / 256, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for index in self.order:
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(x[index]), self.labels[index]).backward()
            optimizer.step()
            schedule.step()
        return head.weight.detach().T


# ---- features -------------------------------------------------------------------------------------------------------


def feature_ways(name: str, batch: int, bf16: bool) -> dict[str, Callable[[], Tensor]]:
    """Name -> class tokens of a batch of images, from the same encoder."""
    torch.manual_seed(0)
    encoder = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    images = torch.randn(batch, 3, 224, 224)

    @torch.no_grad()
    def ours() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return forward_layers(encoder, images, 1)[0].cls.float()

    @torch.no_grad()
    def by_timm(autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return encoder.forward_features(images)[:, 0].float()

    ways = {"ours": ours, "timm": lambda: by_timm(False)}
    return {**ways, "timm_autocast": lambda: by_timm(True)} if bf16 else ways
