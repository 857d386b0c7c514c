"""`sslvit check-data SPEC`: read every image of a collection once and say what is there and what is wrong.

It changes nothing and trains nothing. One decode per image, in threads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sslvit.data.decode import BadFiles, BadImage, decode, describe
from sslvit.data.records import as_classes, is_known
from sslvit.data.sources import Source, open_source

EXAMPLES = 5  # names given for each kind of finding, where all would be too many
_CHUNK = 512  # images in work at a time


def check_data(data: str, *, output_dir: str | Path | None = None, num_workers: int | None = None) -> dict[str, Any]:
    """Reads all images of a data spec and reports on them.

    Args:
        data: a path or data spec.
        output_dir: where to write check_data.json (the report) and bad_files.jsonl (name and reason, a line each).
        num_workers: threads; None: one a core, at most 16.

    Returns:
        The report: `count`, `readable`, `bad` (every name with its reason), `sizes`, `channels`, `formats`, `bytes`,
        `animated`, `blank`, `duplicates`, `labels`, `text`, `ignored` and `skipped`.

    Raises:
        InputError: the spec opens nothing.
    """
    source = open_source(data)
    print(f"{source.spec}: {len(source):,} images")
    findings = _read_all(source, num_workers or min(16, os.cpu_count() or 1))
    report = _report(source, findings)
    if output_dir is not None:
        _write(Path(output_dir), report)
    print("\n".join(_lines(report)))
    return report


@dataclass
class _Findings:
    """What was seen of each image; rows of unreadable ones are zero."""

    shapes: np.ndarray  # (n, 3) int32: height, width, channels
    digests: np.ndarray  # (n, 2) uint64, of the bytes
    blank: np.ndarray  # (n,) bool: every pixel the same
    bytes: int
    formats: Counter[str]
    animated: list[int]
    text: Counter[str]
    reasons: dict[int, str]


@dataclass
class _Image:
    """What one thread found."""

    reason: str = ""
    shape: tuple[int, int, int] = (0, 0, 0)
    digest: bytes = bytes(16)
    size: int = 0
    blank: bool = False
    form: str = ""
    frames: int = 1
    text: tuple[str, ...] = ()


def _read_all(source: Source, num_workers: int) -> _Findings:
    count = len(source)
    findings = _Findings(
        np.zeros((count, 3), np.int32),
        np.zeros((count, 2), np.uint64),
        np.zeros(count, bool),
        0,
        Counter(),
        [],
        Counter(),
        {},
    )
    with tqdm(total=count, unit="img", disable=None, leave=False) as progress:
        for index, image in _images(source, num_workers):
            findings.shapes[index] = image.shape
            findings.digests[index] = np.frombuffer(image.digest, np.uint64)
            findings.blank[index] = image.blank
            findings.bytes += image.size
            findings.text.update(image.text)
            if image.reason:
                findings.reasons[index] = image.reason
            else:
                findings.formats[image.form] += 1
            if image.frames > 1:
                findings.animated.append(index)
            progress.update()
    return findings


def _images(source: Source, num_workers: int) -> Iterator[tuple[int, _Image]]:
    with ThreadPoolExecutor(num_workers) as pool:
        for start in range(0, len(source), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(source)))
            yield from zip(chunk, pool.map(lambda index: _look(source, index), chunk), strict=True)


def _look(source: Source, index: int) -> _Image:
    image = _Image()
    if source.has_text:
        image.text = tuple(source.text(index) or ("none",))
    try:
        data = source.read(index)
        raw = np.ascontiguousarray(data).tobytes() if isinstance(data, np.ndarray) else data
        image.size = len(raw)
        image.digest = hashlib.blake2b(raw, digest_size=16).digest()
        pixels = decode(data, channels=None)
    except BadImage as bad:
        return _Image(reason=str(bad), size=image.size, text=image.text)
    height, width, channels = pixels.shape
    image.shape = (height, width, channels)
    image.blank = bool((pixels == pixels[0, 0]).all())
    image.form, image.frames = describe(data)
    return image


def _report(source: Source, findings: _Findings) -> dict[str, Any]:
    readable = np.ones(len(source), bool)
    readable[list(findings.reasons)] = False
    blank = np.flatnonzero(findings.blank)
    return {
        "data": source.spec,
        "count": len(source),
        "readable": int(readable.sum()),
        "bad": [{"name": source.name(i), "reason": reason} for i, reason in sorted(findings.reasons.items())],
        "sizes": _sizes(findings.shapes[readable]),
        "channels": dict(sorted(Counter(findings.shapes[readable, 2].tolist()).items())),
        "formats": dict(findings.formats.most_common()),
        "bytes": findings.bytes,
        "animated": _some(source, findings.animated),
        "blank": _some(source, blank.tolist()),
        "duplicates": _duplicates(source, findings.digests, readable),
        "labels": {name: _label(values, source.class_names.get(name, [])) for name, values in source.labels.items()},
        "text": dict(findings.text.most_common()),
        "ignored": dict(getattr(source, "ignored", {})),
        "skipped": list(getattr(source, "skipped", [])),
    }


def _some(source: Source, indices: list[int]) -> dict[str, Any]:
    return {"count": len(indices), "examples": [source.name(index) for index in indices[:EXAMPLES]]}


def _sizes(shapes: np.ndarray) -> dict[str, Any]:
    """Distribution of height and width in pixels, and the commonest sizes; {} without readable images."""
    if not len(shapes):
        return {}
    sizes, counts = np.unique(shapes[:, :2], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:EXAMPLES]
    spread = {}
    for axis, name in enumerate(("height", "width")):
        marks = np.percentile(shapes[:, axis], (0, 5, 50, 95, 100))
        spread[name] = {
            mark: int(value) for mark, value in zip(("min", "p5", "median", "p95", "max"), marks, strict=True)
        }
    common = [{"height": int(sizes[i][0]), "width": int(sizes[i][1]), "count": int(counts[i])} for i in order]
    return {**spread, "different": len(sizes), "common": common}


def _duplicates(source: Source, digests: np.ndarray, readable: np.ndarray) -> dict[str, Any]:
    """Images whose bytes are the same: how many are one too many, in how many groups, and groups with unlike labels."""
    indices = np.flatnonzero(readable)
    order = indices[np.lexsort((indices, digests[indices, 1], digests[indices, 0]))]
    new = np.ones(len(order), bool)
    new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    groups = [group for group in np.split(order, np.flatnonzero(new)[1:]) if len(group) > 1]
    unlike = [
        group for group in groups if any(len({str(x) for x in v[group].tolist()}) > 1 for v in source.labels.values())
    ]
    return {
        "count": sum(len(group) - 1 for group in groups),
        "groups": len(groups),
        "with_unlike_labels": len(unlike),
        "examples": [[source.name(int(i)) for i in group[:EXAMPLES]] for group in (unlike or groups)[:EXAMPLES]],
    }


def _label(values: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Images per class, or the range of numbers; and how many images have no label."""
    values = as_classes(values)
    known = values[is_known(values)]
    unlabelled = len(values) - len(known)
    if values.dtype.kind == "f":
        spread = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
        return {"numbers": len(known), "unlabelled": unlabelled, "smallest": spread[0], "largest": spread[1]}
    if values.ndim == 2:
        classes, counts = np.arange(values.shape[1]), known.sum(axis=0, dtype=np.int64)
    else:
        classes, counts = np.unique(known, return_counts=True)
    per_class = {names[int(c)] if c < len(names) else str(c): int(k) for c, k in zip(classes, counts, strict=True)}
    return {
        "classes": len(classes),
        "unlabelled": unlabelled,
        "smallest": int(counts.min()) if len(counts) else 0,
        "largest": int(counts.max()) if len(counts) else 0,
        "per_class": per_class,
    }


