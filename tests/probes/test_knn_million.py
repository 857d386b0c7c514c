"""`benchmarks/knn_million.py` on a small size: three ways that must agree, and cells that are kept."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

SIZES = {"rows": 3000, "dim": 24, "queries": 60}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("knn_million", "stored"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import knn_million

    monkeypatch.setattr(knn_million, "CHECKED", 20)
    monkeypatch.setattr(knn_million, "BLOCK", 700)
    monkeypatch.setattr(knn_million, "NUM_CLASSES", 30)
    return knn_million


def test_three_ways_agree_and_finished_cells_are_kept(script, tmp_path, monkeypatch, capsys):
    ran = []

    def here(words, check):
        ran.append(words[words.index("--cell") + 1])
        assert script.main(words[2:]) == 0

    monkeypatch.setattr(script.subprocess, "run", here)
    arguments = [f"--{name}={size}" for name, size in SIZES.items()]
    arguments += ["--output-dir", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert script.main(arguments) == 0 == script.main(arguments)
    assert ran == ["ours", "torch", "exact"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["knn_million/ours/exact"]["value"] == 1
    assert rows["knn_million/torch/agrees"]["value"] > 0.95
    assert 0.05 < rows["knn_million/ours/top1"]["value"] < 1
    assert rows["knn_million/torch/ratio"]["value"] > 0 and rows["knn_million/torch/cpu_ratio"]["value"] > 0
    told = capsys.readouterr().out
    assert "3000 x 24 features, 60 queries" in told and (tmp_path / "rows.md").read_text() in told
    assert "| ours/exact | 1.0000 |" in told


def test_a_wrong_answer_would_be_seen(script, tmp_path, monkeypatch):
    for way in script.WAYS:
        script.measure(way, SIZES, tmp_path)
    answers = dict(np.load(tmp_path / "ours.npz"))
    answers["100"][3] = answers["100"][3][::-1]
    np.savez(tmp_path / "ours.npz", **answers)
    rows = {row["name"]: row["value"] for row in script.results(tmp_path, SIZES)}
    assert rows["knn_million/ours/exact"] == pytest.approx(19 / 20)


def test_clouds_are_keyed_by_seed(script):
    features, labels = script.clouds(2000, 8, seed=1)
    again, same = script.clouds(2000, 8, seed=1)
    assert np.array_equal(features, again) and np.array_equal(labels, same)
    assert not np.array_equal(features, script.clouds(2000, 8, seed=2)[0])
