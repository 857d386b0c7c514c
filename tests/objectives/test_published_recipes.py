"""The shipped recipes: each loads, resolves, states its source, holds the published numbers, and makes a step."""

import dataclasses
import json
import math

import pytest
import torch

import sslvit
from sslvit.config import PretrainConfig, check_config, load_config, shipped_file
from sslvit.data.loader import CACHE_BYTES, Views
from sslvit.encoder.config import Preprocessing
from sslvit.objectives.cost import cost
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.optim import adamw, param_groups
from sslvit.verbs import pretrain as verb
from sslvit.verbs.pretrain import Schedule

IMAGENET = DataFacts(1_281_167, 375, 3, "cuda")
PUBLISHED = {
    "dino_vits16": {"epochs": 100, "objectives": {"dino"}},
    "dino_vitb16": {"epochs": 400, "objectives": {"dino"}},
    "mae_vitb16": {"epochs": 1600, "objectives": {"mae"}},
    "mae_vitl16": {"epochs": 800, "objectives": {"mae"}},
    "ibot_vits16": {"epochs": 800, "objectives": {"dino", "ibot"}},
    "dinov2_vitl16_short": {"objectives": {"dino", "ibot", "koleo"}},
    "dino_mae_vits16": {"epochs": 100, "objectives": {"dino", "mae"}},
}
HEADER = ("Source:", "Published:", "Command:", "Hardware:", "Hours:", "Numbers:")


def load(name):
    config = load_config(PretrainConfig, f"pretrain/{name}", {"data": "x"})
    check_config(config)
    return config


def resolved(name):
    config, reasons = resolve(load(name), IMAGENET)
    check_config(config)
    return config, reasons


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_header_says_where_it_comes_from(name):
    header = [line for line in shipped_file("configs", f"pretrain/{name}").read_text().splitlines() if line[:1] == "#"]
    for word in HEADER:
        assert any(line.startswith(f"# {word}") for line in header), word
    (command,) = (line for line in header if "Command:" in line)
    assert f"--config-file pretrain/{name} " in command


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_the_published_recipe(name):
    config, reasons = resolved(name)
    expected = PUBLISHED[name]
    assert {key for key in ("dino", "ibot", "koleo", "mae") if getattr(config, key)} == expected["objectives"]
    if "epochs" in expected:
        assert config.steps == expected["epochs"] * (IMAGENET.num_images // config.batch_size)
    assert (
        config.encoder.name == f"vit_{ {'s': 'small', 'b': 'base', 'l': 'large'}[name.split('vit')[1][0]] }_patch16_224"
    )
    assert {key.split(".")[0] for key in reasons} <= {
        "encoder",
        "precision",
        "dino",
        "ibot",
        "checkpoint",
        "knn",
        "optim",
        "crops",
        "photometry",
        "compile",
    }
    assert (config.photometry.jitter_prob, config.photometry.global_solarize_prob[-1]) == (
        (0.0, 0.0) if expected["objectives"] == {"mae"} else (0.8, 0.2)
    )
    if config.dino is not None:  # no published recipe is the small-budget form
        assert (config.dino.weight, config.dino.student_visible_ratio, config.dino.num_teacher_views) == (1.0, 1.0, 2)
        assert (config.dino.head_hidden_dim, config.dino.head_bottleneck_dim) == (2048, 256)
        assert config.dino.center_momentum == 0.9
    if config.ibot is not None:
        assert config.ibot.shared_head and config.ibot.num_prototypes == config.dino.num_prototypes


def test_learning_rates_follow_the_published_rules():
    rate = {name: (load(name).optim.lr, load(name).batch_size) for name in PUBLISHED}
    for name in ("dino_vits16", "ibot_vits16", "dino_mae_vits16"):  # DINO's 5e-4 and iBOT's, linear in the batch
        assert rate[name][0] == pytest.approx(5e-4 * rate[name][1] / 256)
    assert rate["dino_vitb16"][0] == pytest.approx(7.5e-4 * rate["dino_vitb16"][1] / 256)
    for name in ("mae_vitb16", "mae_vitl16"):
        assert rate[name][0] == pytest.approx(1.5e-4 * rate[name][1] / 256)
    assert rate["dinov2_vitl16_short"][0] == pytest.approx(4e-3 * math.sqrt(2048 / 1024))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "mae_vit" not in name or "dino" in name])
def test_auto_has_the_published_momentum_at_their_batches(name):
    config = load(name)
    published, config.optim.momentum = config.optim.momentum, None
    assert resolve(config, IMAGENET)[0].optim.momentum == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "temperature", "frozen"),
    [
        ("dino_vits16", 100, 10, None, 1),
        ("dino_vitb16", 400, 10, 50, 3),
        ("ibot_vits16", 800, 10, 30, 1),
        ("dinov2_vitl16_short", 100, 10, 30, 1),
        ("mae_vitb16", 1600, 40, None, None),
        ("mae_vitl16", 800, 40, None, None),
    ],
)
def test_shares_are_the_published_epochs(name, epochs, warmup, temperature, frozen):
    config = load(name)
    assert config.optim.warmup * epochs == pytest.approx(warmup)
    if temperature is not None:
        assert config.dino.teacher_temperature_warmup * epochs == pytest.approx(temperature)
    if frozen is not None:
        assert config.dino.freeze_last_layer * epochs == pytest.approx(frozen)


