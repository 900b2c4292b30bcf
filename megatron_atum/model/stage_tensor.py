"""The one tensor that travels between pipeline stages: text states, and below them the latents of all images.

megatron-core's schedules send exactly one tensor. Latents are flattened over the whole microbatch and laid out as
extra rows of the text's width, so their number follows the images really present. Every rank knows all microbatches
of a step, so each pipeline sizes the tensor for itself (`latent_rows` of the largest); no shapes are exchanged.

Under sequence parallelism the text is split over tensor ranks, and so are the latents: each rank carries its part,
and a stage gathers them once for all its cross-attention layers.

Legend: s text tokens of this rank, b rows, H hidden width, r latent rows, N images, L latents, V latent width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_atum.config.schema import ModelConfig
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.parallel.layout import ParallelLayout


def latent_rows(num_images: int, rows: int, model: ModelConfig, layout: ParallelLayout) -> int:
    """Rows of [b,H] that one rank needs for the latents of a microbatch; at least 1, so that no image is no
    special case.

    Args:
        num_images: images of the microbatch.
        rows: b, rows of the microbatch.
    """
    values = num_images * model.perceiver.num_latents * model.vision.embed_dim
    return max(1, -(-values // (layout.sequence_shards * rows * model.hidden_size)))


def carry(latents_NLV: Tensor, rows: tuple[int, int, int], groups: ProcessGroups) -> Tensor:
    """Latents, whole on every tensor rank, to the rows [r,b,H] that this rank carries.

    Args:
        rows: (r, b, H).
    """
    r, b, H = rows
    size = groups.layout.sequence_shards * r * b * H
    flat = F.pad(latents_NLV.flatten(), (0, size - latents_NLV.numel()))
    if groups.layout.sequence:
        flat = scatter_to_sequence_parallel_region(flat, group=groups.tensor)
    return flat.view(r, b, H)


def spread(rows_rbH: Tensor, latents: tuple[int, int, int], groups: ProcessGroups) -> Tensor:
    """The rows that this rank carries to whole latents [N,L,V] inside the tensor-parallel region.

    Backward sums over tensor ranks, since each rank's heads give a part of the gradient.

    Args:
        latents: (N, L, V).
    """
    N, L, V = latents
    flat = rows_rbH.reshape(-1)
    if groups.layout.sequence:
        flat = gather_from_sequence_parallel_region(flat, tensor_parallel_output_grad=True, group=groups.tensor)
    else:
        flat = copy_to_tensor_model_parallel_region(flat, group=groups.tensor)
    return flat[: N * L * V].view(N, L, V)


def pack(hidden_sbH: Tensor, rows_rbH: Tensor) -> Tensor:
    """[s,b,H] and [r,b,H] to the stage tensor [s+r,b,H]."""
    return torch.cat((hidden_sbH, rows_rbH))


def unpack(stage_tensor: Tensor, latent_row_count: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`."""
    hidden_sbH, rows_rbH = stage_tensor.split((stage_tensor.shape[0] - latent_row_count, latent_row_count))
    return hidden_sbH, rows_rbH
