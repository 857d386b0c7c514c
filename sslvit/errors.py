"""The two ways a verb ends early without being our bug.

Everything else that escapes a verb is a bug: it keeps its traceback and exits with 1.
"""

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_INPUT = 2
EXIT_RESUMABLE = 75


class InputError(ValueError):
    """The user's input is wrong. One line: what, where, the remedy. The command line exits with 2."""


class Resumable(Exception):
    """Stopped by a signal or a full disk; the same command goes on from the last checkpoint. Exits with 75."""


class Outage(Resumable):
    """What a run reads is out of reach for now (a network, a disk that hangs); a job is queued again by itself."""


class RankLost(Resumable):
    """Another process of this run is gone or does not answer; all end, and the same command goes on."""
