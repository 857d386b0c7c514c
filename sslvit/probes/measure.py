"""One probe on one encoder and two sets: whose labels are compared how, and the means over several labels.

The validation labels are taken off before a fitted probe sees the images, and used in one call of `score`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from sslvit.data.records import is_known
from sslvit.data.sources import Source
from sslvit.errors import InputError
from sslvit.probes import segmentation
from sslvit.probes.config import EvaluateConfig
from sslvit.probes.features import Examples
from sslvit.probes.knn import check_features
from sslvit.probes.protocols import fit_segmentation, measure_duplicates, measure_health, probe_for
from sslvit.probes.scores import Score, mean_score, score

WITHOUT_TRAIN = ("retrieval", "cluster")  # probes that are fitted on no image


def measure(name: str, train: Examples, val: Examples, config: EvaluateConfig) -> list[Score]:
    """The numbers of probe `name`: fitted on `train`, answering for `val` without its labels, scored once.

    The labels of both are those that `labels.agree` made of their sources. With several labels, each
    metric's mean over them comes first, then each by label.
    """
    if name == "health":
        return measure_health(train, config)
    if name not in WITHOUT_TRAIN:
        check_apart(train, val)
    check_features(train.features.cls, val.features.cls)
    if name == "segmentation":
        return _measure_masks(train, val, config)
    labels = shared_labels(train.source, val.source)
    per_label = {label: _measure_label(name, label, train, val, config) for label in labels}
    further = []
    if name == "retrieval" and train.digest != val.digest:
        further = [measure_duplicates(train, _unlabelled(val), config)]
    if len(labels) == 1:
        return per_label[labels[0]] + further
    by_metric: dict[str, list[Score]] = {}
    for one in (one for scores in per_label.values() for one in scores):
        by_metric.setdefault(one.metric, []).append(one)
    means = [mean_score(scores, config.seed) for scores in by_metric.values() if len(scores) == len(labels)]
    return (
        means
        + [replace(one, metric=f"{label}/{one.metric}") for label, scores in per_label.items() for one in scores]
        + further
    )


def check_apart(train: Examples, val: Examples) -> None:
    """InputError when both are the same images: the number would say what was learnt by heart."""
    if train.digest == val.digest:
        raise InputError(
            f"the training and the validation set are the same images ({val.source.spec}), so a probe would be judged "
            "on what it was fitted to; give another --val-dataset"
        )


def _unlabelled(examples: Examples) -> Examples:
    return examples.take(np.arange(len(examples.features)), labels=False)


def _measure_masks(train: Examples, val: Examples, config: EvaluateConfig) -> list[Score]:
    segmentation.check_masks(train.source, val.source)
    answers = fit_segmentation(train, config)(_unlabelled(val))
    maps = [segmentation.class_map(val.source, int(i), val.preprocessing) for i in val.features.indices]
    return score(answers, torch.stack(maps).numpy(), config.seed)


def shared_labels(train: Source, val: Source) -> list[str]:
    """Names of the labels both sets have; InputError when there is none."""
    for source in (train, val):
        if not source.labels:
            raise InputError(
                f"{source.spec} has no labels; give class folders, a label column, .cls files or label_file=CSV"
            )
    shared = [name for name in train.labels if name in val.labels]
    if not shared:
        has = [", ".join(source.labels) for source in (train, val)]
        raise InputError(f"the sets share no label: the training set has {has[0]}, the validation set {has[1]}")
    return shared


def _measure_label(name: str, label: str, train: Examples, val: Examples, config: EvaluateConfig) -> list[Score]:
    train_labels, val_labels = train.features.labels[label], val.features.labels[label]
    known, judged = is_known(train_labels), is_known(val_labels)
    if not known.any() or not judged.any():
        empty = (train if not known.any() else val).source.spec
        raise InputError(f"{empty}: label {label!r} is unknown for every image")
    part = train.take(np.flatnonzero(known), labels=True)
    part.unfinished = train.unfinished.named(label)
    fitted = probe_for(name, train_labels, label)(part, train_labels[known], config)
    answers = fitted(val.take(np.flatnonzero(judged), labels=False))
    return score(answers, val_labels[judged], config.seed)
