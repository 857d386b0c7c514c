"""Which attention kernel is fastest where, and whether sslvit's rule chooses it.

    python benchmarks/attention.py [--device cpu|cuda] [--quick] [--json FILE] [--output-dir OUT]

Cases are groups of sequences as training meets them: DINO's global and local crops of a ViT-S/16 together, one size
alone, MAE's decoder, longer images. Kernels: `explicit` (softmax(q k^T) v written out), `sdpa` (torch's fused kernel, a
call for each size), and where the device has them `varlen` and `xformers` (one call for all sizes). Each runs the whole
attention layer, forward alone and with the backward pass, in fp32 and bf16; what they compute is compared first.
`packed` is a whole ViT block on all crops in one stream, `separate` one call for each size.

Rows: `attention/DEVICE/TYPE/CASE/{forward,training}/KERNEL/ms`, and `.../chosen/ratio`: the fastest kernel's time over
that of the kernel sslvit chooses there, 1 is best. OUT/cells keeps finished cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rounds import Timing, measure
from stored import store
from timm.models.vision_transformer import Attention, Block
from torch import Tensor

from sslvit.encoder import attention
from sslvit.encoder.vit import forward_block
from sslvit.probes.rows import describe, row
from sslvit.run_folder import write_atomically

Shapes = list[tuple[int, int]]
#: Width, heads, and (sequences, tokens) of each group.
CASES: dict[str, tuple[int, int, Shapes]] = {
    "dino_vits16": (384, 6, [(8, 197), (32, 37)]),
    "dino_vitti8": (192, 3, [(64, 65), (192, 17)]),
    "global_197": (384, 6, [(16, 197)]),
    "local_37": (384, 6, [(64, 37)]),
    "mae_decoder_197": (256, 8, [(16, 197)]),
    "image_448": (384, 6, [(4, 785)]),
    "image_896": (384, 6, [(1, 3137)]),
}
QUICK = {"dino_vitti8": (48, 3, [(4, 65), (8, 17)]), "global_197": (48, 3, [(2, 197)])}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALIKE = {"fp32": 1e-4, "bf16": 3e-2}  # largest difference between kernels, of values of about 1


@dataclass(frozen=True)
class Case:
    """One case in one type on one device."""

    name: str
    width: int
    heads: int
    shapes: Shapes
    type: str
    device: str

    def layer(self) -> Attention:
        torch.manual_seed(0)
        return Attention(self.width, self.heads, qkv_bias=True).to(self.device, TYPES[self.type])

    def stream(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        tokens = sum(batch * length for batch, length in self.shapes)
        return torch.randn(tokens, self.width, generator=generator).to(self.device, TYPES[self.type])


def kernels(device: str, dtype: str) -> dict[str, Callable[[Attention, Tensor, Shapes], Tensor]]:
    """Those the device has; `chosen` is sslvit's own rule."""
    found = {
        "explicit": lambda layer, x, shapes: _forced(True, layer, x, shapes),
        "sdpa": lambda layer, x, shapes: _forced(False, layer, x, shapes),
    }
    if device != "cpu" and dtype == "bf16":
        for name, module in (("varlen", "torch.nn.attention.varlen"), ("xformers", "xformers")):
            if importlib.util.find_spec(module) is not None:
                found[name] = lambda layer, x, shapes, name=name: attention.self_attention(layer, x, shapes, name)
    return found


def _forced(explicit: bool, layer: Attention, x: Tensor, shapes: Shapes) -> Tensor:
    """Grouped attention with the rule replaced by an answer."""
    rule = attention.prefers_explicit
    attention.prefers_explicit = lambda query, key: explicit
    try:
        return attention.self_attention(layer, x, shapes)
    finally:
        attention.prefers_explicit = rule


def chosen(case: Case, training: bool) -> str:
    """The kernel that sslvit takes there."""
    longest = max(length for _, length in case.shapes)
    query = torch.zeros(1, 1, longest, 8, dtype=TYPES[case.type], device=case.device, requires_grad=training)
    with torch.set_grad_enabled(training):
        return "explicit" if attention.prefers_explicit(query, query) else "sdpa"


def run(case: Case, seconds: float) -> list[dict]:
    """Rows of a case."""
    rows = []
    found = kernels(case.device, case.type)
    check_alike(case, found)
    for training in (False, True):
        layer, x = case.layer(), case.stream().requires_grad_(training)
        variants = {name: _pass(kernel, layer, x, case, training) for name, kernel in found.items()}
        timings = measure(variants, seconds=seconds)
        rows += _rows(case, "training" if training else "forward", timings, chosen(case, training))
    if len(case.shapes) > 1:
        timings = measure(packed_and_separate(case), seconds=seconds)
        rows += _rows(case, "block", timings, "packed")
    return rows


