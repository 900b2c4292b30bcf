"""What can be wrong with a SageMaker job is said before anything is asked for."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_atum.errors import ConfigError
from megatron_atum.launch.own_environment import make_environment

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "sagemaker"
sys.path.insert(0, str(HERE))
sagemaker_job = importlib.import_module("sagemaker_job")

EIGHTY_B, ONE_NODE = HERE / "pretrain.yaml", HERE / "one-node.yaml"
TWO_NODES = ["job.instances=2", "job.config=examples/atum-9b/pretrain.yaml"]


@pytest.mark.parametrize("file", sorted(HERE.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_jobs_are_sound_and_are_examples(file: Path) -> None:
    job = sagemaker_job.load_job(file, [])
    with pytest.raises(ConfigError, match="is the example's; set your own"):
        sagemaker_job.check_is_real(job)


def test_command_line_comes_last() -> None:
    words = ["job.instances=32", "training.steps=5", "training.seed=-1", "training.steps=7", "job.tags.team=vision"]
    job = sagemaker_job.load_job(EIGHTY_B, words)
    assert job.instances == 32 and job.tags == {"project": "megatron-atum", "team": "vision"}
    assert job.hyperparameters == {
        "config": "examples/atum-80b/pretrain.yaml",
        "training.seed": "-1",
        "training.steps": "7",
    }
    assert sagemaker_job.training_config(job).logging.root == "/opt/ml/input/data/atum/runs"


# file, words, what the message must say
MISTAKES = {
    "unknown_key": (EIGHTY_B, ["job.instance=2"], ["job.instance=2", "did you mean 'instances'?"]),
    "unknown_channel_key": (EIGHTY_B, ["job.channels.atum.acess=ro"], ["acess", "did you mean"]),
    "wrong_type": (EIGHTY_B, ["job.instances=many"], ["job.instances=many", "instances"]),
    "no_value": (EIGHTY_B, ["job.spot"], ["job.spot", "job.key=value"]),
    "unknown_training_key": (EIGHTY_B, ["training.stepz=3"], ["did you mean 'training.steps'?"]),
    "no_override": (EIGHTY_B, ["steps=3"], ["'steps=3'", "section.key=value"]),
    "unknown_instance": (EIGHTY_B, ["job.instance_type=ml.p4de.24xlrge"], ["did you mean 'ml.p4de.24xlarge'?"]),
    "no_instance": (EIGHTY_B, ["job.instances=0"], ["job.instances=0"]),
    "no_efa": (
        ONE_NODE,
        ["job.instance_type=ml.g5.12xlarge", "job.instances=2"],
        ["ml.g5.12xlarge has no EFA", "ml.p4d.24xlarge"],
    ),
    "spot_without_wait": (EIGHTY_B, ["job.spot=true"], ["job.max_wait_h", "240 would work"]),
    "wait_without_spot": (EIGHTY_B, ["job.max_wait_h=200"], ["job.spot=true"]),
    "wait_too_short": (ONE_NODE, ["job.max_wait_h=47"], ["job.max_wait_h=47", "at least job.max_run_h=48"]),
    "no_time": (ONE_NODE, ["job.max_run_h=0"], ["job.max_run_h=0", "above 0"]),
    "retries": (EIGHTY_B, ["job.retries=31"], ["job.retries=31", "0 to 30"]),
    "role_by_name": (EIGHTY_B, ["job.role=atum"], ["job.role=atum", "arn:aws:iam::ACCOUNT:role/NAME"]),
    "not_s3": (ONE_NODE, ["job.checkpoints=/data"], ["job.checkpoints=/data", "s3://"]),
    "half_a_vpc": (EIGHTY_B, ["job.security_groups=[]"], ["job.subnets and job.security_groups"]),
    "fsx_without_vpc": (EIGHTY_B, ["job.security_groups=[]", "job.subnets=[]"], ["job.channels.atum", "VPC"]),
    "two_kinds": (EIGHTY_B, ["job.channels.atum.s3=s3://b/p"], ["job.channels.atum", "not both"]),
    "no_kind": (EIGHTY_B, ["job.channels.atum.fsx=null"], ["job.channels.atum", "set s3 or fsx"]),
    "mode": (ONE_NODE, ["job.channels.atum.mode=Pipe"], ["mode=Pipe", "FastFile or File"]),
    "write_to_s3": (ONE_NODE, ["job.channels.atum.access=rw"], ["S3 is read only"]),
    "fsx_path": (EIGHTY_B, ["job.channels.atum.path=atum"], ["path=atum", "/MOUNTNAME/FOLDER"]),
    "fsx_access": (EIGHTY_B, ["job.channels.atum.access=w"], ["access=w", "ro or rw"]),
    "layout": (EIGHTY_B, ["parallel.tensor=3"], ["parallel.tensor=3"]),
    "layout_of_the_job": (EIGHTY_B, ["job.instances=1", "job.channels.atum.access=rw"], ["needs 16 processes"]),
    "config_outside": (EIGHTY_B, ["job.config=/etc/hostname"], ["job.config=/etc/hostname", "of this checkout"]),
    "config_missing": (EIGHTY_B, ["job.config=examples/none.yaml"], ["examples/none.yaml"]),
    "hosts_share_nothing": (
        EIGHTY_B,
        ["logging.root=/opt/ml/checkpoints"],
        ["each one's own", "logging.root=/opt/ml/input/data/atum/runs"],
    ),
    "read_only_run_folder": (EIGHTY_B, ["job.channels.atum.access=ro"], ["access: rw"]),
    "lost_with_the_instance": (ONE_NODE, ["logging.root=/data"], ["lost", "logging.root=/opt/ml/checkpoints"]),
    "not_copied": (ONE_NODE, ["job.checkpoints=null"], ["lost", "job.checkpoints"]),
    "copied_in_vain": (EIGHTY_B, ["job.checkpoints=s3://b/p"], ["job.checkpoints copies /opt/ml/checkpoints"]),
    "too_long": (EIGHTY_B, [f"logging.run={'x' * 2499}"], ["logging.run", "2500"]),
    "too_many": (EIGHTY_B, [f"a.b{number}=1" for number in range(100)], ["100 overrides"]),
    "wrong_mixture": (
        EIGHTY_B,
        ["data.sources=[{name: mine, shards: /x}, {name: pmd, shards: /y}]"],
        ["mine", "weight"],
    ),
    "no_file": (HERE / "none.yaml", [], ["none.yaml"]),
    "no_job": (HERE / "requirements.txt", [], ["requirements.txt", "unknown key"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    file, words, needles = MISTAKES[name]
    with pytest.raises(ConfigError) as refusal:
        sagemaker_job.load_job(file, words)
    for needle in needles:
        assert needle in str(refusal.value)


def test_the_environment_of_the_job_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATUM_DATA", raising=False)
    sagemaker_job.load_job(EIGHTY_B, [])
    assert "ATUM_DATA" not in os.environ


def pins(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_the_sdk_is_pinned_with_all_it_needs() -> None:
    packages = pins(HERE / "requirements.txt")
    assert packages["sagemaker"].startswith("2.") and {"boto3", "botocore", "omegaconf", "PyYAML"} <= packages.keys()


def test_the_toolkit_is_the_one_of_the_image() -> None:
    packages = pins(Path(__file__).with_name("sagemaker_toolkit.txt"))
    image = dict(re.findall(r"^ARG (SAGEMAKER_\w+)=([\d.]+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert image == {
        "SAGEMAKER_TRAINING": packages["sagemaker_training"],
        "SAGEMAKER_PYTORCH_TRAINING": packages["sagemaker_pytorch_training"],
    }


# Environments of their own -------------------------------------------------------------------------------------------


def test_an_environment_is_made_once_and_anew_for_other_packages(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, requirements = tmp_path / "venvs" / "own", tmp_path / "requirements.txt"
    requirements.write_text("")
    python = make_environment(folder, requirements)
    assert (
        subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True).stdout
        == f"{folder}\n"
    )
    (folder / "mark").touch()
    make_environment(folder, requirements)
    assert (folder / "mark").exists()
    assert capfd.readouterr().err.count("making") == 1

    requirements.write_text("# others")
    with ThreadPoolExecutor(2) as pool:  # in two threads as in two processes
        again = pool.map(lambda _: make_environment(folder, requirements), range(2))
        assert list(again) == [python, python]
    assert not (folder / "mark").exists()
    (folder / "mark").touch()
    assert capfd.readouterr().err.count("making") == 1

    requirements.write_text("no-such-package-of-atum==1 @ nowhere\n")
    with pytest.raises(ConfigError, match="pip cannot install"):
        make_environment(folder, requirements)
    requirements.write_text("")
    make_environment(folder, requirements)  # what had failed does not count
    assert not (folder / "mark").exists()
