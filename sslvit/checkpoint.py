"""A checkpoint is an immutable directory `step_0000500/` of safetensors and JSON.

Written beside its place as `step_0000500.tmp/`: every file is fsynced, `manifest.json` (sizes and SHA-256) comes last,
then one rename makes it exist. A kill at any instant leaves the older checkpoint or the new one, never a mixture.
Bytes hold no time and no host. Nothing here executes a pickle; foreign `.pth` files go through torch's weights_only
reader.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sslvit import distributed
from sslvit.errors import InputError, Resumable

__all__ = [
    "Saving",
    "best_step",
    "checkpoint_path",
    "checkpoint_steps",
    "clean_checkpoints",
    "drop_checkpoints_after",
    "is_chosen",
    "latest_checkpoint",
    "load_checkpoint",
    "load_optimizer_tensors",
    "mark_best",
    "optimizer_tensors",
    "read_weights_file",
    "save_checkpoint",
    "verify_checkpoint",
]

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHUNK = 1 << 24  # bytes hashed and written at once
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # names of the safetensors format


class Saving:
    """A checkpoint being written. `join()` waits for it and raises what went wrong; `failed` tells without waiting."""

    def __init__(self, path: Path, work: Any, background: bool) -> None:
        self.path = path
        self._work = work
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name=f"save {path.name}")
            self._thread.start()
        else:
            self._run()
            self.join()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised again by join(), in the thread that asked for the save
            self._error = error
        self._work = None  # lets the snapshot go

    @property
    def failed(self) -> bool:
        """Whether the write has ended in an error."""
        return self._error is not None

    def join(self) -> None:
        """Waits for the write to end and raises its error."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    *,
    keep: int,
    best: int | None = None,
    spare: Collection[int] = (),
    milestone_every: int = 0,
    background: bool = True,
    owned: bool = False,
) -> Saving:
    """Writes `root/step_N` from `tensors` (file stem -> name -> tensor) and `meta` (JSON).

    Everything is copied before this returns, so training may go on (`owned` tensors are such copies already, on the
    CPU). Afterwards the newest `keep` checkpoints, the `best` step, those to `spare` and every multiple of
    `milestone_every` (0: none; step 0 is none) stay. A disk error becomes Resumable: one line, the older checkpoints
    untouched, nothing left behind.
    """
    assert keep >= 1, keep
    snapshot = {
        stem: {name: tensor.detach().to("cpu", copy=not owned).contiguous() for name, tensor in group.items()}
        for stem, group in tensors.items()
    }
    text = _json_bytes({**meta, "step": step})
    path = checkpoint_path(root, step)

    def work() -> None:
        try:
            _write_checkpoint(path, snapshot, text)
            if best is not None:
                mark_best(root, best)
            _prune(root, step, keep, {*spare, best}, milestone_every)
        except OSError as error:
            size = sum(tensor.nbytes for group in snapshot.values() for tensor in group.values()) + len(text)
            with contextlib.suppress(OSError):
                clean_checkpoints(root)
            raise Resumable(
                f"could not save {path} ({size} bytes): {error.strerror or error}; "
                "earlier checkpoints are intact: make room and run the same command again"
            ) from error

    return Saving(path, work, background)


def checkpoint_path(root: Path, step: int) -> Path:
    """`root/step_0000500`."""
    return Path(root) / f"step_{step:07d}"


def checkpoint_steps(root: Path) -> list[int]:
    """Steps that have a directory under `root`, ascending; whether they verify is another question."""
    if not Path(root).is_dir():
        return []
    matches = (re.fullmatch(r"step_(\d{7,})", name) for name in os.listdir(root))
    return sorted(int(match.group(1)) for match in matches if match)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named in a warning and passed over."""
    for step in reversed(checkpoint_steps(root)):
        path = checkpoint_path(root, step)
        reason = verify_checkpoint(path)
        if reason is None:
            return path
        log.warning("checkpoint %s is damaged (%s); trying the one before", path, reason)
    return None


def verify_checkpoint(path: Path) -> str | None:
    """None if every file has the size and SHA-256 of the manifest, else what is wrong."""
    try:
        text = _read_regular(path / MANIFEST)
        manifest = json.loads(text)
        files = manifest["files"]
        if text != _json_bytes({"format": 1, "step": manifest["step"], "files": files}):
            return f"{MANIFEST} is not as it was written"
        if manifest["step"] != int(path.name.removeprefix("step_")):
            return f"{MANIFEST} is of step {manifest['step']}"
        for name, facts in files.items():
            if name != os.path.basename(name) or name in ("", ".", ".."):
                return f"{MANIFEST} names {name!r}, which is no plain file name"
            if _size_regular(path / name) != facts["bytes"]:
                return f"{name} has not the {facts['bytes']} bytes of the manifest"
            if _sha256(path / name) != facts["sha256"]:
                return f"{name} has not the SHA-256 of the manifest"
        return None if "meta.json" in files else "meta.json is missing"
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is unreadable: {error!r}"


def load_checkpoint(
    path: Path, *, stems: Sequence[str] | None = None, verify: bool = True
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file stem (all, or only `stems`) on the CPU, and the meta dictionary. InputError if damaged."""
    path = Path(path)
    reason = verify_checkpoint(path) if verify else None
    if reason is not None:
        raise InputError(f"checkpoint {path} is damaged: {reason}; use another step or delete this one")
    manifest = json.loads(_read_regular(path / MANIFEST))
    found = [name.removesuffix(".safetensors") for name in manifest["files"] if name.endswith(".safetensors")]
    missing = sorted(set(stems or ()) - set(found))
    if missing:
        raise InputError(f"checkpoint {path} holds no {missing[0]}.safetensors, only {', '.join(sorted(found))}")
    tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in found if stems is None or stem in stems}
    return tensors, json.loads(_read_regular(path / "meta.json"))


