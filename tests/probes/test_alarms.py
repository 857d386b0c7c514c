"""Alarms: each level on its own, nothing said of a healthy run, and the broken settings on real short runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sslvit
from sslvit.config import PretrainConfig, load_config
from sslvit.data.loader import Loader
from sslvit.data.sources import open_source
from sslvit.encoder.config import Preprocessing
from sslvit.metrics import MetricsLog
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.optim import adamw, param_groups
from sslvit.probes.alarms import EVALUATIONS, LINES, Alarms, least_prototypes
from sslvit.signals import StopFlag
from sslvit.training import train
from sslvit.verbs.pretrain import Schedule

HEALTHY = {
    "loss": 4.0,
    "dino/target_entropy": 0.4,
    "dino/usage_entropy": 0.8,
    "dino/kl": 0.1,
    "ibot/target_entropy": 0.3,
    "ibot/usage_entropy": 0.7,
    "ibot/kl": 0.1,
    "mae/loss": 0.7,
    "health/token_spread": 0.8,
    "health/teacher_student_cosine": 0.9,
    "grad_norm": 1.5,
    "momentum": 0.996,
    "skipped": 0,
}
EVALUATED = {"rankme": 20.0, "feature_std": 0.04, "knn/top1": 0.4}


def config(**keys: Any) -> PretrainConfig:
    given = load_config(PretrainConfig, None, {"data": "x", "steps": 400, "dino": {}, "ibot": {}, "mae": {}, **keys})
    return resolve(given, DataFacts(5000, 32, 3, "cpu"))[0]


def said(changes: dict[str, float], alarms: Alarms | None = None, start: int = 100) -> dict[str, str]:
    """What is said in as many lines as it takes."""
    alarms, state, found = alarms or Alarms(config()), {}, {}
    key = EVALUATED if changes.keys() & EVALUATED.keys() else HEALTHY
    for i in range(max(LINES, EVALUATIONS)):
        if key is EVALUATED and i == 0:
            alarms({"step": 0, **EVALUATED}, state)
        found |= alarms({"step": start + i, **key, **changes}, state)
    return found


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"dino/target_entropy": 0.99, "dino/usage_entropy": 0.99}, "dino/uniform_targets", "stuck at ln K = 6.93"),
        ({"dino/target_entropy": 0.99, "dino/usage_entropy": 1.0}, "dino/uniform_targets", "has collapsed"),
        ({"dino/target_entropy": 0.01, "dino/usage_entropy": 0.02}, "dino/one_prototype", "all images fall on one"),
        ({"ibot/target_entropy": 0.01, "ibot/usage_entropy": 0.12}, "ibot/few_prototypes", "2.3 of 1024 prototypes"),
        ({"dino/target_entropy": 0.6, "dino/usage_entropy": 0.602}, "dino/same_targets", "the same for all of them"),
        ({"ibot/target_entropy": 0.99, "ibot/usage_entropy": 0.99}, "ibot/uniform_targets", "iBOT has collapsed"),
        ({"health/token_spread": 0.001}, "tokens/same", "koleo"),
        ({"health/teacher_student_cosine": 0.01}, "teacher/left_behind", "optim.momentum"),
        ({"momentum": 0.0}, "teacher/copy", "Raise optim.momentum"),
        ({"mae/loss": 0.999}, "mae/mean_patch", "raise optim.lr"),
        ({"grad_norm": 0.0}, "gradient/faded", "Raise optim.lr"),
        ({"skipped": 9}, "steps/skipped", "precision=fp32"),
        ({"rankme": 1.1}, "features/low_rank", "one direction"),
        ({"feature_std": 0.001}, "features/same", "nearly the same"),
        ({"knn/top1": 0.35}, "knn/fell", "from 40.0% at the start"),
    ],
)
def test_each_alarm_names_what_is_wrong_and_what_to_change(changes, name, words):
    found = said(changes)
    assert list(found) == [name]
    assert words in found[name] and "\n" not in found[name]


def test_a_healthy_run_is_left_alone():
    alarms, state = Alarms(config()), {}
    for step in range(0, 401, 4):
        assert alarms({"step": step, **HEALTHY}, state) == {}
        assert alarms({"step": step, **EVALUATED}, state) == {}


def test_at_the_start_of_a_run_nothing_is_said_of_its_lines():
    uniform = {"dino/target_entropy": 0.99, "dino/usage_entropy": 0.99}
    assert said(uniform, start=50) == {}
    assert said(uniform, start=100)


def test_few_samples_cannot_use_many_prototypes():
    few = {"dino/target_entropy": 0.01, "dino/usage_entropy": 0.12}
    assert said(few) and not said(few, Alarms(config(batch_size=2)))


def test_as_many_prototypes_are_wanted_as_an_eighth_of_the_targets():
    """Targets come from the teacher's views: one in the joint recipe of a small budget, two with DINO alone."""
    joint, alone = {"ibot": None, "batch_size": 16}, {"ibot": None, "mae": None, "batch_size": 16}
    assert config(**joint).dino.num_teacher_views == 1
    assert least_prototypes(config(**joint), "dino") == 16 / 8
    assert least_prototypes(config(**joint, accumulate=4), "dino") == 4 / 8
    assert least_prototypes(config(**alone), "dino") == 32 / 8
    assert least_prototypes(config(batch_size=1), "ibot") == pytest.approx(2 * 0.5 * 0.3 * 64 / 8)
    three = {"dino/target_entropy": 0.01, "dino/usage_entropy": 0.158}  # ln 3 / ln 1024
    assert not said(three, Alarms(config(**joint))) and said(three, Alarms(config(**alone)))


