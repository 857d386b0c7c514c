"""Files behind a URL (`s3://`, `gs://`, `https://`, ...), read in place through fsspec. Knows nothing of images.

Reads go in blocks of 8 MiB that are kept a while, so that the order of `order.py` fetches each once an epoch. Every
process fetches what it reads: a second rank on a machine reads the same blocks again.
"""

from __future__ import annotations

import logging
import posixpath
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from sslvit.data.bad_files import BadImage
from sslvit.data.kept import Kept
from sslvit.errors import InputError, Outage, Resumable

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
KEPT_BYTES = 512 << 20
OUTAGE_SECONDS = 300.0  # for so long a read that failed is tried again
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries; each is twice as long as the one before
_JUST_NOW = 60.0  # seconds in which others need not find out again that a server is away

_given_up: dict[str, float] = {}  # server -> when somebody last tried for long enough
Answer = TypeVar("Answer")


def is_remote(path: str | bytes) -> bool:
    """Whether a path is a URL of more than this machine's files."""
    return (
        re.match(rb"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://", path if isinstance(path, bytes) else path.encode())
        is not None
    )


def remote_matches(url: str, suffixes: Sequence[str]) -> list[bytes]:
    """The URL itself, or what a pattern with `*` or `[` names, or the files right below a URL that ends in a slash."""
    if not re.search(r"[*\[]", url) and not url.endswith("/"):
        return [url.encode()]
    system, path = _system(url)
    scheme = url.split("://", 1)[0]
    found = _asked(url, lambda: system.ls(path, detail=False) if url.endswith("/") else system.glob(path))
    named = [
        name if is_remote(name) else f"{scheme}://{name.lstrip('/') if scheme != 'memory' else name}" for name in found
    ]
    return sorted(name.encode() for name in named if name.lower().endswith(tuple(suffixes)))


def remote_key(url: bytes) -> tuple[bytes, int, str]:
    """What tells that a file is the one indexed before: URL, size, and what its server says of its version."""
    system, path = _system(url.decode())
    facts = _asked(url.decode(), lambda: system.info(path))
    size = facts.get("size")
    if size is None:
        raise InputError(f"{url.decode()}: its server does not say how large it is; copy it to a disk")
    known = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created", "mimetype")
    return url, int(size), repr([(name, str(facts[name])) for name in known if facts.get(name) is not None])


class RemoteFiles:
    """Random reads from large remote files by any number of threads; a block that is being fetched is waited for."""

    def __init__(self, paths: Sequence[bytes], sizes: Sequence[int]) -> None:
        self.paths, self.sizes = list(paths), list(sizes)
        self._kept: Kept[tuple[int, int]] = Kept(KEPT_BYTES)

    def read(self, index: int, offset: int, size: int) -> bytes:
        """Returns `size` bytes of file `index` at `offset`; BadImage when it ends before, Outage without network."""
        if offset + size > self.sizes[index]:
            raise BadImage(f"the file ends {offset + size - self.sizes[index]} bytes early")
        parts = []
        for number in range(offset // BLOCK_BYTES, (offset + max(size, 1) - 1) // BLOCK_BYTES + 1):
            block = self._kept.get((index, number), lambda number=number: self._fetch(index, number))  # type: ignore[misc]
            start = number * BLOCK_BYTES
            parts.append(block[max(0, offset - start) : offset + size - start].tobytes())
        return b"".join(parts)

    def _fetch(self, index: int, number: int) -> np.ndarray:
        """Block `number` of a file, (n,) uint8. Refused though it was there at the start: Resumable."""
        url = self.paths[index].decode()
        start, end = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self.sizes[index])
        system, path = _system(url)
        try:
            data = _persist(url, lambda: system.cat_file(path, start=start, end=end))
        except _Refused as refused:
            raise Resumable(
                f"cannot read {url} any more: {refused}; see to the file and your credentials and run the same "
                "command again"
            ) from refused.__cause__
        if len(data) != end - start:
            raise InputError(
                f"{url}: its server sent {len(data)} bytes for {end - start}; it serves no ranges, or the file changed"
            )
        return np.frombuffer(data, np.uint8)

    def __getstate__(self) -> tuple[list[bytes], list[int]]:
        return self.paths, self.sizes

    def __setstate__(self, state: tuple[list[bytes], list[int]]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def basename(path: bytes) -> bytes:
    """The last part of a path or URL, without a query."""
    return posixpath.basename(path.split(b"?", 1)[0]) if is_remote(path) else posixpath.basename(path)


def _system(url: str) -> tuple[Any, str]:
    """The file system of fsspec, which keeps one for each place, and the path in it."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(f"{url} needs more packages ({error}); pip install 'sslvit[remote]'") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error
    return system, path


class _Refused(Exception):
    """A server answered, and asking again would not help: no such file, no permission, no such thing as this URL."""


def _asked(url: str, ask: Callable[[], Answer]) -> Answer:
    """What a server answers about a file; InputError in one line when it refuses, Outage when it does not answer."""
    try:
        return _persist(url, ask)
    except _Refused as refused:
        if _status(refused.__cause__) == 404:
            raise InputError(f"nothing at {url}; check the address") from None
        raise InputError(f"cannot open {url}: {refused}") from refused.__cause__


def _persist(url: str, act: Callable[[], Answer]) -> Answer:
    """What `act` returns, tried for minutes with growing pauses; _Refused at once where that is no use, else Outage."""
    server, pause, first = "/".join(url.split("/", 3)[:3]), _FIRST_PAUSE, time.monotonic()
    while True:
        began = time.monotonic()
        try:
            return act()
        except Exception as error:  # of any client and server
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            if 400 <= _status(cause) < 500:
                raise _Refused(reason) from cause
            known = began - _given_up.get(server, -_JUST_NOW) < _JUST_NOW
            if known or time.monotonic() + pause > first + OUTAGE_SECONDS:
                _given_up[server] = time.monotonic()
                raise Outage(f"cannot read {url}: {reason}; run the same command again") from error
            if pause == _FIRST_PAUSE:
                logger.warning("cannot read %s (%s); trying again for up to %.0f s", url, reason, OUTAGE_SECONDS)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _status(error: BaseException | None) -> int:
    """What an error means as a status of HTTP, 500 when it may pass. (fsspec's FileNotFoundError may hide another.)"""
    told = getattr(error, "status", None) or getattr(error, "code", None)  # of aiohttp, of gcsfs
    if isinstance(response := getattr(error, "response", None), dict):  # of botocore
        told = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(told, int) and told >= 400:
        return 500 if told in (408, 425, 429) else told
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return 403
    return 400 if isinstance(error, ValueError | NotImplementedError) else 500
