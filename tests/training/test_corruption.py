"""Frozen weights that change or differ: every bit counts, and the rank at fault is named if it can be known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import HealthFailure
from megatron_atum.training import corruption
from megatron_atum.training.corruption import FrozenWeights, Sums, checksum, complaints
from tests.distributed import run_distributed
from tests.layouts import Degrees, groups_of

MODEL = ModelConfig(hidden_size=8, num_heads=4, num_layers=4, cross_layer_interval=1)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_flipped_bit_shows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruption, "_AT_ONCE", 3)
    weight = torch.tensor([[0.0, -0.0, 2.0, -2e-3], [float("inf"), float("nan"), 3e38, -1.0]]).to(dtype)
    before, bits = int(checksum(weight)), weight.view(INTEGERS[dtype]).view(-1)
    for place in range(len(bits)):
        for bit in range(8 * dtype.itemsize):
            mask = 1 << bit if bit < 8 * dtype.itemsize - 1 else -(1 << bit)
            bits[place] ^= mask
            assert int(checksum(weight)) != before, (place, bit)
            bits[place] ^= mask
    assert int(checksum(weight)) == before


# Who is at fault -----------------------------------------------------------------------------------------------------


def told(*ranks: tuple[list[int], list[int]]) -> list[str]:
    return complaints(["a", "b"], [Sums(f"rank {n}", first, last) for n, (first, last) in enumerate(ranks)])


GOOD = ([1, 2], [1, 2])


def test_a_rank_that_has_changed_is_at_fault_even_against_a_majority() -> None:
    assert told(GOOD, GOOD) == []
    assert told(GOOD, ([1, 2], [1, 3])) == ["rank 1 since the start: b"]
    assert told(([1, 2], [5, 3]), GOOD) == ["rank 0 since the start: a, b"]
    other = ([1, 2], [1, 3])
    assert told(GOOD, other, other) == ["rank 1 since the start: b", "rank 2 since the start: b"]


def test_a_majority_names_the_others() -> None:
    assert told(GOOD, GOOD, ([9, 2], [9, 2])) == ["rank 2 differs from most of its 3 data-parallel ranks: a"]
    assert told(([9, 2], [9, 2]), GOOD, GOOD) == ["rank 0 differs from most of its 3 data-parallel ranks: a"]


def test_without_a_majority_nobody_is_named_at_fault() -> None:
    bad = ([9, 2], [9, 2])
    assert told(GOOD, bad) == ["rank 0, rank 1 differ, and no majority says which is at fault: a"]
    assert told(GOOD, bad, GOOD, bad)[0].startswith("rank 0, rank 1, rank 2, rank 3 differ")
    assert told(GOOD, GOOD, ([7, 2], [7, 2]), bad)[0].startswith("rank 0, rank 1, rank 2, rank 3 differ")


def test_long_lists_are_cut() -> None:
    names = [f"w{n}" for n in range(8)]
    (one,) = complaints(names, [Sums("rank 0", [0] * 8, [1] * 8)])
    assert one == "rank 0 since the start: w0, w1, w2, w3, w4 and 3 more"


# Several ranks -------------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """A weight that trains and as many frozen ones as asked for, of different values."""

    def __init__(self, frozen: int) -> None:
        super().__init__()
        self.trains = nn.Parameter(torch.ones(3))
        self.frozen = nn.ParameterList(nn.Parameter(torch.arange(5.0) + n, requires_grad=False) for n in range(frozen))


def flip(stage: Stage, weight: int = 0) -> None:
    stage.frozen[weight].data.view(torch.int32)[2] ^= 1


def said(act: Any) -> str:
    try:
        act()
    except HealthFailure as error:
        return str(error)
    return ""


def watched(rank: int, world_size: int, degrees: Degrees) -> dict[str, Any]:
    """What is said of sound weights, of one flipped on rank 1, and of one that rank 1 has loaded wrongly."""
    groups = groups_of(MODEL, degrees)
    stage = Stage(2)
    watch = FrozenWeights([stage], groups)
    found: dict[str, Any] = {"sound": said(watch.check)}
    stage.trains.data += 1.0
    found["trained"] = said(watch.check)
    if rank == 1:
        flip(stage, 1)
    found["flipped"] = said(watch.check)
    found["loaded"] = said(lambda: FrozenWeights([stage], groups))
    return found


@pytest.mark.parametrize("degrees", [Degrees(data=2), Degrees(tensor=2), Degrees(pipeline=2), Degrees(data=3)], ids=str)
def test_ranks_say_the_same_and_name_the_one_at_fault(degrees: Degrees) -> None:
    ranks = run_distributed(watched, degrees.world_size, degrees)
    assert all(rank == ranks[0] for rank in ranks)
    found = ranks[0]
    assert found["sound"] == found["trained"] == ""
    assert found["flipped"].startswith("frozen weights have changed: rank 1 on ")
    assert " since the start: frozen.1. Take the node out" in found["flipped"]
    assert "rank 0" not in found["flipped"] and "differ" not in found["flipped"]
    if degrees.data == 1:
        assert found["loaded"] == "", "there is nothing to compare it with"
    else:
        assert found["loaded"].startswith("frozen weights differ at the start: rank ")
        assert ("rank 1 on" in found["loaded"]) and ("no majority" in found["loaded"]) == (degrees.data == 2)
        assert ("rank 0" in found["loaded"]) == (degrees.data == 2)


def partly(rank: int, world_size: int) -> dict[str, Any]:
    """The last stage, of ranks 2 and 3, has no frozen weight; then none has."""
    groups = groups_of(MODEL, Degrees(pipeline=2, data=2))
    stage = Stage(0 if groups.is_last_stage else 1)
    some, none = FrozenWeights([stage], groups), FrozenWeights([Stage(0)], groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_gather_object", None)
        patch.setattr(corruption, "all_true", None)
        none.check()  # communicates with nobody
    if rank == 0:
        flip(stage)
    return {"exist": (some.exist, none.exist), "said": said(some.check)}


def test_stages_without_frozen_weights_take_part() -> None:
    ranks = run_distributed(partly, 4)
    for found in ranks:
        assert found["exist"] == (True, False)
        assert found["said"].startswith("frozen weights have changed: rank 0 on ")
        assert "frozen.0" in found["said"] and "rank 1" not in found["said"]
