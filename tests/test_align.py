"""`sslvit align` end to end on tiny scenes: the folder, the weight that stays, resume, the table, and the guards."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_vlm import REGISTERS, SIGLIP, session_root, settings, stage, tiny_run

from sslvit.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint
from sslvit.encoder.weights import load_encoder
from sslvit.errors import InputError
from sslvit.exports.hf_folder import hf_state
from sslvit.verbs.align import align

CONDITIONS = ("", "blind/", "shuffled/", "random_encoder/")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(session_root(tmp_path_factory))


def tensors_of(run):
    return load_file(run / "vlm" / "model.safetensors")


def test_results_hold_every_condition(run):
    rows = {row["name"]: row for row in json.loads((run / "results.json").read_text())}
    for condition in CONDITIONS:
        row = rows[f"vlm/{condition}accuracy"]
        low, high = row["ci95"]
        assert 0 <= low <= row["value"] <= high <= 1 and row["data"] == settings()["data"]
        assert f"vlm/{condition}accuracy/colour" in rows and f"caption/{condition}cider" in rows
    assert rows["vlm/image_gain_nats"]["protocol"].startswith("nats of the true answer")


def test_accuracy_is_that_of_the_predictions(run):
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    rows = {row["name"]: row["value"] for row in json.loads((run / "results.json").read_text())}
    asked = [line for line in lines if line["family"] != "caption"]
    assert {"image", "question", "answer", "prediction", "blind", "shuffled", "random_encoder"} <= set(lines[0])
    right = np.mean([line["prediction"].lower() == line["answer"].lower() for line in asked])
    assert rows["vlm/accuracy"] == pytest.approx(right)
    gain = np.mean([line["blind_nats"] - line["nats"] for line in lines])
    assert rows["vlm/image_gain_nats"] == pytest.approx(gain, abs=1e-3)


def test_finished_run_returns_at_once(run, capsys):
    before = (run / "vlm" / "model.safetensors").stat().st_mtime_ns
    assert align(output_dir=run, **settings()) == run
    assert "finished already" in capsys.readouterr().out
    assert (run / "vlm" / "model.safetensors").stat().st_mtime_ns == before


def test_the_trained_encoder_stands_in_the_folder_bit_for_bit(run):
    root = run / "stages" / "instruct" / "checkpoints"
    saved, _ = load_checkpoint(checkpoint_path(root, max(checkpoint_steps(root))), stems=["model"])
    trained = load_encoder(REGISTERS).module
    begun = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    learned = {n.removeprefix("learning.encoder."): t for n, t in saved["model"].items() if "learning.encoder." in n}
    trained.load_state_dict(learned)
    assert not torch.equal(begun["blocks.0.attn.qkv.weight"], learned["blocks.0.attn.qkv.weight"]), "it was unfrozen"
    folder = tensors_of(run)
    for name, tensor in hf_state(trained)[1].items():
        assert torch.equal(folder[f"vision_tower.{name}"], tensor), name


def test_a_frozen_encoder_stays_what_it_was_and_stages_leave_it_alone(tmp_path):
    keys = settings(text=stage(1), connector=stage(2), instruct=stage(2), controls=[])
    run = align(output_dir=tmp_path / "run", **keys)
    folder = tensors_of(run)
    for name, tensor in hf_state(load_encoder(REGISTERS).module)[1].items():
        assert torch.equal(folder[f"vision_tower.{name}"], tensor), name
    root = run / "stages" / "connector" / "checkpoints"
    saved, _ = load_checkpoint(checkpoint_path(root, 2), stems=["model"])
    assert {name.split(".")[1] for name in saved["model"]} == {"connector"}, "only what learns is saved"


def test_the_siglip_form(tmp_path):
    keys = settings(encoder=SIGLIP, text=stage(1), connector=stage(1), instruct=stage(1), controls=[])
    run = align(output_dir=tmp_path / "run", **keys)
    config = json.loads((run / "vlm" / "config.json").read_text())
    assert config["vision_config"]["model_type"] == "siglip_vision_model" and config["image_seq_length"] == 16


@pytest.mark.parametrize("killed_in", ["connector", "instruct"])
def test_a_run_that_is_killed_ends_as_if_it_was_not(run, tmp_path, monkeypatch, killed_in):
    """Stops in the middle of a stage, by an error no code can catch in time, then the same command."""

    class Killed(BaseException):
        pass

    from sslvit.vlm import stages

    forward = stages.Stage.forward

    def dying(self, batch, step):
        if step == 3 and len(self.learning) == {"connector": 1, "instruct": 3}[killed_in]:
            raise Killed
        return forward(self, batch, step)

    keys = settings(checkpoint={"every": 2})
    monkeypatch.setattr(stages.Stage, "forward", dying)
    with pytest.raises(Killed):
        align(output_dir=tmp_path / "run", **keys)
    monkeypatch.setattr(stages.Stage, "forward", forward)
    assert not (tmp_path / "run" / "vlm").exists()
    resumed = tensors_of(align(output_dir=tmp_path / "run", **keys))
    straight = tensors_of(run)
    assert set(resumed) == set(straight)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_frozen_tokens_train_to_the_same_model(tmp_path, monkeypatch):
    """Image tokens kept from one pass over the images, or computed in every step: the same training."""
    keys = settings(text=stage(1), connector=stage(3), instruct=stage(12), controls=[])
    kept = tensors_of(align(output_dir=tmp_path / "kept", **keys))
    monkeypatch.setattr("sslvit.vlm.stages.IN_MEMORY", 0)
    live = tensors_of(align(output_dir=tmp_path / "live", **keys))
    for name in kept:
        torch.testing.assert_close(kept[name], live[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": None}, "encoder is missing"),
        ({"data": None}, "data is missing"),
        ({"controls": ["deaf"]}, "controls=deaf"),
        ({"precision": "fp64"}, "precision is"),
        ({"lora": {}}, "lora"),
        ({"num_val_images": 0}, "num_val_images=0"),
        ({"text": {"connector_lr": 0.1}}, "text stage has no image"),
        ({"instruct": {"lm_lr": -1.0}}, "instruct.lm_lr is -1"),
        ({"instruct": {"num_turns": 0}}, "num_turns"),
        ({"language": {"max_length": 18}}, "raise language.max_length"),
        ({"language": {"max_length": 24}, "text": {"steps": 0}}, "no answer to learn from"),
        ({"language": {"hidden_size": 33}}, "language.hidden_size"),
        ({"lm": "/nowhere"}, "no causal language model"),
        ({"encoder": "/nowhere"}, "/nowhere"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        align(output_dir=tmp_path / "run", **{**settings(), **changes})
    assert "\n" not in str(caught.value)


def test_pairs_without_text_are_refused(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match="without text"):
        align(output_dir=tmp_path / "run", **settings(data=str(tmp_path)))


def test_a_wrong_weight_in_the_folder_is_caught(run, tmp_path):
    """The comparison with transformers, which ends every align, fails for a folder with one weight changed."""
    from safetensors.torch import save_file

    from sslvit.data.decode import BadFiles
    from sslvit.data.pairs import open_pairs
    from sslvit.vlm.batches import PairImages
    from sslvit.vlm.connectors import MlpConnector
    from sslvit.vlm.folder import compare_with_folder
    from sslvit.vlm.language import bundled_language, kept_tokenizer
    from sslvit.vlm.model import VisionLanguage

    tensors = tensors_of(run)
    keys = settings()
    tokenizer = kept_tokenizer(run / "stages" / "tokenizer.json", list, 0)
    language = bundled_language(tokenizer, _language_config(keys), 0)
    prefix = "language_model."
    language.lm.load_state_dict({n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)})
    connector = MlpConnector(32, 32)
    prefix = "multi_modal_projector."
    connector.load_state_dict({n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)})
    encoder = load_encoder(str(run / "vlm"))
    model = VisionLanguage(encoder.module, connector, language.lm, [])
    images = PairImages(open_pairs(keys["data"]), encoder.preprocessing, BadFiles(tmp_path / "bad.jsonl"))
    report = compare_with_folder(model, language.chat, run / "vlm", images)
    assert max(report["max_difference"].values()) < 1e-4
    broken = tmp_path / "broken"
    shutil.copytree(run / "vlm", broken)
    tensors["multi_modal_projector.linear_1.weight"][0, 0] += 10.0
    save_file(tensors, str(broken / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="other log probabilities"):
        compare_with_folder(model, language.chat, broken, images)


def _language_config(keys):
    from sslvit.vlm.config import LanguageConfig

    return LanguageConfig(**keys["language"])
