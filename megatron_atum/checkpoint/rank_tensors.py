"""What one rank of a run saves, and where what it loads goes.

Each value is written by one rank. Who writes what replicas share is dealt out by a rule that every rank computes for
itself, so a save needs no agreement beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_atum.checkpoint.optimizer_state import OptimizerShard, optimizer_shards
from megatron_atum.checkpoint.reader import CheckpointReader
from megatron_atum.checkpoint.rules import Box, is_split
from megatron_atum.checkpoint.stored import StoredCheckpoint
from megatron_atum.checkpoint.table import Weight
from megatron_atum.checkpoint.tensor_file import check_finite, row_slices
from megatron_atum.checkpoint.weights import boxes_of, rows_of
from megatron_atum.checkpoint.writer import Item
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import CheckpointError
from megatron_atum.parallel.device import beside_training, host_buffer
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.parallel.random_state import random_state


@dataclass(frozen=True)
class Part:
    """A box that this rank writes. `flat` gives the flattened tensor it is a part of."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box
    flat: Callable[[], Tensor]

    def view(self) -> Tensor:
        return self.box.view(self.flat().detach())

    def item(self, values: Tensor | None = None) -> Item:
        """To be written from `values`, or as it is when it is written."""

        def pieces() -> Iterator[Tensor]:
            with beside_training():  # here, since it counts for the thread that makes the pieces
                view = self.view() if values is None else values
                for rows in row_slices(view.shape, view.element_size()):
                    yield (view[rows] if view.dim() else view).cpu().contiguous()

        return Item(self.key, self.dtype, self.shape, self.box.offsets, self.box.sizes, pieces)


class RankTensors:
    """The tensors of this rank's stages and optimizer that it writes itself."""

    def __init__(self, stages: Iterable[nn.Module], model: ModelConfig, groups: ProcessGroups, optimizer: Any) -> None:
        self.groups, self.optimizer = groups, optimizer
        self.rows = rows_of(stages, model)
        self._row_of = {parameter: (number, row) for number, (row, parameter) in enumerate(self.rows)}
        self._sharded = bool(getattr(optimizer.config, "use_distributed_optimizer", False))
        self._owners = _owners(self.rows, groups)

    def weights(self, *, trainable: bool) -> list[Part]:
        return [
            part
            for (row, parameter), owned in zip(self.rows, self._owners, strict=True)
            if owned and parameter.requires_grad == trainable
            for part in self._parts(row, parameter, "", parameter.dtype, partial(parameter.view, -1))
        ]

    def optimizer_state(self) -> list[Part]:
        """Moments, and copies in higher precision."""
        parts: list[Part] = []
        for shard in optimizer_shards(self.optimizer):
            number, row = self._row_of[shard.parameter]
            if not self._writes(shard, number, row):
                continue
            values = shard.moments() | ({"main": shard.main.view(-1)} if shard.has_main else {})
            span = (shard.start, shard.stop)
            for name, flat in values.items():
                key, get = f"optimizer.{name}/", partial(_itself, flat)
                parts += self._parts(row, shard.parameter, key, flat.dtype, get, span)
        return parts

    def row(self, shard: OptimizerShard) -> Weight:
        return self._row_of[shard.parameter][1]

    def optimizer_steps(self) -> dict[str, int]:
        """Updates so far, by the first Hugging Face name of each row that this rank's optimizer holds a part of."""
        return {self.row(shard).hf[0]: shard.step for shard in optimizer_shards(self.optimizer)}

    def random(self) -> list[Item]:
        prefix = random_prefix(self.groups)
        return [
            Item(prefix + name, value.dtype, tuple(value.shape), (0,), tuple(value.shape), partial(_itself, [value]))
            for name, value in random_state().items()
        ]

    def _parts(
        self,
        row: Weight,
        parameter: nn.Parameter,
        prefix: str,
        dtype: torch.dtype,
        flat: Callable[[], Tensor],
        span: tuple[int, int | None] = (0, None),
    ) -> Iterator[Part]:
        """A parameter's values `span`, which `flat` gives, in the boxes where they lie."""
        groups, (start, stop) = self.groups, span
        for box in boxes_of(row, parameter, groups.tensor_rank, groups.layout.tensor, start, stop):
            here = replace(box, start=box.start - start)
            yield Part(prefix + row.hf[box.part], dtype, row.shapes[box.part], here, flat)

    def _writes(self, shard: OptimizerShard, number: int, row: Weight) -> bool:
        """A shard of the distributed optimizer is on one data-parallel rank; tensor ranks may hold copies of it."""
        if self.groups.layout.data > 1 and self._sharded:
            return is_split(row.rule) or number % self.groups.layout.tensor == self.groups.tensor_rank
        return self._owners[number]


def _itself(value: Any) -> Any:
    return value


def random_prefix(groups: ProcessGroups) -> str:
    return f"random/pipeline{groups.pipeline_rank}-data{groups.data_rank}-tensor{groups.tensor_rank}/"


