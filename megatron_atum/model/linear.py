"""megatron-core's tensor-parallel linear layers without bias, built one way everywhere."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes as set_split
from megatron.core.transformer import TransformerConfig
from torch import nn

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


def mark_split_weights(module: nn.Module) -> None:
    """Tell megatron-core's gradient norm which weights are split.

    Its layers do so only in the initialisation that we replace. Weights already declared as replicated (the vision
    tower, built with a tensor group of one rank) stay so.
    """
    for layer in module.modules():
        if isinstance(layer, (ColumnParallelLinear, VocabParallelEmbedding)) and not is_replicated(layer.weight):
            set_split(layer.weight, True, 0, 1)
        elif isinstance(layer, RowParallelLinear) and not is_replicated(layer.weight):
            set_split(layer.weight, True, 1, 1)
            if layer.bias is not None:
                mark_replicated(layer.bias, sum_gradient=layer.config.sequence_parallel)
