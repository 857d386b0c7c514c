"""Pairs from fake sources with every form of text, their split by image, and scenes as pairs."""

import json

import numpy as np
import pytest

from sslvit.data.pairs import CAPTION_PROMPT, Turn, open_pairs, pairs_of, parse_turns, split_by_image, text_corpus
from sslvit.data.scene_text import FAMILIES
from sslvit.errors import InputError


class Rows:
    """A source whose rows are (name, text)."""

    labels: dict = {}  # noqa: RUF012
    class_names: dict = {}  # noqa: RUF012

    def __init__(self, rows, spec="tar:fake", has_text=True):
        self.rows, self.spec, self.has_text = rows, spec, has_text

    def __len__(self):
        return len(self.rows)

    def name(self, index):
        return self.rows[index][0]

    def read(self, index):
        return np.full((2, 2, 3), index, dtype=np.uint8)

    def text(self, index):
        return self.rows[index][1]


def test_every_form_of_text_becomes_turns():
    assert parse_turns({"captions": ["a dog", " a black dog \n"]}) == [
        Turn(CAPTION_PROMPT, "a dog", "caption"),
        Turn(CAPTION_PROMPT, "a black dog", "caption"),
    ]
    assert (
        parse_turns({"captions": "a dog"})
        == parse_turns({"text": "a dog"})
        == [Turn(CAPTION_PROMPT, "a dog", "caption")]
    )
    assert parse_turns({"question": "How many?", "answer": 3}) == [Turn("How many?", "3", "question")]
    assert parse_turns({"question": "Dog?", "answer": False, "choices": ["yes", "no"], "family": "existence"}) == [
        Turn("Dog?", "no", "existence", ("yes", "no"))
    ]
    said = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Its colour?\n<image>"},
        {"from": "gpt", "value": "Black."},
    ]
    assert parse_turns({"conversations": said}) == [
        Turn("What is it?", "A dog.", "conversation"),
        Turn("Its colour?", "Black.", "conversation"),
    ]
    assert len(parse_turns({"conversations": said, "captions": ["a dog"], "question": "q", "answer": "a"})) == 4


@pytest.mark.parametrize(
    "text",
    [
        None,
        {},
        {"captions": []},
        {"captions": ["", "  "]},
        {"captions": [None, {"a": 1}]},
        {"question": "What?", "answer": ""},
        {"question": "What?"},
        {"question": "", "answer": "x"},
        {"question": "What?", "answer": float("nan")},
        {"question": "What?", "answer": ["x"]},
        {"conversations": "hello"},
        {"conversations": ["a", "b"]},
        {"conversations": [{"from": "gpt", "value": "A dog."}]},
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dog."}]},
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": ""}]},
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "human", "value": "So?"}]},
        {"conversations": [{"value": "What?"}, {}]},
    ],
)
def test_empty_or_malformed_text_is_no_turn(text):
    assert parse_turns(text) == []


def test_rows_without_text_are_left_out_and_counted():
    rows = [("a", {"captions": ["one"]}), ("b", None), ("c", {"question": "q", "answer": " "}), ("d", {"text": "two"})]
    pairs = pairs_of(Rows(rows))
    assert len(pairs) == 2 and pairs.skipped == 2 and pairs.spec == "tar:fake"
    assert [pairs.name(i) for i in range(2)] == ["a", "d"]
    assert pairs.read(1)[0, 0, 0] == 3
    assert pairs.turns(1) == [Turn(CAPTION_PROMPT, "two", "caption")] and pairs.references(1) == ["two"]


@pytest.mark.parametrize(
    "source",
    [
        Rows([("a", None)], spec="folder:/photos", has_text=False),
        Rows([("a", None), ("b", {"captions": [""]})], spec="folder:/photos"),
    ],
)
def test_no_text_at_all_is_one_line(source):
    with pytest.raises(InputError) as raised:
        pairs_of(source)
    assert "folder:/photos" in str(raised.value) and "caption" in str(raised.value) and "\n" not in str(raised.value)


def _questions(image, number):
    return [(image, {"question": f"q{n}", "answer": f"a{n}"}) for n in range(number)]


