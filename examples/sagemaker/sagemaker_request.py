"""A job as SageMaker's SDK asks for it: CreateTrainingJob, and the code in S3. Runs in the SDK's environment."""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import botocore.awsrequest
import botocore.model
import sagemaker
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from sagemaker.exceptions import UnexpectedStatusException
from sagemaker.inputs import FileSystemInput, TrainingInput
from sagemaker.pytorch import PyTorch
from sagemaker_code import pack
from sagemaker_job import CHECKPOINTS, ROOT, ChannelConfig, JobConfig

from megatron_atum.errors import ConfigError
from megatron_atum.launch.sagemaker import METRICS, with_kept

HOUR_S = 3600
# Instead of the files that the SDK would look for: no reports to Amazon of what is called, and no values but the job's.
SETTINGS = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}


def submit(job: JobConfig) -> str:
    """Start a job. Returns its name.

    Raises:
        ConfigError: Amazon refused it, or could not be asked.
    """
    try:
        return _fit(job, boto3.Session(region_name=job.region))
    except (BotoCoreError, Boto3Error, ClientError) as error:
        raise ConfigError(f"the job was not started: {_one_line(error)}") from None


def follow(job: JobConfig, name: str) -> int:
    """Print the log of a job until it ends. Returns 0 if it was completed, 1 if not, 130 if Ctrl-C ends the watching.

    Raises:
        ConfigError: Amazon cannot be asked.
    """
    try:
        session = _sdk(job, boto3.Session(region_name=job.region))
        session.logs_for_job(name, wait=True)  # it raises for a job that failed, but not for one that was stopped
        described = session.describe_training_job(name)
    except UnexpectedStatusException as failure:
        print(f"launch: {failure}", file=sys.stderr)
        return 1
    except (BotoCoreError, ClientError) as error:
        raise ConfigError(f"{name} cannot be followed, but the job goes on: {_one_line(error)}") from None
    except KeyboardInterrupt:
        print(f"launch: the job goes on: {name}", file=sys.stderr)
        return 130
    if described["TrainingJobStatus"] == "Completed":
        return 0
    print(f"launch: {name}: {described['TrainingJobStatus']} ({described.get('SecondaryStatus')})", file=sys.stderr)
    return 1


