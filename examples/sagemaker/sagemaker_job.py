"""What a SageMaker job of this project is, and what can be wrong with it before it costs anything."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from botocore.loaders import create_loader
from botocore.regions import EndpointResolver
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.config.suggest import unknown
from megatron_atum.data.mixture import check_weights
from megatron_atum.errors import ConfigError, first_line
from megatron_atum.parallel.layout import ParallelLayout

ROOT = Path(__file__).resolve().parents[2]
CODE = ("pretrain_atum.py", "megatron_atum", "examples", "tools")  # what of the checkout goes along with a job
CHANNELS = PurePosixPath("/opt/ml/input/data")
CHECKPOINTS = PurePosixPath("/opt/ml/checkpoints")
EXAMPLES = ("111122223333", "amzn-s3-demo-bucket", "0123456789abcdef0")  # of Amazon's documentation, and of our files
MOST_HYPERPARAMETERS, LONGEST_VALUE = 100, 2500  # of CreateTrainingJob
OF_THE_SDK = 7  # hyperparameters that it adds, sagemaker_...
MOST_RETRIES = 30
_ECR = re.compile(r"\d{12}\.dkr\.ecr\.([a-z0-9-]+)\.")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")


@dataclass(frozen=True)
class Instance:
    gpus: int
    efa: bool


# Add your own here. EFA: "Elastic Fabric Adapter", supported instance types, in the user guide of EC2.
INSTANCES = {
    "ml.p4d.24xlarge": Instance(8, True),
    "ml.p4de.24xlarge": Instance(8, True),
    "ml.p5.48xlarge": Instance(8, True),
    "ml.p5e.48xlarge": Instance(8, True),
    "ml.p5en.48xlarge": Instance(8, True),
    "ml.p6-b200.48xlarge": Instance(8, True),
    "ml.g5.4xlarge": Instance(1, False),
    "ml.g5.12xlarge": Instance(4, True),
    "ml.g5.48xlarge": Instance(8, True),
}


@dataclass
class ChannelConfig:
    """Data that every container sees at /opt/ml/input/data/NAME: a prefix in S3, or a folder of FSx for Lustre."""

    s3: str | None = None  # s3://BUCKET/PREFIX
    mode: str = "FastFile"  # FastFile: read from S3 when asked for | File: copied before the start
    fsx: str | None = None  # fs-...
    path: str | None = None  # folder in the file system, from its mount name on
    access: str = "ro"  # ro | rw


@dataclass
class JobConfig:
    """examples/sagemaker/pretrain.yaml explains the keys."""

    name: str = "???"
    region: str = "???"
    role: str = "???"
    image: str = "???"
    instance_type: str = "???"
    output: str = "???"
    config: str = "???"
    instances: int = 1
    overrides: list[str] = field(default_factory=list)
    channels: dict[str, ChannelConfig] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    subnets: list[str] = field(default_factory=list)
    security_groups: list[str] = field(default_factory=list)
    checkpoints: str | None = None
    max_run_h: float = 24.0
    spot: bool = False
    max_wait_h: float | None = None
    retries: int = 0
    volume_gb: int = 100
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def hyperparameters(self) -> dict[str, str]:
        """Texts as they would stand on the command line: SageMaker's toolkit would change other values."""
        pairs = dict(override.split("=", 1) for override in self.overrides)
        return {"config": self.config, **pairs}


# Reading ------------------------------------------------------------------------------------------------------------


def load_job(file: Path, words: Sequence[str]) -> JobConfig:
    """A job from its file and the command line, checked.

    Args:
        words: `job.KEY=VALUE` for the job, `section.key=value` for the training.

    Raises:
        ConfigError: names the key and a value that would work.
    """
    ours = [word.removeprefix("job.") for word in words if word.startswith("job.")]
    merged: Any = OmegaConf.structured(JobConfig)
    for where, layer in [(str(file), _read(file)), *((f"job.{word}", _override(word)) for word in ours)]:
        merged = _merge(where, merged, layer)
    try:
        job = OmegaConf.to_object(merged)
    except MissingMandatoryValue as missing:
        raise ConfigError(f"{file}: {missing.full_key} is not set") from None
    assert isinstance(job, JobConfig)
    job.overrides = _last_of_each(file, [*job.overrides, *(word for word in words if not word.startswith("job."))])
    job.config = _in_checkout(job.config)
    check(job)
    return job


def _in_checkout(file: str) -> str:
    """The name of a file of this checkout as the ranks will find it, from the checkout's top on."""
    path = (ROOT / file).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else file


def _read(file: Path) -> Any:
    try:
        layer = OmegaConf.load(file)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"{file} is not a YAML mapping of the keys of a job (name, role, image, ...)")
    return layer


def _override(word: str) -> Any:
    if not re.match(r"[\w.]+=", word):
        raise ConfigError(f"cannot read 'job.{word}': it has the form job.key=value")
    try:
        return OmegaConf.from_dotlist([word])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read 'job.{word}': {first_line(error)}") from None


