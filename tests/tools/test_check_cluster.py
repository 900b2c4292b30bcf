"""tools/check_cluster.py as it is run: alone, by torchrun, by srun, on two nodes, and with processes that fail."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.namespaces import fake_nodes, why_not

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "megatron_atum/planning/clusters/laptop.yaml"
# Without those of a job that these tests may run in.
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SM_", "TORCHELASTIC_"))},
    **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
}
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    ENVIRONMENT.pop(_name, None)
TOOL = [sys.executable, "tools/check_cluster.py"]
# Runs the tool with a function replaced, and little patience for its steps, which a busy machine does not need for the
# start of the processes.
CHANGED = """
import os, runpy, sys, time
from megatron_atum.launch import check_exchange, check_links, check_storage
patient = check_exchange.Deadline.__init__
check_exchange.Deadline.__init__ = lambda self, seconds, late: patient(self, 4, late)
def changed(*_):
    {body}
{function} = changed
sys.argv[0] = "tools/check_cluster.py"
runpy.run_path("tools/check_cluster.py", run_name="__main__")
"""


def changed(function: str = "unused", body: str = "pass") -> list[str]:
    return [sys.executable, "-c", CHANGED.format(function=function, body=body)]


def run(command: list[str], *options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *map(str, options)],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


def found(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def statuses(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return {line["name"]: line["status"] for line in found(done)["lines"]}


def ranks(size: int, local_size: int, **changes: str) -> list[dict[str, str]]:
    """As torchrun sets them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(local_size), "MASTER_ADDR": "127.0.0.1"}
    return [
        {**common, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank % local_size), **changes}
        for rank in range(size)
    ]


def together(commands: list[list[str]], environments: list[dict[str, str]]) -> list[subprocess.CompletedProcess[str]]:
    """Of each process, with the first one's output."""
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def test_alone(tmp_path: Path) -> None:
    """As one process it starts two. A table, a verdict, and the same as JSON; nothing stays behind."""
    data, checkpoints = tmp_path / "data", tmp_path / "runs"
    for folder in (data, checkpoints):
        folder.mkdir()
    (data / "0.tar").write_bytes(os.urandom(3 << 20))
    options = ("--data", data, "--checkpoints", checkpoints, "--storage-mib", "2", "--mib", "1")
    done = run(TOOL, *options, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(done) == {
        "processes": "ok",
        "versions": "ok",
        "GPUs": "not checked",
        "GPU memory errors": "not checked",
        "Xid errors": "not checked",
        "limits": "ok",
        "EFA": "not checked",
        "clocks": "not checked",
        "NCCL's network": "not checked",
        "all-reduce inside nodes": "ok",
        "send inside nodes": "ok",
        "all-reduce between nodes": "not checked",
        "send between nodes": "not checked",
        "read data": "ok",
        "write checkpoints": "ok",
    }
    lines = done.stdout.splitlines()
    assert "processes                 ok           1 node x 2 processes, gloo" in lines
    assert lines[-2].startswith("verdict: ok; nothing that was checked is in the way of a run (not checked: GPUs, ")
    assert (found(done)["result"], found(done)["nodes"], found(done)["processes"]) == ("ok", 1, 2)
    assert found(done)["bytes_per_s"]["all-reduce inside nodes"] > 1e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "runs"]
    assert list(checkpoints.iterdir()) == []


def test_by_torchrun(tmp_path: Path) -> None:
    """Against a cluster that is out of reach, with data that is not there: what failed, and code 1."""
    fast = tmp_path / "fast.yaml"
    fast.write_text(CLUSTER.read_text().replace("bytes_per_s: 1.0e9", "bytes_per_s: 1.0e15"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*torchrun, TOOL[1]], "--cluster", fast, "--data", tmp_path / "nothing", "--mib", "1")
    assert done.returncode == 1
    result = statuses(done)
    assert (result["processes"], result["all-reduce inside nodes"], result["read data"]) == ("ok", "failed", "failed")
    assert "do not start a run before this is mended: all-reduce inside nodes, read data" in done.stdout
    assert "0% of 1e+06 GB/s of laptop" in done.stdout
    # Of a process that ends a moment later torchrun tells nothing.
    assert set(re.findall(r"exitcode *: (-?\d+)", done.stderr)) == {"1"}, done.stderr


