"""LLaMA decoder layers on megatron-core's TransformerLayer.

Legend: S sequence, B batch, H width, A heads of this rank, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_atum.model.layer_classes import TORCH, LayerClasses
from megatron_atum.model.recompute import RecomputesInside
from megatron_atum.parallel.fusion import fused
from megatron_atum.parallel.gradients import is_replicated, mark_replicated

Rotation = tuple[Tensor, Tensor]  # cosine and sine of `RotaryFrequencies`


class MultiHeadSelfAttention(SelfAttention):
    """megatron-core's self-attention for as many key heads as query heads, in training.

    Its own split of the fused projection cannot infer a shape when the batch is empty (a rank without images), and it
    computes sines and cosines again in each layer.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, rotary_pos_emb: Rotation | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[S,B,H] (under sequence parallelism a rank's part of S) -> the same shape, and a bias to be added."""
        mixed, _ = self.linear_qkv(hidden_states)
        # per head, query, key and value lie side by side in the projection
        by_head = (self.num_attention_heads_per_partition, 3, self.hidden_size_per_attention_head)
        mixed_SBA3D = mixed.unflatten(-1, by_head)
        if rotary_pos_emb is None:
            query, key, value = mixed_SBA3D.unbind(-2)
        else:
            query, key, value = _SplitAndRotate.apply(mixed_SBA3D, *rotary_pos_emb)
        mask_type = self.attn_mask_type if attention_mask is None else AttnMaskType.arbitrary
        attended = self.core_attention(query, key, value, attention_mask, attn_mask_type=mask_type)
        return self.linear_proj(attended)


class _SplitAndRotate(torch.autograd.Function):
    """Queries, keys and values, the first two rotated. Backward writes one gradient for the three."""

    @staticmethod
    def forward(ctx: Any, mixed_SBA3D: Tensor, cos_SB1D: Tensor, sin_SB1D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_SB1D, sin_SB1D)
        query, key = _rotate_both(mixed_SBA3D, cos_SB1D, sin_SB1D)
        return query, key, mixed_SBA3D[..., 2, :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _rotate_back(*gradients, *ctx.saved_tensors), None, None


@fused
def _rotate_both(mixed_SBA3D: Tensor, cos_SB1D: Tensor, sin_SB1D: Tensor) -> tuple[Tensor, Tensor]:
    query, key, _ = mixed_SBA3D.unbind(-2)
    return rotate(query, cos_SB1D, sin_SB1D), rotate(key, cos_SB1D, sin_SB1D)


@fused
def _rotate_back(query: Tensor, key: Tensor, value: Tensor, cos_SB1D: Tensor, sin_SB1D: Tensor) -> Tensor:
    back_SB1D = -sin_SB1D
    return torch.stack((rotate(query, cos_SB1D, back_SB1D), rotate(key, cos_SB1D, back_SB1D), value), dim=-2)


def rotate(x_SBAD: Tensor, cos_SB1D: Tensor, sin_SB1D: Tensor) -> Tensor:
    """Rotary embedding, half-split convention. The sine is that of `RotaryFrequencies`, its sign in it."""
    first, second = x_SBAD.chunk(2, dim=-1)
    return torch.addcmul(x_SBAD * cos_SB1D, torch.cat((second, first), dim=-1), sin_SB1D)


class RecomputingMLP(RecomputesInside, MLP):
    """megatron-core's MLP, without its fusions and experts; what lies between its two projections can be recomputed.

    The second projection keeps its input if it trains.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, tensor_group: dist.ProcessGroup, **_: Any
    ) -> None:
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tensor_group)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        return self.linear_fc2(self.inside(self._widen, hidden_states))

    def _widen(self, hidden_states: Tensor) -> Tensor:
        wide, bias = self.linear_fc1(hidden_states)
        if self.config.gated_linear_unit:
            assert bias is None and self.activation_func is F.silu
            return SwiGLU.apply(wide)
        assert bias is not None
        if torch.is_grad_enabled() and wide.requires_grad:
            # not one kernel: the sum for the bias's gradient would depend on the shapes that came before
            return self.activation_func(wide + bias)
        return _biased(self.activation_func)(wide.flatten(0, 1), bias).view_as(wide)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of a projection that holds both, [..., 2F] -> [..., F]. Keeps that projection only."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor) -> Tensor:
        ctx.save_for_backward(wide)
        return _swiglu(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _swiglu_gradient(*ctx.saved_tensors, *gradients)


@fused
def _swiglu(wide: Tensor) -> Tensor:
    gate, up = wide.chunk(2, dim=-1)
    return F.silu(gate) * up


@fused
def _swiglu_gradient(wide: Tensor, gradient: Tensor) -> Tensor:
    gate, up = wide.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)), dim=-1)


@functools.cache
def _biased(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """activation(wide + bias) without a gradient, of [positions,F] of which there may be any number."""
    return fused(lambda wide, bias: activation(wide + bias))


def layer_submodules(
    classes: LayerClasses, mask_type: AttnMaskType, tensor_group: dist.ProcessGroup
) -> TransformerLayerSubmodules:
    """Pre-norm attention and MLP, the shape that LLaMA and CLIP share."""
    return TransformerLayerSubmodules(
        input_layernorm=classes.norm,
        self_attention=ModuleSpec(
            module=MultiHeadSelfAttention,
            params={"attn_mask_type": mask_type},
            submodules=SelfAttentionSubmodules(
                linear_qkv=classes.column, core_attention=classes.attention, linear_proj=classes.row
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=classes.norm,
        mlp=mlp_spec(tensor_group, classes),
        mlp_bda=get_bias_dropout_add,
    )


def mlp_spec(tensor_group: dist.ProcessGroup, classes: LayerClasses = TORCH) -> Any:
    """What a ModuleSpec has, without being one: to a spec of a class it does not know, megatron-core gives no group
    and a warning."""
    return SimpleNamespace(
        module=RecomputingMLP,
        params={"tensor_group": tensor_group},
        submodules=MLPSubmodules(linear_fc1=classes.column, linear_fc2=classes.row),
    )


def decoder_layer(
    config: TransformerConfig,
    classes: LayerClasses,
    collection: ProcessGroupCollection,
    number_in_chunk: int,
    virtual_rank: int | None,
) -> TransformerLayer:
    """One LLaMA layer (HF modeling_idefics.py: IdeficsDecoderLayer).

    Args:
        number_in_chunk: from 0; megatron-core adds the offset of the chunk (configs.py: _pipeline_layout).
    """
    layer = TransformerLayer(
        config,
        layer_submodules(classes, AttnMaskType.causal, collection.tp),
        layer_number=number_in_chunk + 1,
        pg_collection=collection,
        vp_stage=virtual_rank,
    )
    for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
        if not is_replicated(norm.weight):  # a norm that is not ours
            mark_replicated(norm.weight, sum_gradient=config.sequence_parallel)
            norm.weight.sequence_parallel = False  # else megatron-core would sum its gradient once more
    return layer


class RotaryFrequencies(nn.Module):
    """Rotary embeddings for arbitrary positions, half-split convention (HF: IdeficsRotaryEmbedding)."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        # A plain attribute, not a buffer: casting the model to bf16 must not round the frequencies.
        self.inv_freq = 1.0 / theta**exponent

    def forward(self, position_ids_BS: Tensor, dtype: torch.dtype) -> Rotation:
        """[B,S] int64 -> cosine and sine, each [S,B,1,D]; the sine is negative in the first half of D."""
        self.inv_freq = self.inv_freq.to(position_ids_BS.device)
        angles_SB1d = (position_ids_BS.t().to(torch.float32)[:, :, None] * self.inv_freq)[:, :, None, :]
        cos, sin = angles_SB1d.cos(), angles_SB1d.sin()
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
