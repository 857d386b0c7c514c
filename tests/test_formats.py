"""benchmarks/formats.py: the matrix of forms, formats and library versions; the page shows what its file says."""

import json
import sys
from pathlib import Path

import formats
import pytest

ROOT = Path(__file__).parents[1]

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "formats.json", ROOT / "docs" / "formats.md"


def test_the_page_shows_the_file():
    page, rows = PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text())
    assert formats.with_tables(page, rows) == page
    assert not [row for row in rows if "failed" in row]
    assert {row["form"] for row in rows} == set(formats.FORMS)
    assert len({row["version"] for row in rows if row["library"] == "transformers"}) == 2, "4.57 and 5.x"


@pytest.mark.filterwarnings("ignore")  # of the libraries that are opened
def test_a_cell_is_measured_or_refused_or_fails(monkeypatch):
    for library in ("transformers", "open_clip"):
        pytest.importorskip(library, reason="an optional extra")
    rows = formats.measure(("twin", "rope"), [sys.executable], ("timm", "siglip"))
    cells = {(row["form"], row["format"], row["library"]): row for row in rows}
    assert cells["twin", "siglip", "transformers"]["value"] < 1e-5
    assert cells["rope", "timm", "timm"]["value"] == 0.0
    assert "no class token" in cells["rope", "siglip", ""]["refused"]
    monkeypatch.setattr("sslvit.exports.verify.TOLERANCE", -1.0)
    wrong = formats.measure(("twin",), [sys.executable], ("timm",))
    assert all("failed" in row for row in wrong) and "**differs**" in formats.tables(wrong)


def test_tables():
    value = formats._row("ours", "timm", "timm", "1", "at 32x32", value=2e-7)
    zero = formats._row("ours", "hf", "transformers", "5", "at 32x32", value=0.0)
    refused = formats._row("rope", "hf", refused="rotary; export timm")
    same = [
        formats._row(form, "llava", refused=f"{form}: a vision-language folder cannot hold it; no class; export timm")
        for form in ("rope", "qk_norm")
    ]
    text = formats.tables([value, zero, refused, *same])
    assert "| class token, 4 registers (the default) | 2e-07 | 0 |  |" in text
    assert "| rotary positions (DINOv3) |  | refused | refused |" in text
    assert "| hf | rotary positions (DINOv3) | rotary |" in text
    assert "| llava | rotary positions (DINOv3); normalised queries and keys | no class |" in text
    assert "| timm 1 | 2e-07 |  |  |" in text


@pytest.mark.slow
def test_the_matrix_in_fresh_processes_of_the_newest_and_the_oldest_libraries(oldest_python):
    """`fresh` processes: the same cells as the page, on this machine."""
    rows = formats.measure(tuple(formats.FORMS), [sys.executable, oldest_python])
    failed = [f"{row['name']}: {row['failed']}" for row in rows if "failed" in row]
    assert not failed, failed
    kept = json.loads(RESULTS.read_text())
    assert {(r["form"], r["format"]) for r in rows if "refused" in r} == {
        (r["form"], r["format"]) for r in kept if "refused" in r
    }
