"""What the numbers of a run mean, in a few plain sentences. Judges nothing that the numbers do not show.

Collapse is told by what the objectives log: entropies of the teacher's targets (1 of ln K: uniform, DINO's loss stuck
at ln K; 0: one prototype for everything), the spread and rank of the features, k-NN beside step 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from sslvit.pages.comparisons import Probed, above, probed, seeing_tables, words
from sslvit.pages.run_record import RunRecord, finite, last, series
from sslvit.pages.svg import number, percent
from sslvit.probes.alarms import LOSES, LOW_RANK, NARROW, ONE_PROTOTYPE, UNIFORM

Row = dict[str, Any]

ENOUGH_STEPS, ENOUGH_SHARE = 100, 0.1  # before that, nothing can be told
WAITING = 0.3  # share of the time without data
TAIL = 0.3  # the last share of a run counts


@dataclass
class Verdict:
    """tone: good, warn, bad or wait, for the colour; word: one or two; sentences: why, and what to change."""

    tone: str
    word: str
    sentences: list[str] = field(default_factory=list)


def verdicts(record: RunRecord) -> list[Verdict]:
    """Of pretraining, of the encoder's numbers and of the vision-language model, those there is material for."""
    found = [
        pretraining_verdict(record.metrics.get("", []), record.config("pretrain")),
        encoder_verdict(probed(record.results)),
        seeing_verdict(record.results),
    ]
    return [verdict for verdict in found if verdict is not None]


def pretraining_verdict(rows: Sequence[Row], config: dict[str, Any]) -> Verdict | None:
    """healthy, collapsed, starved, too early, no gain, or unstable; None without a line of pretraining."""
    if not rows:
        return None
    step = int(max(row["step"] for row in rows))
    steps = int(config["steps"]) if finite(config.get("steps")) else None
    progress = f"Step {step:,} of {steps:,}." if steps else f"Step {step:,}."
    if (skipped := last(rows, "skipped")) and skipped > 0.01 * step:
        why = f"{number(skipped)} steps had no finite loss or gradient. Lower optim.lr or use precision=fp32."
        return Verdict("bad", "Unstable", [progress, why])
    if step < ENOUGH_STEPS or (steps and step < ENOUGH_SHARE * steps):
        why = f"Below {ENOUGH_STEPS} steps and a tenth of a run the curves say little."
        return Verdict("wait", "Too early to tell", [progress, why])
    if signs := collapse_signs(rows):
        return Verdict("bad", "Collapsed", [progress, *signs])
    learned = _knn_sentence(rows)
    waits = _tail(rows, "data_wait")
    if waits is not None and waits > WAITING:
        why = f"The device waits for images {percent(round(waits, 2))} of the time."
        remedy = "Raise num_workers, or store the images smaller or on a faster disk."
        return Verdict("warn", "Starved for data", [progress, f"{why} {remedy}", *learned.sentences])
    if learned.tone == "bad":
        return Verdict("warn", "No gain yet", [progress, *learned.sentences])
    health = "No sign of collapse in targets or features." if _watched(rows) else "The loss is all that was watched."
    return Verdict("good", "Healthy", [progress, health, *learned.sentences])


def collapse_signs(rows: Sequence[Row]) -> list[str]:
    """Sentences that name a collapse and what to change; empty when there is none."""
    signs = []
    for name, title in (("dino", "DINO"), ("ibot", "iBOT")):
        target, usage = _tail(rows, f"{name}/target_entropy"), _tail(rows, f"{name}/usage_entropy")
        if usage is not None and usage < ONE_PROTOTYPE:
            signs.append(
                f"{title}: all images fall on one prototype; the mean target has {_share(usage)} of the full entropy. "
                f"Raise {name}.teacher_temperature or use {name}.centering=sinkhorn."
            )
        elif target is not None and target > UNIFORM:
            signs.append(
                f"{title}: the teacher's targets are uniform ({_share(target)} of ln K), so nothing can be predicted "
                f"and the loss stands at ln K. Lower {name}.teacher_temperature or optim.lr, or train longer."
            )
    rank, spread = last(rows, "rankme"), series(rows, "feature_std")[1]
    if rank is not None and rank < LOW_RANK:
        signs.append(f"Features lie along one direction (RankMe {number(rank)}). Lower optim.lr, or add koleo={{}}.")
    if spread and spread[-1] < NARROW * spread[0]:
        ends = f"spread {number(spread[-1])}, at the start {number(spread[0])}"
        signs.append(f"Features of all images are nearly the same ({ends}).")
    return signs


def _share(value: float) -> str:
    return percent(round(value, 3))


def _watched(rows: Sequence[Row]) -> bool:
    return any("rankme" in row or "dino/target_entropy" in row or "ibot/target_entropy" in row for row in rows)


def _knn_sentence(rows: Sequence[Row]) -> Verdict:
    steps, values = series(rows, "knn/top1")
    if not values:
        return Verdict("wait", "", [])
    if len(values) == 1:
        return Verdict("wait", "", [f"k-NN {percent(round(values[-1], 3))} at step {number(steps[-1])}."])
    change = values[-1] - values[0]
    text = (
        f"k-NN on clean images went from {percent(round(values[0], 3))} at step {number(steps[0])} "
        f"to {percent(round(values[-1], 3))}, at best {percent(round(max(values), 3))}."
    )
    if change < -LOSES:
        return Verdict("bad", "", [text, "That is worse than at the start."])
    return Verdict("good" if change > LOSES else "bad", "", [text])


