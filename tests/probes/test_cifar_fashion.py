"""The table of small encoders: its cells, its rows, and that it goes on."""

import json

import cifar_fashion as script
import pytest

import sslvit

SCENES = "scenes:?n=40&size=32&objects=1&label=shape"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Scenes instead of the real sets, and an encoder of one block."""
    encoder = {**script.ENCODER, "embed_dim": 24, "depth": 1, "patch_size": 16}
    monkeypatch.setattr(script, "ENCODER", encoder)
    monkeypatch.setattr(script, "DATASETS", {"scenes": (SCENES, f"{SCENES}&split=val")})
    monkeypatch.setattr(script, "BATCH_SIZE", 8)
    monkeypatch.setattr("sslvit.verbs.pretrain.write_run_encoders", lambda path: None)  # seconds; the checkpoint serves
    monkeypatch.setattr(script, "QUICK", {"num_images": 30, "linear_steps": 5, "num_workers": 0})
    monkeypatch.setenv("SSLVIT_DATA", str(tmp_path))
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    return ["--quick", "--steps", "2", "--output-dir", str(tmp_path / "out"), "--json", str(tmp_path / "all.json")]


def test_every_arm_beside_the_controls_and_going_on(small, tmp_path, monkeypatch, capsys):
    arguments = [*small, "--datasets", "scenes", "--arms", "joint", "mae"]
    assert script.main(arguments) == 0
    rows = json.loads((tmp_path / "all.json").read_text())
    names = {row["name"] for row in rows}
    for encoder in ("joint", "mae", "random_init", "pixels"):
        assert {f"{encoder}/knn/top1", f"{encoder}/linear/top1"} <= names
    assert {"joint/train/cpu_seconds", "mae/train/cpu_seconds"} <= names
    assert {row["data"] for row in rows} == {"scenes"}
    assert all(row["ci95"] for row in rows if row["name"].endswith("top1"))
    one = next(row for row in rows if row["name"] == "joint/knn/top1")
    assert one["step"] == 2 and "trained for 2 steps of 8 images (16 seen)" in one["protocol"]
    assert "trained" not in next(row for row in rows if row["name"] == "random_init/knn/top1")["protocol"]
    table = (tmp_path / "all.md").read_text()
    assert table in capsys.readouterr().out and (tmp_path / "all.png").stat().st_size > 1000
    assert "| random_init | knn/top1 |" in table and "| CPU seconds of a training | scenes |" in table
    monkeypatch.setattr(sslvit, "pretrain", lambda **_: pytest.fail("trained again"))
    monkeypatch.setattr("sslvit.verbs.evaluate.measure", lambda *_: pytest.fail("measured again"))
    assert script.main(arguments) == 0
    assert json.loads((tmp_path / "all.json").read_text()) == rows


def test_without_real_images_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("SSLVIT_DATA", raising=False)
    assert script.main([]) == 0
    assert "skipped: SSLVIT_DATA is not set" in capsys.readouterr().out
