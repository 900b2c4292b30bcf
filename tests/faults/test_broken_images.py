"""An image that cannot be decoded: found by one rank, known to all, and the run is the same at every layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import SMALL, Outcome, data_overrides, numbers_of, run

LAYOUTS = {
    "one": (1, []),
    "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "dp2": (2, ["data.workers=1"]),
}
STEPS = 4
JPEG = b"\xff\xd8\xff"
LENIENT = "data.max_fault_rate=1.0"


def break_images(shard: Path, count: int) -> None:
    """Overwrites the beginning of the first images of a shard."""
    content = bytearray(shard.read_bytes())
    place = -1
    for _ in range(count):
        place = content.index(JPEG, place + 1)
        content[place : place + 1000] = bytes(1000)
    shard.write_bytes(content)


@pytest.fixture(scope="module")
def broken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "data"
    shutil.copytree(data, folder)
    break_images(folder / "pairs-00000.tar", 1)
    return folder


def trained(root: Path, data: Path, layout: str, *changes: str) -> Outcome:
    world_size, overrides = LAYOUTS[layout]
    steps = [f"training.steps={STEPS}", "checkpoint.save_every=0"]
    return run(root, [*SMALL, *data_overrides(data), *steps, *overrides, *changes], world_size)


@pytest.fixture(scope="module")
def single(broken: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("single")
    outcome = trained(root, broken, "one", LENIENT)
    assert outcome.codes == [0], outcome.logs
    assert "data: pairs: corrupt_image: an image of" in outcome.logs[0]
    assert f"dropped or lost: corrupt_image {numbers_of(root)[-1]['faults']}" in outcome.logs[0]
    return numbers_of(root)


@pytest.mark.parametrize("layout", ["tp2pp2", "dp2"])
def test_every_layout_trains_as_one_process(
    layout: str, broken: Path, single: list[dict[str, Any]], tmp_path: Path
) -> None:
    outcome = trained(tmp_path, broken, layout, LENIENT)
    assert outcome.codes == [0] * LAYOUTS[layout][0], outcome.logs
    for ours, theirs in zip(numbers_of(tmp_path), single, strict=True):
        assert (ours["faults"], ours["images"]) == (theirs["faults"], theirs["images"])
        for key in ("loss", "z_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-6), key
    assert single[-1]["faults"] > 0


def test_a_broken_image_is_not_a_black_one(data: Path, single: list[dict[str, Any]], tmp_path: Path) -> None:
    """Without this the test above would pass if nothing came of images at all."""
    outcome = trained(tmp_path, data, "one")
    assert outcome.codes == [0], outcome.logs
    whole = numbers_of(tmp_path)
    assert whole[-1]["faults"] == 0
    assert abs(whole[-1]["loss"] - single[-1]["loss"]) > 1e-5


@pytest.mark.parametrize("layout", ["tp2pp2", "dp2"])
def test_too_many_stop_all_ranks_with_one_message(layout: str, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    break_images(tmp_path / "data" / "pairs-00000.tar", 10)
    outcome = trained(tmp_path, tmp_path / "data", layout, "training.steps=50")
    assert outcome.codes == [2] * LAYOUTS[layout][0], outcome.logs
    for log in outcome.logs:
        assert log.count("pretrain_atum: DataError: source pairs: ") == 1
        assert "images are broken" in log and "data.max_fault_rate=0.01" in log
        assert "Traceback" not in log


def test_a_missing_shard_stops_all_ranks(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    outcome = run(
        tmp_path,
        [*SMALL, *data_overrides(tmp_path / "data"), "training.steps=4", *LAYOUTS["tp2pp2"][1]],
        4,
        hook=lose_a_shard,
    )
    assert outcome.codes == [2] * 4, outcome.logs
    for log in outcome.logs:
        assert "pairs-00000.tar" in log and "data.on_missing_shard=skip" in log and "Traceback" not in log


def lose_a_shard(rank: int) -> None:
    """The shard is gone for this rank once the run has begun."""
    from megatron_atum.data.microbatch import ImagePlace, MicrobatchBuilder
    from megatron_atum.data.storage import MissingFile

    def gone(self: MicrobatchBuilder, place: ImagePlace) -> None:
        raise MissingFile(f"{self.indexes[place.source].shards[place.shard].path} does not exist")

    if rank == 1:
        MicrobatchBuilder._check_shard = gone  # type: ignore[method-assign]
