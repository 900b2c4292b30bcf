"""Optimizer steps of a small model at one layout: what a rank reports of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_atum.batch import Batch
from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.weights import gather_rows
from tests.layouts import Degrees, build_engine, test_config
from tests.model.cases import Expected, pixels_of_rank

STEPS = 5


def train(rank: int, world_size: int, jobs: list[tuple[Degrees, dict[str, Any]]], path: str) -> list[dict[str, Any]]:
    """Five steps for each job. A job is a layout and changes of the configuration."""
    expected: Expected = torch.load(path, weights_only=False)
    return [train_one(expected, degrees, changes) for degrees, changes in jobs]


def train_one(expected: Expected, degrees: Degrees, changes: dict[str, Any]) -> dict[str, Any]:
    engine = build_engine(test_config(from_hf(expected.config), **changes), degrees, expected.state)
    engine.build_optimizer()
    result: dict[str, Any] = {"losses": [], "grad_norms": []}
    for step in range(STEPS):
        batches = own_share(rotate(expected.batches, step), engine.groups)
        done = engine.step(batches)
        result["losses"].append(done.losses)
        result["grad_norms"].append(done.grad_norm)
    for chunk in engine.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    result["parameters"] = gather_rows(engine.stages, engine.config.model, engine.groups, trained)
    result["trained"] = sum(p.numel() for s in engine.stages for p in s.parameters() if p.requires_grad)
    result["buffered"] = sum(buffer.numel_unpadded for chunk in engine.chunks for buffer in chunk.buffers)
    return result


def trained(parameter: torch.nn.Parameter) -> Tensor | None:
    return parameter.data if parameter.requires_grad else None


def rotate(batches: list[Batch], step: int) -> list[Batch]:
    """Another order in each step."""
    step %= len(batches)
    return batches[step:] + batches[:step]


def own_share(batches: list[Batch], groups: Any) -> list[Batch]:
    """The microbatches and pixels of this rank: microbatch q belongs to data-parallel rank q % size."""
    mine = batches[groups.data_rank :: groups.layout.data]
    mine = [pixels_of_rank(batch, groups.tensor_rank, groups.layout.tensor) for batch in mine]
    return mine if groups.is_first_stage else [replace(batch, pixels=batch.pixels[:0]) for batch in mine]
