"""The run folder: one writer; what was asked is kept and compared; files change in one step; only ours is deleted."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sslvit import run_folder
from sslvit.config import AlignConfig, EvaluateConfig, PretrainConfig, load_config
from sslvit.errors import InputError, Resumable
from sslvit.run_folder import (
    Lock,
    RunFolder,
    add_results,
    default_output_dir,
    is_disk_full,
    process_start,
    write_atomically,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


def config(*texts):
    return load_config(PretrainConfig, None, ["data=x", "dino={}", *texts])


def opened(path, *texts, verb="pretrain", **options):
    return RunFolder.open(path, verb, config(*texts), **options)


def refusal(kind, call, *args, **options):
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is kept and compared --------------------------------------------------------------------------------------


def test_a_new_folder_holds_the_record(tmp_path):
    with opened(tmp_path / "a" / "b") as folder:
        assert not folder.finished and folder.writer
    assert load_config(PretrainConfig, tmp_path / "a" / "b" / "config.yaml") == config()
    environment = json.loads((tmp_path / "a" / "b" / "env.json").read_text())
    assert environment["verb"] == "pretrain" and environment["packages"]["torch"]
    assert (tmp_path / "a" / "b" / "command.txt").read_text().count("#") == 1
    with opened(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b" / "command.txt").read_text().count("#") == 2


@pytest.mark.parametrize(
    "free", ["num_workers=3", "checkpoint.every=5", "checkpoint.keep=1", "device=cpu", "sharded=true"]
)
def test_keys_that_cannot_change_results_may_differ(tmp_path, free):
    with opened(tmp_path / "run") as folder:
        folder.finish()
    with opened(tmp_path / "run", free) as folder:
        assert folder.finished
    assert load_config(PretrainConfig, tmp_path / "run" / "config.yaml") == config(free)


@pytest.mark.parametrize("other", ["optim.lr=1e-3", "data=y", "dino=null", "mae={}", "precision=bf16", "steps=7"])
def test_other_keys_are_refused_by_name(tmp_path, other):
    with opened(tmp_path / "run") as folder:
        folder.finish()
    before = (tmp_path / "run" / "config.yaml").read_text()
    message = refusal(InputError, opened, tmp_path / "run", other)
    assert other.split("=")[0] in message and "overwrite=true" in message
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    opened(tmp_path / "run").release()  # and the refusal did not keep the lock


def test_a_config_of_before_a_key_existed_is_read_with_its_default(tmp_path):
    with opened(tmp_path / "run") as folder:
        folder.finish()
    file = tmp_path / "run" / "config.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("seed")))
    opened(tmp_path / "run").release()
    assert "seed" in refusal(InputError, opened, tmp_path / "run", "seed=1")


@pytest.mark.parametrize("trained", ["checkpoints/step_0000000", "stages/text", "cells/a.json", "finished.json"])
def test_a_typo_can_be_corrected_until_something_was_learned(tmp_path, trained):
    """The record is written before the data is opened; what was measured of other data does not stay."""
    run = tmp_path / "run"
    with opened(run, "data=/typo") as folder:
        folder.write_json("statistics.json", {"mean": [0.5]})
        (run / "checkpoints").mkdir()
    with opened(run, "data=/right", "seed=1") as folder:
        assert folder.read_json("statistics.json") is None and not folder.finished
    assert load_config(PretrainConfig, run / "config.yaml").data == "/right"
    (run / trained).parent.mkdir(exist_ok=True)
    (run / trained).touch()
    assert "data" in refusal(InputError, opened, run, "data=/other", "seed=1")
    assert load_config(PretrainConfig, run / "config.yaml").data == "/right"


def test_what_was_measured_stays_when_the_run_goes_on(tmp_path):
    with opened(tmp_path / "run") as folder:
        folder.write_json("statistics.json", {"mean": [0.5]})
    with opened(tmp_path / "run", "num_workers=1") as folder:
        assert folder.read_json("statistics.json") == {"mean": [0.5]}


def test_auto_values_are_printed_once_with_their_reasons(tmp_path, capsys):
    reasons = {"optim.lr": "0.001: rule\nof thumb", "batch_size": "small data"}
    for _ in range(2):  # the second time the run goes on
        with opened(tmp_path / "run") as folder:
            folder.write_resolved(config("optim.lr=1e-3", "batch_size=64"), reasons)
    assert capsys.readouterr().out.splitlines() == [
        "auto: optim.lr   = 0.001  (rule of thumb)",
        "auto: batch_size = 64     (small data)",
    ]
    assert "  lr: 0.001  # rule of thumb\n" in (tmp_path / "run" / "resolved.yaml").read_text()
    with opened(tmp_path / "run") as folder:
        folder.write_resolved(config("optim.lr=1e-3", "batch_size=32"), reasons)
        assert "batch_size = 32" in capsys.readouterr().out
        folder.write_resolved(config("optim.lr=1e-3"), {})
    assert capsys.readouterr().out == ""


def test_own_free_keys(tmp_path):
    opened(tmp_path / "run").release()
    with opened(tmp_path / "run", "seed=1", free_keys=["*"]) as folder:
        folder.finish()
    with opened(tmp_path / "run", "seed=2", free_keys=["*"]) as folder:
        assert not folder.finished  # other results, even where they may stand together


def test_resolved_holds_reasons(tmp_path):
    with opened(tmp_path / "run") as folder:
        resolved = config("optim.lr=1e-3", "steps=5")
        folder.write_resolved(resolved, {"optim.lr": "rule\nof thumb", "steps": "small data"})
    text = (tmp_path / "run" / "resolved.yaml").read_text()
    assert "  lr: 0.001  # rule of thumb\n" in text and "steps: 5  # small data\n" in text and text.count("#") == 2
    assert load_config(PretrainConfig, tmp_path / "run" / "resolved.yaml") == resolved


# ---- whose folder ---------------------------------------------------------------------------------------------------


def test_strange_folders_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("x")
    for overwrite in (False, True):
        assert "holiday.jpg" in refusal(InputError, opened, tmp_path / "photos", overwrite=overwrite)
    assert "a file" in refusal(InputError, opened, tmp_path / "photos" / "holiday.jpg")
    assert os.listdir(tmp_path / "photos") == ["holiday.jpg"]


def test_folders_of_submitted_jobs_are_fine(tmp_path):
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    opened(tmp_path / "run", overwrite=True).release()
    assert (tmp_path / "run" / "jobs").is_dir()


def test_one_verb_one_folder_but_evaluate_is_a_guest(tmp_path):
    with opened(tmp_path / "run") as folder:
        align = AlignConfig(encoder="a", data="b")
        assert "pretrain" in refusal(InputError, RunFolder.open, tmp_path / "run", "align", align)
        judged = EvaluateConfig(encoder="run", train_dataset="a", val_dataset="b")
        with RunFolder.open(tmp_path / "run", "evaluate", judged, overwrite=True) as guest:
            guest.add_results([{"name": "knn/top1", "data": "b", "seed": 0, "value": 0.5}])
            assert guest.record == tmp_path / "run" / "evaluate"
            assert (guest.record / "config.yaml").exists()
        assert folder.read_json("results.json")[0]["value"] == 0.5
    opened(tmp_path / "run").release()


def test_overwrite_deletes_what_is_ours_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    with opened(run) as folder:
        folder.finish()
        folder.write_json("results.json", [])
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    (run / "vlm").symlink_to(outside)
    (run / "encoder").symlink_to(tmp_path / "gone")
    (run / ".export-x1").mkdir()
    (run / ".export-x1" / "half").write_text("x")
    for name in ("statistics.json", "bad_files.jsonl", "bad_files.rank1.jsonl"):
        (run / name).write_text("{}")
    (run / "notes.txt").write_text("mine")
    opened(run / "control").release()
    (run / "control" / "my.txt").write_text("mine")
    opened(run / "control2").release()
    (run / "theirs" / "checkpoints").mkdir(parents=True)
    (run / "jobs").mkdir()
    with opened(run, "seed=9", overwrite=True) as folder:
        assert not folder.finished
    left = {str(path.relative_to(run)) for path in run.rglob("*")}
    assert left == {
        ".lock",
        "config.yaml",
        "command.txt",
        "env.json",
        "notes.txt",
        "control",
        "control/my.txt",
        "theirs",
        "theirs/checkpoints",
        "jobs",
    }
    assert (outside / "precious").exists()
    assert load_config(PretrainConfig, run / "config.yaml").seed == 9


def test_unwritable_places_are_input_errors(tmp_path):
    assert "--output-dir" in refusal(InputError, opened, "/proc/nothing/run")


def test_two_processes_of_one_number_write_one_file(tmp_path, monkeypatch):
    """As tasks of an array do, each in a container of its own."""
    both, fsync = threading.Barrier(2), os.fsync
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(os, "fsync", lambda fd: (both.wait(5), fsync(fd)))
    monkeypatch.setattr(run_folder, "_sync_folder", lambda path: None)
    problems = []

    def write(text):
        try:
            write_atomically(tmp_path / "a.json", text)
        except OSError as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and (tmp_path / "a.json").read_text() in ("one", "two")
    assert os.listdir(tmp_path) == ["a.json"]


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_other_ranks_write_nothing(tmp_path, monkeypatch, variable):
    with opened(tmp_path / "run") as first:
        first.finish()
        before = sorted(os.listdir(tmp_path / "run"))
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv(variable, "1")
        with opened(tmp_path / "run") as second:
            assert second.finished and not second.writer
            second.finish()
            second.write_json("x.json", 1)
            second.write_resolved(config(), {})
            second.add_results([{"name": "a"}])
        with opened(tmp_path / "run", overwrite=True) as third:
            assert not third.finished  # whatever rank 0 has had time to delete
        assert sorted(os.listdir(tmp_path / "run")) == before


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_every_task_of_a_verb_that_joins_no_group_writes_its_own_folder(tmp_path, monkeypatch, variable):
    """`srun -n8 sslvit evaluate --output-dir o$SLURM_PROCID`; two on one folder are refused, not silent."""
    monkeypatch.delenv("RANK", raising=False)
    for rank in ("0", "1"):
        monkeypatch.setenv(variable, rank)
        with RunFolder.open(tmp_path / rank, "evaluate", EvaluateConfig(encoder="e"), free_keys=["*"]) as folder:
            assert folder.writer
            folder.add_results([{"name": "knn/top1"}])
            assert "in use" in refusal(
                InputError, RunFolder.open, tmp_path / rank, "evaluate", EvaluateConfig(encoder="e")
            )
        assert (tmp_path / rank / "results.json").exists()


@pytest.mark.parametrize("gone", [["env.json"], ["env.json", "config.yaml"]])
def test_other_ranks_open_a_folder_that_rank_0_is_rewriting(tmp_path, monkeypatch, capsys, gone):
    """At any moment of it: a folder that is no run folder just now is rank 0's to judge."""
    run = tmp_path / "run"
    opened(run).release()
    (run / "checkpoints").mkdir()
    for name in gone:
        (run / name).unlink()
    refusal(InputError, opened, run, overwrite=True)
    monkeypatch.setenv("RANK", "1")
    with opened(run, overwrite=True) as second:
        assert second.record == run and not second.finished
        second.write_resolved(config("steps=5"), {"steps": "small data"})
    assert capsys.readouterr().out == "" and os.listdir(run).count("env.json") == 0


