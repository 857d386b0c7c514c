"""What a fixed number of minutes buys on CIFAR-10: our joint, DINO and MAE recipes beside lightly's modules.

    python benchmarks/equal_minutes.py [--minutes 20] [--seeds 0 1 2] [--arms joint lightly_mae ...] [--quick]
        [--json FILE] [--output-dir OUT] [--train-dataset SPEC --val-dataset SPEC]

Every arm trains the same timm ViT (ViT-Ti, 4-pixel patches, class token) from scratch, at batch 128, for the same wall
minutes on the same images, and is judged by `sslvit evaluate` (k-NN and linear). An arm's speed is measured in a short
run first, the schedules are laid over the steps that fit, and the minutes it really took are in the row's protocol.

joint is pretrain/cifar10_vit_tiny, dino and mae are its halves alone; all of ours in bf16 autocast where the machine
computes it. The settings of lightly's arms are in lightly_arms.py; each runs in fp32 as it ships, under bf16 autocast,
and under bf16 with our learning rate, since theirs is published for longer runs. Their images are decoded beforehand,
ours in the run.

Rows: `equal_minutes/ARM/{knn,linear}/top1`; of lightly also `equal_minutes/ARM/{bf16,bf16_our_lr}/{knn,linear}/top1`;
and `equal_minutes/random_init/...`. OUT/cells holds every arm and seed; finished ones are not run again. Without the
images (SSLVIT_DATA, or the two specs) or without lightly a cell prints `skipped: why`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stored import store

import sslvit
from sslvit.errors import EXIT_INPUT, InputError
from sslvit.run_folder import write_atomically

BATCH_SIZE = 128
OUR_LR = 1.5e-3
ENCODER = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 4, "num_registers": 0}
#: MAE's augmentation: random resized crops and flips alone.
NO_COLOUR = {"jitter_prob": 0.0, "grayscale_prob": 0.0, "global_blur_prob": [0.0], "global_solarize_prob": [0.0]}
WHOLE = {"weight": 1.0, "student_visible_ratio": 1.0, "num_teacher_views": 2}
#: What our arms change of pretrain/cifar10_vit_tiny.
OURS: dict[str, dict[str, Any]] = {
    "joint": {},
    "dino": {"mae": None, "dino": WHOLE},
    "mae": {
        "dino": None,
        "crops": {"num_global": 1, "global_scale": [0.2, 1.0]},
        "photometry": NO_COLOUR,
        "optim": {"weight_decay": 0.05},
    },
}
LIGHTLY = ("lightly_dino", "lightly_mae")
VARIANTS = {"": ("fp32", None), "bf16": ("bf16", None), "bf16_our_lr": ("bf16", OUR_LR)}
METRICS = ("knn/top1", "linear/top1")


@dataclass(frozen=True)
class Cell:
    """One arm with one seed. variant: of lightly's arms, else empty."""

    arm: str
    variant: str
    seed: int

    @property
    def label(self) -> str:
        """As in the names of rows: `lightly_mae/bf16`."""
        return "/".join(part for part in (self.arm, self.variant) if part)

    def folder(self, out: Path) -> Path:
        """Where it lives."""
        return out / "cells" / self.label.replace("/", "-") / f"seed{self.seed}"


@dataclass(frozen=True)
class Trained:
    """What training gave: an encoder for `sslvit evaluate`, and what it took."""

    encoder: str
    steps: int
    minutes: float
    precision: str


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parse(arguments)
    cells = plan(options.arms, options.seeds)
    rows: list[dict] = []
    try:
        for cell in cells:
            rows += run(cell, options)
    except InputError as error:
        print(error, file=sys.stderr)
        return EXIT_INPUT
    if rows:
        print(f"\n{markdown(rows)}")
    store(rows, markdown(rows), options.json)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="training time of a cell; default 20, 0.2 with --quick")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2; 0 with --quick")
    parser.add_argument("--arms", nargs="+", choices=[*OURS, *LIGHTLY], default=[*OURS, *LIGHTLY])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, small probes: a trial")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="all rows, in the form of results.json; the table beside"
    )
    parser.add_argument("--output-dir", type=Path, metavar="OUT", default=Path("runs/benchmark-equal-minutes"))
    parser.add_argument("--train-dataset", metavar="SPEC", help="default: CIFAR-10 under SSLVIT_DATA")
    parser.add_argument("--val-dataset", metavar="SPEC")
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or (0.2 if options.quick else 20.0)
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    options.probe_steps = 12 if options.quick else 60
    options.judge = {"num_images": 2000, "linear_steps": 200} if options.quick else {}
    options.data = options.val_dataset or "cifar10"
    root = os.environ.get("SSLVIT_DATA")
    if root and not options.train_dataset:
        options.train_dataset = f"parquet:{root}/cifar10/train-*.parquet"
    if root and not options.val_dataset:
        options.val_dataset = f"parquet:{root}/cifar10/test-*.parquet"
    return options


