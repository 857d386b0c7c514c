"""`--explain`: every value in force, with where it comes from; nothing is trained or written."""

import dataclasses

import pytest

import sslvit
from sslvit.cli import main
from sslvit.commands import parse
from sslvit.config import PretrainConfig, load_config
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig
from sslvit.objectives.explain import SOURCES, explain
from sslvit.objectives.recipe import DataFacts, resolve

SETTINGS = ("crops", "photometry", "optim", "dino", "ibot", "koleo", "mae")


def lines(**keys):
    given = PretrainConfig(data="x", **keys)
    resolved, reasons = resolve(given, DataFacts(50_000, 64, 3, "cpu"))
    found = explain(given, resolved, reasons)
    rows = {line.split(" = ")[0].strip(): line.split(" = ", 1)[1] for line in found}
    assert len(rows) == len(found)
    return resolved, reasons, rows


def leaves(section, prefix=""):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_every_value_in_force_has_a_why():
    all_on = {"dino": DinoConfig(), "ibot": IbotConfig(), "koleo": KoleoConfig(), "mae": MaeConfig()}
    resolved, reasons, rows = lines(**all_on)
    assert set(rows) == set(leaves(resolved)) - {"data", "val_data", "device", "num_workers", "overwrite", "sharded"}
    for key, row in rows.items():
        assert ("  auto: " in row) == (key in reasons), key
        if key.split(".")[0] in SETTINGS:
            assert row.rstrip().rpartition("  ")[2] not in ("", "default"), f"{key} has no source: add it to SOURCES"


def test_the_kinds_are_told_apart():
    _, _, rows = lines(dino=DinoConfig(student_temperature=0.2), steps=1000)
    assert rows["steps"].endswith("  given")
    assert rows["dino.student_temperature"].split() == ["0.2", "given"]
    assert "default: DINO, equation 4" in rows["dino.centering"]
    assert "auto: " in rows["optim.lr"] and "sqrt(batch / 1024)" in rows["optim.lr"]
    assert rows["mae"].split() == ["null", "switched", "off"]
    assert "mae.mask_ratio" not in rows
    assert rows["optim.warmup"].endswith("; 100 of 1000 steps"), "shares are shown in steps"


def test_sources_name_keys_that_exist():
    known = set(leaves(PretrainConfig(dino=DinoConfig(), ibot=IbotConfig(), koleo=KoleoConfig(), mae=MaeConfig())))
    sections = {key.split(".")[0] for key in known}
    assert set(SOURCES) <= known | sections


def test_the_command_prints_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--explain", "data=scenes:?n=40&size=32", "device=cpu", "steps=70"]) == 0
    shown = capsys.readouterr().out
    assert "images are about 32 px" in shown and "7 of 70 steps" in shown and "run folder" not in shown
    assert list(tmp_path.iterdir()) == []


def test_explain_is_the_same_for_the_function_and_the_command(tmp_path, capsys):
    command = parse(["pretrain", "--explain", "data=scenes:?n=40&size=32", "--output-dir", str(tmp_path / "run")])
    assert command.arguments["explain"] is True
    assert "explain" not in parse(["pretrain", "data=x"]).arguments
    path = sslvit.pretrain(**{**command.arguments, "device": "cpu"})
    assert path == tmp_path / "run" and not path.exists()
    assert "dino.weight" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dino_vits16", "mae_vitl16", "dinov2_vitl16_short", "tiny_cpu"])
def test_shipped_recipes_explain_themselves(name):
    given = load_config(PretrainConfig, f"pretrain/{name}", {"data": "x"})
    resolved, reasons = resolve(given, DataFacts(1_281_167, 375, 3, "cuda"))
    text = "\n".join(explain(given, resolved, reasons))
    assert "encoder.name" in text and "nan" not in text
