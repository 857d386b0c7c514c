"""Multi-band TIFF: libtiff (through Pillow) is the oracle where it can read, a plain writer where it cannot."""

import dataclasses
import io
import zlib

import numpy as np
import pytest
from PIL import Image
from tiff_writer import write_tiff

from sslvit.data import tiff
from sslvit.data.decode import BadImage, decode, describe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def bands(dtype, shape=(23, 31, 13), seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def read(data):
    return tiff.read_pixels(data, tiff.read_header(data))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32", "float64"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_sample_type_and_byte_order(dtype, order):
    pixels = bands(dtype)
    assert (read(write_tiff(pixels, order=order)) == pixels).all()


@pytest.mark.parametrize(
    "layout",
    [
        {"planar": True},
        {"tile": (16, 16)},
        {"tile": (16, 32), "planar": True},
        {"rows": 23},
        {"rows": 1},
        {"big": True},
        {"pack": zlib.compress, "predictor": 2},
        {"pack": zlib.compress, "predictor": 2, "tile": (16, 16), "order": ">"},
        {"pack": zlib.compress, "predictor": 2, "planar": True},
    ],
)
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_every_layout(dtype, layout):
    pixels = bands(dtype)
    assert (read(write_tiff(pixels, **layout)) == pixels).all()


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_floating_point_predictor(dtype, planar):
    pixels = bands(dtype)
    assert (read(write_tiff(pixels, pack=zlib.compress, predictor=3, planar=planar)) == pixels).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "raw", "zstd"])
@pytest.mark.parametrize("predictor", [1, 2])
def test_agrees_with_libtiff_on_what_both_read(compression, predictor, monkeypatch):
    """An RGB picture written by libtiff; the reader is told that it is not an ordinary one."""
    picture = np.kron(bands("uint8", (8, 9, 3)), np.ones((5, 4, 1), np.uint8))
    buffer = io.BytesIO()
    options = {} if compression in ("raw", "packbits") else {"tiffinfo": {317: predictor}}
    Image.fromarray(picture).save(buffer, "TIFF", compression=compression, **options)
    data = buffer.getvalue()
    assert tiff.read_header(data) is None  # Pillow's own
    tags = tiff._read_tags(data)
    monkeypatch.setattr(tiff, "_read_tags", lambda data: tags | {262: [1]})  # "not RGB"
    assert (read(data) == np.asarray(Image.open(io.BytesIO(data)))).all()


def test_decode_gives_each_band_a_channel():
    pixels = bands("uint16")
    data = write_tiff(pixels)
    expected = np.rint(pixels / 257.0).astype(np.uint8)
    assert (decode(data, channels=13) == expected).all() and (decode(data, channels=None) == expected).all()
    assert describe(data) == ("TIFF 13 x uint16", 1)
    with pytest.raises(BadImage, match="13 channels where 3"):
        decode(data)
    with pytest.raises(BadImage, match="over the limit"):
        decode(data, max_pixels=100)
    turned = decode(write_tiff(pixels, tags=[(274, (3, [6]))]), channels=13)
    assert (turned == expected.transpose(1, 0, 2)[:, ::-1]).all()


def test_deep_colour_and_extra_bands():
    pixels = bands("uint16", (9, 10, 3))
    rgb = [(262, (3, [2]))]
    assert (decode(write_tiff(pixels, tags=rgb)) == np.rint(pixels / 257.0)).all()
    four = bands("uint8", (9, 10, 4))
    data = write_tiff(four, tags=[*rgb, (338, (3, [0]))])  # red, green, blue, infrared
    assert (decode(data, channels=4) == four).all() and (decode(data) == four[:, :, :3]).all()
    six = bands("uint8", (9, 10, 6))
    data = write_tiff(six, tags=rgb)
    assert (decode(data, channels=6) == six).all() and (decode(data) == six[:, :, :3]).all()
    radar = bands("float32", (9, 10, 2))
    assert (decode(write_tiff(radar), channels=2) == np.rint(radar * 255)).all()


def test_damage_is_named():
    whole = write_tiff(bands("uint16"))
    header = tiff.read_header(whole)
    with pytest.raises(BadImage, match="ends early"):
        tiff.read_pixels(whole[:500], header)
    with pytest.raises(BadImage, match="too short"):
        tiff.read_pixels(whole, dataclasses.replace(header, places=header.places[:-1]))
    with pytest.raises(BadImage, match="no size"):
        tiff.read_pixels(whole, dataclasses.replace(header, chunk=(0, 31)))
    with pytest.raises(BadImage, match="limit of 2 GiB"):
        tiff.read_pixels(whole, dataclasses.replace(header, chunk=(1 << 20, 1 << 20), tiled=True))
    with pytest.raises(BadImage, match="limit of 2 GiB"):
        decode(write_tiff(bands("uint16"), tags=[(277, (4, [1 << 30]))]), channels=None)
    bomb = write_tiff(bands("uint8", (9, 9, 5)), pack=lambda chunk: zlib.compress(chunk + bytes(1 << 24)))
    assert decode(bomb, channels=5).shape == (9, 9, 5)  # the rest is never unpacked


def test_mutants_are_bad_or_images():
    rng = np.random.default_rng(0)
    good = [
        write_tiff(bands("uint16", (12, 14, 5))),
        write_tiff(bands("uint16", (12, 14, 5)), tile=(16, 16), pack=zlib.compress, predictor=2),
        write_tiff(bands("float32", (12, 14, 5)), planar=True, big=True),
    ]
    for count in range(600):
        data = bytearray(good[count % 3])
        place = int(rng.integers(16) if rng.random() < 0.2 else len(data) - 1 - rng.integers(300))
        data[place] = int(rng.integers(256))
        if rng.random() < 0.2:
            del data[int(rng.integers(len(data))) :]
        try:
            assert decode(bytes(data), channels=None).ndim == 3
        except BadImage:
            continue
