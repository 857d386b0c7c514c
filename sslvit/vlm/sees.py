"""Does it see? The same questions put to the model, to a blind one, to the model over another image, to a control.

Accuracy is exact match of greedy answers; captions get BLEU-4 and CIDEr-D; every turn also gets the nats its true
answer costs. Not a benchmark of its own: the validation pairs are whatever `align` was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslvit.data.bad_files import BadImage
from sslvit.data.keyed import rng
from sslvit.data.pairs import CAPTION_PROMPT, FAMILY_ORDER
from sslvit.data.turns import Turn
from sslvit.vlm.answer import greedy
from sslvit.vlm.batches import CAPTION, PairImages, draw_turns, tokenize
from sslvit.vlm.blocks import lay_out
from sslvit.vlm.chat import Chat
from sslvit.vlm.model import VisionLanguage
from sslvit.vlm.score import bleu4_interval, bleu_statistics, cider_d, mean_interval, same_answer
from sslvit.vlm.stages import encoded, longest_text

FREE = (CAPTION, "conversation")  # families without one right wording: they count for nats, not for accuracy
QUESTIONS = 8  # of an image, besides its captions
CHUNK = 64  # images at once
ASKED, SHUFFLED = 2, 3  # views of the keyed generator

Row = dict[str, Any]


@dataclass
class Exam:
    """Validation images, by their number in the pairs, and the turns each is asked about."""

    images: PairImages
    numbers: list[int]
    turns: list[list[Turn]]

    def families(self) -> list[str]:
        """Families that are asked about, in the order of tables."""
        found = {turn.family for turns in self.turns for turn in turns}
        return [name for name in FAMILY_ORDER if name in found] + sorted(found.difference(FAMILY_ORDER))


@dataclass
class Answers:
    """For every turn of every image: what was answered, and the nats of the true answer."""

    texts: list[list[str]] = field(default_factory=list)
    nats: list[list[float]] = field(default_factory=list)


def set_exam(images: PairImages, num_images: int, seed: int) -> Exam:
    """At most `num_images` readable images drawn by the seed; a few questions of each, and its captions."""
    order = rng(seed, 0, 0, ASKED).permutation(len(images))
    numbers: list[int] = []
    asked: list[list[Turn]] = []
    for number in order.tolist():
        if len(numbers) == num_images:
            break
        try:
            images.get(number)
        except BadImage:
            continue
        turns = images.pairs.turns(number)
        questions = draw_turns([t for t in turns if t.family != CAPTION], QUESTIONS, rng(seed, 0, number, ASKED))
        numbers.append(number)
        asked.append(questions + [t for t in turns if t.family == CAPTION and t.question == CAPTION_PROMPT])
    return Exam(images, numbers, asked)


def others_images(count: int, seed: int) -> list[int]:
    """For each of `count` images another one (a single cycle in random order); an only image keeps itself."""
    order = rng(seed, 0, 0, SHUFFLED).permutation(count)
    other = np.empty(count, dtype=np.int64)
    other[order] = np.roll(order, 1)
    return [int(place) for place in other]


@torch.no_grad()
def sit(
    model: VisionLanguage, exam: Exam, chat: Chat, device: torch.device, shown: Sequence[int] | None = None
) -> Answers:
    """The model's answers to the exam; `shown[i]` is the place in the exam of the image shown with question set i.

    In fp32, so that the numbers are those of the exported folder.
    """
    model.to(device).eval()
    answers = Answers()
    places = list(range(len(exam.numbers))) if shown is None else list(shown)
    for start in range(0, len(places), CHUNK):
        chunk = slice(start, start + CHUNK)
        tokens = None
        if model.encoder is not None:
            tokens = encoded(model, exam.images, [exam.numbers[p] for p in places[chunk]], device)
        answers.nats += _nats(model, tokens, exam.turns[chunk], chat, device)
        answers.texts += _texts(model, tokens, exam.turns[chunk], chat)
    return answers


def _nats(
    model: VisionLanguage, tokens: Tensor | None, turns: Sequence[Sequence[Turn]], chat: Chat, device: torch.device
) -> list[list[float]]:
    """Negative log likelihood of each true answer with its end token."""
    blocks = lay_out([tokenize(row, chat) for row in turns], chat.end_id, chat.pad_id).to(device)
    found = model.predict(tokens, blocks)
    each = F.cross_entropy(found.logits.float(), found.targets, reduction="none").double()
    width = max(len(row) for row in turns)
    sums = torch.zeros(len(turns) * width, dtype=torch.float64, device=device)
    sums.index_add_(0, found.row * width + found.turn, each)
    table = sums.view(len(turns), width).tolist()
    return [values[: len(row)] for values, row in zip(table, turns, strict=True)]


def _texts(
    model: VisionLanguage, tokens: Tensor | None, turns: Sequence[Sequence[Turn]], chat: Chat
) -> list[list[str]]:
    """Greedy answers; a question that several turns of an image share (captions) is asked once."""
    questions = [list(dict.fromkeys(turn.question for turn in row)) for row in turns]
    longest = max(len(a) for row in turns for a in chat.answers([turn.answer for turn in row]))
    prompts = [chat.prompts(row) for row in questions]
    room = longest_text(model.lm) - (0 if tokens is None else tokens.shape[1]) - max(len(p) for r in prompts for p in r)
    ids = greedy(
        model,
        tokens,
        prompts,
        end_id=chat.end_id,
        pad_id=chat.pad_id,
        max_new_tokens=max(1, min(longest + 8, room - len(model.before))),
    )
    texts = []
    for row, asked, answers in zip(turns, questions, ids, strict=True):
        said = {question: chat.decode(answer) for question, answer in zip(asked, answers, strict=True)}
        texts.append([said[turn.question] for turn in row])
    return texts


def marks(exam: Exam, answers: Answers) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Family -> (1 or 0 for each question, its image); those with one right answer, and "" for them together."""
    collected: dict[str, list[tuple[float, int]]] = {"": []}
    for image, (turns, texts) in enumerate(zip(exam.turns, answers.texts, strict=True)):
        for turn, text in zip(turns, texts, strict=True):
            if turn.family not in FREE:
                mark = (float(same_answer(text, turn.answer)), image)
                collected[""].append(mark)
                collected.setdefault(turn.family, []).append(mark)
    columns = {family: tuple(zip(*entries, strict=True)) for family, entries in collected.items() if entries}
    return {family: (np.array(right), np.array(image)) for family, (right, image) in columns.items()}


