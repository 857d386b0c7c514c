"""`folder:PATH`: every image file below a folder; class folders give labels.

The tree is scanned once; the index of a large one is kept and reopened while no folder in it has changed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from sslvit.data.files import Names, cache_key, cache_root, load_arrays, read_regular_file, save_arrays
from sslvit.errors import InputError

# Image formats by extension, whether or not they can be decoded here: what cannot is named, not passed over.
EXTENSIONS = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm"),
        *("pbm", "pnm", "pfm", "jp2", "j2k", "jpc", "jpf", "jpx", "j2c", "jxl", "avif", "avifs", "heic", "heif"),
        *("mpo", "tga", "icb", "vda", "vst", "ico", "icns", "cur", "pcx", "dcx", "sgi", "rgb", "rgba", "bw"),
        *("ras", "dds", "psd", "qoi", "blp", "fit", "fits", "fli", "flc", "ftc", "ftu", "gbr", "im", "msp", "pcd"),
        *("pxr", "xbm", "xpm", "eps", "wmf", "emf"),
    )
)
_EXTENSIONS = frozenset(extension.encode() for extension in EXTENSIONS)
CACHE_FROM = 20_000  # images; smaller folders are scanned faster than their index is checked
_ARRAYS = ("folders", "folder_ends", "folder_mtimes", "files", "file_ends", "file_folder", "ignored", "ignored_ends")


class FolderSource:
    """Images below a folder, in the order of their paths.

    `labels["label"]` exists when all images lie in two or more first-level folders, the classes, numbered by name.
    `ignored` counts the files passed over, by extension.
    """

    def __init__(self, root: str | bytes) -> None:
        self.root = os.path.abspath(os.path.expanduser(os.fsencode(root)))
        self.spec = f"folder:{os.fsdecode(self.root)}"
        self.has_text = False
        if not os.path.isdir(self.root):
            raise InputError(f"no folder {os.fsdecode(self.root)!r}; check the path")
        self._load_index()
        if not len(self._files):
            held = ", ".join(f"{count} {extension}" for extension, count in self.ignored.most_common(3)) or "no files"
            raise InputError(f"no images in the folder {os.fsdecode(self.root)!r} (it holds {held}); check the path")
        self.labels, self.class_names = self._class_folders()

    def __len__(self) -> int:
        return len(self._files)

    def path(self, index: int) -> bytes:
        """The path below the folder."""
        folder = self._folders[int(self._file_folder[index])]
        return os.path.join(folder, self._files[index])

    def name(self, index: int) -> str:
        """The path below the folder; bytes that are no UTF-8 are surrogate escapes."""
        return os.fsdecode(self.path(index))

    def read(self, index: int) -> bytes:
        """The bytes of the file; BadImage with the reason when it cannot be read."""
        return read_regular_file(os.path.join(self.root, self.path(index)))

    def text(self, index: int) -> None:
        """A folder holds no text."""
        return None

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or rewritten."""
        digest = hashlib.sha256(self.root)
        for index in range(len(self)):
            path = self.path(index)
            try:
                facts = os.stat(os.path.join(self.root, path))
                digest.update(b"%s\0%d\0%d\0" % (path, facts.st_size, facts.st_mtime_ns))
            except OSError:
                digest.update(b"%s\0gone\0" % path)
        return digest.hexdigest()

    def _class_folders(self) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        tops = [self._folders[i].split(b"/", 1)[0] for i in range(len(self._folders))]
        used = sorted({tops[i] for i in np.flatnonzero(np.bincount(self._file_folder))})
        if len(used) < 2 or b"" in used:
            return {}, {}
        number = {top: label for label, top in enumerate(used)}
        of_folder = np.array([number.get(top, -1) for top in tops], np.int64)
        return {"label": of_folder[self._file_folder]}, {"label": [os.fsdecode(top) for top in used]}

    def _load_index(self) -> None:
        entry = cache_root() / "folders" / cache_key("folder-1", os.path.realpath(self.root))
        arrays = load_arrays(entry, _ARRAYS)
        if arrays is None or not self._is_current(arrays):
            arrays = _scan(self.root)
            recent = int(arrays["folder_mtimes"].max()) > time.time_ns() - 3_000_000_000
            if len(arrays["file_ends"]) >= CACHE_FROM and not recent:  # a change right after the scan could go unseen
                save_arrays(entry, arrays)
        self._folders = Names(arrays["folders"], arrays["folder_ends"])
        self._files = Names(arrays["files"], arrays["file_ends"])
        self._file_folder = arrays["file_folder"]
        ignored = Names(arrays["ignored"], arrays["ignored_ends"])
        self.ignored = Counter(os.fsdecode(ignored[i]) for i in range(len(ignored)))

    def _is_current(self, arrays: dict[str, np.ndarray]) -> bool:
        folders = Names(arrays["folders"], arrays["folder_ends"])
        try:
            return all(
                os.stat(os.path.join(self.root, folders[i])).st_mtime_ns == mtime
                for i, mtime in enumerate(arrays["folder_mtimes"])
            )
        except OSError:
            return False