def test_a_process_that_is_not_there() -> None:
    """Of two that srun is said to have started."""
    slurm = {
        **{"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "77", "SLURM_NODEID": "0"},
        **{"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"},
        **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_PORT": ranks(1, 1)[0]["MASTER_PORT"]},
    }
    (done,) = together([[*TOOL, "--timeout", "3"]], [slurm])
    assert done.returncode == 1
    assert "1 of 2; nothing from ranks 1" in done.stdout
    assert statuses(done)["processes"] == "failed"
    assert found(done)["nodes"] == 0 and statuses(done).keys().isdisjoint(["bandwidth", "all-reduce inside nodes"])


def test_nobody_to_report_to() -> None:
    _, environment = ranks(2, 2)
    (done,) = together([[*TOOL, "--timeout", "2"]], [environment])
    assert (done.returncode, done.stdout) == (2, "")
    assert "check_cluster: rank 1 cannot reach rank 0 at 127.0.0.1:" in done.stderr


def test_storage_that_does_not_answer(tmp_path: Path) -> None:
    """What was measured before counts."""
    (tmp_path / "0.tar").write_bytes(b"0" * 1000)
    options = ["--mib", "1", "--data", str(tmp_path)]
    hangs = changed("check_storage.read_files", "time.sleep(1000)")
    first, second = together([[*changed(), *options], [*hangs, *options]], ranks(2, 2))
    assert (first.returncode, second.returncode) == (1, 1)
    result = statuses(first)
    assert (result["send inside nodes"], result["read data"]) == ("ok", "failed")
    assert "nothing from ranks 1" in first.stdout
    assert f"stands still for 120 s in: reading {tmp_path}" in second.stderr


@pytest.mark.parametrize(
    ("body", "patience", "said", "code"),
    [
        ("time.sleep(1000)", 60, "stands still for 60 s in: send inside nodes", 1),
        ("os._exit(9)", 6, " said nothing", 9),  # so long, and a quarter more, it is waited for
        ("raise RuntimeError('broken link')", 60, "rank 1 on {host}: broken link", 1),
    ],
)
def test_a_process_that_falls_out(tmp_path: Path, body: str, patience: int, said: str, code: int) -> None:
    """In the middle of the measurements: the table has the rest, and the process's name."""
    options = ["--timeout", str(patience), "--mib", "1", "--checkpoints", str(tmp_path), "--storage-mib", "1"]
    commands = [[*changed(), *options], [*changed("check_links._shift", body), *options]]
    first, second = together(commands, ranks(2, 2))
    assert (first.returncode, second.returncode) == (1, code), first.stderr
    result = statuses(first)
    assert (result["processes"], result["bandwidth"]) == ("ok", "failed")
    (line,) = (line for line in found(first)["lines"] if line["name"] == "bandwidth")
    assert said.format(host=socket.gethostname()) in line["found"]
    assert "rank 1 on " in line["found"]


def test_wrong_use(tmp_path: Path) -> None:
    for options, said in (
        (["--cluster", "p4x"], "did you mean 'p4d'"),
        (["--data", "s3://bucket/shards"], "object stores are not measured"),
        (["--mib", "0"], "--mib must be above 0"),
    ):
        done = run(TOOL, *options)
        assert (done.returncode, done.stdout) == (2, ""), done.stdout
        assert said in done.stderr
    done = run(TOOL, RANK="0", WORLD_SIZE="2")
    assert (
        done.returncode == 2 and "RANK is set, but not LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MAST" in done.stderr
    )
    assert "--checkpoints FOLDER" in run(TOOL, "--help").stdout


@pytest.mark.root
def test_two_nodes() -> None:
    """With links of 10 MB/s, which is what is found."""
    if reason := why_not():
        pytest.skip(reason)
    options = ["--mib", "1", "--timeout", "60", "--cluster", str(CLUSTER)]
    with fake_nodes(2) as nodes:
        nodes.set_cap(10e6)
        commands = [[*nodes.enter(rank // 2), *TOOL, *options] for rank in range(4)]
        first, *others = together(commands, ranks(4, 2, MASTER_ADDR=nodes.address(0), GLOO_SOCKET_IFNAME="eth0"))
    assert [first.returncode, *(other.returncode for other in others)] == [1] * 4, first.stdout + first.stderr
    result = statuses(first)
    assert result["clocks"] == "ok"
    assert (result["all-reduce between nodes"], result["send between nodes"]) == ("failed", "failed")
    rates = found(first)["bytes_per_s"]
    assert 5e6 < rates["send between nodes"] < 11e6
    assert rates["all-reduce inside nodes"] > 20e6
    assert "2 nodes x 2 processes, gloo" in first.stdout