@pytest.mark.parametrize("survived", range(5))
def test_a_kill_while_starting_over_leaves_a_folder_of_ours(tmp_path, monkeypatch, survived):
    """The old settings stand until everything that was learned with them is gone."""
    run, deleted = tmp_path / "run", []
    with opened(run) as folder:
        folder.finish()
    for name in ("checkpoints", "stages", "features"):
        (run / name).mkdir()
        (run / name / "x").touch()

    def killed_after(call):
        def counted(entry, *args, **options):
            if len(deleted) == survived:
                raise KeyboardInterrupt
            deleted.append(entry)
            call(entry, *args, **options)

        return counted

    with monkeypatch.context() as killing:
        killing.setattr(Path, "unlink", killed_after(Path.unlink))
        killing.setattr(run_folder.shutil, "rmtree", killed_after(run_folder.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            opened(run, "seed=1", overwrite=True)
    if any((run / name).exists() for name in ("checkpoints", "stages", "finished.json")):
        assert "seed" in refusal(InputError, opened, run, "seed=1")
    else:
        opened(run, "seed=1").release()


# ---- the lock -------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from sslvit.run_folder import Lock
lock = Lock(__import__("pathlib").Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/.lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_held_folder_is_refused_and_a_killed_holder_is_followed(tmp_path, holder):
    assert f"process {holder.pid}" in refusal(InputError, Lock, tmp_path / ".lock")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    Lock(tmp_path / ".lock").release()


def test_twice_in_one_process_is_refused(tmp_path):
    with opened(tmp_path / "run"):
        assert str(os.getpid()) in refusal(InputError, opened, tmp_path / "run")
    opened(tmp_path / "run").release()


@pytest.mark.parametrize("locks", [True, False])
def test_races_have_one_winner(tmp_path, locks):
    """Six processes at once, several times; also where the file system has no locks. The last holder was killed."""
    context = multiprocessing.get_context("fork")
    for attempt in range(8 if locks else 1):
        file = tmp_path / f"{attempt}.lock"
        file.write_text(json.dumps({"pid": 2**22, "boot": "another boot", "host": run_folder.socket.gethostname()}))
        barrier, results = context.Barrier(6), context.Queue()
        racers = [context.Process(target=_race, args=(file, barrier, results, locks)) for _ in range(6)]
        for racer in racers:
            racer.start()
        assert sorted(results.get(timeout=30) for _ in racers) == [0] * 5 + [1]
        for racer in racers:
            racer.join()


def _race(file, barrier, results, locks):
    if not locks:
        run_folder._flock = lambda fd: None
        run_folder.SETTLE_SECONDS = 1.5
    barrier.wait()
    try:
        lock = Lock(file)
    except InputError:
        results.put(0)
        barrier.wait()
    else:
        results.put(1)
        barrier.wait()  # held until everybody has tried
        lock.release()


def test_races_without_a_lock_have_many_winners(tmp_path, monkeypatch):
    """What the race test would say of a lock that only looks at the file."""
    monkeypatch.setattr(run_folder, "_flock", lambda fd: True)
    locks = [Lock(tmp_path / ".lock") for _ in range(2)]
    for lock in locks:
        lock.release()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    """A loader's worker may outlive a killed parent by seconds."""
    lock = Lock(tmp_path / ".lock")
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=lambda: (started.set(), time.sleep(30)))
    worker.start()
    started.wait(10)
    os.close(lock._fd)  # as the kernel does when the holder is killed
    lock._fd = None
    Lock(tmp_path / ".lock").release()
    worker.kill()
    worker.join()


def test_without_kernel_locks_the_holder_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_flock", lambda fd: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    me = run_folder._me()
    file = tmp_path / ".lock"
    sleeper = subprocess.Popen(["sleep", "60"])
    alive = {**me, "pid": sleeper.pid, "started": process_start(sleeper.pid), "slurm_job": None}
    busy = [me, alive, {**alive, "host": "elsewhere", "boot": "other", "slurm_job": "8"}]
    stale = [
        {},
        {**alive, "started": 1},  # the number came again
        {**alive, "boot": "before the reboot"},
        {**alive, "host": "elsewhere", "boot": "other", "slurm_job": "7"},  # this job, requeued to another node
    ]
    for holder in busy:
        file.write_text(json.dumps(holder))
        said = refusal(InputError, Lock, file)
        assert "in use" in said and (f"rm {file}" in said) == (holder["host"] == "elsewhere")
    for holder in [*stale, "nonsense"]:
        file.write_text(json.dumps(holder))
        Lock(file).release()
    sleeper.kill()
    sleeper.wait()
    file.write_text(json.dumps(alive))
    Lock(file).release()


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_or_failing_disk_is_resumable_and_leaves_no_debris(tmp_path, monkeypatch, code, call):
    file = tmp_path / "results.json"
    write_atomically(file, "old")

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    message = refusal(Resumable, write_atomically, file, "new" * 100)
    assert str(file) in message and "300 bytes" in message
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        OSError("100000 requested and 7664 written"),  # numpy
        OSError("Not enough free space to write 72000000 bytes after offset 128"),  # numpy
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
)
def test_every_way_to_say_that_the_disk_is_full(error):
    assert is_disk_full(error)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "x"), ValueError("2 requested"), KeyError("x")])
