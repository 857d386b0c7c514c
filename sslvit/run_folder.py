"""One run folder, one writer: the lock, the record of what was asked, and atomic small files. Imports no torch.

Checkpoints are `checkpoint.py`'s and metrics `metrics.py`'s; this file keeps who writes (`.lock`), what was asked
(`config.yaml`, `resolved.yaml`, `command.txt`, `env.json`), whether it is done (`finished.json`) and the numbers
(`results.json`). Of the processes that act as one under torchrun or Slurm only rank 0 writes; the other ranks hold the
same object and write nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import socket
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from sslvit.config import as_dict, changed_keys, load_config, to_yaml
from sslvit.errors import InputError, Resumable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]

#: Keys that may differ when a run goes on: they cannot change results, but for `checkpoint.every` where a run is rolled
#: back, for it goes back to the last checkpoint that was due.
FREE_KEYS = ("num_workers", "max_bad_rate", "checkpoint.*", "device", "sharded", "compile", "overwrite")

#: What shows that a run has learned or measured something: from then on its settings stand.
TRAINED = ("finished.json", "checkpoints", "stages", "controls", "cells")

#: What a run knows of its data before it has learned anything.
SEEN = ("resolved.yaml", "statistics.json", "bad_files.jsonl", "bad_files.rank*.jsonl")

#: Everything a verb may leave in its folder; `overwrite=true` deletes these names and nothing else. In this order: a
#: kill meanwhile leaves a folder that is still ours, and whose settings stand while anything of the old run does.
OWN = (
    *TRAINED,
    *("tb", "encoder", "encoder_hf", "vlm", "features", "evaluate", ".export-*"),
    *SEEN,
    *("metrics.jsonl", "train.log", "results.json", "report.html", "predictions.jsonl", "does_it_see.txt"),
    *("command.txt", "config.yaml", "env.json"),
)

#: Verbs that may write into another verb's folder; they keep their own record in a subfolder of their name.
GUESTS = ("evaluate",)

#: Verbs whose processes under torchrun or srun act as one; of every other verb each process stands for itself.
TOGETHER = ("pretrain", "align")

#: The verb whose folder holds whole stories: every other verb is a guest in it.
HOST = "demo"

LOCK = ".lock"
SETTLE_SECONDS = 0.5
PACKAGES = ("sslvit", "torch", "torchvision", "timm", "numpy", "faiss-cpu", "xformers", "transformers", "pillow")


class RunFolder:
    """An opened OUT. Use as a context manager, or call `release()`.

    path      OUT itself
    record    where config.yaml and the lock are: OUT, or OUT/VERB for a guest in another verb's folder
    writer    False on ranks other than 0, whose writing methods do nothing
    """

    def __init__(self, path: Path, record: Path, config: Any, *, writer: bool, overwrite: bool) -> None:
        self.path = path
        self.record = record
        self.writer = writer
        self._config = config
        self._starts_over = overwrite
        self._lock: Lock | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        verb: str,
        config: Any,
        *,
        free_keys: Sequence[str] = FREE_KEYS,
        overwrite: bool = False,
    ) -> RunFolder:
        """Open OUT for `verb` with a config dataclass; a run that is already there goes on.

        Any key of the config that differs from OUT's outside `free_keys` (patterns like `checkpoint.*`) is an
        InputError that names it, as are a folder that is not ours and a folder another process writes to.
        `overwrite` first deletes what sslvit wrote there. A run that has learned nothing yet may be changed freely.
        """
        path = Path(path).expanduser()
        if not is_writer(verb):  # rank 0 judges the folder, and may be deleting in it at this moment
            return cls(path, _record_folder(path, verb, overwrite), config, writer=False, overwrite=overwrite)
        _refuse_strangers(path)
        record = _record_folder(path, verb, overwrite)
        folder = cls(path, record, config, writer=True, overwrite=overwrite)
        with _opening(path):
            record.mkdir(parents=True, exist_ok=True)
            folder._lock = Lock(record / LOCK)
        try:
            if overwrite:
                _delete_own(record)
            elif any(_holds(place, name) for place in (path, record) for name in TRAINED):
                _refuse_changes(record / "config.yaml", config, free_keys)
            elif _changes(record / "config.yaml", config, free_keys):
                _delete(record, SEEN)
            folder._write_record(verb)
        except BaseException:
            folder.release()
            raise
        return folder

    def _write_record(self, verb: str) -> None:
        write_atomically(
            self.record / "env.json", json.dumps({**describe_environment(), "verb": verb}, indent=2) + "\n"
        )
        write_atomically(self.record / "config.yaml", to_yaml(self._config))
        command = self.record / "command.txt"
        before = command.read_text(encoding="utf-8", errors="replace") if command.exists() else ""
        write_atomically(command, f"{before}# {_now()} on {socket.gethostname()}\n{shlex.join(_command_line())}\n")
        self._starts_over = False

    @property
    def finished(self) -> bool:
        """Whether a run with these settings has finished here."""
        if self._starts_over:
            return False
        marker = _read_json(self.record / "finished.json")
        if not isinstance(marker, dict):
            return False
        return not _not_free(changed_keys(marker.get("config", {}), as_dict(self._config)), FREE_KEYS)

    def finish(self) -> None:
        """Mark the run as finished: the same command returns at once from now on."""
        self._write(self.record / "finished.json", json.dumps({"at": _now(), "config": as_dict(self._config)}) + "\n")

    def write_resolved(self, config: Any, reasons: Mapping[str, str]) -> None:
        """`resolved.yaml`: the config with every auto value, its reason (by dotted key) as a comment.

        The auto values are printed too, unless the run goes on with the same ones.
        """
        if not self.writer:
            return
        file, values = self.record / "resolved.yaml", as_dict(config)
        # the recipe says "VALUE: reason" and here the value stands before it
        why = {key: reason.removeprefix(f"{_at(values, key)}: ") for key, reason in reasons.items()}
        if _changed(file, config, list(why)):
            print("\n".join(_auto_lines(values, why)), flush=True)
        write_atomically(file, _with_comments(to_yaml(config), why))

    def write_json(self, name: str, value: Any) -> None:
        """Write OUT/NAME in one step: a reader sees the old file or the new one."""
        self._write(self.path / name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """What is in OUT/NAME, or None without such a file."""
        return _read_json(self.path / name)

    def add_results(self, rows: Sequence[Row]) -> None:
        """Merge rows into OUT/results.json; see `add_results`."""
        if self.writer:
            add_results(self.path, rows)

    def _write(self, path: Path, text: str) -> None:
        if self.writer:
            write_atomically(path, text)

    def release(self) -> None:
        """Give the folder back. Safe to call twice."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


