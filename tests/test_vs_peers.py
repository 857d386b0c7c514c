"""benchmarks/vs_peers.py: losses agree with the published steps, rows have their names, cells are kept."""

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = (
    "vs_peers",
    "rounds",
    "plain_steps",
    "step_peers",
    "training_peers",
    "probe_peers",
    "growth",
    "data",
    "stored",
)
lightly = pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="lightly is not installed")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in (*MODULES, "knn_million"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in (*MODULES, "knn_million"):
        sys.modules.pop(name, None)


def tiny(bench, *objectives):
    work = bench("step_peers").StepWork
    sizes = {"num_local": 2, "local": 16} if "dino" in objectives else {}
    return work(
        objectives, "vit_tiny_patch16_224", 8, 32, 3, prototypes=64, hidden=32, depth=2, decoder=(32, 1, 2), **sizes
    )


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_losses_are_those_of_the_published_step(bench, objective):
    built = bench("step_peers").build(tiny(bench, objective))
    losses = bench("step_peers").parity(built, 3)
    assert {"official", "ours"} <= set(losses)
    assert len(set(losses["ours"])) == 3, "the steps change the weights"
    assert bench("step_peers").flops(built) > 1e6


@lightly
@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_losses_are_those_of_lightly(bench, objective):
    assert "lightly" in bench("step_peers").parity(bench("step_peers").build(tiny(bench, objective)), 3)


def break_center(plain):
    plain.CENTER_MOMENTUM = 0.8


def break_teacher(plain):
    plain.MOMENTUM = 0.5


def break_rate(plain):
    plain.LR = 1e-3


@pytest.mark.parametrize("break_it", [break_center, break_teacher, break_rate])
def test_a_step_that_computes_something_else_is_refused(bench, break_it):
    bench("step_peers")  # keeps the right numbers
    break_it(bench("plain_steps"))
    built = bench("step_peers").build(tiny(bench, "dino"))
    with pytest.raises(ValueError, match=r"losses of (ours|lightly) differ from those of official"):
        bench("step_peers").parity(built, 3)


def test_fifty_two_heads_together_are_those_alone(bench):
    made = bench("probe_peers").LinearHeads(images=40, steps=3, classes=5, width=8, batch=10)
    assert made.num_heads == 52
    for a, b in zip(made.together(), made.one_by_one(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_neighbours_agree(bench, monkeypatch):
    monkeypatch.setattr(bench("knn_million"), "NUM_CLASSES", 10)
    answers = {name: way() for name, way in bench("probe_peers").knn_ways(300, 30, dim=16).items()}
    assert {"ours", "official", "sklearn"} <= set(answers)
    for found in answers.values():
        assert (found == answers["ours"]).mean() > 0.95


def test_growth_is_told_by_its_exponent(bench, tmp_path):
    growth = bench("growth")
    assert growth.exponent(([1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0])) == pytest.approx(1)
    assert growth.exponent(([1.0, 10.0, 100.0], [5.0, 5.0, 5.0])) == pytest.approx(0)
    curves = {"crops": ([0.0, 2.0], [1.0, 2.0]), "reopening": ([1.0, 1e6], [1.0, 1.0])}
    assert growth.plot(curves, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_linked_folders_hold_as_many_images_as_said(bench, tmp_path, monkeypatch):
    from sslvit.data.sources import open_source

    growth = bench("growth")
    monkeypatch.setattr(growth, "FILES_PER_FOLDER", 30)
    monkeypatch.setattr(growth, "LINKS", 20)
    monkeypatch.setattr(growth, "write_jpegs", lambda folder, count: few_jpegs(folder, count))
    folder = growth.linked_folder(tmp_path, 70)
    assert len(open_source(f"folder:{folder}")) == 70
    assert growth.linked_folder(tmp_path, 70) == folder


def few_jpegs(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(b"x")
    return folder


@pytest.fixture
def stand_ins(bench, monkeypatch):
    """Works that take no time; returns the script and the names of those measured."""
    script, ran = bench("vs_peers"), []

    def work(name, context):
        ran.append(name)
        rows = script.Rows(name, "words")
        timing = bench("rounds").Timing
        rows.timings({"ours": timing((1.0, 1.1, 1.2), 4), "official": timing((2.5, 2.6, 2.8), 3)})
        rows.add("ours/utilisation", 0.25, "of the peak")
        return script.Found(rows.rows, {"lightly": "not here"})

    monkeypatch.setattr(script, "WORKS", dict.fromkeys(script.WORKS, work))
    return script, ran


def test_rows_are_named_as_promised_and_finished_works_are_kept(stand_ins, tmp_path, capsys):
    script, ran = stand_ins
    words = ["--works", "dino_vits16", "knn", "--quick", "--output-dir", str(tmp_path)]
    words += ["--json", str(tmp_path / "rows.json")]
    assert script.main(words) == 0
    told = capsys.readouterr().out
    assert "skipped: lightly: not here" in told
    assert "| dino_vits16 | official | 2.36 | 2.2 | 3.0 | reached |" in told
    assert "| dino_vits16 | ours | 1.1 | 25% | median of 3 of 4, 1.00 s to 1.20 s |" in told
    first = json.loads((tmp_path / "rows.json").read_text())
    assert {"vs_peers/dino_vits16/official/ratio", "vs_peers/knn/ours/seconds"} <= {row["name"] for row in first}
    assert set(first[0]) == {"name", "value", "ci95", "protocol", "data", "seed", "step"}
    assert (tmp_path / "rows.md").read_text() in told, "the table stays beside the rows"
    assert script.main(words) == 0 and ran == ["dino_vits16", "knn"]
    assert json.loads((tmp_path / "rows.json").read_text()) == first
    assert script.main([*words, "--minutes", "1"]) == 0 and len(ran) == 4, "other settings are measured anew"


def test_the_table_says_whose_step_a_training_peer_makes(bench):
    script = bench("vs_peers")
    rows = script.Rows("training", "words")
    seconds = {"ours": 1.0, "torchvision_v2": 2.5, "official_torchvision_v2": 4.0}
    rows.timings({name: bench("rounds").Timing((value,), 1) for name, value in seconds.items()})
    table = script.markdown(rows.rows)
    assert "| torchvision_v2 (our step, torchvision v2's views) | 2.50 | 2.0 | 3.0 | reached |" in table
    assert "| official_torchvision_v2 (published fp32 step, torchvision v2's views) | 4.00 | 2.0 | 3.0 | aim" in table


def test_lower_is_better_where_it_is(bench):
    verdict = bench("vs_peers")._verdict
    assert verdict("joint_vits16/ours_dino/cost", 1.05) == "aim reached"
    assert verdict("joint_vits16/ours_dino/cost", 1.15) == "reached"
    assert verdict("joint_vits16/ours_dino/cost", 1.3) == "**not reached**"
    assert verdict("knn/official/ratio", 1.2) == "**not reached**" and verdict("features/timm/ratio", 1.0) == ""


def test_a_work_whose_parity_fails_gives_no_row(bench, monkeypatch, tmp_path, capsys):
    script = bench("vs_peers")

    def fail(name, context):
        raise ValueError("losses of ours differ")

    monkeypatch.setattr(script, "WORKS", {"knn": fail, "probe": fail})
    assert script.main(["--works", "knn", "--output-dir", str(tmp_path)]) == 1
    assert "knn: losses of ours differ" in capsys.readouterr().err
    assert not (tmp_path / "cells" / "knn.json").exists()


def test_works_for_a_gpu_say_that_there_is_none_and_are_tried_again(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    works = ["gpu_training_vits16", "gpu_step_vitb16"]
    assert bench("vs_peers").main(["--works", *works, "--output-dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert all(f"skipped: {name}: no CUDA device" in told for name in works)
    assert not list(tmp_path.rglob("*.json")), "a skipped work is no finished cell"


def test_one_thread_is_timed_by_the_processors_clock(bench):
    rounds, threads = bench("rounds"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        clock = rounds.own_clock()
        found = rounds.measure({"asleep": lambda: time.sleep(0.05)}, seconds=0, probe=rounds.Probe(64), clock=clock)
        assert found["asleep"].median < 0.02, "waiting is no work"
        torch.set_num_threads(2)
        assert rounds.own_clock() is time.perf_counter
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_every_work_runs_quickly(bench, tmp_path):
    script = bench("vs_peers")
    words = ["--quick", "--minutes", "0.01", "--output-dir", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert script.main(words) == 0
    names = {row["name"] for row in json.loads((tmp_path / "rows.json").read_text())}
    left_out = ("lightly", "autocast", "gpu")
    needed = {f"vs_peers/{name}" for name in script.GOALS if not any(word in name for word in left_out)}
    assert needed <= names
    assert (tmp_path / "rows_growth.png").exists()
