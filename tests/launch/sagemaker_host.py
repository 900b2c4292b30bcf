"""What SageMaker does with a training job, on fake nodes of this machine.

One node is the cloud: moto's server answers for S3 and CreateTrainingJob there, and launch.py is run there. The others
are hosts. On each the toolkit's real `train` runs with the files, names and environment that the platform gives a
container: /opt/ml with its configuration, the channels (an FSx file system is one folder for all hosts, a prefix of S3
a copy), and /opt/ml/checkpoints, which is brought from S3 before the start and to S3 at the end. A host has mount, host
name and process namespaces of its own; what it starts ends with it. Its host name is not the one of its configuration,
algo-N, and nobody knows its address: that of a container is the platform's choice.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

from benchmarks import namespaces
from benchmarks.namespaces import FakeNodes, fake_nodes
from megatron_atum.errors import ConfigError
from megatron_atum.launch.own_environment import make_environment

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "sagemaker" / "launch.py"
TOOLKIT = ROOT / ".venvs" / "sagemaker-toolkit"
OPT_ML = Path("/opt/ml")
HOST_NAME = "aws"
PORT = 5000
TIMEOUT_S = 300.0
AWS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_EC2_METADATA_DISABLED": "true"}
IMAGE = {"SAGEMAKER_TRAINING_MODULE": "sagemaker_pytorch_container.training:main"}  # ENV of the Dockerfile
# At its end each rank tells what it was called with and which variables it ended with. With HELD=FOLDER it says there
# that it has come to its fourth step, and goes no further.
PROBE = """\
import atexit, json, os, sys, threading, time

def tell():
    code = getattr(sys.modules.get("megatron_atum"), "__file__", None)
    with open(f"/opt/ml/output/rank-{os.environ['RANK']}.json", "w") as file:
        json.dump({"argv": sys.argv[1:], "environ": dict(os.environ), "code": code}, file)

def hold():
    while not hasattr(sys.modules.get("megatron_atum.training.engine"), "Engine"):
        time.sleep(0.05)
    engine = sys.modules["megatron_atum.training.engine"].Engine
    go_on, steps = engine.forward_backward, []

    def held(*arguments):
        steps.append(None)
        if len(steps) == 4:
            open(f"{os.environ['HELD']}/rank-{os.environ['RANK']}", "w").close()
            threading.Event().wait()
        return go_on(*arguments)

    engine.forward_backward = held

if os.path.basename(sys.argv[0]) == "pretrain_atum.py":
    atexit.register(tell)
    if "HELD" in os.environ:
        threading.Thread(target=hold, daemon=True).start()
"""


def why_not() -> str | None:
    """Why this machine cannot be a cloud, None if it can. Makes the toolkit's environment."""
    reason = namespaces.why_not()
    if reason:
        return reason
    if shutil.which("unshare") is None:
        return "needs the program unshare (Debian: apt-get install util-linux)"
    try:
        make_environment(TOOLKIT, ROOT / "tools" / "container" / "sagemaker_toolkit.txt")
    except ConfigError as error:
        return str(error).splitlines()[0]
    return None


@dataclass(frozen=True)
class Host:
    """One that has ended."""

    name: str
    opt_ml: Path
    code: int | None  # exit code of the container; negative for a signal
    log: str

    def output(self, file: str) -> str | None:
        path = self.opt_ml / "output" / file
        return path.read_text() if path.exists() else None

    def ranks(self) -> dict[int, dict[str, Any]]:
        """What the ranks told at their end, by number."""
        files = sorted((self.opt_ml / "output").glob("rank-*.json"))
        return {int(file.stem.removeprefix("rank-")): json.loads(file.read_text()) for file in files}


