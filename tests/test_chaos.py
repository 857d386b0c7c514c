"""The table of faults itself, and a few cases of its rows; `make chaos` does them all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "data")]

import chaos  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "chaos.py"


def run(out: Path, *words: str, **variables: str) -> tuple[subprocess.CompletedProcess, dict[str, int | None]]:
    """What the script printed, and the numbers it wrote."""
    command = [sys.executable, str(SCRIPT), "--output-dir", str(out), "--json", str(out / "rows.json"), *words]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    rows = json.loads((out / "rows.json").read_text()) if (out / "rows.json").exists() else []
    return done, {row["name"]: row["value"] for row in rows}


def test_a_few_cases(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--cases", "2", "--rows", "kill,damage,hostile,races,odd_images", SSLVIT_DATA="")
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("kill", "damage", "hostile", "races"):
        assert found[f"chaos/{row}/cases"] == found[f"chaos/{row}/passed"] == 2
    assert found["chaos/odd_images/cases"] is None and "skipped: SSLVIT_DATA is unset" in done.stdout
    assert "| two jobs on one folder: exactly one runs | 2 | 2 |" in done.stdout


@pytest.mark.slow
def test_a_few_cases_of_the_longer_rows(tmp_path: Path) -> None:
    rows = "every_call,broken_savers,disk,resumes,worlds,lost_rank,not_finite"
    done, found = run(tmp_path, "--cases", "2", "--rows", rows)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(found[f"chaos/{row}/passed"] == 2 for row in rows.split(","))


def toy_row(work, absent=lambda: None) -> chaos.Row:
    return chaos.Row("toy", "a toy", 3, 1, work, absent)


def test_finished_cells_are_not_done_again_and_failed_ones_are(tmp_path: Path) -> None:
    done, failing = [], {1}

    def work(case: int, folder: Path) -> None:
        assert not list(folder.iterdir())
        done.append(case)
        assert case not in failing, "it hurts"

    row = toy_row(work)
    why, cells = chaos._run_row(row, 3, tmp_path)
    assert why is None and [cell["passed"] for cell in cells] == [True, False, True]
    assert cells[1]["problem"].startswith("it hurts")
    failing.clear()
    with open(tmp_path / "cells" / "toy.jsonl", "a") as file:
        file.write('{"case": 3, "pas')  # cut by a kill
    chaos._run_row(row, 3, tmp_path)
    chaos._run_row(row, 3, tmp_path)
    assert done == [0, 1, 2, 1]


def test_a_row_whose_tool_is_absent_never_passes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    row = toy_row(lambda case, folder: None, lambda: "no tool")
    found = chaos._run_row(row, 3, tmp_path)
    assert found == ("no tool", []) and "toy: skipped: no tool" in capsys.readouterr().out
    rows = chaos.json_rows([(row, *found)])
    assert [item["value"] for item in rows] == [None, None] and rows[0]["protocol"] == "skipped: no tool"
    assert "| a toy | - | skipped: no tool |" in chaos.markdown([(row, *found)])


#: What a row says of what is broken for it in broken_rows.py. The first ones take a few seconds together.
QUICK_TO_FAIL = {
    "damage": "not noticed",
    "races": "[0, 0]",
    "hostile, yaml": "not refused",
    "hostile, pickle": "not refused",
    "hostile, tar": "../canary.png is believed",
    "hostile, tar link": "link.png is believed",
    "hostile, path": "read b'canary'",
    "hostile, link": "read b'canary'",
    "not_finite": ".safetensors: ",
}
ON_ODD_IMAGES = {
    "odd_images, crash": "IndexError",
    "odd_images, hang": "failed",
    "odd_images, growth": "memory grew by",
}
SLOW_TO_FAIL = {
    "kill": "other bytes than uninterrupted",
    "every_call": "is visible but damaged",
    "broken_savers": "no_centre went unnoticed",
    "disk": "debris",
    "resumes": "other bytes than uninterrupted",
    "worlds": "other samples",
    "worlds, workers": "not bit-exact",
    "lost_rank": "process 1 is not named",
    "lost_rank, stopped": "still there after 60 s",
    "soak, growth": "descriptors: ",
    "soak, bytes": "other bytes",
}


def broken(folder: Path, names: dict[str, str]) -> dict[str, str]:
    """What the rows said that did not say what they should."""
    command = [sys.executable, str(ROOT / "tests" / "broken_rows.py"), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return {name: said[name] for name, words in names.items() if words not in said[name]}


def test_rows_fail_when_what_they_check_is_broken(tmp_path: Path) -> None:
    assert not broken(tmp_path, QUICK_TO_FAIL)


def test_odd_images_fail_when_the_decoder_is_broken(tmp_path: Path, real_data: Path) -> None:
    if not (Path(real_data) / "odd_images.zip").exists():
        pytest.skip("no odd_images.zip")
    assert not broken(tmp_path, ON_ODD_IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_TO_FAIL)
def test_longer_rows_fail_when_what_they_check_is_broken(tmp_path: Path, name: str) -> None:
    assert not broken(tmp_path, {name: SLOW_TO_FAIL[name]})


def test_the_file_holds_command_machine_and_what_was_shortened(tmp_path: Path) -> None:
    row = toy_row(lambda case, folder: f"remark {case}")
    found = chaos._run_row(row, 2, tmp_path)
    cases, passed = chaos.json_rows([(row, *found)], facts={"command": "a", "machine": chaos.machine()})
    assert (cases["value"], passed["value"]) == (2, 2) and cases["notes"] == ["remark 0", "remark 1"]
    assert cases["command"] == "a" and "cores of" in cases["machine"] and cases["seed"] == 0
    assert cases["protocol"] == "a toy (shortened: 2 of 3)"
    whole = chaos._run_row(row, 3, tmp_path)
    assert chaos.json_rows([(row, *whole)])[0]["protocol"] == "a toy"
    assert chaos._command(chaos._parse(["--rows", "toy", "--json", "x"])) == "python benchmarks/chaos.py --rows toy"


def test_an_unknown_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert chaos.main(["--rows", "no_such_row"]) == 2
    assert "no_such_row" in capsys.readouterr().err
