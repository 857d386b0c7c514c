"""The report: one HTML file that tells how a run went. No network, no scripts, at most 5 MB.

Arranges what the other files of this room make; all words from outside (names, answers, specs) are escaped by the
template. Opening encoders and images is in `pictures.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from sslvit.pages.comparisons import Probed, SeeingTable, probed, seeing_tables, words
from sslvit.pages.curves import Figure, pretraining_figures, stage_figures
from sslvit.pages.data_uri import Encoding, data_uri
from sslvit.pages.incidents import incidents, summary
from sslvit.pages.pictures import Picture, Pictures, pretrain_config, printable
from sslvit.pages.run_record import RunRecord, finite, last
from sslvit.pages.svg import Bar, bar_chart, interval_mark, number, percent
from sslvit.pages.verdict import verdicts
from sslvit.vlm.score import same_answer
from sslvit.vlm.sees import FREE

Row = dict[str, Any]

MAX_BYTES = 5 * 10**6
ENCODINGS = (Encoding(192, 84), Encoding(128, 72), Encoding(72, 55), Encoding(32, 40))
COLOURS = {"random_init": 1, "random_encoder": 1, "pixels": 2, "blind": 2, "shuffled": 3}  # the measured one is 0
MAX_ROWS = 1500  # of the results table
MAX_INCIDENTS = 60
NUM_WRONG, NUM_RIGHT, NUM_CAPTIONS = 12, 8, 6
LONG_TEXT, LONG_ANSWER = 20_000, 600  # characters shown of a config or a list of commands; of a question or answer


@dataclass(frozen=True)
class Asked:
    """A question as the page shows it. right: None where there is no one right wording (captions)."""

    row: Row
    right: bool | None
    others: list[tuple[str, str]]  # who, what they said


def asked_questions(predictions: Sequence[Row]) -> list[Asked]:
    """The questions to show: wrong answers first, each kind of question in turn, then right ones, then captions."""
    needed = ("question", "answer", "prediction")
    known = [row for row in predictions if all(isinstance(row.get(key), str) for key in needed)]
    known = [row for row in known if isinstance(row.get("image", ""), str)]
    marked = [row for row in known if row.get("family") not in FREE]
    right = [row for row in marked if same_answer(row["prediction"], row["answer"])]
    wrong = [row for row in marked if not same_answer(row["prediction"], row["answer"])]
    free = {(row.get("image"), row["question"]): row for row in reversed(known) if row.get("family") in FREE}
    return [
        *(Asked(row, False, _others(row)) for row in _in_turn(wrong, NUM_WRONG)),
        *(Asked(row, True, _others(row)) for row in _in_turn(right, NUM_RIGHT)),
        *(Asked(row, None, _others(row)) for row in list(reversed(free.values()))[:NUM_CAPTIONS]),
    ]


def _in_turn(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` rows, from each family in turn, no image twice while others are left."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(str(row.get("family")), []).append(row)
    chosen: list[Row] = []
    seen: set[Any] = set()
    while len(chosen) < count and any(families.values()):
        for waiting in families.values():
            if waiting and len(chosen) < count:
                fresh = next((i for i, row in enumerate(waiting) if row.get("image") not in seen), 0)
                chosen.append(waiting.pop(fresh))
                seen.add(chosen[-1].get("image"))
    return chosen


def _others(row: Row) -> list[tuple[str, str]]:
    return [(words(who), row[who]) for who in ("blind", "shuffled", "random_encoder") if isinstance(row.get(who), str)]


def asked_images(questions: Sequence[Asked]) -> list[str]:
    """Names of the images the page wants to show beside the questions."""
    return list(dict.fromkeys(asked.row["image"] for asked in questions if "image" in asked.row))


def render(record: RunRecord, pictures: Pictures, questions: Sequence[Asked]) -> str:
    """The page, with its pictures as large as the limit of the file allows."""
    page = ""
    for encoding in ENCODINGS:
        page = printable(_template().render(**_context(record, pictures, questions, encoding)))
        if len(page.encode("utf-8")) <= MAX_BYTES:
            break
    return page


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sslvit", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("report.html.jinja")


def _context(record: RunRecord, pictures: Pictures, questions: Sequence[Asked], encoding: Encoding) -> dict[str, Any]:
    """Everything the template reads."""

    def source(picture: Picture) -> Markup:
        return Markup(data_uri(picture.pixels, encoding))

    found = probed(record.results)
    stages = {name: rows for name, rows in record.metrics.items() if name}
    config = record.config("pretrain")
    happened = incidents(record.metrics)
    return {
        "style": Markup((files("sslvit.pages") / "report.css").read_text(encoding="utf-8")),
        "title": record.path.resolve().name,
        "facts": facts(record, pictures),
        "running": not _finished(record),
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "verdicts": verdicts(record),
        "incidents": happened[:MAX_INCIDENTS],
        "num_incidents": len(happened),
        "incidents_summary": summary(happened, record.metrics.get("", [])),
        "probes": probe_charts(found),
        "curves": pretraining_figures(record.metrics.get("", []), config, pictures.embed_dim),
        "stages": stage_figures(stages),
        "pictures": pictures,
        "pixel": source,
        "local_share": local_share(record),
        "results": results_groups(record.results[:MAX_ROWS]),
        "num_results": len(record.results),
        "num_left_out": max(0, len(record.results) - MAX_ROWS),
        "seeing": [seeing_view(table) for table in seeing_tables(record.results)],
        "questions": questions,
        "num_predictions": len(record.predictions),
        "bad_files": record.bad_files,
        "verbs": [verb for verb in record.verbs.values() if verb.config_text],
        "environments": environments(record),
        "cut": lambda text: _cut(text, LONG_TEXT, "\n... (cut here)"),
        "brief": lambda text: _cut(text, LONG_ANSWER, " ..."),
    }


def _cut(text: str, length: int, end: str) -> str:
    return text if len(text) <= length else text[:length] + end


def _finished(record: RunRecord) -> bool:
    return all(verb.finished for verb in record.verbs.values())


def facts(record: RunRecord, pictures: Pictures) -> list[tuple[str, str]]:
    """What the run is, for the head of the page."""
    rows = record.metrics.get("", [])
    pretrain, align, evaluate = (record.config(verb) for verb in ("pretrain", "align", "evaluate"))
    found: list[tuple[str, Any]] = [
        ("Images", pretrain.get("data") or evaluate.get("val_dataset") or align.get("data")),
        ("Encoder", pictures.facts.get("encoder") or evaluate.get("encoder") or align.get("encoder")),
        ("Objectives", " + ".join(n for n in ("dino", "ibot", "koleo", "mae") if pretrain.get(n)) or None),
    ]
    if rows:
        step, steps, batch = int(rows[-1]["step"]), pretrain.get("steps"), pretrain.get("batch_size")
        found.append(("Steps", f"{step:,} of {steps:,}" if finite(steps) else f"{step:,}"))
        if finite(batch):
            found.append(("Images seen", f"{step * int(batch):,} in batches of {batch:,}"))
        found.append(("Speed", _speed(rows)))
    if align:
        found.append(("Pairs", align.get("data")))
        found.append(("Language model", align.get("lm") or "trained here from the pairs' own text"))
    return [(name, str(value)) for name, value in found if value]


def _speed(rows: Sequence[Row]) -> str | None:
    """Images a second, the share of the device's arithmetic, waiting, memory: at the end of the run."""
    speed, waiting, memory = (last(rows, key) for key in ("images_per_s", "data_wait", "peak_memory_mib"))
    if speed is None:
        return None
    parts = [f"{number(round(speed, 1))} images/s"]
    if (share := last(rows, "mfu")) is not None:
        parts.append(f"{percent(round(share, 3))} of the device's arithmetic")
    if waiting is not None:
        parts.append(f"waiting for data {percent(round(waiting, 3))} of the time")
    if memory is not None:
        parts.append(f"{number(round(memory))} MiB at most")
    return ", ".join(parts)


