"""What went wrong in a run and when: its alarms, skipped steps and roll-backs, as metrics.jsonl has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sslvit.pages.run_record import finite

Row = dict[str, Any]

EVENTS = {"skipped": "Step skipped", "rolled_back": "Rolled back", "stopped": "Stopped", "ended": "Ended early"}
OVER = "over:"  # how the text of an alarm begins that has ended (probes/alarms.py)
TARGETS = ("dino", "ibot")  # objectives whose targets have one alarm at a time
MOST_SKIPPED = 20  # skipped steps that are listed one by one, beside everything else


@dataclass(frozen=True)
class Incident:
    """What happened at a step of a stage, in the run's own words with what to change. ended: the step it was over."""

    step: int
    what: str
    text: str
    stage: str = ""
    ended: int | None = None
    lasting: bool = False  # an alarm that was never called over


def incidents(metrics: Mapping[str, Sequence[Row]]) -> list[Incident]:
    """Of every stage in the order of its steps; an alarm stands where it began."""
    return [incident for stage, rows in metrics.items() for incident in _of_stage(stage, rows)]


def summary(found: Sequence[Incident], rows: Sequence[Row]) -> str:
    """One sentence that counts them; `rows` are those of pretraining."""
    lasting = sum(incident.lasting for incident in found)
    over = sum(incident.ended is not None for incident in found)
    skipped = max((int(row["skipped"]) for row in rows if finite(row.get("skipped"))), default=0)
    skipped = max(skipped, sum(incident.what == EVENTS["skipped"] for incident in found))
    back = sum(incident.what == EVENTS["rolled_back"] for incident in found)
    parts = [
        f"{_count(lasting, 'alarm')} at the end",
        *([f"{_count(over, 'alarm')} that ended"] if over else []),
        *([f"{_count(skipped, 'step')} skipped, loss or gradient was not finite"] if skipped else []),
        *([_count(back, "roll-back")] if back else []),
    ]
    return "; ".join(parts) + "."


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"


def _ends(name: str, alarm: str, text: str) -> bool:
    """Whether an alarm that was raised is over with a line: called so, or because one form passes into another."""
    group = name.partition("/")[0]
    return name == alarm if text.startswith(OVER) else group in TARGETS and alarm.startswith(f"{group}/")


def _of_stage(stage: str, rows: Sequence[Row]) -> list[Incident]:
    found: list[Incident] = []
    open_alarms: dict[str, int] = {}  # name -> its place in `found`
    skipped = 0
    for row in rows:
        step, text = int(row["step"]), row.get("text")
        alarm, event = row.get("alarm"), row.get("event")
        if not isinstance(text, str):
            continue
        if isinstance(alarm, str):
            for name in [name for name in open_alarms if _ends(name, alarm, text)]:
                place = open_alarms.pop(name)
                found[place] = replace(found[place], ended=step, lasting=False)
        if isinstance(alarm, str) and not text.startswith(OVER):
            open_alarms[alarm] = len(found)
            found.append(Incident(step, f"Alarm {alarm}", text, stage, lasting=True))
        elif isinstance(event, str):
            skipped += event == "skipped"
            if event != "skipped" or skipped <= MOST_SKIPPED:
                found.append(Incident(step, EVENTS.get(event, event), text, stage))
    return found
