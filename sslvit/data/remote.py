"""Files behind a URL (`s3://`, `gs://`, `https://`, ...), read in place through fsspec. Knows nothing of images.

Reads go in blocks of 8 MiB that are kept a while, so that the order of `order.py` fetches each once an epoch. Every
process fetches what it reads: a second rank on a machine reads the same blocks again.
"""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sslvit.data.bad_files import BadImage
from sslvit.data.kept import Kept
from sslvit.errors import InputError, Resumable

BLOCK_BYTES = 8 << 20
KEPT_BYTES = 512 << 20
_PAUSES = (0.5, 2.0, 8.0)  # seconds before a read that failed is tried again


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
        """Returns `size` bytes of file `index` at `offset`; BadImage when it ends before, Resumable without network."""
        if offset + size > self.sizes[index]:
            raise BadImage(f"the file ends {offset + size - self.sizes[index]} bytes early")
        parts = []
        for number in range(offset // BLOCK_BYTES, (offset + max(size, 1) - 1) // BLOCK_BYTES + 1):
            block = self._kept.get((index, number), lambda number=number: self._fetch(index, number))  # type: ignore[misc]
            start = number * BLOCK_BYTES
            parts.append(block[max(0, offset - start) : offset + size - start].tobytes())
        return b"".join(parts)

    def _fetch(self, index: int, number: int) -> np.ndarray:
        """Block `number` of a file, (n,) uint8; what fails is tried again a few times."""
        url = self.paths[index].decode()
        start, end = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self.sizes[index])
        for pause in (*_PAUSES, None):
            try:
                system, path = _system(url)
                data = system.cat_file(path, start=start, end=end)
                break
            except Exception as error:  # of any client and server
                if pause is None:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise Resumable(f"cannot read {url}: {reason}; run the same command again") from error
                time.sleep(pause)
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


def _asked(url: str, ask: Callable[[], Any]) -> Any:
    """What a server answers about a file; InputError in one line when it does not."""
    try:
        return ask()
    except FileNotFoundError:
        raise InputError(f"nothing at {url}; check the address") from None
    except Exception as error:  # of any client and server
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot open {url}: {reason}") from error