def local_share(record: RunRecord) -> str:
    """How many views the model gets of each image, in words; "" without a config."""
    config = pretrain_config(record)
    if config is None:
        return ""
    crops = config.crops
    local = f" and {crops.num_local} local views of {crops.local_size} px" if crops.num_local else ""
    views = "view" if crops.num_global == 1 else "views"
    return f"{crops.num_global} global {views} of {config.encoder.image_size} px{local}"


# ---- results --------------------------------------------------------------------------------------------------------


def probe_charts(found: Sequence[Probed]) -> list[Figure]:
    """Encoder, random init and pixels side by side, a chart for each data set."""
    charts = []
    for data in dict.fromkeys(one.data for one in found):
        here = [one for one in found if one.data == data and len(one.rows) > 1][:16]
        if not here:
            continue
        order = list(dict.fromkeys(control for one in here for control in one.rows))
        groups = [(one.name, [_bar(one.rows[c], c, c or "encoder") for c in order if c in one.rows]) for one in here]
        legend = [(words(control) if control else "encoder", colour_of(control)) for control in order]
        label = f"Accuracy of {len(here)} probes beside their controls on {data}"
        charts.append(Figure("Beside random init and raw pixels", data, bar_chart(groups, label=label), legend))
    return charts


def colour_of(who: str) -> int:
    """The same for the same part on every chart of the page."""
    return COLOURS.get(who.rpartition("/")[2], 0)


