"""Jobs: what would be submitted, what runs, and that an interrupted job goes on. The verb inside is a stand-in.

Slurm itself is in `make test-slurm`; here its commands are scripts, and the local executor is real.
"""

import json
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sslvit
from sslvit.commands import JobFailed
from sslvit.errors import InputError, Resumable
from sslvit.verbs import job as job_module
from sslvit.verbs.job import Job, Place, Signals
from sslvit.verbs.submit import LaunchConfig, make_plans, num_gpus, read_launch, submit

#: A pretrain that counts to `steps`, keeps its count in OUT, and can end in every way a verb can.
STAND_IN = """
import os, time
import sslvit


def pretrain(*, config_file=None, output_dir=None, **keys):
    from sslvit.config import PretrainConfig, load_config
    from sslvit.errors import InputError, Outage, Resumable
    from sslvit.run_folder import RunFolder

    config = load_config(PretrainConfig, config_file, keys, default="pretrain/auto")
    with RunFolder.open(output_dir, "pretrain", config, overwrite=config.overwrite) as folder:
        if folder.finished:
            print("finished already", flush=True)
            return
        file = folder.path / "metrics.jsonl"
        step = sum(1 for line in open(file)) if file.exists() else 0
        print(f"from {step} as {os.environ['RANK']} of {os.environ['WORLD_SIZE']}", flush=True)
        if config.seed == 2:
            raise InputError("seed 2 is wrong")
        if config.seed == 1:
            raise ZeroDivisionError("seed 1 is a bug")
        if config.seed == 75:
            raise Resumable("disk full")
        if config.seed == 76 and not (folder.path / "seen").exists():
            (folder.path / "seen").touch()
            raise Outage("no network")
        while step < config.steps:
            time.sleep(0.05)
            step += 1
            if folder.writer:
                with open(file, "a") as log:
                    log.write('{"step": %d}\\n' % step)
        folder.finish()


sslvit.pretrain = pretrain
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Jobs of this test run the stand-in."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    return tmp_path / "run"


def pretrain_words(out, steps=4, *more):
    return ["pretrain", "data=x", f"steps={steps}", *more, "--output-dir", str(out)]


def steps_of(out):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def wait_until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def note_of(out):
    """The newest note a job of OUT left."""
    notes = [json.loads(file.read_text()) for file in (out / "jobs").glob("*_state.json")]
    return max(notes, key=lambda note: note["at"], default={})


# ---- what would be submitted ----------------------------------------------------------------------------------------


def flags(text):
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, flags=re.M))


def test_dry_run_prints_the_file_for_nodes_and_gpus(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.yaml").write_text(
        "cluster: slurm\nnodes: 4\ngpus_per_node: 8\ncpus_per_task: 6\nmem_gb: 100\nhours: 1.5\npartition: gpu\n"
        "account: me\nconstraint: h100\nqos: high\nsbatch: [exclusive, 'reservation=team']\nsetup: [module load cuda]\n"
    )
    assert submit(["pretrain", "data=scenes:"], launch="l.yaml", dry_run=True) == []
    text = capsys.readouterr().out
    found = flags(text)
    assert "4 node(s) x 8 GPU(s), 32 task(s)" in text
    expected = {"nodes": "4", "gpus-per-node": "8", "ntasks-per-node": "8", "cpus-per-task": "6", "time": "90"}
    expected |= {"mem": "102400M", "partition": "gpu", "account": "me", "constraint": "h100", "qos": "high"}
    expected |= {"signal": "USR2@120", "open-mode": "append", "requeue": "", "exclusive": "", "reservation": "team"}
    assert expected.items() <= found.items()
    assert found["output"] == f"{tmp_path}/runs/pretrain-scenes/jobs/%j_0_log.out"
    srun = next(line for line in text.splitlines() if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in srun and "--cpus-per-task=6" in srun and "%j_%t_log.err" in srun
    assert text.index("module load cuda") < text.index("srun")
    assert not (tmp_path / "runs").exists()


def test_dry_run_of_a_sweep_is_one_array(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    submit(["pretrain", "data=scenes:"], launch="slurm", sweep=["optim.lr=1e-4,3e-4", "seed=1,2,3"], dry_run=True)
    text = capsys.readouterr().out
    assert flags(text)["array"] == "0-5%6"
    assert text.count("sslvit pretrain data=scenes:") == 6 and text.count("#!/bin/bash") == 1


@pytest.mark.parametrize(
    "words", [["pretrain"], ["pretrain", "data=x", "lrr=3"], ["pretran"], [], ["submit", "doctor"], ["align", "data=x"]]
)
def test_dry_run_checks_the_command(words):
    with pytest.raises(InputError):
        submit(words, launch="slurm", dry_run=True)


def test_verbs_that_do_not_share_work_get_one_task(tmp_path, capsys):
    submit(["check-data", "scenes:"], launch="slurm", dry_run=True)
    found = flags(capsys.readouterr().out)
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"]) == ("1", "1", "1")


def test_plans_of_a_sweep():
    plans = make_plans(["pretrain", "data=x", "--output-dir", "o"], ["crops.ratio=[1,2],[3,4]", "seed=1,2"])
    assert [plan.words[-4:-2] for plan in plans] == [
        ("crops.ratio=[1,2]", "seed=1"),
        ("crops.ratio=[1,2]", "seed=2"),
        ("crops.ratio=[3,4]", "seed=1"),
        ("crops.ratio=[3,4]", "seed=2"),
    ]
    assert len({plan.output_dir for plan in plans}) == 4
    assert {plan.base for plan in plans} == {Path("o")}
    for plan in plans:
        assert sslvit.commands.parse(plan.words).output_dir == plan.output_dir


def test_a_sweep_may_hold_the_required_key():
    first, second = make_plans(["pretrain"], ["data=a,b"])
    assert first.base == second.base and first.output_dir != second.output_dir


@pytest.mark.parametrize("sweep", ["seed", "seed=", "=1", "seeed=1,2", "seed=1,x"])
def test_wrong_sweeps(sweep):
    with pytest.raises(InputError):
        make_plans(["pretrain", "data=x"], [sweep])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("cluster: pbs", ["pbs", "slurm"]),
        ("cluster: local\npartition: gpu", ["partition", "local"]),
        ("cluster: local\nnodes: 2", ["nodes"]),
        ("cluster: slurm\nnodse: 2", ["nodes"]),
        ("cluster: slurm\nnodes: 0", ["nodes"]),
        ("cluster: slurm\nhours: -1", ["hours"]),
        ("cluster: slurm\naccount: ${oc.env:HOME}", ["account"]),
    ],
)
def test_wrong_launch_files(tmp_path, text, parts):
    (tmp_path / "l.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_launch(str(tmp_path / "l.yaml"))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_shipped_launch_files():
    assert read_launch("local").cluster == "local"
    assert read_launch("launch/slurm.yaml").srun_args == ["--kill-on-bad-exit=1"]
    with pytest.raises(InputError, match="nowhere"):
        read_launch("nowhere")


def test_gpus_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert num_gpus(LaunchConfig()) == 2 and num_gpus(LaunchConfig(gpus_per_node=1)) == 1
    assert num_gpus(LaunchConfig(cluster="slurm")) == 0
    with pytest.raises(InputError, match="offers 2"):
        num_gpus(LaunchConfig(gpus_per_node=3))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc")
    with pytest.raises(InputError, match="UUID"):
        num_gpus(LaunchConfig())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: A (x)\\n  MIG 1\\nGPU 1: A (y)\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert num_gpus(LaunchConfig()) == 2


# ---- inside a job ---------------------------------------------------------------------------------------------------


def test_a_job_pickles_as_a_name_and_words():
    job = Job((("pretrain", "data=x"),), "/o/jobs")
    data = pickle.dumps(job)
    assert len(data) < 300 and pickle.loads(data) == job
    again = job.checkpoint()
    assert again.function == Job(job.commands, job.folder, 1) and again.args == ()


def test_the_port_changes_with_job_and_restart():
    def port(job_id, restarts):
        place = Place("slurm", job_id, 0, 2, 0, 1, "127.0.0.1", restarts)
        return place.variables()["MASTER_PORT"]

    ports = {port(job_id, restarts) for job_id in ("1", "2", "12_3") for restarts in range(4)}
    assert len(ports) == 12 and all(1024 < int(number) < 32768 for number in ports)
    assert port("1", 0) == port("1", 0)


def test_variables_are_torchrun_s():
    place = Place("slurm", "7", 5, 8, 1, 2, "node1", 0)
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1"}
    assert expected.items() <= place.variables().items()


def test_signals_end_what_does_not_watch_them():
    with pytest.raises(job_module.Interrupted), Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(5)
    assert signals.names == ["SIGUSR2"]
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    reset_signals()


def test_signals_that_another_handler_took_are_known_too():
    with Signals() as signals:
        seen = []
        signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.01)
    assert seen and signals.received == {signal.SIGUSR2}
    reset_signals()


def test_a_swallowed_interrupt_comes_again():
    with pytest.raises(job_module.Interrupted), Signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except BaseException:
            pass
        time.sleep(10)
    reset_signals()


def reset_signals():
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)


# ---- the local executor ---------------------------------------------------------------------------------------------


def test_a_job_runs_and_says_so(stand_in, capfd):
    (state,) = submit(pretrain_words(stand_in), launch="local", follow=True)
    assert state["state"] == "done" and steps_of(stand_in) == [1, 2, 3, 4]
    said = capfd.readouterr().out
    assert "from 0 as 0 of 1" in said and "done at step 4" in said
    assert "\nsslvit pretrain data=x steps=4 --output-dir" in (stand_in / "command.txt").read_text()
    assert stat.S_IMODE((stand_in / "jobs").stat().st_mode) == 0o700
    (again,) = submit(pretrain_words(stand_in), launch="local", follow=True)
    assert again["state"] == "done" and "finished already" in capfd.readouterr().out
    assert [state["state"] for state in submit(status=stand_in)] == ["done", "done"]


@pytest.mark.parametrize(
    ("seed", "kind", "state", "text"),
    [
        (2, InputError, "wrong input", "seed 2 is wrong"),
        (75, Resumable, "stopped", "disk full"),
        (1, JobFailed, "failed", "ZeroDivisionError: seed 1 is a bug"),
    ],
)
def test_the_ending_of_a_job_becomes_ours(stand_in, seed, kind, state, text):
    with pytest.raises(kind, match=text):
        submit(pretrain_words(stand_in, 4, f"seed={seed}"), launch="local", wait=True)
    (found,) = submit(status=stand_in)
    assert found["state"] == state and text in found["message"]


def test_a_killed_job_is_started_again_while_watched(stand_in, capfd):
    """kill -9 of the task; with `--wait` nobody needs to do anything, and overwrite=true starts over only once."""
    command = ["submit", "--launch", "local", "--wait", *pretrain_words(stand_in, 30, "overwrite=true")]
    watcher = subprocess.Popen([sys.executable, "-m", "sslvit", *command])
    wait_for_steps(stand_in, 4)
    os.kill(note_of(stand_in)["pid"], signal.SIGKILL)
    assert watcher.wait(timeout=60) == 0
    assert steps_of(stand_in) == list(range(1, 31))
    assert "was interrupted; starting again" in capfd.readouterr().out
    assert [state["state"] for state in submit(status=stand_in)] == ["killed", "done"]


def test_a_job_that_meets_an_outage_is_started_again_while_watched(stand_in, capfd):
    (state,) = submit(pretrain_words(stand_in, 4, "seed=76"), launch="local", wait=True)
    assert state["state"] == "done" and steps_of(stand_in) == [1, 2, 3, 4]
    assert "was interrupted; starting again" in capfd.readouterr().out


def test_the_same_command_finds_or_resumes_the_job(stand_in, capfd):
    """The job outlives the submitting process; killed with its controller, the same command goes on."""
    (state,) = submit(pretrain_words(stand_in, 200), launch="local")
    wait_for_steps(stand_in, 4)
    (same,) = submit(pretrain_words(stand_in, 200), launch="local")
    assert same["id"] == state["id"] and same["state"] == "running"
    os.kill(int(state["id"]), signal.SIGKILL)
    assert submit(status=stand_in)[0]["state"] == "running"  # the task lives on without its controller
    os.kill(note_of(stand_in)["pid"], signal.SIGKILL)
    wait_until(lambda: submit(status=stand_in)[0]["state"] == "killed")
    (stand_in / "config.yaml").write_text((stand_in / "config.yaml").read_text().replace("steps: 200", "steps: 20"))
    (done,) = submit(pretrain_words(stand_in, 20), launch="local", wait=True)
    assert done["state"] == "done" and steps_of(stand_in)[-1] >= 20
    assert sorted(set(steps_of(stand_in))) == steps_of(stand_in)


def test_cancel_stops_and_is_not_restarted(stand_in):
    watcher = subprocess.Popen(
        [sys.executable, "-m", "sslvit", "submit", "--launch", "local", "--wait", *pretrain_words(stand_in, 400)]
    )
    wait_for_steps(stand_in, 4)
    submit(cancel=stand_in)
    assert watcher.wait(timeout=30) == 75
    (state,) = submit(status=stand_in)
    assert state["state"] == "cancelled" and "SIGTERM" in state["message"]


def test_a_time_limit_requeues_all_tasks(stand_in, tmp_path):
    """Two tasks, told by USR2 before the limit: rank 0 has the job queued again, both go on."""
    (tmp_path / "l.yaml").write_text("cluster: local\ntasks_per_node: 2\nhours: 0.05\nsignal_delay_s: 170\n")
    (state,) = submit(pretrain_words(stand_in, 240), launch=str(tmp_path / "l.yaml"), wait=True)
    assert state["state"] == "done" and note_of(stand_in)["restarts"] >= 1
    assert steps_of(stand_in) == list(range(1, 241))
    outputs = sorted((stand_in / "jobs").glob("*_log.out"))
    assert len(outputs) == 2
    for rank, file in enumerate(outputs):
        starts = re.findall(r"from (\d+) as (\d) of 2", file.read_text())
        assert len(starts) >= 2 and {start[1] for start in starts} == {str(rank)} and int(starts[1][0]) > 0


def test_one_wrong_task_takes_the_others_along(stand_in, tmp_path):
    """Rank 0 finds the folder in use; rank 1, which would count for long, must not stay behind."""
    (tmp_path / "l.yaml").write_text("cluster: local\ntasks_per_node: 2\n")
    with sslvit.run_folder.RunFolder.open(
        stand_in, "pretrain", sslvit.config.load_config(sslvit.config.PretrainConfig, None, {}), free_keys=["*"]
    ):
        began = time.monotonic()
        with pytest.raises(InputError, match="in use"):
            submit(pretrain_words(stand_in, 10_000), launch=str(tmp_path / "l.yaml"), wait=True)
    assert time.monotonic() - began < 45


def test_a_sweep_on_this_machine_is_one_job(stand_in):
    states = submit(pretrain_words(stand_in, 3), launch="local", sweep=["seed=3,2,4"], wait=False)
    assert len({state["id"] for state in states}) == 1
    wait_until(lambda: submit(status=stand_in)[0]["state"] not in ("waiting", "running"))
    assert {state["state"] for state in submit(status=stand_in)} == {"wrong input"}  # seed 2; the others still ran
    for seed in (3, 4):
        out = stand_in.with_name(f"run-seed={seed}")
        assert steps_of(out) == [1, 2, 3] and len(submit(status=out)) == 1


def test_job_folders_of_others_are_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "jobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="not yours"):
        submit(pretrain_words(tmp_path / "run"), launch="local")


# ---- Slurm, played by scripts ---------------------------------------------------------------------------------------


@pytest.fixture
def slurm(stand_in, monkeypatch):
    """sbatch takes a number, squeue says what the test wrote into `state`, scancel notes its words."""
    tools = stand_in.parent / "tools"
    tools.mkdir()
    scripts = {
        "sbatch": f"cp $1 {tools}/submitted; echo Submitted batch job 41",
        "srun": "exit 1",
        "sacct": "exit 1",
        "squeue": f"cat {tools}/state 2>/dev/null || {{ echo error: Invalid job id specified >&2; exit 1; }}",
        "scancel": f"echo $@ > {tools}/cancelled; rm {tools}/state",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    return tools


def test_slurm_states(slurm, stand_in):
    (slurm / "state").write_text("PENDING\n")
    (state,) = submit(pretrain_words(stand_in), launch="slurm")
    assert (state["id"], state["state"]) == ("41", "waiting")
    assert "--requeue" in (slurm / "submitted").read_text()
    (again,) = submit(pretrain_words(stand_in), launch="slurm")
    assert again["id"] == "41" and len(list((stand_in / "jobs").glob("*_submitted.pkl"))) == 1
    (slurm / "state").write_text("RUNNING\n")
    assert submit(status=stand_in)[0]["state"] == "running"
    note = {"state": "done", "code": 0, "message": "", "signals": [], "at": 0}
    (stand_in / "jobs" / "41_state.json").write_text(json.dumps(note))
    assert submit(status=stand_in)[0]["state"] == "running"  # Slurm's word while it has the job
    (slurm / "state").unlink()
    assert submit(status=stand_in)[0]["state"] == "done"
    (stand_in / "jobs" / "41_state.json").unlink()
    assert submit(status=stand_in)[0]["state"] == "killed"


def test_a_guest_is_queued_beside_the_run_itself(slurm, stand_in):
    (slurm / "state").write_text("RUNNING\n")
    submit(pretrain_words(stand_in), launch="slurm")
    (slurm / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 42\n")
    guest = ["evaluate", "--encoder", "r", "--train-dataset", "a", "--val-dataset", "b", "--output-dir"]
    (state,) = submit([*guest, str(stand_in)], launch="slurm")
    assert state["id"] == "42"


def test_slurm_cancel(slurm, stand_in):
    (slurm / "state").write_text("RUNNING\n")
    submit(pretrain_words(stand_in), launch="slurm")
    assert submit(cancel=stand_in)[0]["state"] == "cancelled"
    assert (slurm / "cancelled").read_text().split() == ["41"]


def test_slurm_without_an_answer_is_unknown(slurm, stand_in):
    (slurm / "state").write_text("RUNNING\n")
    submit(pretrain_words(stand_in), launch="slurm")
    (slurm / "squeue").write_text("#!/bin/sh\necho slurm_load_jobs error: Unable to contact controller >&2\nexit 1\n")
    assert submit(status=stand_in)[0]["state"] == "unknown"


def test_slurm_arrays(slurm, stand_in):
    (slurm / "state").write_text("PENDING\n")
    states = submit(pretrain_words(stand_in), launch="slurm", sweep=["seed=1,2"])
    assert [state["id"] for state in states] == ["41_0", "41_1"]
    assert {path.name for path in (stand_in / "jobs").glob("*.pkl")} == {"41_0_submitted.pkl", "41_1_submitted.pkl"}
    assert [state["id"] for state in submit(status=stand_in)] == ["41_0", "41_1"]
    (one,) = submit(status=stand_in.with_name("run-seed=2"))
    assert one["id"] == "41_1"


def test_slurm_refusals(slurm, stand_in):
    (slurm / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition >&2\nexit 1\n")
    with pytest.raises(InputError, match="invalid partition"):
        submit(pretrain_words(stand_in), launch="slurm")


def test_without_slurm_it_says_so(stand_in, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(InputError, match="no srun"):
        submit(pretrain_words(stand_in), launch="slurm")


def slurm_task(folder, command=None, **variables):
    """What srun starts on one task."""
    env = {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    env |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SUBMITIT_EXECUTOR": "slurm", **variables}
    command = command or [sys.executable, "-m", "submitit.core._submit", str(folder)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, **env}, **output)


def wait_for_steps(out, more):
    before = len(steps_of(out)) if (out / "metrics.jsonl").exists() else 0
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(steps_of(out)) >= before + more)


def test_a_slurm_task_requeues_unless_slurm_ends_the_job_itself(slurm, stand_in):
    """USR2: always. TERM: while Slurm says RUNNING; not when it is preempting or cancelling."""
    (slurm / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {slurm}/requeued\n")
    (slurm / "scontrol").chmod(0o755)
    (slurm / "state").write_text("RUNNING\n")
    submit(pretrain_words(stand_in, 60, "overwrite=true"), launch="slurm")
    jobs = stand_in / "jobs"
    cases = [(signal.SIGUSR2, "requeued"), (signal.SIGTERM, "stopped"), (signal.SIGTERM, "requeued")]
    for count, (number, name) in enumerate(cases):
        task = slurm_task(jobs, SLURM_RESTART_COUNT=str(count))
        wait_for_steps(stand_in, 4)
        (slurm / "state").write_text("COMPLETING\n" if name == "stopped" else "RUNNING\n")
        (jobs / "41_submitted.pkl.save_tmp").touch()  # left behind by a kill while submitit saved
        task.send_signal(number)
        output, _ = task.communicate(timeout=30)
        assert note_of(stand_in)["state"] == name, (note_of(stand_in), output)
        assert task.returncode == (255 if name == "requeued" else 75)
    assert (slurm / "requeued").read_text().splitlines() == ["requeue 41"] * 2
    task = slurm_task(jobs, SLURM_RESTART_COUNT="3")
    assert "from" in task.communicate(timeout=30)[0] and task.returncode == 0
    assert steps_of(stand_in) == list(range(1, 61))  # overwrite=true was for the first start
    assert note_of(stand_in)["state"] == "done"


def test_too_many_time_limits_end_the_job(slurm, stand_in, tmp_path):
    (slurm / "state").write_text("RUNNING\n")
    (tmp_path / "l.yaml").write_text("cluster: slurm\nmax_num_requeues: 0\nhours: 0.1\n")
    submit(pretrain_words(stand_in, 600), launch=str(tmp_path / "l.yaml"))
    task = slurm_task(stand_in / "jobs")
    wait_until(lambda: (stand_in / "metrics.jsonl").exists())
    task.send_signal(signal.SIGUSR2)
    task.communicate(timeout=30)
    assert note_of(stand_in)["state"] == "stopped" and "too many times" in note_of(stand_in)["message"]


def test_a_signal_during_the_start_waits_until_it_can_be_answered(slurm, stand_in):
    """The batch file holds TERM and USR2 back; the job lets them in. A later task then asks Slurm itself."""
    (slurm / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {slurm}/requeued\n")
    (slurm / "scontrol").chmod(0o755)
    (slurm / "state").write_text("RUNNING\n")
    submit(pretrain_words(stand_in, 400), launch="slurm")
    (srun,) = [line for line in (slurm / "submitted").read_text().splitlines() if line.startswith("srun")]
    held = srun[srun.index("env ") :].split(" -u ")[0]
    assert held == f"env --block-signal=USR2 --block-signal=TERM {sys.executable}"
    for rank in ("0", "1"):
        place = {"SLURM_PROCID": rank, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
        command = [*held.split(), "-m", "submitit.core._submit", str(stand_in / "jobs")]
        task = slurm_task(stand_in / "jobs", command=command, **place)
        time.sleep(0.05)
        task.send_signal(signal.SIGUSR2)
        wait_until(lambda rank=rank: (slurm / "requeued").exists() and len(calls(slurm)) == int(rank) + 1)
        if rank == "1":
            task.kill()  # it waits for Slurm's end
        task.communicate(timeout=30)
    assert calls(slurm) == ["requeue 41"] * 2
    assert not (stand_in / "metrics.jsonl").exists()


def calls(tools):
    return (tools / "requeued").read_text().splitlines()


@pytest.fixture
def batch(slurm, tmp_path, monkeypatch):
    """What the batch script does last, in a job that Slurm still lets run."""
    (slurm / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {slurm}/requeued\n")
    (slurm / "scontrol").chmod(0o755)
    (slurm / "state").write_text("RUNNING\n")
    (slurm / "requeued").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "41")

    def end(code=1, state=None, most=30, restarts=0, checkpoint=None):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        if state is not None:
            (tmp_path / "41_state.json").write_text(json.dumps({"state": state}))
        if checkpoint is not None:
            (tmp_path / "out" / "checkpoints" / f"step_{checkpoint:07d}").mkdir(parents=True)
        before = len(calls(slurm))
        answer = job_module.after_srun(code, str(tmp_path), str(tmp_path / "out"), most)
        again = len(calls(slurm)) > before
        assert answer == (0 if again else code)
        return again

    return end


@pytest.mark.parametrize(
    ("state", "again"),
    [
        ("running", True),
        ("requeued", True),
        ("lost", True),
        ("outage", True),
        ("done", False),
        ("failed", False),
        ("stopped", False),
        ("wrong input", False),
    ],
)
def test_a_job_without_a_last_word_is_queued_again(batch, state, again):
    assert batch(code=137, state=state) is again


def test_it_is_queued_again_before_its_first_word_too_and_not_when_all_is_well(batch, slurm):
    assert batch() and not batch(code=0)
    (slurm / "state").write_text("COMPLETING\n")
    assert not batch(checkpoint=1)


def test_it_is_queued_again_as_long_as_it_gets_further(batch, capsys):
    assert [batch(), batch(), batch(), batch()] == [True, True, True, False]
    assert "not queued again" in capsys.readouterr().err
    assert batch(checkpoint=5) and batch(checkpoint=10)
    assert not batch(checkpoint=15, restarts=30)
