"""Which objective wins at which budget: DINO, MAE and both forms of the joint one, from a minute to hours of a core.

    python benchmarks/budgets.py [--steps 300 1200 4800] [--arms mae ...] [--datasets scenes ...] [--seeds 0]
        [--only images|parts] [--quick] [--json FILE] [--output-dir OUT]

`joint` is one masked student pass for both objectives, `joint_whole` the published form: student and teacher see both
views whole. Each budget is a whole run with schedules of its own; encoder and batch are those of cifar_fashion.py,
judged by `sslvit evaluate` on the test split (k-NN and linear, 10,000 labelled training images).
At equal images all arms take the same steps. At equal minutes an arm is read between its own runs, on a line over the
logarithm of what they cost in CPU time, where its runs reach.

parts: what the masked student owes to each of its settings. One changes at a time, at 1,200 steps on half of CIFAR-10's
training images, judged on the other half.

Rows: `budgets/DATA/images/STEPS/ARM/{knn,linear}/top1`, `/cpu_seconds`, and `/score`, the mean of the two accuracies;
`budgets/DATA/minutes/M/ARM/score`; `budgets/parts/ARM/...`. Finished cells under OUT are not measured again. Without
SSLVIT_DATA only the built-in scenes are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cifar_fashion
import numpy as np
from cifar_fashion import BATCH_SIZE, DATASETS, JUDGE, train
from equal_minutes import OURS, WHOLE
from probe_table import Cell

import sslvit
from sslvit.errors import EXIT_INPUT, InputError
from sslvit.probes.rows import row
from sslvit.run_folder import write_atomically

STEPS = [300, 1200, 4800]
MINUTES = [1, 2, 4, 8, 16, 32]
PART_STEPS = 1200
SCENES = "scenes:?n={n}&size=32&objects=1&label=shape"
LOCAL = {"num_global": 2, "num_local": 2, "local_size": 16, "global_scale": [0.4, 1.0]}
ARMS: dict[str, dict[str, Any]] = {**OURS, "joint_whole": {"dino": WHOLE}}
#: One setting of the masked student apart from `joint`; MAE's share follows the student's, so that the pass stays one.
PARTS: dict[str, dict[str, Any]] = {
    "joint": {},
    "visible_half": {"dino": {"student_visible_ratio": 0.5}, "mae": {"mask_ratio": 0.5}},
    "visible_tenth": {"dino": {"student_visible_ratio": 0.1}, "mae": {"mask_ratio": 0.9}},
    "weight_.03": {"dino": {"weight": 0.03}},
    "weight_.3": {"dino": {"weight": 0.3}},
    "weight_1": {"dino": {"weight": 1.0}},
    "two_teacher_views": {"dino": {"num_teacher_views": 2}},
    "local_crops": {"crops": LOCAL},
    "mae_alone": OURS["mae"],
    "whole_views": ARMS["joint_whole"],
}
METRICS = ("knn/top1", "linear/top1")
QUICK = {"num_images": 500, "linear_steps": 100}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parse(arguments)
    os.environ.setdefault("SSLVIT_CACHE", str(options.output_dir))
    rows: list[dict] = []
    try:
        for title, steps, cell, keys in plan(options, os.environ.get("SSLVIT_DATA")):
            print(f"== {title}, seed {cell.seed}", flush=True)
            rows += measure(title, steps, cell, keys)
            write(rows, options)
    except InputError as error:
        print(error, file=sys.stderr)
        return EXIT_INPUT
    print("\n" + write(rows, options))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", help=f"of {BATCH_SIZE} images; default {STEPS}; 4 8 if --quick")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--datasets", nargs="+", choices=[*DATASETS, "scenes"], default=[*DATASETS, "scenes"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", choices=("images", "parts"), help="one of the two tables")
    parser.add_argument("--quick", action="store_true", help="a few steps and 500 images: does everything run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows; .md and .png beside it")
    parser.add_argument("--output-dir", type=Path, metavar="OUT", default=Path("runs/benchmark-budgets"))
    options = parser.parse_args(arguments)
    options.output_dir = options.output_dir.absolute()
    options.steps = sorted(options.steps or ([4, 8] if options.quick else STEPS))
    return options


def plan(options: argparse.Namespace, root: str | None) -> Iterator[tuple[str, int, Cell, dict]]:
    """(title, steps, cell, keys), the cheap ones first, so that a table with every arm exists early."""
    judge = QUICK if options.quick else JUDGE
    sets = specs(options.datasets, root)
    if options.only != "parts":
        for steps in options.steps:
            for seed in options.seeds:
                for data, pair in sets.items():
                    for arm in options.arms:
                        title = f"{data}/images/{steps}/{arm}"
                        yield title, steps, _cell(options, title, arm, data, seed, pair, judge), ARMS[arm]
    if options.only != "images" and root and "cifar10" in sets:
        pair = tuple(f"parquet:{root}/cifar10/train-0000{half}-of-00002.parquet" for half in (0, 1))
        steps = min(options.steps) if options.quick else PART_STEPS
        for seed in options.seeds:
            for part, keys in PARTS.items():
                title = f"parts/{part}"
                yield title, steps, _cell(options, title, part, "half of cifar10", seed, pair, judge), keys


def specs(names: list[str], root: str | None) -> dict[str, tuple[str, str]]:
    """Short name -> (train, val). Real sets only where SSLVIT_DATA names their folder."""
    found = {}
    for name in names:
        if name == "scenes":
            found[name] = (SCENES.format(n=50_000), SCENES.format(n=2000) + "&split=val")
        elif root:
            train_spec, val_spec = DATASETS[name]
            found[name] = (train_spec.format(root=root), val_spec.format(root=root))
        else:
            print(f"skipped: {name}: SSLVIT_DATA is not set; it names the folder with cifar10/ and FashionMNIST/")
    return found


def _cell(
    options: argparse.Namespace, title: str, label: str, data: str, seed: int, pair: tuple[str, ...], judge: dict
) -> Cell:
    name = f"{title.replace('/', '-')}-seed{seed}" + ("-quick" if options.quick else "")
    keys = {
        "encoder": str(options.output_dir / "runs" / name),
        "train_dataset": pair[0],
        "val_dataset": pair[1],
        "protocol": ["knn", "linear"],
        "controls": [],
        "seed": seed,
        **judge,
    }
    return Cell(label, data, seed, options.output_dir / "cells" / name, keys)


def measure(title: str, steps: int, cell: Cell, keys: dict) -> list[dict]:
    """Train and judge, unless that is done: the rows of one cell."""
    seconds = train(cell, steps, keys)
    sslvit.evaluate(output_dir=cell.folder, **cell.keys)
    found = {entry["name"]: entry for entry in cell.rows()}
    told = f"{cifar_fashion.budget(steps)}; width {cifar_fashion.ENCODER['embed_dim']}"
    facts = {"data": cell.data, "seed": cell.seed, "step": steps}
    rows = [
        row(f"budgets/{title}/{name}", found[name]["value"], ci95=found[name]["ci95"],
            protocol=f"{told}; {found[name]['protocol']}", **facts)
        for name in METRICS
    ]  # fmt: skip
    score = float(np.mean([found[name]["value"] for name in METRICS]))
    rows.append(row(f"budgets/{title}/score", score, ci95=None, protocol=f"{told}; mean of k-NN and linear", **facts))
    words = f"{told}; CPU seconds of the training, all threads"
    return [*rows, row(f"budgets/{title}/cpu_seconds", seconds, ci95=None, protocol=words, **facts)]


# ---- tables ---------------------------------------------------------------------------------------------------------

Curve = list[tuple[float, float, float]]  # steps, CPU minutes and score, means over seeds


def curves(rows: list[dict]) -> dict[str, dict[str, Curve]]:
    """Data set -> arm -> its curve, by steps."""
    values: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for entry in rows:
        parts = entry["name"].split("/")
        if parts[2] == "images" and parts[-1] in ("score", "cpu_seconds"):
            place = values.setdefault((parts[1], parts[4], int(parts[3])), {"score": [], "cpu_seconds": []})
            place[parts[-1]].append(entry["value"])
    found: dict[str, dict[str, Curve]] = {}
    for (data, arm, steps), both in sorted(values.items(), key=lambda item: item[0][2]):
        point = (steps, float(np.mean(both["cpu_seconds"])) / 60, float(np.mean(both["score"])))
        found.setdefault(data, {}).setdefault(arm, []).append(point)
    return found


def at_minutes(curve: Curve, minutes: float) -> float | None:
    """The score at a cost, on a line over its logarithm; None where the arm's runs do not reach."""
    costs = [np.log(cost) for _, cost, _ in curve]
    if len(curve) < 2 or not costs[0] <= np.log(minutes) <= costs[-1]:
        return None
    return float(np.interp(np.log(minutes), costs, [score for _, _, score in curve]))


