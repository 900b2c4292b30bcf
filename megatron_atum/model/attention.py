"""Core attention for megatron-core's layers, over torch's scaled dot product kernels.

Legend: S sequence, B batch, A heads of this rank, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_atum.model.recompute import RecomputesInside
from megatron_atum.parallel.device import has_flash_attention


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's scaled_dot_product_attention that also takes an empty batch.

    A rank without images attends over nothing, and that must stay in the graph; fused CUDA kernels refuse a batch
    of 0, the plain one does not.
    """
    if query.numel() and key.numel():
        return F.scaled_dot_product_attention(query, key, value, **options)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, **options)


def has_varlen(query_TAD: Tensor) -> bool:
    """Whether `varlen_attention` takes such queries: torch's flash kernel neither pads nor falls back."""
    D = query_TAD.shape[-1]
    fits = D % 8 == 0 and D <= 256 and query_TAD.dtype in (torch.bfloat16, torch.float16) and query_TAD.numel() > 0
    return fits and query_TAD.device.type != "cpu" and has_flash_attention() and _varlen_kernel() is not None


@functools.cache
def _varlen_kernel() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn  # only now: it imports the compiler
    except ImportError:  # before torch 2.10
        return None
    return varlen_attn


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int]
) -> Tensor:
    """Attention of segments that lie one after the other, without a mask. All [sum of lengths,A,D].

    Args:
        starts: of queries and of keys, int32 [segments + 1]: where each segment begins, and the end of the last.
        longest: most queries and most keys of a segment.
    """
    kernel = _varlen_kernel()
    assert kernel is not None
    return kernel(query, key, value, *starts, *longest)


# torch's CPU kernel takes 512 keys at a time and multiplies with all of them, forbidden or not. Blocks of queries that
# are given no key behind their end leave most of the forbidden products out; kernels of accelerators do so themselves.
_KEYS_AT_A_TIME, _QUERY_BLOCK = 512, 128


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Every query sees the keys up to its own place. All [B,A,S,D]."""
    S = query.shape[2]
    if query.device.type != "cpu" or not 2 * _QUERY_BLOCK <= S <= _KEYS_AT_A_TIME:
        return dot_product_attention(query, key, value, is_causal=True, scale=scale)
    outs, stop = [], 0
    for part in query.split(_QUERY_BLOCK, dim=2):
        start, stop = stop, stop + part.shape[2]
        allowed = torch.ones(part.shape[2], stop, dtype=torch.bool).tril(start)
        out = dot_product_attention(part, key[:, :, :stop], value[:, :, :stop], attn_mask=allowed, scale=scale)
        outs.append(out.permute(2, 0, 1, 3))
    return torch.cat(outs).permute(1, 2, 0, 3)


class TorchAttention(RecomputesInside, MegatronModule):
    """softmax(q k^T / sqrt(D)) v. Takes the arguments with which megatron-core builds a core attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBAD: Tensor,
        key_SBAD: Tensor,
        value_SBAD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **_: Any,
    ) -> Tensor:
        """attention_mask [B,1,S,S] is True where attention is forbidden; without one the mask type decides.

        Returns:
            [S,B,A*D]
        """
        mask_type = attn_mask_type or self.attn_mask_type
        attend = causal_attention
        if attention_mask is not None or mask_type != AttnMaskType.causal:
            allowed = None if attention_mask is None else ~attention_mask
            attend = partial(dot_product_attention, attn_mask=allowed)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBAD, key_SBAD, value_SBAD))
        out_BASD = self.inside(partial(attend, scale=self.softmax_scale), query, key, value)
        # Rows that do not lie one after the other would make the next projection a batched product, which is slower.
        return out_BASD.permute(2, 0, 1, 3).flatten(2).contiguous()


def causal_mask(attention_mask_BS: Tensor) -> Tensor:
    """Forbidden pairs of a batch with padding, [B,1,S,S] bool.

    A padding token may attend to itself, so that no row is empty; what it computes is never used.
    """
    S = attention_mask_BS.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=attention_mask_BS.device).tril()
    own = torch.eye(S, dtype=torch.bool, device=attention_mask_BS.device)
    allowed = (causal & attention_mask_BS.bool()[:, None, None, :]) | own
    return ~allowed