def _merge(where: str, base: Any, layer: Any) -> Any:
    try:
        return OmegaConf.merge(base, layer)
    except ConfigKeyError as error:
        known = [entry.name for kind in (JobConfig, ChannelConfig) for entry in fields(kind)]
        raise ConfigError(f"{where}: {unknown('key', str(error.key), known)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {error.full_key or 'value'}: {first_line(error)}") from None


def _last_of_each(file: Path, overrides: Sequence[str]) -> list[str]:
    """As the ranks will get them: a hyperparameter exists once, the last value counts, and the toolkit sorts them."""
    pairs: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", key):
            raise ConfigError(f"cannot read {override!r} (command line, or overrides in {file}): use section.key=value")
        pairs[key] = value
    return [f"{key}={pairs[key]}" for key in sorted(pairs)]


# Checking -----------------------------------------------------------------------------------------------------------


def check(job: JobConfig) -> None:
    """Raises ConfigError."""
    _check_instances(job)
    _check_money(job)
    _check_places(job)
    for name, channel in job.channels.items():
        _check_channel(name, channel, job)
    _check_hyperparameters(job)
    config = training_config(job)
    check_weights(config.data.sources, config.data.mixture)
    ParallelLayout.from_config(config, job.instances * INSTANCES[job.instance_type].gpus)
    _check_run_folder(job, config)
    _check_inputs(job, config)


def check_is_real(job: JobConfig) -> None:
    """Raises ConfigError: a value is still that of the example."""
    values = {"role": job.role, "image": job.image, "output": job.output, "checkpoints": job.checkpoints or ""}
    values |= {"subnets": " ".join(job.subnets), "security_groups": " ".join(job.security_groups)}
    values |= {f"channels.{name}": f"{channel.s3} {channel.fsx}" for name, channel in job.channels.items()}
    for key, value in values.items():
        if any(example in value for example in EXAMPLES):
            raise ConfigError(f"job.{key}={value} is the example's; set your own (--dry-run needs none)")


def training_config(job: JobConfig) -> Config:
    """The training configuration as the ranks will read it."""
    path = (ROOT / job.config).resolve()
    if not path.is_relative_to(ROOT) or not path.is_file():
        raise ConfigError(f"job.config={job.config}: must be a file of this checkout, which goes along with the job")
    with _environment(job.environment):
        return load_config(path, job.overrides)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """The files of configuration may name variables: the job's, not those of whoever starts it."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _check_instances(job: JobConfig) -> None:
    instance = INSTANCES.get(job.instance_type)
    if instance is None:
        known = unknown("instance type", job.instance_type, INSTANCES)
        raise ConfigError(f"job.instance_type: {known} (INSTANCES in {Path(__file__).name} lists them; add yours)")
    if job.instances < 1:
        raise ConfigError(f"job.instances={job.instances}: must be 1 or more")
    if job.instances > 1 and not instance.efa:
        with_efa = ", ".join(name for name, other in INSTANCES.items() if other.efa)
        raise ConfigError(
            f"job.instance_type={job.instance_type} has no EFA, and {job.instances} instances would talk over TCP; use "
            f"job.instances=1 or one of {with_efa}"
        )


def _check_money(job: JobConfig) -> None:
    if not job.max_run_h > 0:
        raise ConfigError(f"job.max_run_h={job.max_run_h}: must be above 0")
    if job.spot and job.max_wait_h is None:
        raise ConfigError(
            f"job.spot=true needs job.max_wait_h: the hours until the job is given up, waiting for capacity included; "
            f"{2 * job.max_run_h:g} would work"
        )
    if job.max_wait_h is not None and not job.spot:
        raise ConfigError(f"job.max_wait_h={job.max_wait_h:g} belongs to job.spot=true; leave it out")
    if job.max_wait_h is not None and job.max_wait_h < job.max_run_h:
        raise ConfigError(
            f"job.max_wait_h={job.max_wait_h:g} counts the running too: it must be at least "
            f"job.max_run_h={job.max_run_h:g}"
        )
    if not 0 <= job.retries <= MOST_RETRIES:
        raise ConfigError(f"job.retries={job.retries}: must be from 0 to {MOST_RETRIES}")


def _check_places(job: JobConfig) -> None:
    if job.region not in _regions():
        raise ConfigError(f"job.region: {unknown('region', job.region, _regions())}")
    if not re.fullmatch(r"\S+", job.image):
        raise ConfigError(f"job.image={job.image!r}: must be the name of an image, without blanks")
    registry = _ECR.match(job.image)
    if registry and registry[1] != job.region:
        raise ConfigError(
            f"job.image={job.image} lies in {registry[1]}, and the job runs in job.region={job.region}: push the image "
            "to a repository there"
        )
    if not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/.+", job.role):
        raise ConfigError(f"job.role={job.role}: must be the role's ARN, arn:aws:iam::ACCOUNT:role/NAME")
    for key in ("output", "checkpoints"):
        place = getattr(job, key)
        if place is not None and not place.startswith("s3://"):
            raise ConfigError(f"job.{key}={place}: must be s3://BUCKET/PREFIX")
    if bool(job.subnets) != bool(job.security_groups):
        raise ConfigError("job.subnets and job.security_groups belong together: set both, or none")


@functools.cache
def _regions() -> list[str]:
    """Where SageMaker is, as boto3 knows it. Without a session, which would read the user's profile."""
    known = EndpointResolver(create_loader().load_data("endpoints"))
    partitions = known.get_available_partitions()
    return [region for name in partitions for region in known.get_available_endpoints("api.sagemaker", name)]


