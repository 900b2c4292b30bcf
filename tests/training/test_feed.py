"""The data of the next step, fetched beside the computation of this one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.batch import StepData
from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.data.loader import StepLoader
from megatron_atum.errors import DataError
from megatron_atum.parallel.groups import build_groups
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.training.feed import StepFeed
from tests.distributed import run_distributed
from tests.faults.runs import SMALL, data_overrides, make_data

STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("feed_data"))


def configured(data: Path) -> Config:
    return load_config(None, [*SMALL, *data_overrides(data), "training.global_batch_size=4", "data.workers=1"])


def loader_of(config: Config, rank: int, world_size: int) -> StepLoader:
    return StepLoader(
        config.data,
        config.model.vocab_size,
        config.model.vision.image_size,
        seed=3,
        micro_batch_size=1,
        global_batch_size=4,
        data_parallel_rank=rank,
        data_parallel_size=world_size,
        tensor_rank=0,
        tensor_size=1,
        encodes_images=True,
    )


def numbers(data: StepData) -> list[Any]:
    return [[batch.pack_ids.tolist(), batch.pixels.float().mean().item()] for batch in data.microbatches]


def follow(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    config = configured(Path(folder))
    groups = build_groups(ParallelLayout.from_config(config, world_size))
    plain, fed = loader_of(config, rank, world_size), loader_of(config, rank, world_size)
    feed = StepFeed(fed, groups, STEPS)
    seen: dict[str, Any] = {"begin": feed.state_dict() == plain.state_dict(), "equal": [], "states": [], "ahead": []}
    for _ in range(STEPS):
        seen["ahead"].append(becomes_ready(feed))
        seen["equal"].append(numbers(feed.next()) == numbers(plain.next_step()))
        seen["states"].append(feed.state_dict() == plain.state_dict())
        seen["reports"] = feed.fault_report() == plain.fault_report()
    feed.close()
    plain.close()
    seen["packs"] = fed.state_dict()["packs"]
    return seen


def becomes_ready(feed: StepFeed) -> bool:
    """The next step is fetched although nobody asks for it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if feed._next is not None and feed._next.done():
            return True
        time.sleep(0.01)
    return False


def test_steps_come_in_order_and_one_ahead(data: Path) -> None:
    for seen in run_distributed(follow, 2, str(data)):
        assert seen["begin"] and seen["reports"]
        assert seen["equal"] == seen["states"] == seen["ahead"] == [True] * STEPS
        assert seen["packs"] == 4 * STEPS  # nothing was fetched beyond what will be asked for


def fail(rank: int, world_size: int, folder: str) -> str:
    """One rank cannot read its data in the second step."""
    config = configured(Path(folder))
    groups = build_groups(ParallelLayout.from_config(config, world_size))
    loader = loader_of(config, rank, world_size)
    collect = loader._collect

    def collected() -> Any:
        built, error = collect()
        second = loader.state_dict()["packs"] == 4
        return (built, DataError("the disk of rank 1")) if rank == 1 and second else (built, error)

    loader._collect = collected  # type: ignore[method-assign]
    feed = StepFeed(loader, groups, STEPS)
    feed.next()
    try:
        feed.next()
    except DataError as error:
        feed.close()
        return f"{error}, at {loader.state_dict()['packs']}"
    return "no error"


def test_what_one_rank_cannot_read_all_ranks_raise(data: Path) -> None:
    assert run_distributed(fail, 2, str(data)) == ["the disk of rank 1, at 4"] * 2


def agree(rank: int, world_size: int) -> tuple[list[int], list[str]]:
    from megatron_atum.parallel.agreement import largest_codes

    config = load_config(None, ["model.preset=tiny", "training.global_batch_size=3"])
    groups = build_groups(ParallelLayout.from_config(config, world_size))
    none = torch.zeros(3, dtype=torch.uint8)
    mine = torch.tensor([2, 0, 0] if rank == 0 else [1, 0, 4], dtype=torch.uint8)
    assert largest_codes(-7, none, None, groups.host).tolist() == [0, 0, 0]
    largest = largest_codes(7, mine if rank < 2 else none, None, groups.host).tolist()
    said = []
    for plan, error in ((0 if rank == 1 else 9, DataError("here") if rank == 1 else None), (2**62 - rank, None)):
        try:
            largest_codes(plan, none[:0] if error else none, error, groups.host)
        except DataError as problem:
            said.append(str(problem))
    return largest, said


def test_codes_errors_and_plans_are_agreed_on() -> None:
    for largest, said in run_distributed(agree, 3):
        assert largest == [2, 0, 4]
        assert said[0] == "here" and said[1].startswith("ranks plan different rows")
