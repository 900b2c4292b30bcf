"""Schedules, groups with rates of their own at every layout, and what frozen weights must not be part of."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_atum.checkpoint.optimizer_state import inner_optimizers, optimizer_shards
from megatron_atum.checkpoint.weights import rows_of
from megatron_atum.config.schema import OptimizerConfig, ParameterGroupConfig
from megatron_atum.training import optimizer as module
from megatron_atum.training.optimizer import (
    build_scheduler,
    learning_rate,
    learning_rates,
    overlaps_param_gather,
    scale_learning_rates,
)
from megatron_atum.training.parameter_groups import NO_DECAY, trains
from tests.checkpoint.runs import SHARDED, config_of, engine_of, resumed_engine, saved, steps, weights
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees
from tests.model.cases import Case, reference
from tests.training.equivalence import train
from tests.training.test_equivalence import check_equal

# Schedules -----------------------------------------------------------------------------------------------------------


def rates(config: OptimizerConfig, updates: list[int], **group: float) -> list[float]:
    """Learning rates of the updates with these numbers, from 0."""
    optimizer: Any = SimpleNamespace(param_groups=[{"default_config": True, **group}])
    scheduler = build_scheduler(optimizer, config)
    found = []
    for number in updates:
        scheduler.step(number - scheduler.num_steps)
        found.append(learning_rate(optimizer))
    return found


@pytest.mark.parametrize(("warmup", "horizon"), [(20, 300), (0, 50), (1, 2), (49, 50)])
def test_linear_is_that_of_transformers(warmup: int, horizon: int) -> None:
    """Over all updates of a run and some beyond the horizon, and without being one off."""
    from transformers import get_linear_schedule_with_warmup

    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-5)
    schedule = get_linear_schedule_with_warmup(theirs, warmup, horizon)
    expected = []
    for _ in range(horizon + 5):
        expected.append(schedule.get_last_lr()[0])
        theirs.step()
        schedule.step()
    ours = rates(OptimizerConfig(lr=5e-5, warmup_steps=warmup, decay_steps=horizon), list(range(horizon + 5)))
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-20)


@pytest.mark.parametrize(
    ("lr", "warmup", "horizon", "step", "published"),
    [
        (5e-5, 2000, 500_000, 200_000, 3.01e-5),  # 80B, model card
        (1e-5, 2000, 500_000, 200_000, 6.02e-6),  # 9B, model card
        (1.875e-5, 2000, 500_000, 30_500, 1.768e-5),  # 80B after its rate was cut to 0.75 x 0.5, chronicles
        (3e-6, 1000, 24_864, 22_000, 3.6e-7),  # 80B instruct, model card
        (1e-5, 1000, 24_864, 22_000, 1.2e-6),  # 9B instruct, model card
    ],
)
def test_published_rates(lr: float, warmup: int, horizon: int, step: int, published: float) -> None:
    config = OptimizerConfig(lr=lr, warmup_steps=warmup, decay_steps=horizon)
    top, there = rates(config, [warmup, step])
    assert top == lr
    assert there == pytest.approx(published, rel=1e-3)


def test_no_round_horizon_gives_the_published_end_of_the_instruct_runs() -> None:
    """0.12 is 1 - 22/25, but with 1000 steps of warm-up a horizon of 25,000 ends at 0.125."""
    (end,) = rates(OptimizerConfig(lr=1.0, warmup_steps=1000, decay_steps=25_000), [22_000])
    assert end == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.0, 2.5, 5.0, 4.5 + 0.5 * math.cos(math.pi / 9), 4.5, 4.0, 4.0]),
        ("constant", [0.0, 2.5, 5.0, 5.0, 5.0, 5.0, 5.0]),
        ("linear", [0.0, 2.5, 5.0, 5 - 1 / 9, 4.5, 4.0, 4.0]),
    ],
)
def test_shapes(schedule: str, expected: list[float]) -> None:
    """Warm-up from 0 to lr in 10 updates, then to min_lr at 100, and there for good."""
    config = OptimizerConfig(lr=5.0, min_lr=4.0, warmup_steps=10, decay_steps=100, schedule=schedule)
    assert rates(config, [0, 5, 10, 20, 55, 100, 400]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("style", "middle"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", 2 * 0.5**0.5 - 1), ("minus_sqrt", 1 - 0.5**0.5)],
)
def test_wsd_stays_and_falls(style: str, middle: float) -> None:
    config = OptimizerConfig(
        lr=5.0, min_lr=1.0, warmup_steps=10, decay_steps=100, schedule="wsd", wsd_steps=40, wsd_style=style
    )
    expected = [0.0, 2.5, 5.0, 5.0, 5.0, 1.0 + 4.0 * middle, 1.0, 1.0]
    assert rates(config, [0, 5, 10, 30, 60, 80, 100, 400]) == pytest.approx(expected)


def test_min_lr_and_groups() -> None:
    config = OptimizerConfig(lr=5.0, min_lr=1.0, warmup_steps=0, decay_steps=100)
    assert rates(config, [0, 50, 100], max_lr=0.5, min_lr=0.1) == pytest.approx([0.5, 0.3, 0.1])


# Overlap -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("accelerator", [True, False])
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("reduces", [True, False])
def test_the_gather_is_overlapped_where_there_is_an_accelerator(
    asked: bool | None, accelerator: bool, distributed: bool, reduces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_accelerator", lambda: accelerator)
    config = OptimizerConfig(distributed=distributed, overlap_grad_reduce=reduces, overlap_param_gather=asked)
    default = accelerator and distributed and reduces
    assert overlaps_param_gather(config) is (default if asked is None else asked)


# Groups --------------------------------------------------------------------------------------------------------------

GROUPS = [
    ParameterGroupConfig("model.perceiver_resampler.*", lr_scale=0.1),
    ParameterGroupConfig("*.alpha_*", lr_scale=10.0, weight_decay_scale=3.0),
    ParameterGroupConfig("*_layernorm.weight", weight_decay_scale=2.0),  # the same rate as the rest
]
GROUPED = {"groups": GROUPS, "weight_decay": 0.5, "min_lr": 1e-3, "decay_steps": 6, "warmup_steps": 1}
CASE = Case("grouped", 23, rows=1, images=((1,), (2,), (0,), (1,)), frozen=True, small_norm_inputs=False)
GATHERED = {**SHARDED, "overlap_param_gather": True, "bucket_size": 2000}
PLACES = {
    1: [(ONE, SHARDED)],
    2: [(Degrees(tensor=2), SHARDED), (Degrees(pipeline=2), SHARDED), (Degrees(data=2), GATHERED)],
    4: [
        (Degrees(data=2, tensor=2, sequence=True), SHARDED),
        (Degrees(data=2, pipeline=2), GATHERED),
        (Degrees(data=2, pipeline=2, virtual=2), GATHERED),
    ],
}
ALONE = {"distributed": False, "overlap_grad_reduce": False}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A case on disk; its steps in one process with groups, and without."""
    path = tmp_path_factory.mktemp("groups") / "expected.pt"
    torch.save(reference(CASE), path)
    jobs = [(ONE, {**ALONE, **GROUPED}), (ONE, {**ALONE, **GROUPED, "groups": []})]
    grouped, plain = run_distributed(train, 1, jobs, str(path))[0]
    return path, grouped, plain


