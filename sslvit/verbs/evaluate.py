"""`sslvit evaluate`: how good is an encoder? Numbers on labelled images, each with interval, protocol and controls.

Reads top to bottom: open the sets, load encoder and controls, extract features once, run each probe, write rows.
Each (encoder or control, probe) is a cell; finished cells are kept in OUT/cells/ and not measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslvit.config import EvaluateConfig, check_config, load_config
from sslvit.data.sources import Source, open_source
from sslvit.encoder.weights import LoadedEncoder, load_encoder, random_like
from sslvit.errors import InputError
from sslvit.probes.features import Features, extract, pixel_features, source_digest
from sslvit.probes.protocols import PROBES, Score, score
from sslvit.probes.rows import Row, add_results, bootstrap_ci, describe, row

CONTROLS = ("random_init", "pixels")
NUM_BLOCKS = 4  # what the linear grid reads


@dataclass
class Subject:
    """What is judged: the encoder (control "") or one of the controls. encoder is None for raw pixels."""

    control: str
    encoder: LoadedEncoder | None

    @property
    def fingerprint(self) -> str:
        """Tells one set of weights from another."""
        return self.encoder.fingerprint if self.encoder is not None else "pixels"


def evaluate(*, config_file: str | Path | None = None, output_dir: str | Path | None = None, **keys: Any) -> list[Row]:
    """Judge an encoder; returns the rows it also adds to OUT/results.json. Keys as on the command line.

    Raises InputError for anything wrong with the input: an unreadable set, no labels, features that are not finite.
    """
    for key in ("protocol", "controls"):
        if isinstance(keys.get(key), str):
            keys[key] = [part.strip() for part in keys[key].split(",") if part.strip()]
    config = load_config(EvaluateConfig, config_file, keys)
    check_config(config)
    _check_names(config)
    folder = Path(output_dir or default_output_dir(str(config.encoder)))
    train, val = open_source(str(config.train_dataset)), open_source(str(config.val_dataset))
    labels = shared_labels(train, val)
    rows = []
    for subject in _subjects(config):
        rows += _judge(subject, train, val, labels, config, folder)
    print(f"{folder / 'results.json'}: {len(rows)} rows")
    return rows


def default_output_dir(encoder: str) -> Path:
    """runs/evaluate-NAME, NAME from the end of the encoder's spec."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", encoder.rstrip("/").split("/")[-1]).strip("-.")
    return Path("runs") / f"evaluate-{name or 'encoder'}"


def _check_names(config: EvaluateConfig) -> None:
    for name in config.protocol:
        if name not in PROBES:
            raise InputError(f"protocol {name!r} is unknown; there are {', '.join(PROBES)}")
    for name in config.controls:
        if name not in CONTROLS:
            raise InputError(f"control {name!r} is unknown; there are {', '.join(CONTROLS)} (controls=[] for none)")
    if not config.protocol:
        raise InputError(f"protocol is empty; give at least one of {', '.join(PROBES)}")


def shared_labels(train: Source, val: Source) -> list[str]:
    """Names of the labels both sets have; InputError when there is none."""
    for source in (train, val):
        if not source.labels:
            raise InputError(f"{source.spec} has no labels; evaluate needs class folders, a label column or .cls files")
    shared = [name for name in train.labels if name in val.labels]
    if not shared:
        raise InputError(
            f"the sets share no label: train has {', '.join(train.labels)}, val has {', '.join(val.labels)}"
        )
    return shared


def _subjects(config: EvaluateConfig) -> Iterator[Subject]:
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(str(config.encoder), device=device)
    if config.image_size is not None:
        encoder = replace(encoder, preprocessing=replace(encoder.preprocessing, image_size=config.image_size))
    yield Subject("", encoder)
    if "random_init" in config.controls:
        yield Subject("random_init", random_like(encoder, config.seed))
    if "pixels" in config.controls:
        yield Subject("pixels", None)


def _judge(
    subject: Subject, train: Source, val: Source, labels: list[str], config: EvaluateConfig, folder: Path
) -> list[Row]:
    """All probes on one subject; features are extracted when the first unfinished cell asks for them."""
    sets: tuple[Features, Features] | None = None
    rows: list[Row] = []
    for name in config.protocol:
        cell = _cell(subject, name, train, val, config, folder)
        if cell.exists() and not config.overwrite:
            finished = json.loads(cell.read_text())
        else:
            sets = sets or (_features(subject, train, config, folder), _features(subject, val, config, folder))
            finished = _measure(subject, name, *sets, labels, config)
            _write_json(cell, finished)
        add_results(folder / "results.json", finished)
        for entry in finished:
            low, high = entry["ci95"]
            print(f"{entry['name']:32s} {entry['value']:.4f}  [{low:.4f}, {high:.4f}]  {entry['protocol']}")
        rows += finished
    return rows