def clean_checkpoints(root: Path) -> None:
    """Removes what a killed save left behind. Only while no save is running."""
    if Path(root).is_dir():
        for name in os.listdir(root):
            if name.endswith(".tmp"):
                _remove(Path(root) / name)


def drop_checkpoints_after(root: Path, step: int) -> None:
    """Removes checkpoints of steps later than `step`: after a roll-back they belong to a future that will not be."""
    for later in checkpoint_steps(root):
        if later > step:
            _retire(checkpoint_path(root, later))


def mark_best(root: Path, step: int | None, ended_there: bool = False) -> None:
    """Points `best.json` at `step`, atomically; None removes it. `ended_there`: the run went back to it and is over."""
    if step is None:
        return _remove(Path(root) / "best.json")
    temporary = Path(root) / "best.json.tmp"
    _remove(temporary)
    _write_file(temporary, [_json_bytes({"step": step, **({"ended_there": True} if ended_there else {})})])
    os.replace(temporary, Path(root) / "best.json")
    _fsync_directory(Path(root))


def best_step(root: Path) -> int | None:
    """The step `best.json` points at, if any."""
    return _read_best(root)[0]


def _read_best(root: Path) -> tuple[int | None, bool]:
    """The step, and whether the run ended there."""
    try:
        best = json.loads((Path(root) / "best.json").read_text())
        return int(best["step"]), bool(best.get("ended_there", False))
    except (OSError, ValueError, KeyError, TypeError):
        return None, False


def is_chosen(checkpoint: Path, newest: bool = False) -> bool:
    """Whether this step was chosen among its run's by the number that `best.json` stands for.

    The `newest` one, opened as the run itself, was not, though it may be the best: unless the run went back to it.
    """
    root = Path(checkpoint).parent
    best, ended_there = _read_best(root)
    return best is not None and checkpoint.name == checkpoint_path(root, best).name and (ended_there or not newest)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name/moment` -> tensor; parameters without names go by their index."""
    return {
        f"{name}/{key}": value
        for name, parameter in _named_parameters(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse: replaces the optimizer's whole state."""
    parameters = dict(_named_parameters(optimizer))
    optimizer.state.clear()
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise InputError(f"the checkpoint's optimizer knows a parameter {name!r} that this run has not")
        parameter = parameters[name]
        optimizer.state[parameter][key] = distributed.shard_like(tensor, parameter)


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth or .pt file, on the CPU; nested dictionaries give dotted names.

    Pickles go through torch.load(weights_only=True), with argparse.Namespace allowed because the released DINO and MAE
    files hold their arguments. Anything else in them is refused with an InputError.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .safetensors, .pth or .pt file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a reader fed with anything at all may raise anything at all
        reason = str(error).strip().splitlines() or [repr(error)]
        raise InputError(f"{path}: no weights that can be read safely ({reason[0]})") from error
    return dict(_flatten(content, ""))


def _flatten(content: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}{key}.")


def _named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    index = 0
    for group in optimizer.param_groups:
        names = group.get("param_names") or [str(index + i) for i in range(len(group["params"]))]
        yield from zip(names, group["params"], strict=True)
        index += len(names)


def _write_checkpoint(path: Path, snapshot: Mapping[str, Mapping[str, Tensor]], meta: bytes) -> None:
    """The order of the operations is the promise; tests kill the process after each of them."""
    root, temporary = path.parent, path.with_name(f"{path.name}.tmp")
    root.mkdir(parents=True, exist_ok=True)
    _remove(temporary)
    os.mkdir(temporary)
    files = {
        f"{stem}.safetensors": _write_file(temporary / f"{stem}.safetensors", _safetensors_chunks(group))
        for stem, group in snapshot.items()
    }
    files["meta.json"] = _write_file(temporary / "meta.json", [meta])
    manifest = {"format": 1, "step": int(path.name.removeprefix("step_")), "files": files}
    _write_file(temporary / MANIFEST, [_json_bytes(manifest)])
    _fsync_directory(temporary)
    if path.exists():  # damaged, or the run was rolled back behind it
        _retire(path)
    os.rename(temporary, path)
    _fsync_directory(root)


def _prune(root: Path, step: int, keep: int, spare: Collection[int | None], milestone_every: int = 0) -> None:
    """Keeps the newest `keep` up to `step`, `spare` and milestones; first the new checkpoint must verify on disk."""
    kept = {*[s for s in checkpoint_steps(root) if s <= step][-keep:], *spare}
    if milestone_every:
        kept |= {s for s in checkpoint_steps(root) if s and s % milestone_every == 0}
    doomed = [s for s in checkpoint_steps(root) if s not in kept]
    if not doomed:
        return
    reason = verify_checkpoint(checkpoint_path(root, step))
    if reason is not None:
        raise OSError(f"written, but read back wrong: {reason}")
    for old in doomed:
        _retire(checkpoint_path(root, old))


def _retire(path: Path) -> None:
    """Deletes a checkpoint; its name goes first, so that no half of it is ever found."""
    aside = path.with_name(f"{path.name}.old.tmp")
    _remove(aside)
    os.rename(path, aside)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a new file, makes it durable, and returns its entry in the manifest."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors format, streamed: 8 bytes of header length, a JSON header, then the raw tensors.

    Written here rather than by the library so that a disk error arrives as an OSError with its errno, the hash is taken
    in the same pass, and the bytes depend on nothing but the tensors.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        for start in range(0, len(raw), CHUNK):
            yield raw[start : start + CHUNK]


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _size_regular(path: Path) -> int:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(None, "not a regular file", str(path))
    return status.st_size


def _read_regular(path: Path) -> bytes:
    _size_regular(path)
    return path.read_bytes()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
