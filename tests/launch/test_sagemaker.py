"""From launch.py to trained weights: SageMaker's SDK, moto for its API, its training toolkit on fake hosts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.checkpoint.folder import newest_complete
from megatron_atum.config.loader import load_config
from megatron_atum.errors import ConfigError, first_line
from megatron_atum.launch.own_environment import make_environment
from megatron_atum.launch.sagemaker import METRICS
from megatron_atum.training.metrics import read_metrics
from tests.faults.runs import (
    RUN,
    SMALL,
    checkpoints_of,
    data_overrides,
    events_of,
    make_data,
    metrics_of,
    numbers_of,
    run,
)
from tests.launch import sagemaker_host
from tests.launch.sagemaker_host import LAUNCH, OPT_ML, ROOT, Cloud, Host

SDK = ROOT / ".venvs" / "sagemaker"
BUCKET = "atum-test"
SHARED = OPT_ML / "input" / "data" / "atum"
STEPS, INTERRUPTED = 6, 3  # what is held waits in the step after INTERRUPTED
CONFIG = "examples/tiny/pretrain.yaml"
TRAINING = [
    *SMALL,
    f"training.steps={STEPS}",
    "training.micro_batch_size=1",
    "training.global_batch_size=4",
    "checkpoint.save_every=1",
    "checkpoint.keep=0",
    "checkpoint.asynchronous=false",
    "logging.every=1",
]
TWO_HOSTS = [
    *TRAINING,
    *data_overrides(SHARED),
    "parallel.tensor=2",
    "parallel.pipeline=2",
    "model.alpha_init=-0.5",
    "parallel.units_per_chunk=",
    f"logging.root={SHARED}/runs",
]
ONE_HOST = [
    *TRAINING,
    *data_overrides(SHARED),
    f"logging.root={OPT_ML}/checkpoints",
]
JOB = f"""\
name: chain
region: us-east-1
role: arn:aws:iam::123456789012:role/atum
image: 123456789012.dkr.ecr.us-east-1.amazonaws.com/atum:test
output: s3://{BUCKET}/out
config: {CONFIG}
max_run_h: 1
retries: 3
environment: {{NCCL_DEBUG: INFO, ATUM_DATA: {SHARED}}}
tags: {{project: atum}}
"""
TWO = (
    JOB
    + """\
instance_type: ml.p4d.24xlarge
instances: 2
subnets: [subnet-1]
security_groups: [sg-1]
channels:
  atum: {fsx: fs-0123456789abcdef1, path: /mount/atum, access: rw}
"""
)
ONE = (
    JOB
    + f"""\
