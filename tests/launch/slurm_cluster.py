"""A real Slurm on one machine, of fake nodes (benchmarks/namespaces.py).

    with slurm_cluster(folder) as slurm:
        job = slurm.submit(["--nodes=2", "examples/slurm/pretrain.sbatch", "training.steps=6"])
        slurm.wait(job, "COMPLETED")

munged, slurmctld and a slurmd for each node run in the nodes' namespaces, with a key, a socket and folders of their
own, so they disturb no other Slurm, and are gone with the nodes, jobs included. Nodes have two CPUs, and two devices
that Slurm takes for GPUs. Jobs of the partition `high` preempt those of `low`, which is the default.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from benchmarks.namespaces import FakeNodes, fake_nodes
from benchmarks.namespaces import why_not as why_no_nodes

PROGRAMS = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "scontrol": "slurm-client",
}
CPUS = 2  # of a node, the same of this machine for all nodes
GPUS = ("/dev/null", "/dev/zero")  # of a node: Slurm takes any device for one
GRACE_S = 30  # that a preempted job has
START_S = 60.0
SOON_S = 2
Job = dict[str, str]  # as `scontrol show job` tells it
T = TypeVar("T")

SLURM_CONF = """
ClusterName=atum
SlurmctldHost=n0({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName=n{i} NodeAddr={address} CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus}"
CGROUP_CONF = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores=no
ConstrainRAMSpace=no
ConstrainDevices=no
"""
# A node has a name of its own, and a file of all names.
BE_NODE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


@dataclass(frozen=True)
class SlurmCluster:
    """Made by `slurm_cluster`."""

    folder: Path
    nodes: FakeNodes

    def call(self, *command: str, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """One of Slurm's programs, on the first node. Returns what it prints.

        Raises:
            RuntimeError: it failed.
        """
        environ = {**(os.environ if environ is None else environ), "SLURM_CONF": f"{self.folder}/slurm.conf"}
        command = (*self.nodes.enter(0), *command)
        done = subprocess.run(command, env=environ, cwd=cwd, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return done.stdout

    def submit(self, arguments: list[str], environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Number of a job: `sbatch` with these arguments."""
        return self.call("sbatch", "--parsable", *arguments, environ=environ, cwd=cwd).strip()

    def job(self, number: str) -> Job:
        return dict(re.findall(r"([\w/:]+)=(\S*)", self.call("scontrol", "show", "job", "--oneliner", number)))

    def node_state(self, node: int) -> str:
        return self.call("sinfo", "--noheader", f"--nodes=n{node}", "--format=%T").splitlines()[0]

    def start_soon(self, number: str) -> None:
        """A job that is to start again would wait for two minutes. In the second in which it ended it would not start:
        slurmd takes it for the one that it was to end."""
        start = self.job(number)["StartTime"]  # Unknown once it has come
        if start != "Unknown" and datetime.fromisoformat(start) > datetime.now() + timedelta(seconds=10 * SOON_S):
            self.call("scontrol", "update", f"JobId={number}", f"StartTime=now+{SOON_S}")

    def wait(self, number: str, state: str, timeout: float = 240.0) -> Job:
        """Until a job is in a state; a job that is to start again does so without delay.

        Raises:
            AssertionError: it does not get there; with what the job printed.
        """

        def arrived() -> Job | None:
            job = self.job(number)
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                self.start_soon(number)
            assert job["JobState"] == state or job["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), job
            return job if job["JobState"] == state else None

        try:
            return until(arrived, f"job {number} {state}", timeout)
        except AssertionError as error:
            output = Path(self.job(number)["StdOut"])
            raise AssertionError(f"{error}\n{output.read_text() if output.exists() else 'no output'}") from None


def until(condition: Callable[[], T | None], what: str, timeout: float = 120.0) -> T:
    """Wait for a result that is true."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
        time.sleep(0.1)
    return result


@contextlib.contextmanager
def slurm_cluster(folder: Path, count: int = 2) -> Iterator[SlurmCluster]:
    """A Slurm that waits for jobs. Nothing of it is left at the end but the folder.

    Raises:
        RuntimeError: it does not start; `why_not` says beforehand whether it can.
    """
    with fake_nodes(count) as nodes:
        slurm = SlurmCluster(folder, nodes)
        _write_files(slurm)
        daemons = []
        try:
            daemons = [_start_munged(slurm), *_start_daemons(slurm)]
            _wait_for_nodes(slurm, daemons)
            yield slurm
        finally:
            for daemon in daemons:
                daemon.kill()
                daemon.wait()


def why_not() -> str | None:
    """Why this machine cannot have such a cluster; None if it can."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            return f"needs the program {program} (Debian: apt-get install {package})"
    return why_no_nodes()


def _write_files(slurm: SlurmCluster) -> None:
    folder, nodes = slurm.folder, slurm.nodes
    (folder / "state").mkdir(parents=True)
    lines, hosts = [], ["127.0.0.1 localhost"]
    for i in range(nodes.count):
        (folder / f"spool-n{i}").mkdir()
        lines.append(NODE.format(i=i, address=nodes.address(i), cpus=CPUS, gpus=len(GPUS)))
        hosts.append(f"{nodes.address(i)} n{i}")
    conf = SLURM_CONF.format(folder=folder, address=nodes.address(0), nodes="\n".join(lines), grace=GRACE_S)
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text(CGROUP_CONF)
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={file}\n" for file in GPUS))
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o600)


def _start_munged(slurm: SlurmCluster) -> subprocess.Popen[bytes]:
    """What lets Slurm's programs trust each other. Its socket is a file, and so is seen on all nodes."""
    kinds = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    files = [f"--{option}={slurm.folder}/munge.{ending}" for option, ending in kinds.items()]
    munged = _daemon(slurm, 0, ["munged", "--foreground", "--force", *files], "munged")
    until((slurm.folder / "munge.socket").exists, "munged", START_S)
    return munged


def _start_daemons(slurm: SlurmCluster) -> Iterator[subprocess.Popen[bytes]]:
    conf = str(slurm.folder / "slurm.conf")
    yield _daemon(slurm, 0, ["slurmctld", "-D", "-c", "-f", conf], "slurmctld")
    for i in range(slurm.nodes.count):
        yield _daemon(slurm, i, ["slurmd", "-D", "-N", f"n{i}", "-f", conf], f"slurmd-n{i}")


def _daemon(slurm: SlurmCluster, node: int, command: list[str], name: str) -> subprocess.Popen[bytes]:
    become = ["unshare", "--uts", "--mount", "bash", "-c", BE_NODE, "bash", f"n{node}", f"{slurm.folder}/hosts"]
    with (slurm.folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*slurm.nodes.enter(node), *become, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=slurm.folder,
        )


def _wait_for_nodes(slurm: SlurmCluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    def ready() -> bool:
        if any(daemon.poll() is not None for daemon in daemons):
            raise RuntimeError(f"a daemon of Slurm has ended:\n{_logs(slurm)}")
        try:
            return all(slurm.node_state(i) == "idle" for i in range(slurm.nodes.count))
        except (RuntimeError, IndexError):  # slurmctld does not answer yet
            return False

    try:
        until(ready, "idle nodes", START_S)
    except AssertionError as error:
        raise RuntimeError(f"{error}\n{_logs(slurm)}") from None


def _logs(slurm: SlurmCluster) -> str:
    """The end of each."""
    return "\n".join(f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(slurm.folder.glob("*.log")))
