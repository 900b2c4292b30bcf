"""What the engine counts of a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_atum.config.loader import load_config
from megatron_atum.flops import Work, executed_flops, model_flops
from megatron_atum.training.engine import Engine


def engine_like(*overrides: str) -> Any:
    """As much of an engine as counting needs."""
    config = load_config(None, ["model.preset=tiny", "data.sequence_length=128", *overrides])
    layout = SimpleNamespace(units_per_chunk=(1, 2, 1))
    return SimpleNamespace(config=config, groups=SimpleNamespace(layout=layout))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("method", ["uniform", "block"])
def test_executed_flops_follow_the_recomputation(recompute: str, method: str) -> None:
    engine = engine_like(f"training.recompute={recompute}", f"training.recompute_method={method}")
    model, executed = Engine.flops(engine, 1024, 7)
    work = Work(8, 128, 7)
    assert model == model_flops(engine.config.model, work).total
    expected = executed_flops(engine.config.model, work, recompute, method=method, units_per_chunk=(1, 2, 1))
    assert executed == expected.total


def test_fewer_layers_are_fewer_flops() -> None:
    """3 of the 4 layers: the first of each chunk."""
    block = ["training.recompute=full", "training.recompute_method=block"]
    some, all_of_them = engine_like(*block), engine_like("training.recompute=full")
    model, executed = Engine.flops(some, 1024, 7)
    assert model < executed < Engine.flops(all_of_them, 1024, 7)[1]