def test_other_errors_are_no_full_disk(error):
    assert not is_disk_full(error)


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    code = f"""
import os
from pathlib import Path
from sslvit import run_folder
os.fsync = lambda fd: os.kill(os.getpid(), 9)
run_folder.write_atomically(Path({str(tmp_path / "a.json")!r}), "new")
"""
    (tmp_path / "a.json").write_text("old")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (tmp_path / "a.json").read_text() == "old"


def row(name, value, data="d", seed=0):
    return {"name": name, "value": value, "ci95": [0.0, 1.0], "protocol": "p", "data": data, "seed": seed, "step": 1}


def test_rows_replace_their_like(tmp_path):
    add_results(tmp_path, [row("a", 1.0), row("b", 1.0)])
    add_results(tmp_path, [row("a", 2.0), row("a", 3.0, data="e"), row("a", 4.0, seed=1)])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [(r["name"], r["data"], r["seed"], r["value"]) for r in kept] == [
        ("a", "d", 0, 2.0),
        ("b", "d", 0, 1.0),
        ("a", "e", 0, 3.0),
        ("a", "d", 1, 4.0),
    ]


def test_rows_that_are_not_finite_are_null(tmp_path):
    add_results(tmp_path, [{**row("a", float("nan")), "ci95": [float("-inf"), 1.0]}])
    kept = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert kept[0]["value"] is None and kept[0]["ci95"] == [None, 1.0]