def _pass(kernel: Callable, layer: Attention, x: Tensor, case: Case, training: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(training):
            out = kernel(layer, x, case.shapes)
            if training:
                out.sum().backward()
        if case.device != "cpu":
            torch.cuda.synchronize()

    return run


def check_alike(case: Case, found: dict[str, Callable]) -> None:
    """ValueError when a kernel computes something else."""
    layer, x = case.layer(), case.stream()
    with torch.no_grad():
        results = {name: kernel(layer, x, case.shapes).float() for name, kernel in found.items()}
    reference = results["sdpa"]
    for name, result in results.items():
        apart = (result - reference).abs().max().item() / reference.abs().max().item()
        if not apart <= ALIKE[case.type]:
            raise ValueError(f"{case.name} in {case.type}: {name} differs from sdpa by {apart:.2g}")


def packed_and_separate(case: Case) -> dict[str, Callable[[], None]]:
    """A block with the backward pass: all crops in one stream of linears, or size by size."""
    torch.manual_seed(0)
    block = Block(case.width, case.heads, qkv_bias=True).to(case.device, TYPES[case.type])
    stream = case.stream()
    groups = stream.split([batch * length for batch, length in case.shapes])
    parts = [group.unflatten(0, shape) for group, shape in zip(groups, case.shapes, strict=True)]

    def packed() -> None:
        x = stream + attention.self_attention(block.attn, block.norm1(stream), case.shapes)
        (x + block.mlp(block.norm2(x))).sum().backward()

    def separate() -> None:
        sum(forward_block(block, part).sum() for part in parts).backward()

    return {"packed": packed, "separate": separate}


def _rows(case: Case, kind: str, timings: dict[str, Timing], ours: str) -> list[dict]:
    groups = " + ".join(f"{batch} x {length}" for batch, length in case.shapes)
    words = f"{groups} tokens, width {case.width}, {case.heads} heads"
    prefix = f"attention/{case.device}/{case.type}/{case.name}/{kind}"

    def made(name: str, value: float, how: str) -> dict:
        protocol = describe(f"{words}; {how}", "", threads=torch.get_num_threads(), torch=torch.__version__)
        return row(f"{prefix}/{name}", value, ci95=None, protocol=protocol, data="", seed=0)

    fastest = min(timings, key=lambda name: timings[name].median)
    rows = [made(f"{name}/ms", 1000 * timing.median, timing.words()) for name, timing in timings.items()]
    share = timings[fastest].median / timings[ours].median
    return [*rows, made("chosen/ratio", share, f"{ours} is chosen, {fastest} is fastest")]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two small cases, a second each")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="all rows, in the form of results.json; the table beside"
    )
    parser.add_argument("--output-dir", type=Path, metavar="OUT", default=Path("runs/benchmark-attention"))
    options = parser.parse_args(arguments)
    seconds, cases = (0.5, QUICK) if options.quick else (20.0, CASES)
    rows: list[dict] = []
    for name, (width, heads, shapes) in cases.items():
        for dtype in TYPES:
            rows += _finished_or_run(Case(name, width, heads, shapes, dtype, options.device), seconds, options)
    print(f"\n{markdown(rows)}")
    store(rows, markdown(rows), options.json)
    return 0


def _finished_or_run(case: Case, seconds: float, options: argparse.Namespace) -> list[dict]:
    cell = options.output_dir / "cells" / f"{case.device}-{case.type}-{case.name}.json"
    settings = {"quick": options.quick, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if cell.exists() and (kept := json.loads(cell.read_text()))["settings"] == settings:
        return kept["rows"]
    print(f"== {case.name}, {case.type}", flush=True)
    rows = run(case, seconds)
    cell.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cell, json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    return rows


def markdown(rows: list[dict]) -> str:
    """A line for each case and pass: milliseconds of each kernel, and how near the chosen one is to the fastest."""
    table: dict[str, dict[str, float]] = {}
    for entry in rows:
        place, kernel, _ = entry["name"].removeprefix("attention/").rsplit("/", 2)
        table.setdefault(place, {})[kernel] = entry["value"]
    kinds = [kernel for kernel in dict.fromkeys(k for cells in table.values() for k in cells) if kernel != "chosen"]
    lines = [f"| case | {' | '.join(kinds)} | chosen |", "|---" * (len(kinds) + 2) + "|"]
    for place, cells in table.items():
        told = [f"{cells[kernel]:.2f}" if kernel in cells else "" for kernel in kinds]
        lines.append(f"| {place} | {' | '.join(told)} | {cells['chosen']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
