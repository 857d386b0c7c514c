"""Signals only set a flag; the training loop looks at it between steps.

Slurm sends TERM on preemption and, when asked to, USR2 before a time limit.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopFlag"]

WATCHED = ("SIGTERM", "SIGUSR2", "SIGINT")


class StopFlag:
    """While entered, SIGTERM, SIGUSR2 and the first Ctrl-C are noted instead of acting; a second Ctrl-C interrupts.

    In a thread other than the main one Python cannot watch signals; the flag then stays as it is.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for name in WATCHED:
                if name in signal.Signals.__members__:  # Windows has no SIGUSR2
                    number = signal.Signals[name]
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def is_set(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None
