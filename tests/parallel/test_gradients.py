"""Gradients of replicated weights: exactly the marked ones are summed over tensor ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_atum.parallel.gradients import check_marked, is_replicated, mark_replicated, sum_replicated
from megatron_atum.parallel.groups import build_groups
from tests.distributed import run_distributed
from tests.layouts import Degrees
from tests.parallel.test_groups import layout


class Weights(nn.Module):
    """One parameter of each kind. `g`: the gradient each starts with."""

    def __init__(self, g: float) -> None:
        super().__init__()
        self.partial = self.make(g, sum_gradient=True)
        self.partial_bf16 = self.make(g, sum_gradient=True, dtype=torch.bfloat16)
        self.partial_f64 = self.make(g, sum_gradient=True, dtype=torch.float64)
        self.whole = self.make(g, sum_gradient=False)
        self.split = self.make(g)
        self.split.tensor_model_parallel = True
        self.frozen = self.make(g, sum_gradient=True)
        self.frozen.requires_grad_(False)
        self.buffered = self.make(-99.0, sum_gradient=True)
        self.buffered.main_grad = torch.full((2, 3), g)

    def make(self, g: float, *, sum_gradient: bool | None = None, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        parameter.grad = torch.full_like(parameter, g)
        return parameter if sum_gradient is None else mark_replicated(parameter, sum_gradient=sum_gradient)

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.named_parameters()} | {
            "buffered.main_grad": self.buffered.main_grad
        }


def sums(rank: int, world_size: int, degrees: Degrees) -> list[dict[str, Tensor]]:
    groups = build_groups(layout(degrees))
    chunks = [Weights(float(rank + 1)), Weights(10.0 * (rank + 1))]
    sum_replicated(chunks, groups.tensor)
    return [chunk.gradients() for chunk in chunks]


@pytest.mark.parametrize(("degrees", "summed"), [(Degrees(tensor=2), True), (Degrees(data=2), False)], ids=str)
def test_marked_gradients_are_summed_over_tensor_ranks(degrees: Degrees, summed: bool) -> None:
    for rank, chunks in enumerate(run_distributed(sums, 2, degrees)):
        for gradients, scale in zip(chunks, (1.0, 10.0), strict=True):
            own, total = scale * (rank + 1), scale * 3
            expected = dict.fromkeys(gradients, own)
            if summed:
                expected |= dict.fromkeys(("partial", "partial_bf16", "partial_f64", "buffered.main_grad"), total)
            expected["buffered"] = -99.0  # .grad is not looked at where main_grad is there
            for name, gradient in gradients.items():
                assert gradient.flatten().tolist() == [expected[name]] * 6, (rank, name)
            assert gradients["partial_bf16"].dtype == torch.bfloat16
            assert gradients["partial_f64"].dtype == torch.float64


def test_a_parameter_that_says_nothing_is_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AssertionError, match=r"0\.weight: split=False, replicated=False"):
        check_marked(module)
    for parameter in module.parameters():
        mark_replicated(parameter, sum_gradient=False)
    check_marked(module)


def test_a_parameter_that_says_both_is_refused() -> None:
    module = nn.Linear(2, 2, bias=False)
    assert not is_replicated(module.weight)
    module.weight.tensor_model_parallel = True  # type: ignore[assignment]
    check_marked(module)
    mark_replicated(module.weight, sum_gradient=False)
    assert is_replicated(module.weight)
    with pytest.raises(AssertionError, match="weight: split=True, replicated=True"):
        check_marked(module)
