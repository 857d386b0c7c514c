"""Encoders x data sets in one table: what `linear_probe.py` and `knn.py` share. Measuring itself is `sslvit evaluate`.

A cell is one encoder on one data set with one seed; it has a folder of its own under OUT/cells/, so that a finished
cell is not measured again, here or as a job. Features are kept by content in OUT/features, for all cells.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import sslvit
from sslvit.commands import explain
from sslvit.config import EvaluateConfig, as_dict, changed_keys, load_config
from sslvit.errors import EXIT_DONE, EXIT_INPUT, EXIT_RESUMABLE, InputError
from sslvit.probes.config import CONTROLS
from sslvit.run_folder import write_atomically
from sslvit.verbs.submit import submit_all

LIVE = ("waiting", "running", "unknown")
FREE_KEYS = ("num_workers", "batch_size", "device", "overwrite")
QUICK = {"num_images": 2000, "linear_steps": 1000, "attentive_steps": 200}
QUICK_ENCODERS = ["vit_tiny_patch16_224?pretrained=false&img_size=48&patch_size=8&depth=4"]
QUICK_DATASETS = ["scenes=scenes:?n=1000&size=48&objects=1,scenes:?n=500&size=48&objects=1&split=val"]


@dataclass(frozen=True)
class Cell:
    """One encoder on one data set. label, data: short names for the table; keys: those of `sslvit evaluate`."""

    label: str
    data: str
    seed: int
    folder: Path
    keys: dict

    @property
    def finished(self) -> bool:
        """Whether its folder holds the results of these very keys."""
        marker = self.folder / "finished.json"
        if not marker.exists() or not (self.folder / "results.json").exists():
            return False
        now = as_dict(load_config(EvaluateConfig, None, self.keys))
        changed = changed_keys(json.loads(marker.read_text()).get("config", {}), now)
        return all(key in FREE_KEYS for key in changed)

    def rows(self) -> list[dict]:
        """Its rows: of its protocols, controls, sets and seed, whatever its folder holds of earlier questions."""
        file = self.folder / "results.json"
        rows = json.loads(file.read_text()) if file.exists() else []
        data = "{train_dataset} -> {val_dataset}".format(**self.keys)
        unasked = set(CONTROLS) - set(self.keys["controls"])
        return [
            row
            for row in rows
            if row["name"].split("/")[0] in self.keys["protocol"]
            and not unasked & set(row["name"].split("/")[1:])
            and (row["data"], row["seed"]) == (data, self.seed)
        ]


def main(protocol: list[str], description: str, arguments: list[str] | None = None) -> int:
    """The command line of both scripts; returns the exit code."""
    options = _parse(protocol, description, arguments)
    os.environ.setdefault("SSLVIT_CACHE", str(options.output_dir))
    try:
        cells = plan(options)
        problems = _submit(cells, options) if options.launch else _run(cells)
        write_tables(cells, options.output_dir / options.name)
        copy_tables(options.output_dir / options.name, options.json)
    except (Exception, KeyboardInterrupt) as error:  # a signal, a full disk, wrong input: as `sslvit` ends
        ending = explain(error)
        if ending is None:
            raise
        print(ending[1], file=sys.stderr)
        return ending[0]
    rows = table_rows(cells)
    if rows:
        print(f"\n{markdown(rows)}\n{options.output_dir / options.name}.md .csv .json .png")
    for _, words in problems:
        print(words, file=sys.stderr)
    return max((code for code, _ in problems), default=EXIT_DONE)


def _parse(protocol: list[str], description: str, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--encoders", nargs="+", metavar="E", help="E, or LABEL=E for a name in the table")
    parser.add_argument("--datasets", nargs="+", metavar="NAME=TRAIN,VAL", help="with commas in a spec: NAME=TRAIN;VAL")
    parser.add_argument("--protocol", default=",".join(protocol), metavar="NAMES", help="default: %(default)s")
    parser.add_argument(
        "--controls", default=",".join(CONTROLS), metavar="NAMES", help="default: %(default)s; '' for none"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further keys of `sslvit evaluate`")
    parser.add_argument("--launch", metavar="L.yaml", help="as jobs, a task per cell; without it, here, in turn")
    parser.add_argument("--quick", action="store_true", help="at most 2000 images of each set and 1000 steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows; .md, .csv and .png beside it")
    parser.add_argument("--output-dir", type=Path, metavar="OUT")
    options = parser.parse_args(arguments)
    options.name = Path(sys.argv[0]).stem if arguments is None else "table"
    options.output_dir = (options.output_dir or Path("runs") / f"benchmark-{protocol[0]}").absolute()
    if not options.quick and not (options.encoders and options.datasets):
        parser.error("give --encoders and --datasets, or --quick for a small built-in example")
    if options.json and options.json.suffix != ".json":
        parser.error(f"--json {options.json}: the name must end in .json")
    options.encoders = options.encoders or QUICK_ENCODERS
    options.datasets = options.datasets or QUICK_DATASETS
    return options


def plan(options: argparse.Namespace) -> list[Cell]:
    """Every cell, checked: encoders x data sets x seeds. Raw pixels are measured once per data set and seed."""
    encoders = [split_encoder(text) for text in options.encoders]
    labels = short_names(encoders)
    protocol = [name for name in options.protocol.split(",") if name]
    controls = [name for name in options.controls.split(",") if name]
    extra = dict(text.partition("=")[::2] for text in options.set)
    settings = (QUICK if options.quick else {}) | {key: _plain(value) for key, value in extra.items()}
    cells = []
    for text in options.datasets:
        name, train, val = split_dataset(text)
        for number, (label, (_, encoder)) in enumerate(zip(labels, encoders, strict=True)):
            for seed in options.seeds:
                keys = {
                    "encoder": encoder,
                    "train_dataset": train,
                    "val_dataset": val,
                    "protocol": protocol,
                    "controls": [c for c in controls if c != "pixels" or number == 0],
                    "seed": seed,
                    **settings,
                }
                load_config(EvaluateConfig, None, keys)
                folder = options.output_dir / "cells" / f"{name}--{label}--seed{seed}"
                cells.append(Cell(label, name, seed, folder, keys))
    return cells


def _plain(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def split_dataset(text: str) -> tuple[str, str, str]:
    """`NAME=TRAIN,VAL` to its parts; `;` parts the two where a spec holds commas itself."""
    name, equals, specs = text.partition("=")
    parts = specs.split(";") if ";" in specs else specs.split(",")
    if not equals or not re.fullmatch(r"[\w.-]+", name) or len(parts) != 2 or not all(parts):
        raise InputError(f"--datasets {text!r}: the form is NAME=TRAIN,VAL, or NAME=TRAIN;VAL when a spec holds commas")
    return name, parts[0], parts[1]


def split_encoder(text: str) -> tuple[str, str]:
    """`LABEL=E` to its parts, the label "" where there is none: the `=` of `E?option=value` is none of ours."""
    label, equals, encoder = text.partition("=")
    if not equals or not encoder or not re.fullmatch(r"[\w.-]+", label) or Path(text).exists():
        return "", text
    return label, encoder


def short_names(encoders: list[tuple[str, str]]) -> list[str]:
    """A name for each (label, encoder), fit for a table and for a folder: its label, its end, or all of it."""

    def slug(text: str) -> str:
        return re.sub(r"[^\w.@=-]+", "-", text).strip("-.")

    ends = [label or slug(encoder.rstrip("/").split("/")[-1]) for label, encoder in encoders]
    names = [
        slug(e) if not label and ends.count(end) > 1 else end for (label, e), end in zip(encoders, ends, strict=True)
    ]
    if len(set(names)) < len(names):
        raise InputError(f"--encoders names one of them twice: {', '.join(names)}; write LABEL=E to tell them apart")
    return names


# ---- measuring ------------------------------------------------------------------------------------------------------


Problem = tuple[int, str]  # an exit code and a line


def _run(cells: list[Cell]) -> list[Problem]:
    """Measure every cell here; returns what is wrong with the input, cell by cell. Anything else ends all.

    `evaluate` skips what it has measured before.
    """
    problems = []
    for cell in cells:
        print(f"== {cell.label} on {cell.data}, seed {cell.seed}")
        try:
            sslvit.evaluate(output_dir=cell.folder, **cell.keys)
        except InputError as error:
            problems.append((EXIT_INPUT, f"{cell.label} on {cell.data}: {error}"))
    return problems


def _submit(cells: list[Cell], options: argparse.Namespace) -> list[Problem]:
    """Queue every unfinished cell (on Slurm one array, a task per cell), wait for all, return what went wrong."""
    waiting = [cell for cell in cells if not cell.finished]
    if waiting:
        submit_all([command(cell) for cell in waiting], launch=options.launch, base=options.output_dir)
        print(f"{len(waiting)} cells queued: sslvit submit --status {options.output_dir}", flush=True)
    states: dict[str, dict] = {}
    while waiting:
        with contextlib.redirect_stdout(None):
            found = sslvit.submit(status=options.output_dir)  # all jobs in one question, the newest of a cell last
            states = {state["output_dir"]: state for state in found}
            for folder in [cell.folder for cell in waiting if str(cell.folder) not in states]:  # queued by hand
                states[str(folder)] = sslvit.submit(status=folder)[-1]
        if not any(states[str(cell.folder)]["state"] in LIVE for cell in waiting):
            break
        time.sleep(2)
    return [_problem(cell, states[str(cell.folder)]) for cell in waiting if not cell.finished]


def _problem(cell: Cell, state: dict) -> Problem:
    """Why a cell whose job is over has no results; what may be started again as it was ends with 75."""
    resumable = state["code"] == EXIT_RESUMABLE or state["state"] in ("killed", "cancelled")
    words = f"{cell.label} on {cell.data}: job {state['id']} {state['state']}, {state['message']}"
    return EXIT_RESUMABLE if resumable else EXIT_INPUT, words


def command(cell: Cell) -> list[str]:
    """The cell as words of `sslvit`."""
    words = ["evaluate", "--output-dir", str(cell.folder)]
    for key, value in cell.keys.items():
        words.append(f"{key}={json.dumps(value) if isinstance(value, list | bool) else value}")
    return words


# ---- tables ---------------------------------------------------------------------------------------------------------


def table_rows(cells: list[Cell]) -> list[dict]:
    """All rows: ENCODER/knn/top1 on the data set's short name; ENCODER is `pixels` for that control."""
    rows = []
    for cell in cells:
        for row in cell.rows():
            label = "pixels" if "/pixels/" in row["name"] else cell.label
            name = row["name"].replace("/pixels/", "/")
            rows.append({**row, "name": f"{label}/{name}", "data": cell.data})
    return rows


