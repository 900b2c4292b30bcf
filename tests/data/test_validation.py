"""Held-out sources are separate and fixed."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.batch import Batch
from megatron_atum.config.schema import DataConfig, SourceConfig
from megatron_atum.data.loader import StepLoader
from megatron_atum.data.validation import ValidationSet, check_held_out, open_validation
from megatron_atum.errors import DataError
from tests.data.conftest import PLACEMENT, VOCAB_SIZE
from tests.data.test_loader import assert_equal

MakeConfig = Callable[..., DataConfig]


def open_sets(config: DataConfig, **changes: Any) -> dict[str, ValidationSet]:
    placement = {"model_vocab_size": VOCAB_SIZE, "image_size": 32, **PLACEMENT}
    return open_validation(config, **(placement | changes))


def batches(found: ValidationSet) -> list[Batch]:
    return [batch for step in found.batches() for batch in step.microbatches]


def assert_all_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert_equal(a, b)


@pytest.fixture
def config(data_config: MakeConfig, tiny: Path) -> DataConfig:
    held_out = SourceConfig("held out", str(tiny / "pairs-*.tar"), kind="pairs", max_images=4)
    training = data_config()
    sources = training.sources[:1]
    return dataclasses.replace(training, sources=sources, validation=[held_out], validation_packs=20, augment=False)


def test_the_set_is_the_same_each_time(config: DataConfig) -> None:
    found = open_sets(config)["held out"]
    first = batches(found)
    assert len(first) == 3 * 4  # 20 rows, rounded up to three steps of 8, in microbatches of 2
    assert_all_equal(first, batches(found))
    other = dataclasses.replace(config, augment=True, p_next=1.0, image_at_end=1.0, workers=2)
    assert_all_equal(first, batches(open_sets(other)["held out"]))


def test_a_set_can_be_left_half_way(config: DataConfig) -> None:
    found = open_sets(config)["held out"]
    whole = batches(found)
    for _ in zip(range(1), found.batches(), strict=False):
        pass
    assert_all_equal(whole, batches(found))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_it(config: DataConfig, size: int) -> None:
    parts = [
        batches(open_sets(config, data_parallel_rank=rank, data_parallel_size=size)["held out"]) for rank in range(size)
    ]
    merged = [batch for together in zip(*parts, strict=True) for batch in together]
    assert_all_equal(batches(open_sets(config)["held out"]), merged)


def test_the_same_shard_elsewhere_is_not_held_out(
    config: DataConfig, tiny: Path, tmp_path: Path, make_loader: Callable[..., StepLoader]
) -> None:
    shutil.copy(tiny / "pairs-00000.tar", tmp_path / "copy.tar")
    check_held_out(make_loader(config), open_sets(config))
    trained = SourceConfig("trained", str(tmp_path / "copy.tar"), kind="pairs")
    config = dataclasses.replace(config, sources=[trained])
    with pytest.raises(DataError, match=r"validation source held out: .*pairs-00000\.tar is also .* source trained"):
        check_held_out(make_loader(config), open_sets(config))
