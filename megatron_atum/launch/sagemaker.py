"""What Amazon SageMaker's training toolkit hands to pretrain_atum.py, and what SageMaker reads in the log.

The toolkit (sagemaker-training 5.1) starts torchrun on every host and passes the hyperparameters of the job as pairs
`--key value`, sorted by key: also those without a value (`--key ''`), and flags (`--dry-run ''`). So a key of our
configuration, `section.key`, is a hyperparameter of that name, and `config` is the YAML file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_NUMBER = r"([0-9.e+-]+)"
# By name, as in metrics.jsonl: what a line says that training/metrics.py prints for a step. SageMaker searches each
# line of the log and takes the one group as a number, so a value that is not finite matches nothing.
METRICS = {
    "step": r"step ([0-9]+)/[0-9]+  loss",
    "loss": rf"step [0-9]+/[0-9]+  loss {_NUMBER}  ",
    "z_loss": rf"  z {_NUMBER}  ",
    "grad_norm": rf"  grad norm {_NUMBER}  ",
    "lr": rf"  lr {_NUMBER}  ",
    "tokens_per_s_per_device": r"  ([0-9]+) tokens/s/device",
    "mfu_percent": rf"  MFU {_NUMBER}%",
}
# What the toolkit sets on every rank, whatever the job's environment says. A second name keeps the job's value.
FORCED = (
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_DISABLE",
    "NCCL_PROTO",
    "FI_PROVIDER",
    "FI_EFA_USE_DEVICE_RDMA",
    "RDMAV_FORK_SAFE",
)
KEEPS = "ATUM_JOB_"
_KEY = re.compile(r"--([A-Za-z_]\w*(?:\.\w+)+)")
_SWITCH = {"": True, "true": True, "false": False}


def arguments(argv: Sequence[str]) -> list[str]:
    """`--section.key value` as this project's `section.key=value`, whatever the value is.

    `--config FILE` stays, and `--dry-run` with the value that the toolkit gives it. Everything else is left as it is:
    the parser knows it, or says that it does not.
    """
    ours: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        key = _KEY.fullmatch(word)
        if key and words:
            ours.append(f"{key[1]}={words.pop(0)}")
        elif word == "--dry-run" and words and words[0].lower() in _SWITCH:
            ours += [word] if _SWITCH[words.pop(0).lower()] else []
        else:
            ours.append(word)
    return ours


def with_kept(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job, such that `kept` finds on a rank what the toolkit has overwritten."""
    return {**environment, **{KEEPS + name: environment[name] for name in FORCED if name in environment}}


def kept(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of the job's environment, with the values that they had before the toolkit."""
    return {name: environ[KEEPS + name] for name in FORCED if KEEPS + name in environ}
