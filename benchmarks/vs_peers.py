"""How fast we are beside the peers on the same work, in one process, from one command.

    python benchmarks/vs_peers.py [--works dino_vits16 knn ...] [--quick] [--compiled] [--minutes 3] [--json FILE]
        [--output-dir OUT]

Peers are what the package index offers (lightly, timm, torchvision, scikit-learn; one that is not installed prints
`skipped: why`) and the published steps of DINO and MAE, written out plainly in plain_steps.py. Training steps start
from the same weights and are timed only after their fp32 losses agree to 1e-5. All variants of a work take turns in
one process, gated by a matrix product (rounds.py).

Works: the steps dino_vits16, dino_vitti8, mae_vits16, joint_vits16 (DINO and MAE together beside DINO alone); features;
views_geometry and views_full (one core, decoding included); training (from a folder of JPEG files); knn; probe (52
heads, ten classes) and probe_100_classes; help; growth; and on a GPU gpu_training_vits16 (the same from JPEG files) and
gpu_step_vitb16 (utilisation of the step alone, memory), which say `skipped` without one.

`training` has two peers on the views of torchvision v2: `torchvision_v2` trains with our step, so that its ratio is
what our data path gains; `official_torchvision_v2` trains with the published step in fp32, so that its ratio is what
data path and step gain together. The goal is asked of both.

Rows: `vs_peers/WORK/PEER/ratio`, the peer's time over ours, above 1 is faster; `vs_peers/WORK/VARIANT/seconds`, and of
steps `/utilisation`, the share of the peak in the precision of the variant. `joint_vits16/ours_dino/cost` is our joint
step over our DINO step, `knn/ours/memory_mb` the peak above the features, `growth/CURVE/exponent` as in value ~
size^exponent. OUT/cells keeps finished works; they are not run again. The table
that is printed lies beside FILE as well, as .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rounds import Probe, Timing, children_clock, machine, measure, own_clock, ratio
from stored import store

from sslvit import memory
from sslvit.data.loader import usable_cores
from sslvit.distributed import compiles, native_bf16
from sslvit.probes.rows import describe, row
from sslvit.run_folder import write_atomically
from sslvit.utilisation import peak_flops

#: What a ratio should reach at least, and what it aims at. Of `cost` and `memory_mb` lower is better.
GOALS = {
    "dino_vits16/official/ratio": (2.2, 3.0),
    "dino_vits16/official_autocast/ratio": (1.1, 1.4),
    "dino_vits16/lightly/ratio": (2.9, 4.0),
    "dino_vitti8/official/ratio": (2.3, 3.0),
    "dino_vitti8/official_autocast/ratio": (1.15, 1.5),
    "dino_vitti8/lightly/ratio": (2.3, 3.0),
    "mae_vits16/official/ratio": (2.2, 2.8),
    "mae_vits16/official_autocast/ratio": (1.15, 1.4),
    "mae_vits16/lightly/ratio": (2.0, 2.7),
    "joint_vits16/ours_dino/cost": (1.20, 1.10),
    "views_geometry/official/ratio": (6.7, 8.0),
    "views_full/official/ratio": (3.4, 4.0),
    "training/torchvision_v2/ratio": (2.0, 3.0),
    "training/official_torchvision_v2/ratio": (2.0, 3.0),
    "knn/official/ratio": (1.5, 2.0),
    "knn/ours/memory_mb": (100.0, 100.0),
    "probe/one_by_one/ratio": (5.0, 10.0),
    "help/stack/ratio": (40.0, 60.0),
    "gpu_training_vits16/ours/images_per_second": (2500.0, 3500.0),
    "gpu_step_vitb16/ours/utilisation": (0.4, 0.5),
}
#: What a peer's name leaves open, for the table.
WORDS = {
    "training/torchvision_v2": "our step, torchvision v2's views",
    "training/official_torchvision_v2": "published fp32 step, torchvision v2's views",
}
LOWER_IS_BETTER = ("cost", "memory_mb", "memory_share")
NO_GPU = "no CUDA device"


@dataclass(frozen=True)
class Context:
    """How to measure: `seconds` of a work, in bf16 where the machine computes it."""

    quick: bool
    seconds: float
    compiled: bool
    bf16: bool
    folder: Path  # for files that a work makes
    plot: Path | None


@dataclass
class Found:
    """The rows of a work and what could not be measured."""

    rows: list[dict]
    skipped: dict[str, str]


class Rows:
    """Collects the rows of one work under its name and words."""

    def __init__(self, work: str, words: str) -> None:
        self.work, self.words, self.rows = work, words, []

    def add(self, name: str, value: float, how: str) -> None:
        threads = torch.get_num_threads()
        protocol = describe(f"{self.words}; {how}", "", machine=machine(), threads=threads, torch=torch.__version__)
        self.rows.append(row(f"vs_peers/{self.work}/{name}", value, ci95=None, protocol=protocol, data="", seed=0))

    def timings(self, timings: dict[str, Timing], ours: str = "ours") -> None:
        """Seconds of each variant, and the ratio of each other one over `ours`."""
        for name, timing in timings.items():
            self.add(f"{name}/seconds", timing.median, timing.words())
            if name != ours:
                medians, minima = ratio(timing, timings[ours])
                self.add(
                    f"{name}/ratio", medians, f"{timing.words()} over {timings[ours].words()}; minima {minima:.2f}"
                )


@contextlib.contextmanager
def settled(variants: Mapping[str, Callable[[], object]] | None = None) -> Iterator[Callable[[str], None]]:
    """For `measure`'s `before`: ours keep freed memory as in training, the others leave it to the C library.

    After a change the next of `variants` runs once untimed.
    """
    held, kept = contextlib.ExitStack(), False

    def settle(label: str) -> None:
        nonlocal kept
        if label.startswith("ours") == kept:
            return
        kept = not kept
        held.enter_context(memory.kept()) if kept else held.close()
        if variants is not None:
            variants[label]()

    with held:
        yield settle


# ---- training steps -------------------------------------------------------------------------------------------------


def step_work(name: str):
    """The sizes of a step; their module is imported late, since it imports torch's compiler and timm."""
    from step_peers import StepWork

    small = StepWork(("dino",), "vit_small_patch16_224", 16, 224, 4, num_local=8, local=96, prototypes=65536)
    return {
        "dino_vits16": small,
        "dino_vitti8": StepWork(("dino",), "vit_tiny_patch16_224", 8, 64, 32, num_local=6, local=32),
        "mae_vits16": StepWork(("mae",), "vit_small_patch16_224", 16, 224, 16),
        "joint_vits16": replace(small, objectives=("dino", "mae")),
        "gpu_training_vits16": replace(small, batch=128),
        "gpu_step_vitb16": replace(small, encoder="vit_base_patch16_224", batch=64),
    }[name]


