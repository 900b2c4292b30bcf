"""Gradients of weights that every tensor rank holds in full.

megatron-core sums such gradients over the tensor group only under sequence parallelism. A weight shared by all heads
(the q/k norms of cross-attention and perceiver) needs the sum always, since each rank sees only its own heads. So
every replicated parameter carries one attribute that says how its gradient is combined, and `sum_replicated` is the
one place that applies it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

_ATTRIBUTE = "sum_gradient_over_tensor_ranks"


def mark_replicated(parameter: nn.Parameter, *, sum_gradient: bool) -> nn.Parameter:
    """Declare a parameter as replicated over tensor ranks.

    Args:
        parameter: held in full, with the same value, by every tensor rank.
        sum_gradient: True if each rank's backward yields only a part of the gradient (its own heads, its own
            part of the sequence, its own images); False if each rank already has all of it.
    """
    setattr(parameter, _ATTRIBUTE, sum_gradient)
    return parameter


def is_replicated(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, _ATTRIBUTE)


def check_marked(module: nn.Module) -> None:
    """Every parameter is either split over tensor ranks or says how its gradient is combined."""
    for name, parameter in module.named_parameters():
        split = getattr(parameter, "tensor_model_parallel", False)
        assert split != is_replicated(parameter), f"{name}: split={split}, replicated={is_replicated(parameter)}"


def sum_replicated(modules: Iterable[nn.Module], tensor_group: dist.ProcessGroup) -> None:
    """Add up the partial gradients of replicated parameters over the tensor ranks, in one all-reduce per dtype."""
    if tensor_group.size() == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad and getattr(parameter, _ATTRIBUTE, False):
                gradient: Any = getattr(parameter, "main_grad", parameter.grad)
                by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_dtype.values():
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat, group=tensor_group)
        for gradient, summed in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(summed)
