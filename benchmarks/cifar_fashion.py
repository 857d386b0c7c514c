"""What small encoders learn of CIFAR-10 and Fashion-MNIST: DINO, MAE and both, beside random weights and raw pixels.

    python benchmarks/cifar_fashion.py [--seeds 0 1 2] [--steps 600] [--arms mae ...] [--datasets cifar10 ...] [--quick]
        [--json FILE] [--output-dir OUT]

Every arm trains the same ViT (width 96, 4 blocks, patches of 4 pixels, images of 32) from scratch for equally many
steps of 128 images on the training split, and is judged by `sslvit evaluate` on the whole test split: k-NN and linear
probe on 10,000 labelled training images. joint, dino and mae are the recipes of equal_minutes.py. A training is one to
four minutes of one core: the table says what that little buys, and judges the evaluation as much as the objectives.

Rows: `ARM/{knn,linear}/...` on each data set and seed, `random_init/...` the same network untrained, `pixels/...`
images as they are, and `ARM/train/cpu_seconds`. A cell is one arm on one data set with one seed; OUT/runs and OUT/cells
keep what is finished. Without SSLVIT_DATA the script says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from equal_minutes import BATCH_SIZE, OURS
from probe_table import Cell, copy_tables, markdown, plot, table_rows

import sslvit
from sslvit.errors import EXIT_INPUT, InputError
from sslvit.probes.rows import row
from sslvit.run_folder import write_atomically

ENCODER = {"name": "vit_tiny_patch16_224", "embed_dim": 96, "depth": 4, "num_heads": 3, "num_registers": 0}
ENCODER |= {"image_size": 32, "patch_size": 4}
#: Specs of the two splits below SSLVIT_DATA.
DATASETS = {
    "cifar10": ("parquet:{root}/cifar10/train-*.parquet", "parquet:{root}/cifar10/test-*.parquet"),
    "fashion_mnist": tuple(f"torchvision:FashionMNIST?root={{root}}&split={split}" for split in ("train", "test")),
}
JUDGE = {"num_images": 10_000, "linear_steps": 3000}
QUICK = {"num_images": 500, "linear_steps": 100}
STEM = "cifar_fashion"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parse(arguments)
    root = os.environ.get("SSLVIT_DATA")
    if not root:
        print("skipped: SSLVIT_DATA is not set; it names the folder with cifar10/ and FashionMNIST/")
        return 0
    os.environ.setdefault("SSLVIT_CACHE", str(options.output_dir))
    try:
        cells = plan(options, root)
        costs = [measure(cell, options) for cell in cells]
    except InputError as error:
        print(error, file=sys.stderr)
        return EXIT_INPUT
    print("\n" + write(cells, costs, options))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2; 0 with --quick")
    parser.add_argument("--steps", type=int, help=f"of {BATCH_SIZE} images; default 600, 4 with --quick")
    parser.add_argument("--arms", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--quick", action="store_true", help="a few steps and 500 images: does everything run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows; .md and .png beside it")
    parser.add_argument("--output-dir", type=Path, metavar="OUT", default=Path("runs/benchmark-cifar-fashion"))
    options = parser.parse_args(arguments)
    options.output_dir = options.output_dir.absolute()
    options.steps = options.steps or (4 if options.quick else 600)
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    return options


def plan(options: argparse.Namespace, root: str) -> list[Cell]:
    """Seed by seed, so that a table with every arm exists early. The first arm's cell also measures the controls."""
    cells = []
    for seed in options.seeds:
        for data in options.datasets:
            train, val = (spec.format(root=root) for spec in DATASETS[data])
            for number, arm in enumerate(options.arms):
                name = f"{data}--{arm}--steps{options.steps}--seed{seed}"
                keys = {
                    "encoder": str(options.output_dir / "runs" / name),
                    "train_dataset": train,
                    "val_dataset": val,
                    "protocol": ["knn", "linear"],
                    "controls": ["random_init", "pixels"] if number == 0 else [],
                    "seed": seed,
                    **(QUICK if options.quick else JUDGE),
                }
                cells.append(Cell(arm, data, seed, options.output_dir / "cells" / name, keys))
    return cells


