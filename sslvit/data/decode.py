"""Bytes to pixels: one image in, one (H, W, C) uint8 array out, or `BadImage` with the reason.

It never resizes (except by JPEG's own reduced scales, when allowed) and never guesses past damage. The rules:

- EXIF orientation is applied. Animations and multi-page files give their first frame.
- Transparency is composited on white, unless as many channels are asked for as the file has with its alpha.
- Of pixels deeper than 8 bits, a given range (low, high) becomes 0..255: the same in every image. Without one, 16-bit
  values v become round(v / 257), floats within 0..1 become 255 v, those within 0..255 are kept, and any other range,
  and signed or 32-bit integers, are stretched from their 0.5th..99.5th percentile over the image. NaN, infinity are 0.
- Every band of a multi-band TIFF is a channel (tiff.py); all bands are scaled alike.
- CMYK, YCbCr, HSV and LAB become RGB; RGB becomes grey by BT.601 luma, grey becomes RGB by repetition.
- The size in the header is checked against `max_pixels` before anything is decoded.
- A truncated or corrupt stream is bad; only a JPEG's missing end-of-image marker is forgiven.
"""

from __future__ import annotations

import io
import re
import struct

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from sslvit.data import tiff
from sslvit.data.bad_files import BadFiles, BadImage

__all__ = ["BadFiles", "BadImage", "ValueRange", "decode", "deep_pixels", "describe"]

ValueRange = tuple[tuple[float, ...], tuple[float, ...]]  # lows and highs, per channel
MAX_PIXELS = 50_000_000

# What Pillow may open: the common ones, then by name, so that formats without a signature (TGA) are tried late.
# Left out: EPS and WMF, which call other programs, and formats without a decoder.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "BLP", "CUR", "DCX", "DDS", "DIB"),
    *("FITS", "FLI", "FTEX", "GBR", "ICNS", "ICO", "IM", "IMT", "MSP", "PCD", "PCX", "PIXAR", "PSD", "QOI", "SGI"),
    *("SPIDER", "SUN", "TGA", "XBM", "XPM", "XVTHUMB"),
)
# Pillow decodes (some forms of) these in Python, about a microsecond a pixel: a smaller limit instead of a hang.
_SLOW_FORMATS = frozenset({"BLP", "DDS", "FITS", "FTEX", "MSP", "QOI", "SGI", "XPM"})
_SLOW_MAX_PIXELS = 2_000_000
_MAX_JPEG_SCANS = 50  # a usual progressive file has about ten; thousands are a trap
_ORIENTATION = 0x0112  # EXIF tag


def decode(
    data: bytes | np.ndarray,
    *,
    channels: int | None = 3,
    max_pixels: int = MAX_PIXELS,
    min_side: int | None = None,
    value_range: ValueRange | None = None,
) -> np.ndarray:
    """Decodes one image.

    Args:
        data: the bytes of an image file, or an array (H, W) or (H, W, C) of uint8, uint16, float or bool.
        channels: C of the result; 1 and 3 convert into each other. None: the file's own count, without alpha.
        max_pixels: H x W above this is refused unread.
        min_side: a JPEG may be decoded at a reduced scale whose shorter side is still at least this many pixels.
        value_range: what becomes 0 and 255 of pixels deeper than 8 bits.

    Returns:
        (H, W, C) uint8, C-contiguous.

    Raises:
        BadImage: the reason in words; whatever the bytes are, nothing else is raised.
    """
    if isinstance(data, np.ndarray):
        return _fit_channels(_array_to_uint8(data, max_pixels, value_range), channels)
    if not data:
        raise BadImage("the file is empty")
    try:
        if data[:2] == b"\xff\xd8":
            image = _decode_jpeg(data, channels, max_pixels, min_side)
            if image is not None:
                return image
        bands = tiff.read_header(data)
        if bands is not None:
            return _decode_bands(data, bands, channels, max_pixels, value_range)
        return _decode_with_pillow(data, channels, max_pixels, value_range)
    except BadImage:
        raise
    except Exception as error:  # broken files make Pillow raise SyntaxError, struct.error, TypeError, OverflowError ...
        raise BadImage(_reason(error, data)) from error