def rows_of(exam: Exam, answers: Answers, condition: str, spec: str, seed: int, step: int) -> list[Row]:
    """Rows for results.json of one condition: "" for the model itself, else blind, shuffled, random_encoder."""
    infix = f"{condition}/" if condition else ""
    protocol = f"greedy answer, exact match of words; {len(exam.numbers)} validation images; {condition or 'the model'}"
    rows = []
    for family, (right, image) in marks(exam, answers).items():
        name = f"vlm/{infix}accuracy" + (f"/{family}" if family else "")
        rows.append(_row(name, *mean_interval(right, image, seed), f"{protocol}; n={len(right)}", spec, seed, step))
    return rows + _caption_rows(exam, answers, infix, spec, seed, step)


def _caption_rows(exam: Exam, answers: Answers, infix: str, spec: str, seed: int, step: int) -> list[Row]:
    """`caption/cider` and `caption/bleu4` over the images that have captions."""
    predictions, references = captions_of(exam, answers)
    if not predictions:
        return []
    protocol = f"greedy caption, own tokenizer, {len(predictions)} images x {len(references[0])} references"
    cider = mean_interval(cider_d(predictions, references), np.arange(len(predictions)), seed)
    counts = np.stack([bleu_statistics(p, r) for p, r in zip(predictions, references, strict=True)])
    return [
        _row(f"caption/{infix}cider", *cider, f"CIDEr-D; {protocol}", spec, seed, step),
        _row(f"caption/{infix}bleu4", *bleu4_interval(counts, seed), f"corpus BLEU-4; {protocol}", spec, seed, step),
    ]


def captions_of(exam: Exam, answers: Answers) -> tuple[list[str], list[list[str]]]:
    """The caption said of each image that has some, and its references."""
    predictions, references = [], []
    for turns, texts in zip(exam.turns, answers.texts, strict=True):
        pairs = [(turn.answer, text) for turn, text in zip(turns, texts, strict=True) if turn.family == CAPTION]
        if pairs:
            predictions.append(pairs[0][1])
            references.append([answer for answer, _ in pairs])
    return predictions, references


def gain_row(exam: Exam, seeing: Answers, blind: Answers, spec: str, seed: int, step: int) -> Row:
    """`vlm/image_gain_nats`: what the true answer costs the blind model more than the seeing one, mean over turns."""
    gain, count = _saved_nats(seeing, blind, seed)
    protocol = f"nats of the true answer, blind model minus model; mean over {count} turns"
    return _row("vlm/image_gain_nats", *gain, protocol, spec, seed, step)


