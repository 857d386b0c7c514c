"""Pictures against independent ways to make them: NumPy's SVD, plain loops over patches, brute-force neighbours."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit.data.scenes import Scenes
from sslvit.data.sources import open_source
from sslvit.encoder.config import EncoderConfig, Preprocessing
from sslvit.encoder.vit import create_encoder, forward_tokens
from sslvit.encoder.weights import load_encoder
from sslvit.objectives.config import MaeConfig
from sslvit.objectives.mae import Mae, normalized
from sslvit.pages import pictures as making
from sslvit.pages.data_uri import Encoding, data_uri
from sslvit.pages.patch_colours import patch_colours, principal_components
from sslvit.pages.pictures import Labels, Sample, as_pictures, draw_sample, heat, neighbour_strips, open_gallery, shrunk
from sslvit.pages.reconstructions import GREY, paste, reconstruct, to_pixels, with_statistics_of

TINY = "vit_tiny_patch16_224?pretrained=false&seed=0&img_size=32&patch_size=8&embed_dim=24&depth=2&num_heads=2"


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(TINY)


# ---- patch features as colours --------------------------------------------------------------------------------------


def test_principal_components_are_those_of_the_svd():
    rows = np.random.default_rng(0).normal(size=(200, 17)) @ np.random.default_rng(1).normal(size=(17, 17)) + 5
    found = principal_components(rows, 3)
    centred = rows - rows.mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    for axis in range(3):
        sign = np.sign(vt[axis][np.abs(vt[axis]).argmax()])
        np.testing.assert_allclose(found[:, axis], sign * u[:, axis] * s[axis], atol=1e-8)
    with pytest.raises(AssertionError):  # without centring the first axis is the mean
        u, s, _ = np.linalg.svd(rows, full_matrices=False)
        np.testing.assert_allclose(np.abs(found[:, 0]), np.abs(u[:, 0] * s[0]), atol=1e-3)


def test_principal_components_of_few_dimensions():
    assert principal_components(np.arange(10.0)[:, None], 3).shape == (10, 3)
    assert not principal_components(np.ones((8, 5)), 3).any()


def test_patch_colours_share_one_scale():
    patches = np.random.default_rng(0).normal(size=(4, 6, 9))
    patches[3] = patches[0]
    maps = patch_colours(patches, (2, 3))
    assert maps.shape == (4, 2, 3, 3) and maps.dtype == np.uint8
    assert (maps[3] == maps[0]).all(), "equal features, equal colours, in any image"
    assert maps.min() == 0 and maps.max() == 255
    assert (patch_colours(np.ones((2, 4, 5)), (2, 2)) == 128).all(), "nothing to tell apart is grey"


def test_patch_colours_order_of_patches():
    patches = np.zeros((1, 6, 2))
    patches[0, 4] = 10  # second row, second of three columns
    found = patch_colours(patches, (2, 3))[0, :, :, 0].astype(int)
    assert np.abs(found - found[0, 0]).argmax() == 4


# ---- reconstructions ------------------------------------------------------------------------------------------------


def test_paste_keeps_visible_patches_exactly():
    patches = torch.randint(0, 256, (2, 9, 12), dtype=torch.uint8)
    removed = torch.stack([torch.randperm(9)[:5] for _ in range(2)])
    guess = torch.randint(0, 256, (2, 5, 12), dtype=torch.uint8)
    found = paste(patches, removed, guess)
    for b in range(2):
        for n in range(9):
            where = (removed[b] == n).nonzero()
            assert (found[b, n] == (guess[b, where[0, 0]] if len(where) else patches[b, n])).all()


def test_statistics_invert_the_normalisation():
    images = torch.randn(2, 3, 8, 8)
    patches = images.reshape(2, 3, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 4, 48)
    found = with_statistics_of(normalized(patches), patches)
    torch.testing.assert_close(found, patches, atol=1e-5, rtol=1e-5)


def test_to_pixels_inverts_the_preprocessing():
    preprocessing = Preprocessing(8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    pixels = torch.randint(0, 256, (1, 4, 12), dtype=torch.uint8)
    mean, std = (torch.tensor(values).repeat(4) for values in (preprocessing.mean, preprocessing.std))
    assert (to_pixels((pixels / 255 - mean) / std, preprocessing) == pixels).all()


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_reconstruction_shows_what_the_decoder_was_given(norm_pixels):
    torch.manual_seed(0)
    config = EncoderConfig("vit_tiny_patch16_224", 4, 16, True, 2, 3, embed_dim=24, depth=2, num_heads=2)
    student = create_encoder(config).eval()
    section = MaeConfig(decoder_dim=16, decoder_depth=1, decoder_num_heads=2, norm_pixels=norm_pixels)
    mae = Mae(section, 24, 4, (4, 4), 3, 2).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    visible, guessed = reconstruct(student, mae, images, Preprocessing(16), seed=3)
    assert visible.shape == guessed.shape == images.shape and guessed.dtype == torch.uint8
    for b in range(3):
        kept = 0
        for row in range(0, 16, 4):
            for column in range(0, 16, 4):
                place = (b, slice(None), slice(row, row + 4), slice(column, column + 4))
                if (visible[place] == GREY).all():
                    assert not (guessed[place] == images[place]).all()
                else:
                    kept += 1
                    assert (visible[place] == images[place]).all() and (guessed[place] == images[place]).all()
        assert kept == 4, "a quarter of 16 patches is visible"
    other = reconstruct(student, mae, images, Preprocessing(16), seed=4)[0]
    assert not (other == visible).all(), "the mask depends on the seed"


def test_as_pictures_shows_any_number_of_channels():
    images = torch.randint(0, 256, (2, 5, 4, 6), dtype=torch.uint8)
    assert (as_pictures(images)[1] == images[1, :3].permute(1, 2, 0).numpy()).all()
    grey = as_pictures(images[:, :2])[0]
    assert grey.shape == (4, 6, 3) and (grey[..., 2] == images[0, 0].numpy()).all()


# ---- maps, samples, neighbours --------------------------------------------------------------------------------------


def test_heat_rises_in_lightness():
    colours = heat(np.linspace(-3, 9, 256)[None])[0].astype(float)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -0.6).all() and lightness[-1] > lightness[0] + 180
    assert heat(np.zeros((2, 2))).shape == (2, 2, 3)


def test_draw_sample_passes_over_what_cannot_be_read(encoder, tmp_path):
    for i in range(4):
        Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    sample = draw_sample(open_source(str(tmp_path)), encoder, np.arange(4), 2)
    assert sample.places == [0, 2] and sample.images.shape == (2, 3, 32, 32)
    assert (sample.images[1] == 120).all()


def test_neighbours_are_those_of_brute_force(encoder, monkeypatch):
    monkeypatch.setattr(making, "GALLERY", (8, 40))
    monkeypatch.setattr(making, "GALLERY_SECONDS", 60.0)
    source = Scenes(n=40, size=32, objects=(1, 1))
    gallery = open_gallery(source, encoder)
    strips = neighbour_strips(gallery)
    assert len(gallery.sample) == 40 and len(strips) == making.NUM_QUERIES
    places = np.random.default_rng(making.SEED).permutation(40)
    sample = draw_sample(source, encoder, places, 40)
    with torch.no_grad():
        features = forward_tokens(encoder.module, making.normal(sample.images, encoder)).cls.double().numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for query, strip in enumerate(strips):
        similarity = unit @ unit[query]
        similarity[query] = -2
        best = np.argsort(-similarity)[: making.NUM_NEIGHBOURS]
        assert [float(p.caption.split(" · ")[0]) for p in strip.others] == pytest.approx(similarity[best], abs=0.0051)
        for picture, place in zip(strip.others, best, strict=True):
            assert (picture.pixels == as_pictures(sample.images[place : place + 1])[0]).all()
        assert strip.first.caption == Labels(source.labels, source.class_names)(sample.places[query])


def test_worst_cases_and_near_duplicates_are_shown(encoder, tmp_path):
    """A folder with a copy, and an image among the wrong class."""
    rng = np.random.default_rng(0)
    for name, colour in (("a", (220, 40, 40)), ("b", (30, 60, 200))):
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = np.array(colour) + rng.normal(0, 25, (40, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "3.png").rename(tmp_path / "b" / "wrong.png")
    with Image.open(tmp_path / "b" / "5.png") as image:
        image.save(tmp_path / "b" / "copy.png")
    gallery = open_gallery(open_source(str(tmp_path)), encoder)
    worst = making.worst_strips(gallery)
    assert worst[0].first.alt == "query: b/wrong.png"
    assert worst[0].first.caption.startswith("neighbours say a (") and worst[0].first.caption.endswith("· b")
    (pair,) = making.duplicate_strips(gallery)
    assert {"5.png", "copy.png"} == {text.rpartition("/")[2] for text in (pair.first.alt, pair.others[0].alt)}
    assert pair.others[0].caption.startswith("1.000")
    assert making.worst_strips(making.Gallery(Sample(Blind(), [0, 1], [], gallery.sample.images[:2]), np.eye(2))) == []


class Blind:
    """A source without labels."""

    labels, class_names = {}, {}


def test_labels_in_words():
    values = {
        "shape": np.array([1, -1]),
        "count": np.array([0, 1]),
        "tags": np.zeros((2, 3)),
        "age": np.array([3.5, 2]),
    }
    label = Labels(values, {"shape": ["star", "ring"], "count": ["1", "2"]})
    assert label(0) == "ring, count 1, age 3.5" and label(1) == "count 2, age 2"


def test_shrunk_keeps_the_shorter_side():
    assert shrunk(np.zeros((100, 300, 3)), 60).shape == (100, 300, 3)
    assert shrunk(np.zeros((1000, 3000, 3)), 60).shape[0] >= 60
    assert shrunk(np.zeros((1000, 3000, 3)), 60).shape[0] <= 250


def test_data_uri_round_trip():
    import base64

    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    head, _, body = data_uri(pixels, Encoding(192, 80)).partition(",")
    assert head.startswith("data:image/") and head.endswith(";base64")
    with Image.open(io.BytesIO(base64.b64decode(body))) as image:
        assert (np.asarray(image.convert("RGB")) == pixels).all(), "small pictures lose nothing"
    large = data_uri(np.zeros((400, 800, 3), np.uint8), Encoding(128, 80)).partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(large))) as image:
        assert image.size == (128, 64)
