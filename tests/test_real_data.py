"""`sslvit pretrain data=SPEC` on real images with nothing else said but the number of steps: none of it collapses.

The collections under SSLVIT_DATA stand for what users bring: Parquet, IDX files, photos in tar shards, and a folder of
odd, broken and hostile files.
"""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

import sslvit

STEPS = 40  # alarms of lines begin at step 20
COLLAPSE = ("uniform_targets", "one_prototype", "few_prototypes")


def cifar10(data: Path, tmp_path: Path) -> str:
    return f"{_present(data / 'cifar10')}"


def fashion_mnist(data: Path, tmp_path: Path) -> str:
    """torchvision reads the unpacked files: a copy beside the run."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in _present(data / "FashionMNIST" / "raw").glob("*.gz"):
        with gzip.open(packed) as source, open(raw / packed.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    return f"torchvision:FashionMNIST?root={tmp_path / 'data'}&split=train"


def flickr8k(data: Path, tmp_path: Path) -> str:
    return f"tar:{_present(data / 'flickr8k')}/train-*.tar"


def odd_images(data: Path, tmp_path: Path) -> str:
    with zipfile.ZipFile(_present(data / "odd_images.zip")) as archive:
        archive.extractall(tmp_path / "data")
    return f"{tmp_path / 'data'}"


def _present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"no {path.name} under SSLVIT_DATA")
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("collection", [cifar10, fashion_mnist, flickr8k, odd_images])
def test_a_spec_and_a_number_of_steps_are_enough(collection: Any, real_data: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"data": collection(Path(real_data), tmp_path), "steps": STEPS}
    if collection is odd_images:  # a seventh of it is meant to be unreadable, where a run stops at a twentieth
        keys["max_bad_rate"] = 0.3
    run = sslvit.pretrain(output_dir=tmp_path / "run", **keys)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [row for row in rows if "loss" in row]
    assert lines[-1]["step"] == STEPS and lines[-1]["skipped"] == 0
    assert "dino/target_entropy" in lines[-1] and "mae/loss" in lines[-1], "auto is the joint recipe"
    alarms = {row["alarm"]: row["text"] for row in rows if "alarm" in row}
    assert not [name for name in alarms if name.endswith(COLLAPSE)], alarms
    assert (run / "encoder" / "model.safetensors").exists()
