"""Records what a program computes, sends and keeps in memory, on real tensors as on fake ones.

Every operation of torch goes through it once: products become FLOPs, collectives become bytes, and each storage counts
from its first appearance to its end.

Conventions. FLOPs are two per multiplication and addition; attention counts its two products forward and four backward,
without what a kernel computes again. The payload of a collective is its larger side, in bytes: of an all-gather what it
gives, of a reduce-scatter what it takes. Memory is rounded up to 512 bytes a tensor, as CUDA's allocator does.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_atum.parallel.fake import answer, is_fake_call

GRAIN = 512  # bytes
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 4,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 8,
}
_NO_MESSAGE = ("barrier", "monitored_barrier_")


@dataclass(frozen=True)
class Transfer:
    """One kind of message of this rank."""

    phase: str
    operation: str  # all_reduce | all_gather | reduce_scatter | broadcast | send | receive
    group: str  # name of the group in torch
    ranks: tuple[int, ...]  # all of the group, or the other side of a send or receive


class Recorder(TorchDispatchMode):
    """Within its block everything is recorded. `phase` names what happens meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.flops: Counter[tuple[str, str]] = Counter()  # by phase and kind: gemm | attention | convolution
        self.calls: Counter[Transfer] = Counter()
        self.payload: Counter[Transfer] = Counter()
        self.memory = Memory()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            self._message(func, args)
        out = answer() if is_fake_call(func) and _is_fake(args) else func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        self.memory.watch(tensors_in(out))
        return out

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        if name in _ATTENTION:
            query, key = (args[1], args[2]) if name.endswith("backward") else (args[0], args[1])
            self.flops[self.phase, "attention"] += _ATTENTION[name] * query.numel() * key.shape[-2]
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            kind = "convolution" if "conv" in name else "gemm"
            self.flops[self.phase, kind] += formula(*args, **kwargs, out_val=out)

    def _message(self, func: Any, args: Any) -> None:
        name = func._schema.name.removeprefix("c10d::")
        operation = _operation(name)
        if operation is None:
            return
        place = next(n for n, arg in enumerate(args) if isinstance(arg, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(args[place])
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            return
        if operation in ("send", "receive"):
            ranks = (ranks[args[place + 1]],)
        transfer = Transfer(self.phase, operation, group.group_name, ranks)
        self.calls[transfer] += 1
        self.payload[transfer] += max(_bytes(arg) for arg in args[:place])


class Memory:
    """Bytes of the storages that live."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def watch(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                size = GRAIN * math.ceil(storage.nbytes() / GRAIN)
                self._known[key] = weakref.ref(storage, self._forget(key, size))
                self.live += size
        self.peak = max(self.peak, self.live)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """They are somewhere else, and do not count."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if self._known.pop(key, None) is not None:
                self.live -= GRAIN * math.ceil(tensor.untyped_storage().nbytes() / GRAIN)

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.live -= size

        return gone


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _operation(name: str) -> str | None:
    """How we call one of torch's collectives. Raises ValueError for one that is not known here."""
    if name in _NO_MESSAGE:
        return None
    known = {
        "allreduce": "all_reduce",
        "allgather": "all_gather",
        "_allgather_base": "all_gather",
        "reduce_scatter": "reduce_scatter",
        "_reduce_scatter_base": "reduce_scatter",
        "broadcast": "broadcast",
        "send": "send",
        "recv": "receive",
    }
    for start in sorted(known, key=len, reverse=True):
        if name.startswith(start):
            return known[start]
    raise ValueError(f"the collective {name} is not known to the recorder")


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


def _is_fake(args: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(tensor, FakeTensor) for tensor in tensors_in(args))
