"""The emulation works inside its block and leaves nothing behind; recompute repeats dropout on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_atum.parallel.cpu_compat import emulated_cuda
from megatron_atum.parallel.groups import build_groups
from megatron_atum.parallel.layout import ParallelLayout
from tests.distributed import run_distributed

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the block does nothing")
CUDA_ERRORS = (RuntimeError, AssertionError)


def untouched() -> None:
    """Everything is as torch made it."""
    with pytest.raises(CUDA_ERRORS):
        torch.zeros(1, device="cuda")
    with pytest.raises(CUDA_ERRORS):
        torch.zeros(1).cuda()
    with pytest.raises(CUDA_ERRORS):
        torch.cuda.current_device()
    assert torch.zeros(1).type() == "torch.FloatTensor"


@cpu_only
def test_inside_the_block_the_literals_mean_the_cpu() -> None:
    with emulated_cuda():
        made = [
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device="cuda:0"),
            torch.empty(3, dtype=torch.int64, device=torch.device("cuda")),
            torch.zeros(2, device=torch.cuda.current_device()),
            torch.zeros_like(torch.ones(2), device="cuda"),
            torch.arange(4, device=torch.device("cuda", 0)),
            torch.ones(2).cuda(),
            torch.ones(2).cuda(0, non_blocking=True),
            torch.ones(2).to("cuda"),
            torch.ones(2).to(torch.device("cuda")),
            torch.ones(2).to("cuda", torch.bfloat16),
            torch.ones(2).to(device="cuda", dtype=torch.float64),
        ]
        torch.cuda.synchronize()
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[2].dtype == torch.int64
    assert made[-2].dtype == torch.bfloat16
    assert made[-1].dtype == torch.float64
    untouched()


@cpu_only
def test_names_of_types() -> None:
    names = {
        torch.float32: "torch.cuda.FloatTensor",
        torch.float16: "torch.cuda.HalfTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
        torch.int64: "torch.LongTensor",
    }
    with emulated_cuda():
        assert {dtype: torch.zeros(1, dtype=dtype).type() for dtype in names} == names
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64  # conversion still converts


@cpu_only
def test_other_devices_are_left_alone() -> None:
    with emulated_cuda():
        assert torch.zeros(1, device="meta").device.type == "meta"
        assert torch.zeros(1).to("meta").device.type == "meta"
        assert torch.zeros(1, device="cpu").to(torch.float64).dtype == torch.float64


@cpu_only
def test_restored_after_an_exception() -> None:
    before = torch.cuda.current_device, torch.cuda.synchronize
    with pytest.raises(KeyError), emulated_cuda():
        raise KeyError
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    untouched()


@cpu_only
def test_nests() -> None:
    before = torch.cuda.current_device, torch.cuda.synchronize
    with emulated_cuda():
        with pytest.raises(KeyError), emulated_cuda():
            assert torch.zeros(1, device="cuda").device.type == "cpu"
            raise KeyError
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    untouched()


@cpu_only
def test_gradients_flow_through_the_block() -> None:
    x = torch.ones(2, requires_grad=True)
    with emulated_cuda():
        (x.cuda().to("cuda") * torch.full((2,), 3.0, device="cuda")).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [3.0, 3.0]


def block(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x = F.dropout(torch.tanh(x @ first), 0.5)
    with get_cuda_rng_tracker().fork():
        return F.dropout(x @ second, 0.5)


def drawn_inside() -> Tensor:
    with get_cuda_rng_tracker().fork():
        return torch.rand(2)


def forward_backward(recomputes: bool) -> dict[str, Tensor]:
    """Two blocks with dropout, from one seed. `after`: what comes next from either random state."""
    torch.manual_seed(3)
    with emulated_cuda():
        model_parallel_cuda_manual_seed(7)
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
        weights = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))
        leaves = [weight.clone().requires_grad_() for weight in weights]
        for pair in (leaves[:2], leaves[2:]):
            x = checkpoint(block, False, x, *pair) if recomputes else block(x, *pair)
        x.square().sum().backward()
        outside = torch.rand(2)
        inside = torch.stack([drawn_inside(), drawn_inside()])
    gradient = torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None])
    return {"out": x.detach(), "gradient": gradient, "outside": outside, "inside": inside}


def recompute(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    build_groups(ParallelLayout(world_size=world_size, tensor=world_size))
    return [forward_backward(recomputes) for recomputes in (False, True, False)]


@cpu_only
def test_recompute_repeats_dropout() -> None:
    results = run_distributed(recompute, 2)
    for plain, recomputed, again in results:
        assert float((plain["out"] == 0).float().mean()) > 0.2  # dropout did take place
        for key in plain:
            assert torch.equal(plain[key], again[key]), key  # the seed decides everything
            assert torch.equal(plain[key], recomputed[key]), key
    (first, *_), (second, *_) = results
    assert not torch.equal(*first["inside"])  # the state inside moves on
    assert torch.equal(first["outside"], second["outside"])
    assert not torch.equal(first["inside"], second["inside"])  # tensor ranks draw their own
