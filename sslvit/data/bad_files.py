"""The images that cannot be used: one exception, and the list `bad_files.jsonl` that names each with its reason.

It decides nothing about replacements (the loader does).
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

from sslvit.errors import InputError
from sslvit.run_folder import process_rank

MIN_SEEN = 100  # fewer images say nothing about the share of bad ones


class BadImage(ValueError):
    """An image that cannot be read; the message is the reason, in words, the same on every run."""


class BadFiles:
    r"""Collects bad images from any number of threads and writes each name once, one JSON line each.

    Names keep bytes that are no UTF-8: they are surrogate escapes in `str` and `\udcXX` in the file, so that
    `os.fsencode(json.loads(line)["name"])` is the name on disk. With `path=None` nothing is written.

    Of several processes rank 0 writes `path` and rank N a file of its own beside it, `bad_files.rankN.jsonl`; rank 0
    takes in what the others found when it starts, and at the end of a run with `collect`. A verb whose processes do not
    act as one says `rank=0` in each.
    """

    def __init__(self, path: str | Path | None = None, *, max_bad_rate: float = 0.05, rank: int | None = None) -> None:
        self.rank = process_rank() if rank is None else rank
        self.path = None if path is None else _own_file(Path(path), self.rank)
        self.max_bad_rate = max_bad_rate
        self.reasons: dict[str, str] = {}
        self.num_seen = 0  # draws, good and bad
        self._num_bad = 0  # draws
        self._lock = threading.Lock()
        if self.path is not None and self.path.exists():
            self.reasons = read_bad_files(self.path)
        self.collect()

    @property
    def count(self) -> int:
        """The number of different bad images."""
        return len(self.reasons)

    def collect(self) -> None:
        """On rank 0: writes down what the other ranks' files hold. They stay; doing so again changes nothing."""
        if self.path is None or self.rank != 0:
            return
        for file in sorted(self.path.parent.glob(f"{self.path.stem}.rank*{self.path.suffix}")):
            for name, reason in read_bad_files(file).items():
                with self._lock:
                    self._note(name, reason)

    def saw(self, num_good: int = 1) -> None:
        """Counts images that were good."""
        with self._lock:
            self.num_seen += num_good

    def add(self, name: str, reason: str) -> None:
        """Counts a bad image and writes it down if it is new.

        Raises InputError when more than `max_bad_rate` of the images seen so far, at least 100, are bad; `saw`
        counts the good ones.
        """
        with self._lock:
            self.num_seen += 1
            self._num_bad += 1
            self._note(name, reason)
            share = self._num_bad / self.num_seen
            if self.num_seen >= MIN_SEEN and share > self.max_bad_rate:
                where = f"see {self.path}" if self.path is not None else f"the last is {name!r}: {reason}"
                raise InputError(
                    f"{self._num_bad} of the {self.num_seen} images read so far cannot be used ({share:.0%}, limit "
                    f"{self.max_bad_rate:.0%}); {where}; remove or repair them, or raise max_bad_rate"
                )

    def _note(self, name: str, reason: str) -> None:
        if name not in self.reasons:
            self.reasons[name] = reason
            if self.path is not None:
                self._write(name, reason)

    def _write(self, name: str, reason: str) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            if file.tell() > 0:
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # a line cut off by a kill
                    file.write(b"\n")
            file.write(json.dumps({"name": name, "reason": reason}).encode("ascii") + b"\n")


def _own_file(path: Path, rank: int) -> Path:
    """`bad_files.jsonl` of rank 0, `bad_files.rank3.jsonl` of rank 3."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def read_bad_files(path: str | Path) -> dict[str, str]:
    """Returns {name: reason} of a `bad_files.jsonl`; a line cut off by a kill is passed over."""
    reasons = {}
    for line in Path(path).read_bytes().splitlines():
        try:
            row = json.loads(line)
            reasons[str(row["name"])] = str(row["reason"])
        except (ValueError, KeyError, TypeError):
            continue
    return reasons