@pytest.mark.parametrize("world_size", PLACES)
def test_groups_are_the_same_at_every_layout(world_size: int, alone: Any) -> None:
    path, grouped, plain = alone
    assert all(
        not torch.equal(grouped["parameters"][name], plain["parameters"][name])
        for name in ("model.perceiver_resampler.latents", "model.gated_cross_attn_layers.0.alpha_dense")
    )
    jobs = [(degrees, {**changes, **GROUPED}) for degrees, changes in PLACES[world_size]]
    results = run_distributed(train, world_size, jobs, str(path), timeout=300)
    for number, (degrees, changes) in enumerate(jobs):
        check_equal(results[0][number], grouped, f"{degrees} {changes}")


def expected_settings(name: str, lr: float) -> tuple[float, float]:
    """Learning rate and weight decay by the Hugging Face name, written out by hand."""
    if "perceiver_resampler" in name:
        return 0.1 * lr, 0.0
    if "alpha" in name:
        return 10 * lr, 1.5
    if name.endswith("_layernorm.weight"):
        return lr, 1.0
    return lr, 0.0 if any(part in name for part in NO_DECAY) else 0.5


def settings_in_use(rank: int, world_size: int, degrees: Degrees, root: str) -> dict[str, Any]:
    """Of every weight after two updates; and what `learning_rates` says before and after they are scaled."""
    config = config_of({**SHARDED, **GROUPED}, frozen=True)
    engine, _ = engine_of(config, degrees, Path(root), seed=1)
    used = [rate for _, _, rate in steps(engine, range(2))]
    names = {id(parameter): row.hf for row, parameter in rows_of(engine.stages, config.model)}
    found = {
        name: (shard.group["lr"], shard.group["weight_decay"])
        for shard in optimizer_shards(engine.optimizer)
        for name in names[id(shard.parameter)]
    }
    before = learning_rates(engine.optimizer)
    scale_learning_rates(engine.optimizer, 0.5)
    scale_learning_rates(engine.optimizer, 0.5)
    engine.scheduler.step(0)
    identities = [tuple(group[key] for key in param_group_identifier_keys) for group in engine.optimizer.param_groups]
    after = learning_rates(engine.optimizer)
    return {"used": used, "found": found, "before": before, "after": after, "identities": identities}


