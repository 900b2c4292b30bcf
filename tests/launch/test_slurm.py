"""The job script on a real Slurm of two nodes: what happens to a training there does not show in its numbers."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.conftest import data as data  # a fixture
from tests.faults.runs import RUN, SMALL, data_overrides, numbers_of
from tests.faults.runs import run as run_without_slurm
from tests.launch.held_pretrain import STEP as HELD_STEP
from tests.launch.slurm_cluster import CPUS, SOON_S, SlurmCluster, slurm_cluster, until, why_not

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 6, 2
Options = Sequence[str]  # of sbatch
TWO_RANKS = ["parallel.pipeline=2"]
FOUR_RANKS = ["parallel.tensor=2", "parallel.pipeline=2"]

pytestmark = [pytest.mark.root, pytest.mark.alone]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    reason = why_not()
    if reason:
        pytest.skip(f"root: {reason}")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@dataclass(frozen=True)
class SlurmRun:
    """A job of the script whose ranks wait in a step, until they have a signal or `go_on`."""

    slurm: SlurmCluster
    job: str
    root: Path

    def wait_until_held(self, ranks: int = 2) -> None:
        held = [self.root / "held" / f"rank-{rank}" for rank in range(ranks)]
        until(lambda: all(file.exists() for file in held), f"step {HELD_STEP} of {ranks} ranks\n{self.said()}")

    def go_on(self) -> None:
        (self.root / "held" / "go").touch()

    def said(self) -> str:
        """By the script and by all ranks."""
        logs = [self.root / "slurm.out", *sorted((self.root / RUN / "logs").glob("rank-*.log"))]
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in logs if log.exists())

    def state(self) -> str:
        return self.slurm.job(self.job)["JobState"]

    def restarts_until_completed(self) -> int:
        try:
            return int(self.slurm.wait(self.job, "COMPLETED")["Restarts"])
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None


def settings(data: Path, layout: list[str]) -> list[str]:
    steps = [f"training.steps={STEPS}", f"checkpoint.save_every={SAVE_EVERY}", "checkpoint.asynchronous=false"]
    return [*SMALL, *data_overrides(data), *steps, *layout]


def started(
    slurm: SlurmCluster, root: Path, data: Path, *, layout: list[str] = TWO_RANKS, tasks: int = 1, options: Options = ()
) -> SlurmRun:
    """The job script with another program in the place of Python, which starts the same one and holds a step."""
    (root / "held").mkdir()
    program = root / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/launch/held_pretrain.py "$@"\n')
    program.chmod(0o755)
    (root / "config.yaml").write_text("model: {preset: tiny}\n")
    return SlurmRun(slurm, submitted(slurm, root, program, settings(data, layout), tasks, options), root)


def submitted(
    slurm: SlurmCluster, root: Path, program: Path, arguments: list[str], tasks: int = 1, options: Options = ()
) -> str:
    of_the_cluster = ["--partition=low", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}"]
    of_the_cluster += [f"--cpus-per-task={CPUS // tasks}"]
    script = [*options, "--nodes=2", f"--output={root}/slurm.out", "examples/slurm/pretrain-2nodes.sbatch"]
    variables = {
        "ATUM_DATA": str(root),
        "ATUM_CONFIG": str(root / "config.yaml"),
        "ATUM_RUN": str(root / RUN),
        "ATUM_RESTARTS": "1",
        "ATUM_PYTHON": str(program),
        "HELD": str(root / "held"),
    }
    environ = {**os.environ, **variables}
    return slurm.submit([*of_the_cluster, *script, *arguments], environ=environ, cwd=ROOT)


def without_slurm(root: Path, data: Path, layout: list[str], ranks: int) -> list[dict[str, Any]]:
    outcome = run_without_slurm(root, settings(data, layout), ranks)
    assert outcome.codes == [0] * ranks, outcome.logs
    return trained(root)


def trained(root: Path) -> list[dict[str, Any]]:
    """The metrics of every step but those of the clock, and what the run without Slurm adds."""
    lines = numbers_of(root)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [{key: value for key, value in line.items() if not key.startswith("drawn/")} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return without_slurm(tmp_path_factory.mktemp("uninterrupted"), data, TWO_RANKS, 2)


def test_a_job_of_two_nodes_with_two_ranks_each(slurm: SlurmCluster, data: Path, tmp_path: Path) -> None:
    run = started(slurm, tmp_path, data, layout=FOUR_RANKS, tasks=2)
    run.go_on()
    assert run.restarts_until_completed() == 0
    assert sorted(log.name for log in (tmp_path / RUN / "logs").glob("rank-*")) == [f"rank-{n}.log" for n in range(4)]
    assert "layout: tensor 2 + sequence, pipeline 2" in run.said()
    places = [json.loads((tmp_path / "held" / f"rank-{rank}").read_text()) for rank in range(4)]
    assert places == [{"cpus": [n], "gpus": "0,1", "local_rank": str(n)} for n in (0, 1, 0, 1)]
    assert len(trained(tmp_path)) == STEPS


def test_preemption(slurm: SlurmCluster, data: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    run = started(slurm, tmp_path, data)
    run.wait_until_held()
    other = slurm.submit(["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"])
    slurm.wait(other, "COMPLETED")
    assert run.restarts_until_completed() == 1
    assert f"exit code 85: restart 1 of at most 1 follows, from step-0000000{HELD_STEP}" in run.said()
    assert trained(tmp_path) == uninterrupted


def test_a_rank_that_is_killed(
    slurm: SlurmCluster, data: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    run = started(slurm, tmp_path, data)
    run.wait_until_held()
    process_of(run.job, rank=1).send_signal(signal.SIGKILL)
    run.go_on()
    assert run.restarts_until_completed() == 1
    saved = (HELD_STEP - 1) // SAVE_EVERY * SAVE_EVERY
    assert f"exit code 137: restart 1 of at most 1 follows, from step-0000000{saved}" in run.said()
    assert "Look first at rank 1 (step 3, host n1, process" in run.said()
    assert trained(tmp_path) == uninterrupted


def process_of(job: str, rank: int) -> psutil.Process:
    """The training process of a rank, on whichever node."""

    def is_it(process: psutil.Process) -> bool:
        try:
            environ, command = process.environ(), process.cmdline()
        except psutil.Error:
            return False
        mine = environ.get("SLURM_JOB_ID") == job and environ.get("SLURM_PROCID") == str(rank)
        return mine and "SLURM_STEP_ID" in environ and any("held_pretrain" in argument for argument in command)

    found = [process for process in psutil.process_iter() if is_it(process)]
    oldest = min(found, key=lambda process: process.create_time())  # others are its children
    return oldest


def test_the_time_limit_and_a_node_that_is_drained(
    slurm: SlurmCluster, data: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    """What runs on the node goes on. Told of the limit, the job saves, and starts again when there are two nodes."""
    run = started(slurm, tmp_path, data, options=["--signal=B:USR1@90"])
    run.wait_until_held()
    hours, minutes, _ = map(int, slurm.job(run.job)["RunTime"].split(":"))
    slurm.call("scontrol", "update", f"JobId={run.job}", f"TimeLimit={60 * hours + minutes + 2}")
    slurm.call("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    try:
        assert (run.state(), slurm.node_state(1)) == ("RUNNING", "draining")
        slurm.wait(run.job, "PENDING")  # Slurm looks at the time twice a minute
        slurm.call("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")
        until(lambda: slurm.node_state(1) == "drained", "drained")
        slurm.start_soon(run.job)
        time.sleep(SOON_S + 2)  # Slurm looks for nodes once a second
        assert run.state() == "PENDING"
    finally:
        slurm.call("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert run.restarts_until_completed() == 1
    assert "SIGUSR1: the ranks save and stop" in run.said()
    assert f"exit code 85: restart 1 of at most 1 follows, from step-0000000{HELD_STEP}" in run.said()
    assert trained(tmp_path) == uninterrupted


def test_a_job_that_is_cancelled_stays_so(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Also if its ranks still save in the seconds that they have."""
    saving = tmp_path / "saving"
    step = f"{tmp_path}/{RUN}/checkpoints/step-00000001"
    save = f"sleep 2; mkdir -p {step}; touch {step}/complete.json; exit 85"
    saving.write_text(f"#!/bin/sh\ntrap '{save}' TERM\ntouch {tmp_path}/there\nwhile :; do sleep 0.1; done\n")
    saving.chmod(0o755)
    job = submitted(slurm, tmp_path, saving, [])
    until((tmp_path / "there").exists, "ranks")
    slurm.call("scancel", job)
    assert slurm.wait(job, "CANCELLED")["Restarts"] == "0"
    until(lambda: [slurm.node_state(i) for i in range(2)] == ["idle", "idle"], "free nodes")
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert "Slurm has ended the job" in (tmp_path / "slurm.out").read_text()
    assert (tmp_path / RUN / "checkpoints/step-00000001/complete.json").exists()
