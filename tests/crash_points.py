"""Kills a process with SIGKILL before each file-system operation of a save, and judges what it leaves behind.

Not a test: test_crashes.py runs it as `python crash_points.py FOLDER CASE...`, in a process of its own because it
forks. It prints one line of JSON, {CASE: {"points": n, "failures": [...]}}. Operations are those of Python's os module;
a write also gets a point in its middle. CASE is `sound`, a saver that is broken on purpose, or `runN`: a whole run
killed at every N-th operation.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sslvit import checkpoint
from sslvit.checkpoint import checkpoint_path, checkpoint_steps, latest_checkpoint, load_checkpoint, verify_checkpoint

OPERATIONS = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "truncate")
REAL = {name: getattr(os, name) for name in OPERATIONS}


class Operations:
    """Counts and records operations under `root`; kills this process at number `kill_at`."""

    def __init__(self, root: Path, kill_at: int | None) -> None:
        self.root, self.kill_at, self.count = str(root), kill_at, 0
        self.record: list[tuple[str, str]] = []
        self.names: dict[int, str] = {}

    def install(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(name))

    @staticmethod
    def uninstall() -> None:
        for name, function in REAL.items():
            setattr(os, name, function)

    def _wrapped(self, name: str) -> Callable[..., Any]:
        def operation(first: Any, *rest: Any, **options: Any) -> Any:
            path = self.names.get(first, "") if isinstance(first, int) else str(first)
            if options.get("dir_fd") is not None:
                path = os.path.join(self.names.get(options["dir_fd"], ""), path)
            if not path.startswith(self.root):
                return REAL[name](first, *rest, **options)
            if name == "write":
                self._point(lambda: REAL["write"](first, rest[0][: len(rest[0]) // 2]))
            self._point()
            self.record.append((name, path))
            result = REAL[name](first, *rest, **options)
            if name == "open":
                self.names[result] = path
            return result

        return operation

    def _point(self, last_act: Callable[[], Any] | None = None) -> None:
        if self.count == self.kill_at:
            if last_act is not None:
                last_act()
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def in_child(root: Path, kill_at: int | None, work: Callable[[], None]) -> bool:
    """Runs `work` in a fork that is killed at that operation; True if it was killed, False if it came to its end."""
    child = os.fork()
    if child == 0:
        Operations(root, kill_at).install()
        try:
            work()
        except BaseException as error:  # the parent must hear of it
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0, status
    return False


def content(step: int) -> dict[str, dict[str, torch.Tensor]]:
    value = float(step)
    return {
        "model": {"weight": torch.full((50, 7), value), "bias": torch.full((7,), value)},
        "optimizer": {"weight/exp_avg": torch.full((50, 7), value)},
    }


def save(root: Path, step: int) -> None:
    checkpoint.save_checkpoint(root, step, content(step), {"cursor": step * 8}, keep=1, best=3, background=True).join()


def enumerate_save(folder: Path, steps_before: list[int], step: int, enough: str) -> tuple[int, list[str]]:
    """Kills a save of `step` over `steps_before` at every operation; afterwards old or new must stand, unmixed.

    Ends early at a failure that says `enough`.
    """
    failures: list[str] = []
    point, root = 0, folder / "checkpoints"
    while True:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        for before in steps_before:
            save(root, before)
        killed = in_child(root, point, lambda: save(root, step))
        failures += [
            f"{steps_before}->{step} point {point}: {text}" for text in judge(root, steps_before, step, killed)
        ]
        if not killed or any(enough in failure for failure in failures):
            return point, failures
        point += 1


def judge(root: Path, steps_before: list[int], step: int, killed: bool) -> list[str]:
    found = []
    visible = [path for path in root.iterdir() if path.name.startswith("step_") and not path.name.endswith(".tmp")]
    found += [f"{path.name} is visible but damaged" for path in visible if verify_checkpoint(path) is not None]
    latest = latest_checkpoint(root)
    allowed = {step} if not killed else {step, *steps_before[-1:]}
    if latest is None:
        if steps_before or not killed:
            found.append("lost")
    else:
        found += judge_content(latest, allowed)
    if 3 in steps_before and checkpoint.best_step(root) == 3 and verify_checkpoint(checkpoint_path(root, 3)):
        found.append("best.json points at nothing")
    try:  # the next start: cleans up, saves again
        checkpoint.clean_checkpoints(root)
        save(root, step)
    except BaseException as error:
        return [*found, f"the next save fails: {error!r}"]
    wanted = sorted({step, *(s for s in steps_before if s == 3)})
    if checkpoint_steps(root) != wanted or any(path.name.endswith(".tmp") for path in root.iterdir()):
        found.append(f"after the next save: {sorted(path.name for path in root.iterdir())}")
    return found


def judge_content(path: Path, allowed: set[int]) -> list[str]:
    tensors, meta = load_checkpoint(path)
    step = meta["step"]
    same = all(
        torch.equal(tensors[stem][name], value)
        for stem, group in content(step).items()
        for name, value in group.items()
    )
    found = [] if same and meta["cursor"] == step * 8 else [f"{path.name} is mixed"]
    return found if step in allowed else [*found, f"{path.name} instead of {sorted(allowed)}"]


def check_order(folder: Path) -> list[str]:
    """Power loss: what was not fsynced may vanish, so the order of operations itself is judged."""
    root = folder / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    save(root, 5)
    operations = Operations(root, None)
    operations.install()
    try:
        save(root, 6)
    finally:
        operations.uninstall()
    record = operations.record
    places = [i for i, (name, path) in enumerate(record) if name == "rename" and path.endswith("step_0000006.tmp")]
    if len(places) != 1:
        return ["the new checkpoint does not appear by one rename"]
    before, after = record[: places[0]], record[places[0] + 1 :]
    written = list(dict.fromkeys(path for name, path in before if name == "write"))
    found = [] if written and written[-1].endswith("manifest.json") else ["the manifest is not written last"]
    for path in written:
        last_write = max(i for i, operation in enumerate(before) if operation == ("write", path))
        if ("fsync", path) not in before[last_write:]:
            found.append(f"{os.path.basename(path)} is not fsynced before the rename")
    if ("fsync", str(root / "step_0000006.tmp")) not in before:
        found.append("the directory is not fsynced before the rename")
    removed = [i for i, (name, path) in enumerate(after) if name == "rename" and path.endswith("step_0000005")]
    synced = [i for i, operation in enumerate(after) if operation == ("fsync", str(root))]
    if not synced or (removed and min(synced) > min(removed)):
        found.append("the parent is not fsynced before the old checkpoint goes")
    if any(path.endswith("step_0000005") and name in ("rename", "unlink", "rmdir") for name, path in before):
        found.append("the old checkpoint goes before the new one stands")
    return found


def broken_no_rename(path: Path, snapshot: Any, meta: bytes) -> None:
    path.mkdir(parents=True)
    _write_all(path, snapshot, meta)


def broken_manifest_first(path: Path, snapshot: Any, meta: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    checkpoint._remove(temporary)
    os.mkdir(temporary)
    elsewhere = path.parent.parent / "elsewhere" / path.name
    shutil.rmtree(elsewhere, ignore_errors=True)
    elsewhere.mkdir(parents=True)
    _write_all(elsewhere, snapshot, meta)
    for name in ("manifest.json", *sorted({p.name for p in elsewhere.iterdir()} - {"manifest.json"})):
        checkpoint._write_file(temporary / name, [(elsewhere / name).read_bytes()])
    shutil.rmtree(elsewhere)
    checkpoint._fsync_directory(temporary)
    os.rename(temporary, path)
    checkpoint._fsync_directory(path.parent)


def broken_delete_first(path: Path, snapshot: Any, meta: bytes) -> None:
    for old in checkpoint_steps(path.parent):
        shutil.rmtree(checkpoint_path(path.parent, old))
    SOUND_WRITE(path, snapshot, meta)


def broken_no_cleaning(path: Path, snapshot: Any, meta: bytes) -> None:
    """submitit's way: a temporary left by a kill makes every later save fail."""
    assert not path.with_name(f"{path.name}.tmp").exists(), "a temporary already exists"
    SOUND_WRITE(path, snapshot, meta)