def steps(name: str, context: Context) -> Found:
    """One training step: ours in bf16 beside the peers, in fp32 and under autocast, after their losses agreed.

    On a GPU ours is compiled, as it trains there, and only the published step stands beside it.
    """
    device = "cuda" if name.startswith("gpu") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return Found([], {name: NO_GPU})
    from step_peers import build, flops, parity, shrunk

    work = shrunk(step_work(name)) if context.quick else step_work(name)
    built = build(work, device=device)
    losses = parity(built, 2 if "mae" in work.objectives else 3)
    print("   losses in fp32:", "; ".join(f"{k} {' '.join(f'{x:.6f}' for x in v)}" for k, v in losses.items()))
    needed, bf16 = flops(built), context.bf16 or device == "cuda"
    variants, precisions = _variants(built, bf16, context.compiled)
    clock, peaks, side = own_clock(), {}, 1024 if device == "cpu" else 8192
    for precision in set(precisions.values()):
        peaks[precision] = Probe(side, clock, getattr(torch, precision), device)  # the best seen between steps
    judge = Probe(768 if device == "cpu" else 4096, clock, device=device)
    with settled(variants) as settle:

        def before(label: str) -> None:
            settle(label)
            for peak in peaks.values():
                peak()

        timings = measure(variants, seconds=context.seconds, probe=judge, clock=clock, before=before)
    rows = Rows(name, work.words())
    rows.timings(timings)
    for label, timing in timings.items():
        best = _peak(peaks[precisions[label]], device, precisions[label])
        words = f"{needed / 1e9:.1f} GFLOP a step, peak in {precisions[label]} {best / 1e9:.0f} GFLOP/s"
        rows.add(f"{label}/utilisation", needed / timing.median / best, words)
    if device == "cuda":
        _memory(rows, variants)
    return Found(rows.rows, built.missing)