def test_rows_of_one_image_file_become_one_image():
    rows = [*_questions("x.jpg", 2), *_questions("y.jpg", 1), *_questions("x.jpg", 1)]
    pairs = pairs_of(Rows(rows, spec="jsonl:f"))
    assert len(pairs) == 2
    assert [turn.question for turn in pairs.turns(0)] == ["q0", "q1", "q0"]
    assert pairs.read(1)[0, 0, 0] == 2
    assert len(pairs_of(Rows(rows, spec="parquet:f"))) == 4  # there, equal names may be different images


def test_split_by_image_is_stable_and_keeps_images_whole():
    rows = [row for n in range(300) for row in _questions(f"{n}.jpg", 2)]
    pairs = pairs_of(Rows(rows))
    train, val = split_by_image(pairs, 0.2, seed=1)
    names = [{side.name(i) for i in range(len(side))} for side in (train, val)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 300
    assert len(train) + len(val) == 600 and 30 < len(names[1]) < 90
    more = pairs_of(Rows([*_questions("new.jpg", 1), *rows]))
    again = split_by_image(more, 0.2, seed=1)[1]
    assert {again.name(i) for i in range(len(again))} - {"new.jpg"} == names[1]
    other = split_by_image(pairs, 0.2, seed=2)[1]
    assert {other.name(i) for i in range(len(other))} != names[1]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_neither_side_of_a_split_is_empty(fraction):
    train, val = split_by_image(pairs_of(Rows(_questions("a", 2) + _questions("b", 2))), fraction, seed=0)
    assert len(train) == len(val) == 2


def test_one_image_cannot_be_split():
    pairs = pairs_of(Rows(_questions("a", 3)))
    with pytest.raises(InputError, match="val_data"):
        split_by_image(pairs, 0.5, seed=0)
    with pytest.raises(InputError, match="between 0 and 1"):
        split_by_image(pairs, 1.0, seed=0)


def test_names_that_are_no_utf8_are_split_too():
    pairs = pairs_of(Rows(_questions("a\udcff.jpg", 1) + _questions("b.jpg", 1)))
    assert sum(len(side) for side in split_by_image(pairs, 0.5, seed=0)) == 2


def test_text_corpus_draws_from_the_whole_set():
    pairs = pairs_of(Rows([(str(n), {"text": f"picture {n}"}) for n in range(1000)]))
    lines = list(text_corpus(pairs, 200))
    assert len(set(lines)) == 200 and lines == list(text_corpus(pairs, 200))
    assert all(line.startswith(CAPTION_PROMPT) for line in lines)
    numbers = sorted(int(line.split()[-1]) for line in lines)
    assert numbers[0] < 50 and numbers[-1] > 950
    assert len(list(text_corpus(pairs, 5000))) == 1000 and list(text_corpus(pairs, 0)) == []


def test_scenes_are_pairs():
    pairs = open_pairs("scenes:?n=50&seed=2&size=32")
    assert len(pairs) == 50
    assert pairs.families() == [*FAMILIES, "caption"]
    captions = [turn for turn in pairs.turns(3) if turn.family == "caption"]
    assert pairs.references(3) == [captions[0].answer] == [pairs.source.captions(3)[0]]
    assert len({turn.question for turn in captions}) == len(captions)
    assert pairs.turns(3)[len(captions) :] == pairs.source.questions(3)
    train, val = split_by_image(pairs, 0.2, seed=0)
    assert len(train) + len(val) == 50 and (val.read(0) == pairs.source.read(val.rows[0][0])).all()


def test_jsonl_with_questions_opens(tmp_path):
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows = [
        {"image": "a.png", "question": "What?", "answer": "this"},
        {"image": "a.png", "question": "Where?", "answer": "here"},
        {
            "image": "b.png",
            "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "me"}],
        },
        {"image": "b.png", "captions": ["a", "b"]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = open_pairs(f"jsonl:{tmp_path / 'rows.jsonl'}")
    assert [[turn.answer for turn in pairs.turns(i)] for i in range(len(pairs))] == [["this", "here"], ["me", "a", "b"]]
    assert isinstance(pairs.read(0), bytes)


def test_folder_without_text_is_no_pairs(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="without text"):
        open_pairs(str(tmp_path))


def test_real_captions(real_data):
    pairs = open_pairs(f"tar:{real_data}/flickr8k/*.tar")
    assert len(pairs.references(0)) == 5
    train, val = split_by_image(pairs, 0.1, seed=0)
    assert 0.05 < len(val) / len(pairs) < 0.15 and len(train) + len(val) == len(pairs)
