"""Element-wise operations as one kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_atum.parallel import fusion
from megatron_atum.parallel.fusion import fused


def twice(x: Tensor) -> Tensor:
    """Says it."""
    return x * 2


def test_on_a_cpu_it_is_the_function_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    called = fused(twice)
    assert called.__name__ == "twice" and called.__doc__ == "Says it."
    monkeypatch.setattr(fusion, "fuses", lambda: pytest.fail("asked although there is nothing to fuse for"))
    assert torch.equal(called(torch.ones(3)), torch.full((3,), 2.0))


def test_without_triton_it_is_the_function_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "fuses", lambda: False)
    assert fused(twice)(torch.ones(3, device="meta")).shape == (3,)


def test_where_nothing_is_fused_another_function_may_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    called = fused(twice, unfused=lambda x: x + x + 1)
    assert called.__name__ == "twice"
    assert torch.equal(called(torch.ones(2)), torch.full((2,), 3.0))
    monkeypatch.setattr(fusion, "fuses", lambda: True)
    monkeypatch.setattr(fusion, "_compile", lambda function: function)
    assert torch.equal(called(torch.ones(2)), torch.full((2,), 3.0)), "on a CPU in any case"
    assert called(torch.ones(2, device="meta")).shape == (2,)
    monkeypatch.setattr(fusion, "fuses", lambda: False)
    assert called(torch.ones(2, device="meta")).shape == (2,)
