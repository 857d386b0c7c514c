"""The rows of chaos.py: what one case does, and what must hold afterwards. A case's number is its seed."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import slurm_lab
import torch
from chaos import Row
from chaos_runs import (
    HERE,
    align_words,
    check_finite,
    command,
    digest,
    fork,
    modules_of,
    pretrain_words,
    samples,
    wait,
    whole,
)

from sslvit import checkpoint
from sslvit.checkpoint import checkpoint_path, checkpoint_steps, latest_checkpoint, verify_checkpoint
from sslvit.config import PretrainConfig, load_config
from sslvit.errors import EXIT_DONE, EXIT_INPUT, EXIT_RESUMABLE, InputError
from sslvit.run_folder import RunFolder

TESTS = HERE.parent / "tests"
PLANNED: dict[str, int] = {}  # cases asked for, by row


# ---- kills ----------------------------------------------------------------------------------------------------------


@functools.cache
def reference(verb: str) -> tuple[str, float, int]:
    """(digest, seconds, operations under the checkpoints) of an uninterrupted run."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-reference-"))
    try:
        modules_of(words(verb, folder / "first"), folder)
        out, began = folder / "run", time.monotonic()
        code = whole(words(verb, out), folder / "log", functools.partial(count_operations, out, folder / "count"))
        assert code == EXIT_DONE, (folder / "log").read_text()[-2000:]
        return digest(out), time.monotonic() - began, int((folder / "count").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


#: A run that judges itself by k-NN and marks its best step.
WATCHED = ("knn.every=3", "knn.num_images=24", "val_data=scenes:?n=8&size=32&split=val", "knn.max_drop=1.0")


def words(verb: str, out: Path) -> list[str]:
    return align_words(out) if verb == "align" else pretrain_words(out, 12, 3, *(WATCHED if verb == "watched" else ()))


class InSaves:
    """Counts the operations of the os module under `checkpoints`; kills at one of them, from inside the save."""

    def __init__(self, kill_at: int | None, note: Path | None = None) -> None:
        self.kill_at, self.note, self.count = kill_at, note, 0

    def install(self) -> None:
        from crash_points import REAL

        for name in ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"):
            setattr(os, name, functools.partial(self._call, REAL[name], set()))

    def _call(self, real: Callable, _unused: set, first: object, *rest: object, **options: object) -> object:
        if isinstance(first, int):
            with contextlib.suppress(OSError):
                first_path = os.readlink(f"/proc/self/fd/{first}")
                return self._counted(first_path, real, first, *rest, **options)
        return self._counted(str(first), real, first, *rest, **options)

    def _counted(self, path: str, real: Callable, *arguments: object, **options: object) -> object:
        if "/checkpoints/" in path and ".tmp" in path:
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            if self.note is not None:
                self.note.write_text(str(self.count))
        return real(*arguments, **options)


def count_operations(out: Path, note: Path) -> None:
    InSaves(None, note).install()


def kill(case: int, folder: Path) -> None:
    """Odd cases die inside a save, even ones at a random instant; every fifth is align, one in five watches k-NN."""
    verb = {4: "align", 1: "watched"}.get(case % 5, "pretrain")
    rng, out = random.Random(case), folder / "run"
    wanted, seconds, operations = reference(verb)
    if case % 2:
        pid = fork(command(words(verb, out), InSaves(rng.randrange(operations)).install), folder / "log")
        code = wait(pid)
    else:
        pid = fork(command(words(verb, out)), folder / "log")
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
    assert code in (-signal.SIGKILL, EXIT_DONE), code
    assert case % 2 == 0 or code != EXIT_DONE, "the kill missed"
    code = whole(words(verb, out), folder / "log")
    assert code == EXIT_DONE, (folder / "log").read_text()[-2000:]
    assert digest(out) == wanted, "other bytes than uninterrupted"


def crash_points(name: str, folder: Path) -> dict:
    done = subprocess.run(
        [sys.executable, str(TESTS / "crash_points.py"), str(folder), name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)[name]


def every_call(case: int, folder: Path) -> str:
    """All points of two saves (case 0), and of a whole run, each second operation (case 1)."""
    result = crash_points(("sound", "run2")[case], folder)
    assert result["points"] >= (60, 100)[case], result
    assert not result["failures"], result["failures"][:3]
    return f"{result['points']} kills"


BROKEN = {
    "no_rename": "is visible but damaged",
    "manifest_first": "the manifest is not written last",
    "delete_first": "lost",
    "no_cleaning": "a temporary already exists",
    "no_fsync": "model.safetensors is not fsynced before the rename",
    "no_directory_fsync": "the parent is not fsynced before the old checkpoint goes",
    "no_centre": "",
    "no_cursor": "",
}


def broken_saver(case: int, folder: Path) -> str:
    """A saver that is broken on purpose must be caught by the checks of the other rows."""
    name = list(BROKEN)[case]
    if complaint := BROKEN[name]:
        failures = crash_points(name, folder)["failures"]
        assert any(complaint in failure for failure in failures), f"{name} went unnoticed"
        return name
    out = folder / "run"
    stop_at(pretrain_words(out), folder / "log", step=5)
    code = whole(pretrain_words(out), folder / "log", {"no_centre": lose_centre, "no_cursor": lose_cursor}[name])
    assert code == EXIT_DONE
    try:
        same = digest(out) == reference("pretrain")[0]
    except AssertionError:  # other samples at one cursor
        same = False
    assert not same, f"{name} went unnoticed"
    return name


def lose_centre() -> None:
    load = torch.nn.Module.load_state_dict

    def partial(self: torch.nn.Module, state: dict, *rest: object, **options: object) -> object:
        return load(self, {name: value for name, value in state.items() if "center" not in name}, strict=False)

    torch.nn.Module.load_state_dict = partial


def lose_cursor() -> None:
    from sslvit.data.loader import Loader

    Loader.seek = lambda self, cursor: None


def stop_at(words: list[str], log: Path, step: int, number: int = signal.SIGTERM) -> int:
    """Runs until `step` steps of this start are done, then a signal; its exit code."""
    return whole(words, log, functools.partial(signal_after, step, number))


def signal_after(count: int, number: int) -> None:
    from sslvit.metrics import MetricsLog

    tick, seen = MetricsLog.tick, []

    def ticking(self: MetricsLog, step: int, *rest: object, **options: object) -> None:
        tick(self, step, *rest, **options)
        seen.append(step)
        if len(seen) == count:
            os.kill(os.getpid(), number)

    MetricsLog.tick = ticking


# ---- disks and damage -----------------------------------------------------------------------------------------------


class Disk:
    """A disk that fails under `checkpoints/NAME` (a prefix) after `left` bytes, or at once."""

    def __init__(self, number: int, left: int, name: str = "step_0000006") -> None:
        self.number, self.left, self.place = number, left, f"/checkpoints/{name}"

    def install(self) -> None:
        write, mkdir = os.write, os.mkdir

        def writing(descriptor: int, data: memoryview) -> int:
            if self.place not in os.readlink(f"/proc/self/fd/{descriptor}"):
                return write(descriptor, data)
            if self.left <= 0:
                raise OSError(self.number, os.strerror(self.number))
            done = write(descriptor, data[: self.left])
            self.left -= done
            return done

        def making(path: object, *rest: object, **options: object) -> None:
            if self.number == errno.EROFS and self.place in str(path):
                raise OSError(self.number, os.strerror(self.number))
            mkdir(path, *rest, **options)

        os.write, os.mkdir = writing, making


DISKS = [(errno.ENOSPC, left) for left in (0, 100, 5_000, 50_000, 300_000)] + [(errno.EIO, 0), (errno.EROFS, 0)]


def disk(case: int, folder: Path) -> None:
    number, left = DISKS[case]
    out = folder / "run"
    code = whole(pretrain_words(out), folder / "log", Disk(number, left).install)
    said = [line for line in (folder / "log").read_text().splitlines() if os.strerror(number) in line]
    assert code == EXIT_RESUMABLE, (code, (folder / "log").read_text()[-1500:])
    assert len(said) == 1 and said[0].startswith("sslvit pretrain: could not save"), said
    root = out / "checkpoints"
    assert latest_checkpoint(root) == checkpoint_path(root, 3), checkpoint_steps(root)
    assert not list(root.glob("*.tmp")), "debris"
    assert whole(pretrain_words(out), folder / "log") == EXIT_DONE
    assert digest(out) == reference("pretrain")[0]


def flip(case: int, folder: Path) -> None:
    """0-199: a bit; 200-209: a cut; 210-219: a file that is missing."""
    root, rng = folder / "checkpoints", random.Random(case)
    for step in (1, 2):
        tensors = {"model": {"weight": torch.full((40, 30), float(step))}, "optimizer": {"m": torch.ones(500)}}
        checkpoint.save_checkpoint(root, step, tensors, {"cursor": step}, keep=2, background=False)
    path = checkpoint_path(root, 2)
    files = sorted(path.iterdir())
    file = files[case % len(files)]
    data = bytearray(file.read_bytes())
    if case < 200:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif case < 210:
        file.write_bytes(data[: rng.randrange(len(data))])
    else:
        file.unlink()
    assert verify_checkpoint(path) is not None, "not noticed"
    with captured_log() as said:
        assert latest_checkpoint(root) == checkpoint_path(root, 1), "the one before is not used"
    assert "step_0000002 is damaged" in said.getvalue(), "not said"


@contextlib.contextmanager
def captured_log():
    import logging

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("sslvit")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield stream
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


# ---- going on -------------------------------------------------------------------------------------------------------

MANY = 160  # steps of the run that is resumed fifty times, three steps apart at most


@functools.cache
def resumed(count: int) -> str | None:
    """What went wrong in `count` resumes in a row, 1 to 3 steps apart; None if nothing."""
    folder, rng = Path(tempfile.mkdtemp(prefix="chaos-resumes-")), random.Random(0)
    try:
        straight, out = folder / "straight", folder / "run"
        assert whole(pretrain_words(straight, MANY, 10), folder / "log") == EXIT_DONE
        for number in range(count):
            code = stop_at(pretrain_words(out, MANY, 10), folder / "log", rng.randint(1, 3))
            if code != EXIT_RESUMABLE:
                return f"resume {number} ended with {code}: {(folder / 'log').read_text()[-1000:]}"
        if whole(pretrain_words(out, MANY, 10), folder / "log") != EXIT_DONE:
            return "it did not finish"
        if digest(out, with_samples=False) != digest(straight, with_samples=False):
            return "other bytes than uninterrupted"
        drawn = samples(out)
        ids = [i for cursor in sorted(drawn) if cursor < MANY * 8 for i in drawn[cursor]]
        epochs = [sorted(ids[at : at + 24]) for at in range(0, len(ids) - 23, 24)]
        return None if all(epoch == list(range(24)) for epoch in epochs) else "an epoch without each sample once"
    except AssertionError as error:
        return str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def resumes(case: int, folder: Path) -> None:
    """All are one experiment, made with the first case: a chain that breaks anywhere fails every one."""
    problem = resumed(PLANNED["resumes"])
    assert problem is None, problem


WORLDS = [(1, 2, 1), (2, 1, 2), (2, 2, 1), (0, 2, 3), (3, 0, 2), (2, 3, 0)]  # three of processes, three of workers
SHARDED = 2  # the case whose first leg shares its weights out (FSDP2); the second has them whole again


def worlds(case: int, folder: Path) -> None:
    """Steps 0-4, 4-8 and 8-12 in other hands; the first three cases change processes, the last three workers."""
    out, plan = folder / "run", WORLDS[case]
    alone = folder / "alone"
    assert whole(pretrain_words(alone), folder / "log") == EXIT_DONE
    for index, number in enumerate(plan):
        stop = None if index == 2 else 4
        if case < 3:
            more = ["sharded=true"] * (case == SHARDED and index == 0)
            codes = together([*pretrain_words(out), *more], folder, number, stop)
        else:
            before = None if stop is None else functools.partial(signal_after, stop, signal.SIGTERM)
            codes = [whole(pretrain_words(out, 12, 3, f"num_workers={number}"), folder / "log", before)]
        assert set(codes) == {EXIT_DONE if stop is None else EXIT_RESUMABLE}, (
            codes,
            (folder / "log").read_text()[-900:],
        )
    ours, theirs = samples(out), samples(alone)
    assert all(ours[cursor] == theirs[cursor] for cursor in range(0, 12 * 8, 8)), "other samples"
    if case >= 3:
        assert digest(out, with_samples=False) == digest(alone, with_samples=False), "not bit-exact"
    else:
        first, second = (checkpoint.load_checkpoint(latest_checkpoint(x / "checkpoints"))[0] for x in (out, alone))
        gap = max((first["model"][n].float() - v.float()).abs().max().item() for n, v in second["model"].items())
        assert gap < 1e-4, f"weights differ by {gap:.1e}"


def together(words: list[str], folder: Path, world: int, stop: int | None) -> list[int]:
    """The command on `world` processes that meet on a free port; their exit codes."""
    pids = start_together(words, folder, world, stop)
    return [wait(pid) for pid in pids]


def start_together(words: list[str], folder: Path, world: int, stop: int | None = None, seconds: int = 60) -> list[int]:
    port = free_port()

    def before(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({key: str(value) for key, value in place.items()})
        os.environ["SSLVIT_COLLECTIVE_SECONDS"] = str(seconds)
        if stop is not None and rank == 0:
            signal_after(stop, signal.SIGTERM)

    return [fork(command(words, functools.partial(before, rank)), folder / "log") for rank in range(world)]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def lost_rank(case: int, folder: Path) -> None:
    """Of two processes one is killed (0) or stopped (1): the other ends and names it."""
    out, limit = folder / "run", 8
    first, second = start_together(pretrain_words(out, 5000, 500), folder, 2, seconds=limit)
    try:
        until(lambda: (out / "metrics.jsonl").exists(), 60, "no step")
        os.kill(second, (signal.SIGKILL, signal.SIGSTOP)[case])
        began = time.monotonic()
        code = wait(first, 60)
        took = time.monotonic() - began
    finally:
        for number in (signal.SIGCONT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(second, number)
        os.waitpid(second, 0)
    said = (folder / "log").read_text()
    assert code == EXIT_RESUMABLE, (code, said[-2000:])
    assert "process 1 of 2" in said, f"process 1 is not named: {said[-900:]}"
    assert took <= (10 if case == 0 else limit + 10), f"after {took:.0f} s"


def until(condition: Callable[[], bool], seconds: float, problem: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, problem
        time.sleep(0.01)


def slurm(case: int, folder: Path) -> str:
    from slurm_faults import FAULTS, reference

    disk = Path(tempfile.mkdtemp(prefix="chaos-slurm-"))
    try:
        with slurm_lab.Lab() as lab:
            wanted = slurm_reference(lab, reference)
            list(FAULTS.values())[case](lab, disk, wanted)
            return list(FAULTS)[case]
    finally:
        shutil.rmtree(disk, ignore_errors=True)


_wanted: list[str] = []


def slurm_reference(lab: slurm_lab.Lab, make: Callable[[slurm_lab.Lab, Path], str]) -> str:
    """The digest of an uninterrupted job, made once."""
    if not _wanted:
        folder = Path(tempfile.mkdtemp(prefix="chaos-slurm-"))
        _wanted.append(make(lab, folder))
        shutil.rmtree(folder, ignore_errors=True)
    return _wanted[0]


# ---- numbers --------------------------------------------------------------------------------------------------------


def not_finite(case: int, folder: Path) -> None:
    """NaN in the loss, in a gradient, in the input, and a loss of 100 times, at step 4 of a joint run."""
    code = whole(pretrain_words(folder / "run", 12, 1), folder / "log", functools.partial(spoil, case))
    assert code == EXIT_DONE, (folder / "log").read_text()[-2000:]
    check_finite(folder / "run")
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped"] == (0 if case == 3 else 1), rows[-1]


def spoil(case: int) -> None:
    from sslvit.objectives.pretraining import Pretraining

    forward, colour, before = Pretraining.forward, Pretraining._colour, Pretraining.before_update
    now = {"step": -1}

    def wrong_forward(self: Pretraining, views: object, step: int) -> tuple:
        now["step"] = step
        loss, logs = forward(self, views, step)
        return (loss * (float("nan") if case == 0 else 100.0), logs) if step == 4 and case in (0, 3) else (loss, logs)

    def wrong_colour(self: Pretraining, views: object) -> dict:
        crops = colour(self, views)
        if case == 2 and now["step"] == 4:
            crops["global"].view(-1)[0] = float("nan")
        return crops

    def wrong_gradient(self: Pretraining, step: int) -> None:
        before(self, step)
        if case == 1 and step == 4:
            self.student.blocks[0].mlp.fc1.weight.grad[0, 0] = float("inf")

    Pretraining.forward, Pretraining._colour, Pretraining.before_update = wrong_forward, wrong_colour, wrong_gradient


# ---- input ----------------------------------------------------------------------------------------------------------


@functools.cache
def images() -> list[bytes]:
    """The odd images of SSLVIT_DATA, then a thousand mutants."""
    import zipfile

    from test_odd_images import mutants

    with zipfile.ZipFile(Path(os.environ["SSLVIT_DATA"]) / "odd_images.zip") as archive:
        rows = [json.loads(line) for line in archive.read("MANIFEST.jsonl").splitlines()]
        odd = [archive.read(row["file"]) for row in rows]
    return [*odd, *mutants(1000, seed=0)][:1500]


def no_odd_images() -> str | None:
    if not os.environ.get("SSLVIT_DATA"):
        return "SSLVIT_DATA is unset"
    if not (Path(os.environ["SSLVIT_DATA"]) / "odd_images.zip").exists():
        return "SSLVIT_DATA holds no odd_images.zip"
    return None if find("pytest") else "pytest is not installed"


def find(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def odd_image(case: int, folder: Path) -> None:
    """Decoded, or bad with a reason in one line; in five seconds, and all together without growth."""
    import warnings

    from test_odd_images import GROWTH, outcome

    data, before = images()[case], peak_at_first()
    with warnings.catch_warnings(action="ignore"), silence():
        outcome(data)
    assert peak() - before < GROWTH, f"memory grew by {peak() - before >> 20} MiB"


@contextlib.contextmanager
def silence():
    """Without what libtiff prints about every broken tag."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


peak_at_first = functools.cache(peak)


HOSTILE_YAML = (
    *("environment", "decode", "interpolation", "python object", "python name", "python module", "own tag"),
    *("alias", "bomb", "loop"),
)
HOSTILE_PICKLES = [(name, writer) for name in ("w.pth", "w.pt", "w.safetensors") for writer in ("torch", "pickle")]
HOSTILE_NAMES = ("../canary.png", "/canary.png", "link.png", "hard.png", "device.png", "folder/../../canary.png")
HOSTILE_PATHS = ("../secret.png", "{}/secret.png", "link.png")
HOSTILE = len(HOSTILE_YAML) + len(HOSTILE_PICKLES) + len(HOSTILE_NAMES) + len(HOSTILE_PATHS)


def hostile(case: int, folder: Path) -> None:
    """A file that would run code, or read or write outside, were it believed: refused, and the canary does not sing."""
    groups = (
        (HOSTILE_YAML, hostile_yaml),
        (HOSTILE_PICKLES, hostile_pickle),
        (HOSTILE_NAMES, hostile_tar),
        (HOSTILE_PATHS, hostile_path),
    )
    os.environ["SECRET"] = "canary"
    for names, check in groups:
        if case < len(names):
            check(names[case], folder)
            break
        case -= len(names)
    assert not (folder / "canary").exists() and not (folder.parent / "canary.png").exists(), "the canary sang"


def hostile_yaml(name: str, folder: Path) -> None:
    from test_config import HOSTILE as FILES

    text = FILES[name].replace("HOME", "SECRET").replace("touch CANARY", f"touch {folder}/canary")
    (folder / "config.yaml").write_text(text)
    began = time.monotonic()
    refused(lambda: load_config(PretrainConfig, folder / "config.yaml"))
    assert time.monotonic() - began < 5, "it took too long"


def refused(call: Callable[[], object]) -> None:
    try:
        call()
    except InputError as error:
        assert "\n" not in str(error) and "canary" not in str(error).replace("canary.png", ""), error
        return
    raise AssertionError("not refused")


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.canary,)


def hostile_pickle(kind: tuple[str, str], folder: Path) -> None:
    import pickle

    name, writer = kind
    if writer == "pickle":
        (folder / name).write_bytes(pickle.dumps({"weight": Payload(folder / "canary")}))
    else:
        torch.save({"weight": Payload(folder / "canary")}, folder / name)
    try:
        checkpoint.read_weights_file(folder / name)
    except InputError as error:
        assert "\n" not in str(error)
        return
    raise AssertionError("not refused")


def hostile_tar(name: str, folder: Path) -> None:
    from sslvit.data.sources import open_source

    kinds = {"link.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "device.png": tarfile.CHRTYPE}
    with tarfile.open(folder / "a.tar", "w") as archive:
        for member in (name, "good.png"):
            info = tarfile.TarInfo(member)
            info.type = kinds.get(member, tarfile.REGTYPE)
            info.linkname = "/etc/passwd" if member in ("link.png", "hard.png") else ""
            info.size = 8 if info.type == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"nothing!"))
    source = open_source(f"tar:{folder}/a.tar")
    assert len(source) == 1 and source.name(0) == "a.tar/good.png" and len(source.skipped) == 1, f"{name} is believed"
    assert sorted(path.name for path in folder.iterdir()) == ["a.tar"], "something was written"


def hostile_path(image: str, folder: Path) -> None:
    from sslvit.data.decode import BadImage
    from sslvit.data.sources import open_source

    (folder / "set").mkdir()
    (folder / "secret.png").write_bytes(b"canary")
    os.symlink(folder / "secret.png", folder / "set/link.png")
    (folder / "set/rows.jsonl").write_text(json.dumps({"image": image.format(folder)}) + "\n")
    try:
        data = open_source(f"jsonl:{folder}/set/rows.jsonl").read(0)
    except (InputError, BadImage):
        return
    raise AssertionError(f"read {data!r}")


# ---- two at once, and for long --------------------------------------------------------------------------------------


def race(case: int, folder: Path) -> None:
    """Two processes open one folder at the same instant; every second time after a holder that was killed."""
    out, gate = folder / "run", folder / "gate"
    if case % 2:
        pid = fork(lambda: hold(out, folder, "first"), folder / "log")
        until(lambda: (folder / "first").exists(), 30, "the first does not hold")
        os.kill(pid, signal.SIGKILL)
        wait(pid)

    def racer(name: str) -> int:
        until(gate.exists, 30, "no start")
        return hold(out, folder, name)

    pids = [fork(functools.partial(racer, name), folder / "log") for name in ("a", "b")]
    gate.touch()
    until(lambda: sum((folder / f"{n}{end}").exists() for n in "ab" for end in ("", ".no")) == 2, 30, "no answer")
    (folder / "end").touch()
    codes = sorted(wait(pid) for pid in pids)
    assert codes == [EXIT_DONE, EXIT_INPUT], (codes, (folder / "log").read_text()[-1000:])


def hold(out: Path, folder: Path, name: str) -> int:
    try:
        with RunFolder.open(out, "pretrain", PretrainConfig(data="x")):
            (folder / name).touch()
            until((folder / "end").exists, 30, "no end")
    except InputError as error:
        assert "in use" in str(error), error
        (folder / f"{name}.no").touch()
        return EXIT_INPUT
    return EXIT_DONE


SOAK_SECONDS = 1800 if "--quick" not in sys.argv else 40
FAULT_SECONDS = 20.0 if "--quick" not in sys.argv else 6.0
STEP_SECONDS = 0.3  # a step of the soak waits for this, so that it is not over before its time on a fast machine
SOAK_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2)  # before training begins all of them end it at once
SLACK = {"MiB": 32, "descriptors": 3, "files": 12}  # files: one more checkpoint, and one that is being written


def soak(case: int, folder: Path) -> str:
    """Half an hour with a fault every 20 s; in the end the bytes of a calm run, and nothing has grown."""
    rng, out, calm = random.Random(case), folder / "run", folder / "calm"
    steps = round(SOAK_SECONDS / STEP_SECONDS)
    plan = (steps, max(10, steps // 400))
    stormy, faults = weather(pretrain_words(out, *plan), out, folder / "log", rng)
    check_growth(stormy)
    still = calmly(pretrain_words(calm, *plan), calm, folder / "log")
    assert digest(out, with_samples=False) == digest(calm, with_samples=False), "other bytes"
    check_growth(still)
    told = ", ".join(f"{count} {name}" for name, count in sorted(faults.items()))
    return f"{steps} steps; {told}; at the end {stormy[-1] if stormy else {}}, of the calm run {still[-1]}"


def weather(words: list[str], out: Path, log: Path, rng: random.Random) -> tuple[list[dict[str, int]], Counter[str]]:
    """Starts the command until it is done, ending each start by a fault: its footprints just before, and the faults.

    On a busy machine little is done between two faults; after the time, and as many faults as fit into it, there are
    no more.
    """
    sizes: list[dict[str, int]] = []
    faults: Counter[str] = Counter()
    began = time.monotonic()
    while time.monotonic() < began + SOAK_SECONDS or faults.total() < SOAK_SECONDS / FAULT_SECONDS:
        disk = rng.choice([None, None, Disk(errno.ENOSPC, rng.randrange(2_000_000), "step_")])
        pid = fork(command(words, functools.partial(slowly, disk)), log)
        end = time.monotonic() + FAULT_SECONDS
        while time.monotonic() < end and not ended(pid):
            time.sleep(0.05)
        if not ended(pid):
            sizes.append(footprint(pid, out))
            number = rng.choice(SOAK_SIGNALS)
            os.kill(pid, number)
            faults[number.name] += 1
        code = wait(pid)
        allowed = (EXIT_DONE, EXIT_RESUMABLE, *(-number for number in SOAK_SIGNALS))
        assert code in allowed, (code, log.read_text()[-2000:])
        if code == EXIT_DONE:
            return sizes, faults
        if rng.random() < 0.25 and spoil_newest(out / "checkpoints", rng):
            faults["flipped bit"] += 1
        faults["full disk"] += "No space left on device" in log.read_text()
        log.unlink()
    assert whole(words, log, seconds=4 * SOAK_SECONDS) == EXIT_DONE, log.read_text()[-2000:]
    return sizes, faults


def slowly(disk: Disk | None) -> None:
    """Before a start of the soak: steps of equal length, and perhaps a disk that is full."""
    from sslvit.metrics import MetricsLog

    if disk is not None:
        disk.install()
    tick, last = MetricsLog.tick, [time.monotonic()]

    def waiting(self: MetricsLog, *rest: object) -> None:
        time.sleep(max(0.0, last[0] + STEP_SECONDS - time.monotonic()))
        last[0] = time.monotonic()
        tick(self, *rest)

    MetricsLog.tick = waiting


def spoil_newest(root: Path, rng: random.Random) -> bool:
    """Flips a bit in the newest checkpoint where there are two; whether it did."""
    steps = checkpoint_steps(root)
    if len(steps) < 2:
        return False
    file = rng.choice(sorted(checkpoint_path(root, steps[-1]).iterdir()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return True


def calmly(words: list[str], out: Path, log: Path) -> list[dict[str, int]]:
    """The command in one piece, at full speed; its footprint every half second."""
    pid = fork(command(words), log)
    sizes, deadline = [], time.monotonic() + 4 * SOAK_SECONDS + 120
    while not ended(pid):
        assert time.monotonic() < deadline, "the calm run does not come to an end"
        with contextlib.suppress(OSError):
            sizes.append(footprint(pid, out))
        time.sleep(0.5)
    assert wait(pid) == EXIT_DONE, log.read_text()[-2000:]
    return sizes


def ended(pid: int) -> bool:
    """Whether a child has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def footprint(pid: int, out: Path) -> dict[str, int]:
    """Resident MiB, open descriptors, and files in OUT."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    files = sum(1 for path in out.rglob("*") if path.is_file() and "events.out" not in path.name)
    mib = pages * os.sysconf("SC_PAGE_SIZE") >> 20
    return {"MiB": mib, "descriptors": len(os.listdir(f"/proc/{pid}/fd")), "files": files}


def check_growth(sizes: list[dict[str, int]]) -> None:
    """The largest of the last third is not above the largest of the third before it."""
    third = len(sizes) // 3
    if third == 0:
        return
    for name, slack in SLACK.items():
        before, last = (max(size[name] for size in part) for part in (sizes[third : 2 * third], sizes[-third:]))
        assert last <= before + slack, f"{name}: {before} in the middle third, {last} in the last"


ROWS = [
    Row("kill", "kill -9, half inside saves, DINO+MAE and align: same bytes and samples", 200, 8, kill),
    Row("every_call", "kill at every system call of a save, and of a run: old or new", 2, 1, every_call),
    Row("broken_savers", "deliberately broken savers are caught", 8, 2, broken_saver),
    Row("disk", "disk full at five sizes, EIO, read-only: exit 75, one line, old one loads", 7, 2, disk),
    Row("damage", "flipped bits, cuts, missing files: detected, previous used, said", 220, 44, flip),
    Row("resumes", "fifty resumes in a row, 1-3 steps apart: bit-exact, each sample once", 50, 6, resumes),
    Row("worlds", "processes 2-1-2, workers 0/2/3: same samples; 1e-4, bit-exact", 6, 2, worlds),
    Row(
        "slurm", "real Slurm, eight interruptions: unattended, nothing lost with grace", 8, 1, slurm, slurm_lab.missing
    ),
    Row("lost_rank", "one process killed or stopped: all gone in time, named", 2, 1, lost_rank),
    Row("not_finite", "NaN in loss, gradient, input; a 100x spike: no bad weight saved", 4, 4, not_finite),
    Row(
        "odd_images",
        "odd images and mutants: no crash, no hang, each bad one named",
        1500,
        300,
        odd_image,
        no_odd_images,
    ),
    Row(
        "hostile",
        "hostile files with a canary",
        HOSTILE,
        HOSTILE,
        hostile,
        lambda: None if find("pytest") else "no pytest",
    ),
    Row("races", "two jobs on one folder: exactly one runs", 50, 8, race),
    Row("soak", "30 minutes with a fault every 20 s: same bytes, nothing grows", 1, 1, soak),
]
