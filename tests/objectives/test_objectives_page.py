"""docs/objectives.md names every setting of the objectives and every shipped recipe, and none that does not exist."""

import dataclasses
import re
from pathlib import Path

import pytest

from sslvit.config import PretrainConfig, shipped_config_names
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
SECTIONS = {"dino": DinoConfig, "ibot": IbotConfig, "koleo": KoleoConfig, "mae": MaeConfig}


@pytest.mark.parametrize("name", ["dino", "koleo", "mae"])
def test_every_setting_is_explained(name):
    for field in dataclasses.fields(SECTIONS[name]):
        prefix = (
            f"{name}.teacher_temperature" if field.name.startswith("teacher_temperature") else f"{name}.{field.name}"
        )
        assert f"`{prefix}" in PAGE, prefix


def test_what_is_ibots_own_is_explained():
    own = {field.name for field in dataclasses.fields(IbotConfig)} - {
        field.name for field in dataclasses.fields(DinoConfig)
    }
    assert own and all(f"`ibot.{name}`" in PAGE for name in own)


def test_no_setting_is_made_up():
    known = PretrainConfig(**{name: section() for name, section in SECTIONS.items()})
    for key in re.findall(r"`((?:dino|ibot|koleo|mae|optim|crops|photometry)\.[a-z_]+)", PAGE):
        section, name = key.split(".")
        assert hasattr(getattr(known, section), name), key


def test_the_recipes_exist_and_the_published_ones_are_listed():
    named = set(re.findall(r"`(pretrain/[a-z0-9_]+)`", PAGE))
    shipped = set(shipped_config_names())
    assert named <= shipped
    assert {name for name in shipped if re.search(r"pretrain/(dino|mae|ibot).*_vit[sbl]16", name)} <= named
