"""Is an exported folder the encoder it was made from? Reopened in a fresh process by its library, and compared.

Outputs on random images (native size, and another where the format is exact at any size), every weight bit for bit, no
weight missing, mean and std as the library would apply them. What differs is an error that says where.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslvit.encoder.config import Preprocessing
from sslvit.encoder.layouts import fold_class_position, fold_layer_scale, num_prefix_positions
from sslvit.encoder.vit import Encoder, patch_size
from sslvit.encoder.weights import LoadedEncoder, load_encoder
from sslvit.errors import InputError

EXTRAS = {"transformers": "vlm", "open_clip": "openclip", "onnxruntime": "onnx"}
TOLERANCE, TOLERANCE_ONNX = 1e-5, 1e-4
TIMEOUT = 900  # seconds for all folders one library opens

Opened = tuple[dict[str, Tensor], dict[str, Any]]  # what a library computed, and what it says about itself


class VerificationError(RuntimeError):
    """An exported folder is not the encoder it was made from. One line: which, where, by how much."""


@dataclass(frozen=True)
class Check:
    """One folder for one library. `any_size`: compared at another than the native size too."""

    folder: Path
    library: str
    any_size: bool = True
    tolerance: float = TOLERANCE
    reimport: bool = True  # our own loader must get the same bits back


def verify(loaded: LoadedEncoder, checks: Sequence[Check]) -> list[dict[str, Any]]:
    """One report per check: library, version, and the maximum difference per image size. VerificationError otherwise.

    A library that is not installed is reported as skipped. Each library has one fresh process for all of its checks.
    """
    inputs = make_inputs(loaded)
    opened: dict[Check, Opened] = {}
    for library in dict.fromkeys(check.library for check in checks):
        group = [check for check in checks if check.library == library]
        if is_installed(library):
            opened |= zip(group, reopened([(inputs, group)])[0], strict=True)
    reports = []
    for check in checks:
        if check.reimport:
            _compare_weights(loaded, check)
        if check in opened:
            reports.append(compare(loaded, inputs, check, *opened[check]))
        else:
            reports.append({"library": check.library, "skipped": f"needs sslvit[{EXTRAS[check.library]}]"})
    return reports


def is_installed(library: str) -> bool:
    """Whether a check by this library can run here."""
    return library not in EXTRAS or importlib.util.find_spec(library) is not None


def make_inputs(loaded: LoadedEncoder) -> dict[str, Tensor]:
    """Random images at the native and another, non-square size, and a plain uint8 picture (H, W, C) for transforms."""
    generator = torch.Generator().manual_seed(0)
    (rows, columns), (height, width) = loaded.module.patch_embed.grid_size, patch_size(loaded.module)
    channels, size = loaded.preprocessing.channels, loaded.preprocessing.image_size
    inputs = {}
    for h, w in ((rows * height, columns * width), ((rows + 1) * height, (columns + 2) * width)):
        inputs[f"{h}x{w}"] = torch.randn(2, channels, h, w, generator=generator)
    colours = torch.tensor([37 * (i + 1) % 256 for i in range(channels)], dtype=torch.uint8)
    inputs["picture"] = colours.expand(2 * size, 2 * size, channels).contiguous()
    return inputs


def reopened(
    groups: Sequence[tuple[Mapping[str, Tensor], Sequence[Check]]], python: str = sys.executable
) -> list[list[Opened]]:
    """Outputs and facts of each group's checks, all of one library, from one fresh process of `python`.

    A group is an encoder's inputs with the folders that were made of it. The process sees no network.
    """
    with tempfile.TemporaryDirectory() as work:
        jobs: list[dict[str, Any]] = []
        for number, (inputs, checks) in enumerate(groups):
            native, other, _ = inputs
            save_file(dict(inputs), f"{work}/{number}.inputs.safetensors")
            entries = [
                {
                    "folder": str(check.folder),
                    "library": check.library,
                    "sizes": [native, other] if check.any_size else [native],
                    "output": f"{work}/{number}.{index}",
                }
                for index, check in enumerate(checks)
            ]
            jobs.append({"inputs": f"{work}/{number}.inputs.safetensors", "checks": entries})
        job = Path(work) / "job.json"
        job.write_text(json.dumps(jobs))
        _run_process(job, python)
        return [[_opened(Path(entry["output"])) for entry in job["checks"]] for job in jobs]


def _opened(output: Path) -> Opened:
    facts = json.loads(output.with_name(output.name + ".json").read_text())
    return load_file(output.with_name(output.name + ".safetensors")), facts


def _run_process(job: Path, python: str = sys.executable) -> None:
    roots = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    command = [python, "-P", "-m", "sslvit.exports.reopen", str(job)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.strip().splitlines() if line.strip()] or ["no message"]
        raise VerificationError(f"an exported folder cannot be opened by its library: {lines[-1].strip()}")


def compare(
    loaded: LoadedEncoder,
    inputs: Mapping[str, Tensor],
    check: Check,
    outputs: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The report of one check; VerificationError where anything is off."""
    if "error" in facts:
        raise VerificationError(f"{check.folder.name} cannot be opened by {check.library}: {facts['error']}")
    where = f"{check.folder.name} in {check.library} {facts['version']}"
    if facts["wrong_keys"]:
        raise VerificationError(f"{where}: weights missing or left over: {', '.join(facts['wrong_keys'][:4])}")
    _compare_preprocessing(loaded.preprocessing, inputs["picture"], outputs, facts, where)
    differences: dict[str, float] = {}
    for name, theirs in outputs.items():
        what, _, size = name.partition("/")
        if what == "pixels":
            continue
        ours = _reference(loaded.module, inputs[size], what)
        if ours.shape != theirs.shape:
            raise VerificationError(f"{where}: {what} have shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
        difference = (ours - theirs).abs().max().item()
        if not difference < check.tolerance:
            raise VerificationError(
                f"{where}: {what} differ by {difference:.3g} at {size}, allowed is {check.tolerance:g}"
            )
        differences[size] = max(differences.get(size, 0.0), difference)
    return {"library": check.library, "version": facts["version"], "max_difference": differences}


@torch.no_grad()
def _reference(encoder: Encoder, images: Tensor, what: str) -> Tensor:
    """What timm's own forward makes of the encoder in memory: tokens (B, P + N, D) or the pooled feature (B, D)."""
    tokens = encoder.forward_features(images)
    return tokens if what == "tokens" else encoder.forward_head(tokens, pre_logits=True)


def _compare_preprocessing(
    preprocessing: Preprocessing, picture: Tensor, outputs: Mapping[str, Tensor], facts: Mapping[str, Any], where: str
) -> None:
    """Hold mean and std against what the library read, and against what its transform does to a plain picture."""
    for name in ("mean", "std"):
        ours, theirs = getattr(preprocessing, name), facts[name]
        if len(ours) != len(theirs) or any(abs(a - b) > 1e-7 for a, b in zip(ours, theirs, strict=True)):
            raise VerificationError(f"{where}: normalises with {name} {theirs}, not {list(ours)}")
    if "pixels" not in outputs:
        return
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    expected = ((picture[0, 0].float() / 255 - mean) / std)[:, None, None]
    height, width = preprocessing.size
    if tuple(outputs["pixels"].shape[-2:]) != (height, width):
        raise VerificationError(
            f"{where}: its transform makes {tuple(outputs['pixels'].shape)} of a picture, not {height}x{width}"
        )
    difference = (outputs["pixels"] - expected).abs().max().item()
    if not difference < TOLERANCE:
        raise VerificationError(f"{where}: its transform gives pixels that differ by {difference:.3g}")


def _compare_weights(loaded: LoadedEncoder, check: Check) -> None:
    """Every weight bit for bit, after both sides are brought to the form without LayerScale and class position."""
    try:
        again = load_encoder(str(check.folder))
    except InputError as error:
        raise VerificationError(f"{check.folder.name}: {error}") from error
    ours, theirs = _canonical(loaded.module), _canonical(again.module)
    if strange := sorted(set(ours) ^ set(theirs)):
        raise VerificationError(f"{check.folder.name}: weights missing or left over: {', '.join(strange[:4])}")
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name]):
            raise VerificationError(f"{check.folder.name}: {name} is not bit for bit what was exported")
    if again.preprocessing != loaded.preprocessing:
        raise VerificationError(f"{check.folder.name}: states {again.preprocessing}, not {loaded.preprocessing}")


def _canonical(encoder: Encoder) -> dict[str, Tensor]:
    state = {name: tensor.detach().cpu().float() for name, tensor in encoder.state_dict().items()}
    state = fold_layer_scale(state)
    if "pos_embed" in state and "cls_token" in state:
        count = num_prefix_positions(state, encoder.patch_embed.grid_size)
        state = fold_class_position(state, count) if count else state
    return state
