"""`sslvit evaluate`: how good is an encoder? Numbers on labelled images, each with interval, protocol and controls.

Reads top to bottom: open the sets, load encoder and controls, extract features once, run each probe, write rows. Each
(encoder or control, probe) is a cell: what is finished is kept in OUT/evaluate/cells/ and not measured again. What is
not is put aside on a signal and every minute, features and fits alike, and goes on to the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sslvit import distributed
from sslvit.config import EvaluateConfig, check_config, load_config
from sslvit.data.sources import Source, open_source
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.weights import LoadedEncoder, load_encoder, random_like
from sslvit.probes.features import (
    PIXEL_SIZE,
    Examples,
    Extraction,
    choose_indices,
    default_precision,
    shared_cache,
    source_digest,
)
from sslvit.probes.label_file import with_label_file
from sslvit.probes.labels import agree
from sslvit.probes.measure import measure
from sslvit.probes.protocols import protocol_hash
from sslvit.probes.rows import Row, describe, row
from sslvit.probes.scores import Score
from sslvit.probes.unfinished import Unfinished
from sslvit.run_folder import RunFolder, default_output_dir
from sslvit.signals import StopFlag

#: What an answer of each probe depends on, beside the encoder, the images and the seed.
PROBE_KEYS = {
    "linear": ("linear_steps", "linear_batch_size", "augment"),
    "attentive": ("attentive_steps", "linear_batch_size"),
}
Digested = tuple[Source, str]  # a set and the fingerprint of its chosen images
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

    Raises InputError for anything wrong with the input: an unreadable set, no labels, features that are not finite;
    Resumable on a signal.
    """
    for key in ("protocol", "controls"):
        if isinstance(keys.get(key), str):
            keys[key] = [part.strip() for part in keys[key].split(",") if part.strip()]
    config = load_config(EvaluateConfig, config_file, keys)
    check_config(config)
    device = str(distributed.choose_device(config.device))
    path = Path(output_dir or default_output_dir("evaluate", config.encoder))
    train, val = _open_both(config)
    with (
        RunFolder.open(path, "evaluate", config, free_keys=["*"], overwrite=config.overwrite) as folder,
        StopFlag() as stop,
    ):
        subjects = _subjects(config, device)
        rows = [row for subject in subjects for row in judge(subject, train, val, config, folder, device, stop)]
        folder.finish()
    print(f"{path / 'results.json'}: {len(rows)} rows")
    return rows


def _open_both(config: EvaluateConfig) -> tuple[Digested, Digested]:
    """Both sets, their labels read alike."""
    opened = [open_source(str(spec)) for spec in (config.train_dataset, config.val_dataset)]
    if config.label_file is not None:
        opened = [with_label_file(source, config.label_file) for source in opened]
    train, val, lines = agree(*opened)
    for line in lines:
        print(line)
    return _digested(train, config), _digested(val, config)


def _digested(source: Source, config: EvaluateConfig) -> Digested:
    return source, source_digest(source, choose_indices(len(source), config.num_images, config.seed))


def _subjects(config: EvaluateConfig, device: str) -> Iterator[Subject]:
    """The encoder, then the controls, one in memory at a time."""
    encoder = load_encoder(str(config.encoder), device=device, pooled=True)
    wanted = {key: getattr(config, key) for key in ("image_size", "crop_pct") if getattr(config, key) is not None}
    if "image_size" in wanted:
        wanted["image_width"] = None
    encoder = replace(encoder, preprocessing=replace(encoder.preprocessing, **wanted))
    yield Subject("", encoder)
    if "random_init" in config.controls:
        yield Subject("random_init", random_like(encoder, config.seed))
    if "pixels" in config.controls and encoder.preprocessing.channels in (1, 3):
        yield Subject("pixels", None)
    elif "pixels" in config.controls:
        print(f"pixels: skipped, it reads grey and RGB images this encoder {encoder.preprocessing.channels} channels")