@pytest.mark.parametrize("keys", [{"batch_size": 1}, {"batch_size": 8, "accumulate": 8}])
@pytest.mark.parametrize("entropy", [0.6, 0.01])
def test_of_one_target_nothing_can_be_said_about_others(keys, entropy):
    """Its mean is itself, and so is the mean of one class token."""
    one = {"dino/target_entropy": entropy, "dino/usage_entropy": entropy - 1e-7, "health/token_spread": 0.0}
    assert said(one, Alarms(config(ibot=None, **keys))) == {}
    found = said(one, Alarms(config(ibot=None, **(keys | {"accumulate": 1, "batch_size": 4}))))
    assert found.keys() >= {"tokens/same"} and len(found) == 2


def test_one_line_is_no_alarm_and_an_alarm_is_said_once_and_ended():
    alarms, state = Alarms(config()), {}
    bad = {**HEALTHY, "dino/target_entropy": 0.99, "dino/usage_entropy": 0.99}
    heard = []
    for step, row in enumerate([bad, bad, HEALTHY, bad, bad, bad, bad, bad, HEALTHY, HEALTHY, bad], start=100):
        heard += [(step, text.split(":")[0]) for text in alarms({"step": step, **row}, state).values()]
    assert [step for step, _ in heard] == [105, 108] and heard[1][1] == "over"


def test_one_form_of_collapse_may_pass_into_another():
    alarms, state = Alarms(config()), {}
    same = {**HEALTHY, "dino/target_entropy": 0.9, "dino/usage_entropy": 0.9}
    uniform = {**HEALTHY, "dino/target_entropy": 0.99, "dino/usage_entropy": 0.99}
    heard = [list(alarms({"step": 100 + i, **row}, state)) for i, row in enumerate([same] * 4 + [uniform] * 4)]
    assert heard == [[], [], ["dino/same_targets"], [], [], [], ["dino/uniform_targets"], []]


def test_ibot_alone_is_told_apart_when_knn_falls():
    for dino, told in ({}, False), (None, True):
        text = said({"knn/top1": 0.3}, Alarms(config(dino=dino)))["knn/fell"]
        assert ("add dino={}" in text) is told and "lower optim.lr" in text


def test_the_last_evaluation_counts_at_once():
    alarms, state = Alarms(config()), {}
    alarms({"step": 0, **EVALUATED}, state)
    fallen = {**EVALUATED, "knn/top1": 0.1}
    assert alarms({"step": 200, **fallen}, state) == {}
    assert list(alarms({"step": 400, **EVALUATED, "knn/top1": 0.1}, {"first:knn/top1": 0.4})) == ["knn/fell"]


def test_a_run_that_ends_below_the_encoder_it_resized():
    """Above step 0 all the way, but init was better at its own size."""
    alarms, state = Alarms(config()), {}
    assert alarms({"step": 0, **EVALUATED, "knn/init/top1": 0.6}, state) == {}
    assert alarms({"step": 200, **EVALUATED, "knn/top1": 0.5}, state) == {}
    state = json.loads(json.dumps(state))
    found = alarms({"step": 400, **EVALUATED, "knn/top1": 0.55}, state)
    assert list(found) == ["knn/below_init"] and "ends at 55.0%, and init had 60.0%" in found["knn/below_init"]
    assert alarms({"step": 400, **EVALUATED, "knn/top1": 0.6}, {"first:knn/init/top1": 0.6}) == {}


def test_a_spike_of_the_gradient():
    alarms, state = Alarms(config()), {}
    for step in range(100, 120):
        assert alarms({"step": step, **HEALTHY}, state) == {}
    heard = {}
    for step in range(120, 125):
        heard |= alarms({"step": step, **HEALTHY, "grad_norm": 1000.0 * 10 ** (step - 120)}, state)
    assert list(heard) == ["gradient/spike"] and "optim.lr" in heard["gradient/spike"]


def test_a_line_of_skipped_steps_is_a_line():
    """It has no loss: it says nothing of an evaluation or of what was not measured, and counts as skipped."""
    alarms, state = Alarms(config()), {}
    alarms({"step": 0, **EVALUATED}, state)
    heard = []
    uniform = {**HEALTHY, "dino/target_entropy": 0.99, "dino/usage_entropy": 0.99}
    for step in range(100, 103):
        heard += alarms({"step": step, **uniform}, state)
        heard += alarms({"step": step, **EVALUATED, "rankme": 1.1}, state)
    assert heard == ["features/low_rank", "dino/uniform_targets"]
    skipped = {"lr": 1e-3, "momentum": 0.996}
    heard = [alarms({"step": 103 + i, **skipped, "skipped": 5 + i}, state) for i in range(LINES)]
    assert [list(one) for one in heard] == [[], [], ["steps/skipped"]], "nothing is over"
    assert "7 of 105 steps" in heard[-1]["steps/skipped"]


