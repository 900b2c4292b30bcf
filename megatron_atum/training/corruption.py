"""Finds ranks whose frozen weights are not what they should be: a failing device or memory, or a file read wrongly.

Frozen weights must never change, and are the same on all data-parallel ranks. A checksum of each, compared over time
and over these ranks, costs one pass over the weights. Where products use a copy in 8 bits, the copy is what is watched;
what it was cast from is compared over ranks once. Transformer Engine's own 8-bit copies are not watched: with
kernels.backend=te the sums are of the weights that it casts.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_atum.errors import HealthFailure, listed
from megatron_atum.model.frozen_gemm import frozen_matrices
from megatron_atum.parallel.agreement import all_true
from megatron_atum.parallel.device import device
from megatron_atum.parallel.groups import ProcessGroups

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**22  # values that are widened to int64 at a time: a check must not need memory that training has taken
_SHOWN = 5
_ADVICE = "Take the node out and test its devices and memory"


@dataclass(frozen=True)
class Sums:
    """Checksums of one rank's frozen weights."""

    who: str
    first: list[int]  # as they were at the start
    last: list[int]


class FrozenWeights:
    """Watches the frozen weights of all ranks, from when this is made: after the weights were filled.

    Collective over all ranks.

    Raises:
        HealthFailure: on all ranks, if data-parallel ranks start with different weights. What all of them have read
            alike cannot be found here; checkpoint.verify compares files with their checksums.
    """

    def __init__(self, stages: Iterable[nn.Module], groups: ProcessGroups) -> None:
        self._groups = groups
        stages = list(stages)
        frozen: dict[str, Tensor] = {
            name: p for stage in stages for name, p in stage.named_parameters() if not p.requires_grad
        }
        self._exist = not all_true(not frozen)
        self._watch(frozen)
        if self._exist:
            self._compare(self._first, "frozen weights differ at the start", f"{_ADVICE}, or load the weights again")
        copies = {name: matrix for name, _, matrix in frozen_matrices(stages)}
        if copies:
            used = {f"{name} in 8 bits": matrix.values_NK for name, matrix in copies.items()}
            used |= {f"scales of {name}": matrix.scales_N for name, matrix in copies.items()}
            used |= {f"ones of {name}": matrix.ones_K for name, matrix in copies.items()}
            self._watch(used | {name: weight for name, weight in frozen.items() if name not in copies})

    def _watch(self, frozen: dict[str, Tensor]) -> None:
        self._names, self._weights = list(frozen), list(frozen.values())
        self._first = self._checksums()

    @property
    def exist(self) -> bool:
        """Whether any rank of the run has frozen weights; equal on all ranks. If not, there is nothing to check."""
        return self._exist

    def check(self) -> None:
        """Collective over all ranks.

        Raises:
            HealthFailure: on all ranks, naming the ranks and weights.
        """
        if self._exist:
            advice = f"{_ADVICE}; checkpoints of the last steps may hold what was computed from them"
            self._compare(self._checksums(), "frozen weights have changed", advice)

    def _compare(self, sums: list[int], what: str, advice: str) -> None:
        groups = self._groups
        mine = Sums(f"rank {groups.rank} on {socket.gethostname()}", self._first, sums)
        ranks = [mine] * groups.layout.data
        # As objects: stages have different numbers of frozen weights, some of them none.
        dist.all_gather_object(ranks, mine, group=groups.data)
        found = complaints(self._names, ranks)
        if all_true(not found):
            return
        everyone: list[list[str]] = [[] for _ in range(groups.layout.world_size)]
        dist.all_gather_object(everyone, found if groups.data_rank == 0 else [])  # its peers have found the same
        raise HealthFailure(f"{what}: {'; '.join(one for part in everyone for one in part)}. {advice}")

    def _checksums(self) -> list[int]:
        """The bits of each weight, added up where it is: what was cast to 8 bits is in the memory of the host."""
        sums = [checksum(weight.detach()).to(device()) for weight in self._weights]
        return torch.stack(sums).tolist() if sums else []


def checksum(weight: Tensor) -> Tensor:
    """Sum of a weight's values, each taken as an integer, modulo 2^64. One flipped bit always shows."""
    bits = weight.view(_INTEGERS[weight.element_size()]).flatten()
    return torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_AT_ONCE)]).sum()


def complaints(names: list[str], ranks: list[Sums]) -> list[str]:
    """What is wrong with the weights of one group of data-parallel ranks, and on which of them."""
    found: dict[str, list[str]] = {}
    for place, name in enumerate(names):
        for complaint in _complaints_at(place, ranks):
            found.setdefault(complaint, []).append(name)
    return [f"{complaint}: {listed(weights, _SHOWN)}" for complaint, weights in found.items()]


def _complaints_at(place: int, ranks: list[Sums]) -> Iterator[str]:
    """A rank that has changed is at fault; else one that differs from a majority; without one, nobody knows."""
    changed = [rank.who for rank in ranks if rank.last[place] != rank.first[place]]
    if changed:
        yield from (f"{who} since the start" for who in changed)
        return
    ((usual, votes),) = Counter(rank.last[place] for rank in ranks).most_common(1)
    if votes > len(ranks) / 2:
        for rank in ranks:
            if rank.last[place] != usual:
                yield f"{rank.who} differs from most of its {len(ranks)} data-parallel ranks"
    else:
        yield f"{', '.join(rank.who for rank in ranks)} differ, and no majority says which is at fault"
