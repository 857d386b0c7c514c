"""`sslvit ask` answers exactly what plain transformers answers, alone or in a batch."""

import json

import pytest
import torch
from PIL import Image
from tiny_vlm import session_root, tiny_run

from sslvit.data.scenes import Scenes
from sslvit.errors import InputError
from sslvit.verbs.ask import ask
from sslvit.vlm import folder as folder_module
from sslvit.vlm.folder import answer, answer_stream, inputs_of, open_folder

QUESTIONS = ["How many objects are there?", "Describe the image.", "What colour is the small star?"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(session_root(tmp_path_factory))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    scenes = Scenes(n=3, split="val", size=48)
    for i in range(3):
        Image.fromarray(scenes.read(i)).save(folder / f"{i}.png")
    return folder


def plain_transformers(folder, image, question):
    """As a stranger would write it from the transformers documentation."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("question", QUESTIONS[:2])
def test_ask_is_plain_transformers(run, pictures, question):
    expected = plain_transformers(run / "vlm", Image.open(pictures / "0.png"), question)
    assert ask(run, image=pictures / "0.png", question=question) == expected


def test_batch_is_single(run, pictures):
    """Left padding: other rows of a batch change neither the answer nor, beyond float error, its probabilities."""
    vlm = open_folder(run)
    images = [Image.open(pictures / f"{i}.png") for i in range(3)]
    assert answer(vlm, images, QUESTIONS) == [answer(vlm, [i], [q])[0] for i, q in zip(images, QUESTIONS, strict=True)]
    with torch.no_grad():
        batch = vlm.model(**inputs_of(vlm, images, QUESTIONS)).logits[:, -1].log_softmax(-1)
        for i in range(3):
            alone = vlm.model(**inputs_of(vlm, images[i : i + 1], QUESTIONS[i : i + 1])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(batch[i], alone, atol=1e-4, rtol=1e-4)


def test_right_padding_would_not_be(run, pictures):
    vlm = open_folder(run)
    vlm.processor.tokenizer.padding_side = "right"
    images = [Image.open(pictures / f"{i}.png") for i in range(3)]
    padded = inputs_of(vlm, images, QUESTIONS)["input_ids"]
    assert (padded[:, -1] == vlm.processor.tokenizer.pad_token_id).any()


def test_jsonl(run, pictures, tmp_path, capsys):
    rows = [{"image": f"{i}.png", "question": q, "answer": "?", "id": i} for i in range(3) for q in QUESTIONS]
    source = pictures / "questions.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert ask(run / "vlm", jsonl=source, output_file=tmp_path / "a" / "out.jsonl") == tmp_path / "a" / "out.jsonl"
    answered = [json.loads(line) for line in (tmp_path / "a" / "out.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in answered] == rows
    for row in answered[:2]:
        assert row["prediction"] == ask(run, image=pictures / row["image"], question=row["question"])
    assert "9 answers" in capsys.readouterr().out


def test_unreadable_images_of_a_jsonl_are_named(run, pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    lines = [{"image": str(pictures / "0.png"), "question": "Q?"}, {"image": "bad.png", "question": "Q?"}]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines))
    ask(run, jsonl=source, output_file=tmp_path / "out.jsonl")
    good, bad = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert isinstance(good["prediction"], str) and bad["prediction"] is None and bad["error"]
    source.write_text(json.dumps(lines[1]))
    with pytest.raises(InputError, match="none of its 1 images"):
        ask(run, jsonl=source, output_file=tmp_path / "out.jsonl")


def test_stream_gives_the_same_answer(run, pictures):
    vlm = open_folder(run)
    picture = Image.open(pictures / "1.png")
    pieces = list(answer_stream(vlm, picture, "Describe the image."))
    assert "".join(pieces).strip() == answer(vlm, [picture], ["Describe the image."])[0]


def test_grey_and_turned_images_are_taken(run, pictures, tmp_path):
    grey = Image.open(pictures / "0.png").convert("L")
    exif = grey.getexif()
    exif[0x0112] = 6
    grey.save(tmp_path / "grey.jpg", exif=exif)
    assert isinstance(ask(run, image=tmp_path / "grey.jpg", question="Describe the image."), str)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "give image and question"),
        ({"image": "x.png"}, "give image and question"),
        ({"image": "x.png", "question": "?", "jsonl": "x", "output_file": "y"}, "give image and question"),
        ({"image": "x.png", "question": "?"}, "x.png: no such file"),
        ({"jsonl": "x.jsonl", "output_file": "y"}, "x.jsonl: no such file"),
    ],
)
def test_wrong_calls(run, keys, message):
    with pytest.raises(InputError, match=message):
        ask(run, **keys)


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"image": "a.png"}', '{"question": "?"}', '{"image": "", "question": ""}']
)
def test_wrong_lines_are_named(run, tmp_path, line):
    source = tmp_path / "in.jsonl"
    source.write_text('{"image": "a.png", "question": "?"}\n' + line)
    with pytest.raises(InputError, match="line 2"):
        ask(run, jsonl=source, output_file=tmp_path / "out.jsonl")


def test_what_is_no_vlm(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        ask(tmp_path / "none", image="x", question="?")
    with pytest.raises(InputError, match="holds no vision-language model"):
        ask(tmp_path, image="x", question="?")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="'bert' model, not llava"):
        folder_module.find_vlm(tmp_path)