def deep_pixels(data: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """(H, W) or (H, W, C) of 16 bits, larger integers or floats as the file holds them; None for any other file."""
    try:
        if isinstance(data, np.ndarray):
            pixels = data
        elif (bands := tiff.read_header(data)) is not None:
            _check_size(bands.width, bands.height, max_pixels)
            pixels = tiff.read_pixels(data, bands)
        else:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if not image.mode.startswith(("I", "F")):
                    return None
                _check_size(image.width, image.height, max_pixels)
                pixels = np.asarray(image)
    except Exception:  # whatever is wrong with it, decode says it
        return None
    return pixels if pixels.dtype.kind in "iuf" and pixels.dtype != np.uint8 else None


def describe(data: bytes | np.ndarray) -> tuple[str, int]:
    """The format and pixel form ("JPEG RGB", "array uint16") and the number of frames, from the header alone.

    For what cannot be opened: ("unknown", 1).
    """
    if isinstance(data, np.ndarray):
        return f"array {data.dtype}", 1
    try:
        bands = tiff.read_header(data)
        if bands is not None:
            return f"TIFF {bands.bands} x {bands.dtype.name}", 1
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return f"{image.format} {image.mode}", int(getattr(image, "n_frames", 1))
    except Exception:  # whatever is wrong with it, decode says it
        return "unknown", 1


def _decode_jpeg(data: bytes, channels: int | None, max_pixels: int, min_side: int | None) -> np.ndarray | None:
    """The fast way for grey and colour JPEGs. Returns None where Pillow has to look: CMYK, odd streams."""
    orientation, single_scan = _jpeg_headers(data)
    if not single_scan and data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise BadImage(f"more than {_MAX_JPEG_SCANS} scans in a JPEG")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, max_pixels)
    if colorspace not in ("Gray", "YCbCr", "RGB"):
        return None
    grey = colorspace == "Gray" if channels is None else channels == 1 and colorspace == "Gray"
    image = _decode_jpeg_strictly(data, "GRAY" if grey else "RGB", min_side or 0)
    if image is None:
        return None
    return _fit_channels(_orient(image, orientation), channels)


def _decode_jpeg_strictly(data: bytes, colorspace: str, min_side: int) -> np.ndarray | None:
    """(H, W, C) uint8; BadImage when the stream ends early; None when it is odd in another way."""
    for attempt in (data, data + b"\xff\xd9"):
        try:
            return simplejpeg.decode_jpeg(attempt, colorspace, min_height=min_side, min_width=min_side, min_factor=2)
        except ValueError as error:
            message = str(error)
            if message != "Premature end of JPEG file":
                break
    if "premature end" in message.lower():
        raise BadImage("truncated or corrupt JPEG: its data end early")
    return None


def _jpeg_headers(data: bytes) -> tuple[int, bool]:
    """(orientation by EXIF or else XMP, 1..8; whether one scan holds all components). Reads headers only."""
    exif, xmp, position = b"", b"", 2
    frame, components, single = 0, 0, False
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], struct.unpack_from(">H", data, position + 2)[0]
        if marker == 0xDA:
            single = frame in (0xC0, 0xC1) and data[position + 4] == components
        if marker == 0xDA or length < 2:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, components = marker, data[position + 9]
        elif marker == 0xE1:
            body = data[position + 4 : position + 2 + length]
            if body.startswith(b"Exif\0\0"):
                exif += body[6:]
            elif b"tiff:Orientation" in body:
                xmp = body
        position += 2 + length
    return _orientation(exif, xmp), single


