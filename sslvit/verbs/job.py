"""What runs inside a job: one verb on every task, its signals, its requeueing, and a note of how it ended.

`submit.py` queues it. Only this class's name and its words are pickled (submitit's own job folder, 0700); all state
is the verb's, in its run folder. submitit's own USR2 handler would requeue at any moment and on rank 0 only; here it is
called last, after the verb has stopped on all ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
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
from sslvit.errors import EXIT_BUG, EXIT_DONE, EXIT_INPUT, EXIT_RESUMABLE, Outage, RankLost
from sslvit.run_folder import process_start, write_atomically

#: Sent before a time limit. After TERM the job is requeued only if Slurm has no plan of its own for it.
REQUEUE_SIGNAL = getattr(signal, "SIGUSR2", signal.SIGTERM)
WATCHED = (signal.SIGTERM, REQUEUE_SIGNAL)

#: States of a job that ended without a last word, or because what it reads was out of reach: it is queued again.
WITHOUT_A_WORD = ("running", "requeued", "lost", "outage")
MAX_IN_VAIN = 3

#: Exit code, one line, and the error if it is a bug, a lost process, an outage or a signal outside of a training loop.
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
                signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)  # held back while Python started, see submit
                code, message, bug = self._run_all(place)
        except Interrupted as stop:  # just before or just after the verb
            code, message, bug = EXIT_RESUMABLE, f"stopped by {stop}", stop
        if code == EXIT_BUG and bug is not None:
            note.write("failed", EXIT_BUG, message)
            _end_local_siblings(place)
            raise bug
        if isinstance(bug, RankLost):
            note.write("lost", code, message)
            _end_local_siblings(place)
            _leave(place, code, wait=False)
        if (
            code == EXIT_RESUMABLE
            and signals.received
            and callable(requeue)
            and _is_to_requeue(place, signals.received)
        ):
            if isinstance(bug, Interrupted) and place.rank != 0:
                _requeue_at_once(place)
            _requeue(place, requeue, note)
        elif code != EXIT_DONE:
            state = "outage" if isinstance(bug, Outage) else "stopped" if code == EXIT_RESUMABLE else "wrong input"
            note.write(state, code, message, signals.names)
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
        return EXIT_RESUMABLE, f"stopped by {stop}; it goes on where it was", stop
    except (Exception, KeyboardInterrupt) as error:
        ending = explain(error)
        if ending is None:
            return EXIT_BUG, f"{type(error).__name__}: {error}", error
        print(f"sslvit {words[0]}: {ending[1]}", file=sys.stderr, flush=True)
        return *ending, error if isinstance(error, RankLost | Outage) else None
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
        if place.cluster == "slurm" and isinstance(error, subprocess.SubprocessError) and not _is_running(place.job_id):
            _leave(place, EXIT_RESUMABLE)  # another task was faster
        note.write("stopped", EXIT_RESUMABLE, f"not requeued: {error}")
        raise


def _requeue_at_once(place: Place) -> None:
    """A task other than rank 0 that a signal ends before it trains: rank 0 may be waiting for it where no signal wakes
    it (a rendezvous, a first collective), so this one asks Slurm, and there is nothing to save.
    """
    if place.cluster == "slurm" and _is_running(place.job_id):
        subprocess.run(["scontrol", "requeue", place.job_id], check=False, timeout=60)
    _leave(place, EXIT_RESUMABLE)


def _is_to_requeue(place: Place, received: set[int]) -> bool:
    """After USR2 always. After TERM, when Slurm still lets the job run: it is neither preempting nor cancelling it."""
    return REQUEUE_SIGNAL in received or (place.cluster == "slurm" and _is_running(place.job_id))


def _is_running(job_id: str) -> bool:
    """Whether Slurm itself has not begun to end the job."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["squeue", "-h", "-o", "%T", "-j", job_id]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return answer.stdout.split()[:1] == ["RUNNING"]
    return False


def after_srun(code: int, folder: str, output_dir: str, max_num_requeues: int) -> int:
    """In the batch script, once all tasks have ended; returns its exit code.

    A job that went without a word (a dead node, kill -9, out of memory) or met an outage is queued again: not more than
    `max_num_requeues` times, and three times at most without a new checkpoint.
    """
    if code == EXIT_DONE:
        return code
    job_id = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
    job_id += f"_{os.environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in os.environ else ""
    state, reached = Path(folder) / f"{job_id}_state.json", Path(folder) / f"{job_id}_reached"
    try:
        note = json.loads(state.read_text())
    except (OSError, ValueError):
        note = {"state": "running"}
    newest = _newest_checkpoint(Path(output_dir))
    count, _, before = (reached.read_text() if reached.exists() else "0 ").partition(" ")
    in_vain = int(count) + 1 if before == newest else 0
    tried = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if note["state"] not in WITHOUT_A_WORD or not _is_running(job_id):
        return code
    what = "stopped by an outage" if note["state"] == "outage" else "gone without a word"
    if tried >= max_num_requeues or in_vain >= MAX_IN_VAIN:
        print(f"sslvit: {what} again, after {newest}; not queued again", file=sys.stderr)
        return code
    write_atomically(reached, f"{in_vain} {newest}")
    print(f"sslvit: {what} (exit code {code}), after {newest}; queued again", file=sys.stderr, flush=True)
    return subprocess.run(["scontrol", "requeue", job_id], check=False).returncode


def _newest_checkpoint(output_dir: Path) -> str:
    """`checkpoints/step_0000500` of the stage that saved last; `the start` without any."""
    found = [path for path in output_dir.glob("**/checkpoints/step_*") if re.fullmatch(r"step_\d+", path.name)]
    if not found:
        return "the start"
    return str(max(found, key=lambda path: path.stat().st_mtime).relative_to(output_dir))


def _leave(place: Place, code: int, wait: bool = True) -> None:
    """End this task. On Slurm the first that ends takes the others along: rank 0, which may be saving, goes first."""
    if place.cluster == "slurm" and place.rank != 0 and wait:
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


if __name__ == "__main__":  # the batch script's last line: after CODE FOLDER MAX OUT... (one for each job of an array)
    _, _, _code, _folder, _most, *_outs = sys.argv
    _out = _outs[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))]
    sys.exit(after_srun(int(_code), _folder, _out, int(_most)))
