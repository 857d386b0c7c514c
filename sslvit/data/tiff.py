"""Multi-band TIFF: satellite and microscopy files with more, or deeper, bands than Pillow's modes hold.

Strips or tiles, chunky or planar, any sample of 8 to 64 bits, uncompressed, deflate, or whatever else libtiff (through
Pillow) unpacks; horizontal and floating-point predictors (TIFF 6.0; Adobe's Technical Notes 1 to 3), BigTIFF. The first
page only. Ordinary pictures are left to Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sslvit.data.bad_files import BadImage

_MAX_VALUES = 1 << 22  # of one tag
_MAX_BYTES = 2 << 30  # of the unpacked image, and of a chunk
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # tag types
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 259, 262, 274
_SAMPLES, _STRIP_ROWS, _PLANAR, _PREDICTOR, _EXTRA, _FORMAT = 277, 278, 284, 317, 338, 339
_STRIPS, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 273, 279, 322, 323, 324, 325
_DEFLATE = (8, 32946)
_JPEG = (6, 7)
_RGB = 2


@dataclass(frozen=True)
class Header:
    """The first page of a multi-band TIFF."""

    width: int
    height: int
    bands: int
    dtype: np.dtype
    planar: bool
    compression: int
    predictor: int
    orientation: int  # as in EXIF
    is_rgb: bool  # the first three bands are red, green, blue
    chunk: tuple[int, int]  # height, width of a strip or tile
    tiled: bool
    places: list[tuple[int, int]]  # offset, size of each


def read_header(data: bytes) -> Header | None:
    """The header of a multi-band TIFF; None for everything that Pillow reads as well."""
    tags = _read_tags(data)
    if tags is None:
        return None

    def first(tag: int, default: int) -> int:
        return tags.get(tag, [default])[0]

    bands, bits = first(_SAMPLES, 1), set(tags.get(_BITS, [1]))
    kind = {1: "u", 2: "i", 3: "f"}.get(first(_FORMAT, 1))
    photometric = first(_PHOTOMETRIC, 1)
    has_alpha = any(extra in (1, 2) for extra in tags.get(_EXTRA, []))
    simple = bits == {8} and ((photometric == _RGB and bands == 3) or (has_alpha and bands in (2, 4)))
    if bands == 1 or simple or photometric not in (1, _RGB) or first(_COMPRESSION, 1) in _JPEG:
        return None  # Pillow's own
    if kind is None or len(bits) != 1:
        return None
    depth = bits.pop()
    if depth not in (8, 16, 32, 64) or (kind == "f" and depth == 8):
        return None
    tiled = _TILES in tags
    height, width = first(_HEIGHT, 0), first(_WIDTH, 0)
    strip = (min(first(_STRIP_ROWS, height), height), width)
    offsets, sizes = (_TILES, _TILE_BYTES) if tiled else (_STRIPS, _STRIP_BYTES)
    return Header(
        width=width,
        height=height,
        bands=bands,
        dtype=np.dtype(f"{'<' if data[:1] == b'I' else '>'}{kind}{depth // 8}"),
        planar=first(_PLANAR, 1) == 2,
        compression=first(_COMPRESSION, 1),
        predictor=first(_PREDICTOR, 1),
        orientation=first(_ORIENTATION, 1),
        is_rgb=photometric == _RGB,
        chunk=(first(_TILE_HEIGHT, 0), first(_TILE_WIDTH, 0)) if tiled else strip,
        tiled=tiled,
        places=list(zip(tags.get(offsets, []), tags.get(sizes, []), strict=False)),
    )


def read_pixels(data: bytes, header: Header) -> np.ndarray:
    """(H, W, C) of the file's own dtype, in the machine's byte order. Raises BadImage when the file ends early."""
    height, width, bands = header.height, header.width, header.bands
    chunk_height, chunk_width = header.chunk
    depth = 1 if header.planar else bands  # bands in one chunk
    if chunk_height < 1 or chunk_width < 1:
        raise BadImage("a TIFF with strips or tiles of no size")
    largest = max(height * width * bands, chunk_height * chunk_width * depth) * header.dtype.itemsize
    if largest > _MAX_BYTES:
        raise BadImage(f"{width} x {height} pixels in {bands} bands are over the limit of 2 GiB")
    corners = [(y, x) for y in range(0, height, chunk_height) for x in range(0, width, chunk_width)]
    planes = range(bands) if header.planar else [slice(None)]
    if len(header.places) < len(corners) * len(planes):
        raise BadImage("a TIFF whose list of strips or tiles is too short")
    pixels = np.zeros((height, width, bands), header.dtype.newbyteorder("="))
    places = iter(header.places)
    for plane in planes:
        for y, x in corners:
            offset, size = next(places)
            rows = chunk_height if header.tiled else min(chunk_height, height - y)
            chunk = _read_chunk(data[offset : offset + size], (rows, chunk_width, depth), header)
            part = chunk[: height - y, : width - x]
            into = pixels[y : y + chunk_height, x : x + chunk_width, plane]
            into[...] = part[:, :, 0] if header.planar else part
    return pixels


def _read_chunk(packed: bytes, shape: tuple[int, int, int], header: Header) -> np.ndarray:
    """Unpacks a strip or tile and undoes its predictor; `shape` is (rows, columns, bands in it)."""
    rows, columns, depth = shape
    row_bytes = columns * depth * header.dtype.itemsize
    raw = _unpack(packed, rows, row_bytes, header.compression)
    if len(raw) < rows * row_bytes:
        raise BadImage("truncated TIFF: a strip or tile ends early")
    if header.predictor == 3:
        return _undo_float_predictor(np.frombuffer(raw, np.uint8, rows * row_bytes), shape, header.dtype)
    chunk = np.frombuffer(raw, header.dtype, rows * columns * depth).reshape(shape)
    if header.predictor == 2:  # differences along a row, of the bits as integers
        bits = chunk.view(f"{header.dtype.str[0]}u{header.dtype.itemsize}")
        return np.cumsum(bits, axis=1, dtype=f"u{header.dtype.itemsize}").view(header.dtype.newbyteorder("="))
    return chunk


def _undo_float_predictor(raw: np.ndarray, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """Adobe's Technical Note 3: byte differences along a row whose values are split in planes, highest bytes first."""
    rows, columns, depth = shape
    summed = np.cumsum(raw.reshape(rows, -1, depth), axis=1, dtype=np.uint8)
    values = summed.reshape(rows, dtype.itemsize, columns * depth).transpose(0, 2, 1)
    return np.ascontiguousarray(values).view(dtype.newbyteorder(">")).reshape(shape)


