"""Rows of results.json set side by side: an encoder beside its controls, a model beside what cannot see.

Only rearranges; numbers, intervals and protocols are those of the rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sslvit.data.pairs import FAMILY_ORDER

Row = dict[str, Any]

ENCODER_CONTROLS = ("random_init", "pixels")
METRICS = ("top1", "map", "map_at_r", "r2", "miou", "nmi")  # the first a probe has is the one to compare by
VARIANT = re.compile(r"k\d+|\d+shot|\d+percent")
WORDS = {
    "": "model",
    "random_init": "random init",
    "pixels": "raw pixels",
    "blind": "blind",
    "shuffled": "another image",
    "random_encoder": "random encoder",
    "frozen": "frozen encoder",
    "frozen/random_encoder": "frozen random encoder",
}
SEEING = re.compile(r"vlm/(?:(?P<who>.+)/)?accuracy(?:/(?P<family>[^/]+))?")
CAPTION = re.compile(r"caption/(?:(?P<who>.+)/)?(?P<metric>cider|bleu4)")


@dataclass(frozen=True)
class Probed:
    """One probe on one label: the encoder's row and those of its controls, by control."""

    probe: str
    label: str  # "" for the only label, or the mean of several
    metric: str
    data: str
    rows: dict[str, Row]  # "" is the encoder

    @property
    def name(self) -> str:
        """For the side of a chart."""
        probe = {"knn": "k-NN", "logreg": "logistic"}.get(self.probe, self.probe)
        return f"{probe} {self.label}".replace("_", " ").strip()


def probed(results: Sequence[Row]) -> list[Probed]:
    """Each probe and label that was measured for the encoder, with what its controls reached on the same data."""
    table: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in results:
        parts = row["name"].split("/")
        if len(parts) < 2 or parts[-1] not in METRICS or parts[0] in ("vlm", "caption") or row["value"] is None:
            continue
        control = parts[1] if parts[1] in ENCODER_CONTROLS else ""
        between = parts[2 if control else 1 : -1]
        if len(between) > 1 or any(VARIANT.fullmatch(part) for part in between):
            continue
        key = (parts[0], "/".join(between), parts[-1], str(row.get("data")))
        table.setdefault(key, {}).setdefault(control, row)
    found = [Probed(*key, rows) for key, rows in table.items() if "" in rows]
    best = {(p.probe, p.data): min(METRICS.index(q.metric) for q in found if q.probe == p.probe) for p in found}
    return [p for p in found if METRICS.index(p.metric) == best[p.probe, p.data]]


@dataclass(frozen=True)
class SeeingTable:
    """Accuracy by family and by who answers. rows: family ("" for all questions) -> who ("" the model) -> row."""

    title: str
    who: list[str]
    families: list[str]
    rows: dict[str, dict[str, Row]]
    captions: dict[str, dict[str, Row]]  # "cider", "bleu4" -> who -> row


def seeing_tables(results: Sequence[Row]) -> list[SeeingTable]:
    """The model with its controls; then, where it was measured, the same recipe over a frozen encoder."""
    accuracy, captions = _by_who(results, SEEING, "family"), _by_who(results, CAPTION, "metric")
    everyone = list(dict.fromkeys(who for rows in accuracy.values() for who in rows))
    tables = []
    for title, prefix in (("", ""), ("encoder frozen", "frozen")):
        who = [name for name in everyone if (name.split("/")[0] == "frozen") == (prefix == "frozen")]
        if not who:
            continue
        order = [name for name in WORDS if name in who] + sorted(set(who).difference(WORDS))
        families = [name for name in accuracy if any(w in accuracy[name] for w in who)]
        ranked = [f for f in ("", *FAMILY_ORDER) if f in families]
        tables.append(SeeingTable(title, order, ranked + sorted(set(families).difference(ranked)), accuracy, captions))
    return tables


def _by_who(results: Sequence[Row], pattern: re.Pattern[str], group: str) -> dict[str, dict[str, Row]]:
    table: dict[str, dict[str, Row]] = {}
    for row in results:
        match = pattern.fullmatch(row["name"])
        if match is not None and row["value"] is not None:
            table.setdefault(match[group] or "", {}).setdefault(match["who"] or "", row)
    return table


def words(who: str) -> str:
    """`random_encoder` -> `random encoder`."""
    return WORDS.get(who, who.replace("_", " ").replace("/", ", "))


def above(row: Row | None, other: Row | None) -> bool | None:
    """Whether the interval of `row` lies above that of `other`; None when one is missing or has no interval."""
    if row is None or other is None or row["ci95"] is None or other["ci95"] is None:
        return None
    return bool(row["ci95"][0] > other["ci95"][1])
