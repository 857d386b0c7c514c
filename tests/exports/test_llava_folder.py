"""The VLM folder as strangers meet it: transformers alone, in a process in which sslvit cannot be imported."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from formats import encoder, write_untrained_vlm
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlm import session_root, tiny_run

from sslvit.data.decode import BadFiles
from sslvit.data.pairs import open_pairs
from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError
from sslvit.exports import llava_folder
from sslvit.exports.llava_folder import (
    WEIGHTS,
    Writing,
    additional_tokens,
    check_llava,
    compare_weights,
    llava_config,
    portable_text_config,
)
from sslvit.exports.verify import VerificationError
from sslvit.verbs.ask import ask, open_image
from sslvit.vlm.batches import PairImages
from sslvit.vlm.folder import answer_ids, compare_with_folder, open_folder

QUESTION = "How many objects are there?"

STRANGER = """
import json, sys
sys.modules["sslvit"] = None
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, image, question = sys.argv[1], Image.open(sys.argv[2]), sys.argv[3]
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
said = {"version": transformers.__version__, "class": type(model).__name__}
contents = {"string": "<image>\\n" + question, "list": [{"type": "image"}, {"type": "text", "text": question}]}
for name, content in contents.items():
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    said[name] = processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    said["tokens"] = ids[0, inputs["input_ids"].shape[1]:].tolist()
three = [processor.apply_chat_template([{"role": "user", "content": "<image>" + q}], add_generation_prompt=True)
         for q in (question, question + " And which of them is the largest, do you think?", "Why?")]
inputs = processor(images=[image] * 3, text=three, return_tensors="pt", padding=True)
said["padding"] = (inputs["attention_mask"] == 0).sum(1).tolist()
assert (inputs["attention_mask"].diff(dim=1) >= 0).all(), "padded on the left"
ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
said["batched"] = processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0].strip()
pipe = pipeline("image-text-to-text", model=folder)
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
for name, given in {"pipeline, list": {"text": chat}, "pipeline, string": {"images": image, "text": text}}.items():
    said[name] = pipe(**given, max_new_tokens=64, return_full_text=False)[0]["generated_text"].strip()
print("SAID " + json.dumps(said))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(session_root(tmp_path_factory))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "a.png"
    noise = np.random.default_rng(0).integers(0, 255, (36, 36, 3), dtype=np.uint8)  # the size after resizing
    Image.fromarray(noise).resize((35, 35)).save(path)
    return path


def ask_as_stranger(run, picture, python=sys.executable):
    command = [python, "-c", STRANGER, str(run / "vlm"), str(picture), QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    return json.loads(line.removeprefix("SAID "))


def same_as_ours(said, run, picture):
    """Token by token, and by every way of asking."""
    vlm = open_folder(run)
    assert said["tokens"] == answer_ids(vlm, [open_image(picture, vlm)], [QUESTION])[0].tolist()
    assert len(said["tokens"]) > 1 and said["padding"][0] > 0, "else this compares nothing"
    asked = ("list", "batched", "pipeline, list", "pipeline, string")
    assert {name: said["string"] for name in asked} == {name: said[name] for name in asked}
    assert said["list"] == ask(run, image=picture, question=QUESTION)
    assert said["class"] == "LlavaForConditionalGeneration"


def test_a_stranger_opens_it_and_gets_the_same_answers(run, picture):
    same_as_ours(ask_as_stranger(run, picture), run, picture)


@pytest.mark.slow
def test_a_stranger_with_transformers_4_57_too(run, picture, oldest_python):
    """The oldest version we support."""
    said = ask_as_stranger(run, picture, oldest_python)
    assert said["version"].startswith("4.57")
    same_as_ours(said, run, picture)


@pytest.mark.slow
def test_a_folder_is_compared_in_a_fresh_process(tmp_path):
    """What `align` does at its end, with the real subprocess."""
    loaded = encoder("twin")
    model, chat = write_untrained_vlm(loaded, tmp_path)
    images = PairImages(open_pairs("scenes:?n=4&size=32"), loaded.preprocessing, BadFiles(tmp_path / "bad.jsonl"))
    report = compare_with_folder(model, chat, tmp_path, images)
    assert report["library"] == "transformers"
    assert set(report["max_difference"]) == {"image tokens", "answers", "left-padded batch"}
    assert max(report["max_difference"].values()) < 1e-4


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained") / "vlm"
    folder.mkdir()
    loaded = encoder("ours")
    images = PairImages(open_pairs("scenes:?n=4&size=32"), loaded.preprocessing, BadFiles(folder.parent / "bad.jsonl"))
    return *write_untrained_vlm(loaded, folder), folder, images


def _other_template(folder):
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("| trim", ""))


