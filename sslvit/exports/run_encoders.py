"""What a pretraining run ends with: `encoder/` (timm, AutoModel) and `encoder_hf/` (the exact Hugging Face class)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslvit.encoder.weights import load_encoder
from sslvit.errors import InputError
from sslvit.exports.facts import run_facts
from sslvit.exports.formats import Reports, write_formats
from sslvit.exports.hf_folder import check_hf


def write_run_encoders(run: Path, *, facts: Mapping[str, Any] | None = None) -> Reports:
    """Write and verify both folders from the newest checkpoint of `run`; prints and returns the differences.

    Without transformers `encoder_hf/` is written all the same, compared by our own loader only, and the card says so.
    """
    loaded = load_encoder(str(run))
    places = {"timm": run / "encoder"}
    try:
        check_hf(loaded)
        places["hf"] = run / "encoder_hf"
    except InputError as error:
        print(f"{run / 'encoder_hf'}: not written, {error}")
    reports = write_formats(loaded, places, {**run_facts(run), **(facts or {})})
    for name, place in places.items():
        print(f"{place}: {describe(reports[name])}")
    return reports


def describe(reports: list[dict[str, Any]]) -> str:
    """One line: library and maximum difference per image size."""
    parts = []
    for report in reports:
        if "skipped" in report:
            parts.append(f"{report['library']} skipped ({report['skipped']})")
            continue
        sizes = ", ".join(f"{difference:.1e} at {size}" for size, difference in report["max_difference"].items())
        parts.append(f"{report['library']} {report['version']}: max difference {sizes}")
    return "; ".join(parts)
