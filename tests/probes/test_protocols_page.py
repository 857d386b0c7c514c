"""docs/protocols.md says what is printed: every protocol has its section and its very words."""

import re
from pathlib import Path

import pytest

from sslvit.probes import (
    attentive,
    cluster,
    duplicates,
    fewshot,
    health,
    knn,
    linear,
    logreg,
    regression,
    retrieval,
    segmentation,
)
from sslvit.probes.config import PROTOCOLS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocols.md").read_text()
MODULES = [attentive, cluster, duplicates, fewshot, health, knn, linear, logreg, regression, retrieval, segmentation]
WORDS = [value for module in MODULES for name, value in vars(module).items() if re.match(r"PROTOCOL(_[A-Z]+)?$", name)]


def test_every_protocol_is_on_the_page():
    assert len(WORDS) == 16
    headings = re.findall(r"^## (\w+)$", PAGE, flags=re.M)
    assert set(PROTOCOLS) <= {*headings, "linear_dino", "linear_mae"}
    assert "`linear_dino`" in PAGE and "`linear_mae`" in PAGE


@pytest.mark.parametrize("words", WORDS)
def test_the_page_holds_the_printed_words(words):
    assert f"`{words}`" in " ".join(PAGE.split())


def test_files_named_on_the_page_exist():
    links = re.findall(r"\]\(\.\./([\w./]+)\)", PAGE)
    assert len(links) > 10
    assert all((ROOT / link).is_file() for link in links)
