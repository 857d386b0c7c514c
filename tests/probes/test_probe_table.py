"""The benchmark scripts `linear_probe.py` and `knn.py`: their table, their files, and that they go on."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import sslvit
from sslvit.errors import InputError, Resumable

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENCODER = "vit_tiny_patch16_224?pretrained=false&img_size=32&patch_size=8&depth=2&embed_dim=24&num_heads=2"
DATA = "sc=scenes:?n=30&size=32&objects=1&label=shape,scenes:?n=12&size=32&objects=1&label=shape&split=val"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "probe_table", raising=False)
    import probe_table

    monkeypatch.delenv("SSLVIT_CACHE")
    monkeypatch.setenv("SSLVIT_CACHE", "")
    return probe_table


def run(table, out, *more, encoders=(ENCODER, ENCODER + "&seed=1")):
    arguments = ["--encoders", *encoders, "--datasets", DATA, "--output-dir", str(out), "--json", str(out / "all.json")]
    return table.main(["knn"], "test", [*arguments, "--set", "num_workers=0", *more])


def test_table_files_and_going_on(table, tmp_path, monkeypatch, capsys):
    assert run(table, tmp_path, "--seeds", "0", "1") == 0
    rows = json.loads((tmp_path / "all.json").read_text())
    assert len({(r["name"], r["data"], r["seed"]) for r in rows}) == len(rows)
    assert {r["data"] for r in rows} == {"sc"} and {r["seed"] for r in rows} == {0, 1}
    assert sum(r["name"] == "pixels/knn/top1" for r in rows) == 2  # once per seed, not per encoder
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| knn/top1 |") == 5 and "(2 seeds)" in text and "k-NN (DINO)" in text
    with open(tmp_path / "table.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    for stem in ("table", "all"):  # in OUT, and beside --json
        assert (tmp_path / f"{stem}.png").stat().st_size > 1000
    assert (tmp_path / "all.md").read_text() == text
    monkeypatch.setattr("sslvit.verbs.evaluate.measure", lambda *_: pytest.fail("measured again"))
    assert run(table, tmp_path, "--seeds", "0", "1") == 0
    assert json.loads((tmp_path / "all.json").read_text()) == rows


def test_cells_are_one_array_and_finished_ones_are_not_queued(table, tmp_path, monkeypatch):
    """Slurm is a function here that carries the commands out; a task per encoder and data set."""
    from sslvit.commands import parse
    from sslvit.verbs import submit as jobs

    arrays, asked = [], []

    def slurm(plans, folder, settings, num_restarts):
        arrays.append([plan.output_dir.name for plan in plans])
        for plan in plans:
            command = parse(plan.words)
            sslvit.evaluate(**command.arguments)
        return [f"7_{i}" for i in range(len(plans))]

    monkeypatch.setattr(jobs, "_start_on_slurm", slurm)
    monkeypatch.setattr(jobs, "_slurm_states", lambda ids: asked.append(len(ids)) or dict.fromkeys(ids))
    assert run(table, tmp_path, "--launch", "slurm", encoders=[ENCODER]) == 0
    assert run(table, tmp_path, "--launch", "slurm", "--seeds", "0", "1") == 0
    assert [len(names) for names in arrays] == [1, 3] and len({*arrays[0], *arrays[1]}) == 4
    assert all(name.startswith("sc--") for name in arrays[1])
    asked.clear()
    assert len(jobs.submit(status=tmp_path)) == 4
    assert asked == [4], "Slurm is asked once for all"
    assert len(json.loads((tmp_path / "all.json").read_text())) > 4


def test_a_cell_that_fails_is_named_and_the_others_stand(table, tmp_path, capsys):
    assert run(table, tmp_path, encoders=[ENCODER, "/nowhere"]) == 2
    assert "nowhere on sc" in capsys.readouterr().err
    assert json.loads((tmp_path / "all.json").read_text())


def test_finished_cells_are_known_by_their_keys(table, tmp_path):
    assert run(table, tmp_path, encoders=[ENCODER]) == 0

    def cells(*more):
        arguments = ["--encoders", ENCODER, "--datasets", DATA, "--output-dir", str(tmp_path), *more]
        return table.plan(table._parse(["knn"], "test", arguments))

    assert [cell.finished for cell in cells("--set", "num_workers=0")] == [True]
    assert [cell.finished for cell in cells("--set", "num_workers=3")] == [True]
    assert [cell.finished for cell in cells("--set", "num_images=5")] == [False]
    assert [cell.finished for cell in cells("--seeds", "0", "7")] == [True, False]


def test_a_cell_as_a_command_has_the_same_keys(table, tmp_path):
    from sslvit.commands import parse
    from sslvit.config import EvaluateConfig, load_config

    arguments = ["--encoders", ENCODER, "--datasets", DATA, "--output-dir", str(tmp_path), "--quick"]
    (cell,) = table.plan(table._parse(["linear"], "test", arguments))
    parsed = parse(table.command(cell))
    keys = {key: value for key, value in parsed.arguments.items() if key not in ("config_file", "output_dir")}
    assert load_config(EvaluateConfig, None, keys) == load_config(EvaluateConfig, None, cell.keys)
    assert parsed.output_dir == cell.folder


def test_data_sets_and_names(table):
    assert table.split_dataset("a=x,y") == ("a", "x", "y")
    assert table.split_dataset("a=x?label=p,q;y") == ("a", "x?label=p,q", "y")
    for wrong in ("x,y", "a=x", "a=x,y,z", "a b=x,y", "a=,y"):
        with pytest.raises(InputError, match="NAME=TRAIN,VAL"):
            table.split_dataset(wrong)
    encoders = ["runs/a", "runs/b/", "dino=runs/x?y=z", "vit?pretrained=false"]
    parts = [table.split_encoder(text) for text in encoders]
    assert parts == [("", "runs/a"), ("", "runs/b/"), ("dino", "runs/x?y=z"), ("", "vit?pretrained=false")]
    assert table.short_names(parts) == ["a", "b", "dino", "vit-pretrained=false"]
    assert table.short_names([("", "one/run"), ("", "two/run")]) == ["one-run", "two-run"]
    for twice in ([("", "runs/a")] * 2, [("x", "runs/a"), ("x", "runs/b")]):
        with pytest.raises(InputError, match="twice"):
            table.short_names(twice)


def test_the_commands_of_the_readmes_are_accepted(table):
    """Word for word, but for running them."""
    text = (BENCHMARKS / "README.md").read_text() + (BENCHMARKS.parent / "README.md").read_text()
    lines = re.findall(r"^python benchmarks/(?:linear_probe|knn)\.py (.*)$", text, flags=re.M)
    assert len(lines) >= 5
    for line in lines:
        cells = table.plan(table._parse(["linear"], "", shlex.split(line)))
        assert cells and len({cell.folder for cell in cells}) == len(cells)
        for cell in cells:
            assert table.command(cell)[0] == "evaluate"


def test_rows_of_earlier_questions_stay_out_of_the_table(table, tmp_path):
    """Controls, seeds and sets that were asked for before are in a cell's folder, and not in this table."""
    assert run(table, tmp_path, encoders=[ENCODER]) == 0
    names = {row["name"] for row in json.loads((tmp_path / "all.json").read_text())}
    assert "pixels/knn/top1" in names and any("random_init" in name for name in names)
    (cell,) = (tmp_path / "cells").iterdir()
    rows = json.loads((cell / "results.json").read_text())
    (cell / "results.json").write_text(json.dumps([*rows, {**rows[0], "data": "another"}, {**rows[0], "seed": 9}]))
    assert run(table, tmp_path, "--controls", "", encoders=[ENCODER]) == 0
    left = json.loads((tmp_path / "all.json").read_text())
    assert {row["name"] for row in left} == {name for name in names if "pixels" not in name and "random" not in name}
    assert {(row["seed"]) for row in left} == {0} and len(left) == len({row["name"] for row in left})


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device"), 75, "No space left"),
        (Resumable("stopped by SIGTERM"), 75, "SIGTERM"),
        (KeyboardInterrupt(), 75, "interrupted"),
    ],
)
def test_a_full_disk_and_a_signal_end_all_with_75(table, tmp_path, monkeypatch, capsys, error, code, words):
    tried = []
    monkeypatch.setattr(sslvit, "evaluate", lambda **_: tried.append(1) or (_ for _ in ()).throw(error))
    assert run(table, tmp_path) == code
    assert words in capsys.readouterr().err and tried == [1]


