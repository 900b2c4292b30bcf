"""Fills the stages of this rank with weights from any source, and gathers them for tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_atum.checkpoint.draw import AddedRows, Drawn
from megatron_atum.checkpoint.rules import Box
from megatron_atum.checkpoint.source import TensorSource
from megatron_atum.checkpoint.stored import StoredCheckpoint
from megatron_atum.checkpoint.table import Weight, weight_table
from megatron_atum.config.schema import ModelConfig
from megatron_atum.parallel.groups import ProcessGroups


def named_weights(stages: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """All parameters of this rank's stages by global name."""
    return {name: parameter for stage in stages for name, parameter in stage.named_parameters()}


def rows_of(stages: Iterable[nn.Module], model: ModelConfig) -> list[tuple[Weight, nn.Parameter]]:
    """The rows of the weight table that this rank holds, with their parameters. Nothing else may exist."""
    parameters = named_weights(stages)
    rows = [(row, parameters.pop(row.name)) for row in weight_table(model) if row.name in parameters]
    assert not parameters, f"parameters without a row in the weight table: {sorted(parameters)}"
    return rows


def boxes_of(
    row: Weight, parameter: nn.Parameter, rank: int, size: int, start: int = 0, stop: int | None = None
) -> Iterator[Box]:
    """Where the values of a tensor rank's parameter lie in the Hugging Face tensors of its row.

    Args:
        rank, size: of the tensor group.
        start, stop: only these values of the flattened parameter.
    """
    shape = row.shapes[0]
    geometry = row.rule.geometry(shape, rank, size)
    assert math.prod(geometry.dims) == parameter.numel(), (row.name, geometry.dims, parameter.shape)
    return geometry.boxes(shape, start, parameter.numel() if stop is None else stop)


@torch.no_grad()
def fill(stages: Iterable[nn.Module], model: ModelConfig, groups: ProcessGroups, source: TensorSource) -> None:
    """Set every weight of this rank; only the parts that it holds are read.

    The source may have fewer added tokens than the model.

    Raises:
        CheckpointError: see TensorSource.
    """
    added = AddedRows(model, source)
    for row, parameter in rows_of(stages, model):
        boxes = list(boxes_of(row, parameter, groups.tensor_rank, groups.layout.tensor))
        if sum(math.prod(box.sizes) for box in boxes) < parameter.numel():
            parameter.zero_()  # padding rows of the vocabulary
        for box in boxes:
            view = box.view(parameter.view(-1))
            name = row.hf[box.part]
            origin = added if name in added.names() else source
            view.copy_(read_box(origin, name, box.offsets, box.sizes).reshape(view.shape))


def read_box(source: TensorSource, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A box of a source's tensor."""
    if isinstance(source, StoredCheckpoint):
        return source.read_box(name, offsets, sizes)
    if not sizes:
        return source.read(name)
    rows = source.read(name, slice(offsets[0], offsets[0] + sizes[0]))
    columns = (slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True))
    return rows[(slice(None), *columns)]


def initialise(stages: Iterable[nn.Module], model: ModelConfig, groups: ProcessGroups, seed: int) -> None:
    """Draw every weight. A tensor depends on the seed and its name only, so all layouts start alike."""
    fill(stages, model, groups, Drawn(model, seed))


def gather_rows(
    stages: Iterable[nn.Module],
    model: ModelConfig,
    groups: ProcessGroups,
    take: Callable[[nn.Parameter], Tensor | None],
) -> dict[str, Tensor]:
    """Whole tensors by Hugging Face name, on every rank. Collective; for tests and small models.

    Args:
        take: what to gather of a parameter (its data, its gradient); None leaves the row out.
    """
    taken = [(row, parameter, take(parameter)) for row, parameter in rows_of(stages, model)]
    found = [
        (row, parameter, value.detach().float().cpu().flatten()) for row, parameter, value in taken if value is not None
    ]
    whole = torch.cat([value for _, _, value in found]) if found else torch.empty(0)
    shards: list[Any] = [None] * groups.layout.tensor
    torch.distributed.all_gather_object(shards, whole, group=groups.tensor)  # once: each takes some milliseconds
    by_rank = [shard.split([value.numel() for _, _, value in found]) for shard in shards]
    mine: dict[str, Tensor] = {}
    for (row, parameter, _), *parts in zip(found, *by_rank, strict=True):
        mine.update(_joined(row, parameter, parts))
    stages_of_all: list[Any] = [None] * groups.layout.pipeline
    torch.distributed.all_gather_object(stages_of_all, mine, group=groups.pipeline)
    return {name: tensor for part in stages_of_all for name, tensor in part.items()}


def _joined(row: Weight, parameter: nn.Parameter, shards: list[Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors of a row from what all tensor ranks hold."""
    whole = [torch.full(shape, torch.nan) for shape in row.shapes]
    for rank, shard in enumerate(shards):
        for box in boxes_of(row, parameter, rank, len(shards)):
            place = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            whole[box.part][place] = box.view(shard.view(-1)).reshape(box.sizes)
    return dict(zip(row.hf, whole, strict=True))
