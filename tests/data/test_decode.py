"""decode: oracles are Pillow's own operations, exact arithmetic, and files whose damage is known."""

import io
import json
import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from sslvit.data.bad_files import read_bad_files
from sslvit.data.decode import BadFiles, BadImage, decode, deep_pixels
from sslvit.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def picture(height=48, width=64, seed=0):
    """(H, W, 3) uint8, smooth, so that JPEG keeps it."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.random.default_rng(seed).uniform(0.5, 2, (3, 2))
    return np.stack([127 + 100 * np.sin(rows / 9 * a + columns / 11 * b) for a, b in waves], -1).astype(np.uint8)


def encode(image, form, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_header(width, height, bits=8, kind=2):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_agrees_with_pillow(form, orientation):
    data = encode(picture(), form, exif=exif_of(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(decode(data).astype(int) - expected).max() <= (2 if form == "JPEG" else 0)
    if orientation == 6 and form != "TIFF":  # Pillow turns TIFF itself; of the others the naive shape is another
        assert np.asarray(Image.open(io.BytesIO(data))).shape != expected.shape


def test_orientation_in_xmp_only_and_in_broken_exif():
    plain = encode(picture(), "JPEG")
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    broken = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
    for body, shape in ((xmp, (64, 48, 3)), (broken, (48, 64, 3))):
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
        assert decode(data).shape == shape


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_equals_pillow(options):
    data = encode(picture(), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(decode(data).astype(int) - expected).max() <= 2


def test_grey_jpeg_and_channel_counts():
    grey = Image.fromarray(picture()).convert("L")
    data = encode(grey, "JPEG", quality=100)
    assert decode(data, channels=None).shape == (48, 64, 1)
    assert np.abs(decode(data, channels=1)[:, :, 0].astype(int) - np.asarray(grey)).max() <= 3
    assert (decode(data) == decode(data, channels=1)).all()
    colour = encode(picture(), "PNG")
    expected = np.asarray(Image.open(io.BytesIO(colour)).convert("L"))
    assert (decode(colour, channels=1)[:, :, 0] == expected).all()
    assert decode(colour, channels=None).shape == (48, 64, 3)
    with pytest.raises(BadImage, match="3 channels where 4"):
        decode(colour, channels=4)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    expected = np.rint(values / 257.0).astype(np.uint8)
    for form in ("PNG", "TIFF", "PPM"):
        data = encode(values, form)
        assert (decode(data, channels=1)[:, :, 0] == expected).all(), form
    naive = np.asarray(Image.open(io.BytesIO(encode(values.astype(np.int32), "TIFF"))).convert("L"))
    assert (naive == 255).mean() > 0.9  # what happens without the rule: white
    assert (decode(np.stack([values] * 13, -1), channels=13) == expected[:, :, None]).all()


def test_sixteen_bit_colour_png():
    rows = [b"\0" + row.astype(">u2").tobytes() for row in picture().astype(np.uint16) * 257]

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows)))
    assert np.abs(decode(data + chunk(b"IEND", b"")).astype(int) - picture()).max() <= 1


def test_float_rules():
    unit = np.random.default_rng(0).random((20, 30)).astype(np.float32)
    assert (decode(encode(unit, "TIFF"), channels=1)[:, :, 0] == np.rint(unit * 255)).all()
    bytes_as_float = picture()[:, :, 0].astype(np.float32)
    assert (decode(encode(bytes_as_float, "TIFF"), channels=1)[:, :, 0] == bytes_as_float).all()
    wide = (unit * 3000 - 500).astype(np.float32)
    low, high = np.percentile(wide, (0.5, 99.5))
    expected = np.clip((wide - low) / (high - low) * 255, 0, 255)
    assert np.abs(decode(wide, channels=1)[:, :, 0] - expected).max() <= 0.51
    broken = unit.copy()
    broken[0, :3] = np.nan, np.inf, -np.inf
    assert (decode(broken, channels=1)[0, :3] == 0).all()
    assert (decode(np.full((4, 4), 7000.0, np.float32), channels=1) == 0).all()


def test_transparency_is_composited_on_white():
    rgba = np.dstack([picture(), np.random.default_rng(1).integers(0, 256, (48, 64), np.uint8)])
    data = encode(rgba, "PNG")
    alpha = rgba[:, :, 3:] / 255.0
    expected = rgba[:, :, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(decode(data) - expected).max() <= 1
    assert (decode(data, channels=4) == rgba).all()
    assert decode(data, channels=None).shape == (48, 64, 3)
    clear = encode(np.dstack([picture(), np.zeros((48, 64), np.uint8)]), "PNG")
    assert (decode(clear) == 255).all()  # no hidden colours
    grey = encode(Image.fromarray(rgba[:, :, [0, 3]], "LA"), "PNG")
    assert (decode(grey, channels=2) == rgba[:, :, [0, 3]]).all()
    assert np.abs(decode(grey, channels=1) - (rgba[:, :, :1] * alpha + 255 * (1 - alpha))).max() <= 1


def test_palette_with_transparency_and_one_bit():
    palette = Image.fromarray(picture()).quantize(8)
    assert (decode(encode(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    index = int(np.asarray(palette)[0, 0])
    shown = decode(encode(palette, "PNG", transparency=index))
    assert (shown[np.asarray(palette) == index] == 255).all()
    bits = Image.fromarray(picture()[:, :, 0] > 127)
    assert (decode(encode(bits, "PNG"), channels=None) == np.asarray(bits)[:, :, None] * 255).all()


def test_cmyk_and_lab_become_rgb():
    data = encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(decode(data).astype(int) - picture()).max() <= 12
    lab = Image.merge("LAB", [Image.new("L", (4, 4), level) for level in (255, 128, 128)])
    assert decode(encode(lab, "TIFF")).min() >= 252  # L 100, a 0, b 0 is white


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF"])
def test_first_frame(form):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert (decode(data) == (255, 0, 0)).all()


def test_only_a_missing_end_marker_is_forgiven():
    whole = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
    assert (decode(whole[:-1]) == decode(whole)).all() and (decode(whole[:-2]) == decode(whole)).all()
    assert (decode(whole + b"garbage") == decode(whole)).all()
    for cut in (4, 10, 1000, len(whole) // 2):
        with pytest.raises(BadImage, match="end early"):
            decode(whole[:-cut])
    for form in ("PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), form)
        with pytest.raises(BadImage):
            decode(data[: len(data) // 2])


@pytest.mark.parametrize("bomb", [png_header(30_000, 30_000), png_header(12_000, 12_000), png_header(0, 5)])
def test_size_is_checked_before_decoding(bomb):
    started = time.perf_counter()
    with pytest.raises(BadImage):
        decode(bomb)
    assert time.perf_counter() - started < 1
    with pytest.raises(BadImage, match="over the limit"):
        decode(encode(picture(), "JPEG"), max_pixels=48 * 64 - 1)
    assert decode(encode(picture(), "JPEG"), max_pixels=48 * 64).shape == (48, 64, 3)
    with pytest.raises(BadImage, match="over the limit"):
        decode(np.zeros((100, 100), np.uint8), max_pixels=9_999)


def test_a_jpeg_of_a_thousand_scans_is_refused():
    data = encode(picture(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(BadImage, match="scans"):
        decode(data[:last] + data[last:-2] * 1000 + b"\xff\xd9")


def test_min_side_allows_reduced_jpegs_only():
    data = encode(picture(400, 600), "JPEG", exif=exif_of(6))
    assert decode(data).shape == (600, 400, 3)
    reduced = decode(data, min_side=100)
    assert min(reduced.shape[:2]) == 100
    expected = np.asarray(Image.fromarray(decode(data)).resize((100, 150), Image.Resampling.BOX))
    assert np.abs(reduced.astype(int) - expected).mean() < 3
    assert decode(data, min_side=300).shape == (600, 400, 3)
    assert decode(encode(picture(400, 600), "PNG"), min_side=50).shape == (400, 600, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html>", "HTML"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 16, "not an image of a known format"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not an image of a known format",
        ),  # would call a program
        (np.zeros((3,)), "shape"),
        (np.zeros((0, 3), np.uint8), "shape"),
        (np.array([["a"]]), "no image"),
        (np.zeros((2, 2), np.complex64), "no image"),
    ],
)
def test_whatever_it_is_it_is_bad_with_a_reason(data, reason):
    messages = set()
    for _ in range(2):
        with pytest.raises(BadImage, match=reason) as caught:
            decode(data)
        messages.add(str(caught.value))
    assert len(messages) == 1 and "\n" not in messages.pop()


def test_random_bytes_behind_every_signature():
    rng = np.random.default_rng(0)
    starts = [encode(picture(), form)[:40] for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA")]
    for start in starts:
        for _ in range(20):
            data = start + rng.integers(0, 256, int(rng.integers(0, 400)), np.uint8).tobytes()
            try:
                image = decode(data)
            except BadImage:
                continue
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_results_are_contiguous_and_arrays_pass_through():
    array = picture()
    assert decode(array) is array
    assert decode(array[::2, ::2]).flags.c_contiguous
    assert (decode(array[:, :, 0] > 127, channels=1) == (array[:, :, :1] > 127) * 255).all()


# ---- bad_files.jsonl


def test_each_bad_file_is_written_once_with_its_bytes(tmp_path):
    names = ["plain.jpg", os.fsdecode(b"not\xffutf8\n.jpg"), "ünï \u2028.png"]
    bad = BadFiles(tmp_path / "run" / "bad_files.jsonl")
    threads = [threading.Thread(target=lambda: [bad.add(name, "why") for name in names * 5]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "run" / "bad_files.jsonl").read_bytes().splitlines()
    assert sorted(json.loads(line)["name"] for line in lines) == sorted(names) and bad.count == 3
    assert b"not\xffutf8\n.jpg" in [os.fsencode(json.loads(line)["name"]) for line in lines]


def test_each_rank_writes_a_list_of_its_own_and_rank_0_collects(tmp_path, monkeypatch):
    path = tmp_path / "bad_files.jsonl"
    first = BadFiles(path)
    first.add("a.jpg", "x")
    for rank in ("1", "12"):
        with monkeypatch.context() as other:
            other.setenv("RANK", rank)
            bad = BadFiles(path)
            bad.add("a.jpg", "x")
            bad.add(f"{rank}.jpg", "y")
            bad.collect()
            assert bad.path == tmp_path / f"bad_files.rank{rank}.jsonl" and bad.count == 2
    assert len(path.read_bytes().splitlines()) == 1
    for _ in range(2):
        first.collect()
    assert read_bad_files(path) == {"a.jpg": "x", "1.jpg": "y", "12.jpg": "y"} == first.reasons
    assert len(path.read_bytes().splitlines()) == 3
    path.unlink()
    assert BadFiles(path).count == 3  # also of a run that was killed before it collected


def test_bad_files_goes_on_after_a_kill(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    BadFiles(path).add("a.jpg", "x")
    with open(path, "ab") as file:
        file.write(b'{"name": "b.j')  # cut off in the middle of a line
    bad = BadFiles(path)
    bad.add("a.jpg", "x")
    bad.add("c.jpg", "y")
    assert bad.count == 2
    assert BadFiles(path).reasons == {"a.jpg": "x", "c.jpg": "y"}


def test_more_than_five_percent_stops_from_a_hundred_on():
    few = BadFiles()
    for number in range(99):
        few.add(f"{number}.jpg", "why")  # all of them, but too few to judge
    at_limit = BadFiles()
    at_limit.saw(95)
    for number in range(5):
        at_limit.add(f"{number}.jpg", "why")
    with pytest.raises(InputError, match="6 of the 101"):
        at_limit.add("5.jpg", "why")
    allowed = BadFiles(max_bad_rate=0.5)
    allowed.saw(94)
    for number in range(6):
        allowed.add(f"{number}.jpg", "why")


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_a_given_range_is_the_same_in_every_image(dtype):
    low, high = (100.0, 200.0), (1100.0, 4200.0)
    image = np.array([[[100, 200], [1100, 4200]], [[600, 2200], [50, 9000]]]).astype(dtype)
    wanted = [[[0, 0], [255, 255]], [[128, 128], [0, 255]]]
    np.testing.assert_array_equal(decode(image, channels=2, value_range=(low, high)), wanted)
    dark = decode(image // 2 if dtype != np.float32 else image / 2, channels=2, value_range=(low, high))
    assert dark.mean() < 90  # stretched by itself it would be as bright
    np.testing.assert_array_equal(
        decode(image[:, :, :1], channels=1, value_range=((100.0,) * 3, (1100.0,) * 3))[0, 0], [0]
    )


def test_eight_bits_have_no_use_for_a_range():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(decode(image, value_range=((10.0,) * 3, (20.0,) * 3)), image)
    assert deep_pixels(image) is None and deep_pixels(b"no image") is None
    assert deep_pixels(image.astype(np.uint16)).dtype == np.uint16


@pytest.mark.parametrize(("dtype", "form"), [(np.uint16, "PNG"), (np.float32, "TIFF"), (np.uint16, "TIFF")])
def test_deep_pixels_are_those_of_the_file(dtype, form):
    values = np.linspace(0, 4000, 24).reshape(4, 6).astype(dtype)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    np.testing.assert_array_equal(deep_pixels(buffer.getvalue()), values)
    found = decode(buffer.getvalue(), channels=1, value_range=((0.0,), (4000.0,)))[:, :, 0]
    np.testing.assert_array_equal(found, np.rint(values.astype(np.float32) * np.float32(255 / 4000)))