def _cell(subject: Subject, name: str, train: Source, val: Source, config: EvaluateConfig, folder: Path) -> Path:
    """Where the rows of one probe on one subject are kept: named by everything they depend on."""
    settings = {
        key: getattr(config, key)
        for key in ("train_dataset", "val_dataset", "image_size", "seed", "precision", "augment", "num_images")
    }
    if name == "linear":
        settings |= {"steps": config.linear_steps, "batch_size": config.linear_batch_size}
    content = [source_digest(source, np.arange(len(source))) for source in (train, val)]
    text = json.dumps([subject.control, name, subject.fingerprint, settings, content], sort_keys=True)
    return (
        folder
        / "cells"
        / f"{name}-{subject.control or 'encoder'}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    )


def _features(subject: Subject, source: Source, config: EvaluateConfig, folder: Path) -> Features:
    num_workers = config.num_workers or 0
    if subject.encoder is None:
        return pixel_features(source, num_workers=num_workers, num_images=config.num_images, seed=config.seed)
    encoder = subject.encoder
    device = next(encoder.module.parameters()).device
    return extract(
        encoder.module,
        encoder.preprocessing,
        source,
        fingerprint=encoder.fingerprint,
        num_blocks=min(NUM_BLOCKS, len(encoder.module.blocks)),
        batch_size=config.batch_size,
        device=device,
        precision=config.precision or "fp32",
        num_workers=num_workers,
        num_images=config.num_images,
        seed=config.seed,
        cache_dir=Path(os.environ.get("SSLVIT_CACHE") or folder / "features"),
    )


def _measure(
    subject: Subject, name: str, train: Features, val: Features, labels: list[str], config: EvaluateConfig
) -> list[Row]:
    """One probe on one subject: fit on train, answer for val, score once per label; the mean over several labels."""
    per_label: dict[str, list[Score]] = {}
    for label in labels:
        train_labels, val_labels = train.labels[label], align_labels(train, val, label)
        fitted = PROBES[name](train, train_labels, config)
        per_label[label] = score(fitted(val), val_labels, len(np.unique(train_labels)))
    prefix = f"{name}/{subject.control}" if subject.control else name
    rows = [_row(f"{prefix}/{s.metric}", [s], train, val, config, subject) for s in per_label[labels[0]]]
    if len(labels) == 1:
        return rows
    by_metric: dict[str, list[Score]] = {}
    rows = []
    for label, scores in per_label.items():
        for s in scores:
            by_metric.setdefault(s.metric, []).append(s)
            rows.append(_row(f"{prefix}/{label}/{s.metric}", [s], train, val, config, subject))
    means = [
        _row(f"{prefix}/{metric}", scores, train, val, config, subject)
        for metric, scores in by_metric.items()
        if len(scores) == len(labels)
    ]
    return means + rows


def align_labels(train: Features, val: Features, label: str) -> np.ndarray:
    """Validation labels (m,) in the numbering of train: by class name where both name them, -1 for unseen names."""
    values = val.labels[label]
    known, names = train.class_names.get(label), val.class_names.get(label)
    if not known or not names or known == names:
        return values
    table = np.array([known.index(name) if name in known else -1 for name in names], dtype=np.int64)
    return np.where((values >= 0) & (values < len(names)), table[values.clip(0, len(names) - 1)], -1)


def _row(
    name: str, scores: list[Score], train: Features, val: Features, config: EvaluateConfig, subject: Subject
) -> Row:
    """The row of one score, or of the mean of the same score over several labels (image by image)."""
    per_image = np.mean([s.per_image for s in scores], axis=0)
    words = scores[0].protocol if len(scores) == 1 else f"mean over {len(scores)} labels; {scores[0].protocol}"
    preprocessing = subject.encoder.preprocessing if subject.encoder is not None else None
    size = "32 px" if preprocessing is None else f"{preprocessing.image_size} px, crop {preprocessing.crop_pct:g}"
    protocol = describe(words, images=size, train=len(train), val=len(val), precision=config.precision or "fp32")
    return row(
        name,
        float(per_image.mean()),
        ci95=bootstrap_ci(per_image, config.seed),
        protocol=protocol,
        data=f"{config.train_dataset} -> {config.val_dataset}",
        seed=config.seed,
        step=getattr(subject.encoder, "step", None),
    )


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, file)
