"""Which rollbacks a run has behind it, and where its data goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_atum.checkpoint.folder import record_of, write_record
from megatron_atum.errors import CheckpointError
from megatron_atum.training.rollback import (
    Rollback,
    data_position,
    last_good,
    later_than,
    read_rollbacks,
    write_rollbacks,
)


def complete_step(checkpoints: Path, step: int) -> None:
    folder = checkpoints / f"step-{step:08d}"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"1234")
    write_record(folder, [record_of(folder / "weights.bin", "weights.bin")])


FIRST = Rollback(39, 30, {"packs": 160}, "a spike")
SECOND = Rollback(75, 60, {"packs": 320}, "another")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path, 100) == []
    write_rollbacks(tmp_path, [FIRST, SECOND])
    assert read_rollbacks(tmp_path, 100) == read_rollbacks(tmp_path, 60) == [FIRST, SECOND]
    assert read_rollbacks(tmp_path, 59) == [FIRST], "later ones belong to a history that was given up"
    assert read_rollbacks(tmp_path, 29) == []


def test_one_that_goes_further_back_does_not_forget_those_before_it(tmp_path: Path) -> None:
    """Learning rates are lowered for each."""
    further = Rollback(55, 20, {"packs": 280}, "again")
    write_rollbacks(tmp_path, [FIRST, further])
    assert read_rollbacks(tmp_path, 20) == [FIRST, further]


def test_the_data_goes_on_behind_the_spike_at_its_own_checkpoint_only() -> None:
    of_checkpoint = {"packs": 120}
    assert data_position([FIRST], 30, of_checkpoint) == FIRST.data
    assert data_position([FIRST], 40, of_checkpoint) == of_checkpoint, "written after the rollback"
    twice = Rollback(50, 30, {"packs": 240}, "again")
    assert data_position([FIRST, twice], 30, of_checkpoint) == twice.data


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rollbacks.json").write_text('[{"step": 3')
    with pytest.raises(CheckpointError, match=r"rollbacks\.json cannot be read"):
        read_rollbacks(tmp_path, 10)


def test_the_last_good_checkpoint_is_older_than_the_spike_and_complete(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        complete_step(tmp_path, step)
    (tmp_path / "step-00000030" / "complete.json").unlink()
    assert last_good(tmp_path, 35) == tmp_path / "step-00000020"
    assert last_good(tmp_path, 20) == tmp_path / "step-00000010", "step 20 itself is in it"
    assert last_good(tmp_path, 10) is None
    later = later_than(tmp_path, tmp_path / "step-00000020")
    assert [path.name for path in later] == ["step-00000040", "step-00000030"]
