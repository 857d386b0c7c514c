"""`sslvit evaluate`: how good is an encoder? Numbers on labelled images, each with interval, protocol and controls.

Reads top to bottom: open the sets, load encoder and controls, extract features once, run each probe, write rows. Each
(encoder or control, probe) is a cell: what is finished is kept in OUT/evaluate/cells/ and not measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslvit.config import EvaluateConfig, check_config, load_config
from sslvit.data.sources import Source, open_source
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.weights import LoadedEncoder, load_encoder, random_like
from sslvit.errors import InputError
from sslvit.probes import segmentation
from sslvit.probes.config import check_evaluate
from sslvit.probes.features import (
    PIXEL_SIZE,
    Examples,
    Extraction,
    Features,
    default_precision,
    shared_cache,
    source_digest,
)
from sslvit.probes.label_file import with_label_file
from sslvit.probes.protocols import fit_segmentation, measure_health, probe_for
from sslvit.probes.rows import Row, describe, row
from sslvit.probes.scores import Score, mean_score, score
from sslvit.run_folder import RunFolder, default_output_dir

#: What an answer of each probe depends on, beside the encoder, the images and the seed.
PROBE_KEYS = {
    "linear": ("linear_steps", "linear_batch_size", "augment"),
    "attentive": ("attentive_steps", "linear_batch_size"),
}
UNSEEN = -2  # a class that the training set does not name: always wrong
NO_PIXELS = ("attentive",)  # probes that make no sense on raw pixels


@dataclass(frozen=True)
class Subject:
    """What is judged: the encoder (control "") or one of the controls. encoder is None for raw pixels."""

    control: str
    encoder: LoadedEncoder | None

    @property
    def fingerprint(self) -> str:
        """Tells one set of weights from another."""
        return f"{self.encoder.fingerprint} {self.encoder.architecture}" if self.encoder is not None else "pixels"


def evaluate(*, config_file: str | Path | None = None, output_dir: str | Path | None = None, **keys: Any) -> list[Row]:
    """Judge an encoder; returns the rows it also adds to OUT/results.json. Keys as on the command line.

    Raises InputError for anything wrong with the input: an unreadable set, no labels, features that are not finite.
    """
    for key in ("protocol", "controls"):
        if isinstance(keys.get(key), str):
            keys[key] = [part.strip() for part in keys[key].split(",") if part.strip()]
    config = load_config(EvaluateConfig, config_file, keys)
    check_config(config)
    check_evaluate(config)
    path = Path(output_dir or default_output_dir("evaluate", config.encoder))
    train, val = _open(config.train_dataset, config), _open(config.val_dataset, config)
    with RunFolder.open(path, "evaluate", config, free_keys=["*"], overwrite=config.overwrite) as folder:
        rows = [row for subject in _subjects(config) for row in judge(subject, train, val, config, folder)]
        folder.finish()
    print(f"{path / 'results.json'}: {len(rows)} rows")
    return rows


def _open(spec: str | None, config: EvaluateConfig) -> Source:
    source = open_source(str(spec))
    return source if config.label_file is None else with_label_file(source, config.label_file)


def _subjects(config: EvaluateConfig) -> Iterator[Subject]:
    """The encoder, then the controls, one in memory at a time."""
    device = _device(config)
    encoder = load_encoder(str(config.encoder), device=device)
    if config.image_size is not None:
        encoder = replace(encoder, preprocessing=replace(encoder.preprocessing, image_size=config.image_size))
    yield Subject("", encoder)
    if "random_init" in config.controls:
        yield Subject("random_init", random_like(encoder, config.seed))
    if "pixels" in config.controls:
        yield Subject("pixels", None)


def _device(config: EvaluateConfig) -> str:
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def judge(subject: Subject, train: Source, val: Source, config: EvaluateConfig, folder: RunFolder) -> list[Row]:
    """All probes on one subject; features are extracted when the first unfinished cell asks for them."""
    sets = _examples(subject, train, config, folder), _examples(subject, val, config, folder)
    digest = [source_digest(one.source, one.selection) for one in sets]
    rows: list[Row] = []
    for name in config.protocol:
        if subject.encoder is None and name in NO_PIXELS:
            continue
        cell = _cell(subject, name, digest, sets, config)
        finished = None if config.overwrite else folder.read_json(cell)
        if finished is None:
            finished = [_row(subject, name, one, sets, config) for one in _measure(name, *sets, config)]
            _keep(folder, cell, finished)
        folder.add_results(finished)
        for entry in finished:
            print(_line(entry), flush=True)
        rows += finished
    return rows


def _examples(subject: Subject, source: Source, config: EvaluateConfig, folder: RunFolder) -> Examples:
    device = _device(config)
    extraction = Extraction(
        batch_size=config.batch_size,
        device=device,
        precision=config.precision or default_precision(device),
        num_workers=config.num_workers,
        num_images=config.num_images,
        seed=config.seed,
        cache_dir=shared_cache() or folder.path / "features",
    )
    if subject.encoder is None:
        extraction = replace(extraction, precision="fp32")
        return Examples(source, None, Preprocessing(PIXEL_SIZE), extraction, subject.fingerprint)
    return Examples(source, subject.encoder.module, subject.encoder.preprocessing, extraction, subject.fingerprint)


def _cell(
    subject: Subject, name: str, digest: list[str], sets: tuple[Examples, Examples], config: EvaluateConfig
) -> str:
    """Where the rows of one probe on one subject are kept: named by everything they depend on."""
    labels = [
        {label: hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest() for label, values in labels.items()}
        for labels in (one.source.labels for one in sets)
    ]
    settings = {
        key: getattr(config, key) for key in ("train_dataset", "val_dataset", "seed", *PROBE_KEYS.get(name, ()))
    }
    facts = [name, subject.control, subject.fingerprint, digest, labels, settings]
    facts += [str(sets[0].preprocessing), sets[0].extraction.precision]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return f"evaluate/cells/{name}-{subject.control or 'encoder'}-{key}.json"


def _keep(folder: RunFolder, cell: str, rows: list[Row]) -> None:
    (folder.path / cell).parent.mkdir(parents=True, exist_ok=True)
    folder.write_json(cell, rows)


def _measure(name: str, train: Examples, val: Examples, config: EvaluateConfig) -> list[Score]:
    """One probe on one subject: fit on train, answer for val without its labels, score once."""
    if name == "health":
        return measure_health(train, config)
    if name == "segmentation":
        segmentation.check_masks(train.source, val.source)
        answers = fit_segmentation(train, config)(val.take(np.arange(len(val.features)), labels=False))
        maps = [segmentation.class_map(val.source, int(i), val.preprocessing) for i in val.features.indices]
        return score(answers, torch.stack(maps).numpy(), config.seed)
    labels = shared_labels(train.source, val.source)
    per_label = {label: _measure_label(name, label, train, val, config) for label in labels}
    if len(labels) == 1:
        return per_label[labels[0]]
    metrics = {one.metric for one in per_label[labels[0]]}.intersection(
        *({one.metric for one in scores} for scores in per_label.values())
    )
    by_metric = {
        one.metric: [other for scores in per_label.values() for other in scores if other.metric == one.metric]
        for one in per_label[labels[0]]
        if one.metric in metrics
    }
    named = [replace(one, metric=f"{label}/{one.metric}") for label, scores in per_label.items() for one in scores]
    return [mean_score(scores, config.seed) for scores in by_metric.values()] + named


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
    train_labels, val_labels = train.features.labels[label], align_labels(train.features, val.features, label)
    known, judged = _known(train_labels), _known(val_labels)
    if not known.any() or not judged.any():
        empty = (train if not known.any() else val).source.spec
        raise InputError(f"{empty}: label {label!r} is unknown for every image")
    fitted = probe_for(name, train_labels, label)(
        train.take(np.flatnonzero(known), labels=True), train_labels[known], config
    )
    answers = fitted(val.take(np.flatnonzero(judged), labels=False))
    return score(answers, val_labels[judged], config.seed)


def _known(labels: np.ndarray) -> np.ndarray:
    """(n,) bool: is the label of the image known? -1 and NaN are not."""
    if labels.dtype.kind == "f":
        return np.isfinite(labels)
    return labels.min(axis=1) >= 0 if labels.ndim == 2 else labels != -1


def align_labels(train: Features, val: Features, label: str) -> np.ndarray:
    """Validation labels (m,) in the numbering of train: by class name where both name them, UNSEEN for new names."""
    values = val.labels[label]
    known, names = train.class_names.get(label), val.class_names.get(label)
    if not known or not names or known == names or values.ndim > 1:
        return values
    table = np.array([known.index(name) if name in known else UNSEEN for name in names], dtype=np.int64)
    return np.where(values < 0, values, table[values.clip(0, len(names) - 1)])


def _row(subject: Subject, name: str, one: Score, sets: tuple[Examples, Examples], config: EvaluateConfig) -> Row:
    """The row of one score: its full name, and all that the number rests on."""
    train, preprocessing = sets[0], sets[0].preprocessing
    protocol = describe(
        one.protocol,
        one.chosen,
        images=f"{preprocessing.image_size} px, crop {preprocessing.crop_pct:g}",
        n_train=len(train.features),
        n_val=one.num_images,
        precision=train.extraction.precision,
    )
    return row(
        "/".join(part for part in (name, subject.control, one.metric) if part),
        one.value,
        ci95=one.ci95,
        protocol=protocol,
        data=f"{config.train_dataset} -> {config.val_dataset}",
        seed=config.seed,
        step=None if subject.encoder is None else subject.encoder.step,
    )


def _line(entry: Row) -> str:
    interval = "" if entry["ci95"] is None else "[{:.4f}, {:.4f}]".format(*entry["ci95"])
    return f"{entry['name']:32s} {entry['value']:8.4f}  {interval:18s}  {entry['protocol']}"
