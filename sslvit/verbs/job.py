"""What runs inside a job: one verb on every task, its signals, its requeueing, and a note of how it ended.

`submit.py` queues it. Only this class's name and its words are pickled (submitit's own job folder, 0700); all state
is the verb's, in its run folder. submitit's own USR2 handler would requeue at any moment and on rank 0 only; here it is
called last, after the verb has stopped on all ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import sslvit
from sslvit.commands import explain, parse
from sslvit.errors import EXIT_BUG, EXIT_DONE, EXIT_INPUT, EXIT_RESUMABLE
from sslvit.run_folder import process_start, write_atomically

#: Sent before a time limit. After TERM (preemption, cancelling) it is Slurm's to requeue the job, or nobody's.
REQUEUE_SIGNAL = getattr(signal, "SIGUSR2", signal.SIGTERM)
WATCHED = (signal.SIGTERM, REQUEUE_SIGNAL)


#: Exit code, one line, and the error if it is a bug.
Ending = tuple[int, str, BaseException | None]


class Interrupted(BaseException):
    """A signal came where no training loop watches. Ending there is as safe as a kill, and a kill is always safe."""


@dataclass(frozen=True)
class Job:
    """Picklable `sslvit VERB ...` commands (a sweep on one machine has several): calling it runs them on this task."""

    commands: tuple[tuple[str, ...], ...]
    folder: str  # OUT/jobs
    restarts: int = 0

    def __call__(self) -> str:
        """Run the verbs. Returns their words when they are done; every other ending is an exit code."""
        place = Place.of_this_task(self.restarts)
        os.environ.update(place.variables())
        note = Note(Path(self.folder), place)
        note.write("running")
        requeue, signals = signal.getsignal(REQUEUE_SIGNAL), Signals()
        try:
            with signals:
                code, message, bug = self._run_all(place)
        except Interrupted as stop:  # just before or just after the verb
            code, message, bug = EXIT_RESUMABLE, f"stopped by {stop}", None
        if bug is not None:
            note.write("failed", EXIT_BUG, message)
            _end_local_siblings(place)
            raise bug
        if code == EXIT_RESUMABLE and REQUEUE_SIGNAL in signals.received and callable(requeue):
            _requeue(place, requeue, note)
        elif code != EXIT_DONE:
            note.write("stopped" if code == EXIT_RESUMABLE else "wrong input", code, message, signals.names)
            if code == EXIT_INPUT:
                _end_local_siblings(place)
            _leave(place, code)
        note.write("done", EXIT_DONE)
        return "; ".join(" ".join(words) for words in self.commands)

    def checkpoint(self) -> Any:
        """What submitit queues next: the same commands."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(self.commands, self.folder, self.restarts + 1))

    def _run_all(self, place: Place) -> Ending:
        """One after the other. Wrong input in one lets the next ones run; anything else ends the job."""
        worst: Ending = (EXIT_DONE, "", None)
        for words in self.commands:
            ending = _run(list(words), place)
            if ending[0] in (EXIT_RESUMABLE, EXIT_BUG):
                return ending
            worst = ending if ending[0] != EXIT_DONE else worst
        return worst


def _run(words: list[str], place: Place) -> Ending:
    """Carry one command out; starting over is done once, not after every interruption."""
    if place.restarts and any(word.startswith("overwrite=") for word in words):
        words.append("overwrite=false")
    sys.argv = ["sslvit", *words]  # what command.txt will say
    try:
        command = parse(words)
        answer = getattr(sslvit, command.verb)(*command.positional, **command.arguments)
    except Interrupted as stop:
        return EXIT_RESUMABLE, f"stopped by {stop}; it goes on where it was", None
    except (Exception, KeyboardInterrupt) as error:
        ending = explain(error)
        if ending is None:
            return EXIT_BUG, f"{type(error).__name__}: {error}", error
        print(f"sslvit {words[0]}: {ending[1]}", file=sys.stderr, flush=True)
        return *ending, None
    if isinstance(answer, str):
        print(answer)
    return EXIT_DONE, "", None


