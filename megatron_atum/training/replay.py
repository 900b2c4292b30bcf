"""A step once more, row by row."""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist

from megatron_atum.batch import Batch
from megatron_atum.checkpoint.run_checkpoint import RunCheckpoint
from megatron_atum.checkpoint.weights import fill
from megatron_atum.data.planner import Pack
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.training.diagnosis import bad_parameters, in_forward_order
from megatron_atum.training.engine import Engine
from megatron_atum.training.feed import StepFeed
from megatron_atum.training.start import Start


def replay_step(start: Start, groups: ProcessGroups, bad: dict[str, Any]) -> dict[str, Any]:
    """Collective over all ranks.

    Args:
        start: with the weights to use.
        bad: what diagnosis.py kept of the step.

    Returns:
        the same on every rank: losses, gradient norm, weights whose gradients are not finite in the order of a forward
        pass (diagnosis.py: why the last one is the one to look at), and rows by loss, the worst first.
    """
    engine = _engine(start, groups)
    start.loader.load_state_dict(bad["data"])
    feed = StepFeed(start.loader, groups, 1)
    data = feed.next()
    result = engine.compute(data.microbatches)
    names: list[list[str]] = [[]] * groups.layout.world_size
    dist.all_gather_object(names, bad_parameters(engine.stages, start.config.model))
    planned = {pack.id: pack for pack in start.loader.last_step}
    losses = engine.row_losses(data.microbatches)
    rows = [
        row
        for batch, row_losses in zip(data.microbatches, losses, strict=False)  # none but on the last stage
        for row in _rows(batch, row_losses, start, planned)
    ]
    everyone: list[Any] = [None] * groups.layout.world_size
    dist.all_gather_object(everyone, rows)
    feed.close()
    by_pack = {row["pack"]: row for part in everyone for row in part}
    return {
        "step": bad["step"],
        "finite": result.is_finite,
        "loss": repr(result.losses["loss"]),
        "grad_norm": repr(result.grad_norm),
        "bad_parameters": in_forward_order((name for part in names for name in part), start.config.model),
        "rows": sorted(by_pack.values(), key=_worst_first),
    }


def _engine(start: Start, groups: ProcessGroups) -> Engine:
    engine = Engine(start.config, groups)
    if start.weights is not None:
        fill(engine.stages, start.config.model, groups, start.weights)
    engine.build_optimizer()
    if start.resume is not None:
        RunCheckpoint(start.config, groups, engine, start.checkpoints, {}).load(start.resume)
    engine.cast_frozen()
    return engine


def _rows(batch: Batch, losses: list[float], start: Start, planned: dict[int, Pack]) -> list[dict[str, Any]]:
    return [
        {"pack": pack, "source": source, "loss": repr(round(loss, 6)), "keys": _keys(start, planned[pack])}
        for pack, source, loss in zip(batch.pack_ids.tolist(), batch.source, losses, strict=True)
    ]


def _keys(start: Start, pack: Pack) -> list[str]:
    index = start.loader.indexes[pack.source]
    places = (index.sample(sample) for sample in pack.samples)
    return [sidecar.key(row) for _, sidecar, row in places]


def _worst_first(row: dict[str, Any]) -> tuple[bool, float]:
    loss = float(row["loss"])
    return (math.isfinite(loss), -loss if math.isfinite(loss) else 0.0)
