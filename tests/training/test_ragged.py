"""Microbatches without images, targets or visible images, on one data-parallel rank only: no hang, right gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.batch import NO_IMAGE, Batch
from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.weights import gather_rows
from megatron_atum.parallel.groups import ProcessGroups
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees, build_engine, groups_of, test_config
from tests.model.cases import Case, Expected, make_batches, reference
from tests.training.equivalence import own_share, trained

# Six microbatches; with two data-parallel ranks, rank 0 gets the even ones and rank 1 the odd ones.
IMAGES = ((2,), (1,), (3,), (2,), (1,), (4,))
CASES = [
    Case("unfrozen", 41, layers=2, interval=1, rows=1, images=IMAGES, small_norm_inputs=False),
    Case("frozen", 42, layers=2, interval=1, rows=1, images=IMAGES, frozen=True, small_norm_inputs=False),
]
ROUNDING = 3e-8  # of gradients that are sums of larger terms, some of them zero by nature
LAYOUTS = [Degrees(data=2), Degrees(data=2, tensor=2, sequence=True), Degrees(data=2, pipeline=2)]


def without_images(batch: Batch) -> Batch:
    return replace(
        batch,
        pixels=batch.pixels[:0],
        images_per_row=torch.zeros_like(batch.images_per_row),
        image_index=torch.full_like(batch.image_index, NO_IMAGE),
    )


def without_targets(batch: Batch) -> Batch:
    return replace(batch, loss_mask=torch.zeros_like(batch.loss_mask), z_mask=torch.zeros_like(batch.z_mask))


def all_gated_off(batch: Batch) -> Batch:
    return replace(batch, image_index=torch.full_like(batch.image_index, NO_IMAGE))


# name -> which microbatches are changed, and how. Places 1, 3, 5 are first, middle and last of rank 1.
SCENES: dict[str, dict[int, Any]] = {
    "images_differ": {},
    "first_without_images": {1: without_images},
    "middle_without_images": {3: without_images},
    "last_without_images": {5: without_images},
    "one_rank_without_any_image": {1: without_images, 3: without_images, 5: without_images},
    "no_image_anywhere": {place: without_images for place in range(6)},
    "no_target": {3: without_targets},
    "one_rank_without_any_target": {1: without_targets, 3: without_targets, 5: without_targets},
    "no_target_anywhere": {place: without_targets for place in range(6)},
    "all_gated_off": {5: all_gated_off},
    "gated_off_and_no_images": {0: all_gated_off, 5: without_images},
}


def scene(batches: list[Batch], changes: dict[int, Any]) -> list[Batch]:
    return [changes.get(place, lambda batch: batch)(batch) for place, batch in enumerate(batches)]


def run_scenes(rank: int, world_size: int, degrees: Degrees, path: str) -> dict[str, dict[str, Any]]:
    expected: Expected = torch.load(path, weights_only=False)
    groups = groups_of(from_hf(expected.config), degrees)
    return {name: run_scene(expected, degrees, groups, changes) for name, changes in SCENES.items()}


def run_scene(expected: Expected, degrees: Degrees, groups: ProcessGroups, changes: dict[int, Any]) -> dict[str, Any]:
    """Gradients with plain data parallelism, and parameters after a step with the sharded optimizer."""
    result: dict[str, Any] = {}
    for distributed in (False, True):
        config = test_config(from_hf(expected.config), distributed=distributed, overlap_grad_reduce=True)
        engine = build_engine(config, degrees, expected.state, groups)
        engine.build_optimizer()
        batches = own_share(scene(make_batches(expected.case), changes), engine.groups)
        result["losses"] = engine.step(batches).losses
        if distributed:
            result["parameters"] = gather_rows(engine.stages, config.model, engine.groups, trained)
        else:
            result["gradients"] = gather_rows(engine.stages, config.model, engine.groups, gradient)
    return result


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    return parameter.main_grad if parameter.requires_grad else None


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("ragged") / "expected.pt"
    torch.save(reference(request.param), path)
    return path, run_distributed(run_scenes, 1, ONE, str(path), timeout=300)[0]


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_equals_one_process(degrees: Degrees, alone: tuple[Path, Any]) -> None:
    path, expected = alone
    ours = run_distributed(run_scenes, degrees.world_size, degrees, str(path), timeout=400)[0]
    for name in SCENES:
        for key in expected[name]["losses"]:
            assert ours[name]["losses"][key] == pytest.approx(expected[name]["losses"][key], rel=1e-6, abs=1e-9), name
        for tensor, value in expected[name]["gradients"].items():
            worst = float((ours[name]["gradients"][tensor] - value).abs().max())
            assert worst <= 1e-4 * float(value.abs().max()) + ROUNDING, f"{name}: gradient of {tensor}: {worst}"
        for tensor, value in expected[name]["parameters"].items():
            worst = float((ours[name]["parameters"][tensor] - value).abs().max())
            assert worst <= 1e-6, f"{name}: {tensor}: {worst}"


def test_scenes_are_what_they_are_called(alone: tuple[Path, Any]) -> None:
    _, expected = alone
    assert expected["no_target_anywhere"]["losses"]["loss"] == 0.0
    zero = {name for name, g in expected["no_image_anywhere"]["gradients"].items() if not g.any()}
    assert any("perceiver" in name for name in zero)
    assert any("alpha_cross_attn" in name for name in zero)
    assert not any("alpha_dense" in name for name in zero)
    for value in expected["no_target_anywhere"]["gradients"].values():
        assert not value.any()