def _write_all(folder: Path, snapshot: Any, meta: bytes) -> None:
    files = {
        f"{stem}.safetensors": checkpoint._write_file(
            folder / f"{stem}.safetensors", checkpoint._safetensors_chunks(group)
        )
        for stem, group in snapshot.items()
    }
    files["meta.json"] = checkpoint._write_file(folder / "meta.json", [meta])
    manifest = {"format": 1, "step": int(folder.name.removeprefix("step_")), "files": files}
    checkpoint._write_file(folder / "manifest.json", [checkpoint._json_bytes(manifest)])


KILLED_BY = {"no_rename": "visible but damaged", "delete_first": "lost", "no_cleaning": "already exists"}
SOUND_WRITE = checkpoint._write_checkpoint
BROKEN_WRITERS = {
    "no_rename": broken_no_rename,
    "manifest_first": broken_manifest_first,
    "delete_first": broken_delete_first,
    "no_cleaning": broken_no_cleaning,
}


def break_it(case: str) -> None:
    if case in BROKEN_WRITERS:
        checkpoint._write_checkpoint = BROKEN_WRITERS[case]
        if case == "no_cleaning":
            checkpoint.clean_checkpoints = lambda root: None
    elif case == "no_fsync":
        REAL["fsync"] = lambda descriptor: None
        checkpoint._write_file = _write_file_without_fsync
    elif case == "no_directory_fsync":
        checkpoint._fsync_directory = lambda path: None
    else:
        assert case == "sound", case


