"""The curves of a run: which fields of metrics.jsonl are drawn together, under which title, beside which levels.

A field nobody planned for gets a chart of its own, so that whatever a run logs can be seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from sslvit.pages.run_record import finite, keys, series
from sslvit.pages.svg import Level, Line, line_chart, number

Row = dict[str, Any]

OBJECTIVES = {
    "dino": ("DINO", "cross-entropy with the teacher, nats"),
    "ibot": ("iBOT", "cross-entropy of masked patches, nats"),
    "koleo": ("KoLeo", "negative log distance to the nearest neighbour"),
    "mae": ("MAE", "squared error on removed patches"),
}
TITLES = {
    "loss": ("Loss", "weighted sum of the objectives"),
    "lr": ("Learning rate", "peak after warm-up, then cosine"),
    "weight_decay": ("Weight decay", ""),
    "momentum": ("Teacher momentum", "share kept at each step"),
    "grad_norm": ("Gradient norm", "over all weights, before clipping"),
    "rankme": ("RankMe", "effective rank of the features"),
    "feature_std": ("Feature spread", "standard deviation of unit-length features"),
    "images_per_s": ("Throughput", "images per second"),
    "data_wait": ("Waiting for data", "share of the time"),
    "mfu": ("Model FLOPs utilisation", "share of what the device could compute"),
    "peak_memory_mib": ("Peak memory", "MiB"),
    "skipped": ("Skipped steps", "loss or gradient not finite"),
}
SPEED = ("images_per_s", "data_wait", "mfu", "peak_memory_mib")
MOST_UNPLANNED = 30  # charts of fields nobody planned for
UNDRAWN = ("step", "stage", "seconds", "eta", "skipped", "weight_decay", "monitor_s")
STAGES = {"text": "Text", "connector": "Connector", "instruct": "Instruct"}


@dataclass(frozen=True)
class Figure:
    """One chart with its words. legend: (name, colour) of its lines where there are several."""

    title: str
    note: str
    svg: Markup
    legend: list[tuple[str, int]] = field(default_factory=list)


def pretraining_figures(rows: Sequence[Row], config: dict[str, Any], embed_dim: int | None) -> list[Figure]:
    """Charts of pretraining in the order of the page: losses, optimisation, health, k-NN, speed."""
    named = keys(rows)
    losses = [key for key in named if key.endswith("/loss")]
    entropies = [key for key in named if key.endswith("_entropy")]
    accuracies = [key for key in named if key.startswith("knn/")]
    planned = {*losses, *entropies, *accuracies, "loss", "lr", "grad_norm", *SPEED, *UNDRAWN}
    health = [key for key in named if key not in planned][:MOST_UNPLANNED]
    figures = [
        *([] if len(losses) == 1 and _same(rows, losses[0]) else [_single(rows, "loss")]),
        *(_objective(rows, key, config) for key in losses),
        *(_single(rows, "lr"), _gradients(rows, config), _skipped(rows), _decay(rows)),
        *(_entropy(rows, entropies), *(_health(rows, key, embed_dim) for key in health)),
        *(_knn(rows, accuracies), _single(rows, "images_per_s"), _waiting(rows), _utilisation(rows)),
        _single(rows, "peak_memory_mib"),
    ]
    return [figure for figure in figures if figure is not None]


def stage_figures(stages: dict[str, list[Row]]) -> list[Figure]:
    """Charts of the stages of alignment: loss, then the share of answer tokens guessed right."""
    found = [
        _chart(f"{STAGES.get(stage, stage)}: {title}", note, rows, [(key, title)], shares=key == "token_accuracy")
        for key, title, note in (
            ("loss", "loss", "nats per answer token"),
            ("token_accuracy", "accuracy", "of answer tokens"),
        )
        for stage, rows in stages.items()
    ]
    return [figure for figure in found if figure is not None]


def _chart(
    title: str,
    note: str,
    rows: Sequence[Row],
    fields: Sequence[tuple[str, str]],
    *,
    levels: Sequence[Level] = (),
    shares: bool = False,
    floor: float | None = None,
    ceiling: float | None = None,
    smooth: bool = True,
) -> Figure | None:
    """A chart of (key, name of the line) fields; None when none of them has a value."""
    found = [(name, *series(rows, key)) for key, name in fields]
    lines = [Line(name, xs, ys, colour % 6, smooth) for colour, (name, xs, ys) in enumerate(n for n in found if n[1])]
    if not lines:
        return None
    last = ", ".join(f"{line.name} {number(line.ys[-1])}" for line in lines)
    label = f"{title} over {len(lines[0].xs)} points up to step {number(lines[0].xs[-1])}; at the end: {last}"
    svg = line_chart(lines, label=label, levels=levels, shares=shares, floor=floor, ceiling=ceiling)
    legend = [(line.name, line.colour) for line in lines] if len(lines) > 1 else []
    return Figure(title, note, svg, legend)


def _single(rows: Sequence[Row], key: str) -> Figure | None:
    title, note = TITLES.get(key, (key.replace("_", " ").replace("/", ": "), ""))
    floor = 0.0 if key in ("lr", "images_per_s", "peak_memory_mib") else None
    return _chart(title, note, rows, [(key, title.lower())], floor=floor, smooth=key not in ("lr", "peak_memory_mib"))


def _same(rows: Sequence[Row], key: str) -> bool:
    """Whether the sum is this one objective, so that a second chart would say the same."""
    return series(rows, "loss")[1] == series(rows, key)[1]


def _objective(rows: Sequence[Row], key: str, config: dict[str, Any]) -> Figure | None:
    objective = key.removesuffix("/loss")
    title, note = OBJECTIVES.get(objective, (objective, ""))
    section = config.get(objective)
    prototypes = section.get("num_prototypes") if isinstance(section, dict) else None
    levels = []
    if finite(prototypes) and prototypes > 1:
        levels.append(Level(math.log(prototypes), f"ln K = {math.log(prototypes):.2f}: says nothing"))
    return _chart(f"{title} loss", note, rows, [(key, title)], levels=levels)


def _gradients(rows: Sequence[Row], config: dict[str, Any]) -> Figure | None:
    optim = config.get("optim")
    clip = optim.get("clip_norm") if isinstance(optim, dict) else None
    levels = [Level(float(clip), f"clipped at {number(clip)}")] if finite(clip) and clip > 0 else []
    return _chart(*TITLES["grad_norm"], rows, [("grad_norm", "norm")], levels=levels)


def _skipped(rows: Sequence[Row]) -> Figure | None:
    if not any(series(rows, "skipped")[1]):
        return None
    return _chart(*TITLES["skipped"], rows, [("skipped", "skipped")], smooth=False)


def _decay(rows: Sequence[Row]) -> Figure | None:
    if len(set(series(rows, "weight_decay")[1])) < 2:
        return None
    return _chart(*TITLES["weight_decay"], rows, [("weight_decay", "weight decay")], smooth=False)


def _entropy(rows: Sequence[Row], fields: Sequence[str]) -> Figure | None:
    """Of one target (100%: says nothing) and of the mean target (0%: one prototype for everything)."""
    words = {"target_entropy": "one target", "usage_entropy": "mean target"}
    several = len({key.partition("/")[0] for key in fields}) > 1
    named = []
    for key in fields:
        objective, _, what = key.rpartition("/")
        prefix = f"{OBJECTIVES.get(objective, (objective,))[0]} " if several else ""
        named.append((key, prefix + words.get(what, what.replace("_", " "))))
    note = "share of ln K"
    return _chart("Teacher entropy", note, rows, named, shares=True, floor=0.0, ceiling=1.0)


def _health(rows: Sequence[Row], key: str, embed_dim: int | None) -> Figure | None:
    levels = []
    if key == "feature_std" and embed_dim:
        levels = [Level(embed_dim**-0.5, f"1/sqrt({embed_dim}): evenly spread")]
    title, note = TITLES.get(key, (key.replace("_", " ").replace("/", ": "), ""))
    if key == "rankme" and embed_dim:
        note += f", of {embed_dim}"
    floor = 0.0 if key in ("rankme", "feature_std") else None
    return _chart(title, note, rows, [(key, title.lower())], levels=levels, floor=floor)


def _knn(rows: Sequence[Row], fields: Sequence[str]) -> Figure | None:
    fields = [key for key in fields if key != "knn/init/top1"]
    ordered = sorted(fields, key=lambda key: (key != "knn/top1", fields.index(key)))
    single = len(fields) == 1
    named = [(key, "top-1" if single else "mean" if key == "knn/top1" else key.split("/")[1]) for key in ordered]
    start = series(rows, "knn/top1")
    levels = [Level(start[1][0], "at step 0")] if start[0] and start[0][0] == 0 and len(start[0]) > 1 else []
    if before := series(rows, "knn/init/top1")[1]:
        levels.append(Level(before[0], "init before it was resized"))
    note = "top-1 on clean images, k = 20"
    return _chart("k-NN accuracy", note, rows, named, levels=levels, shares=True, smooth=False)


def _waiting(rows: Sequence[Row]) -> Figure | None:
    return _chart(*TITLES["data_wait"], rows, [("data_wait", "waiting")], shares=True, floor=0.0)


def _utilisation(rows: Sequence[Row]) -> Figure | None:
    return _chart(*TITLES["mfu"], rows, [("mfu", "utilisation")], shares=True, floor=0.0)
