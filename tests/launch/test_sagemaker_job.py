"""What can be wrong with a SageMaker job is said before anything is asked for."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_atum.errors import ConfigError

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "sagemaker"
sys.path.insert(0, str(HERE))
sagemaker_job = importlib.import_module("sagemaker_job")
launch = importlib.import_module("launch")

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
        ["job.instance_type=ml.g5.4xlarge", "job.instances=2"],
        ["ml.g5.4xlarge has no EFA", "ml.p4d.24xlarge"],
    ),
    "spot_without_wait": (EIGHTY_B, ["job.spot=true"], ["job.max_wait_h", "240 would work"]),
    "wait_without_spot": (EIGHTY_B, ["job.max_wait_h=200"], ["job.spot=true"]),
    "wait_too_short": (ONE_NODE, ["job.max_wait_h=47"], ["job.max_wait_h=47", "at least job.max_run_h=48"]),
    "no_time": (ONE_NODE, ["job.max_run_h=0"], ["job.max_run_h=0", "above 0"]),
    "retries": (EIGHTY_B, ["job.retries=31"], ["job.retries=31", "0 to 30"]),
    "role_by_name": (EIGHTY_B, ["job.role=atum"], ["job.role=atum", "arn:aws:iam::ACCOUNT:role/NAME"]),
    "region": (EIGHTY_B, ["job.region=us-east1"], ["did you mean 'us-east-1'?"]),
    "region_of_the_image": (EIGHTY_B, ["job.region=eu-west-1"], ["lies in us-east-1", "job.region=eu-west-1"]),
    "blank_in_the_image": (EIGHTY_B, ["job.image=atum :0.1"], ["'atum :0.1'", "without blanks"]),
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
    "tokenizer_elsewhere": (
        EIGHTY_B,
        ["data.tokenizer=/fsx/tokenizer.model"],
        ["data.tokenizer=/fsx/tokenizer.model", "below /opt/ml/input/data/atum"],
    ),
    "tokenizer_by_url": (
        EIGHTY_B,
        ["data.tokenizer=s3://b/tokenizer.model"],
        ["data.tokenizer=s3://b/tokenizer.model"],
    ),
    "channel_of_another_name": (ONE_NODE, ["job.environment.ATUM_DATA=/opt/ml/input/data/atum2"], ["no instance of"]),
    "out_of_the_channel": (EIGHTY_B, ["checkpoint.init=/opt/ml/input/data/atum/../x"], ["checkpoint.init=/opt"]),
    "load_elsewhere": (EIGHTY_B, ["checkpoint.load=runs/first"], ["checkpoint.load=runs/first", "megatron_atum"]),
    "shards_elsewhere": (
        EIGHTY_B,
        ["data.sources=[{name: mine, shards: /x, weight: 1}]"],
        ["data.sources.mine.shards=/x", "s3://BUCKET/..., or below"],
    ),
    "validation_elsewhere": (
        EIGHTY_B,
        ["data.validation=[{name: mine, shards: /x}]"],
        ["data.validation.mine.shards=/x"],
    ),
    "too_long": (EIGHTY_B, [f"logging.run={'x' * 2499}"], ["logging.run", "2500"]),
    "too_many": (EIGHTY_B, [f"a.b{number}=1" for number in range(93)], ["93 overrides", "a job takes 92"]),
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


@pytest.mark.parametrize(
    "name", [str(ROOT / "examples/atum-80b/pretrain.yaml"), "examples/../docs/../examples/atum-80b/pretrain.yaml"]
)
def test_the_configuration_has_the_name_that_it_has_on_the_ranks(name: str) -> None:
    job = sagemaker_job.load_job(EIGHTY_B, [f"job.config={name}"])
    assert job.hyperparameters["config"] == "examples/atum-80b/pretrain.yaml"


def test_files_may_come_by_url_and_with_the_code() -> None:
    sources = "data.sources=[{name: mine, shards: 's3://b/*.tar', weight: 1}]"
    validation = "data.validation=[{name: held_out, shards: 's3://b/held-out/manifest.json'}]"
    sagemaker_job.load_job(EIGHTY_B, [sources, validation, "data.tokenizer=examples/tiny/tokenizer.model"])


def test_as_many_hyperparameters_as_the_service_takes() -> None:
    job = sagemaker_job.load_job(EIGHTY_B, [])
    job.overrides = [f"a.b{number}=1" for number in range(92)]
    sagemaker_job._check_hyperparameters(job)
    assert len(job.hyperparameters) + sagemaker_job.OF_THE_SDK == 100


def test_limits_of_the_service_are_looked_at_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def request_of(job: Any) -> None:
        called.append("request_of")
        raise ConfigError("SageMaker would refuse the job")

    request = SimpleNamespace(request_of=request_of, submit=lambda job: called.append("submit"), follow=None)
    monkeypatch.setitem(sys.modules, "sagemaker_request", request)
    monkeypatch.setattr(sagemaker_job, "check_is_real", lambda job: None)
    options = SimpleNamespace(job=EIGHTY_B, words=[], dry_run=False, follow=False)
    with pytest.raises(ConfigError, match="would refuse"):
        launch.launch(options)
    assert called == ["request_of"]


def test_variables_of_the_user_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "5")
    with pytest.raises(ConfigError, match="STEPS"):
        sagemaker_job.load_job(EIGHTY_B, ["training.steps=${oc.env:STEPS}"])
    job = sagemaker_job.load_job(EIGHTY_B, ["training.steps=${oc.env:STEPS}", "job.environment.STEPS=7"])
    assert sagemaker_job.training_config(job).training.steps == 7 and os.environ["STEPS"] == "5"


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
