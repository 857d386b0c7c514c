"""Features against the encoder's own forward pass; the cache; choice of images; label files; the monitor."""

import dataclasses
import os
import threading

import numpy as np
import pytest
import timm
import torch

from sslvit.data.loader import clean_batches
from sslvit.data.sources import open_source
from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError
from sslvit.probes import features as module
from sslvit.probes.augmented import crop_batches, linear_stream, two_views
from sslvit.probes.features import Examples, Extraction, Features, Subset, choose_indices, source_digest
from sslvit.probes.label_file import Labelled, with_label_file
from sslvit.probes.linear import input_variants
from sslvit.probes.monitor import KnnMonitor

SPEC = "scenes:?n=24&size=32&objects=1&label=shape"
PREPROCESSING = Preprocessing(32)


def encoder(class_token=True, seed=0):
    torch.manual_seed(seed)
    arguments = {} if class_token else {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=5,
        embed_dim=24,
        num_heads=2,
        num_classes=0,
        **arguments,
    ).eval()


def examples(net=None, spec=SPEC, fingerprint=None, **extraction):
    extraction = Extraction(batch_size=7, num_workers=0, **extraction)
    return Examples(open_source(spec), encoder() if net is None else net, PREPROCESSING, extraction, fingerprint)


@torch.no_grad()
def timm_tokens(net):
    """What timm says of each image alone: normed tokens of the last four blocks, the last first."""
    images = torch.cat([images for images, _ in clean_batches(open_source(SPEC), PREPROCESSING, 24, 0)])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    layers = net.forward_intermediates(
        (images / 255 - mean) / std, indices=4, norm=True, output_fmt="NLC", return_prefix_tokens=True,
        intermediates_only=True,
    )  # fmt: skip
    return layers[::-1]


def test_features_are_timms_class_tokens():
    net = encoder()
    got, layers = examples(net).features, timm_tokens(net)
    for block, (_, prefix) in zip(got.blocks, layers, strict=True):
        np.testing.assert_allclose(block, prefix[:, 0], atol=1e-5)
    np.testing.assert_allclose(got.mean_patch, layers[0][0].mean(dim=1), atol=1e-5)
    assert np.array_equal(got.labels["shape"], open_source(SPEC).labels["shape"])
    assert got.names[3] == open_source(SPEC).name(3)
    assert got.has_class_token and len(got.blocks) == 4 and got.cls.dtype == np.float32


def test_without_a_class_token_the_mean_patch_stands_for_it():
    net = encoder(class_token=False)
    got = examples(net).features
    assert not got.has_class_token
    np.testing.assert_allclose(got.cls, net.forward_features(_pixels()).mean(dim=1).detach(), atol=1e-5)
    assert np.array_equal(got.mean_patch, got.cls)


def _pixels():
    images = torch.cat([images for images, _ in clean_batches(open_source(SPEC), PREPROCESSING, 24, 0)])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    return (images / 255 - mean) / std


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_class_token_that_is_kept_keeps_no_patches(precision):
    """Views would hold all tokens of all images until the last one is read: 60 GB for 50,000 images of a ViT-S/16."""
    net = encoder()
    for layer in module.forward_clean(net, torch.randn(3, 3, 32, 32), 2, precision):
        assert layer.cls.untyped_storage().nbytes() == 3 * net.num_prefix_tokens * net.embed_dim * 4
        assert layer.patches.shape[1] == 16 and layer.cls.dtype == torch.float32


def test_pixels_are_all_pixels_of_the_image():
    one = Examples(open_source(SPEC), None, PREPROCESSING, Extraction(num_workers=0)).features
    images = np.stack([open_source(SPEC).read(i) for i in range(24)])
    assert one.cls.shape == (24, 3 * 32 * 32)
    np.testing.assert_allclose(np.sort(one.cls), np.sort((images / 127.5 - 1).reshape(24, -1)), atol=1e-5)


