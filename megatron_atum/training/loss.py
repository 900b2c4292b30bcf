"""Cross entropy and z-loss with their own masks and divisors.

The divisors are global counts, known before the schedule runs, so each microbatch contributes its exact share of the
global mean wherever it runs. A count of zero gives a loss of zero.

Legend: b rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_atum.batch import Batch
from megatron_atum.config.schema import TrainingConfig
from megatron_atum.model.inputs import StageInput
from megatron_atum.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class LossSettings:
    """What a step's loss needs besides the microbatch."""

    tokens: float  # positions of the step that count in the cross entropy, over all data-parallel ranks
    z_tokens: float  # positions that count in the z-loss
    images: int  # of the step, over all data-parallel ranks
    real_tokens: int  # positions that are no padding
    z_weight: float
    per_microbatch_mean: bool  # training.loss_normalization=idefics
    microbatches: int  # of one data-parallel rank
    data_parallel: int
    sources: tuple[str, ...]  # names under which losses are reported

    @property
    def averaged_over(self) -> int:
        """megatron-core divides the loss by the microbatches and the gradients by the data-parallel ranks."""
        return self.microbatches * self.data_parallel


def loss_settings(
    batches: list[Batch],
    config: TrainingConfig,
    groups: ProcessGroups,
    sources: tuple[str, ...],
    device: torch.device,
) -> LossSettings:
    """Count the step's tokens and images. Collective over the data-parallel group."""
    sums = [(batch.loss_mask.sum(), batch.z_mask.sum(), batch.num_images, _real_tokens(batch)) for batch in batches]
    counts = torch.tensor(sums, dtype=torch.float64).sum(0).to(device)
    dist.all_reduce(counts, group=groups.data)
    tokens, z_tokens, images, real_tokens = counts.tolist()
    return LossSettings(
        tokens=tokens,
        z_tokens=z_tokens,
        images=int(images),
        real_tokens=int(real_tokens),
        z_weight=config.z_loss,
        per_microbatch_mean=config.loss_normalization == "idefics",
        microbatches=len(batches),
        data_parallel=groups.layout.data,
        sources=sources,
    )


def _real_tokens(batch: Batch) -> Tensor:
    """Positions count up from 0 over the real tokens of a row, wherever its padding stands."""
    return (batch.position_ids.amax(1) + 1).sum()


def loss_function(settings: LossSettings, batch: StageInput) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The function megatron-core's schedule applies to the output of the last stage."""

    def apply(output: Tensor) -> tuple[Tensor, Tensor]:
        """output [2,b,S] (cross entropy, logsumexp) -> (loss for backward, report as `own_report` adds them up)."""
        nll_bS, log_sum_exp_bS = output
        nll_sum_b = (nll_bS * batch.loss_mask).sum(-1)
        count_b = batch.loss_mask.sum(-1)
        z_sum = (log_sum_exp_bS.square() * batch.z_mask).sum()
        loss = nll_sum_b.sum() * _share(settings, settings.tokens, count_b.sum())
        z_loss = z_sum * _share(settings, settings.z_tokens, batch.z_mask.sum())
        objective = (loss + settings.z_weight * z_loss) * settings.averaged_over
        return objective, _report(settings, batch.source, loss, z_loss, nll_sum_b, count_b)

    return apply


def _share(settings: LossSettings, total: float, own: Tensor) -> Tensor | float:
    """Factor from a microbatch's sum to its part of the step's mean."""
    if settings.per_microbatch_mean:
        return 1.0 / own.clamp(min=1.0) / settings.averaged_over
    return 1.0 / max(total, 1.0)


def _report(
    settings: LossSettings, source: tuple[str, ...], loss: Tensor, z_loss: Tensor, nll_sum_b: Tensor, count_b: Tensor
) -> Tensor:
    report = torch.zeros(2 + 2 * len(settings.sources), dtype=torch.float64, device=loss.device)
    report[0], report[1] = loss.detach(), z_loss.detach()
    for row, name in enumerate(source):
        place = 2 + 2 * settings.sources.index(name)
        report[place] += nll_sum_b[row].detach()
        report[place + 1] += count_b[row]
    return report


def own_report(reports: list[Tensor], sources: tuple[str, ...], groups: ProcessGroups, device: torch.device) -> Tensor:
    """What this rank adds to the report of a step, [2 + 2 x sources] fp64: to be summed over all ranks.

    Args:
        reports: of this rank's microbatches; empty on ranks that hold no last stage.
    """
    total = torch.zeros(2 + 2 * len(sources), dtype=torch.float64, device=device)
    if reports and groups.tensor_rank == 0:  # tensor ranks hold copies
        total += torch.stack(reports).sum(0)
    return total


def read_report(values: list[float], sources: tuple[str, ...]) -> dict[str, float]:
    """Losses from the sum of all ranks' `own_report`: loss, z_loss, loss/<source> of the sources that were there."""
    losses = {"loss": values[0], "z_loss": values[1]}
    for place, name in enumerate(sources):
        nll_sum, count = values[2 + 2 * place : 4 + 2 * place]
        if count:
            losses[f"loss/{name}"] = nll_sum / count
    return losses