@dataclass(frozen=True)
class Cloud:
    """Made by `cloud`."""

    nodes: FakeNodes
    folder: Path
    inside: ThreadPoolExecutor  # one thread, which lives on the cloud's node
    file_systems: dict[str, Path] = field(default_factory=dict)  # by id

    @property
    def node(self) -> int:
        return self.nodes.count - 1

    @property
    def endpoint(self) -> str:
        return f"http://{self.nodes.address(self.node)}:{PORT}"

    def call(self, service: str, action: str, **arguments: Any) -> Any:
        """An action of the API, by the name that boto3 has for it."""

        def act() -> Any:
            client = boto3.client(
                service,
                endpoint_url=self.endpoint,
                region_name="us-east-1",
                aws_access_key_id="x",
                aws_secret_access_key="x",
            )
            return getattr(client, action)(**arguments)

        return self.inside.submit(act).result()

    def launch(self, *words: object) -> dict[str, Any]:
        """launch.py with these words. Returns the job as SageMaker has it."""
        done = subprocess.run(
            [*self.nodes.enter(self.node), sys.executable, str(LAUNCH), *map(str, words)],
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder), "AWS_ENDPOINT_URL": self.endpoint, **AWS},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        name = done.stdout.split("started ")[1].strip()
        described: dict[str, Any] = self.call("sagemaker", "describe_training_job", TrainingJobName=name)
        return described

    def run(
        self,
        job: Mapping[str, Any],
        *,
        gpus: int,
        environment: Mapping[str, str],
        until: Callable[[], bool] = lambda: False,
    ) -> list[Host]:
        """The hosts of a job, from their start to the end of the last.

        Args:
            gpus: that nvidia-smi shows on each.
            environment: the job's.
            until: all hosts are killed as soon as it says so.
        """
        count = job["ResourceConfig"]["InstanceCount"]
        folder = self.folder / f"hosts-{time.monotonic_ns()}"
        places = [self._prepare(folder / f"algo-{node + 1}", job, gpus) for node in range(count)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(self._address(node) for node in range(count)))
        processes = []
        try:
            for node, place in enumerate(places):
                processes.append(self._start(node, place, folder / "hosts", job, environment))
            deadline = time.monotonic() + TIMEOUT_S
            while any(process.poll() is None for process in processes) and not until():
                assert time.monotonic() < deadline, "\n".join(_log(place) for place in places)
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()  # of unshare; what it has started dies with it
                process.wait()
        for place in places:
            self._bring_checkpoints(place, job, up=True)
        return [
            Host(place.name, place / "opt_ml", process.returncode, _log(place))
            for place, process in zip(places, processes, strict=True)
        ]

    def _address(self, node: int) -> str:
        return f"{self.nodes.address(node)} algo-{node + 1}\n"

    def _prepare(self, place: Path, job: Mapping[str, Any], gpus: int) -> Path:
        opt_ml = place / "opt_ml"
        for name in ("model", "output/data", "input/config", "checkpoints", "code"):
            (opt_ml / name).mkdir(parents=True)
        (place / "programs").mkdir()
        nvidia_smi = place / "programs" / "nvidia-smi"
        nvidia_smi.write_text("#!/bin/sh\n" + "".join(f'echo "GPU {gpu}: stub"\n' for gpu in range(gpus)))
        nvidia_smi.chmod(0o755)
        (place / "programs" / "sitecustomize.py").write_text(PROBE)
        for name, content in _configuration(place.name, job).items():
            (opt_ml / "input" / "config" / f"{name}.json").write_text(json.dumps(content))
        for channel in job["InputDataConfig"]:
            target = opt_ml / "input" / "data" / channel["ChannelName"]
            target.mkdir(parents=True)
            if "S3DataSource" in channel["DataSource"]:
                self.bring(channel["DataSource"]["S3DataSource"]["S3Uri"], target, up=False)
        self._bring_checkpoints(place, job, up=False)
        return place

    def _start(
        self, node: int, place: Path, hosts: Path, job: Mapping[str, Any], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        opt_ml = place / "opt_ml"
        binds = [(hosts, Path("/etc/hosts")), (opt_ml, OPT_ML)]
        for channel in job["InputDataConfig"]:
            system = channel["DataSource"].get("FileSystemDataSource")
            if system:
                shared = self.file_systems[system["FileSystemId"]]
                binds.append((shared, OPT_ML / "input" / "data" / channel["ChannelName"]))
        script = "".join(f"mount --bind '{source}' '{target}' && " for source, target in binds)
        script = f"hostname {HOST_NAME} && {script}exec train"
        path = [str(place / "programs"), str(TOOLKIT / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        variables = {
            "PATH": os.pathsep.join(path),
            "HOME": str(place),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(place / "programs"),
            "OMP_NUM_THREADS": "1",
            "TRAINING_JOB_NAME": job["TrainingJobName"],
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            **AWS,
            **IMAGE,
            **environment,
        }
        spaces = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (place / "log").open("wb") as log:
            return subprocess.Popen(
                [*self.nodes.enter(node), *spaces, "sh", "-c", script],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _bring_checkpoints(self, place: Path, job: Mapping[str, Any], *, up: bool) -> None:
        checkpoints = job.get("CheckpointConfig")
        if checkpoints:
            local = place / "opt_ml" / Path(checkpoints["LocalPath"]).relative_to(OPT_ML)
            self.bring(checkpoints["S3Uri"], local, up=up)

    def bring(self, uri: str, local: Path, *, up: bool) -> None:
        """All files of a prefix in S3 to a folder, or back. As in SageMaker a prefix is a text, and not a folder."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if up:
            for file in sorted(path for path in local.rglob("*") if path.is_file()):
                key = f"{prefix}{file.relative_to(local)}"
                self.call("s3", "upload_file", Filename=str(file), Bucket=bucket, Key=key)
            return
        for entry in self.call("s3", "list_objects_v2", Bucket=bucket, Prefix=prefix).get("Contents", []):
            file = local / entry["Key"].removeprefix(prefix).lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            self.call("s3", "download_file", Bucket=bucket, Key=entry["Key"], Filename=str(file))


@contextlib.contextmanager
def cloud(folder: Path, hosts: int, buckets: Sequence[str]) -> Iterator[Cloud]:
    """A cloud with so many hosts. `why_not` must have said that it can be."""
    OPT_ML.mkdir(parents=True, exist_ok=True)  # hosts mount theirs over it; it stays, for others that do so
    with (
        _interrupted_by_sigterm(),
        fake_nodes(hosts + 1) as nodes,
        ThreadPoolExecutor(1, initializer=nodes.move_to, initargs=(hosts,)) as inside,
    ):
        here = Cloud(nodes, folder, inside)
        with _moto(here):
            for bucket in buckets:
                here.call("s3", "create_bucket", Bucket=bucket)
            yield here


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the tests as Ctrl-C does, so that no namespace is left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _moto(here: Cloud) -> Iterator[None]:
    command = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(PORT)]
    with (here.folder / "moto.log").open("wb") as log:
        server = subprocess.Popen([*here.nodes.enter(here.node), *command], stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                here.call("s3", "list_buckets")
                break
            except Exception:
                assert server.poll() is None and time.monotonic() < deadline, (here.folder / "moto.log").read_text()
                time.sleep(0.2)
        yield
    finally:
        server.kill()
        server.wait()


def _configuration(host: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """The files of /opt/ml/input/config."""
    resources = job["ResourceConfig"]
    hosts = [f"algo-{number + 1}" for number in range(resources["InstanceCount"])]
    group = {"instance_group_name": "homogeneousCluster", "instance_type": resources["InstanceType"], "hosts": hosts}
    channels = {
        channel["ChannelName"]: {
            "TrainingInputMode": channel.get("InputMode", "File"),
            "S3DistributionType": "FullyReplicated",
            "RecordWrapperType": "None",
        }
        for channel in job["InputDataConfig"]
    }
    return {
        "resourceconfig": {
            "current_host": host,
            "hosts": hosts,
            "network_interface_name": namespaces.INTERFACE,
            "current_instance_type": resources["InstanceType"],
            "current_group_name": "homogeneousCluster",
            "instance_groups": [group],
        },
        "hyperparameters": job["HyperParameters"],
        "inputdataconfig": channels,
    }


def _log(place: Path) -> str:
    path = place / "log"
    return f"--- {place.name} ---\n{path.read_text(errors='replace')}" if path.exists() else ""
