"""Norms and scales of many tensors at once, by torch's kernels on every machine.

megatron-core takes those of Transformer Engine or Apex where it can import them, and results would depend on what is
installed. Its own stand-ins (utils.py: local_multi_tensor_l2_norm, local_multi_tensor_scale) go from tensor to tensor
and bring each norm to the host, which waits for the device hundreds of times in a step.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from torch import Tensor


def use_foreach_kernels() -> None:
    """Put torch's kernels in the place of what megatron-core took. May be called again."""
    clip_grads.l2_norm_impl = l2_norm
    clip_grads.multi_tensor_scale_impl = scale


def l2_norm(
    chunk_size: int, no_op: Tensor, tensors: list[list[Tensor]], per_tensor: bool, *_: Any
) -> tuple[Tensor, None]:
    """Norm [1] of all tensors together."""
    norms = torch.stack(torch._foreach_norm(tensors[0]))
    return torch.linalg.vector_norm(norms.float()).reshape(1), None


def scale(chunk_size: int, no_op: Tensor, tensors: list[list[Tensor]], factor: float) -> None:
    """The second list becomes the first times a factor."""
    source, target = tensors
    if source is not target:
        torch._foreach_copy_(target, source)
    torch._foreach_mul_(target, factor)
