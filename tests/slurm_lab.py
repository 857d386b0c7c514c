"""A real Slurm of two nodes on this machine, for the tests: loopback only, no systemd, no cgroups, no accounting.

Not a test: test_slurm.py and benchmarks/chaos.py bring it up and down. `python tests/slurm_lab.py install` installs
Debian's packages (root). Every daemon keeps to one folder and is ended by the pid it wrote there. Nodes are named by
loopback addresses, so that their names resolve without touching /etc/hosts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
NODES = ("127.0.1.1", "127.0.1.2")

CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CryptoType=crypto/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
ReturnToService=2
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    if not sys.platform.startswith("linux"):
        return "Slurm is tested on Linux only"
    if os.geteuid() != 0:
        return "the daemons need root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{absent[0]} is not installed (make test-slurm installs it on Debian)"
    addresses = {item[4][0] for item in socket.getaddrinfo(short_name(), None, socket.AF_INET)}
    if not all(address.startswith("127.") for address in addresses):
        return f"the host name {short_name()} must resolve to 127.x: the daemons keep to loopback"
    return None


def short_name() -> str:
    return socket.gethostname().partition(".")[0]


def install() -> None:
    """Debian's packages; its scripts may start no service, because those would listen on every interface."""
    if all(shutil.which(name) for name in PROGRAMS):
        return
    policy, had = Path("/usr/sbin/policy-rc.d"), Path("/usr/sbin/policy-rc.d").exists()
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        if not had:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
        command = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *PACKAGES]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    finally:
        if not had:
            policy.unlink(missing_ok=True)


class Lab:
    """Use as a context manager. `environment` is what commands need to find it."""

    def __init__(self, port: int = 17001, cpus: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-", dir="/tmp"))  # short: a socket's path has a limit
        self.port, self.cpus = port, cpus
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "etc/slurm.conf")}

    def __enter__(self) -> Lab:
        try:
            self._write()
            self._start()
            wait_until(self._idle, 60, "the nodes are not idle")
        except BaseException:
            print(self._logs(), file=sys.stderr)
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        ids = " ".join(self.say("squeue", "-h", "-o", "%A").split())
        if ids:
            self.say("scancel", "--full", *ids.split())
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not self.say("squeue", "-h").strip(), 30, "jobs do not end")
        for node in NODES:
            self._stop(f"slurmd-{node}", "slurmd")
        self._stop("slurmctld", "slurmctld")
        self._stop("munged", "munged")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self) -> None:
        self.folder.chmod(0o755)
        for name in ("etc", "log", "run", "state", "spool", "munge"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o700)
        (self.folder / "run").chmod(0o711)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        lines = [
            f"NodeName={node} NodeHostname={short_name()} NodeAddr=127.0.0.1 Port={self.port + 10 + number} "
            f"CPUs={self.cpus} State=UNKNOWN"
            for number, node in enumerate(NODES)
        ]
        text = CONFIG.format(
            host=short_name(), port=self.port, node_port=self.port + 1, folder=self.folder, nodes="\n".join(lines)
        )
        (self.folder / "etc/slurm.conf").write_text(text)

    def _start(self) -> None:
        run, log, munge = (self.folder / name for name in ("run", "log", "munge"))
        files = [f"--key-file={munge}/key", f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"]
        files += [f"--log-file={log}/munged.log", f"--seed-file={munge}/seed", "--num-threads=2"]
        self._run("munged", "--force", *files)
        self._run("slurmctld")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        self._run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """A power cut: SIGKILL to the node's daemon and to all that it started."""
        daemon = self._pid(f"slurmd-{node}", "slurmd")
        assert daemon is not None, f"{node} is not up"
        steps = [
            pid for pid, words in processes().items() if words.startswith("slurmstepd:") and self._is_on(pid, node)
        ]
        doomed = [daemon, *steps]
        for pid in steps:
            doomed += descendants(pid)
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _is_on(self, pid: int, node: str) -> bool:
        """Whether a step daemon, or a task below it, runs for that node of this lab."""
        for one in (pid, *descendants(pid)):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{one}/environ").read_bytes().decode(errors="replace")
                if f"SLURMD_NODENAME={node}\0" in text and str(self.folder) in text:
                    return True
        return False

    def say(self, *command: str, seconds: float = 20) -> str:
        """What a Slurm command prints; empty when it fails or hangs."""
        try:
            done = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout

    def _run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, timeout=30)

    def _idle(self) -> bool:
        found = self.say("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T", seconds=5).splitlines()
        for line in found:
            if line.endswith(("down", "down*", "drained")):
                self.say("scontrol", "update", f"nodename={line.split()[0]}", "state=resume")
        return sorted(found) == [f"{node} idle" for node in NODES]

    def idle(self, seconds: float = 60) -> None:
        wait_until(self._idle, seconds, "the nodes are not idle")

    def _pid(self, file: str, name: str) -> int | None:
        """The pid in a file of ours, if it still is that program."""
        try:
            pid = int((self.folder / "run" / f"{file}.pid").read_text())
            return pid if Path(f"/proc/{pid}/comm").read_text().strip() == name else None
        except (OSError, ValueError):
            return None

    def _stop(self, file: str, name: str) -> None:
        pid = self._pid(file, name)
        if pid is None:
            return
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self._pid(file, name) is None, 10, "")
            return
        os.kill(pid, signal.SIGKILL)

    def _logs(self) -> str:
        tails = [f"--- {file}\n" + file.read_text()[-1500:] for file in sorted((self.folder / "log").glob("*.log"))]
        return "\n".join(tails)


def processes() -> dict[int, str]:
    """Command lines by pid."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        below = parents.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def wait_until(condition: Callable[[], bool], seconds: float, problem: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{problem} after {seconds:.0f} s"
        time.sleep(0.2)


if __name__ == "__main__":
    if sys.argv[1:] == ["install"]:
        install()
        print(missing() or "Slurm is here")
    else:
        with Lab() as lab:
            print(lab.say("sinfo", "-N"), lab.say("srun", "-N2", "-n2", "hostname"))
