"""Norms and scales of many tensors at once."""

from __future__ import annotations

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

from megatron_atum.parallel import multi_tensor


def made() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), ())]


def test_norm_is_that_of_all_tensors_together() -> None:
    norm, nothing = multi_tensor.l2_norm(1, torch.zeros(1), [made()], False)
    assert norm.shape == (1,) and norm.dtype == torch.float32 and nothing is None
    assert float(norm) == pytest.approx(float(torch.cat([x.flatten() for x in made()]).norm()), rel=1e-6)


def test_scale_in_place_and_into_others() -> None:
    tensors, others = made(), [torch.zeros_like(x) for x in made()]
    multi_tensor.scale(1, torch.zeros(1), [tensors, others], 0.5)
    multi_tensor.scale(1, torch.zeros(1), [tensors, tensors], 0.25)
    for x, half, quarter in zip(made(), others, tensors, strict=True):
        assert torch.equal(half, x * 0.5) and torch.equal(quarter, x * 0.25)


def test_what_is_installed_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever megatron-core took when it was imported is replaced, its own stand-ins among it."""
    for norm, scale in ((object(), object()), (local_multi_tensor_l2_norm, local_multi_tensor_scale)):
        monkeypatch.setattr(clip_grads, "l2_norm_impl", norm)
        monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", scale)
        for _ in range(2):
            multi_tensor.use_foreach_kernels()
            assert clip_grads.l2_norm_impl is multi_tensor.l2_norm
            assert clip_grads.multi_tensor_scale_impl is multi_tensor.scale
