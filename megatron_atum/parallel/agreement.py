"""All ranks decide together: what one of them cannot do, none of them does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_atum.errors import AtumError, ConfigError, DataError
from megatron_atum.parallel.device import device

T = TypeVar("T")


def together(work: Callable[[], T]) -> T:
    """Run `work` on every rank; if it raises an AtumError on any, all raise that one. Collective over all ranks.

    `work` must not communicate. Costs one all-reduce of a number when nothing fails.
    """
    error: AtumError | None = None
    try:
        result = work()
    except AtumError as problem:
        error = problem
    failed = torch.tensor(float(error is not None), device=device())
    dist.all_reduce(failed)
    if failed:
        errors: list[AtumError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        raise next(problem for problem in errors if problem is not None)
    return result


def largest_codes(plan: int, codes: Tensor, error: Exception | None, group: dist.ProcessGroup) -> Tensor:
    """The largest of all ranks' codes; or, if there is an error on any rank, all raise that one.

    Costs one all-reduce of four numbers as long as there are neither errors nor codes other than 0.

    Args:
        plan: 64-bit hash of what is planned, signed; the same on every rank without an error.
        codes: [n] uint8 on the CPU, as many on every rank without an error.
        group: of all ranks, over gloo.

    Raises:
        DataError: ranks have planned different things.
    """
    found = torch.tensor([error is not None, bool(codes.any()), plan, ~plan])
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    if found[0]:
        errors: list[Exception | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, error, group=group)
        raise next(problem for problem in errors if problem is not None)
    if found[2] != ~found[3]:
        raise DataError(
            "ranks plan different rows from what should be the same files; compare manifests and sidecars "
            "on all nodes (tools/data/validate.py), or use one shared folder"
        )
    if found[1]:
        codes = codes.clone()
        dist.all_reduce(codes, op=dist.ReduceOp.MAX, group=group)
    return codes


def check_equal(what: dict[str, Any]) -> None:
    """Every rank has the same values. Collective over all ranks.

    Raises:
        ConfigError: on all ranks, naming what differs and between which ranks.
    """
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, what)
    for rank, theirs in enumerate(everyone):
        for key, value in theirs.items():
            if value != everyone[0][key]:
                raise ConfigError(
                    f"rank 0 and rank {rank} start differently: {key} is {everyone[0][key]!r} there and {value!r} "
                    "here; all ranks must see the same files and get the same arguments"
                )


def all_true(mine: bool) -> bool:
    """Whether it is true on every rank. Collective over all ranks."""
    flag = torch.tensor(float(mine), device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
