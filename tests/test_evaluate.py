"""evaluate from end to end on tiny sets: rows, leaks, edge cases, resuming."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import sslvit
from sslvit.checkpoint import drop_checkpoints_after, mark_best, save_checkpoint
from sslvit.config import as_dict
from sslvit.encoder.weights import load_encoder
from sslvit.errors import InputError
from sslvit.probes import measure as measuring
from sslvit.probes import protocols
from sslvit.probes.config import PROTOCOLS
from sslvit.probes.label_file import Labelled
from sslvit.run_folder import is_disk_full
from sslvit.verbs import evaluate as verb

ENCODER = "vit_tiny_patch16_224?pretrained=false&seed=1&img_size=32&patch_size=8&depth=2&embed_dim=24&num_heads=2"
TRAIN, VAL = "scenes:?n=40&size=32&objects=1&label=shape", "scenes:?n=16&size=32&objects=1&label=shape&split=val"
QUICK = {"linear_steps": 20, "attentive_steps": 5, "num_workers": 0, "precision": "fp32"}


def evaluate(tmp_path, train=TRAIN, val=VAL, **keys):
    settings = {"protocol": "knn", "controls": [], **QUICK, **keys}
    return sslvit.evaluate(
        encoder=ENCODER, train_dataset=str(train), val_dataset=str(val), output_dir=tmp_path / "out", **settings
    )


def by_name(rows):
    return {row["name"]: row for row in rows}


def folder_of(path, counts, seed=0):
    """Class folders of noisy flat images; counts: class name -> number of images."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        colour = np.random.default_rng(sum(name.encode())).integers(0, 255, 3)
        (path / name).mkdir(parents=True)
        for number in range(count):
            pixels = (colour + rng.integers(-20, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path / name / f"{number}.png")
    return path


def test_rows_have_the_form_others_rely_on(tmp_path):
    rows = by_name(evaluate(tmp_path, protocol="knn,linear", controls="random_init,pixels"))
    expected = {f"{p}/{c}top1" for p in ("knn", "linear") for c in ("", "random_init/", "pixels/")}
    assert expected | {"knn/k10/top1", "knn/k100/top1", "knn/k200/top1"} <= set(rows)
    stored = by_name(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert stored == rows
    row = rows["knn/top1"]
    assert list(row) == ["name", "value", "ci95", "protocol", "data", "seed", "step"]
    assert 0 <= row["ci95"][0] <= row["value"] <= row["ci95"][1] <= 1
    assert (row["data"], row["seed"], row["step"]) == (f"{TRAIN} -> {VAL}", 0, None)
    for part in ("k-NN (DINO)", "k 20", "class token", "n_train 40", "n_val 16", "32 px", "fp32", "#"):
        assert part in row["protocol"]
    assert "pixels" in rows["linear/pixels/top1"]["protocol"]
    assert "52 heads" not in row["protocol"] and "chosen: lr" in rows["linear/top1"]["protocol"]


def test_every_protocol_runs_and_every_number_has_its_interval(tmp_path):
    names = [name for name in PROTOCOLS if name != "logreg"] + ["logreg"]
    rows = by_name(evaluate(tmp_path, protocol=names, controls=["pixels"]))
    for name in PROTOCOLS:
        found = [row for key, row in rows.items() if key.startswith(f"{name}/")]
        assert found, name
        for row in found:
            low, high = row["ci95"]
            assert low <= row["value"] <= high
    assert {"retrieval/map_at_r", "cluster/nmi", "segmentation/knn/miou", "health/rankme", "fewshot/5shot/top1"} <= set(
        rows
    )
    assert "attentive/pixels/top1" not in rows


def test_several_labels_and_their_mean(tmp_path):
    several = TRAIN.replace("&label=shape", ""), VAL.replace("&label=shape", "")
    rows = by_name(evaluate(tmp_path, *several))
    parts = [rows[f"knn/{label}/top1"]["value"] for label in ("shape", "colour", "size")]
    assert rows["knn/top1"]["value"] == pytest.approx(np.mean(parts))
    assert "mean over 3 labels" in rows["knn/top1"]["protocol"]


# ---- leaks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(protocols.CLASS_PROBES))
def test_a_fitted_probe_never_sees_validation_labels(tmp_path, monkeypatch, name):
    """Whatever a probe does with what it is given, it cannot tune on validation: there are no labels in it."""
    seen = []
    original = protocols.CLASS_PROBES[name]

    def spying(train, labels, config):
        fitted = original(train, labels, config)

        def answer(val):
            seen.append((val.features.labels, val.source.labels, hasattr(val.source, "graph")))
            return fitted(val)

        return answer

    monkeypatch.setitem(protocols.CLASS_PROBES, name, spying)
    evaluate(tmp_path, protocol=[name])
    assert seen == [({}, {}, False)]


@pytest.mark.parametrize("name", ["knn", "linear", "logreg", "attentive", "fewshot"])
def test_other_validation_labels_change_no_answer(tmp_path, monkeypatch, name):
    said = []
    original = measuring.score
    monkeypatch.setattr(
        measuring, "score", lambda answers, labels, seed: said.append(answers) or original(answers, labels, seed)
    )
    evaluate(tmp_path, protocol=[name])
    agreed = verb.agree

    def with_others(*sources):
        train, val, lines = agreed(*sources)
        return train, Labelled(val, {"shape": (val.labels["shape"] + 1) % 8}, val.class_names), lines

    monkeypatch.setattr(verb, "agree", with_others)
    evaluate(tmp_path, protocol=[name], overwrite=True)
    for one, other in zip(*said, strict=True):
        assert (one.protocol, one.chosen) == (other.protocol, other.chosen)
        assert np.array_equal(one.said.labels, other.said.labels)


def test_validation_is_scored_once(tmp_path, monkeypatch):
    calls = []
    original = measuring.score
    monkeypatch.setattr(measuring, "score", lambda *a: calls.append(1) or original(*a))
    evaluate(tmp_path, protocol="knn,linear")
    assert len(calls) == 2


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ({"a": 5}, {"a": 3}),  # one class: a folder of one class has no label
        ({"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 2}),  # one image per class
        ({"a": 6, "b": 6}, {"a": 4, "b": 3}),  # seven validation images, fewer images than k
        ({"a": 4, "c": 4}, {"a": 2, "b": 2, "c": 2}),  # a class that train never shows
    ],
)
def test_small_and_odd_sets_give_a_clear_result_or_error(tmp_path, train, val):
    sets = folder_of(tmp_path / "train", train), folder_of(tmp_path / "val", val, seed=1)
    if len(train) == 1:
        with pytest.raises(InputError, match="no labels"):
            evaluate(tmp_path, *sets, protocol="knn,linear,logreg")
        return
    rows = by_name(evaluate(tmp_path, *sets, protocol="knn,linear,logreg,fewshot,retrieval,cluster"))
    assert all(np.isfinite(row["value"]) for row in rows.values())
    assert "clipped to" in rows["knn/top1"]["protocol"]
    if "b" not in train:
        assert rows["knn/top1"]["value"] <= 4 / 6  # the two images of the unseen class are wrong


def test_labels_are_matched_by_class_name(tmp_path):
    """Train's c is class 1 and validation's is class 2."""
    train = folder_of(tmp_path / "train", {"a": 8, "c": 8})
    val = folder_of(tmp_path / "val", {"a": 4, "b": 1, "c": 4}, seed=1)
    rows = by_name(evaluate(tmp_path, train, val, protocol="logreg"))
    assert rows["logreg/top1"]["value"] == pytest.approx(8 / 9)


def test_unknown_labels_are_left_out(tmp_path):
    names = [f"train-0-{i:07d}" for i in range(40)] + [f"val-0-{i:07d}" for i in range(16)]
    lines = ["name,kind"] + [f"{name},{'' if i % 3 == 0 else i % 2}" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    row = by_name(evaluate(tmp_path, label_file=str(tmp_path / "labels.csv")))["knn/top1"]
    assert "n_val 11" in row["protocol"]


def test_numbers_and_several_classes_have_their_own_scores(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"train-0-{i:07d}" for i in range(40)] + [f"val-0-{i:07d}" for i in range(16)]
    lines = ["name,age,tags"] + [f"{name},{rng.random():.3f},{rng.choice(['a|b', 'b', 'a'])}" for name in names]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    rows = by_name(evaluate(tmp_path, label_file=str(tmp_path / "labels.csv"), protocol="knn,linear"))
    assert {"knn/age/r2", "linear/age/r2", "knn/tags/map", "linear/tags/map"} <= set(rows)
    with pytest.raises(InputError, match="fewshot cannot judge label 'age'"):
        evaluate(tmp_path, label_file=str(tmp_path / "labels.csv"), protocol="fewshot")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"protocol": "knnn"}, "'knnn' is unknown"),
        ({"protocol": []}, "protocol is empty"),
        ({"controls": ["noise"]}, "'noise' is unknown"),
        ({"linear_steps": 0}, "at least 1"),
        ({"crop_pct": 1.2}, "crop_pct is 1.2"),
        ({"val": "scenes:?n=4&size=32&objects=1&label=size&split=val"}, "share no label"),
        ({"train": "/nowhere"}, "nowhere"),
    ],
)
def test_wrong_input_is_named(tmp_path, keys, message):
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, **keys)