def _unpack(packed: bytes, rows: int, row_bytes: int, compression: int) -> bytes:
    if compression == 1:
        return packed
    if compression in _DEFLATE:
        return zlib.decompressobj().decompress(packed, rows * row_bytes)
    entries = {
        _WIDTH: row_bytes,
        _HEIGHT: rows,
        _BITS: 8,
        _COMPRESSION: compression,
        _PHOTOMETRIC: 1,
        _STRIPS: 8 + 2 + 9 * 12 + 4,
        _SAMPLES: 1,
        _STRIP_ROWS: rows,
        _STRIP_BYTES: len(packed),
    }
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    page = b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + b"\0\0\0\0" + packed
    with Image.open(io.BytesIO(page), formats=("TIFF",)) as image:  # as bytes of a grey picture
        return image.tobytes()


def _read_tags(data: bytes) -> dict[int, list[int]] | None:
    """The integer tags of the first page; None when it is no TIFF or not readable as one."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    try:
        if order is None:
            return None
        version = struct.unpack_from(order + "H", data, 2)[0]
        if version not in (42, 43):
            return None
        big = version == 43
        start = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
        count = struct.unpack_from(order + ("Q" if big else "H"), data, start)[0]
        entry, head, inline = ("HHQ", 8, 8) if big else ("HHI", 2, 4)
        size = struct.calcsize(order + entry) + inline
        tags = {}
        for place in range(start + head, start + head + min(count, 4096) * size, size):
            tag, kind, number = struct.unpack_from(order + entry, data, place)
            if kind not in _INTEGERS or not 0 < number <= _MAX_VALUES:
                continue
            form = f"{order}{number}{_INTEGERS[kind]}"
            at = place + size - inline
            if struct.calcsize(form) > inline:
                at = struct.unpack_from(order + ("Q" if big else "I"), data, at)[0]
            tags[tag] = list(struct.unpack_from(form, data, at))
        return tags
    except struct.error:
        return None
