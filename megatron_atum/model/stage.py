"""A chunk of ATUM: what one (pipeline rank, virtual rank) holds, assembled from the parts.

Legend: s text tokens of this rank, S all of them, b rows, H hidden width, r latent rows, N images, L latents,
V latent width.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_atum.config.schema import KernelsConfig, ModelConfig, TrainingConfig
from megatron_atum.model.configs import decoder_config
from megatron_atum.model.cross_attention import GatedCrossAttentionLayer
from megatron_atum.model.freeze import freeze
from megatron_atum.model.image_attention import select_latents
from megatron_atum.model.inputs import StageInput
from megatron_atum.model.language import RotaryFrequencies, Rotation, decoder_layer
from megatron_atum.model.layer_classes import layer_classes
from megatron_atum.model.linear import mark_split_weights
from megatron_atum.model.norm import RMSNorm
from megatron_atum.model.perceiver import PerceiverResampler
from megatron_atum.model.recompute import Recompute, checkpointed, select
from megatron_atum.model.stage_tensor import carry, pack, spread, unpack
from megatron_atum.model.vision import VisionTransformer
from megatron_atum.model.vocabulary import DecoupledEmbedding, DecoupledHead, log_sum_exp_and_target
from megatron_atum.parallel.gradients import check_marked
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.parallel.layout import Chunk


class AtumStage(MegatronModule):
    """One chunk. Layers are named by their global number, so names are the same at every layout.

    Its forward takes a `StageInput`, and the stage tensor of the stage before through `set_input_tensor`.
    """

    def __init__(
        self,
        model: ModelConfig,
        groups: ProcessGroups,
        chunk: Chunk,
        dtype: torch.dtype,
        training: TrainingConfig | None = None,
        kernels: KernelsConfig | None = None,
    ) -> None:
        """
        Args:
            training: says what backward recomputes; None: nothing.
            kernels: says what decoder layers are made of; None: torch's.

        Raises:
            ConfigError: kernels.backend cannot be had here.
        """
        config = decoder_config(model, groups.layout, dtype)
        classes = layer_classes(kernels or KernelsConfig(), config)
        super().__init__(config=config)
        self.model, self.groups, self.chunk = model, groups, chunk
        self.recompute = Recompute.from_config(training)
        # Names that megatron-core's schedules and gradient finalisation read.
        self.pre_process, self.post_process = chunk.is_first, chunk.is_last
        self.vp_stage = chunk.virtual_rank if groups.layout.virtual_pipeline > 1 else None
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.input_tensor: Tensor | None = None

        if chunk.is_first:
            self.embedding = DecoupledEmbedding(config, model, groups)
            self.vision = VisionTransformer(model, groups, dtype, recompute=self.recompute.full)
            self.perceiver = PerceiverResampler(model, groups, dtype, recompute=self.recompute.full)
        self.cross_attention_layers = nn.ModuleDict(
            {str(u): GatedCrossAttentionLayer(config, model, groups) for u in chunk.units}
        )
        self.decoder_layers = nn.ModuleDict(
            {
                str(layer): decoder_layer(config, classes, groups.collection, number, self.vp_stage)
                for number, layer in enumerate(self.layers_of_chunk())
            }
        )
        if chunk.is_last:
            self.final_norm = RMSNorm(config, model.hidden_size, model.norm_eps)
            self.head = DecoupledHead(config, model, groups)
        self.rotary = RotaryFrequencies(model.hidden_size // model.num_heads, model.rope_theta)
        if self.recompute.kind == "selective":
            select((self.cross_attention_layers, self.decoder_layers))
        mark_split_weights(self, classes)
        check_marked(self)
        freeze(self, model.freeze, classes)

    def layers_of_chunk(self) -> range:
        """Global numbers of the decoder layers."""
        interval, units = self.model.cross_layer_interval, self.chunk.units
        return range(units.start * interval, units.stop * interval)

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self.input_tensor = tensors[0]

    def forward(self, batch: StageInput, *, logits: bool = False) -> Tensor:
        """
        Args:
            logits: the last chunk returns all logits instead of losses.

        Returns:
            On the last chunk cross entropy and logsumexp of every token, [2,b,S] fp32, or logits [b,S,V+A];
            on the others the stage tensor [s+r,b,H].
        """
        hidden_sbH, rows_rbH = self._enter(batch)
        hidden_sbH = self._decode(hidden_sbH, rows_rbH, batch)
        if not self.chunk.is_last:
            return pack(hidden_sbH, rows_rbH)
        logits_SbC = self.head(self.final_norm(hidden_sbH))
        if logits:
            return self.head.gather_logits(logits_SbC).transpose(0, 1)
        columns_Sb = self.head.target_columns(batch.labels.t())
        log_sum_exp_Sb, target_Sb = log_sum_exp_and_target(logits_SbC, columns_Sb, self.groups.tensor)
        return torch.stack((log_sum_exp_Sb - target_Sb, log_sum_exp_Sb)).transpose(1, 2)

    def _enter(self, batch: StageInput) -> tuple[Tensor, Tensor]:
        """Text states [s,b,H] and carried latents [r,b,H] at the start of this chunk."""
        if not self.chunk.is_first:
            assert self.input_tensor is not None
            return unpack(self.input_tensor, batch.latent_rows)
        features_NPV = self.vision.encode_shared(batch.pixels, batch.num_images)
        latents_NLV = self.perceiver(features_NPV)
        rows = (batch.latent_rows, batch.shape[0], self.model.hidden_size)
        return self.embedding(batch.input_ids), carry(latents_NLV, rows, self.groups)

    def _decode(self, hidden_sbH: Tensor, rows_rbH: Tensor, batch: StageInput) -> Tensor:
        size = (batch.num_images, self.model.perceiver.num_latents, self.model.vision.embed_dim)
        latents_KLV = select_latents(spread(rows_rbH, size, self.groups), batch.plan)
        rotation = self.rotary(batch.position_ids, self.config.params_dtype)
        for layers, recomputed in self.recompute.pieces(self.layers_of_chunk()):
            run = partial(self._run, layers, batch, rotation)
            hidden_sbH = (partial(checkpointed, run) if recomputed else run)(hidden_sbH, latents_KLV)
        return hidden_sbH

    def _run(
        self, layers: range, batch: StageInput, rotation: Rotation, hidden_sbH: Tensor, latents_KLV: Tensor
    ) -> Tensor:
        """Some decoder layers, with the cross-attention in front of them."""
        for layer in layers:
            unit, place = divmod(layer, self.model.cross_layer_interval)
            if place == 0:
                hidden_sbH = self.cross_attention_layers[str(unit)](hidden_sbH, latents_KLV, batch.plan)
            hidden_sbH, _ = self.decoder_layers[str(layer)](
                hidden_sbH, attention_mask=batch.causal_mask, rotary_pos_emb=rotation
            )
        return hidden_sbH


def build_stages(
    model: ModelConfig,
    groups: ProcessGroups,
    dtype: torch.dtype,
    training: TrainingConfig | None = None,
    kernels: KernelsConfig | None = None,
) -> list[AtumStage]:
    """The chunks of this rank, in virtual order, with uninitialised weights. Arguments as of `AtumStage`."""
    return [AtumStage(model, groups, chunk, dtype, training, kernels) for chunk in groups.chunks]