def test_memory_is_numbers_that_survive_json():
    """What is remembered goes through a checkpoint: cut anywhere, the same is said."""
    rows = [{"step": 100 + i, **HEALTHY, "dino/target_entropy": 0.99, "dino/usage_entropy": 0.99} for i in range(5)]
    for cut in range(5):
        state: dict[str, float] = {}
        heard = [Alarms(config())(row, state) for row in rows[:cut]]
        state = json.loads(json.dumps(state))
        heard += [Alarms(config())(row, state) for row in rows[cut:]]
        assert [bool(one) for one in heard] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dino": {"teacher_temperature": 1.0}}, "Lower dino.teacher_temperature (1; published .04 to .07)"),
        ({"dino": {"center_momentum": 1.0}}, "the centre stands still"),
        ({"optim": {"momentum": 0.0}}, "Raise optim.momentum (0; published .996"),
        (
            {"optim": {"momentum": 0.8}},
            "Raise optim.momentum (0.8; auto takes .99 and more): the teacher follows within a few steps",
        ),
        ({}, "dino.centering=sinkhorn"),
    ],
)
def test_the_remedy_is_the_setting_that_is_off(keys, words):
    found = said({"dino/target_entropy": 0.99, "dino/usage_entropy": 0.99}, Alarms(config(**keys)))
    assert words in found["dino/uniform_targets"]


def test_nan_raises_nothing():
    assert said(dict.fromkeys(EVALUATED, float("nan"))) == {}
    assert said({"grad_norm": float("nan"), "dino/target_entropy": float("nan")}) == {}


# ---- real runs ------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "data": "scenes:?n=64&size=32&objects=1",
    "steps": 40,
    "batch_size": 16,
    "precision": "fp32",
    "encoder": {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1}
    | {"num_heads": 2},
    "crops": {"num_local": 0},
}
HEAD = {"num_prototypes": 128, "head_hidden_dim": 64, "head_bottleneck_dim": 32}


def alarms_of(folder: Path, keys: dict[str, Any]) -> list[str]:
    """The names of the alarms that a short run raises."""
    given = load_config(PretrainConfig, None, {**SMALL, **keys})
    resolved, _ = resolve(given, DataFacts(64, 32, 3, "cpu"))
    torch.manual_seed(0)
    module = Pretraining(resolved, Preprocessing(32))
    source = open_source(str(resolved.data))
    loader = Loader(source, resolved.crops, resolved.photometry, 32, 3, 16, seed=0, num_workers=0)
    optim = resolved.optim
    train(
        module,
        loader,
        optimizer=adamw(param_groups(module, optim.weight_decay), optim.lr),
        schedule=Schedule(resolved),
        steps=resolved.steps,
        clip_norm=optim.clip_norm,
        device=torch.device("cpu"),
        folder=folder,
        checkpoint_every=999,
        metrics=MetricsLog(folder),
        stop=StopFlag(),
        watch=Alarms(resolved),
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["alarm"] for row in rows if "alarm" in row]


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"dino": HEAD | {"teacher_temperature": 1.0, "teacher_temperature_start": 1.0}}, "dino/uniform_targets"),
        ({"dino": HEAD | {"center_momentum": 1.0}, "optim": {"momentum": 0.7}}, "dino/one_prototype"),
        ({"dino": HEAD, "optim": {"momentum": 0.0, "momentum_end": 0.0}}, "teacher/copy"),
        ({"dino": HEAD | {"centering": "sinkhorn", "teacher_temperature": 1.0}}, "dino/uniform_targets"),
    ],
    ids=["temperature", "centre", "momentum", "sinkhorn"],
)
def test_broken_settings_raise_the_alarm(tmp_path, monkeypatch, keys, name):
    monkeypatch.setattr(MetricsLog, "_open_board", lambda self, resumed: None)
    assert name in alarms_of(tmp_path, keys)
    assert f", {name}: " in (tmp_path / "train.log").read_text()


def test_what_learns_raises_none(tmp_path, monkeypatch):
    monkeypatch.setattr(MetricsLog, "_open_board", lambda self, resumed: None)
    assert alarms_of(tmp_path, {"mae": {}}) == []


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.794])
def test_a_teacher_that_follows_at_once_collapses_and_autos_does_not(tmp_path, momentum):
    """DINO alone on pretrain/tiny_cpu, 60 steps; .794 is a twentieth of them as half-life."""
    keys = {"config_file": "pretrain/tiny_cpu", "data": "scenes:?n=512", "mae": None, "optim": {"momentum": momentum}}
    log = (sslvit.pretrain(output_dir=tmp_path / "run", **keys) / "train.log").read_text()
    assert ("DINO has collapsed" in log) == (momentum is not None), log
    assert ("the teacher follows within a few steps" in log) == (momentum is not None)