def _variants(built, bf16: bool, compiled: bool) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Each step on its batch, and the precision it computes in. `compiled` adds our step through torch.compile."""
    batch, precisions = built.batch, {"ours": "bfloat16" if bf16 else "float32"}
    on_gpu = batch.device.type == "cuda"
    ours = _compiled(built) if on_gpu else built.steps["ours"]
    variants: dict[str, Callable[[], object]] = {"ours": lambda: ours(batch, bf16)}

    def add(label: str, step: Callable, bf16: bool) -> None:
        variants[label] = lambda: step(batch, bf16)
        precisions[label] = "bfloat16" if bf16 else "float32"

    for peer in [peer for peer in built.steps if peer != "ours"]:
        if not on_gpu:
            add(peer, built.steps[peer], False)
        if bf16:
            add(f"{peer}_autocast", built.steps[peer], True)
    if bf16 and not on_gpu:
        add("ours_fp32", built.steps["ours"], False)
    if on_gpu:
        add("ours_eager", built.steps["ours"], True)
    elif compiled:
        add("ours_compiled", _compiled(built), bf16)
    return {label: lambda run=run: _finished(run, on_gpu) for label, run in variants.items()}, precisions


def _finished(run: Callable[[], object], on_gpu: bool) -> None:
    run()
    if on_gpu:
        torch.cuda.synchronize()


def _compiled(built) -> Callable:
    """Our step with compiled blocks, the weights shared with the other variants of ours."""
    ours = built.steps["ours"].__self__

    def step(batch, bf16: bool) -> float:
        ours.module.compile_blocks(compiles(batch.device) or batch.device.type == "cpu")
        try:
            return ours.step(batch, bf16)
        finally:
            ours.module.compile_blocks(False)

    return step


def _peak(probe: Probe, device: str, precision: str) -> float:
    """FLOPs a second: the best a matrix product reached between the steps; of a GPU in bf16 its data sheet's."""
    return peak_flops("cuda:0", "bf16") if device == "cuda" and precision == "bfloat16" else probe.best


def _memory(rows: Rows, variants: dict[str, Callable[[], object]]) -> None:
    """MB that a step on a GPU takes at its peak above weights, moments and batch, and ours as a share of theirs."""
    taken = {}
    for label, run in variants.items():
        run()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        taken[label] = (torch.cuda.max_memory_allocated() - held) / 1e6
        rows.add(f"{label}/memory_mb", taken[label], "of a step at its peak, above weights, moments and batch")
    rows.add("official_autocast/memory_share", taken["ours"] / taken["official_autocast"], "ours over theirs")


def joint(name: str, context: Context) -> Found:
    """Our joint step beside our DINO step: what MAE on one view adds."""
    from step_peers import STEP, OurStep, as_views, make_batch, our_module, shrunk

    work = shrunk(step_work(name)) if context.quick else step_work(name)
    batch, made = make_batch(work), {}
    for label, objectives in (("ours", ("dino", "mae")), ("ours_dino", ("dino",))):
        torch.manual_seed(0)
        alone = replace(work, objectives=objectives)
        made[label] = OurStep(our_module(alone), alone)
    with torch.no_grad():
        shared = [made[label].module(as_views(batch), STEP)[1]["dino/loss"].item() for label in made]
    if abs(shared[0] - shared[1]) > 1e-5 * shared[1]:
        raise ValueError(f"DINO's loss is {shared[0]} in the joint step and {shared[1]} alone")
    for one in made.values():
        one.module.discard()
    variants = {label: lambda one=one: one.step(batch, context.bf16) for label, one in made.items()}
    with memory.kept():
        timings = measure(variants, seconds=context.seconds, clock=own_clock())
    rows = Rows(name, work.words())
    rows.timings(timings)
    cost, minima = ratio(timings["ours"], timings["ours_dino"])
    rows.add("ours_dino/cost", cost, f"our joint step over our DINO step; minima {minima:.2f}")
    return Found(rows.rows, {})


