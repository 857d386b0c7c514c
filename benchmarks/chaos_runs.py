"""Tiny real runs of `sslvit pretrain` and `align` in forks of one process, to be killed: no case pays for an import.

Not a benchmark: chaos.py's rows use it. The process that forks has imported torch and started no thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo
import torch.utils.tensorboard
from tiny_vlm import settings as align_settings

import sslvit.verbs.pretrain  # noqa: F401  so that forks import nothing
from sslvit import metrics
from sslvit.cli import main as cli
from sslvit.data.loader import Loader
from sslvit.exports import formats
from sslvit.metrics import TIMING_FIELDS

HERE = Path(__file__).resolve().parent

PRETRAIN = [
    *("data=scenes:?n=24&size=32", "batch_size=8", "device=cpu", "precision=fp32", "num_workers=0"),
    *("encoder.image_size=32", "encoder.patch_size=8", "encoder.name=vit_tiny_patch16_224", "encoder.depth=1"),
    *("encoder.embed_dim=32", "encoder.num_heads=2", "crops.num_local=1", "crops.local_size=16", "knn.every=0"),
    *("dino.num_prototypes=16", "dino.head_hidden_dim=16", "dino.head_bottleneck_dim=8", "mae.decoder_dim=32"),
    *("mae.decoder_depth=1", "mae.decoder_num_heads=2", "checkpoint.keep=2"),
]


def pretrain_words(out: Path, steps: int = 12, every: int = 3, *more: str) -> list[str]:
    """A joint DINO and MAE run of milliseconds a step; 24 images, three steps an epoch."""
    keys = [*PRETRAIN, f"steps={steps}", f"checkpoint.every={every}", *more]
    return ["pretrain", "--output-dir", str(out), *keys]


def align_words(out: Path) -> list[str]:
    """Three stages, without controls."""
    keys = align_settings(controls=[], num_val_images=2, num_workers=0)
    keys["checkpoint"] = {"every": 2, "keep": 2}
    return ["align", "--output-dir", str(out), *_flat(keys)]


def _flat(keys: dict, prefix: str = "") -> list[str]:
    words = []
    for name, value in keys.items():
        if isinstance(value, dict):
            words += _flat(value, f"{prefix}{name}.")
        else:
            words.append(f"{prefix}{name}={json.dumps(value) if isinstance(value, list) else value}")
    return words


# ---- forks ----------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], int], log: Path) -> int:
    """Starts `work` in a fork whose output goes to `log`; its pid. Its result is the exit code, an error 70."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()  # a stop of the terminal or a kill of the group does not reach the parent
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float = 300) -> int:
    """Its exit code, negative for a signal; killed when it takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"still there after {seconds:.0f} s")


def command(words: list[str], before: Callable[[], None] | None = None) -> Callable[[], int]:
    """The command line in a fork, which also notes the samples of each batch; `before` breaks something first."""

    def work() -> int:
        _leave_out_what_is_not_asked(words[0])
        _note_samples(Path(words[words.index("--output-dir") + 1]))
        if before is not None:
            before()
        return cli(words)

    return work


def _leave_out_what_is_not_asked(verb: str) -> None:
    """Exports are not reopened, which starts a Python for each, and the processor's peak is not measured."""
    formats._verify = lambda loaded, folders: {name: [] for name in folders}
    metrics.peak_flops = lambda device, precision: 1e12
    if verb == "align":
        align = importlib.import_module("sslvit.verbs.align")
        align.compare_with_folder = lambda *rest: {"version": "", "max_difference": {}}


def modules_of(words: list[str], folder: Path) -> None:
    """Imports what the command imports, found out by a run of it in a fork, so that no later fork pays for that."""
    found = folder / "modules"

    def work() -> int:
        known = set(sys.modules)
        code = command(words)()
        found.write_text("\n".join(sorted(set(sys.modules) - known)))
        return code

    assert wait(fork(work, folder / "log")) == 0, (folder / "log").read_text()[-2000:]
    for name in found.read_text().split():
        with contextlib.suppress(Exception):  # some are made at run time
            importlib.import_module(name)


def whole(words: list[str], log: Path, before: Callable[[], None] | None = None, seconds: float = 300) -> int:
    """Runs to its end; the exit code."""
    return wait(fork(command(words, before), log), seconds)


def _note_samples(out: Path) -> None:
    """Every batch that is drawn: a line {"cursor", "ids"} in OUT/../NAME.samples.jsonl."""
    file = samples_file(out)
    original = Loader._new_batch

    def noting(self: Loader, cursor: int):
        batch = original(self, cursor)
        with open(file, "a") as stream:
            stream.write(json.dumps({"rank": self._rank, "cursor": cursor, "ids": batch.ids.tolist()}) + "\n")
        return batch

    Loader._new_batch = noting


def samples_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.samples.jsonl")


def samples(out: Path) -> dict[int, list[int]]:
    """Image ids by cursor; a cursor that was drawn twice, after a resume, must have drawn the same."""
    found: dict[tuple[int, int], list[int]] = {}
    for line in samples_file(out).read_text().splitlines():
        with contextlib.suppress(ValueError):  # cut by the kill
            row = json.loads(line)
            key = (row["cursor"], row["rank"])
            assert found.setdefault(key, row["ids"]) == row["ids"], f"other samples at {key}"
    merged: dict[int, list[int]] = {}
    for cursor, rank in sorted(found):
        merged.setdefault(cursor, []).extend(found[cursor, rank])
    return merged


def digest(out: Path, with_samples: bool = True) -> str:
    """SHA-256 of all a run leaves that is not about time: newest checkpoints, best step, exports, metrics, samples."""
    content = hashlib.sha256()
    for root in sorted(out.glob("**/checkpoints")):
        newest = sorted(path for path in root.iterdir() if re.fullmatch(r"step_\d+", path.name))[-1]
        content.update(f"{root.relative_to(out)}/{newest.name}".encode())
        for file in sorted(newest.iterdir()):
            content.update(file.name.encode() + file.read_bytes())
        best = root / "best.json"
        content.update(best.read_bytes() if best.exists() else b"no best step")
    for file in sorted(out.glob("**/model.safetensors")):
        if "checkpoints" not in file.parts:
            content.update(str(file.relative_to(out)).encode() + file.read_bytes())
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = {key: value for key, value in json.loads(line).items() if key not in TIMING_FIELDS}
        content.update(json.dumps(row, sort_keys=True).encode())
    if with_samples and samples_file(out).exists():
        last = 0 if not (found := samples(out)) else max(found)
        content.update(json.dumps([found[cursor] for cursor in sorted(found) if cursor <= last]).encode())
    return content.hexdigest()


def check_finite(out: Path) -> None:
    """No checkpoint holds a weight that is not finite."""
    from safetensors.torch import load_file

    for file in out.glob("**/step_*/*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.isfinite(tensor.float()).all(), f"{file}: {name}"