def test_evaluation_leaves_the_training_mode_and_dropout_alone():
    net = encoder().train()
    assert np.array_equal(examples(net).features.cls, examples(net.eval()).features.cls)
    net.train()
    _ = examples(net).features
    assert net.training


def test_cache_is_found_again_and_depends_on_everything(tmp_path, monkeypatch):
    net = encoder()
    first = examples(net, fingerprint="a", cache_dir=tmp_path).features
    calls = []
    original = Examples._extract
    monkeypatch.setattr(Examples, "_extract", lambda self, parts: calls.append(1) or original(self, parts))
    again = examples(net, fingerprint="a", cache_dir=tmp_path).features
    assert not calls
    for one, other in zip((*first.blocks, first.mean_patch), (*again.blocks, again.mean_patch), strict=True):
        assert np.array_equal(one, other)
    assert again.names == first.names
    changed = [
        examples(net, fingerprint="b", cache_dir=tmp_path),
        examples(net, fingerprint="a", cache_dir=tmp_path, precision="bf16"),
        examples(net, fingerprint="a", cache_dir=tmp_path, num_images=20),
        examples(net, spec=SPEC + "&seed=1", fingerprint="a", cache_dir=tmp_path),
    ]
    changed[0].preprocessing = dataclasses.replace(PREPROCESSING, crop_pct=0.8)
    for number, one in enumerate(changed, 1):
        _ = one.features
        assert len(calls) == number
    for entry in tmp_path.iterdir():
        (entry / "block_0.npy").write_bytes(b"damaged")
    assert np.array_equal(examples(net, fingerprint="a", cache_dir=tmp_path).features.cls, first.cls)
    assert len(calls) == 5


def test_changed_files_change_the_digest(tmp_path):
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / name)
    before = source_digest(open_source(str(tmp_path)), np.arange(2))
    assert before == source_digest(open_source(str(tmp_path)), np.arange(2))
    Image.new("RGB", (8, 8), (90, 9, 9)).save(tmp_path / "b.png")
    assert before != source_digest(open_source(str(tmp_path)), np.arange(2))


def test_unreadable_images_are_left_out_and_labels_stay_in_step(tmp_path):
    from PIL import Image

    for number in range(6):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (40 * number, 9, 9)).save(folder / f"{number}.png")
    (tmp_path / "class0" / "2.png").write_bytes(b"no image")
    got = examples(spec=str(tmp_path)).features
    assert len(got) == 5
    assert [int(name[5]) for name in got.names] == got.labels["label"].tolist()


def test_nan_features_name_the_image():
    net = encoder()
    with torch.no_grad():
        net.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="first: train-0-0000000"):
        _ = examples(net).features


def test_taken_examples_hold_no_labels_unless_asked():
    whole = examples()
    hidden = whole.take(np.array([3, 5]), labels=False)
    assert hidden.features.labels == {} == hidden.source.labels
    assert not hasattr(hidden.source, "masks") and not hasattr(hidden.source, "graph")
    assert np.array_equal(hidden.features.cls, whole.features.cls[[3, 5]])
    tokens, indices = next(hidden.tokens(hidden.features.indices))
    np.testing.assert_allclose(tokens[0].cls, hidden.features.cls, atol=1e-5)
    assert indices.tolist() == [3, 5]


def test_choice_of_images_is_keyed_and_sorted():
    chosen = choose_indices(100, 10, 3)
    assert len(set(chosen)) == 10 and np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, choose_indices(100, 10, 3))
    assert not np.array_equal(chosen, choose_indices(100, 10, 4))
    assert np.array_equal(choose_indices(5, 10), np.arange(5))


# ---- crops ----------------------------------------------------------------------------------------------------------


def test_crops_come_from_the_chosen_rows_and_differ_from_pass_to_pass():
    whole, rows = examples(), np.array([2, 3, 11, 20])
    stream = crop_batches(whole, rows, 4, seed=0)
    (first, order), (second, _) = next(stream), next(stream)
    assert first.shape == (1, 4, 3, 32, 32)
    assert sorted(order) == rows.tolist()
    assert not torch.equal(first, second)


