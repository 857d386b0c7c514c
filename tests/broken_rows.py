"""Rows of benchmarks/chaos.py over something that is broken on purpose: each must turn red.

Not a test: test_chaos.py runs it as `python broken_rows.py FOLDER NAME...`, in a process of its own because rows fork
and what is broken stays so. It prints one line of JSON, {NAME: what the row said, "" if it passed}.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}  # before torch
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "benchmarks"), str(HERE), str(HERE / "data")]

import chaos  # noqa: E402
import chaos_rows  # noqa: E402
import torch  # noqa: E402

from sslvit import checkpoint, distributed, run_folder, training  # noqa: E402
from sslvit.data import jsonl, tar  # noqa: E402
from sslvit.data.bad_files import BadImage  # noqa: E402
from sslvit.data.loader import Loader  # noqa: E402
from sslvit.metrics import MetricsLog  # noqa: E402


def optimizer_is_not_restored() -> None:
    training.load_optimizer_tensors = lambda optimizer, tensors: None


def saver_is_torn() -> None:
    """The row looks at a saver that writes in place."""
    chaos_rows.crash_points = functools.partial(lambda real, name, folder: real("no_rename", folder), CRASH_POINTS)


def breaker_breaks_nothing() -> None:
    """What claims to be broken is not: the row must not believe the claim."""
    chaos_rows.lose_centre = lambda: None


def nothing_is_cleaned() -> None:
    checkpoint.clean_checkpoints = lambda root: None


def nothing_is_verified() -> None:
    checkpoint.verify_checkpoint = chaos_rows.verify_checkpoint = lambda path: None


def a_batch_is_left_out() -> None:
    seek = Loader.seek
    Loader.seek = lambda self, cursor: seek(self, cursor + 8 if cursor else 0)


def order_depends_on_processes() -> None:
    ids_at = Loader.ids_at
    Loader.ids_at = lambda self, cursor: ids_at(self, cursor + 8 * (self._world - 1))


def crops_depend_on_workers() -> None:
    fill = Loader._fill

    def filling(self: Loader, batch: Any, *rest: Any) -> None:
        fill(self, batch, *rest)
        batch.views.global_crops += self._num_workers

    Loader._fill = filling


def nobody_is_named() -> None:
    distributed._lost = lambda: "something went wrong"


def the_dead_are_waited_for() -> None:
    join = distributed._join

    def patient(backend: str) -> None:
        os.environ["SSLVIT_COLLECTIVE_SECONDS"] = "600"
        join(backend)

    distributed._join = patient


def all_is_finite() -> None:
    training._not_finite = lambda norm, logs: torch.zeros(())


def decoder_crashes() -> None:
    import test_odd_images

    test_odd_images.decode = lambda data, channels: [][0]


def decoder_hangs() -> None:
    import test_odd_images

    def slow(data: bytes, channels: int) -> None:
        time.sleep(0.2)
        raise BadImage("slow")

    test_odd_images.decode, test_odd_images.SECONDS = slow, 0.1


def decoder_leaks() -> None:
    import test_odd_images

    kept, decode = [], test_odd_images.decode
    chaos_rows.peak_at_first()

    def leaking(data: bytes, channels: int) -> Any:
        kept.append(b"x" * (101 << 20))
        return decode(data, channels=channels)

    test_odd_images.decode = leaking


def pickles_are_believed() -> None:
    load = torch.load
    torch.load = lambda *rest, weights_only, **options: load(*rest, weights_only=False, **options)


def yaml_is_believed() -> None:
    chaos_rows.load_config = lambda schema, file: None


def members_are_believed() -> None:
    tar._refusal = lambda *facts: ""


def paths_are_believed() -> None:
    jsonl._is_inside = lambda path, root: True


def links_are_believed() -> None:
    """Lines are checked, what they lead to is not."""
    os.path.realpath = os.path.abspath


def lock_is_never_busy() -> None:
    run_folder._flock = lambda descriptor: True


def descriptors_leak() -> None:
    shorter_soak()
    tick = MetricsLog.tick

    def leaking(self: MetricsLog, *rest: Any) -> None:
        os.open(os.devnull, os.O_RDONLY)
        tick(self, *rest)

    MetricsLog.tick = leaking


def soak_loses_the_cursor() -> None:
    shorter_soak()
    chaos_rows.lose_cursor()


def shorter_soak() -> None:
    chaos_rows.SOAK_SECONDS, chaos_rows.FAULT_SECONDS = 20, 8.0
    chaos_rows.SOAK_SIGNALS = (signal.SIGTERM,)


CRASH_POINTS = chaos_rows.crash_points
FIRST_TAR = len(chaos_rows.HOSTILE_YAML) + len(chaos_rows.HOSTILE_PICKLES)
FIRST_PATH = FIRST_TAR + len(chaos_rows.HOSTILE_NAMES)
BROKEN: dict[str, tuple[str, tuple[int, ...], Callable[[], None]]] = {
    "kill": ("kill", (1, 3, 5, 7), optimizer_is_not_restored),
    "every_call": ("every_call", (0,), saver_is_torn),
    "broken_savers": ("broken_savers", (6,), breaker_breaks_nothing),
    "disk": ("disk", (2,), nothing_is_cleaned),
    "damage": ("damage", (0,), nothing_is_verified),
    "resumes": ("resumes", (0,), a_batch_is_left_out),
    "worlds": ("worlds", (0,), order_depends_on_processes),
    "worlds, workers": ("worlds", (3,), crops_depend_on_workers),
    "lost_rank": ("lost_rank", (0,), nobody_is_named),
    "lost_rank, stopped": ("lost_rank", (1,), the_dead_are_waited_for),
    "not_finite": ("not_finite", (1,), all_is_finite),
    "odd_images, crash": ("odd_images", (0,), decoder_crashes),
    "odd_images, hang": ("odd_images", (0,), decoder_hangs),
    "odd_images, growth": ("odd_images", (0, 1, 2, 3), decoder_leaks),
    "hostile, yaml": ("hostile", (0,), yaml_is_believed),
    "hostile, pickle": ("hostile", (len(chaos_rows.HOSTILE_YAML),), pickles_are_believed),
    "hostile, tar": ("hostile", (FIRST_TAR,), members_are_believed),
    "hostile, tar link": ("hostile", (FIRST_TAR + 2,), members_are_believed),
    "hostile, path": ("hostile", (FIRST_PATH,), paths_are_believed),
    "hostile, link": ("hostile", (FIRST_PATH + 2,), links_are_believed),
    "races": ("races", (0,), lock_is_never_busy),
    "soak, growth": ("soak", (0,), descriptors_leak),
    "soak, bytes": ("soak", (0,), soak_loses_the_cursor),
}  # name -> row, cases of which one must fail, what is broken


def main(folder: Path, names: list[str]) -> dict[str, str]:
    """Each in a fork, so that what is broken there stays there."""
    chaos_rows.PLANNED["resumes"] = 3
    if {"kill", "disk", "broken_savers"} & set(names):
        chaos_rows.reference("pretrain")  # once, of what is whole
    found = {}
    for name in names:
        row, cases, break_it = BROKEN[name]
        note = folder / "problem"
        note.unlink(missing_ok=True)
        work = functools.partial(one, row, cases, break_it, note)
        code = chaos_rows.wait(chaos_rows.fork(work, folder / "log"), 400)
        assert code == 0, (folder / "log").read_text()[-3000:]
        found[name] = note.read_text()
    return found


def one(name: str, cases: tuple[int, ...], break_it: Callable[[], None], note: Path) -> int:
    break_it()
    row = next(row for row in chaos_rows.ROWS if row.name == name)
    problems = (chaos._run_case(row, case)["problem"] for case in cases)
    note.write_text(next(filter(None, problems), ""))
    return 0


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:] or list(BROKEN))))
