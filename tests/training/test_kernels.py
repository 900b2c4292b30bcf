"""A run with an AdamW that is not torch's, played by a stand-in, and one that goes on with another's moments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.checkpoint import stored
from megatron_atum.checkpoint.optimizer_state import inner_optimizers, optimizer_shards
from megatron_atum.checkpoint.run_checkpoint import check_resumable
from megatron_atum.checkpoint.stored import RunState, read_state
from megatron_atum.config.schema import Config, KernelsConfig
from megatron_atum.errors import CheckpointError, ConfigError
from megatron_atum.training.kernels import check_kernels, describe_layers, other_adam
from megatron_atum.training.self_check import describe
from tests.checkpoint.runs import BF16, PLAIN, config_of, engine_of, saved, steps, weights
from tests.distributed import run_distributed
from tests.fused_adam import install_stand_in
from tests.layouts import ONE, Degrees

SAVED_AT, STEPS = 2, 4
PAIRS = [(first, then) for first in ("torch", "apex") for then in ("torch", "apex")]


def config_with(adam: str, changes: dict[str, Any]) -> Config:
    return replace(config_of({**changes, "weight_decay": 0.1}), kernels=KernelsConfig(adam=adam))


def train(rank: int, world_size: int, root: str, degrees: Degrees, changes: dict[str, Any]) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        install_stand_in(patch, "apex")
        return [train_one(Path(root) / "-".join(adams), adams, degrees, changes) for adams in PAIRS]


def train_one(root: Path, adams: tuple[str, str], degrees: Degrees, changes: dict[str, Any]) -> dict[str, Any]:
    """Some steps with the first AdamW, a checkpoint, and from there some with the second."""
    engine, checkpoint = engine_of(config_with(adams[0], changes), degrees, root, seed=1)
    said = steps(engine, range(SAVED_AT))
    config = config_with(adams[1], changes)
    state = read_state(saved(checkpoint, SAVED_AT))
    engine, checkpoint = engine_of(config, degrees, root, seed=99)
    check_resumable(state, config)
    checkpoint.load(state)
    said += steps(engine, range(SAVED_AT, STEPS))
    inner = inner_optimizers(engine.optimizer)
    return {
        "said": said,
        "weights": weights(engine),
        "start": describe(engine, {}, "somewhere"),
        "other": other_adam(state, config),
        "recorded": state.config["kernels"]["adam"],
        "steps": {shard.step for shard in optimizer_shards(engine.optimizer)},
        "in groups": {key for one in inner for group in one.param_groups for key in group} & {"step", "fused"},
        "of weights": {key for one in inner for moments in one.state.values() for key in moments},
    }


@pytest.mark.parametrize(
    ("degrees", "changes", "rounding"), [(ONE, PLAIN, 1e-6), (Degrees(data=2), BF16, 2**-8)], ids=["fp32", "bf16"]
)
def test_moments_go_on_with_another_adam(degrees: Degrees, changes: Any, rounding: float, tmp_path: Path) -> None:
    """torch's work-arounds (a counter for each weight, the fused flag) are applied to torch's only."""
    results = run_distributed(train, degrees.world_size, str(tmp_path), degrees, changes)[0]
    for (first, then), result in zip(PAIRS, results, strict=True):
        assert result["steps"] == {STEPS}
        assert result["in groups"] == ({"fused"} if then == "torch" else {"step"})
        assert result["of weights"] == {"exp_avg", "exp_avg_sq"} | ({"step"} if then == "torch" else set())
        name = {"torch": "torch AdamW", "apex": "tests StandInAdam"}[then]
        assert f"kernels: torch; optimizer: {name}" in result["start"]
        assert result["recorded"] == first
        assert bool(result["other"]) == (first != then)
        for (losses, norm, lr), (expected, expected_norm, expected_lr) in zip(
            result["said"], results[0]["said"], strict=True
        ):
            assert losses == pytest.approx(expected, rel=10 * rounding)
            assert norm == pytest.approx(expected_norm, rel=10 * rounding)
            assert lr == expected_lr
        for weight, value in results[0]["weights"].items():
            difference = float((value - result["weights"][weight]).abs().max())
            assert difference <= rounding * max(1.0, float(value.abs().max())), weight


def divided(rank: int, world_size: int, root: str, adam: str) -> str:
    """Load a checkpoint that says of one weight that it was updated more often. Returns what is said of it."""
    with pytest.MonkeyPatch.context() as patch:
        install_stand_in(patch, "apex")
        engine, checkpoint = engine_of(config_with(adam, PLAIN), ONE, Path(root) / adam, seed=1)
        steps(engine, range(1))
        state = read_state(saved(checkpoint, 1))
        name = "model.gated_cross_attn_layers.0.alpha_dense"
        state.optimizer_steps[name] = 7
        patch.setattr(stored, "read_state", lambda folder: state)
        try:
            checkpoint.load(state)
        except CheckpointError as error:
            return str(error)
        return ",".join(str(shard.step) for shard in optimizer_shards(engine.optimizer))


def test_updates_that_differ_within_a_group(tmp_path: Path) -> None:
    """Which a counter for each group could not hold."""
    said = run_distributed(divided, 1, str(tmp_path), "apex")[0]
    assert "1 and 7 updates" in said and "kernels.adam=torch" in said
    assert set(run_distributed(divided, 1, str(tmp_path), "torch")[0].split(",")) == {"1", "7"}


def state_of(config: dict[str, Any]) -> RunState:
    values: Any = {name: {} for name in RunState.__dataclass_fields__}
    return RunState(**{**values, "folder": Path("step-3"), "config": config})


def test_what_is_said_of_another_adam() -> None:
    config = Config(kernels=KernelsConfig(adam="apex"))
    made = state_of({"kernels": {"adam": "torch"}})
    assert other_adam(made, config) == "step-3 was trained with kernels.adam=torch; apex goes on with its moments"
    assert other_adam(made, Config()) == ""
    assert other_adam(state_of({"model": {}}), config) == "", "of before the key"


def test_kernels_that_are_not_there() -> None:
    """Neither package is in the environment of the tests."""
    check_kernels(KernelsConfig())
    for key in ("adam", "backend"):
        with pytest.raises(ConfigError, match=rf"kernels\.{key}=te.*kernels\.{key}=torch would work"):
            check_kernels(KernelsConfig(**{key: "te"}))


def test_the_start_says_what_is_experimental() -> None:
    assert describe_layers(KernelsConfig()) == "torch"
    assert "experimental" in describe_layers(KernelsConfig(backend="te"))
    assert "in its fp8" in describe_layers(KernelsConfig(backend="te", frozen_gemm="fp8"))
