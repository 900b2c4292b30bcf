"""Products of frozen weights in 8 bits (kernels.frozen_gemm=fp8).

A frozen matrix W [N,K] is cast once, to e4m3 values Q with one fp32 scale s for each output channel, W ~ s Q. Rows of
activations, and of gradients in backward, are cast when they come, each with a scale of its own. Both directions use
the same values; torch's scaled product multiplies its result with the scales:

    y = x W^T  ~ cast(x) Q^T, times the scales of x and s
    dx = dy W  ~ cast(dy s) Q, times the scales of dy s

Of e4m3's 3 bits of fraction a rounding costs 2^-4 of a value at most, or 2^-10 of the row's scale for values below 2^-6
of it; a row's scale brings its largest value to 448, the largest of e4m3. Sums are fp32 in backward; in forward they
may have fewer bits on Hopper (cuBLAS's fast accumulation). Results have the dtype of x.

The second product wants Q the other way round on NVIDIA's tensor cores (both operands lie along what is summed over).
Q is turned for each product: the time of reading and writing its bytes, against a second copy's memory.

What is communicated is what megatron-core's layers do, except that under sequence parallelism the gather of x carries
the cast values and their scales, half the bytes of bf16: rows have scales of their own, so the result is the same.
Products of row-parallel layers cast a rank's part of each row with a scale of its own.

Legend: N output channels and K inputs of this rank, M rows (tokens), s tokens of this rank under sequence parallelism
(else S), b rows of a microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_atum.config.schema import Config
from megatron_atum.errors import ConfigError
from megatron_atum.parallel.device import device_name, has_accelerator, has_fp8_products, training_dtype
from megatron_atum.parallel.fusion import fused

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # value of e4m3
_AT_ONCE = 2**22  # values of a weight that are cast at a time: a whole product with the scales would be in fp32
_NO_ZERO = 1e-30  # of a row of zeros: its scale must not be 0. 448 / 1e-30 is a number in fp32
_CAST = ("decoder_layers", "vision")  # the head's logits would carry the error into the loss (docs/performance.md)


def check_device(config: Config) -> None:
    """Raises ConfigError: this process's device has no such products, or not for this precision."""
    if config.kernels.frozen_gemm != "fp8" or not has_accelerator():
        return
    if not has_fp8_products():
        raise ConfigError(
            f"kernels.frozen_gemm=fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper), and this is "
            f"{device_name()}; kernels.frozen_gemm=bf16 would work"
        )
    if training_dtype(config.training) != torch.bfloat16:
        raise ConfigError(
            f"kernels.frozen_gemm=fp8 gives bf16 on a GPU, which training.precision={config.training.precision} is "
            "not; training.precision=bf16 would work, or kernels.frozen_gemm=bf16"
        )


# Numbers --------------------------------------------------------------------------------------------------------------


