"""benchmarks/no_collapse.py: its plan, what it counts as collapse, and that finished cells are not run again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import sslvit
from sslvit.config import PretrainConfig, check_config, load_config
from sslvit.errors import InputError
from sslvit.objectives.config import DinoConfig, IbotConfig
from sslvit.objectives.recipe import DataFacts, resolve

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "no_collapse.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("no_collapse", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["no_collapse"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FILE.parent))
        spec.loader.exec_module(module)
    return module


def rows(target=0.4, usage=0.8, rank=20.0, top1=0.4, alarm=None, patches=None):
    made = [{"step": 0, "rankme": 30.0, "knn/top1": 0.38}]
    targets = {"dino/target_entropy": target, "dino/usage_entropy": usage}
    if patches is not None:
        targets |= {"ibot/target_entropy": 0.01, "ibot/usage_entropy": patches}
    made += [{"step": s, "loss": 3.0, **targets} for s in range(1, 11)]
    made += [{"step": 10, "rankme": rank, "knn/top1": top1}]
    return [*made, {"step": 9, "alarm": alarm, "text": "..."}] if alarm else made


def test_the_matrix_is_the_whole_one_and_every_cell_is_a_config(script):
    cells = script.plan(False, [0], ["*"])
    matrix = [cell for cell in cells if cell.objective in script.OBJECTIVES]
    assert sum(not cell.broken for cell in matrix) == 36 and sum(bool(cell.broken) for cell in matrix) == 12
    assert len({cell.name for cell in cells}) == len(matrix) + 3 == 51
    for cell in [*cells, *script.plan(True, [0], ["*"])]:
        config = load_config(PretrainConfig, "pretrain/auto", {"data": "x", **cell.keys()})
        check_config(config)
        resolved, _ = resolve(config, DataFacts(cell.images, 32, 3, "cpu"))
        switched = {name for name in ("dino", "ibot", "koleo", "mae") if getattr(resolved, name) is not None}
        assert switched == set((script.OBJECTIVES | script.ALONE)[cell.objective])
        if cell.broken == "momentum":
            assert resolved.optim.momentum == 0
        if cell.broken == "temperature":
            assert all(getattr(resolved, name).teacher_temperature == 1 for name in switched & {"dino", "ibot"})
    assert [cell.name for cell in script.plan(False, [0], ["dino/*broken_m*"])] == ["dino/b64/n5000/broken_momentum"]


@pytest.mark.parametrize(
    ("changes", "signs"),
    [
        ({}, []),
        ({"target": 0.99, "usage": 0.995}, ["uniform targets"]),
        ({"target": 0.01, "usage": 0.02}, ["one prototype", "few prototypes in dino"]),
        ({"target": 0.01, "usage": 0.19}, ["few prototypes in dino"]),
        ({"patches": 0.19}, ["few prototypes in ibot"]),
        ({"patches": 0.21}, []),
        ({"rank": 1.1}, ["features of rank one"]),
        ({"top1": 0.35}, ["k-NN below random init"]),
        ({"top1": 0.365}, []),
    ],
)
def test_what_counts_as_collapse(script, changes, signs):
    config = PretrainConfig(data="x", batch_size=64, dino=DinoConfig(), ibot=IbotConfig())
    config, _ = resolve(config, DataFacts(5000, 32, 3, "cpu"))
    assert config.dino.num_prototypes == config.ibot.num_prototypes == 1024, "4 of them in use: an entropy of .2"
    assert script.outcome(rows(**changes), config).signs == signs


def test_the_patch_loss_alone_is_shown_and_not_counted(script):
    cells = [script.Cell(name, 16, 500, 0) for name in ("dino", "ibot_patches")]
    fallen = script.Outcome({"knn_gain": -0.03}, [])
    rows = {row["name"]: row for row in script.rows_of(dict.fromkeys(cells, fallen), "scenes", 300)}
    assert rows["no_collapse/runs"]["value"] == rows["no_collapse/collapsed"]["value"] == 1
    assert rows["no_collapse/ibot_patches/b16/n500/knn_gain"]["protocol"] == "k-NN below random init"


def test_rows_are_named_as_promised_and_finished_cells_stay(script, tmp_path, monkeypatch, capsys):
    ran = []

    def pretrain(data, val_data, output_dir, **keys):
        ran.append(output_dir.name)
        output_dir.mkdir(parents=True, exist_ok=True)
        broken = "broken" in output_dir.name
        (output_dir / "resolved.yaml").write_text("data: x\ndino: {num_prototypes: 1024}\n")
        if "ibot" in output_dir.name:
            (output_dir / "metrics.jsonl").write_text(json.dumps(rows()[0]) + "\n")
            raise InputError("not finite")
        alarm = "dino/uniform_targets" if broken and "temperature" in output_dir.name else None
        found = rows(**({"target": 0.99, "usage": 0.99} if broken else {}), alarm=alarm)
        (output_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, found)))

    monkeypatch.setattr(sslvit, "pretrain", pretrain)
    words = ["--quick", "--data", "scenes", "--output-dir", str(tmp_path), "--json", str(tmp_path / "r.json")]
    assert script.main(words) == 0
    found = {row["name"]: row["value"] for row in json.loads((tmp_path / "r.json").read_text())}
    assert found["no_collapse/runs"] == 4 and found["no_collapse/collapsed"] == 1, "the one that was stopped"
    assert found["no_collapse/broken"] == 3 and found["no_collapse/alarms_missed"] == 2
    assert found["no_collapse/dino/b16/n500/rankme"] == 20.0
    table = (tmp_path / "r.md").read_text()
    assert table in capsys.readouterr().out and "| collapsed | 1 |" in table
    assert "| dino/b16/n500/broken_temperature | 0 |" in table and "healthy |" in table
    assert "| ibot/b16/n500 | 0 |" in table and "stopped: not finite |" in table
    assert len(ran) == 7 == len(set(ran))
    first = set(ran)
    script.main(words)
    assert set(ran) == first, "the same folders, where `pretrain` finds a finished run"


def test_without_images_it_says_so(script, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SSLVIT_DATA", raising=False)
    assert script.main(["--data", "cifar10", "--cells", "dino/b16/n500", "--output-dir", str(tmp_path)]) == 2
    assert "SSLVIT_DATA is unset" in capsys.readouterr().err