def minute_rows(rows: list[dict]) -> list[dict]:
    """Scores at equal minutes, from the curves."""
    words = "mean of k-NN and linear at equal CPU minutes, between an arm's own runs on a line over log time"
    return [
        row(f"budgets/{data}/minutes/{minutes}/{arm}/score", score, ci95=None, protocol=words, data=data, seed=0)
        for data, arms in curves(rows).items()
        for minutes in MINUTES
        for arm, curve in arms.items()
        if (score := at_minutes(curve, minutes)) is not None
    ]


def write(rows: list[dict], options: argparse.Namespace) -> str:
    """OUT/budgets.{json,md,png} and beside --json; returns the tables."""
    every = rows + minute_rows(rows)
    text = markdown(every)
    stems = [options.output_dir / "budgets", *([options.json.with_suffix("")] if options.json else [])]
    for stem in stems:
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(stem.with_suffix(".json"), json.dumps(every, indent=1) + "\n")
        write_atomically(stem.with_suffix(".md"), text)
        plot(curves(rows), stem.with_suffix(".png"))
    return text


def markdown(rows: list[dict]) -> str:
    """Scores by budget, the best of each column in bold, then the parts of the masked student."""
    lines = ["Mean of k-NN and linear accuracy in percent; in brackets CPU minutes of the training.", ""]
    arms_of = curves(rows)
    for data, arms in arms_of.items():
        steps = sorted({point[0] for curve in arms.values() for point in curve})
        cells = {arm: {s: (score, f" ({cost:.1f})") for s, cost, score in curve} for arm, curve in arms.items()}
        lines += table(f"{data}, equal images", [f"{s * BATCH_SIZE:,.0f} images" for s in steps], steps, cells)
    for data, arms in arms_of.items():
        marks = [m for m in MINUTES if sum(at_minutes(curve, m) is not None for curve in arms.values()) > 1]
        cells = {
            arm: {m: (score, "") for m in marks if (score := at_minutes(curve, m)) is not None}
            for arm, curve in arms.items()
        }
        lines += table(f"{data}, equal minutes", [f"{m} min" for m in marks], marks, cells) if marks else []
    return "\n".join([*lines, *part_table(rows)]) + "\n"


