"""benchmarks/budgets.py: cells, scores, the reading at equal minutes, and that it goes on. Trains one block."""

import json

import budgets as script
import cifar_fashion
import numpy as np
import pytest

import sslvit

SCENES = "scenes:?n=40&size=32&objects=1&label=shape"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """An encoder of one block and a set of forty scenes."""
    monkeypatch.setattr(
        cifar_fashion, "ENCODER", {**cifar_fashion.ENCODER, "embed_dim": 24, "depth": 1, "patch_size": 16}
    )
    monkeypatch.setattr(cifar_fashion, "BATCH_SIZE", 8)
    monkeypatch.setattr(script, "specs", lambda names, root: {"scenes": (SCENES, f"{SCENES}&split=val")})
    monkeypatch.setattr("sslvit.verbs.pretrain.write_run_encoders", lambda path: None)  # seconds; the checkpoint serves
    monkeypatch.setattr(script, "QUICK", {"num_images": 30, "linear_steps": 5, "num_workers": 0})
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSLVIT_DATA", raising=False)
    return ["--quick", "--steps", "2", "3", "--output-dir", str(tmp_path / "out"), "--json", str(tmp_path / "all.json")]


def test_arms_at_two_budgets_and_going_on(small, tmp_path, monkeypatch, capsys):
    arguments = [*small, "--arms", "joint_whole", "mae"]
    assert script.main(arguments) == 0
    rows = json.loads((tmp_path / "all.json").read_text())
    values = {row["name"]: row["value"] for row in rows}
    for steps in (2, 3):
        for arm in ("joint_whole", "mae"):
            name = f"budgets/scenes/images/{steps}/{arm}"
            mean = (values[f"{name}/knn/top1"] + values[f"{name}/linear/top1"]) / 2
            assert values[f"{name}/score"] == pytest.approx(mean) and values[f"{name}/cpu_seconds"] > 0
    assert (tmp_path / "all.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "all.png").stat().st_size > 1000
    monkeypatch.setattr(sslvit, "pretrain", lambda **_: pytest.fail("trained again"))
    monkeypatch.setattr("sslvit.verbs.evaluate.measure", lambda *_: pytest.fail("measured again"))
    assert script.main(arguments) == 0
    assert json.loads((tmp_path / "all.json").read_text()) == rows


def rows_of(data, arm, steps, minutes, score, seed=0):
    name = f"budgets/{data}/images/{steps}/{arm}"
    return [
        {"name": f"{name}/score", "value": score, "seed": seed},
        {"name": f"{name}/cpu_seconds", "value": 60 * minutes},
    ]


def test_equal_minutes_lie_on_a_line_over_log_time_and_never_outside():
    rows = rows_of("d", "a", 300, 1, 0.2) + rows_of("d", "a", 1200, 4, 0.4) + rows_of("d", "b", 300, 3, 0.3)
    assert script.curves(rows)["d"]["a"] == [(300, 1.0, 0.2), (1200, 4.0, 0.4)]
    at = {row["name"]: row["value"] for row in script.minute_rows(rows)}
    assert at["budgets/d/minutes/2/a/score"] == pytest.approx(0.2 + 0.2 * np.log(2) / np.log(4))
    assert at["budgets/d/minutes/1/a/score"] == pytest.approx(0.2)
    assert set(at) == {f"budgets/d/minutes/{m}/a/score" for m in (1, 2, 4)}, "one run is no line, 8 is beyond"


def test_a_curve_is_the_mean_over_seeds_and_the_best_is_bold():
    rows = rows_of("d", "a", 300, 1, 0.2) + rows_of("d", "a", 300, 3, 0.4, seed=1) + rows_of("d", "b", 300, 1, 0.29)
    assert script.curves(rows)["d"]["a"] == [(300, 2.0, pytest.approx(0.3))]
    text = script.markdown(rows)
    assert "| a | **30.0** (2.0) |" in text and "| b | 29.0 (1.0) |" in text


def test_parts_of_the_masked_student_share_one_pass():
    """The arm named joint and every other part keep DINO's and MAE's visible patches the same, but for whole views."""
    for name, keys in script.PARTS.items():
        visible, hidden = keys.get("dino", {}) or {}, keys.get("mae", {}) or {}
        if "student_visible_ratio" in visible and name != "whole_views":
            assert visible["student_visible_ratio"] == pytest.approx(1 - hidden["mask_ratio"])


def test_without_real_images_only_scenes_remain(monkeypatch, capsys):
    assert list(script.specs(["cifar10", "scenes"], None)) == ["scenes"]
    assert "skipped: cifar10: SSLVIT_DATA is not set" in capsys.readouterr().out
    titles = [title for title, *_ in script.plan(script._parse(["--quick", "--output-dir", "x"]), None)]
    assert titles and all(title.startswith("scenes/images/") for title in titles)