def headline(rows: list[dict]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """(encoder or control, metric) -> data set -> its rows, one per seed; only the first number of each protocol."""
    table: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for row in rows:
        parts = row["name"].split("/")
        control = "random_init" in parts[1:]
        encoder = f"{parts[0]}, random init" if control else parts[0]
        metric = "/".join(part for part in parts[1:] if part != "random_init")
        if metric.count("/") == 1:
            table.setdefault((encoder, metric), {}).setdefault(row["data"], []).append(row)
    return table


def shown(rows: list[dict]) -> str:
    """A value in percent with its interval; over several seeds, the mean and the standard deviation."""
    values = [100 * row["value"] for row in rows if row["value"] is not None]
    if not values:
        return "-"
    if len(values) > 1:
        return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} ({len(values)} seeds)"
    low, high = rows[0]["ci95"] or (float("nan"), float("nan"))
    return f"{values[0]:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def markdown(rows: list[dict]) -> str:
    """The table, data sets side by side, best first within a metric, and the protocols below it."""
    table, datasets = headline(rows), list(dict.fromkeys(row["data"] for row in rows))
    lines = [f"| encoder | metric | {' | '.join(datasets)} |", "|---|---|" + "---|" * len(datasets)]

    def order(item: tuple) -> tuple:
        (encoder, metric), by_data = item
        values = [row["value"] for found in by_data.values() for row in found if row["value"] is not None]
        return metric, -np.mean(values) if values else 0.0, encoder

    for (encoder, metric), by_data in sorted(table.items(), key=order):
        cells = [shown(by_data[name]) if name in by_data else "-" for name in datasets]
        lines.append(f"| {encoder} | {metric} | {' | '.join(cells)} |")
    used = [row for by_data in table.values() for found in by_data.values() for row in found]
    protocols = dict.fromkeys(re.sub(r" \(chosen: .*\)$", "", row["protocol"]) for row in used)
    lines += ["", "Percent, with the 95% bootstrap interval over validation images. Protocols:", ""]
    return "\n".join(lines + [f"- {protocol}" for protocol in protocols]) + "\n"


