"""k-NN and health of an encoder while it trains, on clean images that were decoded once. Not a protocol of its own.

Numbers are those of `evaluate --protocol knn,health` on at most `num_images` images of each set. Of several processes
each decodes and encodes its share of the images; the main one compares them.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from sslvit import distributed
from sslvit.data.loader import clean_batches
from sslvit.data.photometry import normalize
from sslvit.data.records import is_known
from sslvit.data.sources import Source
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.vit import Encoder
from sslvit.errors import InputError
from sslvit.probes.features import choose_indices, default_precision, forward_clean
from sslvit.probes.health import feature_std, rankme
from sslvit.probes.knn import knn
from sslvit.probes.labels import agree

HELD_OUT = 100  # images at least: of fewer, two points are one or two


class KnnMonitor:
    """Call it with an encoder between two steps: {"knn/top1": ..., "rankme": ..., "feature_std": ...}.

    Without a validation set, or without labels in both, only health is measured. With `hold_out`, a train set that has
    labels is its own judge where there is no validation set that has some: half of its images, at most `num_images` and
    chosen by the seed, are held out of the neighbours. precision: None is that of `evaluate`. num_workers: threads that
    decode, None as many as in pretraining. Making it and calling it are collective; only the main process gets numbers,
    the others {}. `seconds` is what it has taken so far, decoding included.
    """

    def __init__(
        self,
        train_source: Source,
        val_source: Source | None,
        preprocessing: Preprocessing,
        num_images: int = 5000,
        *,
        hold_out: bool = False,
        batch_size: int = 256,
        num_workers: int | None = None,
        precision: str | None = None,
        seed: int = 0,
    ) -> None:
        began = time.monotonic()
        self.preprocessing, self.batch_size, self.precision = preprocessing, batch_size, precision
        kept, judged = choose_indices(len(train_source), num_images, seed), np.zeros(0, np.int64)
        if hold_out and train_source.labels and (val_source is None or not val_source.labels):
            val_source, (kept, judged) = train_source, _halves(train_source, num_images, seed)
        elif val_source is not None and val_source.labels:
            judged = choose_indices(len(val_source), num_images, seed)
        if val_source is not None:
            train_source, val_source = _agreed(train_source, val_source)
        self.train, train_labels = _decode(train_source, preprocessing, kept, batch_size, num_workers)
        self.val = self.train[:0]
        self.labels: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of train and val, numbered alike
        if val_source is not None and train_labels and len(judged):
            self.val, labels = _decode(val_source, preprocessing, judged, batch_size, num_workers)
            shared = [name for name in train_labels if name in labels]
            self.labels = {name: (train_labels[name], labels[name]) for name in shared if _are_classes(labels[name])}
        self.seconds = time.monotonic() - began

    def __call__(self, encoder: Encoder, step: int) -> dict[str, float]:
        """Numbers of `encoder` as it stands at `step`; its training mode is left as it was."""
        began = time.monotonic()
        results = self._measure(encoder, step)
        self.seconds += time.monotonic() - began
        return results

    def _measure(self, encoder: Encoder, step: int) -> dict[str, float]:
        train = self._features(encoder, self.train)
        val = self._features(encoder, self.val) if self.labels else train[:0]
        if not distributed.is_main():
            return {}
        results = {"rankme": rankme(train, seed=step), "feature_std": feature_std(train)}
        if not self.labels or not np.isfinite(train).all():
            return results
        accuracies = {name: _accuracy(train, val, *labels) for name, labels in self.labels.items()}
        results = {"knn/top1": float(np.mean(list(accuracies.values()))), **results}
        if len(accuracies) > 1:
            results |= {f"knn/{name}/top1": accuracy for name, accuracy in accuracies.items()}
        return results

    def _features(self, encoder: Encoder, images: Tensor) -> np.ndarray:
        """(n, D) float32 of the uint8 images (n / processes, C, H, W) of all processes."""
        device = next(encoder.parameters()).device
        precision = self.precision or default_precision(device)
        parts = [torch.zeros(0, encoder.num_features)]
        for batch in images.split(self.batch_size) if len(images) else ():
            pixels = normalize(batch.to(device), self.preprocessing.mean, self.preprocessing.std)
            parts.append(forward_clean(encoder, pixels, 1, precision)[0].cls.cpu())
        return distributed.all_gather_cat(torch.cat(parts)).numpy()


def _agreed(train: Source, val: Source) -> tuple[Source, Source | None]:
    """Both with their labels read alike; without val where that cannot be: a run needs no labels."""
    try:
        train, val, lines = agree(train, val)
    except InputError as error:
        lines, agreed = [f"k-NN is not watched: {error}"], None
    else:
        agreed = val
    for line in lines if distributed.is_main() else ():
        print(line)
    return train, agreed


def _are_classes(values: np.ndarray) -> bool:
    return values.ndim == 1 and values.dtype.kind == "i"


def _accuracy(train: np.ndarray, val: np.ndarray, train_labels: np.ndarray, val_labels: np.ndarray) -> float:
    """Top-1 of k-NN with k = 20 on the images whose labels are known; NaN when none is."""
    known, judged = is_known(train_labels), is_known(val_labels)
    if not known.any() or not judged.any() or not np.isfinite(val).all():
        return float("nan")
    ranking = knn(train[known], train_labels[known], val[judged], ks=(20,))[20]
    return float((ranking[:, 0] == val_labels[judged]).mean())


def _halves(source: Source, num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint keyed samples (n,) and (m,) of a source, equally large and at most `num_images` each; the second is
    empty where it would be too small to judge by.
    """
    chosen = choose_indices(len(source), 2 * num_images, seed)
    if len(chosen) < 2 * HELD_OUT:
        return choose_indices(len(source), num_images, seed), chosen[:0]
    mixed = np.random.default_rng([seed, len(chosen), 1]).permutation(chosen)
    return np.sort(mixed[len(mixed) // 2 :]), np.sort(mixed[: len(mixed) // 2])


def _decode(
    source: Source, preprocessing: Preprocessing, indices: np.ndarray, batch_size: int, num_workers: int | None
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Of the clean images at `indices` this process's share, uint8 (n, C, H, W), and the labels of all."""
    batches = [torch.zeros(0, preprocessing.channels, *preprocessing.size, dtype=torch.uint8)]
    kept = [np.zeros(0, np.int64)]
    share = np.array_split(indices, distributed.world_size())[distributed.rank()]
    for images, batch_indices in clean_batches(source, preprocessing, batch_size, num_workers, share):
        batches.append(images)
        kept.append(np.asarray(batch_indices, dtype=np.int64))
    index = distributed.all_gather_cat(torch.from_numpy(np.concatenate(kept))).numpy()
    if not len(index):
        raise InputError(f"{source.spec} has no readable image; `sslvit check-data` lists the reasons")
    return torch.cat(batches), {name: np.asarray(values)[index] for name, values in source.labels.items()}
