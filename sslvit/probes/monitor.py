"""k-NN and health of an encoder while it trains, on clean images that were decoded once. Not a protocol of its own.

Numbers are those of `evaluate --protocol knn,health` on at most `num_images` images of each set.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sslvit.data.loader import clean_batches
from sslvit.data.photometry import normalize
from sslvit.data.sources import Source
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.vit import forward_layers
from sslvit.probes.features import choose_indices
from sslvit.probes.health import feature_std, rankme
from sslvit.probes.knn import knn


class KnnMonitor:
    """Call it with an encoder between two steps: {"knn/top1": ..., "rankme": ..., "feature_std": ...}.

    Without a validation set, or without labels in both, only health is measured.
    """

    def __init__(
        self,
        train_source: Source,
        val_source: Source | None,
        preprocessing: Preprocessing,
        num_images: int = 5000,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        self.preprocessing, self.batch_size, self.precision = preprocessing, batch_size, precision
        self.train, self.train_labels = _decode(train_source, preprocessing, num_images, batch_size, num_workers, seed)
        self.val = self.train[:0]
        self.val_labels: dict[str, np.ndarray] = {}
        if val_source is not None and self.train_labels and val_source.labels:
            self.val, self.val_labels = _decode(val_source, preprocessing, num_images, batch_size, num_workers, seed)

    def __call__(self, encoder: nn.Module, step: int) -> dict[str, float]:
        """Numbers of `encoder` as it stands at `step`; its training mode is left as it was."""
        train = self._features(encoder, self.train)
        results = {"rankme": rankme(train, seed=step), "feature_std": feature_std(train)}
        if not np.isfinite(train).all() or len(self.val) == 0:
            return results
        val = self._features(encoder, self.val)
        shared = [name for name in self.train_labels if name in self.val_labels]
        for name in shared:
            ranking = knn(train, self.train_labels[name], val, ks=(20,))[20]
            results[f"knn/{name}/top1"] = float((ranking[:, 0] == self.val_labels[name]).mean())
        if shared:
            results = {"knn/top1": float(np.mean([results[f"knn/{name}/top1"] for name in shared])), **results}
        if len(shared) == 1:
            del results[f"knn/{shared[0]}/top1"]
        return results

    @torch.no_grad()
    def _features(self, encoder: nn.Module, images: Tensor) -> np.ndarray:
        """(n, D) float32 of uint8 images (n, C, H, W)."""
        was_training = encoder.training
        encoder.eval()
        device = next(encoder.parameters()).device
        parts = []
        for batch in images.split(self.batch_size):
            pixels = normalize(batch.to(device), self.preprocessing.mean, self.preprocessing.std)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                parts.append(forward_layers(encoder, pixels, 1)[-1].cls.float().cpu())
        encoder.train(was_training)
        return torch.cat(parts).numpy()


def _decode(
    source: Source, preprocessing: Preprocessing, num_images: int, batch_size: int, num_workers: int, seed: int
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """At most `num_images` clean images as one uint8 tensor (n, C, H, W), with their labels."""
    batches, kept = [], []
    indices = choose_indices(len(source), num_images, seed)
    for images, batch_indices in clean_batches(source, preprocessing, batch_size, num_workers, indices):
        batches.append(images)
        kept.append(np.asarray(batch_indices, dtype=np.int64))
    index = np.concatenate(kept)
    return torch.cat(batches), {name: np.asarray(values)[index] for name, values in source.labels.items()}
