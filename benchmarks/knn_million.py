"""k-NN among a million features beside plain torch: the time, the memory, and whether every answer is the exact one.

    python benchmarks/knn_million.py [--quick] [--rows 1000000 --dim 384 --queries 10000] [--json FILE]

Features are made up: 1000 classes of Gaussian clouds. `ours` is sslvit/probes/knn.py; `torch` is DINO's published loop
(normalise all, 100 chunks of queries, one matrix product, topk, votes); `exact` ranks CHECKED of the queries by the
definition in float64. Each runs in a process of its own, so that its peak of memory is its own; finished ones are kept
in OUT/cells. Memory is the growth of the process over the bytes of the training features, which it includes; CPU
seconds are those of all threads, which a busy machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from stored import store

from sslvit.probes.knn import NUM_NEIGHBOURS, TEMPERATURE, knn
from sslvit.probes.rows import describe, row
from sslvit.run_folder import peak_memory_bytes, write_atomically

NUM_CLASSES = 1000
NOISE = 3.0  # of a cloud, beside centres of unit variance: a task that is neither trivial nor hopeless
CHECKED = 200
BLOCK = 50_000
SIZES = {"rows": 1_000_000, "dim": 384, "queries": 10_000}
QUICK = {"rows": 50_000, "dim": 384, "queries": 1000}

Rankings = dict[int, np.ndarray]  # k -> labels (queries, 5), the likeliest first


def clouds(count: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (count, dim) float32 and labels (count,), made block by block so that nothing else is in memory."""
    centres = np.random.default_rng(0).standard_normal((NUM_CLASSES, dim), dtype=np.float32)
    labels = np.random.default_rng([seed, 1]).integers(0, NUM_CLASSES, count)
    features, generator = np.empty((count, dim), np.float32), np.random.default_rng([seed, 2])
    for start in range(0, count, BLOCK):
        block = features[start : start + BLOCK]
        generator.standard_normal(out=block, dtype=np.float32)
        block *= NOISE
        block += centres[labels[start : start + BLOCK]]
    return features, labels


