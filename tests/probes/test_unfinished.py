"""Evaluation and embedding stopped or killed at any point: exit 75, and then the same numbers bit for bit."""

import json
import os
import signal

import numpy as np
import pytest
import timm
import torch

import sslvit
from sslvit.cli import main
from sslvit.data.sources import open_source
from sslvit.encoder.config import Preprocessing
from sslvit.errors import EXIT_DONE, EXIT_RESUMABLE, Resumable
from sslvit.probes import attentive, linear, logreg, protocols, unfinished
from sslvit.probes.features import Examples, Extraction
from sslvit.probes.unfinished import Parts, Unfinished
from sslvit.signals import StopFlag
from sslvit.verbs import evaluate as verb

ENCODER = "vit_tiny_patch16_224?pretrained=false&seed=1&img_size=32&patch_size=8&depth=2&embed_dim=24&num_heads=2"
TRAIN, VAL = "scenes:?n=40&size=32&objects=1&label=shape", "scenes:?n=16&size=32&objects=1&label=shape&split=val"
KEYS = {"linear_steps": 6, "attentive_steps": 4, "num_workers": 0, "precision": "fp32", "batch_size": 8, "controls": []}


class Stops(StopFlag):
    """A signal comes just before the nth look."""

    looks = 0

    def __init__(self, after):
        super().__init__()
        self.after = after

    def is_set(self):
        self.after -= 1
        if self.after < 0:
            self.received = "SIGTERM"
        return self.after < 0


class Killed(BaseException):
    """As kill -9: nobody catches it."""


def evaluate(out, **keys):
    return sslvit.evaluate(encoder=ENCODER, train_dataset=TRAIN, val_dataset=VAL, output_dir=out, **{**KEYS, **keys})


def spied(monkeypatch):
    """The weights of every fit, as they come: rows may agree where these do not."""
    fitted = []
    from_head, attend, regress = protocols._from_head, attentive.fit, logreg.fit

    def attended(*arguments, **more):
        heads, chosen, classes = attend(*arguments, **more)
        fitted.append(torch.cat([one.detach().flatten() for one in heads.parameters()]).numpy())
        return heads, chosen, classes

    def regressed(*arguments, **more):
        model = regress(*arguments, **more)
        fitted.append(model.weight)
        return model

    monkeypatch.setattr(protocols, "_from_head", lambda head, *a: fitted.append(head.weight) or from_head(head, *a))
    monkeypatch.setattr(attentive, "fit", attended)
    monkeypatch.setattr(logreg, "fit", regressed)
    return fitted


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch):
    """Features are kept in OUT, so that every evaluation extracts its own."""
    monkeypatch.setenv("SSLVIT_CACHE", "")


