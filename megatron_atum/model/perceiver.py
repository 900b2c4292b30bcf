"""Perceiver resampler: pools the vision states of each image into a few latents. HF: idefics/perceiver.py.

Heads and MLP columns are split over tensor ranks. There is no sequence parallelism inside: every tensor rank holds
all latents, so gradients of weights before a split are whole on every rank, and only the norms of queries and keys,
applied to a rank's own heads, need a sum.

Legend: N images, P vision tokens, L latents, V embedding width, A heads of this rank, D head width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_atum.config.schema import ModelConfig
from megatron_atum.model.attention import dot_product_attention
from megatron_atum.model.configs import perceiver_config
from megatron_atum.model.linear import column_linear, row_linear
from megatron_atum.model.norm import LayerNorm
from megatron_atum.model.recompute import checkpointed
from megatron_atum.parallel.gradients import mark_replicated
from megatron_atum.parallel.groups import ProcessGroups

NORM_EPS = 1e-5  # torch's default, whatever the decoder uses


class PerceiverAttention(MegatronModule):
    """Latents attend to the vision states and to themselves (HF: IdeficsPerceiverAttention)."""

    query: ColumnParallelLinear
    output: RowParallelLinear

    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: ProcessGroups) -> None:
        super().__init__(config=config)
        self.groups = groups
        self.head_dim = model.perceiver.head_dim
        width, inner = model.vision.embed_dim, model.perceiver.num_heads * self.head_dim
        self.context_norm = LayerNorm(config, width, NORM_EPS)
        self.latents_norm = LayerNorm(config, width, NORM_EPS)
        self.query = column_linear(config, width, inner, groups.tensor, reduce_input_gradient=False)
        self.key_value = column_linear(config, width, 2 * inner, groups.tensor, reduce_input_gradient=False)
        self.output = row_linear(config, inner, width, groups.tensor)
        self.qk_norm = model.perceiver.qk_norm
        if self.qk_norm:
            self.query_norm = LayerNorm(config, self.head_dim, NORM_EPS, sum_gradient=True)
            self.key_norm = LayerNorm(config, self.head_dim, NORM_EPS, sum_gradient=True)

    def forward(self, context_NPV: Tensor, latents_NLV: Tensor) -> Tensor:
        P = context_NPV.shape[1]
        normed = torch.cat((self.context_norm(context_NPV), self.latents_norm(latents_NLV)), dim=1)
        # One reduction of the input gradient serves both projections.
        normed = copy_to_tensor_model_parallel_region(normed, group=self.groups.tensor)
        query = self._heads(self.query(normed[:, P:])[0])
        key, value = (self._heads(x) for x in self.key_value(normed)[0].chunk(2, dim=-1))
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        out_NALD = dot_product_attention(query, key, value)
        return self.output(out_NALD.transpose(1, 2).flatten(2))[0]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class PerceiverMLP(MegatronModule):
    """Norm, widen four times, ReLU, narrow, without biases (HF: IdeficsMLP)."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: ProcessGroups) -> None:
        super().__init__(config=config)
        width = model.vision.embed_dim
        self.norm = LayerNorm(config, width, NORM_EPS)
        self.fc = column_linear(config, width, 4 * width, groups.tensor)
        self.proj = row_linear(config, 4 * width, width, groups.tensor)

    def forward(self, latents_NLV: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(self.norm(latents_NLV))[0]))[0]


class PerceiverBlock(MegatronModule):
    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: ProcessGroups) -> None:
        super().__init__(config=config)
        self.attention = PerceiverAttention(config, model, groups)
        self.mlp = PerceiverMLP(config, model, groups)

    def forward(self, context_NPV: Tensor, latents_NLV: Tensor) -> Tensor:
        latents_NLV = latents_NLV + self.attention(context_NPV, latents_NLV)
        return latents_NLV + self.mlp(latents_NLV)


class PerceiverResampler(MegatronModule):
    """Vision states [N,P,V] to latents [N,L,V] (HF: IdeficsPerceiverResampler). N may be 0."""

    def __init__(
        self, model: ModelConfig, groups: ProcessGroups, dtype: torch.dtype, *, recompute: bool = False
    ) -> None:
        """recompute: keep the inputs of each block only."""
        config = perceiver_config(model, groups.layout, dtype)
        super().__init__(config=config)
        self.recompute = recompute
        latents = nn.Parameter(torch.empty(model.perceiver.num_latents, model.vision.embed_dim, dtype=dtype))
        self.latents = mark_replicated(latents, sum_gradient=False)
        self.blocks = nn.ModuleList(PerceiverBlock(config, model, groups) for _ in range(model.perceiver.depth))
        self.final_norm = LayerNorm(config, model.vision.embed_dim, NORM_EPS)

    def forward(self, context_NPV: Tensor) -> Tensor:
        latents_NLV = self.latents.expand(context_NPV.shape[0], -1, -1)
        for block in self.blocks:
            run = partial(checkpointed, block) if self.recompute else block
            latents_NLV = run(context_NPV, latents_NLV)
        return self.final_norm(latents_NLV)