def test_linear_stream_matches_the_variants_of_cached_features():
    whole = examples()
    features, labels = whole.features, whole.features.labels["shape"]
    inputs, targets = next(linear_stream(whole, labels, np.arange(24), 0, 6))
    variants = input_variants(features.blocks, features.mean_patch, features.has_class_token)
    assert [x.shape[1] for x in inputs] == [v.matrix().shape[1] for v in variants]
    assert set(targets.tolist()) <= set(range(len(np.unique(labels))))


def test_two_views_are_of_the_same_images():
    first, second = two_views(examples(), 10, seed=0)
    assert first.shape == second.shape == (10, 24)
    assert not np.array_equal(first, second)


# ---- labels from a file ---------------------------------------------------------------------------------------------


def test_label_file_gives_classes_several_classes_and_numbers(tmp_path):
    names = [open_source(SPEC).name(i) for i in range(24)]
    lines = ["image,kind,tags,age", f"{names[0]},cat,a|b,1.5", f"{names[2]},dog,b,2", f"elsewhere/{names[3]},7,,"]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    source = with_label_file(open_source(SPEC), tmp_path / "labels.csv")
    assert source.class_names == {"kind": ["7", "cat", "dog"], "tags": ["a", "b"]}
    assert source.labels["kind"][:4].tolist() == [1, -1, 2, -1]
    assert source.labels["tags"][:3].tolist() == [[1, 1], [-1, -1], [0, 1]]
    np.testing.assert_array_equal(source.labels["age"][:3], [1.5, np.nan, 2.0])
    assert len(source) == 24 and source.read(1).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("image\nx", "header"), ("image,y\na,b,c", "line 2"), ("image,y\na,b", "names no image"), ("", "header")],
)
def test_bad_label_files_are_named(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        with_label_file(open_source(SPEC), tmp_path / "labels.csv")


# ---- the monitor ----------------------------------------------------------------------------------------------------


def test_monitor_equals_the_probe_and_reads_images_once(monkeypatch):
    train, val = open_source(SPEC), open_source(SPEC + "&split=val")
    monitor = KnnMonitor(train, val, PREPROCESSING, num_workers=0, precision="fp32")
    monkeypatch.setattr("sslvit.data.scenes.Scenes.read", lambda *_: pytest.fail("decoded again"))
    net = encoder().train()
    numbers = monitor(net, step=3)
    assert net.training
    assert set(numbers) == {"knn/top1", "rankme", "feature_std"}
    monkeypatch.undo()
    fresh = [examples(net, spec=spec).features for spec in (SPEC, SPEC + "&split=val")]
    ranking = module_knn(fresh)
    assert numbers["knn/top1"] == pytest.approx((ranking[:, 0] == fresh[1].labels["shape"]).mean())


def module_knn(fresh):
    from sslvit.probes.knn import knn

    return knn(fresh[0].cls, fresh[0].labels["shape"], fresh[1].cls, ks=(20,))[20]


def test_monitor_of_several_labels_and_of_none():
    several = "scenes:?n=20&size=32&objects=1"
    monitor = KnnMonitor(open_source(several), open_source(several + "&split=val"), PREPROCESSING, num_workers=0)
    numbers = monitor(encoder(), 0)
    parts = [numbers[f"knn/{name}/top1"] for name in ("shape", "colour", "size")]
    assert numbers["knn/top1"] == pytest.approx(np.mean(parts))
    alone = KnnMonitor(open_source(several), None, PREPROCESSING, 8, num_workers=0)
    assert set(alone(encoder(), 0)) == {"rankme", "feature_std"}
    assert len(alone.train) == 8


def test_monitor_holds_out_images_of_its_own_where_nobody_else_judges():
    """Halves that share no image, each at most num_images; too few, or none with labels, judge nothing."""
    train, val = open_source("scenes:?n=210&size=32&objects=1&label=shape"), open_source(SPEC + "&split=val")
    for num_images, size in ((5000, 105), (101, 101)):
        monitor = KnnMonitor(train, None, PREPROCESSING, num_images, hold_out=True, num_workers=0)
        assert len(monitor.train) == len(monitor.val) == size
        assert not {x.numpy().tobytes() for x in monitor.train} & {x.numpy().tobytes() for x in monitor.val}
        assert "knn/top1" in monitor(encoder(), 0)
    few = KnnMonitor(train, None, PREPROCESSING, 99, hold_out=True, num_workers=0)
    assert len(few.train) == 99 and not len(few.val) and "knn/top1" not in few(encoder(), 0)
    given = KnnMonitor(train, val, PREPROCESSING, hold_out=True, num_workers=0)
    assert (len(given.train), len(given.val)) == (len(train), len(val)), "a validation set with labels comes first"
    unlabelled = Subset(train, np.arange(210))
    alone = KnnMonitor(unlabelled, unlabelled, PREPROCESSING, hold_out=True, num_workers=0)
    assert len(alone.train) == 210 and not alone.labels


def test_monitor_matches_classes_by_name_and_leaves_unknown_labels_out(tmp_path):
    names = [f"train-0-{i:07d},{'ab'[i % 2]}" for i in range(24)] + [f"val-0-{i:07d},{'abc'[i % 3]}" for i in range(9)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,kind", *names]))
    (tmp_path / "others.csv").write_text("\n".join(["image,kind", *names[24:], "z,A"]))
    train = with_label_file(open_source(SPEC), tmp_path / "labels.csv")
    val = with_label_file(open_source(SPEC + "&split=val"), tmp_path / "others.csv")
    monitor = KnnMonitor(train, val, PREPROCESSING, num_workers=0)
    assert monitor.labels["kind"][1][:10].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, -1]
    assert 0 <= monitor(encoder(), 0)["knn/top1"] <= 1


def test_monitor_of_labels_that_are_no_classes_or_cannot_be_matched(tmp_path, capsys):
    """A run needs no labels: it goes on without k-NN, and what keeps it from it is said."""
    names = [f"train-0-{i:07d}" for i in range(24)]
    for file, label in (("tags", "a|b"), ("ages", "0.5"), ("names", "a")):
        (tmp_path / file).write_text("\n".join(["image,kind", *(f"{name},{label}" for name in names)]))
    source = {file.name: with_label_file(open_source(SPEC), file) for file in tmp_path.iterdir()}
    source["numbers"] = Labelled(open_source(SPEC), {"kind": np.full(24, 7)}, {})
    for train, val in (("tags", "tags"), ("ages", "ages"), ("names", "numbers")):
        monitor = KnnMonitor(source[train], source[val], PREPROCESSING, 8, num_workers=0)
        assert set(monitor(encoder(), 0)) == {"rankme", "feature_std"}
    assert "k-NN is not watched" in capsys.readouterr().out


def test_monitor_of_a_diverged_encoder_says_so_and_goes_on():
    net = encoder()
    with torch.no_grad():
        net.norm.weight.fill_(float("nan"))
    monitor = KnnMonitor(open_source(SPEC), open_source(SPEC), PREPROCESSING, num_workers=0)
    assert np.isnan(monitor(net, 0)["rankme"])


def test_precision_follows_the_device():
    assert module.default_precision("cpu") in ("bf16", "fp32")


def test_two_processes_of_one_number_store_the_same_features(tmp_path, monkeypatch):
    """As tasks of an array do, each in a container of its own."""
    both, save, problems = threading.Barrier(2), np.save, []
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(np, "save", lambda file, values: ("indices" in file.name and both.wait(5), save(file, values)))
    raw = Features([np.ones((3, 4), np.float32)], np.ones((3, 4), np.float32), True, np.arange(3))

    def store():
        try:
            module._write_entry(tmp_path / "cache" / "entry", raw)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=store) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and os.listdir(tmp_path / "cache") == ["entry"]
    np.testing.assert_array_equal(module._read_entry(tmp_path / "cache" / "entry").blocks[0], raw.blocks[0])
