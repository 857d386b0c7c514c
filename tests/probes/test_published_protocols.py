"""configs/evaluate/imagenet.yaml against the published protocols, number by number and as it runs."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import sslvit
from sslvit.config import EvaluateConfig, load_config
from sslvit.data import crops as geometry
from sslvit.encoder.config import Preprocessing
from sslvit.probes import augmented, knn, linear, logreg, protocols

ENCODER = "vit_tiny_patch16_224?pretrained=false&seed=1&depth=4&embed_dim=24&num_heads=2"
TRAIN, VAL = "scenes:?n=24&size=32&objects=1&label=shape", "scenes:?n=8&size=32&objects=1&label=shape&split=val"


def config():
    return load_config(EvaluateConfig, "evaluate/imagenet")


def test_the_config_is_the_published_protocol():
    """DINO, section 4.2 and eval_knn; DINOv2's released eval/linear and eval/log_regression."""
    found = config()
    assert found.protocol == ["knn", "linear", "logreg"] and found.controls == [] and found.num_images is None
    resized = found.image_size / found.crop_pct
    assert (found.image_size, resized) == (224, 256)
    assert knn.NUM_NEIGHBOURS == (10, 20, 100, 200) and knn.TEMPERATURE == 0.07
    assert found.linear_steps == 10 * 1250, "10 epochs of 1250 iterations"
    assert found.linear_batch_size == 8 * 128, "128 on each of 8 GPUs"
    published = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
    np.testing.assert_allclose(linear.LEARNING_RATES, published)
    assert linear.MOMENTUM == 0.9
    assert found.augment and augmented.SCALE == (0.08, 1.0)
    assert len(logreg.GRID) == 45 and (logreg.GRID[0], logreg.GRID[-1]) == (1e-6, 1e5)
    np.testing.assert_allclose(np.diff(np.log10(logreg.GRID)), 0.25)


def test_clean_images_are_resized_to_256_and_cut_to_224():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 36, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(pixels).resize((360, 280), Image.BICUBIC))
    found = config()
    ours = geometry.eval_transform(image, Preprocessing(found.image_size, crop_pct=found.crop_pct))
    published = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    theirs = published(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    assert ours.shape == theirs.shape == (3, 224, 224)
    assert (ours.float() - theirs.float()).abs().mean() < 1


def test_it_runs_as_it_says(tmp_path, monkeypatch):
    """52 heads on random crops of 90% of train, at lr x batch / 256 on a cosine; the words tell."""
    steps, groups = [], []

    def spying(self, x, y, scale, step=linear.Heads.step):
        steps.append((len(x), scale))
        step(self, x, y, scale)

    def noted(heads, stream, number, size, train=linear.train_heads, **more):
        groups.extend(heads)
        train(heads, stream, number, size, **more)

    monkeypatch.setattr(linear.Heads, "step", spying)
    monkeypatch.setattr(linear, "train_heads", noted)
    rows = sslvit.evaluate(
        config_file="evaluate/imagenet",
        encoder=ENCODER,
        train_dataset=TRAIN,
        val_dataset=VAL,
        output_dir=tmp_path,
        **{"linear_steps": 4, "linear_batch_size": 8, "image_size": 32, "num_workers": 0, "protocol": "linear"},
    )
    assert [heads.num_heads for heads in groups] == [13] * 4 and len(steps) == 4 * 4
    cosine = [8 / 256 * 0.5 * (1 + np.cos(np.pi * i / 4)) for i in range(4)]
    assert [size for size, _ in steps] == [8] * 16
    np.testing.assert_allclose([scale for _, scale in steps[::4]], cosine)
    (top1,) = (row for row in rows if row["name"] == "linear/top1")
    for words in ("DINOv2 grid", "52 heads", "random crops and flips", "crop 0.875", "chosen on 10% of train"):
        assert words in top1["protocol"]


@pytest.mark.parametrize("width", [24, 768])
def test_dinos_head_reads_four_blocks_of_small_encoders_and_the_mean_patch_of_wide_ones(width):
    """DINO's eval_linear: --n_last_blocks 4 for ViT-S; 1 and --avgpool_patchtokens for ViT-B."""
    from sslvit.probes.features import Examples, Extraction, Features

    labels = np.repeat([0, 1], 6)
    blocks = [np.random.default_rng(i).normal(size=(12, width)).astype(np.float32) for i in range(4)]
    train = Examples(type("Made", (), {"labels": {}})(), torch.nn.Identity(), Preprocessing(32), Extraction())
    train.features = Features(blocks, blocks[0] + 1, True, np.arange(12))
    said = protocols.fit_linear_dino(train, labels, EvaluateConfig())(train)[0]
    assert ("last 4 blocks of" if width == 24 else "last block + mean patch of") in said.protocol