def test_segmentation_needs_masks(tmp_path):
    sets = folder_of(tmp_path / "train", {"a": 3, "b": 3}), folder_of(tmp_path / "val", {"a": 2, "b": 2}, seed=1)
    with pytest.raises(InputError, match="no masks"):
        evaluate(tmp_path, *sets, protocol="segmentation")


def test_the_training_images_are_no_validation_set(tmp_path):
    """However the set is written; a probe could be tuned on what it is judged by."""
    folder = folder_of(tmp_path / "train", {"a": 3, "b": 3})
    with pytest.raises(InputError, match="the same images"):
        evaluate(tmp_path, folder, f"folder:{folder}")
    assert "cluster/nmi" in by_name(evaluate(tmp_path, folder, folder, protocol="cluster"))


def test_validation_images_that_train_holds_are_counted_and_named(tmp_path):
    train, val = folder_of(tmp_path / "train", {"a": 6, "b": 6}), folder_of(tmp_path / "val", {"a": 4, "b": 4}, seed=9)
    shutil.copy(train / "a" / "2.png", val / "b" / "copy.png")
    row = by_name(evaluate(tmp_path, train, val, protocol="retrieval", controls=["pixels"]))["retrieval/duplicates"]
    assert row["value"] == pytest.approx(1 / 9) and row["ci95"][1] > 0
    cases = json.loads((tmp_path / "out" / "evaluate" / "duplicates.json").read_text())
    assert [(case["val"], case["train"]) for case in cases] == [("b/copy.png", "a/2.png")]


