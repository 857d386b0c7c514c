"""Does pretraining collapse with `auto`? Objectives x batch sizes x numbers of images, and settings broken on purpose.

    python benchmarks/no_collapse.py [--data cifar10|scenes] [--cells PATTERN..] [--seeds N..]
        [--quick] [--json FILE] [--output-dir OUT]

{DINO, iBOT, DINO+MAE, DINOv2-style} x batch {16, 64, 256} x {500, 5000, 50000} images, 300 steps each, every other
setting left to `auto`; iBOT is the published method, both losses through one head. A run has collapsed when at its end
the teacher's targets (of class tokens or of patches) are uniform, all fall on one prototype or use fewer than four,
RankMe is below 1.5, k-NN is more than 2 points below the encoder's at step 0, or it was stopped. Beside them, at batch
64 and 5000 images, runs with teacher temperature 1.0, without centering, and with momentum 0: each must raise an alarm.
Levels are those of sslvit/probes/alarms.py. Outside the matrix, at batch 16, stands iBOT's patch loss alone: it has no
target for the class token, which k-NN reads.

Images are CIFAR-10 under SSLVIT_DATA, its first n of each set, or the built-in scenes. Run it again to go on: a
finished cell is not run twice.
Rows: `no_collapse/{runs,collapsed,same_targets,broken,alarms_missed}`, and `no_collapse/CELL/{target_entropy,
usage_entropy,dino_prototypes,ibot_prototypes,rankme,knn_gain}` of the end of each run.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from stored import store

import sslvit
from sslvit.config import PretrainConfig, load_config
from sslvit.errors import InputError
from sslvit.probes.alarms import LOSES, LOW_RANK, ONE_PROTOTYPE, SAME, UNIFORM, least_prototypes

STEPS, TAIL = 300, 0.1  # the last share of the lines is the end of a run
SINKHORN = {"centering": "sinkhorn"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dino": {"dino": {}},
    "ibot": {"dino": {}, "ibot": {"shared_head": True}},
    "dino_mae": {"dino": {}, "mae": {}},
    "dinov2": {"dino": SINKHORN, "ibot": SINKHORN, "koleo": {}},
}
ALONE: dict[str, dict[str, Any]] = {"ibot_patches": {"ibot": {}}}
BATCHES, IMAGES = (16, 64, 256), (500, 5000, 50_000)
HOT = {"teacher_temperature": 1.0, "teacher_temperature_start": 1.0}
STILL = {"centering": "softmax", "center_momentum": 1.0}
BROKEN = ("temperature", "centering", "momentum")
QUICK = {
    "steps": 60,
    "encoder": {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2}
    | {"num_heads": 3},
    "crops": {"num_local": 0},
    "knn": {"every": 30, "num_images": 500},
}


@dataclass(frozen=True)
class Cell:
    """One run. broken: which setting is broken on purpose, "" for none."""

    objective: str
    batch: int
    images: int
    seed: int
    broken: str = ""
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """`dino/b64/n5000`, with `/broken_momentum` behind it."""
        return f"{self.objective}/b{self.batch}/n{self.images}" + (f"/broken_{self.broken}" if self.broken else "")

    def keys(self) -> dict[str, Any]:
        """Keys of `sslvit pretrain`, without the data."""
        sections = {name: dict(section) for name, section in (OBJECTIVES | ALONE)[self.objective].items()}
        change = {"temperature": HOT, "centering": STILL}.get(self.broken, {})
        for name in ("dino", "ibot"):
            if name in sections:
                sections[name] |= change
        keys = {"steps": STEPS, "batch_size": self.batch, "seed": self.seed, "mae": None, "dino": None, **sections}
        if self.broken == "momentum":
            keys["optim"] = {"momentum": 0.0, "momentum_end": 0.0}
        return {**keys, "knn": {"every": 150, "num_images": 2000}, **self.settings}


@dataclass
class Outcome:
    """What the lines of a run say of its end; None where it was not measured."""

    numbers: dict[str, float]
    alarms: list[str]
    stopped: str = ""
    few: list[str] = field(default_factory=list)  # objectives whose targets use too few prototypes

    @property
    def signs(self) -> list[str]:
        """Why it counts as collapsed; empty when it does not."""
        signs = [f"stopped: {self.stopped}"] if self.stopped else []
        if self.numbers.get("target_entropy", 0.5) > UNIFORM:
            signs.append("uniform targets")
        if self.numbers.get("usage_entropy", 0.5) < ONE_PROTOTYPE:
            signs.append("one prototype")
        signs += [f"few prototypes in {name}" for name in self.few]
        if self.numbers.get("rankme", 9.0) < LOW_RANK:
            signs.append("features of rank one")
        if self.numbers.get("knn_gain", 0.0) < -LOSES:
            signs.append("k-NN below random init")
        return signs

    @property
    def same_targets(self) -> bool:
        """Whether the targets say nothing about the image: collapsed, or not yet begun."""
        entropies = [self.numbers.get(key, math.nan) for key in ("usage_entropy", "target_entropy")]
        return entropies[0] - entropies[1] < SAME


def plan(quick: bool, seeds: list[int], patterns: list[str]) -> list[Cell]:
    """Every cell, the cheap ones first."""
    settings = QUICK if quick else {}
    batches, images = ((16,), (500,)) if quick else (BATCHES, IMAGES)
    cells = [
        Cell(objective, batch, number, seed, "", settings)
        for batch in batches
        for number in images
        for seed in seeds
        for objective in OBJECTIVES
    ]
    if not quick:
        cells += [Cell(name, batches[0], number, seed) for number in images for seed in seeds for name in ALONE]
    where = (16, 500) if quick else (64, 5000)
    cells += [
        Cell(objective, *where, seed, broken, settings)
        for broken in BROKEN
        for seed in seeds
        for objective in (("dino",) if quick else OBJECTIVES)
    ]
    return [cell for cell in cells if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in patterns)]


def specs(data: str, images: int, folder: Path) -> tuple[str, str]:
    """(train, val) of a set with `images` training images."""
    if data == "scenes":
        return f"scenes:?n={images}&size=32&objects=1", "scenes:?n=2000&size=32&objects=1&split=val"
    root = os.environ.get("SSLVIT_DATA")
    if not root:
        raise InputError("SSLVIT_DATA is unset: no CIFAR-10 here; set it, or take --data scenes")
    files = sorted(Path(root, "cifar10").glob("train-*.parquet"))
    if not files:
        raise InputError(f"{root}/cifar10 holds no train-*.parquet; take --data scenes")
    val = f"parquet:{root}/cifar10/test-*.parquet"
    if images >= 50_000:
        return f"parquet:{root}/cifar10/train-*.parquet", val
    part = folder / "data" / f"cifar10_{images}.parquet"
    if not part.exists():
        import pyarrow.parquet

        part.parent.mkdir(parents=True, exist_ok=True)
        temporary = part.with_suffix(".tmp")
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(files[0]).slice(0, images), temporary)
        temporary.rename(part)
    return f"parquet:{part}", val


def run(cell: Cell, data: str, folder: Path) -> Outcome:
    """Pretrain, or go on, or find it finished; then read its lines."""
    train, val = specs(data, cell.images, folder)
    out = folder / "cells" / data / f"{cell.name.replace('/', '_')}_seed{cell.seed}"
    stopped = ""
    try:
        sslvit.pretrain(data=train, val_data=val, output_dir=out, **cell.keys())
    except InputError as error:
        if not (out / "metrics.jsonl").exists():
            raise
        stopped = str(error)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return outcome(rows, load_config(PretrainConfig, out / "resolved.yaml"), stopped)


def outcome(rows: list[dict[str, Any]], config: PretrainConfig, stopped: str = "") -> Outcome:
    """The end of a run from its metrics.jsonl: the worse of the two objectives' entropies where there are two.

    `config` is the resolved one; it tells how many prototypes there are.
    """

    def values(key: str) -> list[float]:
        return [row[key] for row in rows if isinstance(row.get(key), float) and math.isfinite(row[key])]

    def end(key: str) -> list[float]:
        found = values(key)
        return [mean(found[-max(1, round(TAIL * len(found))) :])] if found else []

    numbers: dict[str, float] = {}
    few = []
    for name, section in (("dino", config.dino), ("ibot", config.ibot)):
        usage = end(f"{name}/usage_entropy")
        if section is not None and section.num_prototypes and usage:
            numbers[f"{name}_prototypes"] = math.exp(usage[0] * math.log(section.num_prototypes))
            few += [name] if numbers[f"{name}_prototypes"] < least_prototypes(config, name) else []
    targets, usages = ([*end(f"dino/{key}"), *end(f"ibot/{key}")] for key in ("target_entropy", "usage_entropy"))
    if targets:
        numbers |= {"target_entropy": max(targets), "usage_entropy": min(usages)}
    if ranks := values("rankme"):
        numbers["rankme"] = ranks[-1]
    if top1 := values("knn/top1"):
        numbers["knn_gain"] = top1[-1] - top1[0]
    alarms = [row["alarm"] for row in rows if "alarm" in row and not row["text"].startswith("over")]
    return Outcome(numbers, list(dict.fromkeys(alarms)), stopped, few)


def rows_of(done: dict[Cell, Outcome], data: str, steps: int) -> list[dict[str, Any]]:
    """Counts over all cells, then the numbers of each."""
    kept = {cell: found for cell, found in done.items() if not cell.broken and cell.objective in OBJECTIVES}
    broken = {cell: found for cell, found in done.items() if cell.broken}
    counts = {
        "runs": len(kept),
        "collapsed": sum(bool(found.signs) for found in kept.values()),
        "same_targets": sum(found.same_targets for found in kept.values()),
        "broken": len(broken),
        "alarms_missed": sum(not found.alarms for found in broken.values()),
    }
    protocol = f"{steps} steps each, auto; levels of sslvit/probes/alarms.py"
    rows = [_row(f"no_collapse/{name}", value, protocol, data, 0, steps) for name, value in counts.items()]
    for cell, found in done.items():
        words = "; ".join([*found.signs, *(f"alarm {name}" for name in found.alarms)]) or "healthy"
        for name, value in found.numbers.items():
            rows.append(_row(f"no_collapse/{cell.name}/{name}", value, words, data, cell.seed, steps))
    return rows


def _row(name: str, value: float, protocol: str, data: str, seed: int, step: int) -> dict[str, Any]:
    return {"name": name, "value": value, "ci95": None, "protocol": protocol, "data": data, "seed": seed, "step": step}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cifar10" if os.environ.get("SSLVIT_DATA") else "scenes"
    parser.add_argument("--data", choices=("cifar10", "scenes"), default=default, help="default here: %(default)s")
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="PATTERN", help="such as 'dino/*' '*/broken_*'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="seven small runs of 60 steps at batch 16, 500 images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where rows go, after every cell; the table beside")
    parser.add_argument("--output-dir", type=Path, metavar="OUT", default=Path("runs/benchmark-no-collapse"))
    options = parser.parse_args(arguments)
    folder = options.output_dir / "quick" if options.quick else options.output_dir
    steps = QUICK["steps"] if options.quick else STEPS
    done: dict[Cell, Outcome] = {}
    rows: list[dict[str, Any]] = []
    for cell in plan(options.quick, options.seeds, options.cells):
        print(f"== {cell.name}, seed {cell.seed}", flush=True)
        try:
            done[cell] = run(cell, options.data, folder)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        rows = rows_of(done, options.data, steps)
        store(rows, markdown(done, rows), options.json)
    print(f"\n{markdown(done, rows)}")
    return 0


def markdown(done: dict[Cell, Outcome], rows: list[dict[str, Any]]) -> str:
    """The counts, then a line for each cell: its numbers at the end, and what it shows."""
    counts = [row for row in rows if row["name"].count("/") == 1]
    lines = ["| count | cells |", "|---|---|"]
    lines += [f"| {row['name'].removeprefix('no_collapse/')} | {row['value']} |" for row in counts]
    names = list(dict.fromkeys(name for found in done.values() for name in found.numbers))
    lines += ["", f"| cell | seed | {' | '.join([*names, 'signs and alarms'])} |", "|---" * (len(names) + 3) + "|"]
    for cell, found in done.items():
        told = [f"{found.numbers[name]:.3f}" if name in found.numbers else "" for name in names]
        signs = "; ".join([*found.signs, *found.alarms]) or "healthy"
        lines.append(f"| {cell.name} | {cell.seed} | {' | '.join([*told, signs])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
