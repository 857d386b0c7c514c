"""Everything that may happen to a run, done to it: kills, full disks, damage, Slurm, hostile files. One table.

    python benchmarks/chaos.py [--quick] [--json FILE] [--rows kill,flips] [--output-dir OUT]

Each case is a real fault and a check of what it left; a case that is done is not done again, here or after a kill of
this script. Rows: `chaos/ROW/cases` and `chaos/ROW/passed`; a row whose tool is absent prints why and has no numbers.
The seed of every case is its number.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CASE_SECONDS = 900


@dataclass(frozen=True)
class Row:
    """A fault: how many cases in full and with --quick, what one does, and why it cannot be done here, if so."""

    name: str
    words: str
    cases: int
    quick: int
    work: Callable[[int, Path], str | None]  # (case, an empty folder) to a remark; AssertionError: what did not hold
    absent: Callable[[], str | None] = lambda: None


def main(arguments: list[str] | None = None) -> int:
    """Runs what is not done, prints the table; 0 when every case of every row that could run has passed."""
    options = _parse(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # before torch, which rows import
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "tests" / "data")]
    import chaos_rows

    rows = chaos_rows.ROWS
    chosen = [row for row in rows if not options.rows or row.name in options.rows.split(",")]
    unknown = set(filter(None, options.rows.split(","))) - {row.name for row in rows}
    if unknown:
        print(f"no row {sorted(unknown)[0]!r}; there are {', '.join(row.name for row in rows)}", file=sys.stderr)
        return 2
    counts = {row.name: _count(row, options) for row in chosen}
    chaos_rows.PLANNED.update(counts)
    place = options.output_dir / ("quick" if options.quick else "full")  # a short soak is no long one
    table = [(row, *_run_row(row, counts[row.name], place)) for row in chosen]
    print(f"\n{'shortened by --quick' if options.quick else ''}\n{markdown(table)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"command": _command(options), "machine": machine()}
        options.json.write_text(json.dumps(json_rows(table, options.quick, facts), indent=1) + "\n")
    return 0 if all(why or all(found["passed"] for found in cells) for _, why, cells in table) else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cases of each row, at most five minutes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rows", default="", metavar="NAMES", help="only these, by comma")
    parser.add_argument("--cases", type=int, metavar="N", help="at most N cases of each row")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/chaos"), metavar="OUT")
    return parser.parse_args(arguments)


def _count(row: Row, options: argparse.Namespace) -> int:
    count = row.quick if options.quick else row.cases
    return min(count, options.cases) if options.cases else count


def _run_row(row: Row, count: int, output_dir: Path) -> tuple[str | None, list[dict]]:
    """(why it is skipped, or None; what became of each case). A case is one line of OUT/cells/ROW.jsonl."""
    if why := row.absent():
        print(f"{row.name}: skipped: {why}", flush=True)
        return why, []
    file = output_dir.absolute() / "cells" / f"{row.name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = _finished_cells(file)
    began = time.monotonic()
    for case in range(count):
        if not done.get(case, {}).get("passed"):
            done[case] = _run_case(row, case)
            _append(file, done[case])
    cells = [done[case] for case in range(count)]
    good = sum(cell["passed"] for cell in cells)
    print(f"{row.name}: {good} of {count} passed, {time.monotonic() - began:.0f} s", flush=True)
    return None, cells


def _append(file: Path, cell: dict) -> None:
    """One line; after one that a kill cut off, on a line of its own."""
    cut = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size
    with open(file, "a") as stream:
        stream.write(("\n" if cut else "") + json.dumps(cell) + "\n")


def _finished_cells(file: Path) -> dict[int, dict]:
    cells = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            cell = json.loads(line)
            cells[cell["case"]] = cell
        except ValueError:  # cut by a kill
            continue
    return cells


def _run_case(row: Row, case: int) -> dict:
    folder, problem, note, began = _scratch(), "", None, time.monotonic()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(CASE_SECONDS if row.name != "soak" else 8 * CASE_SECONDS)
    try:
        note = row.work(case, folder)
    except Exception as error:
        problem = (
            f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error) or "failed"
        )
        print(f"{row.name} case {case}: {problem}", file=sys.stderr, flush=True)
        if not isinstance(error, AssertionError):
            traceback.print_exc()
    finally:
        signal.alarm(0)
        shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - began, 2)
    cell = {"case": case, "passed": not problem, "problem": problem[:1000], "seconds": seconds}
    return cell | ({"note": note} if note else {})


def _too_long(number: int, frame: object) -> None:
    raise AssertionError("it hangs")


def _scratch() -> Path:
    """In memory where there is room: a kill does not depend on the disk, and fsync costs nothing there."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    return Path(tempfile.mkdtemp(prefix="chaos-", dir=memory if roomy else None))


def markdown(table: list[tuple[Row, str | None, list[dict]]]) -> str:
    """The table, one line a fault."""
    lines = ["| fault | cases | passed |", "|---|---|---|"]
    for row, why, cells in table:
        found = f"{len(cells)} | {sum(cell['passed'] for cell in cells)}" if why is None else f"- | skipped: {why}"
        lines.append(f"| {row.words} | {found} |")
    return "\n".join(lines)


def json_rows(
    table: list[tuple[Row, str | None, list[dict]]], quick: bool = False, facts: dict[str, str] | None = None
) -> list[dict]:
    """`chaos/ROW/{cases,passed}`; a row that was skipped says why and has no value. `facts` go into each."""
    rows = []
    for row, why, cells in table:
        common = {"ci95": None, "protocol": _protocol(row, why, len(cells), quick), "data": "", "seed": 0}
        values = (len(cells), sum(cell["passed"] for cell in cells)) if why is None else (None, None)
        more: dict[str, object] = {**(facts or {}), "seconds": round(sum(cell["seconds"] for cell in cells))}
        if notes := [cell["note"] for cell in cells if cell.get("note")]:
            more["notes"] = notes
        for name, value in zip(("cases", "passed"), values, strict=True):
            rows.append({"name": f"chaos/{row.name}/{name}", "value": value, **common, "step": None, **more})
    return rows


def _protocol(row: Row, why: str | None, cases: int, quick: bool) -> str:
    """What was done; a shortened row says so."""
    if why is not None:
        return f"skipped: {why}"
    shorter = " (shortened by --quick)" if quick else f" (shortened: {cases} of {row.cases})" * (cases < row.cases)
    return row.words + shorter


def _command(options: argparse.Namespace) -> str:
    """The command line without its places."""
    words = ["python", "benchmarks/chaos.py", *(["--quick"] if options.quick else [])]
    words += ["--rows", options.rows] if options.rows else []
    words += ["--cases", str(options.cases)] if options.cases else []
    return " ".join(words)


def machine() -> str:
    """Cores, processor, memory and versions, in words; it names no host."""
    from importlib import metadata

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        processor = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = f"Python {platform.python_version()}, torch {metadata.version('torch')}"
    slurm = shutil.which("scontrol")
    if slurm and (told := subprocess.run([slurm, "-V"], capture_output=True, text=True, check=False).stdout.strip()):
        versions += f", {told}"
    return f"{cores} of {os.cpu_count()} cores of {processor}, {gib:.0f} GiB, {platform.system()}; {versions}"


if __name__ == "__main__":
    sys.exit(main())
