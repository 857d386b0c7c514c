"""Models of timm without class token or patch grid: judged by their pooled features, refused in a line elsewhere."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import sslvit
from sslvit.data.loader import clean_batches
from sslvit.data.sources import open_source
from sslvit.encoder.weights import load_encoder, random_like
from sslvit.errors import InputError

TRAIN, VAL = "scenes:?n=24&size=32&objects=1&label=shape", "scenes:?n=10&size=32&objects=1&label=shape&split=val"
NAMES = ["test_resnet", "test_convnext", "test_maxvit", "deit_tiny_distilled_patch16_224"]


def evaluate(out, name, **keys):
    settings = {"protocol": "knn", "num_workers": 0, "precision": "fp32", "linear_steps": 5, **keys}
    rows = sslvit.evaluate(
        encoder=f"{name}?pretrained=false", train_dataset=TRAIN, val_dataset=VAL, output_dir=out, **settings
    )
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("name", NAMES[:2])
def test_every_protocol_but_those_on_patches(tmp_path, name):
    protocols = "knn,linear,fewshot,retrieval,cluster"
    rows = evaluate(tmp_path, name, protocol=protocols, image_size=48)
    assert all(np.isfinite(row["value"]) for row in rows.values())
    assert "pooled features" in rows["knn/top1"]["protocol"] and "48 px" in rows["knn/top1"]["protocol"]
    assert "13 heads" in rows["linear/top1"]["protocol"]
    assert {"knn/random_init/top1", "knn/pixels/top1"} <= set(rows)
    for protocol in ("attentive", "segmentation"):
        with pytest.raises(InputError, match=f"{protocol} reads patches"):
            evaluate(tmp_path / protocol, name, protocol=protocol, controls=[])
    crops = evaluate(tmp_path / "crops", name, protocol="linear", controls=[], augment=True, image_size=48)
    assert "random crops" in crops["linear/top1"]["protocol"]


@pytest.mark.parametrize("name", NAMES)
def test_embed_writes_what_timm_pools(tmp_path, name):
    data = "scenes:?n=3&size=32&objects=1"
    keys = {"precision": "fp32", "num_workers": 0}
    arrays = sslvit.embed(encoder=f"{name}?pretrained=false&seed=3", data=data, output_file=tmp_path / "f.npz", **keys)
    loaded = load_encoder(f"{name}?pretrained=false&seed=3", pooled=True)
    images = next(clean_batches(open_source(data), loaded.preprocessing, 3, 0))[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loaded.preprocessing.mean, loaded.preprocessing.std))
    with torch.no_grad():
        expected = loaded.module((images / 255 - mean) / std)
    np.testing.assert_allclose(arrays["features"], expected, atol=1e-5)
    assert loaded.preprocessing.size == timm.get_pretrained_cfg(name).input_size[1:]


def test_random_twins_depend_on_their_seed_alone():
    loaded = load_encoder("test_resnet?pretrained=false&seed=1", pooled=True)
    assert random_like(loaded, 1).fingerprint == loaded.fingerprint != random_like(loaded, 2).fingerprint


def test_a_timm_folder_has_its_weights_and_what_it_states(tmp_path):
    model = timm.create_model("test_convnext", num_classes=7)
    cfg = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_convnext", "pretrained_cfg": cfg}))
    tensors = model.state_dict()
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_encoder(str(tmp_path), pooled=True)
    model.reset_classifier(0)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.module.state_dict().items())
    assert (loaded.preprocessing.mean, loaded.preprocessing.crop_pct) == ((0.1, 0.2, 0.3), 0.9)
    assert loaded.preprocessing.size == (96, 96)
    save_file({key: value for key, value in tensors.items() if "stages.0" not in key}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="do not fit test_convnext"):
        load_encoder(str(tmp_path), pooled=True)


def test_they_are_refused_where_tokens_are_needed(tmp_path):
    for spec in ("test_resnet?pretrained=false", "resnet50"):
        with pytest.raises(InputError, match="for evaluate and embed only"):
            load_encoder(spec)
    model = timm.create_model("test_convnext")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_convnext"}))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="for evaluate and embed only"):
        load_encoder(str(tmp_path))


def test_a_size_it_cannot_take_is_named(tmp_path):
    with pytest.raises(InputError, match="takes no images of 48x48"):
        evaluate(tmp_path, "test_maxvit", controls=[], image_size=48)