# ---- data and whole runs --------------------------------------------------------------------------------------------


def views(name: str, context: Context) -> Found:
    """Decode and views on one core: the workers' share alone (geometry), or with our CPU path of colour (full)."""
    from data import JPEG_CROPS, Jpegs, variants

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        source, batch = Jpegs(8 if context.quick else 32), 4 if context.quick else 8
        made = variants(source, JPEG_CROPS, 224, batch)
        chosen = {"ours": made[name.removeprefix("views_")]}
        chosen |= {"official": made["dino_pillow"], "torchvision_v2": made["torchvision_v2"]}
        clock = time.process_time
        timings = measure(chosen, seconds=context.seconds, probe=Probe(512, clock), clock=clock)
        rows = Rows(name, f"2 x 224 + 8 x 96 views of {source.spec}, batch {batch}, processor time")
        rows.timings(timings)
    finally:
        torch.set_num_threads(threads)
    return Found(rows.rows, {})


def training(name: str, context: Context) -> Found:
    """Images a second of whole training from JPEG files; on a GPU with every core to load."""
    from training_peers import runs, write_jpegs

    on_gpu = name.startswith("gpu")
    if on_gpu and not torch.cuda.is_available():
        return Found([], {name: NO_GPU})
    work, count, num_steps = (step_work(name), 4096, 30) if on_gpu else (step_work("dino_vitti8"), 1024, 8)
    workers = usable_cores() if on_gpu else torch.get_num_threads()
    if context.quick:
        work, count, num_steps = replace(work, batch=8, depth=2, prototypes=1024), 64, 2
    folder = write_jpegs(context.folder / "jpegs", count)
    made = runs(work, folder, num_steps, workers, "cuda" if on_gpu else "cpu")

    with settled() as settle:

        def start(variant: str) -> None:
            for other in made.values():
                other.stop()
            settle(variant)
            made[variant].start()

        timings = measure(made, seconds=context.seconds, before=start)
    for one in made.values():
        one.stop()
    rows = Rows(name, f"{work.words()}, from {count} JPEG files of 500 x 375, {workers} workers, {num_steps} steps")
    rows.timings(timings)
    for label, timing in timings.items():
        rows.add(f"{label}/images_per_second", num_steps * work.batch / timing.median, timing.words())
    return Found(rows.rows, {})


def growth(name: str, context: Context) -> Found:
    """Curves: the loader by listed files, a step by batch, crops and prototypes."""
    from growth import exponent, listing, plot, step_times

    counts = [1000, 20_000] if context.quick else [10_000, 100_000, 1_000_000]
    base = step_work("dino_vitti8")
    base = replace(base, batch=2, depth=2, hidden=256, prototypes=1024) if context.quick else replace(base, batch=16)
    with _cache_in(context.folder / "cache"):
        curves = listing(context.folder, counts, context.seconds / 2)
    curves |= step_times(base, context.seconds, context.bf16, context.quick)
    rows = Rows(name, f"{base.words()}; listings of {', '.join(f'{n:,}' for n in counts)} files")
    for curve, (sizes, values) in curves.items():
        told = ", ".join(f"{size:g}: {value:.4g}" for size, value in zip(sizes, values, strict=True))
        rows.add(f"{curve}/exponent", exponent((sizes, values)), told)
    sizes, rates = curves["images_per_second"]
    rows.add("images_per_second/ratio", rates[-1] / rates[0], f"at {sizes[-1]:,.0f} listed files over {sizes[0]:,.0f}")
    rows.add("reopening/seconds", curves["reopening"][1][-1], f"of a kept index of {sizes[-1]:,.0f} files")
    skipped = {}
    if context.plot is not None and not plot(curves, context.plot):
        skipped["plot"] = "matplotlib is not installed; pip install 'sslvit[report]'"
    return Found(rows.rows, skipped)


