"""Each page of docs/ is in the navigation and on the first page, its links lead somewhere, and health is complete."""

import re
from pathlib import Path

import pytest

from sslvit.metrics import TIMING_FIELDS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_can_be_found_and_leads_somewhere(page):
    assert f": {page.name}\n" in (ROOT / "mkdocs.yml").read_text() + "\n"
    if page.name != "index.md":
        assert f"({page.name})" in (ROOT / "docs" / "index.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_field_about_speed_is_explained():
    text = (ROOT / "docs" / "health.md").read_text()
    clocks = {"seconds", "eta"}
    assert [name for name in sorted(TIMING_FIELDS - clocks) if f"`{name}`" not in text] == []
