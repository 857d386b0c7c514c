"""Near-duplicates against the formula, and on images that are copied, cropped, recompressed, or merely alike."""

import io

import numpy as np
import pytest
from PIL import Image

from sslvit.data.sources import open_source
from sslvit.encoder.config import Preprocessing
from sslvit.probes import duplicates
from sslvit.probes.duplicates import concordance, near_duplicates
from sslvit.probes.features import Examples, Extraction


def smooth(seed, size=96):
    """A picture of soft blobs, as photographs are at 32 px."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def recompressed(image, quality=40):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def pixels_of(folder):
    return Examples(open_source(str(folder)), None, Preprocessing(32), Extraction(num_workers=0))


def test_concordance_is_lins():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    second = np.clip(first + rng.normal(0, 60, first.shape), 0, 255).astype(np.uint8)
    for a, b, said in zip(first / 255, second / 255, concordance(first, second), strict=True):
        deviations = [(a[c] - a[c].mean(), b[c] - b[c].mean()) for c in range(3)]
        shared = sum(x * y for one, two in deviations for x, y in zip(one.flat, two.flat, strict=True))
        spread = sum(a[c].var() + b[c].var() + (a[c].mean() - b[c].mean()) ** 2 for c in range(3))
        assert said == pytest.approx(2 * shared / 64 / spread, abs=1e-3)
    assert concordance(first, first) == pytest.approx(1)
    assert (concordance(first, 255 - first) < -0.9).all()


def test_blank_images_are_alike_when_their_grey_is():
    grey = np.full((3, 3, 4, 4), 100, np.uint8)
    other = np.stack([np.full((3, 4, 4), value, np.uint8) for value in (100, 101, 140)])
    assert (concordance(grey, other) >= duplicates.ALIKE).tolist() == [True, False, False]
    assert concordance(grey, other)[1] > 0.7


def test_a_common_tint_is_no_likeness():
    noise = np.random.default_rng(0).normal(0, 10, (2, 3, 16, 16))
    tinted = (np.array([200, 30, 100])[:, None, None] + noise).astype(np.uint8)
    assert abs(concordance(tinted[:1], tinted[1:])[0]) < 0.3


def test_copies_are_found_and_likenesses_are_not(tmp_path):
    train, val = tmp_path / "train", tmp_path / "val"
    train.mkdir(), val.mkdir()
    for i in range(8):
        smooth(i).save(train / f"{i}.png")
    smooth(3).save(val / "copy.png")
    recompressed(smooth(5)).resize((60, 60)).save(val / "small.jpg", quality=60)
    smooth(6).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(val / "mirror.png")
    smooth(20).save(val / "new.png")
    (val / "broken.png").write_bytes(b"no image")
    train, val = pixels_of(train), pixels_of(val)
    found = near_duplicates(train, val)
    assert {(val.features.names[p.row], train.features.names[p.other]) for p in found} == {
        ("copy.png", "3.png"),
        ("small.jpg", "5.png"),
    }
    assert found[0].concordance >= found[1].concordance >= duplicates.ALIKE


def test_pixels_decide_not_the_encoder(tmp_path):
    """Features that say all images are the same make nothing a duplicate."""
    for split, seeds in (("train", range(4)), ("val", range(10, 13))):
        (tmp_path / split).mkdir()
        for i in seeds:
            smooth(i).save(tmp_path / split / f"{i}.png")
    train, val = pixels_of(tmp_path / "train"), pixels_of(tmp_path / "val")
    for one in (train, val):
        one.features.blocks[0] = np.ones_like(one.features.cls)
    assert near_duplicates(train, val) == []
