"""What a stage needs of a batch, on its device, prepared once per step and shared by the stage's chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_atum.batch import Batch, normalise_pixels
from megatron_atum.config.schema import ModelConfig
from megatron_atum.model.attention import causal_mask
from megatron_atum.model.image_attention import AttentionPlan, make_plan
from megatron_atum.model.stage_tensor import latent_rows
from megatron_atum.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class StageInput:
    """One microbatch. Shapes as in `batch.Batch`; pixels are normalised."""

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    z_mask: Tensor
    position_ids: Tensor
    pixels: Tensor
    num_images: int
    plan: AttentionPlan
    causal_mask: Tensor | None  # [b,1,S,S] True where forbidden; None: plain causal
    latent_rows: int  # of the stage tensor; the same for all microbatches of a step
    source: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.input_ids.shape[0], self.input_ids.shape[1]


def prepare(
    batches: list[Batch], model: ModelConfig, groups: ProcessGroups, device: torch.device, dtype: torch.dtype
) -> list[StageInput]:
    """Plans and device copies of all microbatches of a step."""
    r = max(latent_rows(batch.num_images, batch.input_ids.shape[0], model, groups.layout) for batch in batches)
    return [_prepare_one(batch, r, device, dtype) for batch in batches]


def _prepare_one(batch: Batch, r: int, device: torch.device, dtype: torch.dtype) -> StageInput:
    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    return StageInput(
        input_ids=move(batch.input_ids),
        labels=move(batch.labels),
        loss_mask=move(batch.loss_mask),
        z_mask=move(batch.z_mask),
        position_ids=move(batch.position_ids),
        pixels=normalise_pixels(move(batch.pixels)).to(dtype),
        num_images=batch.num_images,
        plan=make_plan(batch).to(device),
        causal_mask=None if batch.attention_mask is None else causal_mask(move(batch.attention_mask)),
        latent_rows=r,
        source=batch.source,
    )


def stage_rows(inputs: list[StageInput], groups: ProcessGroups) -> int:
    """Length of the stage tensor on one rank, for the schedule."""
    _, S = inputs[0].shape
    return S // groups.layout.sequence_shards + inputs[0].latent_rows
