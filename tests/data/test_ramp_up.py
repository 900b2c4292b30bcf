"""The batch size over a run, and the stream of batches while it grows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_atum.batch import StepData
from megatron_atum.config.schema import DataConfig, RampUpConfig
from megatron_atum.data.loader import StepLoader
from megatron_atum.data.ramp_up import BatchSize
from megatron_atum.errors import ConfigError
from tests.data.test_loader import assert_equal

MakeLoader = Callable[..., StepLoader]
MakeConfig = Callable[..., DataConfig]

# 4, 8, 12, then 16 rows: three increments of 10 rows each, counted at the beginning of a step.
RAMP = {"global_batch_size": 16, "ramp_up": RampUpConfig(start=4, increment=4, rows=30)}
SIZES = [4, 4, 4, 8, 12, 16, 16]  # at rows 0, 4, 8, 12, 20, 32, 48


def sizes_of(batch_size: BatchSize, steps: int) -> list[int]:
    rows, sizes = 0, []
    for _ in range(steps):
        sizes.append(batch_size.at(rows))
        rows += sizes[-1]
    return sizes


def test_sizes_over_steps() -> None:
    ramped = BatchSize(16, RAMP["ramp_up"])
    assert sizes_of(ramped, 7) == SIZES
    assert ramped.all == [4, 8, 12, 16]
    assert [ramped.at(rows) for rows in (0, 9, 10, 19, 20, 29, 30, 10**12)] == [4, 4, 8, 8, 12, 12, 16, 16]


def test_without_a_ramp_up_all_steps_are_alike() -> None:
    plain = BatchSize(16)
    assert sizes_of(plain, 3) == [16] * 3 and plain.all == [16]


@pytest.mark.parametrize(
    ("final", "start", "increment", "rows"), [(16, 4, 4, 30), (3584, 512, 256, 100_000), (7, 1, 1, 3), (8, 4, 4, 10**9)]
)
def test_sizes_are_those_of_megatron_core(final: int, start: int, increment: int, rows: int) -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    theirs = RampupBatchsizeNumMicroBatchesCalculator(final, 1, 1, False, 1, start, increment, rows)
    ours = BatchSize(final, RampUpConfig(start, increment, rows))
    for consumed in range(0, rows + rows // 5 + 2, max(1, rows // 997)):
        theirs.update(consumed, consistency_check=True)
        assert ours.at(consumed) == theirs.get_current_global_batch_size(), consumed


# The loader ----------------------------------------------------------------------------------------------------------


def take(loader: StepLoader, count: int) -> list[StepData]:
    found = [loader.next_step() for _ in range(count)]
    loader.close()
    return found


def check_same(left: list[StepData], right: list[StepData]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for one, other in zip(a.microbatches, b.microbatches, strict=True):
            assert_equal(one, other)


def rows_of(step: StepData) -> list[int]:
    return sorted(torch.cat([batch.pack_ids for batch in step.microbatches]).tolist())


def test_steps_take_the_rows_in_turn(make_loader: MakeLoader) -> None:
    found = [rows_of(step) for step in take(make_loader(**RAMP), len(SIZES))]
    assert [len(rows) for rows in found] == SIZES
    assert [row for rows in found for row in rows] == list(range(sum(SIZES)))


def test_a_full_step_is_the_one_of_a_run_without_ramp_up(make_loader: MakeLoader) -> None:
    """Rows do not depend on the size of the steps they came in."""
    ramped = take(make_loader(**RAMP), 7)
    plain = take(make_loader(global_batch_size=16), 4)
    check_same(ramped[5:], plain[2:])  # both begin at row 32


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_the_stream_is_the_same_with_ranks_and_workers(
    make_loader: MakeLoader, data_config: MakeConfig, size: int, workers: int
) -> None:
    """Workers have microbatches of several steps, of several sizes, under way."""
    whole = take(make_loader(**RAMP), 6)
    places = [{"data_parallel_rank": rank, "data_parallel_size": size} for rank in range(size)]
    parts = [take(make_loader(data_config(workers=workers), **RAMP, **place), 6) for place in places]
    for number, step in enumerate(whole):
        mine = [part[number].microbatches for part in parts]
        merged = [batch for together in zip(*mine, strict=True) for batch in together]
        check_same([step], [StepData(merged, 0, ())])


@pytest.mark.parametrize("done", range(7))
def test_resume_in_the_middle(make_loader: MakeLoader, data_config: MakeConfig, done: int) -> None:
    """From the planner's state alone, under another layout, with steps prefetched beyond it."""
    first = make_loader(data_config(workers=2), **RAMP)
    for _ in range(done):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    assert state["packs"] == sum(SIZES[:done])
    assert set(state) == set(make_loader().state_dict())
    whole = take(first, 2)
    parts = []
    for rank in range(2):
        loader = make_loader(**RAMP, data_parallel_rank=rank, data_parallel_size=2)
        loader.load_state_dict(state)
        parts.append(take(loader, 2))
    for number, step in enumerate(whole):
        mine = [part[number].microbatches for part in parts]
        check_same([step], [StepData([b for pair in zip(*mine, strict=True) for b in pair], 0, ())])


def test_a_restart_of_the_stream_keeps_the_batch_size(make_loader: MakeLoader, data_config: MakeConfig) -> None:
    """Other data, the same run: a batch that shrank would meet the learning rate of a large one."""
    first = make_loader(**RAMP)
    for _ in range(4):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    other = make_loader(data_config(on_change="restart", filters=["no_image"], sequence_length=200), **RAMP)
    other.load_state_dict(state)
    steps = take(other, 1)
    state = json.loads(json.dumps(other.state_dict()))
    other.load_state_dict(state)
    found = [rows_of(step) for step in [*steps, *take(other, 2)]]
    assert [len(rows) for rows in found] == SIZES[4:]
    assert [row for rows in found for row in rows] == list(range(sum(SIZES[4:])))


def test_stages_without_images_follow(make_loader: MakeLoader) -> None:
    found = [rows_of(step) for step in take(make_loader(**RAMP, encodes_images=False), len(SIZES))]
    assert [len(rows) for rows in found] == SIZES


@pytest.mark.parametrize(
    ("ramp", "needle"),
    [((6, 10, 30), "ramp_up makes a batch=6 is no multiple .* = 4; use e.g. 4"), ((4, 6, 30), "ramp_up .*=10 is no")],
)
def test_uneven_sizes_are_refused(make_loader: MakeLoader, ramp: Any, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        make_loader(global_batch_size=16, ramp_up=RampUpConfig(*ramp), data_parallel_size=2)
