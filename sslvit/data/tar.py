"""`tar:GLOB`: WebDataset shards, read in place: on a disk, or behind URLs (`tar:s3://..`, `tar:https://..`).

`key.jpg` with `key.cls` (label), `key.txt` (caption) or `key.json` (record) is one sample. Headers are scanned once and
the index (offset, size) is kept, for remote shards one by one. Members are read by offset and never extracted, so a
hostile name has nothing to write. Members that are no plain files, or whose name leads outside, are left out with the
reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sslvit.data.files import (
    MAX_FILE_BYTES,
    Names,
    OpenFiles,
    cache_key,
    cache_root,
    expand,
    file_key,
    kept_arrays,
    load_arrays,
    save_arrays,
)
from sslvit.data.folder import EXTENSIONS
from sslvit.data.order import Blocks
from sslvit.data.records import labels_of, number_columns, number_in_text, parse_record, text_of
from sslvit.data.remote import BLOCK_BYTES, KEPT_BYTES, RemoteFiles, basename, is_remote, remote_key
from sslvit.errors import InputError

logger = logging.getLogger(__name__)

_BLOCK = 512
_THREADS = 8  # that ask for remote shards at once
_MAX_EXTENDED = 1 << 20  # bytes of a long name or a pax header
_JSON = b"\0"
_KINDS = ("image", "json", "txt", "cls")
_ARRAYS = ("members", "shard_ends", "names", "name_ends", "labels", "label_ends", "skipped", "skipped_ends")


class TarSource:
    """Samples of tar shards in the order of the files; those without an image are left out.

    `skipped` says which members were left out, and why.
    """

    def __init__(self, pattern: str) -> None:
        paths = expand(pattern, (".tar",), remote=True)
        self.spec = f"tar:{pattern}"
        self._files: OpenFiles | RemoteFiles
        self._keys: list[tuple[bytes, int, object]]
        if any(is_remote(path) for path in paths):
            if not all(is_remote(path) for path in paths):
                raise InputError(f"{pattern!r} names files and URLs; give two sets, or copy one to the other")
            with ThreadPoolExecutor(_THREADS) as threads:
                self._keys = list(threads.map(remote_key, paths))
            self._files = RemoteFiles(paths, [size for _, size, _ in self._keys])
        else:
            self._files = OpenFiles(paths)
            self._keys = [file_key(path) for path in paths]
        arrays = self._load_index()
        self._members = arrays["members"]  # (n, 8) int64: offset and size of image, json, txt, cls; size -1: none
        self._shard_ends = arrays["shard_ends"]
        self._names = Names(arrays["names"], arrays["name_ends"])
        skipped = Names(arrays["skipped"], arrays["skipped_ends"])
        self.skipped = [os.fsdecode(skipped[i]) for i in range(len(skipped))]
        if self.skipped:
            logger.warning("%s: %d tar members left out, the first: %s", self.spec, len(self.skipped), self.skipped[0])
        if not len(self):
            raise InputError(
                f"no images in the tar files of {pattern!r}; a sample is key.jpg with key.cls, .txt or .json"
            )
        self.labels, self.class_names = self._number(Names(arrays["labels"], arrays["label_ends"]))
        texts = np.flatnonzero((self._members[:, 3] >= 0) | (self._members[:, 5] >= 0))[:10]
        self.has_text = any(self.text(int(index)) for index in texts)

    def __len__(self) -> int:
        return len(self._members)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._shard_ends, index, side="right"))

    def name(self, index: int) -> str:
        """`shard.tar/member`."""
        shard = basename(self._files.paths[self._shard(index)])
        return os.fsdecode(shard + b"/" + self._names[index])

    def read(self, index: int) -> bytes:
        """The bytes of the image; BadImage when they cannot be read."""
        return self._read(index, 0)

    def text(self, index: int) -> dict[str, Any] | None:
        """The text of the sample, from its json, else from its txt."""
        text = None
        if self._members[index, 3] >= 0:
            text = text_of(parse_record(self._read(index, 1)) or {})
        if text is None and self._members[index, 5] >= 0:
            text = text_of({"caption": self._read(index, 2).decode("utf-8", "replace")})
        return text

    def blocks(self) -> Blocks | None:
        """Of remote shards, the samples that one fetch brings; a window of them takes up to half of what is kept."""
        if not isinstance(self._files, RemoteFiles):
            return None
        shards = np.searchsorted(self._shard_ends, np.arange(len(self)), side="right")
        places = self._members[:, 0] // BLOCK_BYTES
        ends = np.flatnonzero((np.diff(shards) != 0) | (np.diff(places) != 0)) + 1
        return Blocks(np.append(ends, len(self)), KEPT_BYTES // 2 // BLOCK_BYTES)

    def fingerprint(self) -> str:
        """Changes when a shard is added, removed or rewritten."""
        return hashlib.sha256(repr(self._keys).encode()).hexdigest()

    def _read(self, index: int, kind: int) -> bytes:
        offset, size = self._members[index, 2 * kind : 2 * kind + 2]
        return self._files.read(self._shard(index), int(offset), int(size))

    def _number(self, labels: Names) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        if not len(labels.data):
            return {}, {}
        rows = [_labels_in(labels[i]) for i in range(len(labels))]
        keys = sorted({key for row in rows for key in row})
        columns = {key: [row.get(key) for row in rows] for key in keys}
        found = columns.get("label", [])
        read = [number_in_text(value) if isinstance(value, str) else value for value in found]
        if found and not any(isinstance(value, str) for value in read):  # one word among them: all are names
            columns["label"] = read
        return number_columns(columns, self.spec)

    def _load_index(self) -> dict[str, np.ndarray]:
        """The index of the whole set. The processes of a machine map the same file; one of them makes it."""
        entry = cache_root() / "tars" / cache_key("tar-2", self._keys)
        return kept_arrays(entry, _ARRAYS, self._index_all)

    def _index_all(self) -> dict[str, np.ndarray]:
        shards = range(len(self._files.paths))
        if isinstance(self._files, OpenFiles):
            return _index(self._files, shards)
        with ThreadPoolExecutor(_THREADS) as threads:
            return _merged(list(threads.map(self._load_shard, shards)))

    def _load_shard(self, shard: int) -> dict[str, np.ndarray]:
        """The index of one shard: a set that grows fetches the new ones only."""
        entry = cache_root() / "tars" / cache_key("tar-shard-2", self._keys[shard])
        arrays = load_arrays(entry, _ARRAYS)
        if arrays is None:
            arrays = _index(self._files, [shard])
            save_arrays(entry, arrays)
        return arrays


@dataclass
class _Member:
    name: bytes
    offset: int
    size: int
    refused: str = ""  # why it is left out


@dataclass
class _Sample:
    key: bytes
    members: dict[str, _Member] = field(default_factory=dict)
    label: bytes = b""


def _labels_in(kept: bytes) -> dict[str, Any]:
    """The labels of a sample from what the index keeps: the text of .cls, or those of .json behind a zero byte."""
    if kept.startswith(_JSON):
        return dict(json.loads(kept[1:]))
    return {"label": kept.decode("utf-8", "replace")} if kept else {}


def _merged(shards: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The indices of single shards as that of all."""
    out = {"members": np.concatenate([shard["members"] for shard in shards])}
    out["shard_ends"] = np.cumsum([len(shard["members"]) for shard in shards], dtype=np.int64)
    for name, ends in (("names", "name_ends"), ("labels", "label_ends"), ("skipped", "skipped_ends")):
        packed = Names.concat([Names(shard[name], shard[ends]) for shard in shards])
        out |= {name: packed.data, ends: packed.ends}
    return out


