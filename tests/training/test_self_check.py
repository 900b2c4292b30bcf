"""What a run says of itself, and the batch it tries first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.errors import ConfigError
from megatron_atum.parallel.groups import start_distributed, stop_distributed
from megatron_atum.parallel.random_state import random_state
from megatron_atum.training import self_check
from megatron_atum.training.engine import Engine
from megatron_atum.training.self_check import describe, dry_step, largest_batch
from tests.distributed import run_distributed
from tests.layouts import Degrees, build_engine, test_config
from tests.model.cases import Case, reference

CASE = Case("described", 31, frozen=True, small_norm_inputs=False)
LAYOUT = Degrees(tensor=2, pipeline=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("self_check") / "expected.pt"
    torch.save(reference(CASE), path)
    return path


def engine_of(path: str, degrees: Degrees) -> Any:
    expected = torch.load(path, weights_only=False)
    config = test_config(from_hf(expected.config), micro_batch_size=2, global_batch_size=8)
    config.data.sequence_length = 16
    engine = build_engine(config, degrees, expected.state)
    engine.build_optimizer()
    return engine


def described(rank: int, world_size: int, path: str) -> tuple[str, int]:
    engine = engine_of(path, LAYOUT)
    trains = sum(p.numel() for stage in engine.stages for p in stage.parameters() if p.requires_grad)
    return describe(engine, {"a": 0.25, "b": 0.75}, "somewhere"), trains


def test_a_run_says_what_it_is(path: Path) -> None:
    results = run_distributed(described, 4, str(path))
    text = results[0][0]
    assert text.startswith("Megatron-ATUM ") and "code as on rank 0" not in text.splitlines()[0]
    assert "git" not in results[1][0] and "commit" not in results[1][0], "hundreds of ranks would ask at once"
    assert "groups of rank 0: tensor 0, 1, data 0, pipeline 0, 2" in text
    assert "devices: 4 x CPU process, gloo, weights torch.float32" in text
    assert "layout: tensor 2, pipeline 2, data 1, units per chunk [1, 1]" in text
    assert f"stage 0: {results[0][1]:,} trainable and " in text
    assert f"stage 1: {results[3][1]:,} trainable and " in text
    assert "optimizer: torch AdamW, sharded over data-parallel ranks" in text
    assert "a 25.00%, b 75.00%" in text and "weights: somewhere" in text
    assert f"torch {torch.__version__}, megatron-core 0.16.1" in text


# The trial -----------------------------------------------------------------------------------------------------------


def tried(rank: int, world_size: int, path: str, degrees: Degrees) -> dict[str, Any]:
    engine = engine_of(path, degrees)
    batch = largest_batch(engine.config, engine.groups, 3)
    before = random_state()
    said = dry_step(engine, 3)
    gradients = [
        float(parameter.main_grad.abs().max())
        for stage in engine.stages
        for parameter in stage.parameters()
        if parameter.requires_grad
    ]
    return {
        "said": said,
        "random": all(torch.equal(before[name], value) for name, value in random_state().items()),
        "gradients": max(gradients),
        "moments": [shard.moments() for shard in self_check.optimizer_shards(engine.optimizer)],
        "pixels": len(batch.pixels),
        "seen": sorted(set(batch.image_index[0].tolist())),
    }


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tensor=2), Degrees(pipeline=2, virtual=2), Degrees(data=2)])
def test_it_leaves_nothing_behind(degrees: Degrees, path: Path) -> None:
    results = run_distributed(tried, degrees.world_size, str(path), degrees)
    for found in results:
        assert "the largest microbatch (2 rows, 6 images) takes" in found["said"]
        assert found["random"] and found["gradients"] == 0.0
        assert not any(found["moments"])
        assert found["seen"] == [0, 1, 2]
    assert results[0]["pixels"] == 6 // degrees.tensor
    if degrees.pipeline > 1:
        assert results[-1]["pixels"] == 0


class Full:
    """An engine whose computation fails."""

    def __init__(self, engine: Engine, error: Exception) -> None:
        self._engine, self._error = engine, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward_backward(self, batches: Any) -> None:
        raise self._error


@pytest.fixture(scope="module")
def alone(path: Path) -> Iterator[Engine]:
    """An engine in this process."""
    start_distributed()
    yield engine_of(str(path), Degrees())
    stop_distributed()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error in: NCCLUtils.cpp:94\nncclUnhandledCudaError: Cuda failure 2 'out of memory'"),
    ],
)
def test_what_does_not_fit_is_told_with_the_keys_to_turn(error: Exception, alone: Engine) -> None:
    with pytest.raises(ConfigError, match=r"does not fit on rank 0: .*training\.micro_batch_size") as told:
        dry_step(Full(alone, error), 3)  # type: ignore[arg-type]
    assert str(error).splitlines()[0] in str(told.value) and "more lines" not in str(told.value)


def test_another_error_stays_what_it_is(alone: Engine) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        dry_step(Full(alone, RuntimeError("shapes cannot be multiplied")), 3)  # type: ignore[arg-type]


def test_what_metrics_measure_begins_behind_it(alone: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the time of what the device is not through with when the trial has been issued."""
    order: list[str] = []

    def noted(name: str, act: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            order.append(name)
            return act()

        return call

    monkeypatch.setattr(self_check, "memory_gib", noted("peak", lambda: 3.5))
    monkeypatch.setattr(self_check, "wait_for_device", noted("waited", lambda: None))
    monkeypatch.setattr(self_check, "reset_peak_memory", noted("reset", lambda: None))
    monkeypatch.setattr(alone.forward_watch, "take", noted("taken", alone.forward_watch.take))
    assert "takes 3.50 GiB" in dry_step(alone, 3)
    assert order == ["peak", "waited", "taken", "reset"]
    assert alone.forward_watch.take() == 0.0
