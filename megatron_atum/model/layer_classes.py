"""The classes that decoder layers are made of (kernels.backend).

`torch` is what the rest of the model is made of too. `te` takes Transformer Engine's linear layers, norm and attention
from megatron-core's spec provider, not its fused norm and projection, so that weights have the same names. Their
`_extra_state` is no parameter and in no checkpoint. Vision tower, perceiver, cross-attention, embedding and head stay
torch's: a rank without images calls the first two with empty tensors, and the others have kernels of their own.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_te_version, is_te_min_version
from torch import Tensor, nn

from megatron_atum.config.schema import KernelsConfig
from megatron_atum.errors import ConfigError, first_line
from megatron_atum.model.attention import TorchAttention
from megatron_atum.model.norm import RMSNorm
from megatron_atum.model.recompute import RecomputesInside
from megatron_atum.parallel.device import has_accelerator


@dataclass(frozen=True)
class LayerClasses:
    """All are built with the arguments that megatron-core gives them."""

    norm: type[nn.Module]
    column: type[nn.Module]  # output features split over tensor ranks
    row: type[nn.Module]  # input features split
    attention: type[nn.Module]


TORCH = LayerClasses(RMSNorm, ColumnParallelLinear, RowParallelLinear, TorchAttention)


def layer_classes(kernels: KernelsConfig, config: TransformerConfig) -> LayerClasses:
    """
    Args:
        config: of the decoder.

    Raises:
        ConfigError: kernels.backend=te without Transformer Engine.
    """
    if kernels.backend == "torch":
        return TORCH
    found = of_provider(te_provider())
    if kernels.frozen_gemm != "fp8":
        return found
    column, row = (_in_fp8(linear, config) for linear in (found.column, found.row))
    return LayerClasses(found.norm, column, row, found.attention)


def te_provider() -> BackendSpecProvider:
    """
    Raises:
        ConfigError: Transformer Engine cannot be imported.
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:  # megatron-core has stand-ins then, which fail when they are used
        raise ConfigError(
            f"kernels.backend=te needs Transformer Engine, which cannot be imported here ({first_line(error)}); "
            "pip install --no-build-isolation 'transformer-engine[pytorch]', or kernels.backend=torch would work"
        ) from None
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def of_provider(provider: BackendSpecProvider) -> LayerClasses:
    """A provider's classes, of which the attention takes part in selective recomputation."""
    attention = type("RecomputedAttention", (_RecomputedAttention, provider.core_attention()), {})
    return LayerClasses(
        norm=provider.layer_norm(rms_norm=True),
        column=provider.column_parallel_linear(),
        row=provider.row_parallel_linear(),
        attention=attention,
    )


def check_backend(kernels: KernelsConfig) -> None:
    """Raises ConfigError: kernels.backend cannot be had on this machine."""
    if kernels.backend == "torch":
        return
    te_provider()
    if not has_accelerator():
        raise ConfigError("kernels.backend=te needs a GPU, and here is none; kernels.backend=torch would work")
    if kernels.frozen_gemm == "fp8" and not is_te_min_version("2.2.0"):
        raise ConfigError(
            f"kernels.frozen_gemm=fp8 needs Transformer Engine 2.2 or later with kernels.backend=te, and here is "
            f"{get_te_version()}; kernels.frozen_gemm=bf16 would work"
        )


class _RecomputedAttention(RecomputesInside):
    """In front of a class of attention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        attend = partial(super().forward, **options)  # type: ignore[misc]
        return self.inside(attend, query, key, value, attention_mask)


class _FrozenInFp8:
    """In front of a class of linear layers: products in 8 bits for as long as the weight does not train.

    The context is entered here rather than around the layers, so that recomputation enters it again.
    """

    weight: Tensor
    fp8_config: TransformerConfig

    def forward(self, x: Tensor) -> Any:
        if self.weight.requires_grad:
            return super().forward(x)  # type: ignore[misc]
        with get_fp8_context(self.fp8_config):
            return super().forward(x)  # type: ignore[misc]


def _in_fp8(linear: type[nn.Module], config: TransformerConfig) -> type[nn.Module]:
    """A class whose frozen weights are multiplied in 8 bits, each tensor with a scale of its present values.

    These scales have no history that a checkpoint would have to keep. The configuration of the model does not say
    fp8, so nothing tells the layer that its weight is new, and it casts it once.
    """
    fp8_config = copy.copy(config)
    fp8_config.fp8, fp8_config.fp8_recipe = "hybrid", "tensorwise"  # e4m3, and e5m2 for gradients
    return type(f"{linear.__name__}FrozenInFp8", (_FrozenInFp8, linear), {"fp8_config": fp8_config})