def _right_padding(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"left"', '"right"'))


def _slightly_other_mean(folder):
    file = folder / "preprocessor_config.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"image_mean": [mean + 0.001 for mean in facts["image_mean"]]}))


def _slightly_other_std(folder):
    file = folder / "preprocessor_config.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"image_std": [std * 1.001 for std in facts["image_std"]]}))


def _missing_key(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["vision_tower.encoder.layer.1.layer_scale1.lambda1"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _other_activation(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["hidden_act"] = "gelu_pytorch_tanh"
    file.write_text(json.dumps(config))


def _other_theta(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_other_template, "other prompts of string contents"),
        (_right_padding, "left-padded batch: difference"),
        (_slightly_other_mean, "other pixels"),
        (_slightly_other_std, "other pixels"),
        (_missing_key, "weights missing or left over: .*lambda1"),
        (_other_activation, "other image tokens"),
        (_other_theta, "answers: difference"),
    ],
)
def test_a_damaged_folder_is_caught(untrained, tmp_path, damage, words):
    model, chat, folder, images = untrained
    shutil.copytree(folder, tmp_path / "vlm")
    compare_with_folder(model, chat, tmp_path / "vlm", images)
    damage(tmp_path / "vlm")
    with pytest.raises(RuntimeError, match=words):
        compare_with_folder(model, chat, tmp_path / "vlm", images)


def test_what_lies_on_disk_is_what_was_trained_bit_for_bit(untrained, tmp_path, monkeypatch):
    """Read back when it is written: a difference no answer would show."""
    *_, folder, _ = untrained
    trained = load_file(folder / WEIGHTS)
    compare_weights(folder, trained)
    honest = llava_folder.write_tensors

    def flipped(path, tensors):
        tensors["language_model.model.norm.weight"].view(torch.int32)[3] ^= 1
        honest(path, tensors)

    def forgetful(path, tensors):
        honest(path, {name: tensor for name, tensor in tensors.items() if not name.endswith("linear_2.bias")})

    for wrong, words in ((flipped, "norm.weight is not bit for bit"), (forgetful, "missing or left over: .*linear_2")):
        monkeypatch.setattr(llava_folder, "write_tensors", lambda path, ts, w=wrong: w(path, clones(ts)))
        with pytest.raises(VerificationError, match=words):
            write_untrained_vlm(encoder("ours"), tmp_path)


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", ["grey", "original"])
def test_other_forms_too(form, tmp_path, picture):
    """Grey: one channel all the way, and two turns share a picture. Original: it has a pooler, which nothing reads."""
    loaded = encoder(form)
    model, chat = write_untrained_vlm(loaded, tmp_path)
    images = PairImages(open_pairs("scenes:?n=4&size=32"), loaded.preprocessing, BadFiles(tmp_path / "bad.jsonl"))
    report = compare_with_folder(model, chat, tmp_path, images)
    assert max(report["max_difference"].values()) < 1e-4
    assert isinstance(ask(tmp_path, image=picture, question=QUESTION), str), "of a picture in colour"


@pytest.mark.parametrize(("form", "words"), [("rope", "rotary"), ("five_channels", "5 channels"), ("qk_norm", "keys")])
def test_encoders_that_no_folder_can_hold_are_refused_before_training(form, words):
    with pytest.raises(InputError, match=words):
        check_llava(encoder(form))


def test_files_and_names(run):
    folder = run / "vlm"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "verification.json",
    }
    assert json.loads((folder / "verification.json").read_text())["checks"][0]["library"] == "transformers"
    card = (folder / "README.md").read_text()
    assert "left-padded batch" in card and "| vlm/accuracy |" in card and "- Steps: text 6, connector 4" in card
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and tokenizer["padding_side"] == "left"
    assert "<image>" in tokenizer["additional_special_tokens"]
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "vision_tower.embeddings.register_tokens" in names and "language_model.lm_head.weight" in names
    assert (
        "multi_modal_projector.linear_2.bias" in names and "language_model.model.layers.0.mlp.up_proj.weight" in names
    )
    text = (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()
    assert str(run.parent) not in text, "no path of this machine"


@pytest.mark.parametrize("size", [(32, 32), (100, 60), (33, 200)])
def test_as_many_image_marks_as_image_tokens_at_any_size(run, size):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(run / "vlm")
    inputs = processor(images=Image.new("RGB", size), text="<image>What?", return_tensors="pt")
    config = json.loads((run / "vlm" / "config.json").read_text())
    assert int((inputs["input_ids"] == config["image_token_index"]).sum()) == config["image_seq_length"] == 16 + 3


def test_a_wrong_count_of_image_tokens_raises(run, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    broken = tmp_path / "broken"
    shutil.copytree(run / "vlm", broken)
    facts = json.loads((broken / "processor_config.json").read_text())
    (broken / "processor_config.json").write_text(json.dumps({**facts, "num_additional_image_tokens": 1}))
    inputs = AutoProcessor.from_pretrained(broken)(
        images=Image.new("RGB", (32, 32)), text="<image>?", return_tensors="pt"
    )
    with pytest.raises(ValueError, match="do not match"):
        AutoModelForImageTextToText.from_pretrained(broken)(**inputs)


def test_image_tokens_of_both_forms():
    assert additional_tokens({"model_type": "dinov2_with_registers", "num_register_tokens": 4}) == 5
    assert additional_tokens({"model_type": "dinov2"}) == 1
    assert additional_tokens({"model_type": "siglip_vision_model"}) == 0
    writing = Writing(None, "", image_id=2, end_id=1, pad_id=0)
    config = llava_config(
        {"model_type": "dinov2", "patch_size": 8}, {"model_type": "llama"}, writing, Preprocessing(48)
    )
    assert config["image_seq_length"] == 37 and config["vision_feature_layer"] == -1


def test_rotary_settings_under_both_names():
    text = portable_text_config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "_name_or_path": "/x"})
    assert text == {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 5e5}
    scaled = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    assert portable_text_config({"rope_parameters": scaled})["rope_scaling"] == scaled


def test_weights_are_fp32(run):
    assert {tensor.dtype for tensor in load_file(run / "vlm" / "model.safetensors").values()} == {torch.float32}


def test_the_folder_says_how_its_first_word_is_split(tmp_path_factory):
    """transformers 4.57 gives a byte-level tokenizer `add_prefix_space` of this file, false where it is not there."""
    folder = tiny_run(session_root(tmp_path_factory)) / "vlm"
    splits = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert splits["type"] == "ByteLevel" and config["add_prefix_space"] == splits["add_prefix_space"]
