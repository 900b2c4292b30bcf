"""LLaMA decoder layers on megatron-core's TransformerLayer.

Legend: S sequence, B batch, H width, A heads of this rank, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_atum.model.attention import TorchAttention
from megatron_atum.model.norm import RMSNorm


class MultiHeadSelfAttention(SelfAttention):
    """megatron-core's self-attention for as many key heads as query heads.

    Its own split of the fused projection cannot infer a shape when the batch is empty (a rank without images).
    """

    def get_query_key_value_tensors(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """[S,B,H] -> query, key, value, each [S,B,A,D]; per head they lie side by side in the projection."""
        mixed, _ = self.linear_qkv(hidden_states)
        by_head = mixed.unflatten(-1, (self.num_attention_heads_per_partition, 3 * self.hidden_size_per_attention_head))
        query, key, value = by_head.chunk(3, dim=-1)
        return query, key, value


def layer_submodules(norm: type[nn.Module], mask_type: AttnMaskType) -> TransformerLayerSubmodules:
    """Pre-norm attention and MLP, the shape that LLaMA and CLIP share."""
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=MultiHeadSelfAttention,
            params={"attn_mask_type": mask_type},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear, core_attention=TorchAttention, linear_proj=RowParallelLinear
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=mlp_spec(),
        mlp_bda=get_bias_dropout_add,
    )


def mlp_spec() -> ModuleSpec:
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )


def decoder_layer(
    config: TransformerConfig, collection: ProcessGroupCollection, number_in_chunk: int, virtual_rank: int | None
) -> TransformerLayer:
    """One LLaMA layer (HF modeling_idefics.py: IdeficsDecoderLayer).

    Args:
        number_in_chunk: from 0; megatron-core adds the offset of the chunk (configs.py: _pipeline_layout).
    """
    return TransformerLayer(
        config,
        layer_submodules(RMSNorm, AttnMaskType.causal),
        layer_number=number_in_chunk + 1,
        pg_collection=collection,
        vp_stage=virtual_rank,
    )


class RotaryFrequencies(nn.Module):
    """Angles of rotary embeddings for arbitrary positions, half-split convention (HF: IdeficsRotaryEmbedding)."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        # A plain attribute, not a buffer: casting the model to bf16 must not round the frequencies.
        self.inv_freq = 1.0 / theta**exponent

    def forward(self, position_ids_BS: Tensor) -> Tensor:
        """[B,S] int64 -> [S,B,1,D] fp32, as megatron-core's attention takes it."""
        self.inv_freq = self.inv_freq.to(position_ids_BS.device)
        angles_SBD = position_ids_BS.t().to(torch.float32)[:, :, None] * self.inv_freq
        return torch.cat((angles_SBD, angles_SBD), dim=-1)[:, :, None, :]
