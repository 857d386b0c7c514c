"""Threads that load: what fails in one is tried again, then raised where it is waited for, with the image's name.

None can hang a run. Work is a function of its arguments, so that trying again, in another thread, changes nothing. It
knows nothing of images but their indices (`loader.py` does the loading).
"""

from __future__ import annotations

import atexit
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sslvit.errors import InputError, Outage, Resumable

HANG_SECONDS = 120.0
TRIES = 3
MEMORY_SECONDS = 1.0  # for other threads to give memory back

log = logging.getLogger(__name__)


@dataclass
class Job:
    """Work handed to the threads, and what became of it."""

    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    done: threading.Event
    at: int | None = None  # the image being read just now
    error: BaseException | None = None
    result: Any = None
    abandoned: bool = False  # its thread hangs, and another has the work now


class _Stopped(Exception):
    """Nobody waits for this job any more."""


class Workers:
    """A few daemon threads that run jobs in order of submission; with none, the waiting thread runs them itself.

    A job that fails, runs out of memory or stays at one image for two minutes (a dead network disk) is done again, in a
    new thread if need be; the third failure raises where it is waited for, naming the image it was at: RuntimeError,
    Outage for a hang, Resumable for no memory. Being daemons the threads cannot keep the process alive.
    """

    def __init__(self, num_threads: int, name: Callable[[int], str]) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._stopping = False
        self._num_begun = 0  # images, in all threads
        self._last_begun: int | None = None
        self._threads = [threading.Thread(target=self._serve, daemon=True, name="loader") for _ in range(num_threads)]
        self._ready = threading.Barrier(num_threads + 1)

    def __enter__(self) -> Workers:
        torch_threads = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        self._ready.wait()
        if self._threads:
            torch.set_num_threads(torch_threads)  # what a thread sets for itself is also what later ones would inherit
        atexit.register(self.close)  # a thread inside native code while the interpreter goes away would abort it
        return self

    def __exit__(self, *_exception: object) -> None:
        atexit.unregister(self.close)
        self.close()

    def close(self) -> None:
        """Drop the queued jobs and let the threads go; one that hangs is left behind after a few seconds."""
        self._stopping = True
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + 5
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Job:
        """Queue work(*arguments, report); it calls report(index) as it starts on an image."""
        job = Job(work, arguments, threading.Event())
        if self._threads:
            self._jobs.put(job)
        return job

    def wait(self, job: Job) -> Any:
        """The job's result, once it is done."""
        for left in reversed(range(TRIES)):
            problem = self._outcome(job)
            if problem is None:
                return job.result
            if not left:
                raise problem from job.error
            log.warning("%s; trying again", problem)
            job = self._again(job)
        raise AssertionError("unreachable")

    def _outcome(self, job: Job) -> Exception | None:
        """None when it is done; the problem when it is worth another try; the user's errors are raised at once."""
        if not self._threads and not job.done.is_set():
            self._run(job)
        mark, since = self._mark(job), time.monotonic()
        while not job.done.wait(timeout=min(1.0, HANG_SECONDS)):
            if self._mark(job) != mark:
                mark, since = self._mark(job), time.monotonic()
            elif mark[1] is not None and time.monotonic() - since > HANG_SECONDS:
                job.abandoned = job.at is not None
                problem = f"reading {self._name(mark[1])} has hung for {HANG_SECONDS:.0f} s"
                return Outage(f"{problem}; see to its disk and run the same command again")
        if isinstance(job.error, InputError | Resumable) or not isinstance(job.error, Exception | None):
            raise job.error
        where = "before the first image" if job.at is None else f"at {self._name(job.at)}"
        if isinstance(job.error, MemoryError):
            return Resumable(f"out of memory {where}; run the same command with a smaller num_workers")
        return None if job.error is None else RuntimeError(f"loading failed {where}: {job.error!r}")

    def _mark(self, job: Job) -> tuple[int, int | None]:
        """(images begun, the one being read) by the job; as long as it waits in the queue, by all threads."""
        return (0, job.at) if job.at is not None else (self._num_begun, self._last_begun)

    def _again(self, job: Job) -> Job:
        """The same work once more: by a new thread for one that hangs, else here."""
        new = Job(job.work, job.arguments, threading.Event())
        if not job.done.is_set():
            self._replace_thread()
            if not job.abandoned:  # it is still in the queue, behind others that hang
                return job
            self._jobs.put(new)
            return new
        if isinstance(job.error, MemoryError):
            job.error = None  # its traceback holds what was decoded so far
            gc.collect()
            time.sleep(MEMORY_SECONDS)
        self._run(new)
        return new

    def _replace_thread(self) -> None:
        torch_threads = torch.get_num_threads()
        self._ready = threading.Barrier(2)
        thread = threading.Thread(target=self._serve, daemon=True, name="loader")
        self._threads.append(thread)
        thread.start()
        self._ready.wait()
        torch.set_num_threads(torch_threads)

    def _serve(self) -> None:
        torch.get_num_threads()  # a thread's first question sets it to what all have; after that its own setting lasts
        torch.set_num_threads(1)  # the cores are shared out among the threads already
        self._ready.wait()
        while (job := self._jobs.get()) is not None:
            self._run(job)

    def _run(self, job: Job) -> None:
        def report(index: int) -> None:
            if self._stopping or job.abandoned:
                raise _Stopped
            job.at = self._last_begun = index
            self._num_begun += 1

        try:
            if not self._stopping:
                job.result = job.work(*job.arguments, report)
        except BaseException as error:  # raised again where the job is waited for
            job.error = error
        job.done.set()