def _owners(rows: list[tuple[Weight, nn.Parameter]], groups: ProcessGroups) -> list[bool]:
    """Whether this rank writes the row: each goes to the replica with the fewest bytes so far."""
    layout = groups.layout
    # frozen weights apart, since they are not part of every save
    loads = {kind: [[0] * layout.tensor for _ in range(layout.data)] for kind in (False, True)}
    owned = []
    for row, parameter in rows:
        load = loads[parameter.requires_grad]
        size = parameter.numel() * parameter.element_size()
        if is_split(row.rule):
            fullest = [max(sizes) for sizes in load]
            data = fullest.index(min(fullest))
            owners = [(data, t) for t in range(layout.tensor)]
        else:
            every = [held for sizes in load for held in sizes]
            owners = [divmod(every.index(min(every)), layout.tensor)]
        for d, t in owners:
            load[d][t] += size
        owned.append((groups.data_rank, groups.tensor_rank) in owners)
    return owned


class Staging:
    """Host memory for the copies of a save; kept, since new memory costs more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def copy(self, parts: Iterable[Part]) -> list[Item]:
        """Copies of the parts as they are now. On a device they are there when it has been waited for."""
        items = []
        for part in parts:
            view, place = part.view(), (part.key, part.box.offsets)
            buffer = self._buffers.get(place)
            if buffer is None or buffer.shape != view.shape or buffer.dtype != view.dtype:
                buffer = self._buffers[place] = host_buffer(tuple(view.shape), view.dtype)
            buffer.copy_(view, non_blocking=True)
            items.append(part.item(buffer))
        return items


# Loading -------------------------------------------------------------------------------------------------------------


class ExactWeights(StoredCheckpoint):
    """The weights of a training checkpoint, from the copies in higher precision where a run keeps more than bf16."""

    def __init__(self, folder: Any, dtype: torch.dtype) -> None:
        self._dtype = dtype
        super().__init__(folder)

    def read_box(self, name: str, offsets: Any, sizes: Any) -> Tensor:
        main = f"optimizer.main/{name}"
        exact = main in self.reader.index and self.dtype(name) != self._dtype
        return super().read_box(main if exact else name, offsets, sizes)


@torch.no_grad()
def load_optimizer(tensors: RankTensors, stored: StoredCheckpoint) -> None:
    """Set moments, counters and higher-precision copies of this rank's optimizer; weights must have been set.

    What was never updated in the checkpoint has no moments after this, also amid a run.

    Raises:
        CheckpointError: a weight that trains has no optimizer state in the checkpoint; or kernels.adam cannot go on
            with it.
    """
    groups, index, steps = tensors.groups, stored.reader.index, stored.state.optimizer_steps
    shards = optimizer_shards(tensors.optimizer)
    _check_counters(shards, tensors, stored)
    for shard in shards:  # all of them first: some optimizers share a counter among the weights of a group
        shard.forget()
    for shard in shards:
        row = tensors.row(shard)
        step = steps[row.hf[0]]
        values = shard.start_moments(step) if step else {}
        if shard.has_main:
            values["main"] = shard.main.view(-1)
            values["main"].zero_()
        for name, flat in values.items():
            boxes = boxes_of(row, shard.parameter, groups.tensor_rank, groups.layout.tensor, shard.start, shard.stop)
            for box in boxes:
                hf = row.hf[box.part]
                key = f"optimizer.{name}/{hf}"
                if name == "main" and key not in index:
                    key = hf  # saved by a run whose weights were as precise
                view = replace(box, start=box.start - shard.start).view(flat)
                view.copy_(_read(stored, key, row.shapes[box.part], box).reshape(view.shape))


def _check_counters(shards: list[OptimizerShard], tensors: RankTensors, stored: StoredCheckpoint) -> None:
    """Each weight that trains has a counter in the checkpoint, and those that share one have the same."""
    steps = stored.state.optimizer_steps
    of_groups: dict[int, int] = {}
    for shard in shards:
        name = tensors.row(shard).hf[0]
        if name not in steps:
            raise CheckpointError(f"{stored.folder} holds no optimizer state of {name}, which this run trains")
        of_group = of_groups.setdefault(id(shard.group), steps[name]) if shard.counts_per_group else steps[name]
        if of_group != steps[name]:
            raise CheckpointError(
                f"{stored.folder} has weights of one parameter group after {of_group} and {steps[name]} updates "
                f"({name}), and the AdamW of kernels.adam counts once for each group; kernels.adam=torch can go on"
            )


def _read(stored: StoredCheckpoint, key: str, shape: tuple[int, ...], box: Box) -> Tensor:
    found = stored.reader.index.get(key)
    if found is None or found.shape != shape or not found.dtype.is_floating_point:
        raise CheckpointError(f"{stored.folder} holds no {key} of shape {shape} in a floating dtype")
    tensor = stored.reader.read(key, box.offsets, box.sizes)
    check_finite(tensor, lambda: f"{stored.folder}: {key}")
    return tensor


def stored_random(groups: ProcessGroups, reader: CheckpointReader) -> dict[str, Tensor]:
    """The random state that a rank of the same place in the layout had."""
    prefix = random_prefix(groups)
    return {
        key.removeprefix(prefix): reader.read(key, (0,), stored.shape)
        for key, stored in reader.index.items()
        if key.startswith(prefix)
    }
