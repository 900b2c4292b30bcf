"""A trainable tensor that backward never reaches stops the run at its first step; a zero gradient does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.errors import ConfigError
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees, build_engine, test_config
from tests.model.cases import Case, Expected, reference
from tests.training.equivalence import own_share

CASE = Case("reach", 31, rows=1, images=((1,), (0,), (2,), (1,)), frozen=True, small_norm_inputs=False)


@pytest.fixture(scope="module")
def expected_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reach") / "expected.pt"
    torch.save(reference(CASE), path)
    return path


def step_with_unreachable(rank: int, world_size: int, degrees: Degrees, path: str) -> str:
    expected: Expected = torch.load(path, weights_only=False)
    engine = build_engine(test_config(from_hf(expected.config)), degrees, expected.state)
    if engine.groups.is_first_stage:
        engine.stages[0].vision.post_layernorm.requires_grad_(True)
    engine.build_optimizer()
    try:
        engine.step(own_share(expected.batches, engine.groups))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "degrees", [ONE, Degrees(data=2), Degrees(pipeline=2), Degrees(tensor=2, sequence=True)], ids=str
)
def test_unreachable_tensor_stops_every_rank(degrees: Degrees, expected_file: Path) -> None:
    for message in run_distributed(step_with_unreachable, degrees.world_size, degrees, str(expected_file)):
        assert "never reached 2 trainable tensor(s)" in message
        assert "vision.post_layernorm.weight" in message


def step_with_closed_gates(rank: int, world_size: int, path: str) -> dict[str, bool]:
    """With all gates at 0: which trainable tensors moved."""
    expected: Expected = torch.load(path, weights_only=False)
    state = {name: torch.zeros_like(t) if "alpha" in name else t for name, t in expected.state.items()}
    config = test_config(from_hf(expected.config), weight_decay=0.0)
    engine = build_engine(config, Degrees(pipeline=2), state)
    before = {name: p.detach().clone() for s in engine.stages for name, p in s.named_parameters() if p.requires_grad}
    engine.build_optimizer()
    engine.step(own_share(expected.batches, engine.groups))
    after = {name: p for s in engine.stages for name, p in s.named_parameters() if p.requires_grad}
    return {name: not torch.equal(before[name], after[name]) for name in before}


def test_zero_gradients_behind_closed_gates_are_right(expected_file: Path) -> None:
    moved = {k: v for rank in run_distributed(step_with_closed_gates, 2, str(expected_file)) for k, v in rank.items()}
    assert all(moved[name] for name in moved if "alpha" in name)
    assert not any(moved[name] for name in moved if "perceiver" in name or ".attention." in name)