def _bar(row: Row, who: str, name: str) -> Bar:
    interval = row["ci95"]
    return Bar(row["value"], None if interval is None else (interval[0], interval[1]), name, colour_of(who))


@dataclass(frozen=True)
class ResultRow:
    """A row of results.json as the table shows it."""

    row: Row
    value: str
    interval: str
    mark: Markup | None


def results_groups(results: Sequence[Row]) -> list[tuple[str, str, list[ResultRow]]]:
    """(first word of the name, data, rows), in order of appearance."""
    groups: dict[tuple[str, str], list[ResultRow]] = {}
    for row in results:
        key = row["name"].split("/")[0], str(row.get("data") or "")
        groups.setdefault(key, []).append(result_row(row))
    return [(*key, rows) for key, rows in groups.items()]


def result_row(row: Row) -> ResultRow:
    """Value and interval as text; a mark where the value is a share."""
    value, interval = row["value"], row["ci95"]
    if value is None:
        return ResultRow(row, "not a number", "", None)
    text = _digits(value)
    between = "" if interval is None else f"{_digits(interval[0])} to {_digits(interval[1])}"
    share = 0 <= value <= 1 and (interval is None or (interval[0] >= 0 and interval[1] <= 1))
    colour = max((COLOURS.get(part, 0) for part in row["name"].split("/")), default=0)
    mark = interval_mark(value, None if interval is None else (interval[0], interval[1]), colour) if share else None
    return ResultRow(row, text, between, mark)


def _digits(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else number(value)


@dataclass(frozen=True)
class SeeingView:
    """The sees-or-not table: a chart and its numbers. lines: (family, cells), a cell is (value, interval) or None."""

    title: str
    figure: Figure
    heads: list[str]
    lines: list[tuple[str, list[tuple[str, str] | None]]]
    data: str


def seeing_view(table: SeeingTable) -> SeeingView:
    """Chart and cells of one table."""
    names = [(family or "all questions", table.rows[family]) for family in table.families]
    groups = [(name, [_bar(rows[who], who, words(who)) for who in table.who if who in rows]) for name, rows in names]
    heads = [words(who) for who in table.who]
    svg = bar_chart(groups, label="Accuracy by kind of question and by who answers")
    figure = Figure("", "", svg, [(words(who), colour_of(who)) for who in table.who])
    lines = [(name, [_cell(rows.get(who), 100, "%") for who in table.who]) for name, rows in names]
    for metric, name in (("cider", "captions, CIDEr-D"), ("bleu4", "captions, BLEU-4")):
        rows = table.captions.get(metric, {})
        if any(who in rows for who in table.who):
            lines.append((name, [_cell(rows.get(who), 1, "") for who in table.who]))
    first = next(iter(names[0][1].values()))
    return SeeingView(table.title, figure, heads, lines, str(first.get("data") or ""))


def _cell(row: Row | None, factor: float, unit: str) -> tuple[str, str] | None:
    if row is None:
        return None
    digits = 1 if factor == 100 else 3
    interval = row["ci95"]
    between = "" if interval is None else f"{factor * interval[0]:.{digits}f} to {factor * interval[1]:.{digits}f}"
    return f"{factor * row['value']:.{digits}f}{unit}", between


def environments(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """(verb, its machine and versions as pairs); a verb that ran where the one before it ran is left out."""
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for verb in record.verbs.values():
        facts = dict(verb.environment)
        packages = facts.pop("packages", None)
        wanted = ("sslvit", "python", "platform", "host", "num_cpus", "world_size", "slurm_job")
        pairs = [(key.replace("_", " "), str(facts[key])) for key in wanted if facts.get(key) is not None]
        pairs += [(str(k), str(v)) for k, v in packages.items()] if isinstance(packages, dict) else []
        if not found or found[-1][1] != pairs:
            found.append((verb.verb, pairs))
    return found
