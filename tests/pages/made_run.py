"""Run folders written by hand, for the tests of the report; nothing in them was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;{{7*7}}{% raw %}"


def lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pretraining_rows(steps: int = 200, **changes: Any) -> list[Row]:
    """A healthy run: losses fall, entropy falls from 0.8, k-NN rises from 0.2 to 0.6."""
    rows: list[Row] = []
    for step in range(0, steps + 1, 10):
        share = step / steps
        if step % 50 == 0:
            rows.append({"step": step, "knn/top1": 0.2 + 0.4 * share, "rankme": 10 + 20 * share, "feature_std": 0.04})
        if step:
            rows.append(
                {
                    "step": step,
                    "loss": 7 - 3 * share,
                    "dino/loss": 6 - 2.5 * share,
                    "mae/loss": 1 - 0.5 * share,
                    "dino/target_entropy": 0.8 - 0.4 * share,
                    "dino/usage_entropy": 0.95,
                    "grad_norm": 1.5,
                    "lr": 1e-3 * math.cos(share),
                    "weight_decay": 0.04,
                    "skipped": 0,
                    "images_per_s": 120.0,
                    "data_wait": 0.02,
                    "mfu": 0.31,
                    "peak_memory_mib": 900.0,
                    "seconds": step / 4,
                    "eta": (steps - step) / 4,
                    **changes,
                }
            )
    return rows


def result(name: str, value: float | None, half: float | None = 0.02, data: str = "a -> b", **more: Any) -> Row:
    interval = None if half is None or value is None else [value - half, value + half]
    return {
        "name": name,
        "value": value,
        "ci95": interval,
        "protocol": f"protocol of {name}",
        "data": data,
        "seed": 0,
        "step": 200,
        **more,
    }


def encoder_results() -> list[Row]:
    """k-NN and linear on two labels and their mean, each above both controls."""
    rows = []
    for probe in ("knn", "linear"):
        for label in ("", "shape/", "colour/"):
            rows.append(result(f"{probe}/{label}top1", 0.71))
            rows.append(result(f"{probe}/random_init/{label}top1", 0.33))
            rows.append(result(f"{probe}/pixels/{label}top1", 0.42))
    return [*rows, result("knn/k10/top1", 0.69), result("knn/shape/top5", 0.99), result("health/rankme", 31.5, 1.0)]


def seeing_results(own: float = 0.81, blind: float = 0.41, shuffled: float = 0.40, gain: float = 1.2) -> list[Row]:
    """Two families of questions, captions, and the gain of seeing."""
    rows = []
    for who, value in (("", own), ("blind/", blind), ("shuffled/", shuffled), ("random_encoder/", 0.5)):
        rows += [result(f"vlm/{who}accuracy", value), result(f"vlm/{who}accuracy/colour", value - 0.01)]
        rows += [result(f"vlm/{who}accuracy/zebras", value), result(f"caption/{who}cider", value / 2)]
    return [*rows, result("vlm/image_gain_nats", gain, 0.1)]


def predictions() -> list[Row]:
    """Four right and four wrong answers in two families, and a caption with two references."""
    rows = []
    for i in range(8):
        wrong = i >= 4
        rows.append(
            {
                "image": f"scene-{i}",
                "index": i,
                "family": "colour" if i % 2 else "count",
                "question": f"Question {i}?",
                "answer": f"truth {i}",
                "prediction": f"error {i}" if wrong else f"Truth, {i}",
                "blind": f"guess {i}",
            }
        )
    caption = {"image": "scene-0", "family": "caption", "question": "Describe the image.", "prediction": "a thing"}
    return [*rows, {**caption, "answer": "one reference"}, {**caption, "answer": "another reference"}]


def write_run(path: Path, verb: str = "pretrain", config: str = "data: /nowhere/images\nsteps: 200\n") -> Path:
    """The record of a verb in `path`, without numbers."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "env.json").write_text(json.dumps({"verb": verb, "sslvit": "9.9", "packages": {"torch": "8.7.6"}}))
    (path / "config.yaml").write_text(config)
    (path / "resolved.yaml").write_text(config)
    (path / "command.txt").write_text(f"# a day\nsslvit {verb} data=x\n")
    return path


def whole_run(path: Path) -> Path:
    """Everything a demo leaves, except weights and images."""
    write_run(path, "demo", "images: scenes\n")
    write_run(path / "pretrain", "pretrain")
    write_run(path / "align", "align", "data: /nowhere/pairs\nencoder: E\n")
    stages = [
        {"step": step, "stage": stage, "loss": 3 - step / 20, "token_accuracy": 0.4 + step / 100}
        for stage in ("text", "connector", "instruct")
        for step in range(1, 31)
    ]
    (path / "metrics.jsonl").write_text(lines(pretraining_rows() + stages))
    (path / "results.json").write_text(json.dumps(encoder_results() + seeing_results()))
    (path / "predictions.jsonl").write_text(lines(predictions()))
    (path / "bad_files.jsonl").write_text(lines([{"name": "broken.jpg", "reason": "truncated"}]))
    return path
