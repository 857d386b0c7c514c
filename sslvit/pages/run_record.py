"""What a run folder says of itself, read leniently: a run may still be writing, or have been killed while writing.

Reads text only, imports no torch, changes nothing. Missing files are empty, broken lines are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from sslvit.errors import InputError

Row = dict[str, Any]

VERBS = ("demo", "pretrain", "evaluate", "align")  # a verb's record is in OUT, or in OUT/VERB as a guest of another's
LARGEST = 1e300  # beyond it, differences overflow
READ_BYTES = 200 * 2**20  # of a file of lines; the rest is left out


@dataclass
class VerbRecord:
    """What one verb was asked to do here: config as given, config with every auto value, command, machine."""

    verb: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    resolved_text: str = ""
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    finished: bool = False


@dataclass
class RunRecord:
    """Everything readable in a run folder. metrics: stage -> rows in order; pretraining is the stage ""."""

    path: Path
    verbs: dict[str, VerbRecord]
    metrics: dict[str, list[Row]]
    results: list[Row]
    predictions: list[Row]
    bad_files: list[Row]

    def config(self, verb: str) -> dict[str, Any]:
        """The resolved config of a verb, {} when it has no record here."""
        return self.verbs[verb].config if verb in self.verbs else {}


def read_run(path: str | Path) -> RunRecord:
    """The record of OUT; InputError when there is nothing of ours in it."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give the OUT of a pretrain, evaluate, align or demo run")
    record = RunRecord(
        path=path,
        verbs={found.verb: found for found in _verb_records(path)},
        metrics=_stages(read_lines(path / "metrics.jsonl")),
        results=_results(path / "results.json"),
        predictions=read_lines(path / "predictions.jsonl"),
        bad_files=read_lines(path / "bad_files.jsonl"),
    )
    if not (record.verbs or record.metrics or record.results):
        raise InputError(
            f"{path}: no run folder of sslvit (no env.json, metrics.jsonl or results.json in it); give OUT itself"
        )
    return record


def read_lines(path: Path) -> list[Row]:
    """The JSON objects of a file, one a line; lines that are none, like a half-written last one, are left out."""
    try:
        with open(path, "rb") as file:
            lines = file.read(READ_BYTES).split(b"\n")
    except OSError:
        return []
    return [row for line in lines if isinstance(row := _parse(line), dict)]


def _parse(text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:READ_BYTES]
    except OSError:
        return ""


def _verb_records(path: Path) -> Iterator[VerbRecord]:
    for folder in (path, *(path / verb for verb in VERBS)):
        environment = _parse(_text(folder / "env.json"))
        if not isinstance(environment, dict) or environment.get("verb") not in VERBS:
            continue
        given, resolved = _text(folder / "config.yaml"), _text(folder / "resolved.yaml")
        yield VerbRecord(
            verb=environment["verb"],
            folder=folder,
            config=_yaml(resolved) or _yaml(given),
            config_text=given,
            resolved_text=resolved,
            command=_text(folder / "command.txt"),
            environment=environment,
            finished=(folder / "finished.json").is_file(),
        )


def _yaml(text: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _stages(rows: Sequence[Row]) -> dict[str, list[Row]]:
    stages: dict[str, list[Row]] = {}
    for row in rows:
        if finite(row.get("step")):
            stages.setdefault(str(row.get("stage") or ""), []).append(row)
    return stages


def _results(path: Path) -> list[Row]:
    """Rows with a name; a value that is no finite number is None, an interval that is none is None."""
    rows = _parse(_text(path))
    clean = []
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            continue
        interval = row.get("ci95")
        known = isinstance(interval, list) and len(interval) == 2 and all(map(finite, interval))
        value = row.get("value")
        clean.append({**row, "value": value if finite(value) else None, "ci95": interval if known else None})
    return clean


def finite(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one field of a stage where it is finite, steps ascending, the last of equal steps."""
    found = {float(row["step"]): float(row[key]) for row in rows if finite(row.get(key))}
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def last(rows: Sequence[Row], key: str) -> float | None:
    """The newest value of a field, None without one."""
    values = series(rows, key)[1]
    return values[-1] if values else None


def keys(rows: Sequence[Row]) -> list[str]:
    """Names of all fields with drawable values, in order of appearance, without the step."""
    names = {name: None for row in rows for name, value in row.items() if name != "step" and finite(value)}
    return list(names)
