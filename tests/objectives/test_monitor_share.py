"""The monitor's share of a run: at most 3% of its time, by arithmetic before it starts and by the clock after it."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sslvit
from sslvit.config import PretrainConfig, load_config
from sslvit.encoder.config import EncoderConfig
from sslvit.encoder.vit import create_encoder
from sslvit.objectives.config import DinoConfig, MaeConfig
from sslvit.objectives.cost import clean_flops, cost
from sslvit.objectives.recipe import DECODED_SHARE, MONITOR_SHARE, MONITORED, DataFacts, resolve
from sslvit.probes.features import forward_clean
from sslvit.verbs import pretrain as verb

JOINT = {"dino": DinoConfig(), "mae": MaeConfig()}
TINY = {
    "batch_size": 8,
    "encoder": {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "depth": 2},
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "num_workers": 1,
    "precision": "fp32",
}
DATA = "scenes:?n=60&size=32&objects=1&label=shape"


def share(config, num_sets):
    """(FLOPs of all evaluations over those of training, decoded images over images seen)."""
    evaluations = 1 + math.ceil(config.steps / config.knn.every)
    images, seen = num_sets * config.knn.num_images, config.steps * config.batch_size
    flops = evaluations * images * clean_flops(config)
    return flops / (seen * cost(config).flops_per_image), images / seen


@pytest.mark.parametrize("keys", [JOINT, {"mae": MaeConfig()}, {"dino": DinoConfig()}], ids=["joint", "mae", "dino"])
@pytest.mark.parametrize("val", [None, "y"])
def test_auto_evaluates_for_two_percent_of_the_flops(keys, val):
    for num_images, side, device in itertools.product([300, 50_000, 2_000_000], [32, 256], ["cpu", "cuda"]):
        for steps, batch in ((None, None), (60, 32), (500, 64), (20_000, 256)):
            given = PretrainConfig(data="x", val_data=val, steps=steps, batch_size=batch, **keys)
            config, reasons = resolve(given, DataFacts(num_images, side, 3, device))
            flops, decoded = share(config, 1 if val is None else 2)
            fewest = config.knn.num_images == min(MONITORED[0], num_images)
            assert flops <= MONITOR_SHARE * 1.01 or fewest, (num_images, side, device, steps)
            assert decoded <= DECODED_SHARE or fewest
            assert config.knn.num_images <= MONITORED[2]
            assert "FLOPs" in reasons["knn.every"] and "FLOPs" in reasons["knn.num_images"]


def test_a_long_run_is_evaluated_ten_times_on_five_thousand_images():
    given = PretrainConfig(data="x", val_data="y", steps=100_000, batch_size=256, **JOINT)
    knn = resolve(given, DataFacts(1_281_167, 256, 3, "cuda"))[0].knn
    assert (knn.every, knn.num_images) == (10_000, 5000)


def test_what_is_given_stands_and_the_other_gives_way():
    def knn(**given):
        config = PretrainConfig(data="x", val_data="y", steps=2500, batch_size=128, **JOINT)
        for key, value in given.items():
            setattr(config.knn, key, value)
        return resolve(config, DataFacts(50_000, 32, 3, "cpu"))[0].knn

    auto, rare, often = knn(), knn(num_images=5000), knn(every=50)
    assert rare.num_images == 5000 and rare.every > auto.every
    assert often.every == 50 and often.num_images < auto.num_images
    both = knn(every=50, num_images=5000)
    assert (both.every, both.num_images) == (50, 5000), "the user's word"
    assert knn(every=0).num_images


def test_a_run_that_continues_takes_more_images_less_often():
    """Two points are no more than noise of a thousand images, and it would stop for them."""
    config = PretrainConfig(data="x", val_data="y", steps=2500, batch_size=128, **JOINT)
    new = resolve(config, DataFacts(50_000, 32, 3, "cpu"))[0]
    config.init = "encoder"
    sizes = EncoderConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=4, class_token=True, num_registers=4)
    going_on = resolve(config, DataFacts(50_000, 32, 3, "cpu"), sizes)[0]
    assert going_on.knn.num_images > new.knn.num_images and going_on.knn.every > new.knn.every
    going_on.init = None
    assert share(going_on, 2)[0] <= MONITOR_SHARE * 1.01


def test_what_is_held_out_is_paid_for():
    """A run that continues without a validation set decodes and encodes two sets of its own labelled images."""
    sizes = EncoderConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=4, class_token=True, num_registers=4)

    def going_on(labelled, num_images=50_000, **knn):
        config = PretrainConfig(data="x", steps=2500, batch_size=128, init="encoder", **JOINT)
        for key, value in knn.items():
            setattr(config.knn, key, value)
        return resolve(config, DataFacts(num_images, 32, 3, "cpu", labelled=labelled), sizes)[0]

    config = going_on(True)
    config.init = None
    assert share(config, 2)[0] <= MONITOR_SHARE * 1.01 and share(config, 2)[1] <= DECODED_SHARE
    assert going_on(False).knn.num_images > config.knn.num_images
    assert going_on(True, max_drop=1.0).knn.num_images == going_on(False).knn.num_images, "no guard"
    assert going_on(True, num_images=600).knn.num_images == 300 and going_on(True, num_images=1).knn.num_images == 1


@pytest.mark.parametrize("name", ["auto", "cifar10_vit_tiny", "scenes", "flickr8k_vit_tiny"])
def test_the_shipped_small_recipes_keep_to_it(name):
    given = load_config(PretrainConfig, f"pretrain/{name}", {"data": "x", "val_data": "y"})
    flops, decoded = share(resolve(given, DataFacts(20_000, 64, 3, "cpu"))[0], 2)
    assert flops <= MONITOR_SHARE * 1.01 and decoded <= DECODED_SHARE


def test_clean_flops_are_those_of_the_evaluation():
    config = resolve(PretrainConfig(data="x", **JOINT), DataFacts(5000, 64, 3, "cpu"))[0]
    config.encoder.depth = 3
    encoder = create_encoder(config.encoder)
    size = config.encoder.image_size
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward_clean(encoder, torch.zeros(2, 3, size, size), 1, "fp32")
    assert 2 * clean_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.05)


# ---- by the clock ---------------------------------------------------------------------------------------------------


def watched(path: Path, **keys) -> tuple[Path, list[dict]]:
    run = sslvit.pretrain(data=DATA, val_data=f"{DATA}&split=val", output_dir=path, **{**TINY, **keys})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, rows


def test_a_monitor_that_costs_more_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "write_run_encoders", lambda path: None)
    monkeypatch.setattr(verb, "MOST_MONITORED", 0.0)
    run, rows = watched(tmp_path / "much", steps=2, dino=None, knn={"every": 1})
    spent = [row["monitor_s"] for row in rows if "monitor_s" in row]
    assert len(spent) == 3 and spent == sorted(spent) and spent[0] > 0, "decoding and all evaluations so far"
    assert "raise knn.every or lower knn.num_images" in (run / "train.log").read_text()
    monkeypatch.setattr(verb, "MOST_MONITORED", 1.0)
    run, _ = watched(tmp_path / "little", steps=2, dino=None, knn={"every": 1})
    assert "raise knn.every" not in (run / "train.log").read_text()


@pytest.mark.slow
def test_auto_costs_at_most_three_percent_of_the_time(tmp_path):
    """A small run on a CPU, where the share is largest; the same run with the settings for long ones takes more."""
    keys = {"steps": 400, "batch_size": 32, "dino": {"num_prototypes": 64}}
    data = "scenes:?n=6000&size=32&objects=1&label=shape"
    sets = {"data": data, "val_data": data.replace("6000", "3000") + "&split=val"}

    def spent(name, **knn):
        run = sslvit.pretrain(**sets, output_dir=tmp_path / name, **{**TINY, **keys, "knn": knn})
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return max(row.get("monitor_s", 0) for row in rows) / max(row.get("seconds", 0) for row in rows)

    assert spent("auto") <= 0.03
    assert spent("unbounded", every=40, num_images=5000) > 0.03