@pytest.mark.parametrize(
    ("keys", "looks"),
    [
        ({"protocol": "knn"}, 3),
        ({"protocol": "knn,linear"}, 5),
        ({"protocol": "linear", "augment": True}, 5),
        ({"protocol": "linear_mae"}, 70),
        ({"protocol": "linear_dino"}, 40),
        ({"protocol": "attentive"}, 10),
        ({"protocol": "logreg"}, 1280),
        ({"protocol": "segmentation"}, 300),
    ],
)
def test_stopped_again_and_again_it_ends_with_the_same_rows(tmp_path, monkeypatch, keys, looks):
    """A signal after so many looks at the flag, until the run comes through; a look stands for a minute of work where
    a fit cannot be put aside at every look.
    """
    slow = keys["protocol"] in ("attentive", "logreg", "segmentation")
    monkeypatch.setattr(unfinished, "SECONDS", 0.0 if slow else unfinished.SECONDS)
    monkeypatch.setattr(linear, "mae_batch_size", lambda n: 20)
    fitted = spied(monkeypatch)
    expected, whole = evaluate(tmp_path / "whole", **keys), fitted[-1:]
    monkeypatch.setattr(unfinished, "MAX_IMAGES", 16)
    monkeypatch.setattr(verb, "StopFlag", lambda: Stops(looks))
    rows, stops = None, 0
    while rows is None and stops < 20:
        try:
            rows = evaluate(tmp_path / "out", **keys)
        except Resumable as stopped:
            stops += 1
            assert "SIGTERM" in str(stopped)
    assert stops and rows == expected
    assert [weights.tobytes() for weights in whole] == [weights.tobytes() for weights in fitted[-1:]]
    assert not list((tmp_path / "out" / "evaluate").glob("unfinished*"))
    assert not list((tmp_path / "out" / "features").glob("*.parts"))


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"protocol": "linear"}, (linear.Heads, "step")),
        ({"protocol": "linear", "augment": True}, (linear.Heads, "step")),
        ({"protocol": "attentive"}, (attentive, "_adam_step")),
    ],
)
def test_a_kill_amid_the_heads_loses_one_step(tmp_path, monkeypatch, keys, place):
    fitted = spied(monkeypatch)
    expected, whole = evaluate(tmp_path / "whole", **keys), fitted[-1]
    steps = []
    step = getattr(*place)

    def spying(*arguments, **more):
        steps.append(1)
        if len(steps) == kill_at:
            raise Killed
        return step(*arguments, **more)

    kill_at = 0
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    monkeypatch.setattr(*place, spying)
    evaluate(tmp_path / "counted", **keys)
    total, kill_at = len(steps), len(steps) * 2 // 3
    steps.clear()
    with pytest.raises(Killed):
        evaluate(tmp_path / "out", **keys)
    kill_at = 0
    steps.clear()
    assert evaluate(tmp_path / "out", **keys) == expected and fitted[-1].tobytes() == whole.tobytes()
    assert len(steps) <= total - total * 2 // 3 + 4


def test_a_real_signal_ends_with_75_and_the_command_goes_on(tmp_path, monkeypatch, capsys):
    expected = evaluate(tmp_path / "whole", protocol="knn")
    words = ["evaluate", "--encoder", ENCODER, "--train-dataset", TRAIN, "--val-dataset", VAL, "--protocol", "knn"]
    words += ["--output-dir", str(tmp_path / "out"), "controls=[]", "num_workers=0", "precision=fp32", "batch_size=8"]
    calls = []
    encode = Examples.encode

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, *arguments)

    monkeypatch.setattr(Examples, "encode", interrupted)
    assert main(words) == EXIT_RESUMABLE
    assert "stopped by SIGTERM" in capsys.readouterr().err and len(calls) == 3
    assert main(words) == EXIT_DONE
    assert len(calls) == 7 and "going on from image 24 of 40" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == expected


