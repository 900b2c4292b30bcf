"""Finds ranks whose frozen weights are no longer what they were: a failing device or memory.

Frozen weights must never change, and are the same on all data-parallel ranks. A checksum of each, compared over time
and over these ranks, costs one pass over the weights.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_atum.errors import HealthFailure
from megatron_atum.parallel.agreement import all_true
from megatron_atum.parallel.groups import ProcessGroups

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 5


class FrozenWeights:
    """Their checksums as they were when this was made, after the weights were filled."""

    def __init__(self, stages: Iterable[nn.Module], groups: ProcessGroups) -> None:
        self._groups = groups
        frozen = {name: p for stage in stages for name, p in stage.named_parameters() if not p.requires_grad}
        self._names, self._parameters = list(frozen), list(frozen.values())
        self._first = self._checksums()

    def check(self) -> None:
        """Collective over all ranks.

        Raises:
            HealthFailure: on all ranks, naming the ranks and weights.
        """
        mine = self._checksums()
        everyone = [torch.empty_like(mine) for _ in range(self._groups.layout.data)]
        dist.all_gather(everyone, mine, group=self._groups.data)
        problems = self._problems(mine, everyone)
        if all_true(not problems):
            return
        told: list[list[str]] = [[] for _ in range(self._groups.layout.world_size)]
        dist.all_gather_object(told, problems)
        raise HealthFailure(
            f"frozen weights have changed: {'; '.join(problem for part in told for problem in part)}. Take the node "
            "out and test its devices and memory; checkpoints of the last steps may hold what was computed from them"
        )

    def _problems(self, mine: Tensor, everyone: list[Tensor]) -> list[str]:
        """What this rank says of itself."""
        changed = (mine != self._first).nonzero().flatten().tolist()
        columns = torch.stack(everyone).t().tolist()
        odd = [
            place
            for place, values in enumerate(columns)
            if values[self._groups.data_rank] != Counter(values).most_common(1)[0][0]
        ]
        who = f"rank {self._groups.rank} on {socket.gethostname()}"
        told = []
        if changed:
            told.append(f"{who} since the start: {self._named(changed)}")
        if odd:
            told.append(f"{who} differs from most of its {len(everyone)} data-parallel ranks: {self._named(odd)}")
        return told

    def _named(self, places: list[int]) -> str:
        more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        return ", ".join(self._names[place] for place in places[:_SHOWN]) + more

    def _checksums(self) -> Tensor:
        """[weights] int64: the bits of each, added up. One flipped bit always shows."""
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        sums = [_bits(parameter.detach()).sum(dtype=torch.int64) for parameter in self._parameters]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=device)


def _bits(weight: Tensor) -> Tensor:
    return weight.view(_INTEGERS[weight.element_size()])
