"""Losses of held-out sources in whole runs: the same at every layout, and without an effect on training."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_atum.batch import StepData
from megatron_atum.data.shards import PairRecord, write_shard
from megatron_atum.parallel.groups import start_distributed, stop_distributed
from megatron_atum.training.loss import own_report
from megatron_atum.training.validation import validate
from tests.faults.runs import SMALL, data_overrides, events_of, make_data, numbers_of, run

LAYOUTS = {
    "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "pp2vpp": (2, ["parallel.pipeline=2", "training.recompute=full"]),
    "dp2": (2, ["optimizer.overlap_param_gather=true"]),
}
CAPTIONS = ("a cat looks at a rocket", "many cups of coffee in a garden", "old coins lie beside an orange flower")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("validated"))
    photos = sorted((folder / "photos").glob("*.jpg"))
    pairs = [PairRecord(f"held-{n}", photos[n].read_bytes(), text) for n, text in enumerate(CAPTIONS)]
    write_shard(folder / "held-out-00000.tar", pairs)
    return folder


def trained(root: Path, data: Path, world_size: int, *changes: str) -> list[dict[str, Any]]:
    outcome = run(
        root, [*SMALL, *data_overrides(data), "training.steps=4", "checkpoint.save_every=0", *changes], world_size
    )
    assert outcome.codes == [0] * world_size, outcome.logs
    return numbers_of(root)


def validating(data: Path) -> list[str]:
    held_out = f"{{name: held, shards: '{data}/held-out-*.tar', kind: pairs, max_images: 4}}"
    return ["training.validate_every=2", "data.validation_packs=6", f"data.validation=[{held_out}]"]


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("single")
    return trained(root, data, 1, *validating(data)), events_of(root, "validation")


def test_every_source_has_loss_and_perplexity(single: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    first, second = single[1]
    assert [first["step"], second["step"]] == [2, 4]
    assert first["loss"] == first["loss/held"]
    assert first["perplexity/held"] == pytest.approx(math.exp(first["loss/held"]))
    assert second["loss/held"] < first["loss/held"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_the_same(
    layout: str, data: Path, single: tuple[list[dict[str, Any]], list[dict[str, Any]]], tmp_path: Path
) -> None:
    world_size, changes = LAYOUTS[layout]
    trained(tmp_path, data, world_size, *validating(data), *changes)
    for ours, theirs in zip(events_of(tmp_path, "validation"), single[1], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6) if key != "event" else True


class WithoutTargets:
    """As much of a held-out source as is asked for: one step, none of whose tokens counts."""

    def batches(self, agree: Any) -> list[StepData]:
        return [StepData([])]


def test_sources_without_a_counted_token_have_no_loss() -> None:
    cpu, groups = torch.device("cpu"), SimpleNamespace(control=None)
    report = own_report([], ("a",), groups, cpu)  # type: ignore[arg-type]
    engine: Any = SimpleNamespace(groups=groups, device=cpu, evaluate=lambda *_: report)
    sets: Any = {"a": WithoutTargets(), "b": WithoutTargets()}
    beats: list[int] = []
    start_distributed()
    try:
        found = validate(engine, sets, lambda: beats.append(1))
    finally:
        stop_distributed()
    assert found == {} and len(beats) == 2


def test_training_does_not_notice(
    data: Path, single: tuple[list[dict[str, Any]], list[dict[str, Any]]], tmp_path: Path
) -> None:
    assert trained(tmp_path, data, 1) == single[0]