# ---- names ----------------------------------------------------------------------------------------------------------


def default_output_dir(verb: str, *names: str | Path | None) -> Path:
    """`runs/VERB-NAME` where NAME is made of a config's name and specs; the same input gives the same folder."""
    slugs = [_slug(str(name)) for name in names if name is not None]
    return Path("runs") / "-".join([verb, *(slug for slug in slugs if slug not in ("", "auto"))])


def _slug(spec: str) -> str:
    """`parquet:/x/cifar10/train-*.parquet` -> `cifar10-train`; `scenes:?n=64&seed=1` -> `scenes-n-64-seed-1`."""
    body, _, query = spec.partition("?") if re.match(r"[\w:./~@-]*\?", spec) else (spec, "", "")
    scheme, colon, rest = body.partition(":")
    path = rest if colon and len(scheme) > 1 and rest else scheme if colon and not rest else body
    parts = [p for p in re.split(r"[\\/]+", path) if p not in ("", ".", "..", "~")]
    stem = re.sub(r"\.(ya?ml|parquet|tar|jsonl|json|safetensors|pth|pt)$", "", parts[-1]) if parts else "data"
    generic = stem in ("train", "val", "test", "checkpoint", "teacher") or re.search(
        r"[*?\[{]", parts[-1] if parts else ""
    )
    name = f"{parts[-2]}-{stem}" if generic and len(parts) > 1 else stem
    options = [item for item in query.split("&") if item and not item.startswith("root=")]
    text = re.sub(r"[^\w.]+", "-", "-".join([name, *options])).strip("-.")
    return text if len(text) <= 60 else f"{text[:50]}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"