def plan(arms: list[str], seeds: list[int]) -> list[Cell]:
    """Seed by seed, so that a table with all arms exists early."""
    found = []
    for seed in seeds:
        for arm in arms:
            found += [Cell(arm, variant, seed) for variant in (VARIANTS if arm in LIGHTLY else ("",))]
    return found


def run(cell: Cell, options: argparse.Namespace) -> list[dict]:
    """Its rows: measured now, or those of a finished cell; none if it has to be skipped, with the reason printed."""
    folder, settings = cell.folder(options.output_dir), _settings(options)
    finished = folder / "cell.json"
    if finished.exists() and (kept := json.loads(finished.read_text()))["settings"] == settings:
        return kept["rows"]
    if why := skipped(cell, options):
        print(f"== {cell.label}, seed {cell.seed}\nskipped: {why}", flush=True)
        return []
    print(f"== {cell.label}, seed {cell.seed}: {options.minutes:g} minutes", flush=True)
    shutil.rmtree(folder, ignore_errors=True)  # half a run cannot be timed
    trained = (train_lightly if cell.arm in LIGHTLY else train_ours)(cell, folder, options)
    rows = judge(cell, trained, folder, options)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(finished, json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    return rows


def _settings(options: argparse.Namespace) -> dict:
    """What makes a finished cell stand for the one asked for."""
    names = ("minutes", "quick", "train_dataset", "val_dataset")
    return {name: getattr(options, name) for name in names}


def skipped(cell: Cell, options: argparse.Namespace) -> str:
    """Why this cell cannot be measured here; empty if it can."""
    from sslvit.distributed import native_bf16

    if not (options.train_dataset and options.val_dataset):
        return "SSLVIT_DATA is not set; set it, or give --train-dataset and --val-dataset"
    if cell.arm in LIGHTLY and importlib.util.find_spec("lightly") is None:
        return "lightly is not installed; pip install 'sslvit[bench]'"
    if VARIANTS[cell.variant][0] == "bf16" and not native_bf16("cpu"):
        return "this CPU only emulates bf16"
    return ""


# ---- training -------------------------------------------------------------------------------------------------------


def fitting_steps(minutes: float, seconds_per_step: float, overhead: float) -> int:
    """How many steps fit beside `overhead` seconds of start-up and export."""
    return max(10, int((60 * minutes - overhead) / seconds_per_step))


def train_ours(cell: Cell, folder: Path, options: argparse.Namespace) -> Trained:
    """`sslvit pretrain`, timed as a whole: start-up, checkpoint and export count."""

    def pretrain(name: str, steps: int) -> tuple[Path, float]:
        began = time.monotonic()
        keys = {"batch_size": BATCH_SIZE, "steps": steps, "seed": cell.seed, "device": "cpu", "encoder": ENCODER}
        keys |= {"checkpoint": {"every": steps}, "knn": {"every": 0}, **OURS[cell.arm]}
        config = "pretrain/cifar10_vit_tiny"
        run = sslvit.pretrain(config_file=config, data=options.train_dataset, output_dir=folder / name, **keys)
        return run, time.monotonic() - began

    probe, seconds = pretrain("probe", options.probe_steps)
    lines = [json.loads(line) for line in (probe / "metrics.jsonl").read_text().splitlines()]
    early, last = lines[len(lines) // 3], lines[-1]
    per_step = (last["seconds"] - early["seconds"]) / (last["step"] - early["step"])
    steps = fitting_steps(options.minutes, per_step, seconds - options.probe_steps * per_step)
    run, seconds = pretrain("run", steps)
    from sslvit.config import PretrainConfig, load_config

    precision = str(load_config(PretrainConfig, run / "resolved.yaml").precision)
    return Trained(str(run), steps, seconds / 60, precision)


def train_lightly(cell: Cell, folder: Path, options: argparse.Namespace) -> Trained:
    """lightly's modules in a plain loop; images decoded before the clock starts."""
    import lightly_arms

    precision, lr = VARIANTS[cell.variant]
    images = lightly_arms.decoded(options.train_dataset)

    def loop(steps: int) -> tuple[Any, list[float]]:
        return lightly_arms.train(cell.arm, images, steps, BATCH_SIZE, precision, cell.seed, lr)

    _, times = loop(options.probe_steps)
    third = len(times) // 3
    per_step = (times[-1] - times[third]) / (len(times) - 1 - third)
    steps = fitting_steps(options.minutes, per_step, times[0] - per_step)
    encoder, times = loop(steps)
    lightly_arms.save(encoder, folder / "encoder")
    return Trained(str(folder / "encoder"), steps, times[-1] / 60, precision)


# ---- judging --------------------------------------------------------------------------------------------------------


def judge(cell: Cell, trained: Trained, folder: Path, options: argparse.Namespace) -> list[dict]:
    """The numbers of `sslvit evaluate` under this benchmark's names."""
    measured = sslvit.evaluate(
        encoder=trained.encoder,
        train_dataset=options.train_dataset,
        val_dataset=options.val_dataset,
        protocol=["knn", "linear"],
        controls=["random_init"] if cell.arm == "joint" else [],
        seed=cell.seed,
        output_dir=folder / "evaluate",
        **options.judge,
    )
    facts = f"{options.minutes:g} minutes asked, {trained.minutes:.2f} taken; {trained.precision}; batch {BATCH_SIZE}"
    rows = []
    for row in measured:
        for metric in METRICS:
            if row["name"] == metric:
                name = f"equal_minutes/{cell.label}/{metric}"
                told = {"protocol": f"{facts}; {row['protocol']}", "step": trained.steps}
            elif row["name"] == metric.replace("/", "/random_init/"):
                name, told = f"equal_minutes/random_init/{metric}", {"step": 0}
            else:
                continue
            rows.append({**row, **told, "name": name, "data": options.data, "seed": cell.seed})
    return rows


def markdown(rows: list[dict]) -> str:
    """A table of means over seeds, best linear probe first, and by how much our best is ahead of lightly's."""
    table: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        label, metric = _parted(row["name"])
        table.setdefault(label, {}).setdefault(metric, []).append(row)

    def mean(label: str, metric: str) -> float:
        return 100 * float(np.mean([row["value"] for row in table[label][metric]]))

    lines = ["| arm | steps | k-NN | linear |", "|---|---|---|---|"]
    for label in sorted(table, key=lambda label: -mean(label, METRICS[1])):
        steps = [row["step"] for row in table[label][METRICS[0]]]
        cells = [_shown(table[label][metric]) for metric in METRICS]
        lines.append(f"| {label} | {int(np.mean(steps)):,} | {' | '.join(cells)} |")
    ours, theirs = [set(table) & set(OURS), [label for label in table if label.startswith("lightly")]]
    if ours and theirs:
        for metric in METRICS:
            lead = max(mean(label, metric) for label in ours) - max(mean(label, metric) for label in theirs)
            lines += ["", f"{metric.split('/')[0]}: our best is {lead:+.1f} points from lightly's best."]
    return "\n".join(lines)


def _parted(name: str) -> tuple[str, str]:
    """`equal_minutes/lightly_mae/bf16/knn/top1` -> (`lightly_mae/bf16`, `knn/top1`)."""
    parts = name.split("/")
    return "/".join(parts[1:-2]), "/".join(parts[-2:])


def _shown(rows: list[dict]) -> str:
    values = [100 * row["value"] for row in rows]
    spread = f" ± {np.std(values, ddof=1):.1f} ({len(values)} seeds)" if len(values) > 1 else " (one seed)"
    return f"{np.mean(values):.1f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
