"""Cross entropy over the vocabulary: what its backward keeps in memory, and the form that becomes one kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from megatron_atum.model import vocabulary
from megatron_atum.model.vocabulary import TOKENS_AT_A_TIME, log_sum_exp_and_target
from megatron_atum.parallel import fusion
from megatron_atum.parallel.device import device, memory_gib, reset_peak_memory
from megatron_atum.parallel.fusion import fuses
from megatron_atum.parallel.groups import start_distributed, stop_distributed
from megatron_atum.planning.recorder import Recorder
from tests.distributed import run_distributed

FOREIGN = 5  # columns at the end that are not this rank's


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    start_distributed()
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    stop_distributed()


def drawn(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, columns of targets (some of another rank's), and the gradients of the two results (some 0)."""
    generator = torch.Generator().manual_seed(len(shape))
    logits = 3 * torch.randn(*shape, generator=generator)
    logits[..., -FOREIGN:] = float("-inf")
    columns = torch.randint(-1, shape[-1] - FOREIGN, shape[:-1], generator=generator)
    gradients = torch.randn(2, *shape[:-1], generator=generator)
    gradients[:, ::3] = 0.0
    return logits.to(dtype), columns, gradients[0], gradients[1]


def exact(logits: Tensor, columns: Tensor, of_log_sum_exp: Tensor, of_target: Tensor) -> list[Tensor]:
    """logsumexp, the target's logit and the gradient of the logits, in double precision."""
    logits = logits.double().requires_grad_()
    log_sum_exp = logits.logsumexp(-1)
    target = torch.where(columns >= 0, logits.gather(-1, columns.clamp(min=0)[..., None]).squeeze(-1), 0.0)
    (gradient,) = torch.autograd.grad((log_sum_exp * of_log_sum_exp + target * of_target).sum(), logits)
    return [log_sum_exp.detach(), target.detach(), gradient]


def check(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    for x, y, rounding in zip(ours, theirs, (1e-6, 1e-6, 1e-6 if dtype == torch.float32 else 2**-8), strict=True):
        assert x.shape == y.shape
        assert bool(((x.cpu().double() - y).abs() <= rounding * y.abs() + 1e-6).all())
    assert ours[2].dtype == dtype and not ours[2][..., -FOREIGN:].any()


def run(logits: Tensor, columns: Tensor, *gradients: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    logits = logits.clone().requires_grad_()
    results = log_sum_exp_and_target(logits, columns, group)
    (gradient,) = torch.autograd.grad(results, logits, gradients)
    return [*(x.detach() for x in results), gradient]


SHAPES = [(1, 1, 40), (TOKENS_AT_A_TIME, 1, 64), (300, 2, 97)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_parts(shape: tuple[int, ...], dtype: torch.dtype, alone: dist.ProcessGroup) -> None:
    inputs = drawn(*shape, dtype=dtype)
    check(run(*inputs, group=alone), exact(*inputs), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_compiled_is_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine step by step; a GPU's kernel is tested below."""
    inputs = drawn(*shape, dtype=dtype)
    for name in ("_sum_of_exponentials", "_logits_gradient"):
        monkeypatch.setattr(vocabulary, name, getattr(vocabulary, name).__wrapped__)
    check(run(*inputs, group=alone), exact(*inputs), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_all_logits_in_fp32(dtype: torch.dtype, alone: dist.ProcessGroup) -> None:
    """Beside logits and their gradient there are some tokens' exponentials, in forward and in backward."""
    logits, columns, *gradients = drawn(8 * TOKENS_AT_A_TIME, 2, 512, dtype=dtype)
    some_tokens = 4 * TOKENS_AT_A_TIME * 512
    logits.requires_grad_()
    with Recorder() as recorder:
        results = log_sum_exp_and_target(logits, columns, alone)
        forward, recorder.memory.peak = recorder.memory.peak, 0
        torch.autograd.grad(results, logits, gradients)
    small = 20 * columns.nbytes
    assert logits.nbytes < forward <= logits.nbytes + 3 * some_tokens + small
    assert 2 * logits.nbytes < recorder.memory.peak <= 2 * logits.nbytes + 2 * some_tokens + small


def test_odd_sizes_are_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first size gives a kernel of its own, the second one for all others."""
    compiler = CompileCounter()
    monkeypatch.setattr(fusion, "fuses", lambda: True)
    monkeypatch.setattr(fusion, "_compile", lambda function: torch.compile(function, backend=compiler))
    gradient = fusion.fused(vocabulary._logits_gradient.__wrapped__)  # type: ignore[attr-defined]
    torch._dynamo.reset()
    with torch.compiler.set_stance("default"):
        for rows, length in ((2, 256), (1, 100), (3, 77), (1, 512)):
            inputs = [x.to("meta") for x in drawn(length, rows, 64, dtype=torch.bfloat16)]
            log_sum_exp = torch.empty(length, rows, device="meta")
            out = vocabulary._of_tokens(gradient, inputs[0], inputs[1], log_sum_exp, *inputs[2:])
            assert out.shape == (length, rows, 64) and out.dtype == torch.bfloat16
    assert compiler.frame_count == 2


# On a GPU ------------------------------------------------------------------------------------------------------------


def on_a_gpu(rank: int, world_size: int) -> list[tuple[float, float]]:
    """GiB that forward and backward take beside the logits, and GiB of the logits, for each size."""
    assert fuses() and dist.group.WORLD is not None
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # type: ignore[attr-defined]
    found = []
    for shape in ((300, 2, 97), (256, 1, 97), (77, 3, 97), (1024, 2, 32064)):
        inputs = [x.to(device()) for x in drawn(*shape, dtype=torch.bfloat16)]
        run(*inputs, group=dist.group.WORLD)  # compiled
        reset_peak_memory()
        before = memory_gib()
        ours = run(*inputs, group=dist.group.WORLD)
        found.append((memory_gib() - before, inputs[0].nbytes / 2**30))
        check(ours, exact(*(x.cpu() for x in inputs)), torch.bfloat16)
    return found


@pytest.mark.gpu
def test_one_kernel_on_a_gpu() -> None:
    taken, logits = run_distributed(on_a_gpu, 1, backend="nccl")[0][-1]
    assert taken <= 2.1 * logits, "a copy of the logits (made by the test) and their gradient"
