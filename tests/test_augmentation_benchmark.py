"""benchmarks/augmentation.py: both arms see the same images in the same order, and what it replaces is what is used."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sslvit.config import PretrainConfig, load_config
from sslvit.data.decode import decode
from sslvit.data.loader import Loader
from sslvit.data.sources import open_source
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.verbs import pretrain as verb

TRAIN, VAL = "scenes:?n=40&size=32&objects=1&label=shape", "scenes:?n=20&size=32&objects=1&label=shape&split=val"
QUICK = ["--quick", "--train-dataset", TRAIN, "--val-dataset", VAL]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    for name in ("augmentation", "data", "rounds", "stored"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("augmentation")
    here = lambda *words, **keys: DataLoader(*words, **{**keys, "num_workers": 0})  # noqa: E731
    monkeypatch.setattr(module, "DataLoader", here)
    return module


def test_the_arms_see_the_same_images_in_the_same_order(script, monkeypatch):
    """Over the end of an epoch, and after a seek; the reference's pixels are those of the images it names."""
    source = open_source(TRAIN)
    keys = {**script.RECIPE, "data": TRAIN, "steps": 9, "batch_size": 16, "seed": 3, "mae": None}
    config = resolve(load_config(PretrainConfig, None, keys), DataFacts(len(source), 32, 3, "cpu"))[0]
    whole = [lambda image: torch.from_numpy(np.asarray(image).copy())] * 3
    monkeypatch.setattr(script, "dino_views", lambda crops, size: whole)

    def loader():
        sizes = (config.encoder.size, 3, config.batch_size)
        return Loader(source, config.crops, config.photometry, *sizes, seed=config.seed, num_workers=0)

    ours, reference = loader(), script.ReferenceBatches(loader(), source, config)
    for start in (0, 48):
        ours.seek(start)
        reference.seek(start)
        for _, (own, cursor), (other, other_cursor) in zip(range(4), iter(ours), iter(reference), strict=False):
            assert torch.equal(own.sample_ids, other.sample_ids) and cursor == other_cursor
            images = [decode(source.read(index), channels=3) for index in other.sample_ids.tolist()]
            assert np.array_equal(other.global_crops[0].numpy(), np.stack(images))


def test_the_reference_replaces_the_loader_and_the_colours_of_the_run_and_nothing_stays(script, tmp_path, monkeypatch):
    """Quick mode for real; a run that went around either name would train the reference on our views."""
    monkeypatch.setattr(verb, "write_run_encoders", lambda path: None)
    loader, colour, seen = verb._loader, script.Pretraining._colour_crops, []
    batches, coloured = script.ReferenceBatches, script.renormalized
    monkeypatch.setattr(script, "ReferenceBatches", lambda *words: seen.append("batches") or batches(*words))
    monkeypatch.setattr(script, "renormalized", lambda *words: seen.append(words[1].dtype) or coloured(*words))
    assert script.main([*QUICK, "--output-dir", str(tmp_path), "--json", str(tmp_path / "rows.json")]) == 0
    assert seen == ["batches", *[torch.float32] * 12], "one loader; global and local crops of six steps"
    assert verb._loader is loader and script.Pretraining._colour_crops is colour
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {"augmentation/ours/knn/top1", "augmentation/reference/knn/top1", "augmentation/difference"}
    apart = rows["augmentation/ours/knn/top1"]["value"] - rows["augmentation/reference/knn/top1"]["value"]
    assert rows["augmentation/difference"]["value"] == pytest.approx(apart)
    table = (tmp_path / "rows.md").read_text()
    assert "| k-NN | seed 0 | mean |" in table and f"Ours minus the reference: {100 * apart:+.1f} points" in table


def test_colours_come_out_by_the_statistics_of_the_run(script):
    class Module:
        class preprocessing:
            mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)

    pixels = torch.rand(2, 3, 4, 4)
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(values).view(-1, 1, 1) for values in pair]
        for pair in ((script.IMAGENET_MEAN, script.IMAGENET_STD), (Module.preprocessing.mean, Module.preprocessing.std))
    )
    found = script.renormalized(Module, (pixels - mean) / std, None)
    torch.testing.assert_close(found, (pixels - own_mean) / own_std)


def test_the_difference_is_paired_and_its_interval_is_students_t(script):
    mean, interval = script.difference([0.5, 0.6, 0.7], [0.4, 0.6, 0.5])
    assert mean == pytest.approx(0.1)
    half = 4.303 * np.std([0.1, 0.0, 0.2], ddof=1) / 3**0.5
    assert interval == pytest.approx((0.1 - half, 0.1 + half))
    assert script.difference([0.5], [0.4]) == (pytest.approx(0.1), None)