def _check_channel(name: str, channel: ChannelConfig, job: JobConfig) -> None:
    key = f"job.channels.{name}"
    if (channel.s3 is None) == (channel.fsx is None):
        raise ConfigError(f"{key}: set s3 or fsx, and not both")
    if channel.s3 is not None:
        if not channel.s3.startswith("s3://"):
            raise ConfigError(f"{key}.s3={channel.s3}: must be s3://BUCKET/PREFIX")
        if channel.mode not in ("FastFile", "File"):
            raise ConfigError(f"{key}.mode={channel.mode}: must be FastFile or File")
        if channel.path is not None or channel.access != "ro":
            raise ConfigError(f"{key}: path and access belong to fsx; S3 is read only")
        return
    if not (channel.path or "").startswith("/"):
        raise ConfigError(f"{key}.path={channel.path}: must begin with the file system's mount name, /MOUNTNAME/FOLDER")
    if channel.access not in ("ro", "rw"):
        raise ConfigError(f"{key}.access={channel.access}: must be ro or rw")
    if not job.subnets:
        raise ConfigError(f"{key} is FSx, which is reached in its VPC only: set job.subnets and job.security_groups")


def _check_hyperparameters(job: JobConfig) -> None:
    most = MOST_HYPERPARAMETERS - OF_THE_SDK - 1  # the other one is config
    if len(job.overrides) > most:
        raise ConfigError(
            f"{len(job.overrides)} overrides, and a job takes {most}; put them into the file that job.config names"
        )
    for key, value in job.hyperparameters.items():
        if len(json.dumps(value)) > LONGEST_VALUE:
            raise ConfigError(
                f"{key} has {len(value)} characters, and a hyperparameter takes {LONGEST_VALUE}, quoted; put it "
                "into the file that job.config names"
            )


def _check_run_folder(job: JobConfig, config: Config) -> None:
    """What is written anywhere else is gone with the instances, and all ranks must see one run folder."""
    root = PurePosixPath(config.logging.root)
    shared = [CHANNELS / name for name, channel in job.channels.items() if channel.fsx and channel.access == "rw"]
    if any(root.is_relative_to(place) for place in shared):
        if job.checkpoints is not None:
            raise ConfigError(f"job.checkpoints copies {CHECKPOINTS}, but logging.root={root}; leave it out")
        return
    if job.instances > 1:
        example = shared[0] if shared else CHANNELS / "CHANNEL"
        raise ConfigError(
            f"logging.root={root}: all {job.instances} instances must see the run folder, and {CHECKPOINTS} is each "
            f"one's own; use a folder of an FSx channel with access: rw, logging.root={example}/runs"
        )
    if not root.is_relative_to(CHECKPOINTS):
        raise ConfigError(f"logging.root={root} is lost with the instance; logging.root={CHECKPOINTS} would work")
    if job.checkpoints is None:
        raise ConfigError(f"logging.root={root} is lost with the instance: set job.checkpoints, s3://BUCKET/PREFIX")


def _check_inputs(job: JobConfig, config: Config) -> None:
    """The ranks find files in channels and in the code of the job, and shards by URL too."""
    sources = {"data.sources": config.data.sources, "data.validation": config.data.validation}
    paths = {f"{key}.{source.name}.shards": source.shards for key, group in sources.items() for source in group}
    for key, path in paths.items():
        if not _SCHEME.match(path):
            _check_input(job, key, path, "s3://BUCKET/..., or ")
    files = {"data.tokenizer": config.data.tokenizer, "checkpoint.init": config.checkpoint.init}
    if config.checkpoint.load not in (None, "none", "latest"):
        files["checkpoint.load"] = config.checkpoint.load
    for key, path in files.items():
        if path is not None:
            _check_input(job, key, path, "")


def _check_input(job: JobConfig, key: str, path: str, otherwise: str) -> None:
    places = [CHANNELS / name for name in job.channels]
    if job.checkpoints is not None:
        places.append(CHECKPOINTS)
    inside = PurePosixPath(os.path.normpath(path))
    if any(inside.is_relative_to(place) for place in places) or inside.parts[:1] in [(name,) for name in CODE]:
        return
    below = " or ".join(map(str, places)) or f"{CHANNELS}/NAME, with a channel NAME in job.channels"
    raise ConfigError(
        f"{key}={path}: no instance of the job has it; it must be {otherwise}below {below}, or a file of the code that "
        f"goes along ({', '.join(CODE)})"
    )
