"""What a run folder says about itself, for the card of its exports. Reads small files only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sslvit.exports.licence import licence_of

_OTHER_DATA = (("val_data",), ("knn", "train"), ("knn", "val"))  # keys that may hold paths, beside `data`


def run_facts(run: Path, data_name: str | None = None) -> dict[str, Any]:
    """Data, steps, config, start and its licence, hardware, results. Absent files are left out.

    `data_name` stands for the data wherever its spec, which may be a private path, would. Where pretraining was one
    chapter of several (a demo), its own record is in `pretrain/` and the results are shared.
    """
    facts: dict[str, Any] = {}
    record = run / "pretrain" if (run / "pretrain" / "config.yaml").is_file() else run
    for file in ("resolved.yaml", "config.yaml"):
        if (record / file).is_file():
            facts["config"] = OmegaConf.to_container(OmegaConf.load(record / file))
            break
    config = facts.get("config") or {}
    facts |= {key: config[key] for key in ("data", "steps", "init") if config.get(key) is not None}
    for key, source in (("results", run / "results.json"), ("environment", record / "env.json")):
        if source.is_file():
            facts[key] = json.loads(source.read_text())
    if "init" in facts and (licence := licence_of(str(facts["init"]))):
        facts["licence"] = licence
    return facts if data_name is None else _with_data_named(facts, data_name)


def _with_data_named(facts: dict[str, Any], name: str) -> dict[str, Any]:
    spec, config = facts.get("data"), facts.get("config") or {}
    for *path, key in (("data",), *_OTHER_DATA):
        section = config
        for step in path:
            section = section.get(step) or {}
        if section.get(key) is not None:
            section[key] = name
    for row in facts.get("results") or []:
        if row.get("data") == spec:
            row["data"] = name
    return facts | {"data": name}