def shrunken(name):
    """The recipe with everything that costs time made small; what it computes stays."""
    config = load(name)
    tiny = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    config.encoder = dataclasses.replace(config.encoder, **tiny)
    config.crops = dataclasses.replace(config.crops, local_size=16, num_local=min(2, config.crops.num_local))
    config.batch_size, config.precision = 4, "fp32"
    for section in (config.dino, config.ibot):
        if section is not None:
            section.num_prototypes, section.head_hidden_dim, section.head_bottleneck_dim = 16, 16, 8
    if config.mae is not None:
        config.mae = dataclasses.replace(config.mae, decoder_dim=16, decoder_depth=1, decoder_num_heads=2)
    if config.ibot is not None:
        config.ibot.mask_prob = 1.0
    resolved, _ = resolve(config, DataFacts(1_281_167, 375, 3, "cpu"))
    check_config(resolved)
    return resolved


def views_of(config):
    generator = torch.Generator().manual_seed(0)

    def crops(count, side):
        return torch.randint(0, 256, (count, 4, 3, side, side), generator=generator, dtype=torch.uint8)

    rows = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    num_global, num_local, ids = config.crops.num_global, config.crops.num_local, torch.arange(4)
    return Views(
        crops(num_global, 32),
        crops(num_local, 16),
        rows.expand(num_global, 4, 8),
        rows.expand(num_local, 4, 8),
        ids,
        ids * 0,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_step_moves_every_weight(name):
    config = shrunken(name)
    torch.manual_seed(0)
    module = Pretraining(config, Preprocessing(32)).train()
    step = config.steps // 2
    optim = config.optim
    groups = param_groups(module, optim.weight_decay, layer_decay=optim.layer_decay, encoder_prefix="student.")
    optimizer = adamw(groups, lr=Schedule(config)(step)["lr"], betas=(optim.beta1, optim.beta2))
    before = {key: value.clone() for key, value in module.named_parameters()}
    loss, _ = module(views_of(config), step)
    assert torch.isfinite(loss)
    loss.backward()
    module.before_update(step)
    optimizer.step()
    module.after_step(step)
    still = {key for key, value in module.named_parameters() if torch.equal(value, before[key])}
    assert {key for key in still if not key.startswith("teacher.") and "teacher_head" not in key} == set()
    assert not any(key.startswith("teacher.") and "norm" not in key and "bias" not in key for key in still)


def test_ten_minutes_of_a_gpu_are_enough_for_cifar10_by_arithmetic():
    """Millions of 32 px images, decoded once, for at most a seventh of an H200's 790 TFLOP/s in bf16."""
    config, reasons = resolve(load("cifar10_gpu"), DataFacts(50_000, 32, 3, "cuda", compiles=True))
    check_config(config)
    seen = config.steps * config.batch_size
    assert 3e6 < seen < 12e6 and config.encoder.patch_size == 4
    assert seen * cost(config).flops_per_image < 790e12 / 7 * 600
    assert (config.precision, config.compile) == ("bf16", True) and "compile" in reasons
    assert CACHE_BYTES > 50_000 * 32 * 32 * 3
    assert not any(config.photometry.global_blur_prob) and config.photometry.jitter_prob == 0.8
    lines = shipped_file("configs", "pretrain/cifar10_gpu").read_text().splitlines()
    header = [line for line in lines if line[:1] == "#"]
    assert all(any(line.startswith(f"# {word}") for line in header) for word in (*HEADER, "Aim:"))
    assert sum("not yet measured" in line for line in header) == 2


def test_the_gpu_recipe_runs_dry_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "write_run_encoders", lambda path: None)
    small = {"steps": 3, "batch_size": 4, "precision": "fp32", "device": "cpu", "num_workers": 0, "knn": {"every": 0}}
    small |= {"encoder": {"embed_dim": 32, "depth": 1, "num_heads": 1}}
    small |= {"dino": {"num_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8}}
    run = sslvit.pretrain(
        config_file="pretrain/cifar10_gpu", data="scenes:?n=16&size=32&objects=1", output_dir=tmp_path / "run", **small
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert len(losses) == 3 and all(math.isfinite(row["dino/loss"] + row["mae/loss"]) for row in losses)
    assert losses[-1]["skipped"] == 0


SMALL = ["auto", "tiny_cpu", "scenes", "cifar10_vit_tiny", "cifar10_gpu", "flickr8k_vit_tiny"]


@pytest.mark.parametrize("name", SMALL)
def test_the_small_recipes_resolve(name):
    config, _ = resolve(load(name), DataFacts(20_000, 64, 3, "cpu"))
    check_config(config)
    assert config.dino is not None and config.mae is not None


def test_a_shared_head_is_one_head():
    """Saved once, moved once: DINO's; a second move of the teacher's would halve the half-life."""
    config = shrunken("ibot_vits16")
    torch.manual_seed(0)
    module = Pretraining(config, Preprocessing(32)).train()
    assert not any("ibot" in key and "head" in key for key in module.state_dict())
    assert module.objectives["ibot"].heads[0] is module.objectives["dino"].student_head
    teacher = module.objectives["dino"].teacher_head.prototypes
    with torch.no_grad():
        module.objectives["dino"].student_head.prototypes.add_(1.0)
    before = teacher.clone()
    module.after_step(0)
    torch.testing.assert_close(teacher, before + (1 - module.momentum(0)), atol=1e-6, rtol=0)
    own = dataclasses.replace(config, ibot=dataclasses.replace(config.ibot, shared_head=False))
    assert any("ibot.student_head" in key for key in Pretraining(own, Preprocessing(32)).state_dict())