def _label_line(name: str, label: dict[str, Any]) -> str:
    without = f", {label['unlabelled']:,} without" if label["unlabelled"] else ""
    if "numbers" in label:
        spread = f"{label['numbers']:,} numbers from {label['smallest']:g} to {label['largest']:g}"
        return f"labels      {name}: {spread}{without}"
    spread = f"{label['classes']} classes of {label['smallest']:,} to {label['largest']:,} images"
    return f"labels      {name}: {spread}{without}"


def _write(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("bad_files*.jsonl"):  # what is repaired must not stay listed
        earlier.unlink()
    bad_files = BadFiles(folder / "bad_files.jsonl", max_bad_rate=1.0, rank=0)
    for row in report["bad"]:
        bad_files.add(row["name"], row["reason"])
    (folder / "check_data.json").write_text(json.dumps(report, indent=2) + "\n")


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """The report in words."""
    yield f"readable    {report['readable']:,} of {report['count']:,}, {report['bytes'] / 2**20:,.1f} MiB"
    if report["sizes"]:
        height, width = report["sizes"]["height"], report["sizes"]["width"]
        yield f"height      {height['min']} to {height['max']} pixels, median {height['median']}"
        yield f"width       {width['min']} to {width['max']} pixels, median {width['median']}"
        yield "sizes       " + ", ".join(
            f"{size['height']} x {size['width']}: {size['count']:,}" for size in report["sizes"]["common"]
        )
    yield "channels    " + ", ".join(f"{channels}: {count:,}" for channels, count in report["channels"].items())
    yield "formats     " + ", ".join(f"{form}: {count:,}" for form, count in report["formats"].items())
    for name, label in report["labels"].items():
        yield _label_line(name, label)
    if report["text"]:
        yield "text        " + ", ".join(f"{kind}: {count:,}" for kind, count in report["text"].items())
    duplicates = report["duplicates"]
    if duplicates["count"]:
        unlike = (
            f", {duplicates['with_unlike_labels']} groups with unlike labels"
            if duplicates["with_unlike_labels"]
            else ""
        )
        first = " = ".join(map(repr, duplicates["examples"][0]))
        yield f"duplicates  {duplicates['count']:,} in {duplicates['groups']:,} groups{unlike}, as {first}"
    for kind, meaning in (("blank", "one colour only"), ("animated", "several frames, the first is used")):
        if report[kind]["count"]:
            names = ", ".join(map(repr, report[kind]["examples"]))
            yield f"{kind:<11} {report[kind]['count']:,} ({meaning}), as {names}"
    if report["ignored"]:
        yield "ignored     " + ", ".join(f"{count:,} {kind}" for kind, count in report["ignored"].items())
    for line in report["skipped"]:
        yield f"left out    {line!r}"
    for row in report["bad"]:
        yield f"unreadable  {row['name']!r}: {row['reason']}"
    yield f"{len(report['bad']):,} of {report['count']:,} images are unreadable"
