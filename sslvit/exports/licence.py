"""Under which licence exported weights are: that of the weights they started from, as far as it can be known.

Words for the card and a warning for the person who exports. No legal advice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from omegaconf import OmegaConf

from sslvit.encoder.weights import LoadedEncoder

PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "cc0-1.0", "cc-by-4.0")
KNOWN_TO_THE_HUB = (  # every other name must be written as `license: other` with its `license_name`
    *PERMISSIVE,
    *("cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0"),
    *("mpl-2.0", "openrail", "unknown", "other"),
)
_DEPTH = 8  # runs that start from runs


def licence_of(spec: str, depth: int = _DEPTH) -> str | None:
    """The licence of the weights `spec` names, without loading them; None where nothing states one.

    A timm name, a timm or Hugging Face folder, or a run, which has that of its own start.
    """
    place = spec.partition("?")[0]
    path = Path(place) if Path(place).exists() else Path(place.rpartition("@")[0] or place)
    if path.is_dir():
        for file in (path / "resolved.yaml", path / "config.yaml"):
            if file.is_file():
                start = (OmegaConf.to_container(OmegaConf.load(file)) or {}).get("init")  # type: ignore[union-attr]
                return licence_of(str(start), depth - 1) if start and depth else None
        return _of_folder(path)
    if path.exists() or "pretrained=false" in spec.lower():
        return None
    cfg = timm.models.get_pretrained_cfg(place, allow_unregistered=True) if ":" not in place else None
    return None if cfg is None else cfg.license


def licence(loaded: LoadedEncoder, facts: Mapping[str, Any]) -> str | None:
    """The licence that applies to `loaded`, exported from a run with these facts."""
    return loaded.license or facts.get("licence")


def licence_paragraph(loaded: LoadedEncoder, facts: Mapping[str, Any]) -> str:
    """What the card says."""
    if name := licence(loaded, facts):
        warning = "" if name in PERMISSIVE else " **It is not a permissive licence: read it before use.**"
        return f"These weights, or those they started from, are under `{name}`.{warning}"
    if facts.get("init"):
        return f"They started from `{facts['init']}`, whose licence is not known here and applies."
    return "Chosen by whoever trained them; sslvit claims nothing."


def licence_warning(loaded: LoadedEncoder, facts: Mapping[str, Any]) -> str | None:
    """What the person who exports should know; None where the licence is permissive, or theirs to choose."""
    name = licence(loaded, facts)
    if name in PERMISSIVE or (name is None and not facts.get("init")):
        return None
    start = facts.get("init") or loaded.source
    if name is None:
        return f"these weights started from {start}, whose licence is not known here; find it before you pass them on"
    return f"these weights started from {start}, under {name}, which is not permissive; read it before you pass them on"


def front_matter_lines(loaded: LoadedEncoder, facts: Mapping[str, Any]) -> list[str]:
    """`license:` as the hub wants it at the top of a card."""
    name = licence(loaded, facts)
    return [] if name is None else license_lines(name)


def license_lines(name: str) -> list[str]:
    """One licence in a card's front matter."""
    return [f"license: {name}"] if name in KNOWN_TO_THE_HUB else ["license: other", f"license_name: {name}"]


def _of_folder(path: Path) -> str | None:
    """What a folder's timm config or card states."""
    if (path / "config.json").is_file():
        stated = json.loads((path / "config.json").read_text()).get("pretrained_cfg", {}).get("license")
        if stated:
            return str(stated)
    if (path / "README.md").is_file():
        head = (path / "README.md").read_text(errors="replace")[:4000]
        for key in ("license_name", "license"):
            if match := re.search(rf"^{key}:\s*(\S+)", head, flags=re.M):
                return match.group(1)
    return None