def write_tables(cells: list[Cell], stem: Path) -> None:
    """STEM.md, STEM.csv, STEM.json and, with matplotlib, STEM.png."""
    rows = table_rows(cells)
    if not rows:
        return
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(f"{stem}.md"), markdown(rows))
    write_atomically(Path(f"{stem}.json"), json.dumps(rows, indent=1) + "\n")
    with open(f"{stem}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["encoder", "data", "name", "seed", "value", "low", "high", "protocol"])
        for row in rows:
            encoder, _, metric = row["name"].partition("/")
            low, high = row["ci95"] or ("", "")
            writer.writerow([encoder, row["data"], metric, row["seed"], row["value"], low, high, row["protocol"]])
    plot(rows, Path(f"{stem}.png"))


def copy_tables(stem: Path, file: Path | None) -> None:
    """The tables beside --json FILE as well."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        for written in [Path(f"{stem}{suffix}") for suffix in (".json", ".md", ".csv", ".png")]:
            if written.exists():
                shutil.copyfile(written, file.with_suffix(written.suffix))


def plot(rows: list[dict], file: Path) -> None:
    """Bars with intervals, a panel per data set and metric; nothing without matplotlib (pip install sslvit[report])."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    table, datasets = headline(rows), list(dict.fromkeys(row["data"] for row in rows))
    metrics = list(dict.fromkeys(metric for _, metric in table))
    encoders = list(dict.fromkeys(encoder for encoder, _ in table))[::-1]
    size = (4.5 * len(datasets) + 1.5, (0.35 * len(encoders) + 1) * len(metrics))
    figure, axes = pyplot.subplots(len(metrics), len(datasets), figsize=size, squeeze=False, sharey=True)
    for line, metric in zip(axes, metrics, strict=True):
        for axis, data in zip(line, datasets, strict=True):
            for place, encoder in enumerate(encoders):
                found = table.get((encoder, metric), {}).get(data, [])
                values = [100 * row["value"] for row in found if row["value"] is not None]
                if values:
                    axis.barh(place, np.mean(values), color="0.7" if _is_control(encoder) else "tab:blue")
                    lows, highs = zip(*((row["ci95"] or (row["value"],) * 2) for row in found), strict=True)
                    axis.plot([100 * min(lows), 100 * max(highs)], [place, place], color="black", linewidth=1)
            axis.set_title(f"{metric}, {data} (%)", fontsize=9)
            axis.set_yticks(range(len(encoders)), encoders, fontsize=8)
    figure.subplots_adjust(hspace=0.6)
    figure.savefig(file, dpi=120, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def _is_control(encoder: str) -> bool:
    return encoder in ("pixels", "random_init") or encoder.endswith(", random init")
