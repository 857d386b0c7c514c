"""`sslvit submit`: any verb as a job, on this machine or on Slurm, through submitit. Imports no torch.

Reads top to bottom: check the command, read the launch file, queue, note it in OUT/jobs, watch. What happens inside
the job is `job.py`. A job needs no care: its verb goes on where it was, so an interruption takes no more than being
queued again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sslvit.commands import Command, JobFailed, parse
from sslvit.config import load_config, shipped_file
from sslvit.errors import EXIT_DONE, EXIT_INPUT, EXIT_RESUMABLE, InputError, Resumable
from sslvit.run_folder import TOGETHER, process_start, write_atomically
from sslvit.verbs.job import WITHOUT_A_WORD, Job
from sslvit.verbs.plan import (
    ASSUMED,
    GPUS,
    Hardware,
    describe_plan,
    estimate,
    gpu_named,
    refuse_what_cannot_fit,
)

LIVE = ("waiting", "running", "unknown")
SLURM_ONLY = ("nodes", "cpus_per_task", "mem_gb", "partition", "account", "qos", "constraint", "sbatch", "srun_args")


@dataclass
class LaunchConfig:
    """A launch file: where jobs run and what they ask for. `None` is auto."""

    cluster: str = "local"  # local | slurm
    nodes: int = 1
    gpus_per_node: int | None = None  # auto: all of this machine (local), none (slurm)
    tasks_per_node: int | None = None  # auto: one per GPU, at least one
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    hours: float | None = None  # auto: no limit (local), 24 (slurm)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: list[str] = field(default_factory=list)  # further options, e.g. ["reservation=team", "exclusive"]
    srun_args: list[str] = field(default_factory=lambda: ["--kill-on-bad-exit=1"])
    setup: list[str] = field(default_factory=list)  # shell lines before the job, e.g. "module load cuda"
    signal_delay_s: int = 120  # how long before the time limit the job is told to save
    max_num_requeues: int = 30
    array_parallelism: int = 16  # how many jobs of a sweep run at once
    gpu: str | None = None  # e.g. h100, for the plan; auto: what `constraint` names
    utilisation: float = 0.3  # share of the GPU's peak that the plan counts on


@dataclass(frozen=True)
class Plan:
    """A command to be queued and its OUT. `base` is OUT without a sweep's suffix: a sweep's jobs are kept there."""

    words: tuple[str, ...]
    output_dir: Path
    base: Path


@dataclass(frozen=True)
class Record:
    """A queued command, kept as OUT/jobs/ID.json. `folder` holds submitit's files, `pid_start` tells a reused pid."""

    id: str
    cluster: str
    words: list[str]
    output_dir: str
    base: str
    folder: str
    host: str
    submitted: float
    pid_start: int | None = None
    num_restarts: int = 0

    @property
    def log(self) -> Path:
        """What rank 0 prints."""
        return Path(self.folder) / f"{self.id}_0_log.out"


