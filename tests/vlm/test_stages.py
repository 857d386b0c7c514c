"""Stages: what learns, how fast, and that a few steps do learn to see."""

import itertools

import pytest
import torch
from vlm_fixtures import small_tokenizer

from sslvit.data.decode import BadFiles
from sslvit.data.pairs import open_pairs
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.weights import load_encoder
from sslvit.metrics import MetricsLog
from sslvit.signals import StopFlag
from sslvit.vlm.batches import PairImages
from sslvit.vlm.config import LanguageConfig, StageConfig
from sslvit.vlm.connectors import MlpConnector
from sslvit.vlm.language import bundled_chat, bundled_language
from sslvit.vlm.model import VisionLanguage
from sslvit.vlm.sees import set_exam, sit
from sslvit.vlm.stages import Runtime, Stage, StageSchedule, _prepare, make_batches, run_stage

ENCODER = "vit_tiny_patch16_224?pretrained=false&img_size=32&patch_size=8&embed_dim=32&depth=1&num_heads=2"
CPU = torch.device("cpu")


def network(form=""):
    config = LanguageConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_length=128)
    language = bundled_language(small_tokenizer(), config, 0)
    return VisionLanguage(load_encoder(ENCODER + form).module, MlpConnector(32, 32), language.lm, [])


def images_of(tmp_path, spec):
    return PairImages(open_pairs(spec), Preprocessing(32), BadFiles(tmp_path / "bad_files.jsonl"))


def runtime(tmp_path):
    return Runtime(CPU, "fp32", 0, None, 1, StopFlag(), MetricsLog(tmp_path))


@pytest.mark.parametrize(
    ("rates", "learns"),
    [
        ({"connector_lr": 1e-2}, {"connector"}),
        ({"connector_lr": 1e-2, "lm_lr": 1e-2}, {"connector", "lm"}),
        ({"connector_lr": 1e-2, "lm_lr": 1e-2, "encoder_lr": 1e-2}, {"encoder", "connector", "lm"}),
    ],
)
def test_only_parts_with_a_rate_change(tmp_path, rates, learns):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = StageConfig(steps=3, batch_size=4, num_turns=3, warmup=0.0, **rates)
    images, chat = images_of(tmp_path, "scenes:?n=8&size=32"), bundled_chat(small_tokenizer())
    run_stage("instruct", config, model, images, chat, tmp_path / "stage", runtime(tmp_path))
    changed = {name.split(".")[0] for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == learns


@pytest.mark.parametrize("rates", [{"connector_lr": 1e-2}, {"connector_lr": 1e-2, "lm_lr": 1e-2, "encoder_lr": 1e-2}])
@pytest.mark.parametrize("form", ["", "&reg_tokens=2", "&class_token=false&global_pool=avg&fc_norm=true"])
def test_every_parameter_that_learns_gets_a_gradient(tmp_path, rates, form):
    """With several processes a parameter without one stops the run (training.py)."""
    model = network(form)
    config = StageConfig(steps=1, batch_size=4, num_turns=3, **rates)
    images, chat = images_of(tmp_path, "scenes:?n=8&size=32"), bundled_chat(small_tokenizer())
    learns = _prepare(model, config, CPU)
    batch, _ = next(iter(make_batches("instruct", config, model, images, chat, runtime(tmp_path))))
    stage = Stage(model, learns, images.preprocessing.mean, images.preprocessing.std)
    stage(batch, 0)[0].backward()
    trainable = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
    assert trainable and [name for name, parameter in trainable.items() if parameter.grad is None] == []


def test_rates_follow_the_schedule_and_keep_their_shares():
    config = StageConfig(steps=100, connector_lr=1e-2, lm_lr=1e-3, warmup=0.1, weight_decay=0.2)
    rates = [StageSchedule(config)(step) for step in range(101)]
    assert rates[0]["lr"] == 0.0 and rates[9]["lr"] == pytest.approx(1e-2) and rates[100]["lr"] == pytest.approx(1e-4)
    assert all(a["lr"] >= b["lr"] for a, b in itertools.pairwise(rates[10:]))
    assert {rate["weight_decay"] for rate in rates} == {0.2}


@pytest.mark.parametrize(
    ("steps", "rates", "see"), [(50, {}, "tokens"), (1, {}, "images"), (50, {"encoder_lr": 1e-4}, "images")]
)
def test_tokens_are_kept_where_the_encoder_is_frozen_and_all_images_come(tmp_path, steps, rates, see):
    config = StageConfig(steps=steps, batch_size=4, connector_lr=1e-3, **rates)
    images, chat = images_of(tmp_path, "scenes:?n=8&size=32"), bundled_chat(small_tokenizer())
    assert make_batches("instruct", config, network(), images, chat, runtime(tmp_path)).see == see


def test_it_learns_to_see(tmp_path):
    """Eight images by heart: the true answers cost little over the own image and much over another's."""
    model, chat = network(), bundled_chat(small_tokenizer())
    images = images_of(tmp_path, "scenes:?n=8&size=32&objects=1")
    config = StageConfig(steps=150, batch_size=8, num_turns=4, connector_lr=5e-3, lm_lr=5e-3, encoder_lr=2e-3)
    run_stage("instruct", config, model, images, chat, tmp_path / "stage", runtime(tmp_path))
    exam = set_exam(images, 8, seed=0)
    own, other = sit(model, exam, chat, CPU), sit(model, exam, chat, CPU, shown=[*range(1, 8), 0])

    def mean_nats(answers):
        values = [nats for row in answers.nats for nats in row]
        return sum(values) / len(values)

    assert mean_nats(own) < 0.5 * mean_nats(other)