@dataclass(frozen=True)
class Place:
    """Which task of which job this process is."""

    cluster: str
    job_id: str
    rank: int
    world_size: int
    local_rank: int
    num_nodes: int
    first_host: str
    restarts: int

    @classmethod
    def of_this_task(cls, restarts: int) -> Place:
        """Read from submitit's environment; Slurm counts restarts itself."""
        import submitit

        job = submitit.JobEnvironment()
        return cls(
            cluster=job.cluster,
            job_id=job.job_id,
            rank=job.global_rank,
            world_size=job.num_tasks,
            local_rank=job.local_rank,
            num_nodes=job.num_nodes,
            first_host="127.0.0.1" if job.num_nodes == 1 else job.hostnames[0],
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", restarts)) if job.cluster == "slurm" else restarts,
        )

    def variables(self) -> dict[str, str]:
        """What torchrun would set. The port differs between jobs and between restarts of one job."""
        tasks_here = max(1, self.world_size // self.num_nodes)
        cpus = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or max(1, (os.cpu_count() or 1) // tasks_here)
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(tasks_here),
            "MASTER_ADDR": self.first_host,
            "MASTER_PORT": str(12000 + zlib.crc32(f"{self.job_id}/{self.restarts}".encode()) % 20000),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cpus)),
        }


class Signals:
    """While entered, TERM and USR2 end the verb unless it watches them itself; `received` knows of both cases.

    Python notes every signal in a pipe as well, whoever's handler is installed at that moment.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()

    @property
    def names(self) -> list[str]:
        """`["SIGTERM"]`"""
        return sorted(signal.Signals(number).name for number in self.received)

    def __enter__(self) -> Signals:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        os.set_blocking(self._write_end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (*WATCHED, signal.SIGALRM):
            signal.signal(number, self._interrupt)
        return self

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Raise; and again every two seconds, for an exception may be lost in a destructor or a bare `except`."""
        self.received |= {number} & set(WATCHED)
        signal.setitimer(signal.ITIMER_REAL, 2.0, 2.0)
        raise Interrupted(signal.Signals(number).name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in (*WATCHED, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)  # what is left to do is short and must not be cut
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(self._previous_fd)
        with contextlib.suppress(BlockingIOError):
            self.received |= set(os.read(self._read_end, 4096)) & set(WATCHED)
        os.close(self._read_end)
        os.close(self._write_end)


@dataclass(frozen=True)
class Note:
    """`OUT/jobs/ID_state.json`, written by rank 0: how the job is doing."""

    folder: Path
    place: Place

    def write(self, state: str, code: int | None = None, message: str = "", signals: Sequence[str] = ()) -> None:
        """Replace the note. A note that cannot be written costs the job nothing."""
        if self.place.rank != 0:
            return
        facts = {
            "state": state,
            "code": code,
            "message": message,
            "signals": list(signals),
            "restarts": self.place.restarts,
            "pid": os.getpid(),
            "pid_start": process_start(os.getpid()),
            "at": time.time(),
        }
        with contextlib.suppress(Exception):
            write_atomically(self.folder / f"{self.place.job_id}_state.json", json.dumps(facts) + "\n")


def _requeue(place: Place, submitit_handler: Callable[..., Any], note: Note) -> None:
    """Rank 0 has submitit queue the job again, which ends all tasks; the others wait for that end."""
    if place.rank != 0:
        _leave(place, EXIT_RESUMABLE)
    import submitit

    pickle = submitit.JobEnvironment().paths.submitted_pickle
    pickle.with_suffix(pickle.suffix + ".save_tmp").unlink(missing_ok=True)  # left by a kill, it would refuse for ever
    note.write("requeued", EXIT_RESUMABLE)
    try:
        submitit_handler(REQUEUE_SIGNAL, None)
    except Exception as error:  # too many time limits, or Slurm says no
        note.write("stopped", EXIT_RESUMABLE, f"not requeued: {error}")
        raise


def _leave(place: Place, code: int) -> None:
    """End this task. On Slurm the first that ends takes the others along: rank 0, which may be saving, goes first."""
    if place.cluster == "slurm" and place.rank != 0:
        time.sleep(120)
    sys.stdout.flush()
    sys.exit(code)


def _end_local_siblings(place: Place) -> None:
    """Without Slurm nobody ends the other tasks of a job in which one failed; they may wait for it in a collective."""
    if place.cluster != "local" or place.world_size == 1:
        return
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            pid = int(entry.parent.name)
            if parent == os.getppid() and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
