"""What `--json FILE` leaves: the rows in FILE, and beside it FILE.md with the table that was printed."""

from __future__ import annotations

import json
from pathlib import Path

from sslvit.run_folder import write_atomically


def store(rows: list[dict], table: str, file: Path | None) -> None:
    """Both files, each whole or not at all; nothing without FILE."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(rows, indent=1) + "\n")
        write_atomically(file.with_suffix(".md"), f"{table}\n")