def _scan(root: bytes) -> dict[str, np.ndarray]:
    """Lists the tree: real folders, then linked ones not seen yet, so that loops end and nothing counts twice."""
    seen: set[tuple[int, int]] = set()
    listings: list[_Listing] = []
    links = [b""]
    while links:
        pending = [links.pop(0)]
        while pending:
            listing = _list_folder(root, pending.pop(), seen)
            if listing is not None:
                pending += listing.folders
                links += listing.links
                listings.append(listing)
    listings.sort(key=lambda listing: listing.path.split(b"/"))
    if not any(listing.images for listing in listings):  # files named by a hash alone
        for listing in listings:
            listing.images = [name for name in listing.others if b"." not in name]
            listing.others = [name for name in listing.others if b"." in name]
    return _pack(listings)


@dataclass
class _Listing:
    """One folder. Paths are below the root, names below the folder; all sorted."""

    path: bytes
    mtime: int
    folders: list[bytes]
    links: list[bytes]
    images: list[bytes]
    others: list[bytes]


def _list_folder(root: bytes, folder: bytes, seen: set[tuple[int, int]]) -> _Listing | None:
    """Lists one folder; None when it was listed before. Hidden folders and macOS's `._` shadows are left out."""
    full = os.path.join(root, folder)
    listing = _Listing(folder, 0, [], [], [], [])
    try:
        facts = os.stat(full)
        if (facts.st_dev, facts.st_ino) in seen:
            return None
        seen.add((facts.st_dev, facts.st_ino))
        listing.mtime = facts.st_mtime_ns
        with os.scandir(full) as entries:
            for entry in entries:
                _sort_entry(entry, listing)
    except OSError as error:
        listing.others.append(b"(folder: %s)" % os.fsencode(error.strerror or "unreadable"))
    for names in (listing.folders, listing.links, listing.images, listing.others):
        names.sort()
    return listing


def _sort_entry(entry: os.DirEntry[bytes], listing: _Listing) -> None:
    name = entry.name
    try:
        if entry.is_dir():
            if not name.startswith(b".") and name != b"__MACOSX":
                (listing.links if entry.is_symlink() else listing.folders).append(os.path.join(listing.path, name))
        elif not entry.is_file():  # FIFO, socket, device, dangling link
            listing.others.append(b"(not a regular file)")
        elif name.startswith(b"._") or name.rpartition(b".")[2].lower() not in _EXTENSIONS or b"." not in name:
            listing.others.append(name)
        else:
            listing.images.append(name)
    except OSError:  # a link that leads to itself
        listing.others.append(b"(not a regular file)")


def _pack(listings: list[_Listing]) -> dict[str, np.ndarray]:
    folders = Names.of([listing.path for listing in listings])
    files = Names.of([name for listing in listings for name in listing.images])
    ignored = Names.of([_kind(name) for listing in listings for name in listing.others])
    counts = [len(listing.images) for listing in listings]
    return {
        "folders": folders.data,
        "folder_ends": folders.ends,
        "folder_mtimes": np.array([listing.mtime for listing in listings], np.int64),
        "files": files.data,
        "file_ends": files.ends,
        "file_folder": np.repeat(np.arange(len(listings), dtype=np.int32), counts),
        "ignored": ignored.data,
        "ignored_ends": ignored.ends,
    }


def _kind(name: bytes) -> bytes:
    if name.startswith(b"("):
        return name
    extension = os.path.splitext(name)[1].lower()
    return b"*" + extension if extension else b"files without extension"