def _orientation(exif: bytes, xmp: bytes) -> int:
    """1..8; 1 where there is none or it makes no sense: broken metadata do not make the pixels bad."""
    orientation = None
    if exif:
        try:
            tags = Image.Exif()
            tags.load(b"Exif\0\0" + exif)
            orientation = tags.get(_ORIENTATION)
        except Exception:  # struct.error, SyntaxError ...
            orientation = None
    if orientation is None and (match := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        orientation = int(match[1])
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _orient(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turns (H, W, C) upright; EXIF 2.3, tag 274: where row 0 and column 0 lie."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _decode_bands(
    data: bytes, header: tiff.Header, channels: int | None, max_pixels: int, value_range: ValueRange | None
) -> np.ndarray:
    _check_size(header.width, header.height, max_pixels)
    pixels = tiff.read_pixels(data, header)
    if header.is_rgb and channels in (1, 3):
        pixels = pixels[:, :, :3]  # what follows red, green and blue is extra
    return _fit_channels(_orient(_array_to_uint8(pixels, None, value_range), header.orientation), channels)


def _decode_with_pillow(
    data: bytes, channels: int | None, max_pixels: int, value_range: ValueRange | None
) -> np.ndarray:
    if data[:2] == b"\xff\xd8" and not data.endswith(b"\xff\xd9"):
        data += b"\xff\xd9"
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(image.width, image.height, max_pixels)
        if image.format in _SLOW_FORMATS and image.width * image.height > _SLOW_MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels are too many for the format {image.format}")
        image.load()
        return _fit_channels(_orient(_pixels(image, channels, value_range), _pillow_orientation(image)), channels)


def _pillow_orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a broken EXIF block does not make the pixels bad
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _pixels(image: Image.Image, channels: int | None, value_range: ValueRange | None) -> np.ndarray:
    """A loaded Pillow image as (H, W, C) uint8, alpha composited unless `channels` counts it."""
    mode = image.mode
    if mode == "I" and image.format in ("PNG", "PPM"):  # 16-bit values in 32-bit pixels
        return _array_to_uint8(np.asarray(image).clip(0, 65535).astype(np.uint16), None, value_range)
    if mode == "F" or mode.startswith("I"):
        return _array_to_uint8(np.asarray(image), None, value_range)
    if mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(lab, ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        return np.asarray(converted)
    if mode == "RGBX" and channels == 4:
        return np.asarray(image)
    if image.has_transparency_data:
        grey = mode in ("1", "L", "LA", "La")
        own = 2 if grey else 4
        image = image.convert("RGBA")
        if channels == own:
            return np.asarray(image.convert("LA") if grey else image)
        white = Image.new("RGBA", image.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, image))
        return pixels[:, :, :1] if grey else pixels[:, :, :3]
    if mode not in ("L", "RGB"):
        image = image.convert("L" if mode == "1" else "RGB")
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _array_to_uint8(array: np.ndarray, max_pixels: int | None, value_range: ValueRange | None) -> np.ndarray:
    """Any numeric (H, W) or (H, W, C) to (H, W, C) uint8, by the rules at the top."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise BadImage(f"an array of shape {array.shape} is no image (H, W) or (H, W, C)")
    if max_pixels is not None:
        _check_size(array.shape[1], array.shape[0], max_pixels)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if value_range is not None and array.dtype.kind in "iuf":
        return _scale(array, value_range)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise BadImage(f"an array of {array.dtype} is no image")
    return _stretch(array)


def _scale(array: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Each band from its range; all from the widest where there are other bands than ranges."""
    low, high = (np.array(values, np.float32) for values in value_range)
    if len(low) != array.shape[2]:
        low, high = low.min(keepdims=True), high.max(keepdims=True)
    values = np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    values = (values - low) * (255.0 / np.maximum(high - low, np.finfo(np.float32).tiny))
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _stretch(array: np.ndarray) -> np.ndarray:
    values = np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if array.dtype.kind == "f" and low >= 0 and high <= 255:
        values *= 255.0 if high <= 1 else 1.0
    else:
        sample = values.reshape(-1)[:: max(1, values.size // 1_000_000)]
        low, high = (float(v) for v in np.percentile(sample, (0.5, 99.5)))
        values = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _fit_channels(image: np.ndarray, channels: int | None) -> np.ndarray:
    """(H, W, C) uint8 with C = `channels`, C-contiguous."""
    own = image.shape[2]
    if channels == 3 and own == 1:
        image = np.repeat(image, 3, axis=2)
    elif channels == 1 and own == 3:
        red, green, blue = (image[:, :, index].astype(np.uint32) for index in range(3))
        luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16  # BT.601
        image = luma.astype(np.uint8)[:, :, None]
    elif channels is not None and channels != own:
        raise BadImage(f"{own} channels where {channels} are expected")
    return np.ascontiguousarray(image)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImage(f"the header says {width} x {height} pixels")
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels are over the limit of {max_pixels / 1e6:g} million")


def _reason(error: Exception, data: bytes) -> str:
    """One line, the same for the same bytes on every run."""
    start = data[:64].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "not an image but HTML or XML text"
    if isinstance(error, Image.DecompressionBombError):
        return "the pixels that the header announces are over the limit"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    message = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", " ".join(str(error).split()))
    return f"{type(error).__name__}: {message}"[:300]