def _index(files: OpenFiles | RemoteFiles, shards: Iterable[int]) -> dict[str, np.ndarray]:
    """Scans the headers of these shards."""
    rows: list[list[int]] = []
    ends: list[int] = []
    names: list[bytes] = []
    labels: list[bytes] = []
    skipped: list[bytes] = []
    for shard in shards:
        for sample in _samples(files, shard, files.paths[shard], skipped):
            if "image" in sample.members:
                empty = _Member(b"", 0, -1)
                members = [sample.members.get(kind, empty) for kind in _KINDS]
                rows.append([number for member in members for number in (member.offset, member.size)])
                names.append(sample.members["image"].name)
                labels.append(sample.label)
        ends.append(len(rows))
    packed = {"name": Names.of(names), "label": Names.of(labels), "skipped": Names.of(skipped[:1000])}
    return {
        "members": np.array(rows, np.int64).reshape(len(rows), 2 * len(_KINDS)),
        "shard_ends": np.array(ends, np.int64),
        "names": packed["name"].data,
        "name_ends": packed["name"].ends,
        "labels": packed["label"].data,
        "label_ends": packed["label"].ends,
        "skipped": packed["skipped"].data,
        "skipped_ends": packed["skipped"].ends,
    }


def _samples(files: OpenFiles | RemoteFiles, shard: int, path: bytes, skipped: list[bytes]) -> Iterator[_Sample]:
    """Groups neighbouring members of one key. A key that comes again later is another sample."""
    sample = _Sample(b"")
    for member in _scan_remote(files, shard) if isinstance(files, RemoteFiles) else _scan(path):
        if member.refused:
            skipped.append(b"%s/%s: %s" % (basename(path), member.name, member.refused.encode()))
            continue
        key, extension = os.path.splitext(member.name)
        kind = extension[1:].lower().decode("ascii", "replace")
        kind = "image" if kind in EXTENSIONS else kind
        if sample.key and member.name.startswith(sample.key + b".") and b"." in member.name[len(sample.key) + 1 :]:
            continue  # key.seg.png: a further part of the same sample
        if key != sample.key or kind in sample.members:
            yield sample
            sample = _Sample(key)
        sample.members[kind] = member
        if kind == "cls":
            sample.label = files.read(shard, member.offset, min(member.size, 256)).strip(_JSON + b" \t\r\n")
        elif kind == "json" and "cls" not in sample.members:
            labels = labels_of(parse_record(files.read(shard, member.offset, member.size)) or {})
            with contextlib.suppress(RecursionError):  # nested to the brink: no label
                sample.label = _JSON + json.dumps(labels).encode() if labels else sample.label
    yield sample


