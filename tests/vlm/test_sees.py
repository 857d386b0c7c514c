"""The sees-or-not table: who is asked what over which image, and what the numbers mean."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from vlm_fixtures import small_tokenizer

from sslvit.data.decode import BadFiles
from sslvit.data.pairs import CAPTION_PROMPT, open_pairs
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.weights import load_encoder
from sslvit.vlm.batches import PairImages, tokenize
from sslvit.vlm.config import LanguageConfig
from sslvit.vlm.connectors import MlpConnector
from sslvit.vlm.language import bundled_chat, bundled_language
from sslvit.vlm.model import VisionLanguage
from sslvit.vlm.sees import (
    Answers,
    Exam,
    alarms,
    captions_of,
    gain_row,
    others_images,
    prediction_lines,
    pretraining_rows,
    rows_of,
    set_exam,
    sit,
    table,
)
from sslvit.vlm.stages import encoded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    pairs = open_pairs("scenes:?n=30&size=32")
    images = PairImages(pairs, Preprocessing(32), BadFiles(tmp_path_factory.mktemp("bad") / "bad_files.jsonl"))
    return set_exam(images, 12, seed=0)


@pytest.fixture(scope="module")
def model():
    encoder = load_encoder(
        "vit_tiny_patch16_224?pretrained=false&img_size=32&patch_size=8&embed_dim=32&depth=1&num_heads=2"
    )
    config = LanguageConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_length=128)
    language = bundled_language(small_tokenizer(), config, 0)
    return VisionLanguage(encoder.module, MlpConnector(32, 32), language.lm, []).eval()


def said(exam, say):
    """Answers made by a function of the turn, at one nat each."""
    return Answers([[say(t) for t in turns] for turns in exam.turns], [[1.0] * len(turns) for turns in exam.turns])


def test_the_exam_is_drawn_by_the_seed(exam):
    again, other = (set_exam(exam.images, 12, seed) for seed in (0, 1))
    assert again.numbers == exam.numbers != other.numbers and again.turns == exam.turns
    assert len(set(exam.numbers)) == 12
    for turns in exam.turns:
        assert all(turn.question == CAPTION_PROMPT for turn in turns if turn.family == "caption")


@pytest.mark.parametrize("count", [2, 3, 50])
def test_nobody_keeps_the_own_image(count):
    others = others_images(count, seed=0)
    assert sorted(others) == list(range(count)) and all(other != i for i, other in enumerate(others))


def test_one_image_has_no_other():
    assert others_images(1, seed=0) == [0]


def test_nats_are_those_of_each_turn_alone(exam, model):
    chat = bundled_chat(small_tokenizer())
    answers = sit(model, exam, chat, CPU)
    for place in (0, 7):
        tokens = encoded(model, exam.images, [exam.numbers[place]], CPU)
        for turn, nats in zip(exam.turns[place], answers.nats[place], strict=True):
            (text,) = tokenize([turn], chat)
            ids = torch.tensor([[*text.prompt, *text.answer]])
            with torch.no_grad():
                embeds = torch.cat([model.prefix(tokens, 1), model.lm.get_input_embeddings()(ids)], dim=1)
                logits = model.lm(inputs_embeds=embeds).logits[0, -len(text.answer) - 1 :]
            expected = F.cross_entropy(logits, torch.tensor([*text.answer, chat.end_id]), reduction="sum")
            assert nats == pytest.approx(float(expected), abs=1e-3)


def test_a_shown_image_is_the_one_that_is_seen(exam, model):
    chat, count = bundled_chat(small_tokenizer()), len(exam.numbers)
    own, same = sit(model, exam, chat, CPU), sit(model, exam, chat, CPU, shown=list(range(count)))
    others = others_images(count, 0)
    shuffled = sit(model, exam, chat, CPU, shown=others)
    swapped = Exam(exam.images, [exam.numbers[p] for p in others], exam.turns)
    assert own.nats == same.nats
    np.testing.assert_allclose(np.concatenate(shuffled.nats), np.concatenate(sit(model, swapped, chat, CPU).nats))
    assert not np.allclose(np.concatenate(own.nats), np.concatenate(shuffled.nats))


def test_rows_of_right_and_of_half_right_answers(exam):
    right = {row["name"]: row for row in rows_of(exam, said(exam, lambda t: t.answer.upper() + "."), "", "d", 0, 5)}
    assert right["vlm/accuracy"]["value"] == 1.0 and right["vlm/accuracy"]["ci95"] == [1.0, 1.0]
    assert right["caption/bleu4"]["value"] == 1.0 and right["caption/cider"]["value"] > 1.0
    yes = {row["name"]: row for row in rows_of(exam, said(exam, lambda t: "yes"), "blind", "d", 0, 5)}
    asked = [t for turns in exam.turns for t in turns if t.family == "existence"]
    share = np.mean([t.answer == "yes" for t in asked])
    assert yes["vlm/blind/accuracy/existence"]["value"] == pytest.approx(share)
    assert yes["vlm/blind/accuracy/colour"]["value"] == 0.0 and "vlm/blind/accuracy/caption" not in yes


def test_captions_go_with_all_their_references(exam):
    predictions, references = captions_of(exam, said(exam, lambda t: "a " + t.family))
    assert set(predictions) == {"a caption"} and len(predictions) == len(references) == 12
    for turns, texts in zip(exam.turns, references, strict=True):
        assert texts == [t.answer for t in turns if t.family == "caption"]


def test_gain_is_what_the_blind_model_pays_more(exam):
    seeing, blind = said(exam, lambda t: ""), said(exam, lambda t: "")
    blind.nats = [[2.5] * len(row) for row in blind.nats]
    row = gain_row(exam, seeing, blind, "d", 0, 5)
    assert row["name"] == "vlm/image_gain_nats" and row["value"] == 1.5 and row["ci95"] == [1.5, 1.5]
    assert gain_row(exam, blind, seeing, "d", 0, 5)["value"] == -1.5


def test_what_pretraining_is_worth_is_paired_by_question(exam):
    own, random = said(exam, lambda t: t.answer), said(exam, lambda t: t.answer if t.family != "colour" else "no")
    random.nats = [[1.25] * len(row) for row in random.nats]
    rows = {row["name"]: row for row in pretraining_rows(exam, own, random, "d", 0, 5)}
    asked = [t for turns in exam.turns for t in turns if t.family != "caption"]
    lost = np.mean([t.family == "colour" for t in asked])
    low, high = rows["vlm/pretraining_gain"]["ci95"]
    assert rows["vlm/pretraining_gain"]["value"] == pytest.approx(lost) and 0 < low < lost < high
    assert rows["vlm/pretraining_gain_nats"]["value"] == 0.25 and rows["vlm/pretraining_gain_nats"]["ci95"] == [
        0.25,
        0.25,
    ]
    same = pretraining_rows(exam, random, random, "d", 0, 5)[0]
    assert same["value"] == 0 and same["ci95"] == [0, 0]  # unpaired intervals of the two would overlap, not vanish


def test_a_model_that_does_not_look_raises_the_alarm(exam):
    def rows(own, shuffled, gain):
        seeing, blind = said(exam, own), said(exam, lambda t: "")
        blind.nats = [[1.0 + gain] * len(row) for row in blind.nats]
        found = [*rows_of(exam, seeing, "", "d", 0, 5), *rows_of(exam, said(exam, shuffled), "shuffled", "d", 0, 5)]
        return [*found, gain_row(exam, seeing, blind, "d", 0, 5)]

    assert alarms(rows(lambda t: t.answer, lambda t: "no", 1.0)) == []
    assert len(alarms(rows(lambda t: "no", lambda t: "no", 0.0))) == 2


def test_table_and_lines_name_every_condition(exam):
    conditions = {"": said(exam, lambda t: t.answer), "blind": said(exam, lambda t: "no")}
    rows = [row for name, answers in conditions.items() for row in rows_of(exam, answers, name, "d", 0, 5)]
    text = table(rows, exam.families(), ["blind"])
    assert "model" in text and "blind" in text and "100.0%" in text and "colour" in text and "CIDEr-D" in text
    lines = prediction_lines(exam, conditions)
    assert len(lines) == sum(map(len, exam.turns))
    assert all(line["prediction"] == line["answer"] and line["blind"] == "no" for line in lines)
