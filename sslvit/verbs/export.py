"""`sslvit export`: an encoder, from anything `E` names, as files that other tools open.

Each format goes to OUT/FORMAT/, is reopened in a fresh process by the library it is for, and compared; one that is not
exactly the same encoder is an error and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslvit.encoder.weights import load_encoder
from sslvit.errors import InputError
from sslvit.exports.facts import run_facts
from sslvit.exports.formats import check_formats, possible_formats, write_formats
from sslvit.exports.licence import licence_warning
from sslvit.exports.push import check_push, push_folders
from sslvit.exports.run_encoders import describe


def export(
    run: str | Path,
    *,
    output_dir: str | Path,
    formats: str | Sequence[str] = ("timm", "hf"),
    data_name: str | None = None,
    push: str | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Export encoder `run` in `formats` (a sequence, a comma-separated string, or "all"); what was measured per format.

    "all" writes every format that is exact and says why another is not. `data_name` is what the cards call the data,
    in place of its spec. `push` ("ORG/NAME") uploads what was written and verified to the Hugging Face hub. Raises
    InputError for a format asked for by name that is not exact for this encoder, with the reason, and when the hub
    refuses.
    """
    loaded = load_encoder(str(run))
    if loaded.report is not None:
        print(f"{run}: {loaded.report}")
    names = formats.split(",") if isinstance(formats, str) else list(formats)
    if names == ["all"]:
        names, refused = possible_formats(loaded)
        for name, reason in refused.items():
            print(f"{name}: skipped, {reason}")
    if not names or not all(names):
        raise InputError("no formats given; for example --formats timm,hf or --formats all")
    places = {name: Path(output_dir) / name for name in names}
    check_formats(loaded, places)
    if push is not None:
        check_push(push, names)
    facts = run_facts(_run_of(str(run)), data_name)
    reports = write_formats(loaded, places, facts)
    for name, place in places.items():
        print(f"{place}: {describe(reports[name])}")
    if warning := licence_warning(loaded, facts):
        print(f"warning: {warning}")
    if push is not None:
        print(f"pushed to {push_folders(push, places)}")
    return reports


def _run_of(spec: str) -> Path:
    """The folder of a run named by `spec`, which may carry `@best`."""
    path = Path(spec)
    return path if path.exists() else Path(spec.rpartition("@")[0] or spec)
