"""check-data counts what a plain loop over the files counts, and names every bad one."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslvit.data.bad_files import read_bad_files
from sslvit.errors import InputError
from sslvit.verbs.check_data import check_data

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning"),
]


def save(path, pixels, form="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, form, **options)


@pytest.fixture
def collection(tmp_path):
    """Two classes, five sizes, a duplicate, a blank, an animation, a text file and two bad files."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for number in range(6):
        save(root / "cat" / f"{number}.png", rng.integers(0, 256, (10 + number, 20, 3), np.uint8))
    save(root / "dog" / "grey.png", rng.integers(0, 256, (30, 40), np.uint8))
    (root / "dog" / "copy.png").write_bytes((root / "cat" / "0.png").read_bytes())
    (root / "dog" / "again.png").write_bytes((root / "cat" / "0.png").read_bytes())
    save(root / "dog" / "white.png", np.full((10, 20, 3), 255, np.uint8))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(root / "dog" / "move.gif", save_all=True, append_images=frames[1:])
    (root / "dog" / "notes.txt").write_text("x")
    whole = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (50, 50, 3), np.uint8)).save(whole, "JPEG")
    Path(os.fsdecode(os.fsencode(root / "dog") + b"/cut\xff.jpg")).write_bytes(whole.getvalue()[:900])
    (root / "cat" / "page.jpg").write_text("<html></html>")
    return root


def test_the_report(collection, tmp_path, capsys):
    report = check_data(str(collection), output_dir=tmp_path / "out", num_workers=3)
    assert (report["count"], report["readable"]) == (13, 11)
    bad = {os.fsencode(row["name"]): row["reason"] for row in report["bad"]}
    assert bad == {
        b"cat/page.jpg": "not an image but HTML or XML text",
        b"dog/cut\xff.jpg": "truncated or corrupt JPEG: its data end early",
    }
    assert report["channels"] == {1: 1, 3: 10} and report["formats"] == {"PNG RGB": 9, "PNG L": 1, "GIF P": 1}
    assert report["sizes"]["height"]["min"] == 8 and report["sizes"]["width"]["max"] == 40
    assert report["sizes"]["common"][0] == {"height": 10, "width": 20, "count": 4}
    assert report["labels"]["label"]["per_class"] == {"cat": 7, "dog": 6}
    duplicates = report["duplicates"]
    assert (duplicates["count"], duplicates["groups"], duplicates["with_unlike_labels"]) == (2, 1, 1)
    assert duplicates["examples"] == [["cat/0.png", "dog/again.png", "dog/copy.png"]]
    assert report["blank"] == {"count": 2, "examples": ["dog/move.gif", "dog/white.png"]}
    assert report["animated"] == {"count": 1, "examples": ["dog/move.gif"]}
    assert report["ignored"] == {"*.txt": 1}
    assert report["bytes"] == sum(
        p.stat().st_size for p in collection.rglob("*") if p.suffix in (".png", ".gif", ".jpg")
    )
    listed = read_bad_files(tmp_path / "out" / "bad_files.jsonl")
    assert {os.fsencode(name): reason for name, reason in listed.items()} == bad
    assert json.loads((tmp_path / "out" / "check_data.json").read_text())["readable"] == 11
    printed = capsys.readouterr().out
    assert "unreadable  'cat/page.jpg': not an image but HTML" in printed and "'dog/cut\\udcff.jpg'" in printed


def test_it_is_the_same_with_any_number_of_threads_and_forgets_what_was_repaired(collection, tmp_path):
    out = tmp_path / "out"
    reports = [check_data(str(collection), output_dir=out, num_workers=workers) for workers in (1, 4)]
    assert reports[0] == reports[1]
    (collection / "cat" / "page.jpg").write_bytes((collection / "cat" / "1.png").read_bytes())
    check_data(str(collection), output_dir=out)
    assert len(read_bad_files(out / "bad_files.jsonl")) == 1


def test_all_bad_none_bad_and_nothing_there(tmp_path):
    (tmp_path / "bad").mkdir()
    for number in range(120):
        (tmp_path / "bad" / f"{number}.jpg").write_bytes(b"")
    report = check_data(str(tmp_path / "bad"), output_dir=tmp_path / "out")
    assert report["readable"] == 0 and len(report["bad"]) == 120 and report["sizes"] == {}
    save(tmp_path / "good" / "a.png", np.zeros((3, 4), np.uint8))
    assert check_data(str(tmp_path / "good"))["bad"] == []
    with pytest.raises(InputError, match="no such path"):
        check_data(str(tmp_path / "gone"))


def test_scenes_and_their_text():
    report = check_data("scenes:?n=12&size=32")
    assert report["readable"] == 12 and report["text"] == {"captions": 12} and report["formats"] == {"array uint8": 12}


def test_the_odd_images(real_data, tmp_path):
    path = Path(real_data) / "odd_images.zip"
    if not path.exists():
        pytest.skip(f"no {path}")
    with zipfile.ZipFile(path) as archive:
        rows = [json.loads(line) for line in archive.read("MANIFEST.jsonl").splitlines()]
        archive.extractall(tmp_path / "odd")  # our own zip
    report = check_data(str(tmp_path / "odd"))
    assert report["count"] + sum(report["ignored"].values()) == len(rows) + 1
    broken = {row["file"] for row in rows if row["pil"] != "ok"}
    named = {row["name"] for row in report["bad"]}
    seen = {
        row["file"] for row in rows if row["file"].endswith((".jpg", ".png", ".tif", ".bmp", ".gif", ".webp", ".dds"))
    }
    assert (broken & seen) - named == {"pillow/truncated_jpeg.jpg"}  # only its end marker is cut
    assert named - broken == {"pillow/apng/chunk_no_fctl.png"}