def by_torch(train: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> Rankings:
    """DINO's evaluation, restated: the whole normalised set at once, a hundredth of the queries at a time."""
    import torch
    from torch.nn.functional import normalize

    known = normalize(torch.from_numpy(train)).T
    asked, classes = normalize(torch.from_numpy(queries)), torch.from_numpy(labels)
    k_most = min(max(NUM_NEIGHBOURS), len(train))
    found: dict[int, list[np.ndarray]] = {k: [] for k in NUM_NEIGHBOURS}
    for chunk in asked.split(max(1, len(asked) // 100)):
        similarities, index = (chunk @ known).topk(k_most, dim=1)
        weights, voted = (similarities / TEMPERATURE).exp(), classes[index]
        for k in NUM_NEIGHBOURS:
            votes = torch.zeros(len(chunk), NUM_CLASSES).scatter_add_(1, voted[:, :k], weights[:, :k])
            found[k].append(votes.topk(5, dim=1).indices.numpy())
    return {k: np.concatenate(parts) for k, parts in found.items()}


def by_definition(train: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> Rankings:
    """float64 similarities to 9 decimals, ties by index; shares of votes to 9 decimals, ties by label."""

    def unit(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    asked = unit(queries)
    similarities = np.empty((len(queries), len(train)))
    for start in range(0, len(train), BLOCK):
        similarities[:, start : start + BLOCK] = np.round(asked @ unit(train[start : start + BLOCK]).T, 9)
    rankings: dict[int, list[list[int]]] = {k: [] for k in NUM_NEIGHBOURS}
    classes = np.unique(labels)
    for similar in similarities:
        order = np.argsort(-similar, kind="stable")[: max(NUM_NEIGHBOURS)]
        for k in NUM_NEIGHBOURS:
            votes = dict.fromkeys(classes.tolist(), 0.0)
            for i in order[:k]:
                votes[int(labels[i])] += math.exp((similar[i] - similar[order[0]]) / TEMPERATURE)
            total = sum(votes.values())
            rankings[k].append(sorted(votes, key=lambda c: (-round(votes[c] / total, 9), c))[:5])
    return {k: np.array(found) for k, found in rankings.items()}


WAYS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Rankings]] = {
    "ours": lambda train, labels, queries: knn(train, labels, queries),
    "torch": by_torch,
    "exact": by_definition,
}


def measure(way: str, sizes: dict[str, int], folder: Path) -> None:
    """One cell: answers to FOLDER/WAY.npz, seconds and memory to FOLDER/WAY.json."""
    if way == "torch":
        import torch  # noqa: F401 (its import is no part of the time, nor of the memory)
    before = peak_memory_bytes()
    train, labels = clouds(sizes["rows"], sizes["dim"], seed=1)
    queries, truth = clouds(sizes["queries"], sizes["dim"], seed=2)
    asked = queries[:CHECKED] if way == "exact" else queries
    began, busy = time.perf_counter(), time.process_time()
    rankings = WAYS[way](train, labels, asked)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - busy
    facts = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memory": (peak_memory_bytes() - before) / train.nbytes,
        "top1": float((rankings[20][:, 0] == truth[: len(asked)]).mean()),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
    }
    np.savez(folder / f"{way}.npz", **{str(k): found for k, found in rankings.items()})
    write_atomically(folder / f"{way}.json", json.dumps(facts) + "\n")


def results(folder: Path, sizes: dict[str, int]) -> list[dict]:
    """The rows of what is in FOLDER."""
    facts = {way: json.loads((folder / f"{way}.json").read_text()) for way in WAYS}
    answers = {way: dict(np.load(folder / f"{way}.npz")) for way in WAYS}
    checked = len(answers["exact"]["20"])
    same = np.all([(answers["exact"][k] == answers["ours"][k][:checked]).all(axis=1) for k in answers["exact"]], axis=0)
    agreeing = (answers["torch"]["20"][:, 0] == answers["ours"]["20"][:, 0]).mean()
    size = "{rows} x {dim} features, {queries} queries".format(**sizes)
    words = describe("k 10, 20, 100, 200; seconds of one run", "", threads=facts["ours"]["threads"])
    numbers = {
        "ours/seconds": facts["ours"]["seconds"],
        "torch/seconds": facts["torch"]["seconds"],
        "torch/ratio": facts["torch"]["seconds"] / facts["ours"]["seconds"],
        "ours/cpu_seconds": facts["ours"]["cpu_seconds"],
        "torch/cpu_seconds": facts["torch"]["cpu_seconds"],
        "torch/cpu_ratio": facts["torch"]["cpu_seconds"] / facts["ours"]["cpu_seconds"],
        "ours/memory": facts["ours"]["memory"],
        "torch/memory": facts["torch"]["memory"],
        "ours/exact": same.mean(),
        "torch/agrees": agreeing,
        "ours/top1": facts["ours"]["top1"],
    }
    return [
        row(f"knn_million/{name}", value, ci95=None, protocol=words, data=size, seed=0)
        for name, value in numbers.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=None, help=f"default: {value}")
    parser.add_argument("--quick", action="store_true", help="50,000 rows and 1000 queries")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the numbers, in the form of results.json; a table beside"
    )
    parser.add_argument("--output-dir", type=Path, metavar="OUT", default=Path("runs/benchmark-knn-million"))
    parser.add_argument("--cell", choices=WAYS, help="measure one way in this process")
    options = parser.parse_args(arguments)
    sizes = {name: getattr(options, name) or (QUICK if options.quick else SIZES)[name] for name in SIZES}
    folder = options.output_dir / "cells" / "-".join(str(size) for size in sizes.values())
    folder.mkdir(parents=True, exist_ok=True)
    if options.cell:
        measure(options.cell, sizes, folder)
        return 0
    for way in WAYS:
        if not (folder / f"{way}.json").exists():
            print(f"== {way}", flush=True)
            words = [f"--{name}={size}" for name, size in sizes.items()]
            words += ["--cell", way, "--output-dir", str(options.output_dir)]
            subprocess.run([sys.executable, __file__, *words], check=True)
    rows = results(folder, sizes)
    print(f"\n{markdown(rows)}")
    store(rows, markdown(rows), options.json)
    return 0


def markdown(rows: list[dict]) -> str:
    """A line for each number, under what was measured."""
    head = f"{rows[0]['data']}; {rows[0]['protocol']}"
    lines = [f"| {row['name'].removeprefix('knn_million/')} | {row['value']:.4f} |" for row in rows]
    return "\n".join([head, "", "| way / number | value |", "|---|---|", *lines])


if __name__ == "__main__":
    sys.exit(main())