def pretraining_rows(exam: Exam, own: Answers, other: Answers, spec: str, seed: int, step: int) -> list[Row]:
    """`vlm/pretraining_gain` and `_nats`: the model less the same recipe over a random encoder, answer by answer.

    Paired, so that what makes a question hard for both does not widen the interval.
    """
    gain, count = _saved_nats(own, other, seed)
    protocol = f"nats of the true answer, model over a random encoder minus model; mean over {count} turns"
    rows = [_row("vlm/pretraining_gain_nats", *gain, protocol, spec, seed, step)]
    ours, theirs = marks(exam, own).get(""), marks(exam, other).get("")
    if ours is None or theirs is None:
        return rows
    (right, image), (random, _) = ours, theirs
    protocol = f"accuracy less that over a random encoder, paired by question; n={len(right)}"
    return [
        _row("vlm/pretraining_gain", *mean_interval(right - random, image, seed), protocol, spec, seed, step),
        *rows,
    ]


def _saved_nats(own: Answers, other: Answers, seed: int) -> tuple[tuple[float, list[float]], int]:
    """What true answers cost `other` more than `own`: mean over turns with its interval, and how many turns."""
    gains = [
        theirs - ours
        for row, other_row in zip(own.nats, other.nats, strict=True)
        for ours, theirs in zip(row, other_row, strict=True)
    ]
    images = [image for image, row in enumerate(own.nats) for _ in row]
    return mean_interval(np.array(gains), np.array(images), seed), len(gains)


def _row(name: str, value: float, ci95: list[float], protocol: str, spec: str, seed: int, step: int) -> Row:
    return {"name": name, "value": value, "ci95": ci95, "protocol": protocol, "data": spec, "seed": seed, "step": step}


def prediction_lines(exam: Exam, by_condition: dict[str, Answers]) -> list[dict[str, Any]]:
    """One line for each turn, for predictions.jsonl: what was asked, what is true, and what each condition answered."""
    lines = []
    for place, (number, turns) in enumerate(zip(exam.numbers, exam.turns, strict=True)):
        for t, turn in enumerate(turns):
            line = {
                "image": exam.images.pairs.name(number),
                "index": number,
                "family": turn.family,
                "question": turn.question,
                "answer": turn.answer,
            }
            for condition, answers in by_condition.items():
                line[condition or "prediction"] = answers.texts[place][t]
                line[f"{condition}_nats" if condition else "nats"] = round(answers.nats[place][t], 4)
            lines.append(line)
    return lines


def alarms(rows: Sequence[Row]) -> list[str]:
    """In words: signs that the model does not look at its image."""
    by_name = {row["name"]: row for row in rows}
    found = []
    gain = by_name.get("vlm/image_gain_nats")
    if gain is not None and gain["ci95"][0] <= 0:
        found.append("seeing the image saves no nats: the model answers from the words alone; train longer")
    own, shuffled = by_name.get("vlm/accuracy"), by_name.get("vlm/shuffled/accuracy")
    if own and shuffled and own["ci95"][0] <= shuffled["ci95"][1]:
        found.append("answers are as good over a wrong image: the model does not use what it sees")
    return found


def table(rows: Sequence[Row], families: Sequence[str], conditions: Sequence[str]) -> str:
    """The sees-or-not table as plain text: a line for each family, a column for each condition, values in percent."""
    by_name = {row["name"]: row for row in rows}
    heads = ["model", *conditions]
    lines = ["does it see?".ljust(16) + "".join(head.rjust(22) for head in heads)]
    names = [("all questions", "vlm/{}accuracy")]
    names += [(family, f"vlm/{{}}accuracy/{family}") for family in families if family not in FREE]
    for label, pattern in [*names, ("caption CIDEr-D", "caption/{}cider"), ("caption BLEU-4", "caption/{}bleu4")]:
        found = [by_name.get(pattern.format(f"{c}/" if c else "")) for c in ["", *conditions]]
        if found[0] is not None:
            lines.append(label.ljust(16) + "".join(_cell(row, label.startswith("caption")).rjust(22) for row in found))
    if "vlm/image_gain_nats" in by_name:
        row = by_name["vlm/image_gain_nats"]
        low, high = row["ci95"]
        lines.append(f"seeing the image saves {row['value']:.3f} nats an answer (95% interval {low:.3f} to {high:.3f})")
    if "vlm/pretraining_gain" in by_name:
        row = by_name["vlm/pretraining_gain"]
        low, high = (100 * bound for bound in row["ci95"])
        lines.append(
            f"pretraining the encoder is worth {100 * row['value']:.1f} points ({low:.1f} to {high:.1f}, paired)"
        )
    return "\n".join(lines)


def _cell(row: Row | None, plain: bool) -> str:
    if row is None:
        return "-"
    low, high = row["ci95"]
    if plain:
        return f"{row['value']:.3f} ({low:.3f}-{high:.3f})"
    return f"{100 * row['value']:.1f}% ({100 * low:.1f}-{100 * high:.1f})"
