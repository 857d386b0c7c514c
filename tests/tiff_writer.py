"""Multi-band TIFF files for tests, written by the book."""

import struct

import numpy as np


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
