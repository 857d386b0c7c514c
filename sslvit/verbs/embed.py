"""`sslvit embed`: features of images in a file, one row per readable image, exactly those that `evaluate` judges.

NPZ: `features` (n, D) float32, not normalised; `names` fixed-width unicode; `labels` when the set has any.
Parquet: columns `name`, `features` (fixed-size list of float32) and one column per label.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from sslvit import distributed
from sslvit.config import EmbedConfig, check_config, load_config
from sslvit.data.records import as_classes
from sslvit.data.sources import open_source
from sslvit.encoder.weights import load_encoder
from sslvit.errors import InputError
from sslvit.probes.features import Examples, Extraction, Features, default_precision, shared_cache
from sslvit.probes.knn import normalised
from sslvit.run_folder import is_disk_full, partial_of
from sslvit.signals import StopFlag

SUFFIXES = (".npz", ".parquet")


def embed(
    *,
    encoder: str,
    data: str,
    output_file: str | Path,
    batch_size: int = 256,
    device: str | None = None,
    precision: str | None = None,
    num_workers: int | None = None,
    index: bool = False,
) -> dict[str, np.ndarray]:
    """Write the features of `data` to `output_file` (.npz or .parquet); returns the arrays of the npz form.

    `index` adds a faiss index of the unit-length features beside it (inner product is cosine), in the same order.
    Raises InputError when the encoder or the images cannot be read, or a feature is not finite. Resumable on a signal:
    what is extracted stays beside the file, in `.F.parts/`, and the same command goes on.
    """
    given = {"encoder": str(encoder), "data": str(data), "output_file": str(output_file), "batch_size": batch_size}
    given |= {"device": device, "precision": precision, "num_workers": num_workers, "index": index}
    config = load_config(EmbedConfig, None, given)
    check_config(config)
    file = Path(output_file)
    if file.suffix not in SUFFIXES:
        raise InputError(f"--output-file {file}: the name must end in {' or '.join(SUFFIXES)}")
    place = str(distributed.choose_device(config.device))
    loaded = load_encoder(str(encoder), device=place, pooled=True)
    parts = file.with_name(f".{file.name}.parts")
    fingerprint = f"{loaded.fingerprint} {loaded.architecture}"
    with StopFlag() as stop:
        extraction = Extraction(
            batch_size=config.batch_size,
            device=place,
            precision=config.precision or default_precision(place),
            num_workers=config.num_workers,
            cache_dir=shared_cache(),
            parts_dir=parts,
            class_token_only=True,
            stop=stop,
        )
        source = open_source(str(data))
        features = Examples(source, loaded.module, loaded.preprocessing, extraction, fingerprint).features
    arrays = as_arrays(features)
    _write(file, arrays if file.suffix == ".npz" else as_table(features))
    if config.index:
        _write(file.with_suffix(".faiss"), _faiss_index(features.cls))
    shutil.rmtree(parts, ignore_errors=True)
    print(f"{file}: features of {len(features)} images, {features.cls.shape[1]} dimensions")
    return arrays


def as_arrays(features: Features) -> dict[str, np.ndarray]:
    """Features (n, D) float32, names (n,) unicode; labels (n,), or (n, L) with label_names (L,) for several.

    Labels are int64, -1 where unknown; float64 where they are numbers with a decimal point. A label of several classes
    at once has a column of 0 and 1 for each, named LABEL/CLASS.
    """
    columns = _label_columns(features)
    arrays = {"features": np.array(features.cls, dtype=np.float32), "names": np.array(features.names, dtype=np.str_)}
    if list(columns) == list(features.labels) and len(columns) == 1:
        arrays["labels"] = next(iter(columns.values()))
    elif columns:
        arrays["labels"] = np.stack(list(columns.values()), axis=1)
        arrays["label_names"] = np.array(list(columns), dtype=np.str_)
    return arrays


def _label_columns(features: Features) -> dict[str, np.ndarray]:
    """Name -> (n,) int64 or float64."""
    columns: dict[str, np.ndarray] = {}
    for label, values in features.labels.items():
        if values.ndim == 1:
            columns[label] = as_classes(values)
        else:
            names = features.class_names.get(label) or range(values.shape[1])
            columns |= {f"{label}/{name}": values[:, i].astype(np.int64) for i, name in enumerate(names)}
    return columns


def as_table(features: Features) -> pa.Table:
    """The Parquet form. Names that are no UTF-8 are written with backslash escapes."""
    flat = pa.array(np.array(features.cls, dtype=np.float32).ravel())
    columns = {
        "name": pa.array([name.encode("utf-8", "backslashreplace").decode() for name in features.names]),
        "features": pa.FixedSizeListArray.from_arrays(flat, features.cls.shape[1]),
    }
    return pa.table(columns | {name: _label_column(features, name) for name in features.labels})


def _label_column(features: Features, label: str) -> pa.Array:
    """Classes and numbers as they are, several classes at once as lists of their names."""
    values = features.labels[label]
    if values.ndim == 1:
        return pa.array(as_classes(values))
    names = np.array(features.class_names.get(label) or [str(i) for i in range(values.shape[1])])
    return pa.array(
        [None if known < 0 else names[row > 0].tolist() for row, known in zip(values, values.min(axis=1), strict=True)]
    )


def _faiss_index(features: np.ndarray) -> Any:
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(normalised(features))
    return index


def _write(file: Path, content: Any) -> None:
    """Write in one step: a reader sees the old file or the new one. InputError when the place is wrong."""
    partial = partial_of(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as handle:
            if isinstance(content, dict):
                np.savez(handle, **content)
            elif isinstance(content, pa.Table):
                pyarrow.parquet.write_table(content, handle)
            else:
                handle.write(faiss.serialize_index(content).tobytes())
        os.replace(partial, file)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise InputError(f"cannot write {file}: {error.strerror or error}; choose another --output-file") from None
    finally:
        partial.unlink(missing_ok=True)
