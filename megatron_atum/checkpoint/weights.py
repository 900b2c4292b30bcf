"""Fills the stages of this rank with weights: drawn from a seed, or taken from Hugging Face tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def fill(
    stages: Iterable[nn.Module], model: ModelConfig, groups: ProcessGroups, read: Callable[[Weight], list[Tensor]]
) -> None:
    """Set every weight of this rank from whole tensors.

    Args:
        read: gives the Hugging Face tensors of a row.
    """
    for row, parameter in rows_of(stages, model):
        local = row.rule.to_local(read(row), groups.tensor_rank, groups.layout.tensor)
        assert local.shape == parameter.shape, (row.name, local.shape, parameter.shape)
        parameter.copy_(local)


def initialise(stages: Iterable[nn.Module], model: ModelConfig, groups: ProcessGroups, seed: int) -> None:
    """Draw every weight. A tensor depends on the seed and its name only, so all layouts start alike."""
    fill(stages, model, groups, lambda row: drawn(row, seed))


def drawn(row: Weight, seed: int) -> list[Tensor]:
    """The Hugging Face tensors of a row as drawn from a seed, fp32."""
    return [_draw(name, shape, row, seed) for name, shape in zip(row.hf, row.shapes, strict=True)]


def _draw(name: str, shape: tuple[int, ...], row: Weight, seed: int) -> Tensor:
    if row.init.std == 0.0:
        return torch.full(shape, row.init.constant)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0.0, row.init.std, generator=generator)


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
    mine: dict[str, Tensor] = {}
    for row, parameter in rows_of(stages, model):
        value = take(parameter)
        if value is None:
            continue
        value = value.detach().float().cpu().contiguous()
        shards: list[Any] = [None] * groups.layout.tensor
        torch.distributed.all_gather_object(shards, value, group=groups.tensor)
        mine.update(zip(row.hf, row.rule.to_full(shards), strict=True))
    stages_of_all: list[Any] = [None] * groups.layout.pipeline
    torch.distributed.all_gather_object(stages_of_all, mine, group=groups.pipeline)
    return {name: tensor for part in stages_of_all for name, tensor in part.items()}
