"""Variables of srun's tasks become those of torch.distributed; what is no rank is left alone."""

from __future__ import annotations

import pytest

from megatron_atum.errors import ConfigError
from megatron_atum.launch.slurm import first_host, port_of, rank_variables

# Rank 13 of 64 nodes with 8 tasks each.
TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "13",
    "SLURM_NTASKS": "512",
    "SLURM_LOCALID": "5",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_STEP_TASKS_PER_NODE": "8(x64)",
    "SLURM_STEP_NODELIST": "node[001-064]",
    "SLURM_JOB_NODELIST": "node[001-064]",
}
RANK_13 = {
    "RANK": "13",
    "WORLD_SIZE": "512",
    "LOCAL_RANK": "5",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node001",
    "MASTER_PORT": "21095",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TASK.items() if name not in names}


def test_a_task_of_srun_is_a_rank() -> None:
    assert rank_variables(TASK) == RANK_13
    assert rank_variables(without("SLURM_STEP_TASKS_PER_NODE")) == RANK_13
    assert rank_variables(without("SLURM_NTASKS_PER_NODE", "SLURM_STEP_NODELIST")) == RANK_13


def test_nodes_may_have_different_numbers_of_tasks() -> None:
    uneven = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "2(x3),8,1", "SLURM_NTASKS": "15", "SLURM_NODEID": "3"}
    assert rank_variables(uneven)["LOCAL_WORLD_SIZE"] == "8"
    assert rank_variables({**uneven, "SLURM_NODEID": "0", "SLURM_LOCALID": "1"})["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        without("SLURM_STEP_ID"),  # of a batch script
        without("SLURM_PROCID"),  # of a shell of salloc
        {**TASK, "SLURM_STEP_ID": "4294967290"},  # of one that salloc started as a step
        {**TASK, "SLURM_STEP_ID": "4294967291"},
        {**TASK, "SLURM_NTASKS": "0"},
        {**TASK, "RANK": "0"},  # a worker of torchrun, which srun started
        {**TASK, "RANK": "13", "WORLD_SIZE": "512", "LOCAL_WORLD_SIZE": "8"},
        {**TASK, "RANK": "13", "WORLD_SIZE": "4096"},
    ],
)
def test_what_is_no_rank_of_srun_is_left_alone(environ: dict[str, str]) -> None:
    assert rank_variables(environ) == {}


def test_ranks_of_a_container_s_hook_are_completed() -> None:
    """enroot's 50-slurm-pytorch.sh sets five of the six, also where the task sees one GPU only."""
    hook = {"RANK": "13", "WORLD_SIZE": "512", "LOCAL_RANK": "5", "MASTER_ADDR": "node001", "MASTER_PORT": "61234"}
    assert rank_variables({**TASK, **hook}) == {**RANK_13, "MASTER_PORT": "61234"}
    assert rank_variables({**TASK, **hook, "CUDA_VISIBLE_DEVICES": "5"})["LOCAL_RANK"] == "0"


def test_a_meeting_point_that_the_user_has_set_stays() -> None:
    assert rank_variables({**TASK, "MASTER_ADDR": "other"}) == {**RANK_13, "MASTER_ADDR": "other"}
    assert rank_variables({**TASK, "MASTER_PORT": "29500"}) == {**RANK_13, "MASTER_PORT": "29500"}
    assert rank_variables({**TASK, "MASTER_ADDR": "", "MASTER_PORT": ""}) == RANK_13
    assert rank_variables({**without("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "MASTER_ADDR": "node001"}) == RANK_13


@pytest.mark.parametrize(
    ("visible", "local_rank"),
    [("0,1,2,3,4,5,6,7", "5"), ("", "5"), ("0", "0"), ("5", "0"), ("GPU-8932f937-d72c-4106", "0"), ("0,1", "5")],
)
def test_a_task_that_sees_one_gpu_takes_that(visible: str, local_rank: str) -> None:
    found = rank_variables({**TASK, "CUDA_VISIBLE_DEVICES": visible})
    assert found == {**RANK_13, "LOCAL_RANK": local_rank}


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node[001-004,7],gpu-a[3]", "node001"),
        ("gpu-a[3],node[001-004]", "gpu-a3"),
        ("node[7,001-004]", "node7"),
        ("ip-10-1-24-7", "ip-10-1-24-7"),
        ("ip-10-1-24-[7,9-12]", "ip-10-1-24-7"),
        ("a,b", "a"),
        ("a.example.org,b[1-2]", "a.example.org"),
        ("rack[0-3]node[08-15]", "rack0node08"),
        ("n[1-2]-ib,m", "n1-ib"),
    ],
)
def test_the_first_host_of_a_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
    assert rank_variables({**TASK, "SLURM_STEP_NODELIST": nodelist})["MASTER_ADDR"] == host


@pytest.mark.parametrize("nodelist", ["", ",a", "node[1-", "[]", "node]"])
def test_a_list_without_a_host_is_refused(nodelist: str) -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        first_host(nodelist)


def test_jobs_that_may_share_a_host_have_ports_of_their_own() -> None:
    ports = [port_of(job, step, restart) for step in range(2) for restart in range(2) for job in range(60_000, 60_300)]
    assert len(set(ports)) == len(ports)
    assert set(ports) <= set(range(16384, 32768))
    assert rank_variables({**TASK, "SLURM_JOB_ID": "4712"})["MASTER_PORT"] == "21096"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"SLURM_PROCID": "512"}, "SLURM_PROCID=512, but SLURM_NTASKS=512"),
        ({"SLURM_LOCALID": "8"}, "SLURM_LOCALID=8, but there are 8 tasks on this node"),
        ({"SLURM_NTASKS": "16"}, "SLURM_STEP_TASKS_PER_NODE=8(x64) makes 512 tasks, but SLURM_NTASKS=16"),
        ({"SLURM_NODEID": "64"}, "SLURM_NODEID=64, but SLURM_STEP_TASKS_PER_NODE=8(x64) is of 64 nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8x64"}, "SLURM_STEP_TASKS_PER_NODE=8x64 cannot be read"),
        ({"SLURM_PROCID": "one"}, "SLURM_PROCID is 'one'"),
        ({"SLURM_JOB_ID": "-1"}, "SLURM_JOB_ID is '-1'"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(changes: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        rank_variables(TASK | changes)
    assert says in str(refusal.value) and "srun" in str(refusal.value)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_NODEID"])
def test_a_variable_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not set"):
        rank_variables(without(name))
