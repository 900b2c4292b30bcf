"""Which text tokens see which images, as a plan made once per microbatch on the host, and the attention over it.

In pretraining a token sees one image or none. `SegmentPlan` groups the tokens by the image they see, so attention is
a variable-length product over (tokens of an image, latents of that image): its cost does not depend on how many
images a row has, and no mask of text x latents exists. `DensePlan` serves arbitrary masks. Both are made from host
tensors, so neither costs a device synchronisation.

Legend: b rows, S tokens of a row, I images of a row, N images of the microbatch, K images that some token sees,
T tokens that see an image, L latents per image, A heads of this rank, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_atum.batch import Batch
from megatron_atum.errors import DataError
from megatron_atum.model.attention import dot_product_attention, has_varlen, varlen_attention


@dataclass(frozen=True)
class SegmentPlan:
    """One image per token.

    Images are ordered by how many tokens see them. Where there is no kernel for segments of any lengths (CPU, fp32),
    those with equally many tokens are attended in one batched product: packed rows have few distinct counts, so few
    products serve many images, without padding.
    """

    tokens_T: Tensor  # places in the flattened [S,b] text, ordered by image
    images_K: Tensor  # images that are seen, in the order of their tokens
    starts_K: Tensor  # int32 [K+1]: where the tokens of each image begin, and their end
    groups: tuple[tuple[int, int], ...]  # (images, tokens of each); at least one: an empty one if no image is seen

    def to(self, device: torch.device) -> SegmentPlan:
        tokens_T, images_K, starts_K = (
            x.to(device, non_blocking=True) for x in (self.tokens_T, self.images_K, self.starts_K)
        )
        return SegmentPlan(tokens_T, images_K, starts_K, self.groups)


@dataclass(frozen=True)
class DensePlan:
    """Any number of images per token."""

    masks: tuple[Tensor, ...]  # per row [S, images of the row] bool, True where a token sees an image
    images_per_row: tuple[int, ...]

    def to(self, device: torch.device) -> DensePlan:
        return DensePlan(tuple(mask.to(device, non_blocking=True) for mask in self.masks), self.images_per_row)


AttentionPlan = SegmentPlan | DensePlan


def make_plan(batch: Batch) -> AttentionPlan:
    """The cheapest plan that is right for a batch.

    Raises:
        DataError: a token refers to an image that its row does not have.
    """
    if batch.image_attention_mask is not None:
        return dense_plan(batch.image_attention_mask, batch.images_per_row)
    return segment_plan(batch.image_index, batch.images_per_row)


def dense_plan(mask_bSI: Tensor, images_per_row: Tensor) -> DensePlan:
    counts = images_per_row.tolist()
    if counts and max(counts) > mask_bSI.shape[-1]:
        raise DataError(f"a row has {max(counts)} images, but image_attention_mask has room for {mask_bSI.shape[-1]}")
    return DensePlan(tuple(row[:, :n].bool() for row, n in zip(mask_bSI, counts, strict=True)), tuple(counts))


def segment_plan(image_index_bS: Tensor, images_per_row: Tensor) -> SegmentPlan:
    b, S = image_index_bS.shape
    if bool((image_index_bS >= images_per_row[:, None]).any()):
        raise DataError("a token refers to an image that its row does not have (image_index >= images_per_row)")
    N = int(images_per_row.sum())
    first_image_b = images_per_row.cumsum(0) - images_per_row
    image_Sb = torch.where(image_index_bS < 0, N, image_index_bS + first_image_b[:, None]).t().flatten()
    count_N = torch.bincount(image_Sb, minlength=N + 1)[:N]
    images_K = torch.argsort(count_N, stable=True)
    images_K = images_K[count_N[images_K] > 0]
    # place of each image in that order; tokens without an image come last and are cut off
    order_N = torch.full((N + 1,), N, dtype=torch.long)
    order_N[images_K] = torch.arange(len(images_K))
    tokens_T = torch.argsort(order_N[image_Sb], stable=True)[: int(count_N.sum())]
    lengths, images = torch.unique_consecutive(count_N[images_K], return_counts=True)
    groups = tuple(zip(images.tolist(), lengths.tolist(), strict=True))
    starts_K = F.pad(count_N[images_K].cumsum(0), (1, 0)).to(torch.int32)
    return SegmentPlan(tokens_T, images_K, starts_K, groups or ((0, 0),))


def select_latents(latents_NLV: Tensor, plan: AttentionPlan) -> Tensor:
    """The latents in the order in which `attend` takes keys and values made from them."""
    if isinstance(plan, SegmentPlan):
        return latents_NLV.index_select(0, plan.images_K)
    return latents_NLV


def attend(query_SbAD: Tensor, key_KLAD: Tensor, value_KLAD: Tensor, plan: AttentionPlan) -> Tensor:
    """Attention of text over the latents of the images it may see.

    Args:
        query_SbAD: queries of all text tokens.
        key_KLAD, value_KLAD: from `select_latents`.

    Returns:
        [S,b,A,D]; 0 for tokens that see no image (HF modeling_idefics.py: cross_attention_gate).
    """
    if isinstance(plan, SegmentPlan):
        return _attend_segments(query_SbAD, key_KLAD, value_KLAD, plan)
    return _attend_dense(query_SbAD, key_KLAD, value_KLAD, plan)


def _attend_segments(query_SbAD: Tensor, key_KLAD: Tensor, value_KLAD: Tensor, plan: SegmentPlan) -> Tensor:
    S, b, A, D = query_SbAD.shape
    query_TAD = query_SbAD.flatten(0, 1).index_select(0, plan.tokens_T)
    attend_segments = _attend_varlen if has_varlen(query_TAD) else _attend_groups
    out_TAD = attend_segments(query_TAD, key_KLAD, value_KLAD, plan)
    out = torch.zeros(S * b, A, D, dtype=query_SbAD.dtype, device=query_SbAD.device)
    return out.index_copy(0, plan.tokens_T, out_TAD).view(S, b, A, D)


def _attend_varlen(query_TAD: Tensor, key_KLAD: Tensor, value_KLAD: Tensor, plan: SegmentPlan) -> Tensor:
    """All images in one kernel."""
    K, L = key_KLAD.shape[:2]
    starts_of_latents = torch.arange(0, (K + 1) * L, L, dtype=torch.int32, device=query_TAD.device)
    most_tokens = plan.groups[-1][1]
    keys, values = key_KLAD.flatten(0, 1), value_KLAD.flatten(0, 1)
    return varlen_attention(query_TAD, keys, values, (plan.starts_K, starts_of_latents), (most_tokens, L))


def _attend_groups(query_TAD: Tensor, key_KLAD: Tensor, value_KLAD: Tensor, plan: SegmentPlan) -> Tensor:
    A, D = query_TAD.shape[1:]
    images = [n for n, _ in plan.groups]
    # split, not slices: the backward of each slice would fill a gradient of full size
    queries = query_TAD.split([n * length for n, length in plan.groups])
    keys, values = key_KLAD.split(images), value_KLAD.split(images)
    outs = []
    for (n, length), q, k, v in zip(plan.groups, queries, keys, values, strict=True):
        q_nAtD = q.view(n, length, A, D).transpose(1, 2)
        out_nAtD = dot_product_attention(q_nAtD, k.transpose(1, 2), v.transpose(1, 2))
        outs.append(out_nAtD.transpose(1, 2).reshape(n * length, A, D))
    return torch.cat(outs)


def _attend_dense(query_SbAD: Tensor, key_NLAD: Tensor, value_NLAD: Tensor, plan: DensePlan) -> Tensor:
    L = key_NLAD.shape[1]
    counts = list(plan.images_per_row)
    outs = []
    rows = zip(plan.masks, counts, query_SbAD.unbind(1), key_NLAD.split(counts), value_NLAD.split(counts), strict=True)
    for mask_SI, count, q_SAD, k, v in rows:
        # A key that only tokens without images see keeps the softmax of their rows finite (and rows without images
        # from being a special case); what those tokens compute is discarded below.
        sees_S1 = mask_SI.any(-1, keepdim=True)
        k_AKD, v_AKD = (_with_empty_key(x) for x in (k, v))
        mask_SK = torch.cat((~sees_S1, mask_SI.repeat_interleave(L, dim=1) if count else mask_SI), dim=1)
        out_ASD = dot_product_attention(q_SAD.transpose(0, 1), k_AKD, v_AKD, attn_mask=mask_SK)
        outs.append(torch.where(sees_S1[:, :, None], out_ASD.transpose(0, 1), 0.0))
    return torch.stack(outs, dim=1)


def _with_empty_key(x_ILAD: Tensor) -> Tensor:
    """[I,L,A,D] -> [A,1+I*L,D] with zeros in front."""
    return F.pad(x_ILAD.flatten(0, 1).transpose(0, 1), (0, 0, 1, 0))
