"""The kernels that are chosen for speed compute what the plain ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_atum.model import attention, image_attention
from megatron_atum.model.attention import causal_attention
from megatron_atum.model.image_attention import SegmentPlan, attend, segment_plan, select_latents
from megatron_atum.model.language import RotaryFrequencies, SwiGLU, _biased, _SplitAndRotate
from megatron_atum.model.norm import RMSNorm, _RMSNormOnCPU
from megatron_atum.parallel.determinism import be_deterministic
from megatron_atum.parallel.device import device
from megatron_atum.parallel.fusion import fuses
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


def test_swiglu_keeps_its_input_only() -> None:
    wide, kept = random(6, 2, 10), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ours = SwiGLU.apply(wide)
    gate, up = wide.chunk(2, dim=-1)
    plain = F.silu(gate) * up
    check_close([ours], [plain], 1e-6)
    check_close(gradients(ours, wide), gradients(plain, wide), 1e-6)
    assert [x.data_ptr() for x in kept] == [wide.data_ptr()]


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().to(device(), torch.bfloat16).requires_grad_() for x in tensors]


def check_fused(function: Any, *tensors: Tensor, plain: Any = None) -> None:
    """In bf16 on the device against the same function, or `plain`, in double precision on the CPU."""
    inputs = on_device(*tensors)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    upstream: list[Tensor] = []
    results = []
    for run, arguments in ((function, inputs), (plain or function, exact)):
        outs = run(*arguments)
        outs = outs if isinstance(outs, tuple) else (outs,)
        upstream = upstream or [torch.randn(x.shape).bfloat16() for x in outs]
        total = sum((x * g.to(x.device)).double().sum() for x, g in zip(outs, upstream, strict=True))
        found = [*outs, *torch.autograd.grad(total, arguments)]
        results.append([x.detach().cpu().double() for x in found])
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 5e-3  # a rounding to bf16 is 1.7e-3 on average


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back to single operations fails."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)


@pytest.mark.gpu
def test_fused_kernels_on_a_gpu(compiled: None) -> None:
    assert fuses()
    check_fused(SwiGLU.apply, random(64, 2, 512))
    positions = torch.arange(64).expand(2, 64)

    def rotated(mixed: Tensor) -> tuple[Tensor, ...]:
        return _SplitAndRotate.apply(mixed, *RotaryFrequencies(64, 1e4)(positions.to(mixed.device), mixed.dtype))

    check_fused(rotated, random(64, 2, 3, 3, 64))
    bias = random(320, seed=1).detach()
    for images in (3, 0, 1, 5, 4):  # the tower's batches differ in size
        wide = random(images * 10, 320).detach()
        ours = _biased(F.gelu)(*(x.to(device(), torch.bfloat16) for x in (wide, bias)))
        plain = F.gelu(wide.bfloat16().double() + bias.bfloat16().double())
        assert float((ours.cpu() - plain).norm()) <= 5e-3 * float(plain.norm())


@pytest.mark.gpu
def test_norm_on_a_gpu() -> None:
    for width in (64, 4096):
        norm = RMSNorm(ModelParallelConfig(), width, 1e-5)

        def normed(x: Tensor, weight: Tensor, norm: RMSNorm = norm) -> Tensor:
            return torch.func.functional_call(norm, {"weight": weight}, (x,))

        def plain(x: Tensor, weight: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

        check_fused(normed, random(50, 2, width), random(width, seed=1), plain=plain)
        empty, weight = on_device(random(0, 2, width), random(width, seed=1))
        assert not torch.autograd.grad(normed(empty, weight).sum(), weight)[0].any()


def segments() -> SegmentPlan:
    """Images of one token, of many, unseen ones, and rows that begin without one."""
    index = torch.full((2, 300), -1)
    index[0, 20:], index[0, 111:], index[0, 299:], index[1, 5:] = 0, 1, 3, 0
    plan = segment_plan(index, torch.tensor([4, 1]))
    assert isinstance(plan, SegmentPlan)
    return plan


def attended(query: Tensor, latents: Tensor) -> Tensor:
    plan = segments().to(query.device)
    key, value = select_latents(latents, plan).chunk(2, dim=-1)
    return attend(query, key, value, plan)


def test_segments_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is replaced by a loop over what it is given."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, most_q: int, most_k: int) -> Tensor:
        assert q_starts.dtype == k_starts.dtype == torch.int32 and len(q_starts) == len(k_starts) == 5
        assert (most_q, most_k) == (int(q_starts.diff().max()), int(k_starts.diff().max())) == (295, 8)
        parts = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))).transpose(0, 1)
            for a, b, c, d in zip(q_starts, q_starts[1:], k_starts, k_starts[1:], strict=False)
        ]
        return torch.cat(parts)

    query, latents = random(300, 2, 4, 16), random(5, 8, 4, 32, seed=1)
    plain = attended(query, latents)
    expected = gradients(plain, query, latents)
    monkeypatch.setattr(image_attention, "has_varlen", lambda query: True)
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: kernel)
    ours = attended(query, latents)
    check_close([ours], [plain], 1e-5)
    check_close(gradients(ours, query, latents), expected, 1e-5)


def test_where_the_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*shape: int, dtype: torch.dtype = torch.bfloat16, place: str = "meta") -> bool:
        return attention.has_varlen(torch.empty(shape, dtype=dtype, device=place))

    monkeypatch.setattr(attention, "has_flash_attention", lambda: True)
    assert taken(5, 4, 128) and taken(5, 4, 96, dtype=torch.float16)
    assert not taken(5, 4, 100) and not taken(5, 4, 264), "it neither pads nor falls back"
    assert not taken(5, 4, 128, dtype=torch.float32) and not taken(0, 4, 128) and not taken(5, 4, 128, place="cpu")
    monkeypatch.setattr(attention, "has_flash_attention", lambda: False)
    assert not taken(5, 4, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 100])
def test_segments_on_a_gpu(width: int) -> None:
    (query,) = on_device(random(300, 8, width))
    assert attention.has_varlen(query) == (width == 128)
    check_fused(attended, random(300, 2, 4, width), random(5, 64, 4, 2 * width, seed=1))


@pytest.mark.gpu
def test_kernels_give_the_same_bits_twice(compiled: None) -> None:
    """With other shapes in between."""

    def once() -> list[Tensor]:
        query, latents, wide = on_device(random(300, 2, 4, 128), random(5, 64, 4, 256, seed=1), random(64, 2, 512))
        total = attended(query, latents).float().square().sum() + SwiGLU.apply(wide).float().square().sum()
        return list(torch.autograd.grad(total, (query, latents, wide)))

    be_deterministic()
    try:
        first = once()
        (other,) = on_device(random(3, 1, 64))
        SwiGLU.apply(other)
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


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