def test_embed_goes_on_beside_its_file(tmp_path, monkeypatch):
    keys = {"encoder": ENCODER, "data": TRAIN, "num_workers": 0, "batch_size": 8}
    whole = sslvit.embed(output_file=tmp_path / "whole.npz", **keys)
    monkeypatch.setattr("sslvit.verbs.embed.StopFlag", lambda: Stops(3))
    with pytest.raises(Resumable, match="32 of 40 images are done"):
        sslvit.embed(output_file=tmp_path / "f.npz", **keys)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".f.npz.parts", "whole.npz"]
    (part,) = (tmp_path / ".f.npz.parts").glob("*/*.npz")
    with np.load(part) as arrays:
        assert {name: array.shape for name, array in arrays.items()} == {
            "block_0": (32, 24), "mean_patch": (32, 0), "indices": (32,)
        }, "class tokens and nothing else"  # fmt: skip
    again = sslvit.embed(output_file=tmp_path / "f.npz", **keys)
    assert np.array_equal(again["features"], whole["features"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npz", "whole.npz"]


# ---- features -------------------------------------------------------------------------------------------------------


def examples(tmp_path, **extraction):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 5, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
    net = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    settings = Extraction(batch_size=4, num_workers=0, cache_dir=tmp_path, **extraction)
    return Examples(open_source(TRAIN), net, Preprocessing(32), settings, "weights")


def arrays_of(features):
    return [*features.blocks, features.mean_patch, features.indices]


@pytest.mark.parametrize("kill_at", [2, 5, 9])
def test_features_killed_on_the_way_are_the_same(tmp_path, monkeypatch, kill_at):
    """Parts of two batches: a kill loses at most one of them and the batch in work; damaged parts are made again."""
    whole = examples(tmp_path / "whole").features
    monkeypatch.setattr(unfinished, "MAX_IMAGES", 8)
    calls = []
    encode = Examples.encode

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == kill_at:
            raise Killed
        return encode(self, *arguments)

    monkeypatch.setattr(Examples, "encode", killed)
    with pytest.raises(Killed):
        _ = examples(tmp_path / "out").features
    calls.clear()
    left, kill_at = 10 - (kill_at - 1) // 2 * 2, 0
    for found, expected in zip(arrays_of(examples(tmp_path / "out").features), arrays_of(whole), strict=True):
        assert np.array_equal(found, expected) and found.dtype == expected.dtype
    assert len(calls) == left
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [""]


def test_unreadable_images_do_not_move_the_batches(tmp_path, monkeypatch):
    """Two whole batches and some more cannot be read; where it goes on, the others are batched as without a stop."""
    source = type(open_source(TRAIN))
    read = source.read
    bad = {0, 5, *range(12, 20), 21, 39}

    def read_some(self, index):
        if index in bad:
            raise OSError("bad")
        return read(self, index)

    monkeypatch.setattr(source, "read", read_some)
    batches = []
    encode = Examples.encode
    monkeypatch.setattr(
        Examples, "encode", lambda self, images, n: batches.append(len(images)) or encode(self, images, n)
    )
    whole, expected = examples(tmp_path / "whole").features, list(batches)
    for looks in range(6):
        batches.clear()
        with pytest.raises(Resumable):
            _ = examples(tmp_path / f"{looks}", stop=Stops(looks)).features
        features = examples(tmp_path / f"{looks}").features
        assert batches == expected and np.array_equal(features.indices, whole.indices)
        assert all(np.array_equal(a, b) for a, b in zip(features.blocks, whole.blocks, strict=True))


def test_damaged_parts_are_made_again(tmp_path):
    parts = Parts(tmp_path)
    for start in (0, 4, 12):
        parts.write(start, start + 4, {"block_0": np.full((4, 2), start)})
    assert [len(found) for found in parts.read()[0]] == [1, 1] and parts.read()[1] == 8  # 8 to 12 is missing
    file = tmp_path / "0000000004-0000000008.npz"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert parts.read()[1] == 4 and not file.exists()


def test_class_tokens_alone_take_a_fifth_and_are_found_in_the_whole(tmp_path, monkeypatch):
    few = examples(tmp_path, class_token_only=True).features
    whole = examples(tmp_path / "whole").features
    assert len(few.blocks) == 1 and few.mean_patch.shape == (40, 0) and len(whole.blocks) == 4
    assert np.array_equal(few.cls, whole.cls)
    monkeypatch.setattr(Examples, "_extract", lambda self, parts: pytest.fail("extracted again"))
    for place in ("", "whole"):
        assert np.array_equal(examples(tmp_path / place, class_token_only=True).features.cls, whole.cls)


# ---- states ---------------------------------------------------------------------------------------------------------


def test_a_state_is_kept_when_it_is_time_or_asked_to_stop(tmp_path, monkeypatch):
    weight = torch.arange(3.0)
    now = Unfinished(tmp_path, Stops(2))
    now.offer("w", {"weight": weight}, {"step": 1})
    assert now.load("w") is None, "a minute has not passed"
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    now.named("a label/of two").offer("w", {"weight": weight + 1}, {"step": 2})
    assert (tmp_path / "a_label_of_two" / "w.safetensors").exists()
    monkeypatch.undo()
    with pytest.raises(Resumable):
        now.offer("w", {"weight": weight + 2}, {"step": 3})
    found = torch.zeros(3)
    assert Unfinished(tmp_path).resume("w", {"weight": found}) == 3 and torch.equal(found, weight + 2)
    assert Unfinished(tmp_path).resume("w", {"weight": torch.zeros(4)}) == 0, "of another shape"
    (tmp_path / "w.safetensors").write_bytes(b"damaged")
    assert Unfinished(tmp_path).load("w") is None
    now.clear()
    assert not tmp_path.exists()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    Unfinished().offer("w", {"weight": torch.zeros(2)}, {"step": 1})
    assert Unfinished().load("w") is None and not list(tmp_path.iterdir())