@pytest.mark.parametrize("degrees", [Degrees(pipeline=2), Degrees(data=2)], ids=str)
def test_rates_and_decay_of_every_weight(degrees: Degrees, tmp_path: Path) -> None:
    results = run_distributed(settings_in_use, 2, degrees, str(tmp_path))
    lr = 3e-3 - 2e-3 / 5  # one of the five updates behind the warm-up
    names: set[str] = set()
    for result in results:
        assert result["used"] == [0.0, 3e-3]
        assert (
            len(set(result["identities"])) == len(result["identities"]) == 5
        )  # what megatron-core tells them apart by
        for name, values in result["found"].items():
            assert values == pytest.approx(expected_settings(name, lr)), name
        names |= set(result["found"])
        # also on the last stage, which has no perceiver
        expected = {"lr": lr, "lr/model.perceiver_resampler.*": 0.1 * lr, "lr/*.alpha_*": 10 * lr}
        assert result["before"] == pytest.approx(expected)
        assert result["after"] == pytest.approx({name: rate / 4 for name, rate in expected.items()})
    for part in ("perceiver_resampler", "alpha_dense", "_layernorm.weight", "cross_attn.q_proj", "additional_fc"):
        assert any(part in name for name in names)


def test_the_rate_of_a_model_whose_weights_all_have_their_own() -> None:
    groups = [{"default_config": False, "lr": 0.0, "lr_mult": 0.0}, {"default_config": False, "lr": 0.2, "lr_mult": 4}]
    assert learning_rate(SimpleNamespace(param_groups=groups)) == pytest.approx(0.05)  # type: ignore[arg-type]
    assert learning_rate(SimpleNamespace(param_groups=groups[:1])) == 0.0  # type: ignore[arg-type]


SAVED_AT, STEPS = 2, 4


def go_on(rank: int, world_size: int, root: str, degrees: Degrees, folder: str | None, groups: Any) -> dict[str, Any]:
    """Save after two updates and go on, or go on from there."""
    config = config_of({**SHARDED, **GROUPED, "groups": groups})
    if folder is None:
        engine, checkpoint = engine_of(config, degrees, Path(root), seed=1)
        steps(engine, range(SAVED_AT))
        folder = str(saved(checkpoint, SAVED_AT))
    else:
        engine, _ = resumed_engine(config, degrees, Path(folder))
    said = steps(engine, range(SAVED_AT, STEPS))
    return {"folder": folder, "said": said, "rates": learning_rates(engine.optimizer), "weights": weights(engine)}


def test_groups_after_a_resume(tmp_path: Path) -> None:
    """At another layout they go on as they were, and a changed configuration counts."""
    root, home = str(tmp_path), Degrees(tensor=2, pipeline=2, sequence=True)
    there = run_distributed(go_on, 4, root, home, None, GROUPS)[0]
    here = run_distributed(go_on, 2, root, Degrees(data=2), there["folder"], GROUPS)[0]
    for (losses, norm, lr), (expected, expected_norm, expected_lr) in zip(here["said"], there["said"], strict=True):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        assert lr == expected_lr
    for name, value in there["weights"].items():
        assert float((value - here["weights"][name]).abs().max()) <= 1e-6, name
    other = run_distributed(go_on, 2, root, Degrees(data=2), there["folder"], GROUPS[:1])[0]
    assert here["rates"] == there["rates"] and len(here["rates"]) == 3
    assert other["rates"] == {key: rate for key, rate in here["rates"].items() if "alpha" not in key}
    moved = "model.gated_cross_attn_layers.0.alpha_dense"
    assert not torch.equal(other["weights"][moved], here["weights"][moved])


