"""Norms that work under sequence parallelism: their weights say how their gradient is combined."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor, nn

from megatron_atum.parallel.gradients import mark_replicated


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (HF modeling_idefics.py: IdeficsRMSNorm).

    The statistics are fp32. On a CPU the normalised value is rounded to the input's dtype before the product with the
    weight, as there; accelerators' fused kernel rounds the product only. Takes the arguments with which megatron-core
    builds a norm.

    Args:
        sum_gradient: each tensor rank sees only a part of what this norm is applied to (its heads, or under
            sequence parallelism its tokens), so gradients must be summed. Default: sequence parallelism is on.
    """

    def __init__(
        self,
        config: ModelParallelConfig,
        hidden_size: int,
        eps: float = 1e-6,
        sum_gradient: bool | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.weight = mark_replicated(
            weight, sum_gradient=config.sequence_parallel if sum_gradient is None else sum_gradient
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return _RMSNormOnCPU.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """torch has a fused kernel for accelerators only; what it does on a CPU goes over the tensor a dozen times.

    With n = x * scale and h = gradient * weight, the gradient of x is scale * (h - n * mean(h * n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = (torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        normed = x.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_x = gradient.float() * weight
        along = torch.linalg.vecdot(grad_x, normed)[..., None] / x.shape[-1]
        grad_x.addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


class LayerNorm(nn.LayerNorm):
    """LayerNorm with bias. Arguments as for `RMSNorm`."""

    def __init__(
        self,
        config: ModelParallelConfig,
        hidden_size: int,
        eps: float = 1e-5,
        sum_gradient: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_replicated(self.weight, sum_gradient=sum_gradient)
        mark_replicated(self.bias, sum_gradient=sum_gradient)
