"""Losses of held-out sources: the same rows each time, and the same at every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist

from megatron_atum.data.validation import ValidationSet
from megatron_atum.parallel.agreement import largest_codes
from megatron_atum.training.engine import Engine
from megatron_atum.training.loss import own_report, read_report


def validate(
    engine: Engine, sets: Mapping[str, ValidationSet], beat: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """loss/<source> and perplexity/<source> of each source, and loss, their mean. Collective over all ranks.

    Losses are means over all tokens of a source. The mean of the sources takes each for one, however long it is.

    Args:
        beat: called after each batch.

    Raises:
        DataError, DataFailure: on all ranks.
    """
    agree = partial(largest_codes, group=engine.groups.control)
    values: dict[str, float] = {}
    for name, one in sets.items():
        report = own_report([], (name,), engine.groups, engine.device)
        for data in one.batches(agree):
            report += engine.evaluate(data.microbatches, (name,))
            beat()
        values |= _losses(report, name)
    losses = [value for name, value in values.items() if name.startswith("loss/")]
    return {"loss": sum(losses) / len(losses), **values} if losses else {}


def _losses(report: torch.Tensor, name: str) -> dict[str, float]:
    dist.all_reduce(report)
    loss = read_report(report.tolist(), (name,)).get(f"loss/{name}")
    if loss is None:
        return {}
    return {f"loss/{name}": loss, f"perplexity/{name}": math.exp(min(loss, 700.0))}
