"""The job scripts of examples/slurm: what they ask of srun, and when they start a job again. Slurm's programs are stubs
here; test_slurm.py runs the same scripts on a real one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_atum.config.loader import load_config
from megatron_atum.parallel.layout import ParallelLayout

ROOT = Path(__file__).parents[2]
SCRIPTS = {"pretrain.sbatch": 512, "pretrain-2nodes.sbatch": 16}  # with their numbers of ranks
# A later time than that of the file the script has touched; the clock of files has steps of milliseconds.
SAVE = 'sleep 0.05; mkdir -p "$ATUM_RUN/checkpoints/step-00000008"; touch "$ATUM_RUN/checkpoints/step-00000008/$RECORD"'
WAIT = "touch $READY; while :; do sleep 0.02; done"
STUBS = {
    "srun": 'printf "%s\\n" "$@" >"$CALLS/srun"\n. "$CALLS/ranks.sh"\n',
    "scontrol": 'echo >>"$CALLS/calls"; [ "$(wc -l <"$CALLS/calls")" -gt "$DEAF" ] || exit 1\n'
    'case $1 in show) echo "JobId=$4 JobState=$STATE PreemptTime=$PREEMPT Power=";;\n'
    '*) echo "$*" >>"$CALLS/scontrol";; esac\n',
}


@dataclass(frozen=True)
class Outcome:
    code: int
    said: str
    requeued: bool
    srun: list[str]  # its arguments; empty if it was not called


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "runs" / "mine"


def environment(tmp_path: Path, ranks: str, **changes: str) -> dict[str, str]:
    """Of a job whose ranks are a line of shell."""
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "ranks.sh").write_text(ranks)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_CPUS_PER_TASK": "12"}
    slurm |= {"STATE": "RUNNING", "PREEMPT": "None", "DEAF": "0"}  # scontrol fails so many times
    mine = {"ATUM_DATA": f"{tmp_path}/data", "ATUM_RUN": f"{tmp_path}/data/runs/mine", "ATUM_RESTARTS": "3"}
    mine |= {"ATUM_RETRIES": "2", "ATUM_PATIENCE": "0"}
    files = {"CALLS": str(tmp_path), "READY": f"{tmp_path}/ready", "RECORD": "complete.json"}
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    return {"PATH": path, **slurm, **mine, **files, **changes}


def started(environ: dict[str, str], *command: str) -> subprocess.Popen[str]:
    command = command or ("bash", "examples/slurm/pretrain-2nodes.sbatch")
    return subprocess.Popen(command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def outcome(script: subprocess.Popen[str], environ: dict[str, str]) -> Outcome:
    said, _ = script.communicate(timeout=30)
    calls = Path(environ["CALLS"])
    srun = (calls / "srun").read_text().splitlines() if (calls / "srun").exists() else []
    requeued = (calls / "scontrol").exists()
    assert not requeued or (calls / "scontrol").read_text() == "requeue 7\n"
    return Outcome(script.returncode, said, requeued, srun)


def job(tmp_path: Path, ranks: str, **changes: str) -> Outcome:
    environ = environment(tmp_path, ranks, **changes)
    return outcome(started(environ), environ)


def signalled(tmp_path: Path, ranks: str, *numbers: int, **changes: str) -> Outcome:
    """The script gets signals when the ranks are there."""
    environ = environment(tmp_path, ranks, **changes)
    script = started(environ)
    deadline = time.monotonic() + 20
    while not Path(environ["READY"]).exists():
        assert time.monotonic() < deadline and script.poll() is None
        time.sleep(0.01)
    for number in numbers:
        script.send_signal(number)
        time.sleep(0.1)
    return outcome(script, environ)


def earlier_checkpoint(run_folder: Path) -> None:
    (run_folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run_folder / "checkpoints" / "step-00000004" / "complete.json").touch()


# Started again, or not -----------------------------------------------------------------------------------------------


def test_a_run_that_is_done_is_over(tmp_path: Path) -> None:
    done = job(tmp_path, f"{SAVE}; exit 0")
    assert (done.code, done.requeued) == (0, False)
    assert "done" in done.said


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    refused = job(tmp_path, f"{SAVE}; exit 2")
    assert (refused.code, refused.requeued) == (2, False)
    assert "to be mended" in refused.said


@pytest.mark.parametrize("code", [1, 134, 137])
def test_a_failure_is_tried_again_if_it_came_further(code: int, tmp_path: Path) -> None:
    failed = job(tmp_path, f"{SAVE}; exit {code}", SLURM_RESTART_COUNT="2")
    assert failed.requeued
    assert f"exit code {code}: restart 3 of at most 3 follows, from step-00000008" in failed.said


def test_numbers_that_somebody_must_look_at_are_not_tried_again(tmp_path: Path) -> None:
    unhealthy = job(tmp_path, f"{SAVE}; exit 3")
    assert (unhealthy.code, unhealthy.requeued) == (3, False)
    assert "somebody must look" in unhealthy.said


def test_a_failure_before_any_checkpoint_is_not_tried_again(tmp_path: Path, run_folder: Path) -> None:
    failed = job(tmp_path, "exit 1")
    assert (failed.code, failed.requeued) == (1, False)
    assert f"there is no complete checkpoint; {run_folder}/logs/rank-*.log" in failed.said


def test_failures_that_come_no_further_are_tried_again_a_few_times(tmp_path: Path, run_folder: Path) -> None:
    """As after the loss of a node soon after a start. Steps further start the count anew, and so does another job."""
    earlier_checkpoint(run_folder)

    def end(restart: int, ranks: str = "exit 1") -> Outcome:
        again = tmp_path / f"{restart}-{len(list(tmp_path.iterdir()))}"
        again.mkdir()
        return job(again, ranks, ATUM_RUN=str(run_folder), SLURM_RESTART_COUNT=str(restart), ATUM_RESTARTS="9")

    assert [end(restart).requeued for restart in (0, 1, 2)] == [True, True, False]
    assert [end(0).requeued, end(1).requeued] == [True, True]
    assert end(2, f"{SAVE}; exit 1").requeued
    assert [end(restart).requeued for restart in (3, 4)] == [True, True]
    last = end(5)
    assert (last.code, last.requeued) == (1, False)
    assert f"3 starts in a row failed and completed no checkpoint; {run_folder}/logs/rank-*.log" in last.said


def test_slurm_that_does_not_answer_at_once_is_asked_again(tmp_path: Path) -> None:
    assert job(tmp_path, f"{SAVE}; exit 85", DEAF="5").requeued


def test_slurm_that_does_not_answer_is_said(tmp_path: Path) -> None:
    deaf = job(tmp_path, f"{SAVE}; exit 85", DEAF="99")
    assert (deaf.code, deaf.requeued) == (85, False)
    assert "slurmctld does not answer" in deaf.said


@pytest.mark.parametrize("folder", ["step-00000009.tmp", "step-00000002.0123abcd.old.tmp", "frozen-0123456789abcdef"])
def test_what_is_no_checkpoint_does_not_count(folder: str, tmp_path: Path) -> None:
    assert not job(tmp_path, f"{SAVE.replace('step-00000008', folder)}; exit 1").requeued


def test_a_checkpoint_without_its_record_does_not_count(tmp_path: Path) -> None:
    assert not job(tmp_path, f"{SAVE}; exit 85", RECORD="state.json").requeued


def test_so_many_restarts_and_no_more(tmp_path: Path) -> None:
    last = job(tmp_path, f"{SAVE}; exit 85", SLURM_RESTART_COUNT="3")
    assert (last.code, last.requeued) == (85, False)
    assert "this was restart 3 of ATUM_RESTARTS=3" in last.said


def test_nothing_starts_above_the_number_of_restarts(tmp_path: Path) -> None:
    refused = job(tmp_path, "exit 0", SLURM_RESTART_COUNT="4")
    assert (refused.code, refused.srun) == (1, [])
    assert "not started, as this would be restart 4 of ATUM_RESTARTS=3" in refused.said


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "TIMEOUT"])
def test_a_job_that_slurm_has_ended_is_not_started_again(state: str, tmp_path: Path) -> None:
    cancelled = signalled(tmp_path, f"trap '{SAVE}; exit 85' USR1; {WAIT}", signal.SIGUSR1, STATE=state)
    assert (cancelled.code, cancelled.requeued) == (85, False)
    assert f"Slurm has ended the job ({state}): it was cancelled" in cancelled.said


# Signals -------------------------------------------------------------------------------------------------------------


def test_usr1_is_passed_on_once_and_the_job_started_again(tmp_path: Path) -> None:
    once = f"trap 'echo told >>$CALLS/told; sleep 0.3; {SAVE}; exit 85' USR1; {WAIT}"
    stopped = signalled(tmp_path, once, signal.SIGUSR1, signal.SIGUSR1)
    assert stopped.requeued, stopped.said
    assert (tmp_path / "told").read_text() == "told\n"
    assert "exit code 85: restart 1 of at most 3 follows, from step-00000008" in stopped.said


def test_term_is_left_to_slurm_which_tells_the_ranks(tmp_path: Path) -> None:
    """A second signal would end them before they have saved."""
    ranks = f"trap 'touch $CALLS/told' TERM USR1; touch $READY; sleep 0.5; {SAVE}; exit 85"
    stopped = signalled(tmp_path, ranks, signal.SIGTERM)
    assert stopped.requeued, stopped.said
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_who_was_asked_to_stop_may_go_on_from_an_earlier_checkpoint(
    number: int, tmp_path: Path, run_folder: Path
) -> None:
    earlier_checkpoint(run_folder)
    ranks = "trap 'exit 143' USR1; touch $READY; sleep 0.5; exit 143"
    stopped = signalled(tmp_path, ranks, number)
    assert stopped.requeued, stopped.said
    assert "exit code 143: restart 1 of at most 3 follows, from step-00000004" in stopped.said


def test_a_preemption_that_only_the_ranks_were_told_of(tmp_path: Path, run_folder: Path) -> None:
    earlier_checkpoint(run_folder)
    stopped = job(tmp_path, "exit 143", PREEMPT="2026-11-26T06:27:17")
    assert stopped.requeued, stopped.said


def test_the_exit_code_is_that_of_the_ranks_not_of_a_wait_that_a_signal_ended(tmp_path: Path) -> None:
    ended = signalled(tmp_path, "trap 'exit 2' USR1; " + WAIT, signal.SIGUSR1)
    assert (ended.code, ended.requeued) == (2, False)


# What srun is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_ranks_are_started_by_srun_itself(script: str, tmp_path: Path, run_folder: Path) -> None:
    environ = environment(tmp_path, "exit 0")
    run = started(environ, "bash", f"examples/slurm/{script}", "training.steps=5", "data.sources=[{name: a b}]")
    srun = outcome(run, environ).srun
    program = srun.index(".venv/bin/python")
    options, command = srun[:program], srun[program:]
    recipe = "atum-80b" if script == "pretrain.sbatch" else "atum-9b"
    assert command == [
        ".venv/bin/python",
        "pretrain_atum.py",
        "--config",
        f"examples/{recipe}/pretrain.yaml",
        "training.steps=5",
        "data.sources=[{name: a b}]",
        f"logging.root='{run_folder.parent}'",
        "logging.run='mine'",
    ]
    assert {"--kill-on-bad-exit=0", "--cpus-per-task=12", f"--output={run_folder}/logs/rank-%t.log"} <= set(options)
    assert not [option for option in options if "container" in option or "auto-resume" in option]
    assert (run_folder / "logs").is_dir()


@pytest.mark.parametrize("name", ["2026_11_26", "007", "yes", "it's #1: [a]"])
def test_a_run_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    words = job(tmp_path, "exit 0", ATUM_RUN=f"{tmp_path}/my runs/{name}").srun[-2:]
    logging = load_config(None, words).logging
    assert (logging.root, logging.run) == (f"{tmp_path}/my runs", name)


def test_ranks_have_what_the_job_needs_and_nothing_of_another(tmp_path: Path) -> None:
    ranks = 'echo "$RANK$WORLD_SIZE$LOCAL_RANK$LOCAL_WORLD_SIZE|$(ulimit -Sn)|$(ulimit -Hn)" >"$CALLS/seen"'
    environ = environment(tmp_path, ranks, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    script = ("bash", "-c", "ulimit -Sn 512; exec bash examples/slurm/pretrain.sbatch")
    assert "--export=ALL" in outcome(started(environ, *script), environ).srun
    other, soft, hard = (tmp_path / "seen").read_text().strip().split("|")
    assert other == "" and soft == hard != "512"


def test_a_container_sees_data_run_and_code(tmp_path: Path) -> None:
    changes = {"ATUM_IMAGE": "/images/atum.sqsh", "ATUM_RUN": f"{tmp_path}/elsewhere/mine", "NCCL_DEBUG": "INFO"}
    srun = job(tmp_path, "exit 0", **changes).srun
    data, run = f"{tmp_path}/data", f"{tmp_path}/elsewhere/mine"
    assert "--container-image=/images/atum.sqsh" in srun and "python" in srun
    assert f"--container-mounts={data}:{data},{run}:{run},{ROOT}:{ROOT}" in srun
    assert f"--container-workdir={ROOT}" in srun
    (passed,) = (option for option in srun if option.startswith("--container-env="))
    assert {"ATUM_DATA", "NCCL_DEBUG", "OMP_NUM_THREADS"} <= set(passed.removeprefix("--container-env=").split(","))


@pytest.mark.root
def test_hyperpod_is_asked_to_replace_nodes(tmp_path: Path) -> None:
    environ = environment(tmp_path, "exit 0")
    there = "mount -t tmpfs none /opt && mkdir /opt/sagemaker_cluster && exec bash examples/slurm/pretrain.sbatch"
    assert "--auto-resume=1" in outcome(started(environ, "unshare", "--mount", "bash", "-c", there), environ).srun


# What stands at the top ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "ranks"), SCRIPTS.items())
def test_the_job_has_as_many_ranks_as_its_configuration_needs(script: str, ranks: int) -> None:
    text = (ROOT / "examples/slurm" / script).read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) == ranks
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    config = re.search(r"ATUM_CONFIG:-(\S+)}", text)
    assert config is not None
    assert ParallelLayout.from_config(load_config(ROOT / config[1], []), ranks).world_size == ranks


def test_the_two_scripts_differ_in_names_and_nodes_only() -> None:
    large, small = ((ROOT / "examples/slurm" / script).read_text().splitlines() for script in SCRIPTS)
    differ = [line for line, other in zip(large, small, strict=True) if line != other]
    assert all(re.search(r"ATUM-80B|nodes|atum-80b|pretrain\.sbatch", line) for line in differ)


def test_all_variables_are_described() -> None:
    text = (ROOT / "examples/slurm/pretrain.sbatch").read_text()
    described = (ROOT / "docs/slurm.md").read_text()
    names = {*re.findall(r"\b(ATUM_\w+)=", text), *re.findall(r"^#SBATCH (--[a-z-]+)", text, re.MULTILINE)}
    assert len(names) > 15
    assert [name for name in sorted(names) if name not in described] == []