def table(title: str, heads: list[str], keys: list, cells: dict[str, dict[Any, tuple[float, str]]]) -> list[str]:
    """Arms by budgets, the best of each column in bold."""
    lines = [f"| {title} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    best = {key: max((of[key][0] for of in cells.values() if key in of), default=0.0) for key in keys}
    for arm, of in cells.items():
        shown = []
        for key in keys:
            score, more = of.get(key, (None, ""))
            mark = "**" if score is not None and score == best[key] else ""
            shown.append("-" if score is None else f"{mark}{100 * score:.1f}{mark}{more}")
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    return [*lines, ""]


def part_table(rows: list[dict]) -> list[str]:
    """One line for each setting of the masked student, best score first."""
    found: dict[str, dict[str, list[float]]] = {}
    for entry in rows:
        _, kind, part, metric = entry["name"].split("/", 3)
        if kind == "parts":
            found.setdefault(part, {}).setdefault(metric, []).append(entry["value"])
    if not found:
        return []
    lines = [
        "| one setting of the masked student changed | k-NN | linear | mean | CPU minutes |",
        "|---|---|---|---|---|",
    ]
    means = {part: {name: float(np.mean(values)) for name, values in of.items()} for part, of in found.items()}
    for part, of in sorted(means.items(), key=lambda item: -item[1]["score"]):
        shown = " | ".join(f"{100 * of[name]:.1f}" for name in (*METRICS, "score"))
        lines.append(f"| {part} | {shown} | {of['cpu_seconds'] / 60:.1f} |")
    return [*lines, ""]


def plot(curves_of: dict[str, dict[str, Curve]], file: Path) -> None:
    """A line for each arm over images, and over minutes; nothing without matplotlib (pip install sslvit[report])."""
    try:
        import matplotlib
    except ImportError:
        return
    if not curves_of:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(curves_of), figsize=(4.2 * len(curves_of), 6.6), squeeze=False)
    for column, (data, arms) in enumerate(curves_of.items()):
        for line, (label, place) in enumerate((("images seen", 0), ("CPU minutes", 1))):
            axis = axes[line][column]
            for arm, curve in arms.items():
                scale = BATCH_SIZE if place == 0 else 1
                axis.plot([scale * point[place] for point in curve], [100 * p[2] for p in curve], marker="o", label=arm)
            axis.set_xscale("log")
            axis.set_xlabel(label)
            axis.set_title(f"{data}: mean of k-NN and linear (%)" if line == 0 else "", fontsize=9)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