# ---- whose folder it is ---------------------------------------------------------------------------------------------


def process_rank() -> int:
    """The number of this process among those of one run, 0 when alone; torchrun and srun say so in the environment."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def is_writer(verb: str) -> bool:
    """Whether this process writes its folder: it is rank 0 of those that act as one, or stands for itself."""
    return verb not in TOGETHER or process_rank() == 0


def _owner(path: Path) -> str | None:
    """The verb whose run is in a folder, or None."""
    env = _read_json(path / "env.json")
    return env.get("verb") if isinstance(env, dict) and "sslvit" in env else None


def _refuse_strangers(path: Path) -> None:
    """A folder that is not empty must be a run folder; a submitted job's files may be there before its run."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; --output-dir wants a folder")
    if not path.exists() or _owner(path) is not None:
        return
    with _opening(path):
        entries = sorted(p.name for p in path.iterdir())
    ours = (LOCK, ".results.lock", "results.json", "bad_files.jsonl", "check_data.json", "jobs", *GUESTS)
    strange = [name for name in entries if name not in ours and not name.endswith(".partial")]
    if strange:
        raise InputError(f"{path} holds {strange[0]!r} and is no run folder of sslvit; choose another --output-dir")


def _record_folder(path: Path, verb: str, overwrite: bool) -> Path:
    owner = _owner(path)
    if owner in (None, verb):
        return path
    if verb in GUESTS or (owner == HOST and not overwrite):
        return path / verb
    if owner == HOST:
        raise InputError(f"{path} holds a demo, whose parts cannot start over alone; choose another --output-dir")
    if overwrite:
        return path
    raise InputError(f"{path} holds a run of {owner}; choose another --output-dir, or overwrite=true to delete it")


def _holds(folder: Path, name: str) -> bool:
    """Whether a file is there, or a folder with something in it."""
    entry = folder / name
    return entry.is_file() or (entry.is_dir() and any(entry.iterdir()))


def _changes(file: Path, config: Any, free_keys: Sequence[str]) -> bool:
    """Whether the recorded config differs, or says nothing any more."""
    try:
        old = as_dict(load_config(type(config), file)) if file.exists() else as_dict(config)
    except InputError:
        return True
    return bool(_not_free(changed_keys(old, as_dict(config)), free_keys))


def _refuse_changes(file: Path, config: Any, free_keys: Sequence[str]) -> None:
    if not file.exists():
        return
    old, new = as_dict(load_config(type(config), file)), as_dict(config)
    for key in _not_free(changed_keys(old, new), free_keys):
        was, now = (json.dumps(_at(values, key)).replace("null", "auto") for values in (old, new))
        raise InputError(
            f"{file.parent} was started with {key}={was}, not {now}; "
            f"give the old value, another --output-dir, or overwrite=true to start over"
        )


def _not_free(keys: Sequence[str], free_keys: Sequence[str]) -> list[str]:
    return [key for key in keys if not any(fnmatch.fnmatchcase(key, free) for free in free_keys)]


