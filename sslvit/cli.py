"""`sslvit VERB ...`: carry a command out and say in one line what went wrong. Imports no torch before a verb runs.

Exit codes: 0 done, 2 the input is wrong, 75 stopped but resumable, 1 our bug (with its traceback).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import sslvit
from sslvit.commands import VERBS, explain, parse, verb_named
from sslvit.errors import EXIT_DONE
from sslvit.run_folder import is_writer


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return EXIT_DONE
    if words[0] == "--version":
        print(sslvit.__version__)
        return EXIT_DONE
    try:
        verb_named(words[0])
        carry_out(words)
    except (Exception, KeyboardInterrupt) as error:
        ending = explain(error)
        if ending is None:
            raise
        code, message = ending
        print(f"sslvit {words[0]}: {message}", file=sys.stderr, flush=True)
        return code
    return EXIT_DONE


def carry_out(words: Sequence[str]) -> None:
    """Check a command, then call its verb; `ask` and `doctor` answer on standard output."""
    command = parse(words)
    if (
        command.verb in ("pretrain", "evaluate", "align")
        and is_writer(command.verb)
        and not command.arguments.get("explain")
    ):
        print(f"run folder: {command.output_dir}", flush=True)
    answer = getattr(sslvit, command.verb)(*command.positional, **command.arguments)
    if isinstance(answer, str):
        print(answer)


def help_text() -> str:
    """What `sslvit --help` prints: each verb in the order of the story."""
    verbs = "\n".join(f"  {name:<11} {verb.summary}" for name, verb in VERBS.items())
    return f"""sslvit: from images without labels to a vision encoder, honest numbers, open exports and a small VLM

  sslvit VERB ...        sslvit VERB --help says more        sslvit --version

{verbs}

First steps:
  sslvit demo
  sslvit pretrain data=/my/images
  sslvit evaluate --encoder runs/pretrain-images --train-dataset /labelled/train --val-dataset /labelled/val

The same command on the same output folder resumes; once finished it returns at once; overwrite=true starts over.
Exit codes: 0 done, 2 the input is wrong (one line says what), 75 stopped but resumable, 1 a bug of ours."""
