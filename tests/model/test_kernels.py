"""The kernels that are chosen for speed compute what the plain ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_atum.model.attention import causal_attention
from megatron_atum.model.language import RotaryFrequencies, _SplitAndRotate
from megatron_atum.model.norm import _RMSNormOnCPU
from tests.distributed import run_distributed
from tests.layouts import ONE, build_engine, test_config
from tests.model.cases import Case, Expected, reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return list(torch.autograd.grad((out.float() * upstream).sum(), inputs))


def check_close(ours: list[Tensor], plain: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


@pytest.mark.parametrize("length", [8, 256, 300, 512, 513])
def test_causal_attention(length: int) -> None:
    """In blocks from 256 to 512, also where the last block is shorter."""
    query, key, value = (random(length, 2, 3, 16, seed=n) for n in range(3))
    inputs = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
    ours = causal_attention(*inputs, scale=0.3)
    plain = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3)
    check_close([ours], [plain], 1e-6)
    check_close(gradients(ours, query, key, value), gradients(plain, query, key, value), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 2, 48), (4, 3, 2, 16), (0, 3, 16)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (random(*s, seed=n).detach().to(dtype).requires_grad_() for n, s in enumerate((shape, shape[-1:])))
    ours = _RMSNormOnCPU.apply(x, weight, 1e-5)
    plain = F.rms_norm(x, (shape[-1],), None, 1e-5) * weight
    assert ours.dtype == plain.dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # two roundings to bf16
    if ours.numel():
        check_close([ours], [plain], tolerance)
        check_close(gradients(ours, x, weight), gradients(plain, x, weight), tolerance)
    else:
        assert not gradients(ours, weight)[0].any()
    frozen = _RMSNormOnCPU.apply(x, weight.detach(), 1e-5)
    assert torch.equal(frozen, ours)


def test_rotation() -> None:
    """Against the formula with complex numbers: each pair (first half, second half) turns by its angle."""
    mixed = random(6, 2, 3, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 1, 0, 1, 2, 7]])
    query, key, value = _SplitAndRotate.apply(mixed, *RotaryFrequencies(8, 100.0)(positions, torch.float32))
    angles = positions.t()[:, :, None, None] / 100.0 ** (torch.arange(4) / 4)
    turn = torch.polar(torch.ones_like(angles), angles)
    plain = [torch.complex(*mixed[:, :, :, n].chunk(2, dim=-1)) * turn for n in range(2)]
    plain = [torch.cat((x.real, x.imag), dim=-1) for x in plain] + [mixed[:, :, :, 2]]
    check_close([query, key, value], plain, 1e-6)
    ours, theirs = (torch.cat(parts, dim=-1) for parts in ((query, key, value), plain))
    check_close(gradients(ours, mixed), gradients(theirs, mixed), 1e-6)


class Batched(TorchDispatchMode):
    """Collects batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.found.append([tuple(x.shape) for x in args])
        return func(*args, **(kwargs or {}))


def batched_products(rank: int, world_size: int, expected: Expected) -> list[Any]:
    from megatron_atum.checkpoint.hf_config import from_hf

    engine = build_engine(test_config(from_hf(expected.config)), ONE, expected.state)
    engine.build_optimizer()
    with Batched() as batched:
        engine.forward_backward(expected.batches)
    return batched.found


def test_no_projection_is_a_batched_product() -> None:
    """A frozen weight and rows that do not lie one after the other would make it one, several times slower."""
    case = Case("frozen", 51, rows=3, length=256, images=((1, 2, 0),), frozen=True, small_norm_inputs=False)
    assert run_distributed(batched_products, 1, reference(case))[0] == []
