"""Losses of a step from the reports of its microbatches, as the engine makes them, without what else travels along."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.training.loss import LossSettings, own_report, read_report


def report_sums(
    reports: list[Tensor], settings: LossSettings, groups: ProcessGroups, device: torch.device
) -> dict[str, float]:
    """On every rank. Collective over all ranks."""
    total = own_report(reports, settings.sources, groups, device)
    dist.all_reduce(total)
    return read_report(total.tolist(), settings.sources)
