"""Gated cross-attention layer: text looks at the latents of its images (HF: IdeficsGatedCrossAttentionLayer).

Legend: S tokens, s tokens of this rank under sequence parallelism (else S), b rows, H hidden width, K images seen,
L latents, V latent width, A heads of this rank, D head width.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from megatron_atum.config.schema import ModelConfig
from megatron_atum.model.image_attention import AttentionPlan, attend
from megatron_atum.model.language import mlp_spec
from megatron_atum.model.linear import column_linear, row_linear
from megatron_atum.model.norm import RMSNorm
from megatron_atum.model.recompute import RecomputesInside
from megatron_atum.parallel.gradients import mark_replicated
from megatron_atum.parallel.groups import ProcessGroups


class CrossAttention(RecomputesInside, MegatronModule):
    """Heads split over tensor ranks, no rotary embedding, no bias (HF: IdeficsAttention, is_cross_attention).

    Keys and values come from latents that the stage has put into the tensor-parallel region once for all of its
    layers, so their projection reduces no gradient of its own.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: ProcessGroups) -> None:
        super().__init__(config=config)
        H, V = model.hidden_size, model.vision.embed_dim
        self.head_dim = H // model.num_heads
        self.query = column_linear(config, H, H, groups.tensor)
        self.key_value = column_linear(config, V, 2 * H, groups.tensor, reduce_input_gradient=False)
        self.output = row_linear(config, H, H, groups.tensor)
        self.qk_norm = model.qk_norm
        if self.qk_norm:
            # One weight serves all heads, and a rank sees only its own.
            self.query_norm = RMSNorm(config, self.head_dim, model.norm_eps, sum_gradient=True)
            self.key_norm = RMSNorm(config, self.head_dim, model.norm_eps, sum_gradient=True)

    def forward(self, hidden_sbH: Tensor, latents_KLV: Tensor, plan: AttentionPlan) -> Tensor:
        query_SbAD = self.query(hidden_sbH)[0].unflatten(-1, (-1, self.head_dim))
        projected = self.key_value(latents_KLV)[0].chunk(2, dim=-1)
        key_KLAD, value_KLAD = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        if self.qk_norm:
            query_SbAD, key_KLAD = self.query_norm(query_SbAD), self.key_norm(key_KLAD)
        out_SbAD = self.inside(attend, query_SbAD, key_KLAD, value_KLAD, plan)
        # Without a bias, the output of a token that sees no image stays exactly 0: this is the gate.
        return self.output(out_SbAD.flatten(2))[0]


class GatedCrossAttentionLayer(MegatronModule):
    """x + tanh(a) * attention(norm(x)), then x + tanh(d) * mlp(norm(x)); the second applies to every token."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: ProcessGroups) -> None:
        super().__init__(config=config)
        self.input_norm = RMSNorm(config, model.hidden_size, model.norm_eps)
        self.attention = CrossAttention(config, model, groups)
        self.post_attention_norm = RMSNorm(config, model.hidden_size, model.norm_eps)
        self.mlp = build_module(mlp_spec(groups.tensor), config)
        width = 1 if model.alpha_type == "float" else model.hidden_size
        self.alpha_attention = self._alpha(config, width)
        self.alpha_mlp = self._alpha(config, width)

    @staticmethod
    def _alpha(config: TransformerConfig, width: int) -> nn.Parameter:
        # The gate is applied to what the rank holds of the sequence.
        alpha = nn.Parameter(torch.empty(width, dtype=config.params_dtype))
        return mark_replicated(alpha, sum_gradient=config.sequence_parallel)

    def forward(self, hidden_sbH: Tensor, latents_KLV: Tensor, plan: AttentionPlan) -> Tensor:
        attended = self.attention(self.input_norm(hidden_sbH), latents_KLV, plan)
        hidden_sbH = hidden_sbH + torch.tanh(self.alpha_attention) * attended
        transformed, _ = self.mlp(self.post_attention_norm(hidden_sbH))
        return hidden_sbH + torch.tanh(self.alpha_mlp) * transformed