class _cache_in:
    """Indices are kept in a folder of the benchmark's own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, os.environ.get("SSLVIT_CACHE")

    def __enter__(self) -> None:
        os.environ["SSLVIT_CACHE"] = str(self.folder)

    def __exit__(self, *_: object) -> None:
        os.environ.pop("SSLVIT_CACHE")
        if self.before is not None:
            os.environ["SSLVIT_CACHE"] = self.before


# ---- evaluation and start-up ----------------------------------------------------------------------------------------


def features(name: str, context: Context) -> Found:
    """Class tokens of a batch of images."""
    from probe_peers import feature_ways

    encoder, batch = ("vit_tiny_patch16_224", 2) if context.quick else ("vit_small_patch16_224", 16)
    ways = feature_ways(encoder, batch, context.bf16)
    reference = ways["timm"]()
    for label, run in ways.items():
        apart = (run() - reference).norm() / reference.norm()
        if not apart < 0.02:
            raise ValueError(f"features of {label} differ by {apart:.3f} from timm's in fp32")
    rows = Rows(name, f"{encoder}, batch {batch}, 224 px, last block, class token")
    with settled(ways) as settle:
        rows.timings(measure(ways, seconds=context.seconds, clock=own_clock(), before=settle))
    return Found(rows.rows, {})


def neighbours(name: str, context: Context) -> Found:
    """k-NN: time, answers, and memory at the peak above the features."""
    from probe_peers import knn_memory, knn_ways

    size, queries = (5000, 500) if context.quick else (50_000, 10_000)
    ways = knn_ways(size, queries)
    answers = {label: run() for label, run in ways.items()}
    rows = Rows(name, f"{size:,} x 384 features, {queries:,} queries, 1000 classes")
    rows.timings(measure(ways, seconds=context.seconds, clock=own_clock()))
    for label, found in answers.items():
        if label != "ours":
            rows.add(f"{label}/agreement", float((found == answers["ours"]).mean()), "share of equal answers at k = 20")
    for label, way in (("ours", "ours"), ("official", "torch")):
        megabytes = knn_memory(way, size, queries)
        rows.add(
            f"{label}/memory_mb", megabytes, "peak of a process of its own above the features, faiss or torch in it"
        )
    skipped = {} if "sklearn" in ways else {"sklearn": "scikit-learn is not installed; pip install 'sslvit[bench]'"}
    return Found(rows.rows, skipped)


def heads(name: str, context: Context) -> Found:
    """52 linear heads at once beside one by one. With many classes both do little but the same matrix products."""
    from probe_peers import LinearHeads

    images, num_steps = (1000, 4) if context.quick else (20_000, 100)
    classes = 100 if name.endswith("100_classes") else 10
    made = LinearHeads(images, num_steps, classes)
    for i, (a, b) in enumerate(zip(made.together(), made.one_by_one(), strict=True)):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4):
            raise ValueError(f"head {i} differs by {(a - b).abs().max():.2g} from the one trained alone")
    rows = Rows(
        name, f"{made.num_heads} heads, {num_steps} steps of 128 of {images:,} x 384 features, {classes} classes"
    )
    variants = {"ours": made.together, "one_by_one": made.one_by_one}
    rows.timings(measure(variants, seconds=context.seconds, clock=own_clock()))
    return Found(rows.rows, {})


def start_up(name: str, context: Context) -> Found:
    """`sslvit --help` beside importing what it stands on."""
    stack = "import torch, torchvision, timm, faiss, omegaconf, xformers.ops"
    commands = {
        "ours": [sys.executable, "-m", "sslvit", "--help"],
        "stack": [sys.executable, "-W", "ignore", "-c", stack],
        "torch": [sys.executable, "-c", "import torch"],
    }

    def run(words: Sequence[str]) -> None:
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    try:
        run(commands["stack"])
    except subprocess.CalledProcessError:  # xformers is absent, or built for another torch
        commands["stack"][-1] = stack.removesuffix(", xformers.ops")
    variants = {label: lambda words=words: run(words) for label, words in commands.items()}
    rows = Rows(name, f"whole processes; stack: {commands['stack'][-1]}")
    clock = children_clock if torch.get_num_threads() == 1 else time.perf_counter
    rows.timings(measure(variants, seconds=context.seconds, probe=Probe(clock=own_clock()), clock=clock))
    return Found(rows.rows, {})


WORKS: dict[str, Callable[[str, Context], Found]] = {
    "dino_vits16": steps,
    "dino_vitti8": steps,
    "mae_vits16": steps,
    "joint_vits16": joint,
    "features": features,
    "views_geometry": views,
    "views_full": views,
    "training": training,
    "knn": neighbours,
    "probe": heads,
    "probe_100_classes": heads,
    "help": start_up,
    "growth": growth,
    "gpu_training_vits16": training,
    "gpu_step_vitb16": steps,
}


# ---- the command line -----------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parse(arguments)
    rows: list[dict] = []
    failed = False
    for name in options.works:
        try:
            rows += run(name, options)
        except ValueError as error:  # variants that do not compute the same are not compared in time
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
        if rows:
            store(rows, markdown(rows), options.json)
    if rows:
        print(f"\n{markdown(rows)}")
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--quick", action="store_true", help="shrunken works, seconds each: a trial of everything")
    parser.add_argument("--compiled", action="store_true", help="our steps through torch.compile as well; minutes more")
    parser.add_argument("--minutes", type=float, help="at most, of each work; default 3, 0.1 with --quick")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="all rows, in the form of results.json; table and plot beside"
    )
    parser.add_argument("--output-dir", type=Path, metavar="OUT", default=Path("runs/benchmark-vs-peers"))
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or (0.1 if options.quick else 3.0)
    return options


def run(name: str, options: argparse.Namespace) -> list[dict]:
    """The rows of a work: measured now, or those of the finished cell."""
    cell = options.output_dir / "cells" / f"{name}.json"
    settings = {key: getattr(options, key) for key in ("quick", "compiled", "minutes")}
    settings |= {"machine": machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if cell.exists() and (kept := json.loads(cell.read_text()))["settings"] == settings:
        return kept["rows"]
    print(f"== {name}", flush=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    plot = options.json.with_name(f"{options.json.stem}_growth.png") if options.json else None
    context = Context(
        options.quick, 60 * options.minutes, options.compiled, native_bf16("cpu"), options.output_dir, plot
    )
    found = WORKS[name](name, context)
    for what, why in found.skipped.items():
        print(f"   skipped: {what}: {why}", flush=True)
    if found.rows:
        cell.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cell, json.dumps({"settings": settings, "rows": found.rows}, indent=1) + "\n")
    return found.rows


def markdown(rows: list[dict]) -> str:
    """Ratios with their goals, then medians, ranges and utilisation."""
    names = [entry["name"].removeprefix("vs_peers/") for entry in rows]
    values = dict(zip(names, (entry["value"] for entry in rows), strict=True))
    how = dict(zip(names, (entry["protocol"] for entry in rows), strict=True))
    lines = ["| work | beside | ratio | at least | aim | |", "|---|---|---|---|---|---|"]
    for name in names:
        work, peer, kind = name.rsplit("/", 2)
        if kind in ("ratio", *LOWER_IS_BETTER) or name in GOALS:
            least, aim = GOALS.get(name, ("", ""))
            lower = ", lower is better" if kind in LOWER_IS_BETTER else ""
            what = [WORDS.get(f"{work}/{peer}", ""), "" if kind == "ratio" else f"{kind}{lower}"]
            label = peer + "".join(f" ({words})" for words in what if words)
            lines.append(
                f"| {work} | {label} | {values[name]:.2f} | {least} | {aim} | {_verdict(name, values[name])} |"
            )
    lines += ["", "| work | variant | seconds | utilisation | |", "|---|---|---|---|---|"]
    for name in names:
        work, variant, kind = name.rsplit("/", 2)
        if kind == "seconds":
            share = values.get(f"{work}/{variant}/utilisation")
            told = "" if share is None else f"{share:.0%}"
            lines.append(f"| {work} | {variant} | {values[name]:.4g} | {told} | {_spread(how[name])} |")
    return "\n".join(lines)


def _verdict(name: str, value: float) -> str:
    if name not in GOALS:
        return ""
    least, aim = GOALS[name]
    if name.endswith(LOWER_IS_BETTER):
        value, least, aim = -value, -least, -aim
    return "aim reached" if value >= aim else "reached" if value >= least else "**not reached**"


def _spread(protocol: str) -> str:
    """`median of 7 of 12, 1.2 s to 1.4 s` out of a protocol."""
    return next((part.strip() for part in protocol.split(";") if part.strip().startswith("median of")), "")


if __name__ == "__main__":
    sys.exit(main())