def measure(cell: Cell, options: argparse.Namespace) -> float:
    """Train the arm and judge it, unless that is done; the CPU seconds its training took, of all threads."""
    print(f"== {cell.label} on {cell.data}, seed {cell.seed}", flush=True)
    seconds = train(cell, options.steps, OURS[cell.label])
    sslvit.evaluate(output_dir=cell.folder, **cell.keys)
    return seconds


def train(cell: Cell, steps: int, keys: dict) -> float:
    """`sslvit pretrain` with `keys` into the folder that the cell judges, unless done; its CPU seconds."""
    run = Path(cell.keys["encoder"])
    cost = run / "cpu_seconds.json"
    if not cost.exists():
        began = time.process_time()
        sslvit.pretrain(
            config_file="pretrain/cifar10_vit_tiny",
            data=cell.keys["train_dataset"],
            output_dir=run,
            overwrite=True,  # half a run cannot be timed
            steps=steps,
            batch_size=BATCH_SIZE,
            seed=cell.seed,
            device="cpu",
            encoder=ENCODER,
            checkpoint={"every": steps},
            knn={"every": 0},
            **keys,
        )
        write_atomically(cost, json.dumps(time.process_time() - began) + "\n")
    return json.loads(cost.read_text())


def rows_of(cells: list[Cell], costs: list[float], steps: int) -> list[dict]:
    """The rows of all cells, untrained networks under a name of their own, and what each training cost."""
    rows = []
    for entry in table_rows(cells):
        arm, _, metric = entry["name"].partition("/")
        if "random_init/" in metric:
            entry = {**entry, "name": "random_init/" + metric.replace("random_init/", "")}
        elif arm != "pixels":
            entry = {**entry, "protocol": f"{budget(steps)}; {entry['protocol']}"}
        rows.append(entry)
    for cell, seconds in zip(cells, costs, strict=True):
        name, words = f"{cell.label}/train/cpu_seconds", f"{budget(steps)}; seconds of one core, all threads together"
        rows.append(row(name, seconds, ci95=None, protocol=words, data=cell.data, seed=cell.seed, step=steps))
    return rows


def budget(steps: int) -> str:
    """How long an arm trains, in words."""
    return f"trained for {steps} steps of {BATCH_SIZE} images ({steps * BATCH_SIZE:,} seen)"


def write(cells: list[Cell], costs: list[float], options: argparse.Namespace) -> str:
    """OUT/cifar_fashion.{json,md,png}, copied beside --json; returns the table."""
    rows = rows_of(cells, costs, options.steps)
    accuracies = [entry for entry in rows if "/train/" not in entry["name"]]
    text = markdown(accuracies) + "\n" + cost_table([entry for entry in rows if "/train/" in entry["name"]])
    stem = options.output_dir / STEM
    write_atomically(Path(f"{stem}.json"), json.dumps(rows, indent=1) + "\n")
    write_atomically(Path(f"{stem}.md"), text)
    plot(accuracies, Path(f"{stem}.png"))
    copy_tables(stem, options.json)
    return text


def cost_table(rows: list[dict]) -> str:
    """Median CPU seconds of a training, arms by data sets."""
    datasets = list(dict.fromkeys(entry["data"] for entry in rows))
    lines = [f"| CPU seconds of a training | {' | '.join(datasets)} |", "|---|" + "---|" * len(datasets)]
    for name in dict.fromkeys(entry["name"] for entry in rows):
        found = [[e["value"] for e in rows if (e["name"], e["data"]) == (name, data)] for data in datasets]
        lines.append(f"| {name.partition('/')[0]} | {' | '.join(f'{np.median(values):.0f}' for values in found)} |")
    return "\n".join([*lines, "", f"{rows[0]['protocol'].partition(';')[0].capitalize()}.", ""])


if __name__ == "__main__":
    sys.exit(main())
