"""Starts a training job on Amazon SageMaker, or shows what it would ask for.

    python examples/sagemaker/launch.py --dry-run
    python examples/sagemaker/launch.py --job examples/sagemaker/one-node.yaml job.spot=true training.steps=1000

A job is a file (examples/sagemaker/pretrain.yaml explains its keys) and what the command line changes in it:
job.KEY=VALUE. section.key=value is for pretrain_atum.py, which every GPU of the job runs from this checkout.
Job and training configuration are checked first, the layout against the GPUs of the job. docs/sagemaker.md has more.

The SDK has an environment of its own (.venvs/sagemaker, from requirements.txt here), which is made on first use. It is
version 2: its estimator hands the job to SageMaker's training toolkit inside the image, and this whole chain is what
tests/launch/test_sagemaker.py runs. Version 3 has no such estimator; it sends a launcher of its own along.

Exit codes: 0 done; 1 the job that was followed has failed or was stopped; 2 something to mend, in one line; 130 Ctrl-C
while it was followed: the job goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from megatron_atum.errors import AtumError, ConfigError
from megatron_atum.launch.own_environment import make_environment

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / ".venvs" / "sagemaker"


def main() -> int:
    options = parse_arguments()
    try:
        go_over()
        return launch(options)
    except AtumError as error:
        print(f"launch: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=HERE / "pretrain.yaml", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="check, print the request as JSON, and send nothing")
    parser.add_argument("--follow", action="store_true", help="wait for the job's end and print its log")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="job.KEY=VALUE or section.key=value")
    return parser.parse_intermixed_args()


def go_over() -> None:
    """Go on in the SDK's environment."""
    python = make_environment(ENVIRONMENT, HERE / "requirements.txt")
    if Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        variables = {**os.environ, "SAGEMAKER_SUPPRESS_V2_WARNING": "1"}
        os.execve(python, [str(python), str(HERE / "launch.py"), *sys.argv[1:]], variables)


def launch(options: argparse.Namespace) -> int:
    # Imported only now: only the SDK's environment has what they need.
    from botocore.exceptions import ProfileNotFound
    from sagemaker_job import check_is_real, load_job

    job = load_job(options.job, options.words)
    if options.dry_run:
        forget_account()
    else:
        check_is_real(job)
    logging.getLogger("sagemaker.config").setLevel(logging.WARNING)  # it tells which files it has not found
    try:
        from sagemaker_request import follow, request_of, submit
    except ProfileNotFound as error:
        raise ConfigError(f"AWS_PROFILE: {error}") from None

    request = request_of(job)  # the service's limits, before anything is sent
    if options.dry_run:
        print(json.dumps(request, indent=2))
        return 0
    name = submit(job)
    print(f"started {name}", flush=True)
    return follow(job, name) if options.follow else 0


def forget_account() -> None:
    """The request is the same for everybody: profile, credentials and endpoints of this user do not count."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)


if __name__ == "__main__":
    sys.exit(main())
