"""An optimizer that is loaded amid a run: nothing of what it held stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_atum.checkpoint.optimizer_state import OptimizerShard, optimizer_shards
from megatron_atum.checkpoint.stored import read_state
from tests.checkpoint.runs import BF16, GATHERED, PLAIN, config_of, engine_of, saved, steps
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees

JOBS: dict[str, tuple[Degrees, dict[str, Any]]] = {
    "one": (ONE, PLAIN),
    "dp2 sharded, overlapped gather": (Degrees(data=2), GATHERED),
    "dp2 sharded, bf16": (Degrees(data=2), BF16),
}


def back_to_the_start(rank: int, world_size: int, root: str, name: str) -> dict[str, Any]:
    """Save before the first update, train, go back to it, and train again."""
    degrees, changes = JOBS[name]
    engine, checkpoint = engine_of(config_of(changes), degrees, Path(root), seed=1)
    folder = saved(checkpoint, 0)
    first = steps(engine, range(2))
    held = [len(shard.moments()) for shard in optimizer_shards(engine.optimizer)]
    checkpoint.load(read_state(folder))
    shards = optimizer_shards(engine.optimizer)
    after = [(len(shard.moments()), shard.step) for shard in shards]
    return {"first": first, "again": steps(engine, range(2)), "held": held, "after": after}


@pytest.mark.parametrize("name", JOBS)
def test_a_checkpoint_of_before_the_first_update_clears_the_moments(name: str, tmp_path: Path) -> None:
    for found in run_distributed(back_to_the_start, JOBS[name][0].world_size, str(tmp_path), name):
        assert set(found["held"]) == {2}
        assert set(found["after"]) == {(0, 0)}
        assert found["again"] == found["first"]


def test_a_counter_of_the_group_is_cleared_too() -> None:
    """apex and Transformer Engine count per group."""
    parameter = nn.Parameter(torch.ones(4))
    inner: Any = SimpleNamespace(state={})
    group: dict[str, Any] = {}
    shard = OptimizerShard(parameter, parameter, 0, 4, inner, group)
    shard.start_moments(7)
    assert shard.step == 7 and len(shard.moments()) == 2
    shard.forget()
    assert shard.step == 0 and shard.moments() == {} and group == {}
