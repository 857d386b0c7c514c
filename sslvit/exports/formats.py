"""All export formats in one table, and the one way they are written: aside, verified, then moved into place.

Nothing is left behind when a folder is not exactly the encoder it was made from.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sslvit.encoder.weights import LoadedEncoder
from sslvit.errors import InputError
from sslvit.exports.card import model_card
from sslvit.exports.files import write_json
from sslvit.exports.hf_folder import ANY_SIZE, check_hf, hf_class, write_hf_folder
from sslvit.exports.onnx import check_onnx, write_onnx
from sslvit.exports.open_clip import check_open_clip, point_to_tower, write_open_clip_folder
from sslvit.exports.processor import image_processor_config
from sslvit.exports.safetensors_file import check_safetensors, write_safetensors
from sslvit.exports.siglip_folder import check_siglip, write_siglip_folder
from sslvit.exports.timm_folder import check_timm, write_timm_folder
from sslvit.exports.verify import EXTRAS, TOLERANCE_ONNX, Check, is_installed, verify
from sslvit.run_folder import process_start

WORK = ".export-"  # and the process that works in it
Reports = dict[str, list[dict[str, Any]]]  # format -> one report per library


@dataclass(frozen=True)
class Format:
    """`check` raises InputError where the format is not exact; `write` fills an empty folder; `libraries` verify it."""

    check: Callable[[LoadedEncoder], None]
    write: Callable[[LoadedEncoder, Path], None]
    libraries: tuple[str, ...]


FORMATS: dict[str, Format] = {
    "timm": Format(check_timm, write_timm_folder, ("timm", "transformers")),
    "hf": Format(check_hf, write_hf_folder, ("transformers",)),
    "siglip": Format(check_siglip, write_siglip_folder, ("transformers",)),
    "open_clip": Format(check_open_clip, write_open_clip_folder, ("open_clip",)),
    "onnx": Format(check_onnx, write_onnx, ("onnxruntime",)),
    "safetensors": Format(check_safetensors, write_safetensors, ("safetensors",)),
}


def check_formats(loaded: LoadedEncoder, formats: Mapping[str, Path]) -> None:
    """InputError for the first format that is unknown, not exact for this encoder, or that nothing here can verify."""
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"unknown format {name!r}; choose from {', '.join(FORMATS)} or all")
        FORMATS[name].check(loaded)
        needed = FORMATS[name].libraries[0]
        if not is_installed(needed):
            raise InputError(
                f"format {name} cannot be verified, {needed} is not installed; pip install 'sslvit[{EXTRAS[needed]}]'"
            )


def possible_formats(loaded: LoadedEncoder) -> tuple[list[str], dict[str, str]]:
    """(formats that are exact for this encoder and can be verified here, the others with the reason)."""
    possible, refused = [], {}
    for name in FORMATS:
        try:
            check_formats(loaded, {name: Path()})
            possible.append(name)
        except InputError as error:
            refused[name] = str(error)
    return possible, refused


def write_formats(loaded: LoadedEncoder, places: Mapping[str, Path], facts: Mapping[str, Any]) -> Reports:
    """Write each format to its place, all verified in one fresh process before the first is moved there.

    A place that exists is replaced. Raises VerificationError, and then nothing has changed.
    """
    loaded = replace(loaded, module=loaded.module.cpu().float().eval())
    parent = next(iter(places.values())).parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{WORK}{os.getpid()}-") as work:
        folders = {name: Path(work) / name for name in places}
        for name, folder in folders.items():
            folder.mkdir()
            write_folder(loaded, name, folder)
        reports = _verify(loaded, folders)
        if "open_clip" in folders:
            point_to_tower(folders["open_clip"], places["open_clip"])
        for name, folder in folders.items():
            write_json(folder / "verification.json", {"format": name, "checks": reports[name]})
            (folder / "README.md").write_text(model_card(loaded, name, facts, reports[name]), encoding="utf-8")
        for name, folder in folders.items():
            _move(folder, places[name], Path(work))
    return reports


def write_folder(loaded: LoadedEncoder, name: str, folder: Path) -> None:
    """Fill `folder` (existing, empty) with format `name`, not yet verified and without its card."""
    FORMATS[name].write(loaded, folder)
    if not (folder / "preprocessor_config.json").is_file():
        write_json(folder / "preprocessor_config.json", image_processor_config(loaded.preprocessing))


def _remove_leftovers(parent: Path) -> None:
    """What an export that was killed left here; one that is under way is let be."""
    for folder in parent.glob(f"{WORK}*"):
        pid = folder.name.removeprefix(WORK).partition("-")[0]
        if not (pid.isdecimal() and process_start(int(pid)) is not None) and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def _verify(loaded: LoadedEncoder, folders: Mapping[str, Path]) -> Reports:
    checks = {name: checks_of(loaded, name, folder) for name, folder in folders.items()}
    reports = iter(verify(loaded, [check for group in checks.values() for check in group]))
    return {name: [next(reports) for _ in group] for name, group in checks.items()}


def checks_of(loaded: LoadedEncoder, name: str, folder: Path) -> list[Check]:
    """Which libraries open a folder of format `name`, at which sizes, and what difference is allowed."""
    any_size = name not in ("hf", "siglip") or hf_class(loaded.module) in ANY_SIZE
    if name == "onnx":
        return [Check(folder, "onnxruntime", tolerance=TOLERANCE_ONNX, reimport=False)]
    return [
        Check(folder, library, any_size=any_size, reimport=first == 0)
        for first, library in enumerate(FORMATS[name].libraries)
    ]


def _move(folder: Path, place: Path, work: Path) -> None:
    """One rename; what was there before goes first, into the folder that is about to be removed."""
    if place.is_dir() and not place.is_symlink():
        os.rename(place, work / f"{place.name}.old")
    elif place.exists() or place.is_symlink():
        place.unlink()
    os.chmod(folder, 0o777 & ~_umask())
    shutil.move(folder, place)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