def test_labels_from_a_file_do_not_hide_changed_images(tmp_path):
    """Features are found again by the images' own fingerprint, also where a CSV file names the classes."""
    sets = folder_of(tmp_path / "train", {"a": 20, "b": 20}), folder_of(tmp_path / "val", {"a": 20, "b": 20}, seed=1)
    lines = ["name,kind"] + [f"{c}/{i}.png,{c}" for c in "ab" for i in range(20)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    keys = {"label_file": str(tmp_path / "labels.csv"), "protocol": "health"}
    before = by_name(evaluate(tmp_path, *sets, **keys))["health/rankme"]["value"]
    image = np.random.default_rng(3).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(image).save(sets[0] / "a" / "1.png")  # none of the 16 whose bytes are looked at
    os.utime(sets[0] / "a" / "1.png", ns=(1, 1))
    assert by_name(evaluate(tmp_path, *sets, **keys))["health/rankme"]["value"] != before


# ---- folders and resuming -------------------------------------------------------------------------------------------


def test_finished_cells_are_not_measured_again(tmp_path, monkeypatch):
    first = evaluate(tmp_path, protocol="knn")
    monkeypatch.setattr(verb, "measure", lambda *_: pytest.fail("measured again"))
    assert evaluate(tmp_path, protocol="knn") == first
    monkeypatch.undo()
    calls = []
    original = verb.measure
    monkeypatch.setattr(verb, "measure", lambda name, *a: calls.append(name) or original(name, *a))
    evaluate(tmp_path, protocol="knn,linear")
    evaluate(tmp_path, protocol="knn", seed=1)
    evaluate(tmp_path, protocol="linear", linear_steps=21)
    evaluate(tmp_path, protocol="knn", overwrite=True)
    assert calls == ["linear", "knn", "linear", "knn"]


def test_a_corrected_protocol_and_renamed_classes_are_measured_again(tmp_path, monkeypatch):
    """Same images, same weights, same numbers as labels: only the words, the revision or the names differ."""
    evaluate(tmp_path, protocol="knn,logreg")
    calls = []
    original = verb.measure
    monkeypatch.setattr(verb, "measure", lambda name, *a: calls.append(name) or original(name, *a))
    with monkeypatch.context() as patch:
        patch.setattr(protocols.logreg, "PROTOCOL", "logistic regression, corrected")
        evaluate(tmp_path, protocol="knn,logreg")
        assert calls == ["logreg"]
        patch.setitem(protocols.REVISIONS, "knn", 7)
        evaluate(tmp_path, protocol="knn,logreg")
        assert calls == ["logreg", "knn"]
    monkeypatch.setattr("sslvit.data.scenes.Scenes.class_names", {"shape": [f"shape {i}" for i in range(8)]})
    evaluate(tmp_path, protocol="knn")
    assert calls == ["logreg", "knn", "knn"]


def test_every_protocol_has_its_words_in_its_hash():
    assert set(protocols.MODULES) == set(PROTOCOLS) >= set(protocols.REVISIONS)
    assert len({protocols.protocol_hash(name) for name in PROTOCOLS}) == len(PROTOCOLS)


def test_rows_are_added_and_replaced(tmp_path):
    evaluate(tmp_path, protocol="knn")
    evaluate(tmp_path, protocol="knn", seed=1)
    evaluate(tmp_path, protocol="logreg")
    evaluate(tmp_path, protocol="knn")
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    keys = [(row["name"], row["seed"]) for row in stored]
    assert len(keys) == len(set(keys))
    assert {("knn/top1", 0), ("knn/top1", 1), ("logreg/top1", 0)} <= set(keys)


def test_the_command_line_says_the_same(tmp_path, capsys):
    from sslvit.cli import main

    arguments = ["evaluate", "--encoder", ENCODER, "--train-dataset", TRAIN, "--val-dataset", VAL, "--protocol", "knn"]
    keys = ["controls=[]", "num_workers=0", "precision=fp32"]
    assert main([*arguments, "--output-dir", str(tmp_path / "cli"), *keys]) == 0
    assert "knn/top1" in capsys.readouterr().out
    stored = by_name(json.loads((tmp_path / "cli" / "results.json").read_text()))
    assert stored == by_name(evaluate(tmp_path))


@pytest.mark.parametrize("augment", [True, False])
def test_the_rate_is_that_of_the_batch_there_is(tmp_path, monkeypatch, augment):
    """128 asked for, 33 images to fit: the learning rates are times 33 / 256, and the words say 33."""
    seen = []
    step = protocols.linear.Heads.step
    monkeypatch.setattr(
        protocols.linear.Heads,
        "step",
        lambda self, x, y, scale: seen.append((len(x), scale)) or step(self, x, y, scale),
    )
    row = by_name(evaluate(tmp_path, protocol="linear", augment=augment, linear_steps=2))["linear/top1"]
    size = seen[0][0]
    assert 30 < size < 40 and seen[0][1] == pytest.approx(size / 256)
    assert f"2 steps of {size}, {'random crops' if augment else 'no augmentation'}" in row["protocol"]


def test_image_size_may_be_another(tmp_path):
    assert "48 px, crop 0.875" in by_name(evaluate(tmp_path, image_size=48, crop_pct=0.875))["knn/top1"]["protocol"]


def test_real_images(tmp_path, real_data):
    """CIFAR-10: a random encoder is worse than raw pixels, and both are far above chance."""
    train, val = f"parquet:{real_data}/cifar10/train-*.parquet", f"parquet:{real_data}/cifar10/test-*.parquet"
    rows = by_name(evaluate(tmp_path, train, val, num_images=1000, controls="pixels", image_size=32))
    assert 0.12 < rows["knn/top1"]["value"] < 0.4
    assert 0.15 < rows["knn/pixels/top1"]["value"] < 0.4


def test_a_guest_in_a_run_folder_leaves_the_run_alone(tmp_path):
    from sslvit.config import PretrainConfig
    from sslvit.run_folder import RunFolder, add_results

    config = PretrainConfig(data=TRAIN)
    with RunFolder.open(tmp_path / "out", "pretrain", config) as folder:
        add_results(folder.path, [{"name": "loss", "value": 1.0, "data": TRAIN, "seed": 0}])
        before = (folder.path / "config.yaml").read_text()
        evaluate(tmp_path)  # also while the run goes on
    assert (tmp_path / "out" / "config.yaml").read_text() == before
    names = {row["name"] for row in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert {"loss", "knn/top1"} <= names
    evaluate(tmp_path, overwrite=True)
    with RunFolder.open(tmp_path / "out", "pretrain", config):
        pass


def test_the_device_is_looked_for_before_the_data(tmp_path):
    with pytest.raises(InputError, match="device"):
        evaluate(tmp_path, train="/nowhere", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no usable CUDA"):
            evaluate(tmp_path, train="/nowhere", device="cuda")


class Bands:
    """Twelve images of five bands, of two classes."""

    def __init__(self, spec):
        self.spec, self.has_text = spec, False
        self.labels, self.class_names = {"label": np.arange(12) % 2}, {"label": ["a", "b"]}

    def __len__(self):
        return 12

    def name(self, index):
        return str(index)

    def read(self, index):
        return np.random.default_rng(index).integers(0, 255, (32, 32, 5), dtype=np.uint8)


def test_pixels_are_skipped_where_there_is_no_rgb(tmp_path, capsys, monkeypatch):
    """The encoder and its random twin are judged, and a sentence says what is not."""
    monkeypatch.setattr(verb, "open_source", Bands)
    rows = sslvit.evaluate(
        encoder=f"{ENCODER}&in_chans=5",
        train_dataset="bands:train",
        val_dataset="bands:val",
        output_dir=tmp_path / "out",
        **QUICK | {"protocol": "knn", "controls": "random_init,pixels"},
    )
    names = set(by_name(rows))
    assert {"knn/top1", "knn/random_init/top1"} <= names and "knn/pixels/top1" not in names
    assert "pixels: skipped" in capsys.readouterr().out


def run_of_two_steps(path):
    """Steps 5 and 10 of a run; 5 is its best."""
    loaded = load_encoder(ENCODER)
    meta = {"encoder": as_dict(loaded.config), "preprocessing": as_dict(loaded.preprocessing)}
    for step in (5, 10):
        tensors = {f"student.{name}": value + step / 1000 for name, value in loaded.module.state_dict().items()}
        save_checkpoint(path / "checkpoints", step, {"model": tensors}, meta, keep=2, best=5, background=False)
    return path


def test_a_step_chosen_on_validation_images_says_so(tmp_path):
    """RUN@best, RUN@step_N, its folder, or RUN where the run went back to it: the number of that step was chosen."""
    run = run_of_two_steps(tmp_path / "run")

    def flagged(spec):
        rows = sslvit.evaluate(
            encoder=str(spec),
            train_dataset=TRAIN,
            val_dataset=VAL,
            output_dir=tmp_path / "out",
            **QUICK | {"protocol": "knn", "controls": "random_init"},
        )
        told = [name for name, row in by_name(rows).items() if "the run's best by k-NN" in row["protocol"]]
        assert "knn/random_init/top1" not in told
        return "knn/top1" in told

    specs = (f"{run}@best", f"{run}@step_5", run / "checkpoints" / "step_0000005", f"{run}@step_10", run)
    assert [flagged(spec) for spec in specs] == [True, True, True, False, False]
    mark_best(run / "checkpoints", 10)
    assert [flagged(spec) for spec in (f"{run}@step_10", run)] == [True, False]  # the last one, by chance the best
    drop_checkpoints_after(run / "checkpoints", 5)
    mark_best(run / "checkpoints", 5, ended_there=True)
    assert flagged(run)


def test_a_full_disk_leaves_no_half_features(tmp_path, monkeypatch):
    monkeypatch.delenv("SSLVIT_CACHE", raising=False)
    monkeypatch.setattr(np, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("100 requested and 3 written")))
    with pytest.raises(OSError, match="100 requested") as caught:
        evaluate(tmp_path)
    assert is_disk_full(caught.value) and not list((tmp_path / "out" / "features").iterdir())