def submit(
    verb_args: Sequence[str] = (),
    *,
    launch: str | None = None,
    sweep: Sequence[str] = (),
    dry_run: bool = False,
    wait: bool = False,
    follow: bool = False,
    status: str | Path | None = None,
    cancel: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Queue `verb_args` (as one writes them on the command line), or show or stop the jobs of a run folder.

    launch: `local`, `slurm` or a YAML file; sweep: `["optim.lr=1e-4,3e-4"]`, one job per combination. Returns one
    dict per job: id, state, output_dir, message. A command whose job is still there is not queued twice. With `wait`
    or `follow` the jobs' own ending is raised: InputError, Resumable, or JobFailed for a bug.
    """
    if status is not None:
        return _show(_records(Path(status)))
    if cancel is not None:
        return _cancel(_records(Path(cancel)))
    plans = make_plans(verb_args, sweep)
    settings = fit_to_verb(read_launch(launch or "local"), plans[0].words[0])
    if dry_run:
        print(describe(plans, settings))
        check_plans(plans, settings, show=True)
        return []
    if hardware_of(settings).gpu_known:
        check_plans(plans, settings)
    records = _start(plans, settings)
    if wait or follow:
        records = _watch(records, settings, follow)
    else:
        for record in records:
            print(f"job {record.id}: sslvit submit --status {shlex.quote(record.output_dir)}")
    return _show(records, quiet=not (wait or follow))


def submit_all(commands: Sequence[Sequence[str]], *, launch: str, base: str | Path) -> list[dict[str, Any]]:
    """Queue commands of one verb, each with an --output-dir of its own: an array on Slurm, here one after the other.

    The jobs are noted in BASE/jobs too, so `sslvit submit --status BASE` shows them all. Returns what `submit` does.
    """
    plans = [replace(plan, base=Path(base)) for words in commands for plan in make_plans(words, [])]
    return _show(_start(plans, fit_to_verb(read_launch(launch), plans[0].words[0])), quiet=True)


# ---- what shall run -------------------------------------------------------------------------------------------------


def make_plans(words: Sequence[str], sweep: Sequence[str]) -> list[Plan]:
    """One checked plan per combination of the sweep; each has its own OUT."""
    if not words or words[0] == "submit":
        raise InputError("what shall be submitted? Write sslvit submit --launch L VERB ...")
    choices = [_choices(text) for text in sweep]
    plans: list[Plan] = []
    for values in itertools.product(*choices):
        out = _output_dir(parse([*words, *values]))
        with contextlib.suppress(InputError):  # the words alone may lack the key that is swept
            out = _output_dir(parse(words))
        if not values:
            return [Plan(tuple(words), out, out)]
        base = plans[0].base if plans else out
        own = base.with_name(f"{base.name}-{re.sub(r'[^a-zA-Z0-9_.=,-]+', '-', ','.join(values))}")
        command = (*words, *values, "--output-dir", str(own))
        parse(command)
        plans.append(Plan(command, own, base))
    return plans


def _choices(text: str) -> list[str]:
    """`optim.lr=1e-4,3e-4` -> `["optim.lr=1e-4", "optim.lr=3e-4"]`; commas inside brackets stay."""
    key, equals, values = text.partition("=")
    parts = [part for part in re.findall(r"(?:[^,\[{]|\[[^\]]*\]|\{[^}]*\})+", values) if part.strip()]
    if not equals or not key or not parts:
        raise InputError(f"--sweep {text!r} is not of the form key=value,value")
    return [f"{key}={part.strip()}" for part in parts]


def _output_dir(command: Command) -> Path:
    return command.output_dir or Path("runs") / command.verb


def read_launch(name: str) -> LaunchConfig:
    """A launch file by path or shipped name, checked."""
    path = Path(name).expanduser()
    found = path if path.is_file() else shipped_file("launch", name)
    if found is None:
        raise InputError(f"no launch file {name}; give local, slurm, or a YAML file like launch/slurm.yaml")
    settings = load_config(LaunchConfig, found)
    if settings.cluster not in ("local", "slurm"):
        raise InputError(f"{found}: cluster is {settings.cluster!r}; it is local or slurm")
    if settings.cluster == "local":
        default = LaunchConfig()
        for key in SLURM_ONLY:
            if getattr(settings, key) != getattr(default, key):
                raise InputError(f"{found}: {key} means nothing on cluster: local; take it out, or use cluster: slurm")
    if settings.gpu is not None and settings.gpu not in GPUS:
        raise InputError(f"{found}: gpu is {settings.gpu!r}; known are {', '.join(GPUS)}")
    if not 0 < settings.utilisation <= 1:
        raise InputError(f"{found}: utilisation is {settings.utilisation}; it is above 0 and at most 1")
    for key in ("nodes", "tasks_per_node", "cpus_per_task", "hours", "mem_gb", "array_parallelism"):
        value = getattr(settings, key)
        if value is not None and value <= 0:
            raise InputError(f"{found}: {key} is {value}; it must be positive")
    return settings


def fit_to_verb(settings: LaunchConfig, verb: str) -> LaunchConfig:
    """Verbs that do not train together get one task and at most one GPU, however much the launch file asks for."""
    if verb in TOGETHER:
        return settings
    return replace(settings, nodes=1, tasks_per_node=1, gpus_per_node=min(1, num_gpus(settings)))


def num_tasks(settings: LaunchConfig) -> int:
    """Tasks per node: as said, else one per GPU."""
    return settings.tasks_per_node or max(1, num_gpus(settings))


def num_gpus(settings: LaunchConfig) -> int:
    """GPUs per node: as said; else on this machine all, on Slurm none."""
    if settings.cluster == "slurm":
        return settings.gpus_per_node or 0
    here = len(local_gpus())
    if (settings.gpus_per_node or 0) > here:
        raise InputError(f"gpus_per_node is {settings.gpus_per_node}, but this machine offers {here}")
    return here if settings.gpus_per_node is None else settings.gpus_per_node


def local_gpus() -> list[int]:
    """The numbers of the GPUs that CUDA_VISIBLE_DEVICES leaves, found without CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        numbers = [text.strip() for text in visible.split(",") if text.strip()]
        if not all(text.isdigit() for text in numbers):
            raise InputError(f"CUDA_VISIBLE_DEVICES={visible} names GPUs by UUID; for a local job use their numbers")
        return [int(text) for text in numbers]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return list(range(sum(line.startswith("GPU ") for line in listed.splitlines())))


# ---- describing -----------------------------------------------------------------------------------------------------


def describe(plans: Sequence[Plan], settings: LaunchConfig) -> str:
    """What would be submitted: the commands, where, and the sbatch file."""
    tasks = settings.nodes * num_tasks(settings)
    size = f"{settings.nodes} node(s) x {num_gpus(settings)} GPU(s), {tasks} task(s)"
    lines = [f"# dry run: {len(plans)} job(s) on {settings.cluster}, each {size}"]
    lines += [f"# {plan.output_dir}: sslvit {shlex.join(plan.words)}" for plan in plans]
    if settings.cluster == "slurm":
        lines.append(sbatch_file(plans, settings))
    return "\n".join(lines)


def check_plans(plans: Sequence[Plan], settings: LaunchConfig, show: bool = False) -> None:
    """Refuse what cannot fit; `show` prints what each pretraining job will take."""
    for plan in plans:
        command = parse(plan.words)
        if command.verb != "pretrain":
            continue
        found = estimate(command.arguments, hardware_of(settings))
        if show:
            print(describe_plan(found) if found else "# no plan: an encoder's sizes are known when it is opened")
        if found:
            refuse_what_cannot_fit(found)


def hardware_of(settings: LaunchConfig) -> Hardware:
    """What the plan needs to know of a launch file."""
    named = settings.gpu or gpu_named(settings.constraint)
    has_gpus = num_gpus(settings) > 0
    tasks = num_tasks(settings)
    return Hardware(
        tasks=settings.nodes * tasks,
        tasks_per_node=tasks,
        gpu=(named or ASSUMED) if has_gpus else None,
        gpu_known=bool(has_gpus and named),
        utilisation=settings.utilisation,
        mem_gb=settings.mem_gb,
    )


def sbatch_file(plans: Sequence[Plan], settings: LaunchConfig) -> str:
    """The file submitit would hand to sbatch, made by submitit itself; needs no Slurm."""
    base = plans[0].base
    executor = _slurm_executor(base.absolute() / "jobs", settings, plans, pretend=True)
    if len(plans) > 1:
        executor.parameters["map_count"] = len(plans)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def _slurm_executor(folder: Path, settings: LaunchConfig, plans: Sequence[Plan], pretend: bool = False) -> Any:
    """A submitit Slurm executor with our settings; `pretend` makes one where there is no Slurm."""
    import submitit

    class Pretended(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2

    kind = Pretended if pretend else submitit.SlurmExecutor
    try:
        executor = kind(folder=folder, max_num_timeout=settings.max_num_requeues, python=_patient_python())
    except RuntimeError:
        raise InputError("there is no srun here; log in to the cluster, or use --launch local") from None
    minutes = math.ceil(60 * (settings.hours if settings.hours is not None else 24))
    cpus = [f"--cpus-per-task={settings.cpus_per_task}"] if settings.cpus_per_task else []  # srun does not inherit it
    further: dict[str, Any] = {"requeue": True}
    for text in settings.sbatch:
        key, equals, value = text.removeprefix("--").partition("=")
        further[key] = value if equals else True
    parameters: dict[str, Any] = {
        "job_name": f"sslvit-{plans[0].base.name}",
        "time": minutes,
        "nodes": settings.nodes,
        "ntasks_per_node": num_tasks(settings),
        "gpus_per_node": num_gpus(settings) or None,
        "cpus_per_task": settings.cpus_per_task,
        "mem": f"{round(settings.mem_gb * 1024)}M" if settings.mem_gb else None,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "signal_delay_s": settings.signal_delay_s,
        "srun_args": [*settings.srun_args, *cpus],
        "setup": settings.setup or None,
        "teardown": _at_the_end(folder, plans, settings),
        "array_parallelism": settings.array_parallelism,
        "additional_parameters": further,
    }
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor


@functools.cache
def _patient_python() -> str:
    """The running Python, started with TERM and USR2 held back until the job can answer them: imports take seconds."""
    hold = "env --block-signal=USR2 --block-signal=TERM"
    try:
        known = subprocess.run([*hold.split(), "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        known = False
    python = shlex.quote(sys.executable)
    return f"{hold} {python}" if known else python  # coreutils before 8.31 cannot


def _at_the_end(folder: Path, plans: Sequence[Plan], settings: LaunchConfig) -> list[str]:
    """What the batch script does last: when the tasks are gone without a word, because a node died, say, it asks Slurm
    to queue the job again.
    """
    outs = [str(plan.output_dir.absolute()) for plan in plans]
    words = [sys.executable, "-m", "sslvit.verbs.job", "after", str(folder), str(settings.max_num_requeues), *outs]
    return [f"exec {shlex.join(words[:4])} $? {shlex.join(words[4:])}"]


# ---- queueing -------------------------------------------------------------------------------------------------------


def _start(plans: Sequence[Plan], settings: LaunchConfig, num_restarts: int = 0) -> list[Record]:
    """Queue what is not queued already; a sweep on Slurm becomes one array."""
    records, new = [], []
    for plan in plans:
        same_verb = [record for record in _records(plan.output_dir) if record.words[0] == plan.words[0]]
        live = [record for record, now in zip(same_verb, states_of(same_verb), strict=True) if now["state"] in LIVE]
        if live:
            print(f"job {live[-1].id} of {plan.output_dir} is there already")
            records.append(live[-1])
        else:
            new.append(plan)
    if not new:
        return records
    folder = _private(new[0].base.absolute() / "jobs")
    began = time.time()
    if settings.cluster == "slurm":
        ids, pid_start = _start_on_slurm(new, folder, settings, num_restarts), None
    else:
        ids = [_start_here(new, folder, settings, num_restarts)] * len(new)
        pid_start = process_start(int(ids[0]))
    for plan, job_id in zip(new, ids, strict=True):
        record = Record(
            id=job_id,
            cluster=settings.cluster,
            words=list(plan.words),
            output_dir=str(plan.output_dir.absolute()),
            base=str(plan.base.absolute()),
            folder=str(folder),
            host=socket.gethostname(),
            submitted=began,
            pid_start=pid_start,
            num_restarts=num_restarts,
        )
        _keep(record)
        records.append(record)
    return records


def _keep(record: Record) -> None:
    """OUT/jobs/ID.json; a run of a sweep is noted beside the sweep's files too."""
    text = json.dumps(asdict(record), indent=2) + "\n"
    name = f"{record.id}.json"
    write_atomically(_private(Path(record.output_dir) / "jobs") / name, text)
    if record.base != record.output_dir:
        write_atomically(Path(record.folder) / f"{Path(record.output_dir).name}+{name}", text)


def _start_on_slurm(plans: Sequence[Plan], folder: Path, settings: LaunchConfig, num_restarts: int) -> list[str]:
    import submitit

    executor = _slurm_executor(folder, settings, plans)
    try:
        jobs = executor.submit_array([Job((plan.words,), str(folder), num_restarts) for plan in plans])
    except submitit.core.utils.FailedJobError as error:
        raise InputError(f"sbatch refused: {str(error).strip() or error}") from None
    return [job.job_id for job in jobs]


def _start_here(plans: Sequence[Plan], folder: Path, settings: LaunchConfig, num_restarts: int) -> str:
    """One job in a session of its own, so that it outlives this terminal and its Ctrl-C; returns its id."""
    answer = folder / f".started-{uuid.uuid4().hex}"
    order = {
        "commands": [plan.words for plan in plans],
        "folder": str(folder),
        "restarts": num_restarts,
        "answer": str(answer),
        "tasks": num_tasks(settings),
        "gpus": local_gpus()[: num_gpus(settings)],
        "minutes": math.ceil(60 * settings.hours) if settings.hours else 60 * 24 * 365,
        "signal_delay_s": settings.signal_delay_s,
        "setup": settings.setup,
        "max_num_requeues": settings.max_num_requeues,
    }
    with open(folder / "controller.log", "a") as log:
        subprocess.run(
            [sys.executable, "-c", "from sslvit.verbs.submit import start_session; start_session()"],
            input=json.dumps(order),
            text=True,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=False,
        )
    if not answer.exists():
        raise JobFailed(f"the local job did not start; see {folder / 'controller.log'}")
    job_id = answer.read_text()
    answer.unlink()
    return job_id


def start_session() -> None:
    """In its own session: hand the job that standard input describes to submitit's local executor."""
    import submitit

    order = json.load(sys.stdin)
    executor = submitit.LocalExecutor(folder=order["folder"], max_num_timeout=order["max_num_requeues"])
    executor.update_parameters(
        tasks_per_node=order["tasks"],
        gpus_per_node=len(order["gpus"]),
        visible_gpus=order["gpus"],
        timeout_min=order["minutes"],
        signal_delay_s=order["signal_delay_s"],
        setup=order["setup"],
    )
    job = executor.submit(Job(tuple(map(tuple, order["commands"])), order["folder"], order["restarts"]))
    write_atomically(Path(order["answer"]), job.job_id)
    os._exit(0)  # without waiting for, or warning of, the controller that goes on


def _private(folder: Path) -> Path:
    """OUT/jobs, ours alone: submitit reads its pickles from there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISLNK(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
            raise InputError(f"{folder} is not yours; choose another --output-dir")
        folder.chmod(0o700)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another --output-dir") from None
    return folder


# ---- what became of it ----------------------------------------------------------------------------------------------


def _records(output_dir: Path) -> list[Record]:
    """The jobs of OUT, oldest first; with those of a sweep of it."""
    known = {item.name for item in fields(Record)}
    records = []
    for file in (output_dir / "jobs").glob("*.json"):
        if re.fullmatch(r"(.*\+)?[0-9_]+\.json", file.name):
            facts = json.loads(file.read_text())
            records.append(Record(**{key: value for key, value in facts.items() if key in known}))
    return sorted(records, key=lambda record: record.submitted)


def states_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """`state_of` of each; Slurm is asked once for all of them."""
    queue = _slurm_states([record.id for record in records if record.cluster == "slurm"])
    return [state_of(record, queue) for record in records]


def state_of(record: Record, queue: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """{"id", "state", "output_dir", "message", "code", "signals"}; `queue` is what `_slurm_states` has said of it.

    state: waiting, running, unknown (no answer from Slurm), then done, stopped (resumable), wrong input, failed,
    cancelled, or killed (gone without a word).
    """
    note = _note(record)
    state = note.get("state", "waiting")
    if record.cluster == "slurm":
        live = (_slurm_states([record.id]) if queue is None else queue)[record.id]
    else:
        live = _local_state(record, note)
    if live is not None:
        state = live
    elif state in ("waiting", *WITHOUT_A_WORD):
        state = "killed"
    if _was_cancelled(record) and live is None and state != "done":
        state = "cancelled"
    return {
        "id": record.id,
        "state": state,
        "output_dir": record.output_dir,
        "message": note.get("message", "") if live is None else "",
        "code": note.get("code") if live is None else None,
        "signals": note.get("signals", []),
    }


def _was_cancelled(record: Record) -> bool:
    try:
        return (Path(record.folder) / f"{record.id}_cancelled").stat().st_mtime >= record.submitted
    except OSError:
        return False


def _note(record: Record) -> dict[str, Any]:
    """What the job itself last said; {} before it began."""
    try:
        note = json.loads((Path(record.folder) / f"{record.id}_state.json").read_text())
    except (OSError, ValueError):
        return {}
    fresh = (
        record.cluster == "slurm" or note.get("at", 0) >= record.submitted
    )  # the number of a local job may come again
    return note if fresh else {}


def _local_state(record: Record, note: dict[str, Any]) -> str | None:
    """`running` while submitit's controller or the job's first task lives."""
    if record.host != socket.gethostname():
        return "unknown" if note.get("state") in (None, "running", "requeued") else None
    controller = (int(record.id), record.pid_start)
    task = (note.get("pid"), note.get("pid_start"))
    for pid, started in (controller, task):
        if pid and process_start(pid) is not None and process_start(pid) == started and not _is_zombie(pid):
            return "running"
    return None


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False


def _slurm_states(ids: Sequence[str]) -> dict[str, str | None]:
    """What the queue says of each job, in one question; None for those that are not in it any more."""
    if not ids:
        return {}
    words = ["squeue", "-h", "-r", "-o", "%T %i", "-j", ",".join(dict.fromkeys(ids))]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return dict.fromkeys(ids, "unknown")
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        return dict.fromkeys(ids, "unknown")
    lines = [line.split() for line in answer.stdout.splitlines() if line.strip()]
    found = {name[0] if name else ids[0]: state for state, *name in lines}
    return {name: _in_words(found.get(name)) for name in ids}


def _in_words(state: str | None) -> str | None:
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
    if state is None or state in ended:
        return None
    return "running" if state in ("RUNNING", "COMPLETING") else "waiting"


def _show(records: Sequence[Record], quiet: bool = False) -> list[dict[str, Any]]:
    """Print a line per job and return their states."""
    states = states_of(records)
    newest = {state["output_dir"]: state["id"] for state in states}
    for state in [] if quiet else states:
        out = state["output_dir"]
        progress = _progress(Path(out)) if newest[out] == state["id"] else ""
        print(
            f"job {state['id']}  {state['state']}{progress}  {out}{'  ' if state['message'] else ''}{state['message']}"
        )
    if not states:
        print("no jobs")
    return states


def _progress(output_dir: Path) -> str:
    """` at step 120`, from the last line of metrics.jsonl."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError, TypeError):
        with open(output_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
            row = json.loads(file.read().splitlines()[-1])
        stage = f" of {row['stage']}" if row.get("stage") else ""
        return f" at step {row['step']}{stage}"
    return ""


def _cancel(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Stop the jobs that are there; each saves first, and the same command would go on."""
    for record in records:
        if state_of(record)["state"] not in LIVE:
            continue
        (Path(record.folder) / f"{record.id}_cancelled").touch()
        if record.cluster == "slurm":
            subprocess.run(["scancel", record.id], check=False, timeout=60)
        else:
            _terminate(record)
    return _show(records)


def _terminate(record: Record) -> None:
    """TERM to the controller, which hands it to its tasks; to the first task where the controller is gone."""
    note = _note(record)
    for pid, started in ((int(record.id), record.pid_start), (note.get("pid"), note.get("pid_start"))):
        if pid and started is not None and process_start(pid) == started:
            os.kill(pid, signal.SIGTERM)
            return


# ---- watching -------------------------------------------------------------------------------------------------------


def _watch(records: list[Record], settings: LaunchConfig, follow: bool) -> list[Record]:
    """Wait for the end of all jobs. A local one that was interrupted is started again, as Slurm would.

    Ctrl-C ends the watching, not the jobs.
    """
    readers: dict[str, Iterator[str]] = {}
    try:
        while True:
            jobs = {record.id: record for record in records}
            states = dict(zip(jobs, states_of(list(jobs.values())), strict=True))
            if follow:
                for name, record in jobs.items():
                    _print_new(name, readers.setdefault(name, _new_text(record)), len(jobs) > 1)
            again = [name for name in jobs if _shall_restart(jobs[name], states[name], settings)]
            for name in again:
                records = _restart(records, name, settings)
            if not again and not any(state["state"] in LIVE for state in states.values()):
                break
            time.sleep(0.3 if settings.cluster == "local" else 3.0)
    except KeyboardInterrupt:
        print(f"\nno longer watching; the job goes on: sslvit submit --status {shlex.quote(records[0].output_dir)}")
        return records
    _raise_ending(jobs, states)
    return records


def _shall_restart(record: Record, state: dict[str, Any], settings: LaunchConfig) -> bool:
    """Killed or stopped by a signal; not cancelled, not out of disk, not too often."""
    interrupted = state["state"] == "killed" or (state["state"] == "stopped" and state["signals"])
    return bool(record.cluster == "local" and interrupted and record.num_restarts < settings.max_num_requeues)


def _restart(records: list[Record], name: str, settings: LaunchConfig) -> list[Record]:
    """All commands of one job again; those that are done return at once."""
    print(f"job {name} was interrupted; starting again", flush=True)
    old = [record for record in records if record.id == name]
    plans = [Plan(tuple(record.words), Path(record.output_dir), Path(record.base)) for record in old]
    return [record for record in records if record.id != name] + _start(plans, settings, old[0].num_restarts + 1)


def _new_text(record: Record) -> Iterator[str]:
    """What was added to a job's output and errors since the last look; never ends."""
    files = (record.log, record.log.with_suffix(".err"))
    positions = [0, 0]
    while True:
        text = ""
        for index, file in enumerate(files):
            with contextlib.suppress(OSError), open(file, "rb") as stream:
                stream.seek(positions[index])
                data = stream.read()
                positions[index] += len(data)
                text += data.decode(errors="replace")
        yield text


def _print_new(name: str, reader: Iterator[str], several: bool) -> None:
    text = next(reader)
    if several:
        text = "".join(f"[{name}] {line}" for line in text.splitlines(keepends=True))
    sys.stdout.write(text)
    sys.stdout.flush()


def _raise_ending(jobs: dict[str, Record], states: dict[str, dict[str, Any]]) -> None:
    """The worst ending of several jobs becomes ours."""
    for name, state in states.items():
        if state["state"] in ("failed", "killed"):
            raise JobFailed(f"job {name} {state['state']}: {state['message']} (its output: {jobs[name].folder})")
    for code, kind in ((EXIT_INPUT, InputError), (EXIT_RESUMABLE, Resumable)):
        for name, state in states.items():
            if state["code"] == code or (state["state"] == "cancelled" and code == EXIT_RESUMABLE):
                raise kind(f"job {name}: {state['message'] or state['state']}")
    assert all(state["code"] in (EXIT_DONE, None) for state in states.values()), states