def request_of(job: JobConfig) -> dict[str, Any]:
    """The body of CreateTrainingJob, without credentials or network.

    Raises:
        ConfigError: SageMaker would refuse it: something is too long, or has another form.
    """
    session = boto3.Session(aws_access_key_id="none", aws_secret_access_key="none", region_name=job.region)
    sent: list[dict[str, Any]] = []
    # Instead of sending: what boto3 has made of a call, signed and all, ends here.
    session.events.register("before-send.sagemaker.CreateTrainingJob", lambda request, **_: _take(request, sent))
    session.events.register("before-send.*", lambda request, **_: _answer(request, b""))
    logging.disable(logging.ERROR)  # what the SDK tells beside the request, or beside the refusal
    try:
        _fit(job, session)
    except BotoCoreError as error:
        raise ConfigError(f"SageMaker would refuse the job: {_one_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)
    model = session.client("sagemaker").meta.service_model.operation_model("CreateTrainingJob").input_shape
    (request,) = sent
    problems = list(_problems(model, request, "request"))
    if problems:
        raise ConfigError("SageMaker would refuse the job: " + "; ".join(problems))
    return request


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _sdk(job: JobConfig, session: boto3.Session) -> sagemaker.Session:
    bucket = job.output.removeprefix("s3://").split("/")[0]  # else the SDK would make one
    return sagemaker.Session(boto_session=session, default_bucket=bucket, sagemaker_config=SETTINGS)


def _fit(job: JobConfig, session: boto3.Session) -> str:
    name = f"{job.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    with tempfile.TemporaryDirectory(prefix="atum-code-") as folder:
        pack(ROOT, Path(job.config), Path(folder))
        channels = {channel: _input(config) for channel, config in job.channels.items()}
        _estimator(job, _sdk(job, session), folder).fit(channels or None, job_name=name, wait=False)
    return name


def _estimator(job: JobConfig, session: sagemaker.Session, code: str) -> PyTorch:
    return PyTorch(
        entry_point="pretrain_atum.py",
        source_dir=code,
        code_location=job.output,
        output_path=job.output,
        image_uri=job.image,
        role=job.role,
        instance_type=job.instance_type,
        instance_count=job.instances,
        volume_size=job.volume_gb,
        distribution={"torch_distributed": {"enabled": True}},
        hyperparameters=job.hyperparameters,
        environment=_variables(job),
        metric_definitions=[{"Name": name, "Regex": regex} for name, regex in METRICS.items()],
        checkpoint_s3_uri=_folder(job.checkpoints) if job.checkpoints else None,
        checkpoint_local_path=str(CHECKPOINTS) if job.checkpoints else None,
        max_run=round(job.max_run_h * HOUR_S),
        use_spot_instances=job.spot,
        max_wait=round(job.max_wait_h * HOUR_S) if job.max_wait_h is not None else None,
        max_retry_attempts=job.retries or None,
        subnets=job.subnets or None,
        security_group_ids=job.security_groups or None,
        tags=[{"Key": key, "Value": value} for key, value in job.tags.items()] or None,
        disable_profiler=True,
        debugger_hook_config=False,
        sagemaker_session=session,
    )


def _variables(job: JobConfig) -> dict[str, str]:
    """On one instance torchrun makes its ranks meet at the host's own name, which may have no address (`aws`)."""
    one = {"PET_LOCAL_ADDR": "127.0.0.1"} if job.instances == 1 else {}  # torchrun reads it as --local-addr
    return with_kept(one | job.environment)


def _input(channel: ChannelConfig) -> FileSystemInput | TrainingInput:
    if channel.fsx is not None:
        return FileSystemInput(channel.fsx, "FSxLustre", channel.path, channel.access)
    assert channel.s3 is not None, "checked by load_job"
    return TrainingInput(_folder(channel.s3), input_mode=channel.mode)


def _folder(uri: str) -> str:
    """SageMaker takes a prefix as it is: without the slash runs/a brings what is in runs/a-second too."""
    return uri.rstrip("/") + "/"


# Without a cloud ------------------------------------------------------------------------------------------------------


def _take(request: Any, sent: list[dict[str, Any]]) -> Any:
    sent.append(json.loads(request.body))
    return _answer(request, b'{"TrainingJobArn": "arn:aws:sagemaker:none:111122223333:training-job/none"}')


def _answer(request: Any, body: bytes) -> Any:
    response = botocore.awsrequest.AWSResponse(request.url, 200, {}, None)
    response._content = body
    return response


def _problems(shape: botocore.model.Shape, value: Any, where: str) -> Iterator[str]:
    """What breaks the limits that the API's description has for texts, lists and numbers. boto3 checks types only."""
    limits = shape.metadata
    size = value if shape.type_name in ("integer", "long", "float", "double") else None
    size = len(value) if shape.type_name in ("string", "list", "map") else size
    if size is not None and not limits.get("min", size) <= size <= limits.get("max", size):
        told = f" has {size} entries, which" if shape.type_name in ("list", "map") else f"={value!r}"
        yield f"{where}{told} is outside {limits.get('min', 0)} to {limits.get('max', 'any')}"
    if shape.type_name == "string" and "pattern" in limits and not _fits(limits["pattern"], value):
        yield f"{where}={value!r} does not match {limits['pattern']}"
    if shape.type_name == "string" and limits.get("enum") and value not in limits["enum"]:
        yield f"{where}={value!r} is none of the known values"
    for inner, part, name in _parts(shape, value):
        yield from _problems(inner, part, f"{where}.{name}")


def _parts(shape: Any, value: Any) -> Iterator[tuple[botocore.model.Shape, Any, str]]:
    if shape.type_name == "structure":
        yield from ((shape.members[name], part, name) for name, part in value.items())
    elif shape.type_name == "list":
        yield from ((shape.member, part, str(number)) for number, part in enumerate(value))
    elif shape.type_name == "map":
        for key, part in value.items():
            yield shape.key, key, f"key {key}"
            yield shape.value, part, key


def _fits(pattern: str, text: str) -> bool:
    try:
        return re.fullmatch(pattern, text, re.DOTALL) is not None
    except re.error:  # some are of another dialect
        return True