def judge(
    subject: Subject,
    train: Digested,
    val: Digested,
    config: EvaluateConfig,
    folder: RunFolder,
    device: str,
    stop: StopFlag,
) -> list[Row]:
    """All probes on one subject; features are extracted when the first unfinished cell asks for them."""
    extraction = _extraction(config, folder, device, stop)
    sets = _examples(subject, *train, extraction), _examples(subject, *val, extraction)
    rows: list[Row] = []
    for name in config.protocol:
        if subject.encoder is None and name in NO_PIXELS:
            continue
        cell = _cell(subject, name, sets, config)
        finished = None if config.overwrite else folder.read_json(cell)
        if finished is None:
            sets[0].unfinished = Unfinished(folder.path / "evaluate" / "unfinished" / Path(cell).stem, stop)
            sets[0].unfinished.check()
            scores = measure(name, *sets, config)
            finished = [_row(subject, name, one, sets, config) for one in scores]
            _keep(folder, cell, finished)
            _keep_cases(folder, subject, scores)
            sets[0].unfinished.clear()
        folder.add_results(finished)
        for entry in finished:
            print(_line(entry), flush=True)
        rows += finished
    return rows


def _extraction(config: EvaluateConfig, folder: RunFolder, device: str, stop: StopFlag) -> Extraction:
    return Extraction(
        batch_size=config.batch_size,
        device=device,
        precision=config.precision or default_precision(device),
        num_workers=config.num_workers,
        num_images=config.num_images,
        seed=config.seed,
        cache_dir=shared_cache() or folder.path / "features",
        stop=stop,
    )


def _examples(subject: Subject, source: Source, digest: str, extraction: Extraction) -> Examples:
    if subject.encoder is None:
        extraction = replace(extraction, precision="fp32")
        return Examples(source, None, Preprocessing(PIXEL_SIZE), extraction, subject.fingerprint, digest)
    return Examples(
        source, subject.encoder.module, subject.encoder.preprocessing, extraction, subject.fingerprint, digest
    )


def _cell(subject: Subject, name: str, sets: tuple[Examples, Examples], config: EvaluateConfig) -> str:
    """Where the rows of one probe on one subject are kept: named by everything they depend on."""
    settings = {
        key: getattr(config, key) for key in ("train_dataset", "val_dataset", "seed", *PROBE_KEYS.get(name, ()))
    }
    facts: list[Any] = [name, protocol_hash(name), subject.control, subject.fingerprint, [one.digest for one in sets]]
    facts += [[_label_digests(one.source) for one in sets], settings]
    facts += [str(sets[0].preprocessing), sets[0].extraction.precision, *_selection(subject).values()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return f"evaluate/cells/{name}-{subject.control or 'encoder'}-{key}.json"


def _label_digests(source: Source) -> dict[str, str]:
    """Each label's values, their kind and the names of their classes, as one hash."""

    def digest(label: str, values: np.ndarray) -> str:
        kind = [values.dtype.str, values.shape, source.class_names.get(label, [])]
        return hashlib.sha256(json.dumps(kind).encode() + np.ascontiguousarray(values).tobytes()).hexdigest()

    return {label: digest(label, np.asarray(values)) for label, values in source.labels.items()}


def _selection(subject: Subject) -> dict[str, str]:
    """What the protocol must say of a run's best step, however it was named: a number on validation images chose it."""
    chosen = subject.encoder is not None and subject.encoder.chosen
    return {"checkpoint": "the run's best by k-NN on its validation set"} if chosen else {}


def _keep(folder: RunFolder, cell: str, rows: list[Row]) -> None:
    (folder.path / cell).parent.mkdir(parents=True, exist_ok=True)
    folder.write_json(cell, rows)


def _keep_cases(folder: RunFolder, subject: Subject, scores: list[Score]) -> None:
    """Images worth a look, in OUT/evaluate/METRIC.json, as the encoder found them."""
    for one in scores if not subject.control else ():
        if one.cases is not None:
            folder.write_json(f"evaluate/{one.metric}.json", one.cases)
            print(f"{len(one.cases)} {one.metric}: {folder.path / 'evaluate' / one.metric}.json")


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
        **_selection(subject),
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
