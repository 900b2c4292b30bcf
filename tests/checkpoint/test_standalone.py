"""A copy that needs no other folder: the same bytes, a run goes on from it, and no damage gets into it."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.checkpoint.folder import damaged, folders_of, missing
from megatron_atum.checkpoint.reader import CheckpointReader
from megatron_atum.checkpoint.standalone import copy_standalone
from megatron_atum.checkpoint.stored import open_checkpoint, read_state
from megatron_atum.checkpoint.table import hf_shapes
from megatron_atum.errors import CheckpointError
from tests.checkpoint.runs import BF16, config_of, engine_of, resumed_engine, saved, steps, weights
from tests.checkpoint.test_any_layout import contents
from tests.distributed import run_distributed
from tests.layouts import Degrees
from tests.tools.calls import flip

SAVED_AT, STEPS = 2, 4


def train(rank: int, world_size: int, root: str) -> dict[str, Any]:
    """Train, save and go on from the checkpoint and from its copy."""
    config, degrees, copy = config_of(BF16, frozen=True), Degrees(tensor=2), Path(root) / "copy"
    engine, checkpoint = engine_of(config, degrees, Path(root) / "run/checkpoints", seed=1)
    steps(engine, range(SAVED_AT))
    folder = saved(checkpoint, SAVED_AT)
    if rank == 0:
        copy_standalone(folder, copy)
    torch.distributed.barrier()
    ends = {}
    for start in (folder, copy):
        engine, checkpoint = resumed_engine(config, degrees, start, checkpoints=Path(root) / f"from-{start.name}")
        said = steps(engine, range(SAVED_AT, STEPS))
        ends[start.name] = (said, weights(engine), saved(checkpoint, STEPS))
    (said, values, _), (said_copy, values_copy, again) = ends.values()
    return {
        "folder": str(folder),
        "said": said == said_copy,
        "differ": [name for name in values if not torch.equal(values[name], values_copy[name])],
        "steps": len(said),
        "again": missing(again),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("standalone")
    ranks = run_distributed(train, 2, str(root))
    return {**ranks[0], "root": root, "ranks": ranks, "folder": Path(ranks[0]["folder"])}


@pytest.fixture
def run(trained: dict[str, Any], tmp_path: Path) -> Path:
    """A step folder that a test may spoil, beside its frozen weights."""
    shutil.copytree(trained["folder"].parent, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / trained["folder"].name


def test_a_run_goes_on_from_a_copy_as_from_the_original(trained: dict[str, Any]) -> None:
    for rank in trained["ranks"]:
        assert rank["said"] and rank["steps"] == STEPS - SAVED_AT
        assert rank["differ"] == [] and rank["again"] == []


def test_a_copy_needs_no_other_folder(trained: dict[str, Any], tmp_path: Path) -> None:
    folder, moved = trained["folder"], tmp_path / "elsewhere"
    assert len(folders_of(folder)) == 2
    shutil.copytree(trained["root"] / "copy", moved)
    assert folders_of(moved) == [moved]
    assert missing(moved) == [] and damaged(moved) == []
    ours, theirs = contents(moved), contents(folder)
    assert ours.keys() == theirs.keys() and len(ours) > len(hf_shapes(read_state(folder).model))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    before, after = (json.loads((place / "state.json").read_text()) for place in (folder, moved))
    assert before.pop("frozen") and after.pop("frozen") is None
    assert before == after
    assert open_checkpoint(moved).assets == open_checkpoint(folder).assets != {}
    files = {file.name for file in moved.glob("*.safetensors")}
    assert {"frozen-weights-00000-0.safetensors", "weights-00000-0.safetensors"} < files


def test_a_copy_of_a_copy_is_the_same(trained: dict[str, Any], tmp_path: Path) -> None:
    copy_standalone(trained["root"] / "copy", tmp_path / "second")
    first, second = (
        {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}
        for place in (trained["root"] / "copy", tmp_path / "second")
    )
    assert first == second


def test_weights_only(run: Path, tmp_path: Path) -> None:
    flip(next(run.glob("optimizer-*")))  # is not read
    copy_standalone(run, tmp_path / "out", weights_only=True)
    stored, original = open_checkpoint(tmp_path / "out"), open_checkpoint(run)
    assert damaged(tmp_path / "out") == []
    assert stored.reader.index.keys() == hf_shapes(stored.model).keys()
    assert all(torch.equal(stored.read(name), original.read(name)) for name in stored.names())
    assert not list((tmp_path / "out").glob("optimizer-*"))
    state = stored.state
    assert not state.is_training and (state.step, state.model) == (SAVED_AT, original.model)
    assert (state.data, state.scheduler, state.optimizer_steps) == ({}, {}, {})
    assert stored.assets == original.assets != {}
    with CheckpointReader(run) as reader:
        assert any(key.startswith("optimizer.") for key in reader.index)  # there was something to leave out


@pytest.mark.parametrize(
    "file",
    [
        "step-*/weights-00001-0.safetensors",
        "step-*/optimizer-00000-0.safetensors",
        "step-*/assets/tokenizer.model",
        "frozen-*/weights-00000-0.safetensors",
    ],
)
def test_damage_is_not_copied(file: str, run: Path, tmp_path: Path) -> None:
    spoilt = next(run.parent.glob(file))
    flip(spoilt)
    refused(run, tmp_path, str(spoilt), "checksum")


@pytest.mark.parametrize("file", ["step-*/state.json", "frozen-*/index.json"])
def test_damage_to_what_describes_is_seen(file: str, run: Path, tmp_path: Path) -> None:
    """A digit changes: the file can still be read."""
    spoilt = next(run.parent.glob(file))
    text = spoilt.read_text()
    spoilt.write_text(text.replace('"step": 2', '"step": 3') if "step-" in file else text[:-1] + " ")
    assert spoilt.read_text() != text
    refused(run, tmp_path, spoilt.name, "checksum")


def test_an_incomplete_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    next(run.parent.glob("frozen-*/weights-00000-0.safetensors")).unlink()
    refused(run, tmp_path, run.name, "weights-00000-0.safetensors is missing")


def test_a_full_disk_is_seen_before_anything_is_copied(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(free=1000))
    refused(run, tmp_path, "0.0 GB free")


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        copy_standalone(run, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def refused(run: Path, tmp_path: Path, *words: str) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as error:
        copy_standalone(run, tmp_path / "out")
    for word in words:
        assert word in str(error.value), str(error.value)
    assert sorted(tmp_path.iterdir()) == before  # nothing half written either