def _at(values: Mapping[str, Any], key: str) -> Any:
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _delete_own(path: Path) -> None:
    """Delete what sslvit wrote into a folder, run folders inside it too; links are cut, never followed."""
    _delete(path, OWN)
    for entry in sorted(path.iterdir()):
        if entry.name.endswith(".partial") and entry.is_file():
            entry.unlink()
        elif entry.is_dir() and not entry.is_symlink() and _owner(entry) is not None:
            _delete_own(entry)
            (entry / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something of the user's is in it: it stays
                entry.rmdir()


def _delete(path: Path, names: Sequence[str]) -> None:
    """Delete these names (or patterns) in a folder, in their order."""
    for name in names:
        for entry in sorted(path.glob(name)) if "*" in name else [path / name]:
            if entry.is_symlink() or entry.is_file():
                entry.unlink()
            elif entry.is_dir():
                shutil.rmtree(entry)


# ---- the lock -------------------------------------------------------------------------------------------------------


class Lock:
    """A file that one process holds. The kernel frees it when that process dies, however it dies.

    The file names its holder (pid, host, boot id). Where the file system has no locks, the name decides: a holder
    that is gone, from before a reboot, or the same Slurm job started again, is taken over. Raises InputError when busy.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._fd: int | None = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        _close_in_children(self)
        try:
            if not self._acquire():
                holder = self._read()
                raise InputError(
                    f"{file.parent} is in use by {_holder_in_words(holder)}; wait, or stop that process"
                    f"{self._or_else(holder)}"
                )
            self._write(json.dumps(_me()))
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> bool:
        assert self._fd is not None
        locked = _flock(self._fd)
        if locked is not None:
            return locked
        if _is_alive(self._read()):
            return False
        self._write(json.dumps(_me()))
        time.sleep(SETTLE_SECONDS)  # whoever else saw the stale holder has written by now: the last one has it
        return self._read() == _me()

    def _or_else(self, holder: Mapping[str, Any]) -> str:
        """What else may help: without locks nobody can know here whether a process of another machine is gone."""
        assert self._fd is not None
        away = holder.get("boot") != _boot_id() and _flock(self._fd) is None
        return f"; if it is gone for good, rm {self.file}" if away else ""

    def _read(self) -> dict[str, Any]:
        assert self._fd is not None
        try:
            holder = json.loads(os.pread(self._fd, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _write(self, text: str) -> None:
        assert self._fd is not None
        os.pwrite(self._fd, text.encode().ljust(512), 0)  # in place, one write: nobody reads half of it

    def release(self) -> None:
        """Free the lock; the file stays, since deleting it would let two processes hold two files of one name."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                self._write("{}")
        self.close()

    def close(self) -> None:
        """Close the file; in a forked child this leaves the parent's lock alone."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


_OPEN_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_in_children(lock: Lock) -> None:
    """Forked workers must not keep the lock of a parent that was killed."""
    _register_at_fork()
    _OPEN_LOCKS.add(lock)


@functools.cache
def _register_at_fork() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_locks)


def _close_locks() -> None:
    for lock in list(_OPEN_LOCKS):
        lock.close()


def _flock(fd: int) -> bool | None:
    """True: held now. False: somebody else holds it. None: no such thing on this file system."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _me() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "started": process_start(os.getpid()),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _is_alive(holder: Mapping[str, Any]) -> bool:
    """Whether the named process may still be running; on another machine it may, unless it was this Slurm job."""
    if not holder.get("pid"):
        return False
    if holder.get("boot") == _boot_id():
        return process_start(holder["pid"]) == holder.get("started")
    same_host = holder.get("host") == socket.gethostname()
    same_job = holder.get("slurm_job") is not None and holder["slurm_job"] == os.environ.get("SLURM_JOB_ID")
    return not (same_host or same_job)


def _holder_in_words(holder: Mapping[str, Any]) -> str:
    if not holder.get("pid"):
        return "another process"
    job = f" (Slurm job {holder['slurm_job']})" if holder.get("slurm_job") else ""
    return f"process {holder['pid']} on {holder.get('host')}{job}"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None when there is no such process, 0 when unknowable."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return 0


# ---- files ----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one step, also across a power cut. A full or failing disk raises Resumable."""
    partial = partial_of(path)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not is_disk_full(error) and error.errno not in (errno.EIO, errno.EROFS):
            raise
        raise Resumable(
            f"cannot write {len(text)} bytes to {path}: {error.strerror}; then the same command goes on"
        ) from None


def partial_of(path: Path) -> Path:
    """A name beside `path` to write under before a rename; containers share process numbers, so chance decides too."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means no space or no quota; safetensors, tokenizers and numpy say so in words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    words = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "Not enough free space to write")
    text = str(error)
    return any(part in text for part in words) or re.fullmatch(r"\d+ requested and \d+ written", text) is not None


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system and system can
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _read_json(path: Path) -> Any:
    """The content of a JSON file; None when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def add_results(folder: Path, rows: Sequence[Row]) -> None:
    """Merge rows into FOLDER/results.json: a row replaces the one of the same (name, data, seed), others are added.

    Several processes may do so at once. Numbers that are not finite are written as null.
    """
    with _results_lock(folder):
        file = folder / "results.json"
        old = _read_json(file)
        if (old is None and file.exists()) or not isinstance(old, list | None):
            raise InputError(f"{file} is not a list of results; move it away")
        merged = {_row_key(row): row for row in old or []}
        merged |= {_row_key(row): {name: _finite(value) for name, value in row.items()} for row in rows}
        lines = ",\n".join(f"  {json.dumps(row)}" for row in merged.values())
        write_atomically(file, f"[\n{lines}\n]\n")


def _row_key(row: Row) -> tuple[str, str, str]:
    return str(row.get("name")), str(row.get("data")), str(row.get("seed"))


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _results_lock(folder: Path) -> Iterator[None]:
    """Held for the moment of a merge; where the file system has no locks, nothing."""
    with open(folder / ".results.lock", "w") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    """What goes wrong when OUT is opened is mostly about where it is."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise Resumable(
                f"cannot open {path}: {error.strerror}; make room and give the same command again"
            ) from None
        raise InputError(f"cannot open {path} for writing: {error.strerror}; choose another --output-dir") from None


def _with_comments(text: str, reasons: Mapping[str, str]) -> str:
    """YAML with `# reason` behind the keys that have one. Relies on two-space indents of block mappings."""
    lines: list[str] = []
    sections: list[str] = []
    for line in text.splitlines():
        match = re.match(r"( *)([\w-]+):", line)
        if match:
            depth = len(match[1]) // 2
            sections = [*sections[:depth], match[2]]
            reason = reasons.get(".".join(sections))
            line += f"  # {' '.join(reason.split())}" if reason else ""
        lines.append(line)
    return "\n".join(lines) + "\n"


def _changed(file: Path, config: Any, keys: Sequence[str]) -> bool:
    """Whether a resolved config that was written before says otherwise of any of `keys`."""
    try:
        old = as_dict(load_config(type(config), file))
    except InputError:
        return bool(keys)
    return any(_at(old, key) != _at(as_dict(config), key) for key in keys)


def _auto_lines(values: Mapping[str, Any], reasons: Mapping[str, str]) -> Iterator[str]:
    """`auto: optim.lr = 0.001  (the rule)`, the columns aligned."""
    shown = {key: str(_at(values, key)) for key in reasons}
    keys, width = max(map(len, shown)), max(map(len, shown.values()))
    for key, reason in reasons.items():
        yield f"auto: {key:<{keys}} = {shown[key]:<{width}}  ({' '.join(reason.split())})"


# ---- the record -----------------------------------------------------------------------------------------------------


def describe_environment() -> dict[str, Any]:
    """Versions and machine, without importing anything heavy."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "sslvit": versions.pop("sslvit", "unknown"),
        "started": _now(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "num_cpus": os.cpu_count(),
        "packages": versions,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "world_size": int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1),
    }


def peak_memory_bytes() -> int:
    """The largest memory this process has held.

    Linux's own word for it where there is one: `getrusage` counts on from the peak of the process that started it.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _command_line() -> list[str]:
    name = Path(sys.argv[0]).name if sys.argv else "python"
    return ["sslvit" if name == "__main__.py" else name, *sys.argv[1:]]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
