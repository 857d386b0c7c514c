"""Paths, patterns and indices that all file sources share. Knows nothing of images.

An index (names, offsets) is kept in `$SSLVIT_CACHE` or `~/.cache/sslvit`, never beside the user's data.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sslvit.data.bad_files import BadImage
from sslvit.data.remote import is_remote, remote_matches
from sslvit.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_FILE_BYTES = 1 << 30
_MAX_OPEN = 256  # shards whose descriptor stays open; further ones are opened for each read


class Names:
    """Many byte strings in two arrays: cheap to pickle, to fork and to map from disk, unlike a list."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data  # (sum of lengths,) uint8
        self.ends = ends  # (n,) int64

    @classmethod
    def of(cls, items: Sequence[bytes]) -> Names:
        """Packs the strings."""
        ends = np.cumsum(np.fromiter((len(item) for item in items), np.int64, len(items)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(items), np.uint8), ends)

    @classmethod
    def concat(cls, parts: Sequence[Names]) -> Names:
        """Joins several into one."""
        starts = np.cumsum([0] + [len(part.data) for part in parts])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.data for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index > 0 else 0
        return self.data[start : self.ends[index]].tobytes()


class OpenFiles:
    """Random reads from large files by any number of threads: descriptors are shared, reads carry their offset."""

    def __init__(self, paths: Sequence[bytes]) -> None:
        self.paths = list(paths)
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, index: int, offset: int, size: int) -> bytes:
        """Returns `size` bytes of file `index` at `offset`; BadImage when they cannot be read."""
        try:
            descriptor = self._descriptors.get(index)
            if descriptor is None and len(self._descriptors) < _MAX_OPEN:
                with self._lock:
                    descriptor = self._descriptors.get(index)
                    if descriptor is None:
                        descriptor = self._descriptors[index] = os.open(self.paths[index], os.O_RDONLY | os.O_CLOEXEC)
            if descriptor is not None:
                return _pread(descriptor, offset, size)
            descriptor = os.open(self.paths[index], os.O_RDONLY | os.O_CLOEXEC)
            try:
                return _pread(descriptor, offset, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BadImage(f"cannot read {os.fsdecode(self.paths[index])}: {error.strerror}") from error

    def __getstate__(self) -> list[bytes]:
        return self.paths

    def __setstate__(self, paths: list[bytes]) -> None:
        self.__init__(paths)  # type: ignore[misc]

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # one call reads at most 2 GiB, and fewer on some file systems
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise BadImage(f"the file ends {size - len(data)} bytes early")
        data += more
    return data


def read_regular_file(path: bytes) -> bytes:
    """Returns the bytes of a file; BadImage for a missing, unreadable, huge or not regular one (a FIFO would hang)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise BadImage("not a regular file")
            if facts.st_size > MAX_FILE_BYTES:
                raise BadImage(f"a file of {facts.st_size / 2**30:.1f} GiB is over the limit of 1 GiB")
            return _pread(descriptor, 0, facts.st_size)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(getattr(error, "strerror", None) or str(error)) from error


def split_options(rest: str, allowed: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Splits `PATH?key=value&key=value`. A question mark without such keys belongs to the path (a glob pattern)."""
    path, mark, query = rest.rpartition("?")
    if not mark or os.path.lexists(rest) or not re.fullmatch(r"(\w+=[^&=]*)(&\w+=[^&=]*)*", query):
        return rest, {}
    options = dict(item.split("=", 1) for item in query.split("&"))
    for key in options:
        if key not in allowed:
            known = f"known: {', '.join(allowed)}" if allowed else "none is known here"
            raise InputError(f"unknown option {key!r} in the data spec {rest!r}; {known}")
    return path, options


def expand(pattern: str, suffixes: Sequence[str], *, remote: bool = False) -> list[bytes]:
    """The files of a comma-separated list of paths, globs and `{00..03}` ranges: sorted within an item, each once.

    A folder stands for the files below it with one of the suffixes. Raises InputError for an item without a file. URLs
    are told apart by their `://`, where `remote` files can be read.
    """
    found: dict[bytes, None] = {}
    listed = [pattern] if os.path.lexists(pattern) else _split_commas(pattern)
    for item in (expanded for part in listed for expanded in _expand_braces(part)):
        if is_remote(item) and not remote:
            raise InputError(f"{item!r} is a URL: only tar shards are read from afar, as in tar:{item}")
        matches = remote_matches(item, suffixes) if is_remote(item) else _matches(item, suffixes)
        if not matches:
            raise InputError(f"no {' or '.join(suffixes)} file at {item!r}; check the path or the pattern")
        found.update(dict.fromkeys(matches))
    if not found:
        raise InputError(f"no {' or '.join(suffixes)} file at {pattern!r}; check the path or the pattern")
    return list(found)


def _split_commas(pattern: str) -> list[str]:
    return [item for item in re.split(r",(?![^{]*\})", pattern) if item]


def _expand_braces(item: str) -> list[str]:
    """`a-{08..10}.tar` and `{train,val}.tar`, as shells and WebDataset write them."""
    match = re.search(r"\{([^{}]*)\}", item)
    if match is None or os.path.lexists(item):
        return [item]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds is not None:
        first, last = int(bounds[1]), int(bounds[2])
        if not 0 <= last - first < 10_000_000:
            raise InputError(f"the range {match[0]} in {item!r} runs backwards or is too long")
        choices = [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    return [text for choice in choices for text in _expand_braces(item[: match.start()] + choice + item[match.end() :])]


def _matches(item: str, suffixes: Sequence[str]) -> list[bytes]:
    item = os.path.expanduser(item)
    if os.path.isdir(item):
        tree = (os.path.join(folder, file) for folder, _, files in os.walk(os.fsencode(item)) for file in files)
        return sorted(path for path in tree if path.lower().endswith(tuple(s.encode() for s in suffixes)))
    if os.path.lexists(item):
        return [os.fsencode(item)]
    return sorted(os.fsencode(path) for path in glob.glob(item, recursive=True) if os.path.isfile(path))


def cache_root() -> Path:
    """The folder of indices: `$SSLVIT_CACHE`, else `~/.cache/sslvit`."""
    return Path(os.environ.get("SSLVIT_CACHE") or Path.home() / ".cache" / "sslvit")


def cache_key(*parts: object) -> str:
    """A name for a cache entry that depends on every part."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogateescape"))
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def file_key(path: bytes) -> tuple[bytes, int, int]:
    """What tells that a file is the one indexed before: its real path, size and time of change."""
    facts = os.stat(path)
    return os.path.realpath(path), facts.st_size, facts.st_mtime_ns


def load_arrays(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Maps the arrays of a cache entry; None when it is absent or damaged."""
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    except (OSError, ValueError):
        return None


def kept_arrays(entry: Path, names: Sequence[str], build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of a cache entry, mapped; built and saved first by one of the processes that ask for them at once."""
    arrays = load_arrays(entry, names)
    if arrays is None:
        with _one_at_a_time(entry):
            arrays = load_arrays(entry, names)
            if arrays is None:
                arrays = build()
                save_arrays(entry, arrays)
                arrays = load_arrays(entry, names) or arrays  # shared by all processes, and this one's copy goes
    return arrays


@contextlib.contextmanager
def _one_at_a_time(entry: Path) -> Iterator[None]:
    """Held by one process of a machine; where the cache cannot be written or has no locks, by everybody."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(entry.with_name(f".{entry.name}.lock"), "w"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a cache entry whole or not at all. A cache that cannot be written (full, read-only) is no error."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    except OSError:
        return
    try:
        for name, array in arrays.items():
            np.save(scratch / f"{name}.npy", array, allow_pickle=False)
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        os.rename(scratch, folder)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