def _scan(path: bytes) -> Iterator[_Member]:
    """Reads the headers of an uncompressed tar (POSIX ustar and pax, GNU), one read a member, no matter how large."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        yield from _scan_headers(lambda offset, length: os.pread(file.fileno(), length, offset), size, path)


def _scan_remote(files: RemoteFiles, shard: int) -> Iterator[_Member]:
    """The same of a remote one: what lies between headers is skipped where it is larger than a block.

    Small members come with their headers: a request of its own for each header is thought to be slower, not measured.
    """
    size = files.sizes[shard]

    def read(offset: int, length: int) -> bytes:
        return files.read(shard, offset, max(0, min(length, size - offset)))

    yield from _scan_headers(read, size, files.paths[shard])


def _scan_headers(read: Callable[[int, int], bytes], size: int, path: bytes) -> Iterator[_Member]:
    if not _is_header(read(0, _BLOCK)):
        raise InputError(f"{os.fsdecode(path)!r} is no uncompressed tar file; unpack .tar.gz to .tar first")
    position, long_name = 0, b""
    pax: dict[str, str] = {}
    while position + _BLOCK <= size:
        header = read(position, _BLOCK)
        if not header.strip(b"\0"):
            return
        if not _is_header(header):
            yield _Member(b"(after byte %d)" % position, 0, 0, "the tar file is damaged here; what follows is lost")
            return
        length = int(pax["size"]) if pax.get("size", "").isdecimal() else _number(header[124:136])
        kind, start = header[156:157], position + _BLOCK
        position = start + (length + _BLOCK - 1) // _BLOCK * _BLOCK if kind not in b"12345" else start
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            body = read(start, min(length, _MAX_EXTENDED))
            if kind == b"L":
                long_name = body.rstrip(b"\0")
            elif kind in (b"x", b"X"):
                pax = _parse_pax(body)
            continue
        name = os.fsencode(pax["path"]) if "path" in pax else long_name or _ustar_name(header)
        long_name, pax = b"", {}
        if kind != b"5":
            yield _Member(name, start, length, _refusal(name, kind, length, start + length > size))


def _refusal(name: bytes, kind: bytes, length: int, cut: bool) -> str:
    if kind not in b"07\0":
        return {b"1": "a hard link", b"2": "a symbolic link", b"S": "a sparse file"}.get(kind, "not a regular file")
    if name.startswith(b"/") or b".." in name.split(b"/"):
        return "its name leads outside"
    if length > MAX_FILE_BYTES:
        return "over the limit of 1 GiB"
    return "cut off by the end of the tar file" if cut else ""


def _is_header(header: bytes) -> bool:
    """Whether the checksum holds (POSIX.1-1988: the sum of all bytes, those of the checksum itself as blanks)."""
    if len(header) < _BLOCK:
        return False
    try:
        expected = int(header[148:156].split(b"\0", 1)[0].strip() or b"x", 8)
        return sum(header) - sum(header[148:156]) + 8 * 32 == expected and _number(header[124:136]) >= 0
    except ValueError:
        return False


def _number(digits: bytes) -> int:
    """An octal field, or GNU's base-256 one (first bit set)."""
    if digits[0] & 0x80:
        return int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else -1
    return int(digits.split(b"\0", 1)[0].strip() or b"0", 8)


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _parse_pax(body: bytes) -> dict[str, str]:
    """Records `LENGTH key=value`, a line each, of a pax header."""
    records: dict[str, str] = {}
    position = 0
    while position < len(body):
        digits = body[position : position + 20].split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = body[position + len(digits) + 1 : position + length - 1].partition(b"=")
        if length <= len(digits) or not equals:
            break
        records[os.fsdecode(key)] = os.fsdecode(value)
        position += length
    return records
