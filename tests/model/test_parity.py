"""Logits and gradients equal Hugging Face's, for many small models, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.layouts import LAYOUTS, ONE, Degrees
from tests.model.cases import CASES, reference
from tests.model.parity import run_cases

LOGITS = 1e-5  # absolute, on logits of size 2 to 4
GRADIENTS = 1e-4  # relative to the largest gradient of the tensor

UNEVEN = Degrees(pipeline=3)  # four units on three stages


@pytest.fixture(scope="module")
def expected_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "expected.pt"
    torch.save([reference(case) for case in CASES], path)
    return path


@pytest.fixture(scope="module")
def four_units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "four_units.pt"
    torch.save([reference(case) for case in CASES if case.layers // case.interval == 4], path)
    return path


def check(results: list[list[dict]], cases: int) -> None:
    assert all(len(rank) == cases for rank in results)
    for number in range(cases):
        for rank in (results[r][number] for r in range(len(results))):
            name = rank["case"]
            assert rank["logits"] <= LOGITS, f"{name}: logits differ by {rank['logits']}"
            assert rank["loss"] <= 1e-5, f"{name}: loss differs by {rank['loss']}"
            assert not rank["missing"], f"{name}: gradients on one side only: {rank['missing']}"
            worst = max(rank["gradients"], key=rank["gradients"].__getitem__)
            assert rank["gradients"][worst] <= GRADIENTS, f"{name}: {worst} differs by {rank['gradients'][worst]}"
            assert rank["replicated"] == 0.0, f"{name}: replicated gradients differ by {rank['replicated']}"
        # the last stage compared real logits, and there were gradients to compare
        assert any(results[r][number]["logits"] > 0.0 for r in range(len(results)))
        assert len(results[0][number]["gradients"]) > 50


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_equals_hugging_face(degrees: Degrees, expected_file: Path) -> None:
    check(run_distributed(run_cases, degrees.world_size, degrees, str(expected_file), timeout=400), len(CASES))


def test_uneven_stages_equal_hugging_face(four_units: Path) -> None:
    count = sum(case.layers // case.interval == 4 for case in CASES)
    assert count >= 2
    check(run_distributed(run_cases, 3, UNEVEN, str(four_units), timeout=300), count)


@pytest.mark.gpu
def test_equals_hugging_face_on_a_gpu(expected_file: Path) -> None:
    """fp32 over NCCL against the CPU's numbers: other kernels, so a wider tolerance."""
    for result in run_distributed(run_cases, 1, ONE, str(expected_file), backend="nccl", timeout=300)[0]:
        assert result["logits"] <= 1e-4, result["case"]
        assert max(result["gradients"].values()) <= 1e-3, result["case"]


def test_cases_cover_what_they_claim() -> None:
    assert {case.interval for case in CASES} == {1, 2, 4}
    assert {case.added for case in CASES} == {0, 2, 3}
    assert {case.eps for case in CASES} == {1e-5, 1e-6}
    assert {case.alpha_type for case in CASES} == {"float", "vector"}
    assert {case.padding for case in CASES} == {"none", "left", "right"}
    assert {case.frozen for case in CASES} == {True, False}
    images = {count for case in CASES for row in case.images for count in row}
    assert {0, 1} < images
    assert max(images) >= 9
