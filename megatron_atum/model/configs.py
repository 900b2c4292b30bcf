"""megatron-core's configuration objects, derived from ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_atum.config.schema import ModelConfig
from megatron_atum.parallel.device import has_accelerator
from megatron_atum.parallel.layout import ParallelLayout


def quick_gelu(x: Tensor) -> Tensor:
    """HF activations.py: QuickGELUActivation."""
    return x * torch.sigmoid(1.702 * x)


# The names config/validate.py accepts.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def _base(dtype: torch.dtype) -> dict[str, Any]:
    """What every part has in common: no fusion that needs CUDA extensions, no dropout, own initialisation."""
    return {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": not has_accelerator(),
        "perform_initialization": False,  # checkpoint/weights.py fills every weight, equal at every layout
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _pipeline_layout(model: ModelConfig, layout: ParallelLayout) -> list[list[str]] | None:
    """The stage plan in megatron-core's terms: its TransformerLayer derives the layer number from this."""
    if layout.pipeline == 1:
        return None
    stages = []
    for index in range(layout.num_chunks):
        chunk = layout.chunk(index)
        stage = ["embedding"] if chunk.is_first else []
        stage += ["decoder"] * (chunk.num_units * model.cross_layer_interval)
        stages.append(stage + (["loss"] if chunk.is_last else []))
    return stages


def decoder_config(model: ModelConfig, layout: ParallelLayout, dtype: torch.dtype) -> TransformerConfig:
    """LLaMA decoder and gated cross-attention; also the configuration the schedules read."""
    interleaved = layout.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=_pipeline_layout(model, layout),
        pipeline_dtype=dtype,
        # Gloo's asynchronous send reads the tensor after the call; the overlapped schedule frees it at once. Streams
        # keep NCCL in order.
        deallocate_pipeline_outputs=has_accelerator() or not interleaved,
        # Two stages with batched p2p exchange the wrong tensors in megatron-core 0.16.1's interleaved schedule.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        **_base(dtype),
    )


def vision_config(model: ModelConfig, dtype: torch.dtype) -> TransformerConfig:
    """The CLIP tower. It is not split over tensor ranks: they share out the images (see vision.py)."""
    vision = model.vision
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.embed_dim,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_eps,
        activation_func=ACTIVATIONS[vision.hidden_act],
        add_bias_linear=True,
        **_base(dtype),
    )


def perceiver_config(model: ModelConfig, layout: ParallelLayout, dtype: torch.dtype) -> TransformerConfig:
    """Tensor-parallel but never sequence-parallel: its sequence is 64 latents of each image."""
    return TransformerConfig(
        num_layers=model.perceiver.depth,
        hidden_size=model.vision.embed_dim,
        num_attention_heads=model.perceiver.num_heads,
        kv_channels=model.perceiver.head_dim,
        add_bias_linear=False,
        tensor_model_parallel_size=layout.tensor,
        **_base(dtype),
    )