def _write_file_without_fsync(path: Path, chunks: Any) -> dict[str, Any]:
    import hashlib

    content_bytes = b"".join(bytes(chunk) for chunk in chunks)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    os.write(descriptor, content_bytes)
    os.close(descriptor)
    return {"bytes": len(content_bytes), "sha256": hashlib.sha256(content_bytes).hexdigest()}


def crash_save(case: str, folder: Path) -> dict[str, Any]:
    break_it(case)
    failures = check_order(folder)
    points = 0
    for before, step in (([], 5), ([3, 5], 6)) if case == "sound" else (([5], 6),) if case in KILLED_BY else ():
        count, found = enumerate_save(folder, before, step, KILLED_BY.get(case, "nothing ends it"))
        points, failures = points + count, failures + found
    return {"points": points, "failures": failures}


def isolated(case: str, folder: Path) -> dict[str, Any]:
    """The result of a case, computed in a fork so that what is broken there stays there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        result = crash_run(int(case[3:]), folder) if case.startswith("run") else crash_save(case, folder)
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


def crash_run(every: int, folder: Path) -> dict[str, Any]:
    """Kills a whole toy run at every `every`-th operation, then runs the same command: the digest must be the same."""
    import torch._dynamo  # noqa: F401  optimizers import it when first used: once here, not in every child
    from torch.utils.tensorboard import SummaryWriter
    from toy_run import digest, run

    folder.mkdir(parents=True)
    SummaryWriter(str(folder / "warm")).close()

    def work() -> None:
        os.dup2(REAL["open"](os.devnull, os.O_WRONLY), 1)
        judged = {"periodic": lambda step: {"knn": float(step)}, "periodic_every": 3, "best": "knn"}
        run(folder / "run", steps=9, checkpoint_every=3, keep=1, **judged)

    assert not in_child(folder, None, work)
    wanted, failures, point, points = digest(folder / "run"), [], 0, 0
    while True:
        shutil.rmtree(folder / "run", ignore_errors=True)
        killed = in_child(folder, point, work)
        if not killed:
            return {"points": points, "failures": failures}
        assert not in_child(folder, None, work)
        if digest(folder / "run") != wanted:
            failures.append(f"point {point}: another result")
        point, points = point + every, points + 1


if __name__ == "__main__":
    logging.disable()
    print(json.dumps({case: isolated(case, Path(sys.argv[1]) / case) for case in sys.argv[2:]}))