def test_jobs_that_may_go_on_end_with_75(table, tmp_path):
    (cell,) = table.plan(table._parse(["knn"], "", ["--encoders", ENCODER, "--datasets", DATA]))
    state = {"id": "7_0", "state": "stopped", "message": "stopped by SIGTERM", "code": 75}
    assert table._problem(cell, state)[0] == 75 and "7_0 stopped" in table._problem(cell, state)[1]
    assert table._problem(cell, {**state, "state": "wrong input", "code": 2})[0] == 2
    assert table._problem(cell, {**state, "state": "killed", "code": None})[0] == 75


def test_slurm_is_asked_in_one_question(monkeypatch):
    from types import SimpleNamespace

    from sslvit.verbs import submit as jobs

    asked = []

    def squeue(words, **_):
        asked.append(words)
        return SimpleNamespace(returncode=0, stdout="RUNNING 7_0\nPENDING 7_1\nFAILED 8\n", stderr="")

    monkeypatch.setattr(jobs.subprocess, "run", squeue)
    states = jobs._slurm_states(["7_0", "7_1", "8", "9"])
    assert states == {"7_0": "running", "7_1": "waiting", "8": None, "9": None}
    assert len(asked) == 1 and asked[0][-1] == "7_0,7_1,8,9" and "-r" in asked[0], "-r: a line for each of an array"
    assert jobs._slurm_states([]) == {} and len(asked) == 1


def test_unknown_keys_are_refused_before_anything_runs(table, tmp_path, capsys):
    assert run(table, tmp_path, "--set", "num_imagges=5") == 2
    assert "num_images" in capsys.readouterr().err