def test_rows_of_several_writers_all_arrive(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add_many, args=(tmp_path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(json.loads((tmp_path / "results.json").read_text())) == 40


def _add_many(folder, writer):
    for number in range(10):
        add_results(folder, [row(f"{writer}/{number}", 0.0)])


def test_a_strange_results_file_is_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text('{"mine": 1}')
    assert "results.json" in refusal(InputError, add_results, tmp_path, [row("a", 1.0)])
    assert (tmp_path / "results.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        ((None, "/my/images"), "pretrain-images"),
        ((None, "./images/"), "pretrain-images"),
        (("pretrain/auto", "scenes:"), "pretrain-scenes"),
        (("pretrain/tiny_cpu", "scenes:?n=5&seed=1"), "pretrain-tiny_cpu-scenes-n-5-seed-1"),
        (("mine/small.yaml", "parquet:/x/cifar10/train-*.parquet"), "pretrain-small-cifar10-train"),
        ((None, "torchvision:CIFAR10?root=/a&split=train"), "pretrain-CIFAR10-split-train"),
        ((None, "runs/pretrain-a@best"), "pretrain-pretrain-a-best"),
        ((None, "hf-hub:org/model"), "pretrain-model"),
        ((None, ".."), "pretrain-data"),
        ((None, "/a b/ä ö"), "pretrain-ä-ö"),
        ((), "pretrain"),
    ],
)
def test_default_output_dir(names, folder):
    assert default_output_dir("pretrain", *names) == Path("runs") / folder


def test_default_output_dir_is_short_and_told_apart():
    long = default_output_dir("pretrain", "x" * 300 + "a"), default_output_dir("pretrain", "x" * 300 + "b")
    assert long[0] != long[1] and all(len(path.name) < 80 for path in long)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_the_peak_of_memory_is_the_processs_own_not_its_parents():
    held = bytearray(200 * 2**20)
    held[::4096] = bytes(len(held[::4096]))  # touched, so that it counts
    code = "from sslvit.run_folder import peak_memory_bytes; a = bytearray(b'x') * 2**25; print(peak_memory_bytes())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**25 < int(told.stdout) < 2**25 + 100 * 2**20
    assert run_folder.peak_memory_bytes() > len(held)
