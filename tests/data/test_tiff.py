"""Multi-band TIFF: libtiff (through Pillow) is the oracle where it can read, a plain writer where it cannot."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sslvit.data import tiff
from sslvit.data.decode import BadImage, decode, describe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def write_tiff(pixels, *, order="<", planar=False, tile=None, rows=7, pack=None, predictor=1, big=False, tags=()):
    """A TIFF of (H, W, C) pixels, by the book; `pack` compresses a chunk (deflate)."""
    height, width, bands = pixels.shape
    pixels = pixels.astype(pixels.dtype.newbyteorder(order))
    chunks = []
    for plane in [pixels[:, :, [band]] for band in range(bands)] if planar else [pixels]:
        step_y, step_x = tile or (rows, width)
        for y in range(0, height, step_y):
            for x in range(0, width, step_x):
                chunk = plane[y : y + step_y, x : x + step_x]
                if tile:
                    missing = ((0, step_y - chunk.shape[0]), (0, step_x - chunk.shape[1]), (0, 0))
                    chunk = np.pad(chunk, missing)
                chunks.append(difference(np.ascontiguousarray(chunk), predictor))
    packed = [pack(chunk) if pack else chunk for chunk in chunks]
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    wide = (16, "Q") if big else (4, "I")
    head = 16 if big else 8
    offsets = head + np.cumsum([0] + [len(chunk) for chunk in packed[:-1]])
    entries = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [pixels.dtype.itemsize * 8] * bands),
        259: (3, [8 if pack else 1]),
        262: (3, [1]),
        277: (3, [bands]),
        284: (3, [2 if planar else 1]),
        317: (3, [predictor]),
        339: (3, [kind] * bands),
    }
    if tile:
        entries |= {322: (4, [tile[1]]), 323: (4, [tile[0]]), 324: (wide[0], offsets), 325: (4, list(map(len, packed)))}
    else:
        entries |= {278: (4, [rows]), 273: (wide[0], offsets), 279: (4, list(map(len, packed)))}
    entries |= dict(tags)
    body = b"".join(packed)
    start = head + len(body)
    extra_at = start + (8 + 20 * len(entries) + 8 if big else 2 + 12 * len(entries) + 4)
    extra, fields = b"", b""
    for tag, (form, numbers) in sorted(entries.items()):
        value = struct.pack(f"{order}{len(numbers)}{ {3: 'H', 4: 'I', 16: 'Q'}[form] }", *map(int, numbers))
        fields += struct.pack(order + ("HHQ" if big else "HHI"), tag, form, len(numbers))
        inline = 8 if big else 4
        if len(value) <= inline:
            fields += value.ljust(inline, b"\0")
        else:
            fields += struct.pack(order + wide[1], extra_at + len(extra))
            extra += value
    mark = b"II" if order == "<" else b"MM"
    if big:
        first = mark + struct.pack(order + "HHHQ", 43, 8, 0, start)
        return first + body + struct.pack(order + "Q", len(entries)) + fields + bytes(8) + extra
    return (
        mark
        + struct.pack(order + "HI", 42, start)
        + body
        + struct.pack(order + "H", len(entries))
        + fields
        + bytes(4)
        + extra
    )


def difference(chunk, predictor):
    """The bytes of a chunk (h, w, c) after the predictor, as plain loops over rows."""
    if predictor == 1:
        return chunk.tobytes()
    if predictor == 2:
        bits = chunk.view(f"{chunk.dtype.str[0]}u{chunk.dtype.itemsize}").copy()
        for row in bits:
            row[1:] = row[1:] - row[:-1]
        return bits.tobytes()
    rows = b""
    for row in chunk:
        planes = np.frombuffer(row.astype(row.dtype.newbyteorder(">")).tobytes(), np.uint8).reshape(-1, row.itemsize).T
        flat = planes.reshape(-1, row.shape[-1]).copy()
        flat[1:] = flat[1:] - flat[:-1]
        rows += flat.tobytes()
    return rows


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