# Frozen weights ------------------------------------------------------------------------------------------------------


def memory_of_training(rank: int, world_size: int, degrees: Degrees, changes: dict[str, Any], root: str) -> Any:
    """Weights of this rank that training has memory for beyond the weight itself, and its sizes."""
    config = config_of({**changes, "precision": "bf16"}, frozen=True)
    engine, _ = engine_of(config, degrees, Path(root), seed=1)
    steps(engine, range(1))
    rows = rows_of(engine.stages, config.model)
    names = {id(parameter): row.name for row, parameter in rows}
    buffers = [buffer for chunk in engine.chunks for buffer in chunk.buffers]
    buckets = [bucket for chunk in engine.chunks for group in chunk.bucket_groups for bucket in group.buckets]
    shards = optimizer_shards(engine.optimizer)
    held = {
        "gradient buffers": [p for buffer in buffers for p in buffer.params],
        "places in them": [p for buffer in buffers for p in buffer.param_index_map],
        "buckets": [p for bucket in buckets for p in bucket.params_list],
        "hooks": [p for chunk in engine.chunks for p in chunk.param_to_bucket_group],
        "optimizer": [shard.parameter for shard in shards],
        "gradients": [p for _, p in rows if p.grad is not None or getattr(p, "main_grad", None) is not None],
        "copies": [p for _, p in rows if getattr(p, "main_param", None) is not None],
        # with the distributed optimizer a bf16 weight that trains lies in a buffer which is gathered
        "shared memory": [p for _, p in rows if any(overlaps(p, buffer.param_data) for buffer in buffers)],
    }
    return {
        "held": {where: {names[id(p)] for p in parameters} for where, parameters in held.items()},
        "frozen": {row.name for row, _ in rows if not trains(row, config.model.freeze)},
        "trained": {row.name for row, _ in rows if trains(row, config.model.freeze)},
        "values": sum(p.numel() for row, p in rows if trains(row, config.model.freeze)),
        "buffered": sum(stop - start for buffer in buffers for start, stop, _ in buffer.param_index_map.values()),
        "allocated": sum(buffer.grad_data.numel() for buffer in buffers),
        "optimized": sum(shard.stop - shard.start for shard in shards),
        "mains": sum(shard.main.numel() for shard in shards if shard.has_main),
        "states": sum(
            value.numel()
            for inner in inner_optimizers(engine.optimizer)
            for state in inner.state.values()
            for name, value in state.items()
            if name != "step"
        ),
    }


def overlaps(parameter: torch.Tensor, memory: torch.Tensor | None) -> bool:
    return memory is not None and parameter.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


FROZEN_PLACES = [
    *((Degrees(tensor=2), changes) for changes in (SHARDED, ALONE)),
    (Degrees(pipeline=2), SHARDED),
    (Degrees(pipeline=2, virtual=2), SHARDED),
    *((Degrees(data=2), changes) for changes in (SHARDED, GATHERED)),
]


@pytest.mark.parametrize(("degrees", "changes"), FROZEN_PLACES, ids=lambda value: str(value)[:60])
def test_frozen_weights_are_in_no_buffer(degrees: Degrees, changes: dict[str, Any], tmp_path: Path) -> None:
    results = run_distributed(memory_of_training, 2, degrees, changes, str(tmp_path))
    for result in results:
        assert result["frozen"] and result["trained"]
        for where, found in result["held"].items():
            assert not found & result["frozen"], where
        held = result["held"]
        assert held["gradient buffers"] == held["places in them"] == held["buckets"] == held["hooks"]
        assert held["gradient buffers"] == held["gradients"] == result["trained"]
        assert held["shared memory"] == (result["trained"] if changes["distributed"] else set())
        assert result["buffered"] == result["values"]
        # megatron-core rounds the start of a weight up to 64 values, and buckets to what all ranks can share
        assert result["values"] <= result["allocated"] <= result["values"] + 64 * (len(result["trained"]) + 40)
        assert result["mains"] == result["optimized"] and result["states"] == 2 * result["optimized"]
    optimized = set.union(*(result["held"]["optimizer"] for result in results))
    assert optimized == set.union(*(result["trained"] for result in results))
    shares = [result["optimized"] for result in results]
    if degrees.data == 1:
        assert shares == [result["values"] for result in results]
    else:
        assert sum(shares) == results[0]["values"] == results[1]["values"]
