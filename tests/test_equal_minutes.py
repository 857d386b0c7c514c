"""benchmarks/equal_minutes.py: its cells, rows, skips, and that it goes on. Fast tests do not train."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sslvit.config import PretrainConfig, check_config, load_config
from sslvit.objectives.recipe import DataFacts, resolve

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TRAIN, VAL = "scenes:?n=32&size=32&objects=1&label=shape", "scenes:?n=16&size=32&objects=1&label=shape&split=val"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("equal_minutes", "lightly_arms", "stored"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delenv("SSLVIT_DATA", raising=False)
    return importlib.import_module("equal_minutes")


@pytest.fixture
def stand_ins(bench, monkeypatch):
    """Training takes no time and every number is known; returns the cells that were trained."""
    trained = []

    def train(cell, folder, options):
        trained.append(cell.label)
        return bench.Trained("E", 100 + cell.seed, 20.5, "bf16")

    def evaluate(**keys):
        names = [*bench.METRICS, "knn/k10/top1"]
        names += ["knn/random_init/top1", "linear/random_init/top1"] if keys["controls"] else []
        facts = {"ci95": [0.0, 1.0], "protocol": "knn #1", "data": "", "seed": keys["seed"], "step": None}
        value = 0.5 + 0.01 * len(trained)
        return [{"name": name, "value": 0.1 if "random" in name else value, **facts} for name in names]

    monkeypatch.setattr(bench, "train_ours", train)
    monkeypatch.setattr(bench, "train_lightly", train)
    monkeypatch.setattr(bench.sslvit, "evaluate", evaluate, raising=False)
    monkeypatch.setattr(bench, "skipped", lambda cell, options: "")
    return trained


def run(bench, out, *more):
    data = ["--train-dataset", TRAIN, "--val-dataset", VAL]
    assert bench.main(["--output-dir", str(out), "--json", str(out / "rows.json"), *data, *more]) == 0
    return json.loads((out / "rows.json").read_text())


def test_rows_are_named_as_promised(bench, stand_ins, tmp_path, capsys):
    rows = run(bench, tmp_path, "--seeds", "0", "1")
    arms = ("joint", "dino", "mae", "lightly_dino", "lightly_mae")
    promised = {f"equal_minutes/{arm}/{metric}" for arm in arms for metric in ("knn/top1", "linear/top1")}
    variants = {name for row in rows if (name := row["name"]) not in promised}
    assert promised <= {row["name"] for row in rows}
    assert {name.split("/")[1] for name in variants} == {"lightly_dino", "lightly_mae", "random_init"}
    assert {name.split("/")[2] for name in variants} == {"bf16", "bf16_our_lr", "knn", "linear"}
    assert len({(row["name"], row["data"], row["seed"]) for row in rows}) == len(rows)
    assert all("20 minutes asked, 20.50 taken; bf16; batch 128" in row["protocol"] for row in rows if row["step"])
    shown = capsys.readouterr().out
    assert "| arm | steps | k-NN | linear |" in shown and "(2 seeds)" in shown
    assert "points from lightly's best" in shown and (tmp_path / "rows.md").read_text() in shown


def test_it_goes_on_from_finished_cells(bench, stand_ins, tmp_path):
    first = run(bench, tmp_path, "--arms", "joint", "mae", "--seeds", "0")
    assert stand_ins == ["joint", "mae"]
    again = run(bench, tmp_path, "--arms", "joint", "mae", "dino", "--seeds", "0")
    assert stand_ins == ["joint", "mae", "dino"] and again[: len(first)] == first
    run(bench, tmp_path, "--arms", "joint", "--seeds", "0", "--minutes", "3")
    assert stand_ins[-1] == "joint", "another number of minutes is another cell"


def test_what_cannot_be_measured_says_why(bench, tmp_path, capsys, monkeypatch):
    assert bench.main(["--arms", "mae", "--output-dir", str(tmp_path), "--seeds", "0"]) == 0
    assert "skipped: SSLVIT_DATA is not set" in capsys.readouterr().out
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    rows = run(bench, tmp_path, "--arms", "lightly_mae", "--seeds", "0")
    assert rows == [] and capsys.readouterr().out.count("skipped: lightly is not installed") == 3


def test_the_minutes_hold_start_up_and_steps(bench):
    assert bench.fitting_steps(20, 0.5, 30.0) == 2340
    assert bench.fitting_steps(0.01, 0.5, 30.0) == 10


def test_our_arms_are_the_recipe_and_its_halves(bench):
    resolved = {}
    for arm, keys in bench.OURS.items():
        given = {"data": "x", "batch_size": 128, "steps": 4000, "encoder": bench.ENCODER, **keys}
        config = load_config(PretrainConfig, "pretrain/cifar10_vit_tiny", given)
        check_config(config)
        resolved[arm], _ = resolve(config, DataFacts(50_000, 32, 3, "cpu"))
    joint, dino, mae = resolved["joint"], resolved["dino"], resolved["mae"]
    assert joint.encoder == dino.encoder == mae.encoder
    assert dino.mae is None and dino.dino.student_visible_ratio == 1 and mae.dino is None
    assert mae.photometry.jitter_prob == 0 and mae.crops.num_global == 1 and mae.optim.beta2 == 0.95
    assert joint.dino.student_visible_ratio == pytest.approx(1 - joint.mae.mask_ratio)
    assert {config.optim.lr for config in resolved.values()} == {bench.OUR_LR}


@pytest.mark.slow
def test_one_of_our_arms_for_real(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ENCODER", {"image_size": 32, "patch_size": 16, "depth": 1, "num_registers": 0})
    monkeypatch.setattr(bench, "BATCH_SIZE", 4)
    rows = run(bench, tmp_path, "--quick", "--arms", "joint", "--minutes", "0.001")
    assert {row["name"] for row in rows} == {
        f"equal_minutes/{arm}/{metric}/top1" for arm in ("joint", "random_init") for metric in ("knn", "linear")
    }
    assert {row["step"] for row in rows} == {0, 10} and all(0 <= row["value"] <= 1 for row in rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the versions of torch and timm that lightly was written for
@pytest.mark.parametrize("arm", ["lightly_dino", "lightly_mae"])
def test_lightlys_arms_for_real(bench, tmp_path, arm):
    pytest.importorskip("lightly", reason="lightly is not installed")
    arms = importlib.import_module("lightly_arms")
    from sslvit.encoder.weights import load_encoder

    images = arms.decoded(TRAIN)
    assert images.shape == (32, 32, 32, 3)
    begun, _ = arms.train(arm, images, 1, 8, "fp32", 0, None)
    encoder, seconds = arms.train(arm, images, 3, 8, "fp32", 0, None)
    assert len(seconds) == 3 and seconds == sorted(seconds)
    qkv = "blocks.0.attn.qkv.weight"
    assert not np.array_equal(begun.state_dict()[qkv], encoder.state_dict()[qkv])
    arms.save(encoder, tmp_path / "encoder")
    opened = load_encoder(str(tmp_path / "encoder")).module.state_dict()
    assert all(np.array_equal(opened[name], value) for name, value in encoder.state_dict().items())