instance_type: ml.g5.12xlarge
channels:
  atum: {{s3: s3://{BUCKET}/data}}
checkpoints: s3://{BUCKET}/runs/one
spot: true
max_wait_h: 2
"""
)


# Runs in the SDK's environment: several jobs cost little more than one. Then, what following a job leads to.
REQUESTS = """\
import json, logging, pathlib, sys
logging.getLogger("sagemaker.config").setLevel(logging.WARNING)
sys.path[:0] = sys.argv[1:3]
import sagemaker_request
from sagemaker_job import load_job
from sagemaker_request import ConfigError, follow, request_of

def tried(call, *arguments):
    try:
        return call(*arguments)
    except ConfigError as error:
        return str(error)

def job_of(file, *words):
    return load_job(pathlib.Path(file), words)

jobs = json.loads(sys.argv[3])
print(json.dumps([tried(lambda: request_of(job_of(*words))) for words in jobs]))

class Session:
    def __init__(self, ending):
        self.ending = ending
    def logs_for_job(self, name, wait):
        if not isinstance(self.ending, str):
            raise self.ending
    def describe_training_job(self, name):
        return {"TrainingJobStatus": self.ending, "SecondaryStatus": "MaxRuntimeExceeded"}

lost = sagemaker_request.BotoCoreError()
refused = sagemaker_request.ClientError({"Error": {"Code": "AccessDenied", "Message": "no logs"}}, "GetLogEvents")
failed = sagemaker_request.UnexpectedStatusException("it failed", ["Completed"], "Failed")
job, endings = job_of(*jobs[0]), []
for ending in ("Completed", "Stopped", failed, lost, refused, KeyboardInterrupt()):
    sagemaker_request._sdk = lambda *_: Session(ending)
    endings.append(tried(follow, job, "atum-1"))
print(json.dumps(endings))
"""


def write_jobs(folder: Path) -> dict[str, str]:
    for name, job in (("two", TWO), ("one", ONE)):
        (folder / f"{name}.yaml").write_text(job)
    return {name: str(folder / f"{name}.yaml") for name in ("two", "one")}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Their files. There is an environment with the SDK."""
    try:
        make_environment(SDK, LAUNCH.with_name("requirements.txt"))
    except ConfigError as error:
        pytest.skip(f"root: {first_line(error)}")
    return write_jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def answers(jobs: dict[str, str]) -> dict[str, Any]:
    """Of programs that run at the same time: by name, what they print, or ask."""
    one = [jobs["one"], *ONE_HOST, "job.max_wait_h=3", "job.retries=0"]
    no_name = [*one, "job.name=no_such_name"]
    fsx = "job.channels.atum={s3: null, fsx: fs-1, path: /a}"
    no_id = [*one, "job.subnets=[subnet-1]", "job.security_groups=[sg-1]", fsx]
    many = [*one, *(f"job.tags.t{number}=x" for number in range(51))]
    python = [str(SDK / "bin" / "python"), "-c", REQUESTS, str(LAUNCH.parent), str(ROOT)]
    launch = [sys.executable, str(LAUNCH), "--dry-run", "--job", jobs["two"], *TWO_HOSTS]
    commands = {
        # As launch.py shows it to somebody who has neither network nor account.
        "dry run": ["unshare", "--net", "env", "AWS_PROFILE=of nobody", *launch],
        "requests": [*python, json.dumps([one, no_name, no_id, many])],
    }
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    processes = {
        name: subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    said = {name: process.communicate() for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, said[name]
    requests, endings = map(json.loads, said["requests"][0].splitlines())
    return {
        "two": json.loads(said["dry run"][0]),
        "requests": requests,
        "endings": endings,
        "said of endings": said["requests"][1],
    }


@pytest.fixture(scope="module")
def request_of_two(answers: dict[str, Any]) -> dict[str, Any]:
    request: dict[str, Any] = answers["two"]
    return request


@pytest.fixture(scope="module")
def requests(answers: dict[str, Any]) -> list[Any]:
    """Of a spot instance; and those that are refused, with what is said."""
    return list(answers["requests"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FSx file system."""
    return make_data(tmp_path_factory.mktemp("fsx"))


@pytest.fixture(scope="module")
def cloud(jobs: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    reason = sagemaker_host.why_not()
    if reason:
        pytest.skip(f"root: {reason}")
    with sagemaker_host.cloud(tmp_path_factory.mktemp("cloud"), 2, [BUCKET]) as cloud:
        cloud.file_systems["fs-0123456789abcdef1"] = data
        yield cloud


@pytest.fixture(scope="module")
def job_of_two(cloud: Cloud, jobs: dict[str, str]) -> dict[str, Any]:
    return cloud.launch("--job", jobs["two"], *TWO_HOSTS)


def at_home(root: Path, data: Path, overrides: list[str], world_size: int) -> list[dict[str, Any]]:
    """The losses of a run that nobody interrupts, without SageMaker."""
    here = [
        override
        for override in overrides
        if not override.startswith(("data.tokenizer=", "data.sources=", "logging.root="))
    ]
    outcome = run(root, ["--config", str(ROOT / CONFIG), *here, *data_overrides(data)], world_size)
    assert set(outcome.codes) == {0}, outcome.logs
    return judged(root)


def judged(root: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr", "tokens")} for line in numbers_of(root)]


def logs(hosts: list[Host]) -> str:
    return "\n".join(host.log[-6000:] for host in hosts)


# The request ----------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_request_of_two_instances(request_of_two: dict[str, Any]) -> None:
    request = request_of_two
    assert request["ResourceConfig"] == {"InstanceType": "ml.p4d.24xlarge", "InstanceCount": 2, "VolumeSizeInGB": 100}
    assert request["Environment"] == {"NCCL_DEBUG": "INFO", "ATUM_JOB_NCCL_DEBUG": "INFO", "ATUM_DATA": str(SHARED)}
    assert request["RetryStrategy"] == {"MaximumRetryAttempts": 3}
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600}
    assert request["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    assert request["Tags"] == [{"Key": "project", "Value": "atum"}]
    (channel,) = request["InputDataConfig"]
    assert channel["DataSource"]["FileSystemDataSource"] == {
        "FileSystemId": "fs-0123456789abcdef1",
        "FileSystemType": "FSxLustre",
        "DirectoryPath": "/mount/atum",
        "FileSystemAccessMode": "rw",
    }
    assert "CheckpointConfig" not in request and "EnableManagedSpotTraining" not in request
    metrics = request["AlgorithmSpecification"]["MetricDefinitions"]
    assert {metric["Name"]: metric["Regex"] for metric in metrics} == METRICS
    values = request["HyperParameters"]
    sent = {key: json.loads(value) for key, value in values.items() if not key.startswith("sagemaker_")}
    assert sent == {"config": CONFIG, **dict(override.split("=", 1) for override in TWO_HOSTS)}
    assert values["sagemaker_torch_distributed_enabled"] == "true"
    assert len(values) - len(sent) == 7, "OF_THE_SDK of sagemaker_job.py"


@pytest.mark.root
def test_requests_of_a_spot_instance_and_of_mistakes(requests: list[Any]) -> None:
    request, pattern, length, number = requests
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 10800}
    assert request["Environment"]["PET_LOCAL_ADDR"] == "127.0.0.1" and request["Environment"]["NCCL_DEBUG"] == "INFO"
    assert request["CheckpointConfig"] == {"S3Uri": f"s3://{BUCKET}/runs/one/", "LocalPath": "/opt/ml/checkpoints"}
    (channel,) = request["InputDataConfig"]
    assert channel["InputMode"] == "FastFile"
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == f"s3://{BUCKET}/data/"
    assert "RetryStrategy" not in request and "VpcConfig" not in request
    assert "TrainingJobName='no_such_name" in pattern and "does not match" in pattern
    assert "FileSystemId, value: 4, valid min length: 11" in length and "\n" not in length
    assert "request.Tags has 52 entries, which is outside 0 to 50" in number


@pytest.mark.root
def test_following_a_job_ends_as_the_job_does(answers: dict[str, Any]) -> None:
    completed, stopped, failed, lost, refused, interrupted = answers["endings"]
    assert (completed, stopped, failed, interrupted) == (0, 1, 1, 130)
    assert lost.startswith("atum-1 cannot be followed, but the job goes on: ")
    assert refused.endswith("when calling the GetLogEvents operation: no logs")
    said = answers["said of endings"]
    assert "launch: atum-1: Stopped (MaxRuntimeExceeded)\n" in said
    assert "launch: the job goes on: atum-1\n" in said


# The chain ------------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_two_hosts_are_interrupted_and_go_on(
    cloud: Cloud, request_of_two: dict[str, Any], job_of_two: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    root, job = data / "runs", job_of_two
    environment = request_of_two["Environment"]  # moto does not keep it
    assert job["ResourceConfig"]["InstanceCount"] == 2
    held = data / "held"
    held.mkdir()
    first = cloud.run(
        job,
        gpus=2,
        environment=environment | {"HELD": str(SHARED / "held")},
        until=lambda: len(list(held.iterdir())) == 4,
    )
    assert [host.output("success") for host in first] == [None, None], logs(first)
    assert newest_complete(checkpoints_of(root)) is not None, logs(first)

    second = cloud.run(job, gpus=2, environment=environment)
    assert [(host.code, host.output("success"), host.output("failure")) for host in second] == [(0, "", None)] * 2, (
        logs(second)
    )
    (resumed,) = events_of(root, "resume")
    assert resumed["step"] == INTERRUPTED
    assert judged(root) == at_home(tmp_path / "home", data, TWO_HOSTS, 4)
    check_ranks(second, environment)
    check_metrics(second, [line for line in read_metrics(metrics_of(root)) if line["step"] > INTERRUPTED])
    with_data_here = [override.replace(str(SHARED), str(data)) for override in TWO_HOSTS]
    expected = load_config(ROOT / CONFIG, with_data_here)
    expected.logging.root = f"{SHARED}/runs"
    found = load_config(root / RUN / "config.yaml", [])
    assert found.model == expected.model and found.training == expected.training
    assert found.data.sources[0].shards == f"{SHARED}/pairs-*.tar" and found.logging == expected.logging


def check_metrics(hosts: list[Host], written: list[dict[str, Any]]) -> None:
    """What SageMaker finds in the logs is what the run has written, and no other line looks like it."""
    lines = [line for host in hosts for line in host.log.splitlines()]
    matches = [{name: re.search(regex, line) for name, regex in METRICS.items()} for line in lines]
    found = [values for one in matches if (values := {name: float(match[1]) for name, match in one.items() if match})]
    assert len(found) == len(written) == STEPS - INTERRUPTED
    precision = {"loss": {"abs": 5e-5}, "z_loss": {"abs": 5e-3}, "grad_norm": {"abs": 5e-4}, "lr": {"rel": 5e-3}}
    precision |= {"step": {"abs": 0.0}, "tokens_per_s_per_device": {"abs": 0.5}}
    for values, line in zip(found, written, strict=True):
        assert values.keys() == precision.keys()  # a CPU has no MFU
        for name, value in values.items():
            assert value == pytest.approx(line[name], **precision[name]), name


def check_ranks(hosts: list[Host], environment: dict[str, str]) -> None:
    """What the ranks were called with, and the variables they trained with."""
    ranks = {number: told for host in hosts for number, told in host.ranks().items()}
    assert sorted(ranks) == [0, 1, 2, 3]
    assert sorted(hosts[1].ranks()) == [2, 3]
    pairs = dict(override.split("=", 1) for override in TWO_HOSTS) | {"config": CONFIG}
    for told in ranks.values():
        assert told["argv"] == [word for key in sorted(pairs) for word in (f"--{key}", pairs[key])]
        assert told["code"] == "/opt/ml/code/megatron_atum/__init__.py"
        variables = told["environ"]
        assert environment.items() <= variables.items()
        assert variables["SM_CURRENT_INSTANCE_TYPE"] == "ml.p4d.24xlarge" and variables["MASTER_ADDR"] == "algo-1"
        assert variables["FI_PROVIDER"] == "efa" and variables["FI_EFA_USE_HUGE_PAGE"] == "0"
        assert variables["GLOO_SOCKET_IFNAME"] == "eth0"
        assert not {"NCCL_PROTO", "RDMAV_FORK_SAFE", "FI_EFA_USE_DEVICE_RDMA"} & variables.keys()
    assert "NCCL_PROTO=simple of the SageMaker toolkit removed" in hosts[0].log


@pytest.mark.root
def test_a_mistake_is_the_failure_reason(cloud: Cloud, requests: list[Any], job_of_two: dict[str, Any]) -> None:
    values = job_of_two["HyperParameters"] | {"training.stepz": '"3"'}  # launch.py would have refused it
    resources = job_of_two["ResourceConfig"] | {"InstanceCount": 1}
    job = job_of_two | {"HyperParameters": values, "ResourceConfig": resources}
    (host,) = cloud.run(job, gpus=1, environment=requests[0]["Environment"])
    assert host.code == 1 and host.output("success") is None, host.log
    reason = host.output("failure")
    assert reason is not None
    assert reason.startswith("ConfigError: ") and "did you mean 'training.steps'?" in reason


@pytest.mark.root
def test_one_host_goes_on_from_its_checkpoints_in_s3(
    cloud: Cloud, requests: list[Any], job_of_two: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    expected = at_home(tmp_path / "home", data, ONE_HOST, 1)
    checkpoints = requests[0]["CheckpointConfig"]["S3Uri"]
    for step in range(INTERRUPTED + 1, STEPS + 1):  # what an instance had brought to S3 until it was taken away
        shutil.rmtree(checkpoints_of(tmp_path / "home") / f"step-{step:08d}")
    cloud.bring(checkpoints, tmp_path / "home", up=True)
    # Of another run, whose name begins in the same way.
    cloud.bring(f"{checkpoints.rstrip('/')}-second/", tmp_path / "home", up=True)
    for file in [*data.glob("*.tar*"), data / "tokenizer.model"]:
        cloud.call("s3", "upload_file", Filename=str(file), Bucket=BUCKET, Key=f"data/{file.name}")

    code = "sagemaker_submit_directory"
    values = requests[0]["HyperParameters"] | {code: job_of_two["HyperParameters"][code]}
    (host,) = cloud.run(requests[0] | {"HyperParameters": values}, gpus=1, environment=requests[0]["Environment"])
    assert (host.code, host.output("success"), host.output("failure")) == (0, "", None), host.log
    assert not (host.opt_ml / "checkpoints" / "-second").exists()
    cloud.bring(checkpoints, tmp_path / "after", up=False)
    assert [event["step"] for event in events_of(tmp_path / "after", "resume")] == [INTERRUPTED]
    assert judged(tmp_path / "after") == expected
    newest = newest_complete(checkpoints_of(tmp_path / "after"))
    assert newest is not None and newest.name == f"step-{STEPS:08d}"