def _cast_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values, and the scales [M] fp32 that they are to be multiplied with. Not finite stays not finite."""
    largest_M = x_MK.abs().amax(-1).float().clamp(min=_NO_ZERO)
    return (x_MK * (LARGEST / largest_M)[:, None]).to(E4M3).contiguous(), largest_M / LARGEST


cast_rows = fused(_cast_rows)


@fused
def _cast_scaled(gradient_MN: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
    return _cast_rows(gradient_MN * scales_N)


@fused
def _turned(bytes_NK: Tensor) -> Tensor:
    return bytes_NK.t().contiguous()


def _product(a_MK: Tensor, a_M: Tensor, b_KN: Tensor, b_N: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """[M,N]. Args: fast: sums may have fewer bits than fp32 on Hopper."""
    scales = {"scale_a": a_M[:, None], "scale_b": b_N[None, :]}
    return torch._scaled_mm(a_MK, b_KN, **scales, out_dtype=dtype, use_fast_accum=fast)


# Products -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FrozenMatrix:
    """A frozen weight in 8 bits, which is called in the place of a linear layer's product."""

    values_NK: Tensor  # e4m3
    scales_N: Tensor  # fp32
    ones_K: Tensor  # fp32: the scales of backward's product, whose gradients are multiplied with scales_N before

    @classmethod
    def of(cls, weight_NK: Tensor, row_group: dist.ProcessGroup | None) -> FrozenMatrix:
        """
        Args:
            row_group: whose ranks hold the other parts of each row. They take one scale, so that the values are the
                same at every layout. Collective over it.
        """
        weight_NK = weight_NK.detach()
        parts = weight_NK.split(max(1, _AT_ONCE // weight_NK.shape[1]))
        largest_N = torch.cat([part.abs().amax(-1) for part in parts]).float().clamp(min=_NO_ZERO)
        if row_group is not None and row_group.size() > 1:
            dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=row_group)
        values_NK = torch.empty_like(weight_NK, dtype=E4M3)
        places = (tensor.split(len(parts[0])) for tensor in (values_NK, LARGEST / largest_N))
        for part, values, factors in zip(parts, *places, strict=True):
            values.copy_(part * factors[:, None])
        return cls(values_NK, largest_N / LARGEST, largest_N.new_ones(weight_NK.shape[1]))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is on the device."""
        return self.values_NK, self.scales_N, self.ones_K

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **_: Any,
    ) -> Tensor:
        """As megatron-core's linear_with_frozen_weight, whose arguments these are: [s,b,K] -> [S,b,N].

        Args:
            weight: what this was cast from; not used.
        """
        gathers = tp_group if sequence_parallel else None
        reduces = tp_group if allreduce_dgrad else None
        out = _FrozenProduct.apply(input, *self.tensors, gathers, reduces)
        return out if bias is None else out + bias


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_sbK: Tensor,
        values_NK: Tensor,
        scales_N: Tensor,
        ones_K: Tensor,
        gathers: dist.ProcessGroup | None,
        reduces: dist.ProcessGroup | None,
    ) -> Tensor:
        """
        Args:
            gathers: over which x is gathered along its first dimension, and its gradient reduced and scattered.
            reduces: over which the gradient of x is summed.
        """
        ctx.save_for_backward(values_NK, scales_N, ones_K)
        ctx.shape, ctx.gathers, ctx.reduces = x_sbK.shape, gathers, reduces
        S = x_sbK.shape[0] * (1 if gathers is None else gathers.size())
        shape_SbN = (S, *x_sbK.shape[1:-1], values_NK.shape[0])
        if x_sbK.numel() == 0:  # a rank without images; kernels refuse it
            return x_sbK.new_empty(shape_SbN)
        values_MK, scales_M = cast_rows(x_sbK.flatten(0, -2))
        if gathers is not None:
            values_MK = _gathered(values_MK.view(torch.uint8), gathers).view(E4M3)
            scales_M = _gathered(scales_M, gathers)
        return _product(values_MK, scales_M, values_NK.t(), scales_N, x_sbK.dtype, fast=True).view(shape_SbN)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        values_NK, scales_N, ones_K = ctx.saved_tensors
        (gradient_SbN,) = gradients
        if gradient_SbN.numel() == 0:
            return gradient_SbN.new_empty(ctx.shape), None, None, None, None, None
        values_MN, scales_M = _cast_scaled(gradient_SbN.flatten(0, -2), scales_N)
        turned_KN = _turned(values_NK.view(torch.uint8)).view(E4M3)
        out_MK = _product(values_MN, scales_M, turned_KN.t(), ones_K, gradient_SbN.dtype, fast=False)
        if ctx.gathers is not None:
            whole_MK, out_MK = out_MK, out_MK.new_empty(math.prod(ctx.shape[:-1]), ctx.shape[-1])
            dist.reduce_scatter_tensor(out_MK, whole_MK, group=ctx.gathers)
        elif ctx.reduces is not None:
            dist.all_reduce(out_MK, group=ctx.reduces)
        return out_MK.view(ctx.shape), None, None, None, None, None


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part, group=group)
    return whole


# Models ---------------------------------------------------------------------------------------------------------------


def cast_frozen(stages: Iterable[nn.Module]) -> None:
    """Let frozen matrices of decoder layers and vision tower be multiplied in 8 bits from here on.

    Layers of another kernels.backend are left alone. Parameters of the others go to the memory of the host, where
    checkpoints read them and a rollback writes what they are already. Weights must have been filled; what is cast
    already stays as it is. Collective over the tensor group.
    """
    for stage in stages:
        for name in _CAST:
            for layer in getattr(stage, name, nn.Module()).modules():
                if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
                    cast_layer(layer)


def cast_layer(layer: ColumnParallelLinear | RowParallelLinear) -> None:
    """One layer, if its weight is frozen and not cast yet."""
    weight = layer.weight
    if weight.requires_grad or isinstance(layer._forward_impl, FrozenMatrix):
        return
    row_group = layer.tp_group if isinstance(layer, RowParallelLinear) else None
    layer._forward_impl = FrozenMatrix.of(weight, row_group)
    weight.data = weight.data.cpu()


def frozen_matrices(stages: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter, FrozenMatrix]]:
    """Name and parameter of every weight that was cast, and what it was cast to."""
    for stage in stages:
        for name, layer in stage.named_modules():
            matrix = getattr(layer, "_forward_impl", None)
            if isinstance(matrix, FrozenMatrix):
                yield f"{name}.weight", layer.weight, matrix


def weight_bytes(stages: Iterable[nn.Module]) -> int:
    """What the weights of these stages take on the device."""
    stages = list(stages)
    every = sum(p.numel() * p.element_size() for stage in stages for p in stage.parameters())
    return every + sum(
        matrix.nbytes - weight.numel() * weight.element_size() for _, weight, matrix in frozen_matrices(stages)
    )
