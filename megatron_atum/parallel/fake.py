"""One rank of a world whose other ranks do not exist: on tensors without memory, which is what a dry run needs, or on
real ones, to time the kernels of one rank on one device.

torch's fake process group answers every collective at once, and fake tensors have shapes, types and storages but no
values. Both are parts of torch that it uses for its own tests and compiler; only this module knows them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor

from megatron_atum.parallel.patching import replaced

BACKEND = "fake"


class FakeWorld:
    """A world of which only this rank exists."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._mode = FakeTensorMode(allow_non_fake_inputs=True)  # one for all blocks: tensors of two do not mix

    @contextlib.contextmanager
    def tensors(self) -> Iterator[None]:
        """Within the block new tensors have no memory, and real ones may take part."""
        with replaced((dist, "all_gather_object", _all_alike)), self._mode:
            yield


@contextlib.contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[FakeWorld]:
    """Within the block this process is one rank of so many; at its end all groups are gone."""
    assert not torch.cuda.is_available(), "a dry run is played on the CPU: hide_accelerators() first"
    with _fake_groups(rank, world_size):
        yield FakeWorld()


@contextlib.contextmanager
def lone_rank(rank: int, world_size: int) -> Iterator[None]:
    """Within the block this process is one rank of so many on its device, with real tensors; then all groups are gone.

    What other ranks would send is made up: copies of this rank's own part, and random values from other stages. So
    losses mean nothing, but kernels take as long as they would; of communication there is a copy on the device.
    """
    answers = [
        (dist, "all_gather_object", _all_alike),
        (dist, "batch_isend_irecv", _receive_noise),
        # torch's fake group has left the output as it was until 2.12.
        (dist, "reduce_scatter_tensor", _own_part),
        *((module, "dist_reduce_scatter_func", _own_part) for module in (layers, mappings)),
    ]
    with _fake_groups(rank, world_size), replaced(*answers):
        yield


@contextlib.contextmanager
def _fake_groups(rank: int, world_size: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # else megatron-core warns that it should be set
    hook = sys.excepthook  # torch's group puts one of its own in front each time
    dist.init_process_group(BACKEND, rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        sys.excepthook = hook


def is_fake() -> bool:
    """Whether this process is the only rank of its world that exists."""
    return dist.get_backend() == BACKEND


def host_backend() -> str:
    """Backend of groups that exchange what lies in the memory of the host."""
    return BACKEND if is_fake() else "gloo"


def _all_alike(object_list: list[Any], obj: Any, group: Any = None) -> None:
    """In the place of a gather, which would read values of tensors: every rank says what this one says."""
    object_list[:] = [obj] * len(object_list)


class _Done:
    """Of a communication that is over at once."""

    def wait(self) -> None:
        pass


@torch.no_grad()
def _receive_noise(operations: list[dist.P2POp]) -> list[_Done]:
    for operation in operations:
        if operation.op is dist.irecv:
            operation.tensor.normal_()
    return []


@torch.no_grad()
def _own_part(output: Tensor, input: Tensor, *, group: Any = None, async_op: bool = False, **_: Any) -> _Done | None:
    """In the place of a reduce-scatter."""
    group = group or dist.group.WORLD
    output.copy_(input.chunk(group.size())[group.rank()])
    return _Done() if async_op else None


def is_fake_call(function: Any) -> bool:
    """Whether a torch operation has no fake form, so that a dry run must answer in its place (`answer`)."""
    return function.namespace == "c10d" and function._schema.name.endswith("coalesced_")


def answer() -> torch.ScriptObject:
    """What an asynchronous collective gives back, done already."""
    from torch._C._distributed_c10d import FakeWork

    return FakeWork().boxed()
