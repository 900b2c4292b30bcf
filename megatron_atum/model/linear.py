"""megatron-core's tensor-parallel linear layers without bias, built one way everywhere."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_atum.model.layer_classes import LayerClasses
from megatron_atum.parallel.gradients import is_replicated, mark_replicated


def column_linear(
    config: TransformerConfig,
    inputs: int,
    outputs: int,
    group: dist.ProcessGroup,
    *,
    reduce_input_gradient: bool = True,
) -> ColumnParallelLinear:
    """Output features split over the group.

    Args:
        reduce_input_gradient: False if the caller has put the input into the tensor-parallel region already
            (copied or gathered), so that one reduction serves several layers.
    """
    linear = ColumnParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        disable_grad_reduce=not reduce_input_gradient,
        tp_group=group,
    )
    if not reduce_input_gradient:
        linear.sequence_parallel = False
        linear.allreduce_dgrad = False
    return linear


def row_linear(config: TransformerConfig, inputs: int, outputs: int, group: dist.ProcessGroup) -> RowParallelLinear:
    """Input features split over the group; the output is summed over it (and scattered, under sequence parallel)."""
    return RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=group,
    )


def mark_split_weights(module: nn.Module, classes: LayerClasses) -> None:
    """Tell megatron-core's gradient norm which weights are split.

    Its layers do so only in the initialisation that we replace. Weights already declared as replicated (the vision
    tower, built with a tensor group of one rank) stay so.

    Args:
        classes: of the decoder layers; the others are torch's.
    """
    columns = (ColumnParallelLinear, VocabParallelEmbedding, classes.column)
    rows = (RowParallelLinear, classes.row)
    layer: Any
    for layer in module.modules():
        is_column, is_row = isinstance(layer, columns), isinstance(layer, rows)
        if not (is_column or is_row) or is_replicated(layer.weight):
            continue
        _set_split(layer.weight, 0 if is_column else 1)
        if is_row and isinstance(layer.bias, nn.Parameter):
            mark_replicated(layer.bias, sum_gradient=layer.config.sequence_parallel)


def _set_split(weight: Tensor, dimension: int) -> None:
    """megatron-core's attributes. Its function refuses weights that have them, as Transformer Engine's do."""
    for name, value in {"tensor_model_parallel": True, "partition_dim": dimension, "partition_stride": 1}.items():
        setattr(weight, name, value)