def _tail(rows: Sequence[Row], key: str) -> float | None:
    """The median over the last part of the run."""
    values = series(rows, key)[1]
    return median(values[-max(1, round(TAIL * len(values))) :]) if values else None


def encoder_verdict(found: Sequence[Probed]) -> Verdict | None:
    """Is the encoder better than the same network with random weights, and than raw pixels? By intervals."""
    mains = _headline(found)
    if not mains:
        return None
    sentences, outcomes = [], []
    for one in mains:
        own = one.rows[""]
        beside = [f"{words(c)} {_value(row)}" for c, row in one.rows.items() if c]
        sentences.append(f"{_probe_name(one)} {_value(own)}" + (f", beside {', '.join(beside)}." if beside else "."))
        outcomes += [above(own, row) for control, row in one.rows.items() if control]
    if not outcomes:
        return Verdict("wait", "Measured, nothing beside it", sentences)
    if all(outcomes):
        return Verdict("good", "Better than its controls", [*sentences, "All intervals are apart."])
    if any(outcomes):
        return Verdict("warn", "Better than some of its controls", [*sentences, "Not all intervals are apart."])
    return Verdict("bad", "No better than its controls", sentences)


def _headline(found: Sequence[Probed]) -> list[Probed]:
    """k-NN, linear and logistic regression on the first data they were measured on, each the mean over labels."""
    chosen: dict[str, Probed] = {}
    for one in found:
        known = chosen.get(one.probe)
        if one.probe in ("knn", "linear", "logreg") and (known is None or (known.label and not one.label)):
            chosen[one.probe] = one
    return [chosen[name] for name in ("knn", "linear", "logreg") if name in chosen]


def _probe_name(one: Probed) -> str:
    name = {"knn": "k-NN", "linear": "Linear probe", "logreg": "Logistic regression"}[one.probe]
    return f"{name} ({one.label})" if one.label else name


def _value(row: Row) -> str:
    """`61.2% (58.0 to 64.4)`."""
    interval = row["ci95"]
    between = "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    return f"{100 * row['value']:.1f}%{between}"


def seeing_verdict(results: Sequence[Row]) -> Verdict | None:
    """Does the model use its image? By intervals beside the blind model and the wrong image, and by nats."""
    tables = [table for table in seeing_tables(results) if "" in table.who and "" in table.rows]
    gain = next((row for row in results if row["name"] == "vlm/image_gain_nats" and row["value"] is not None), None)
    if not tables:
        return _caption_verdict(gain)
    rows = tables[0].rows[""]
    own, others = rows[""], {who: rows[who] for who in ("blind", "shuffled", "random_encoder") if who in rows}
    sentences = [f"{_value(own)} of held-out questions are answered right."]
    if others:
        beside = "; ".join(f"{words(who)} {_value(row)}" for who, row in others.items())
        sentences.append(f"Beside it: {beside}.")
    sentences += _gain_sentences(gain)
    outcomes = [above(own, others[who]) for who in ("blind", "shuffled") if who in others]
    if gain is not None and gain["ci95"] is not None:
        outcomes.append(bool(gain["ci95"][0] > 0))
    if not outcomes:
        return Verdict("wait", "Answers, nothing beside it", sentences)
    if all(outcomes):
        word = "It sees"
        sentences += _pretraining_sentences(results, own, others.get("random_encoder"))
        return Verdict("good", word, sentences)
    if any(outcomes):
        return Verdict("warn", "It sees a little", [*sentences, "Not every comparison is clear: train longer."])
    return Verdict("bad", "It does not see", [*sentences, "It answers from the words alone: train longer."])


def _pretraining_sentences(results: Sequence[Row], own: Row, random: Row | None) -> list[str]:
    """What the encoder brought along: paired by question where that was recorded, else by the two intervals."""
    paired = next((row for row in results if row["name"] == "vlm/pretraining_gain" and row["ci95"] is not None), None)
    if paired is not None and paired["ci95"][0] > 0:
        low, high = (100 * bound for bound in paired["ci95"])
        return [
            f"Pretraining is worth {100 * paired['value']:.1f} points ({low:.1f} to {high:.1f}, paired by question)."
        ]
    if random is None or above(own, random):
        return []
    return ["Over a random encoder it answers as well: what it sees, it learned in alignment."]


def _gain_sentences(gain: Row | None) -> list[str]:
    if gain is None:
        return []
    interval = "" if gain["ci95"] is None else f" (95% interval {gain['ci95'][0]:.3f} to {gain['ci95'][1]:.3f})"
    return [f"Seeing the image is worth {gain['value']:.3f} nats an answer{interval}."]


def _caption_verdict(gain: Row | None) -> Verdict | None:
    """Pairs with captions alone: only the nats tell."""
    if gain is None or gain["ci95"] is None:
        return None
    sees = gain["ci95"][0] > 0
    return Verdict("good" if sees else "bad", "It sees" if sees else "It does not see", _gain_sentences(gain))
