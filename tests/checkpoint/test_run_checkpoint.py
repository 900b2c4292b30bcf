"""A run that goes on from a checkpoint is the uninterrupted one, bit for bit; what is not whole does not count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_atum.checkpoint import run_state
from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.hf_export import checkpoint_tensors, write_hf_folder
from megatron_atum.checkpoint.run_state import (
    RunCheckpoint,
    check_resumable,
    is_complete,
    newest_complete,
    read_state,
    step_folder,
)
from megatron_atum.checkpoint.weights import gather_rows, initialise
from megatron_atum.config.schema import Config
from megatron_atum.errors import CheckpointError
from megatron_atum.training.engine import Engine
from tests.distributed import run_distributed
from tests.layouts import Degrees, groups_of, test_config
from tests.model.cases import Case, hf_config, make_batches
from tests.training.equivalence import own_share, rotate

CASE = Case(
    "resumed",
    31,
    interval=1,
    rows=1,  # four units
    images=((2,), (0,), (1,), (3,)),
)
PLAIN = {"distributed": False, "overlap_grad_reduce": False}
SHARDED = {"distributed": True, "overlap_grad_reduce": True}
GATHERED = {**SHARDED, "overlap_param_gather": True}
BF16 = {**SHARDED, "precision": "bf16"}
SAVED_AT, STEPS = 2, 5
DATA = {"position": 17, "sources": [{"name": "a", "faults": 3}]}

JOBS: dict[str, tuple[Degrees, dict[str, Any]]] = {
    "tp2pp2": (Degrees(tensor=2, pipeline=2), PLAIN),
    "tp2pp2 sharded": (Degrees(tensor=2, pipeline=2, sequence=True), SHARDED),
    "dp2": (Degrees(data=2), PLAIN),
    "dp2 sharded": (Degrees(data=2), SHARDED),
    "dp2 sharded, overlapped gather": (Degrees(data=2), GATHERED),
    "dp2 sharded, bf16": (Degrees(data=2), BF16),
    "pp2vpp2": (Degrees(pipeline=2, virtual=2), SHARDED),
}


def config_of(changes: dict[str, Any]) -> Config:
    return test_config(from_hf({"model_type": "idefics", **hf_config(CASE)}), **changes)


def engine_of(config: Config, degrees: Degrees, seed: int) -> tuple[Engine, RunCheckpoint]:
    groups = groups_of(config.model, degrees)
    engine = Engine(config, groups)
    initialise(engine.stages, config.model, groups, seed)
    engine.build_optimizer()
    return engine, RunCheckpoint(config, groups, engine)


def steps(engine: Engine, numbers: range) -> list[Any]:
    batches = make_batches(CASE)
    done = [engine.step(own_share(rotate(batches, number), engine.groups)) for number in numbers]
    return [(result.losses, result.grad_norm, result.lr) for result in done]


def weights(engine: Engine) -> dict[str, Tensor]:
    for chunk in engine.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return gather_rows(engine.stages, engine.config.model, engine.groups, lambda parameter: parameter.data)


def resume(rank: int, world_size: int, names: list[str], root: str) -> dict[str, dict[str, Any]]:
    results = {}
    for name in names:
        degrees, changes = JOBS[name]
        config, checkpoints = config_of(changes), Path(root) / name
        engine, checkpoint = engine_of(config, degrees, seed=1)
        steps(engine, range(SAVED_AT))
        folder = checkpoint.save(checkpoints, SAVED_AT, DATA)
        drawn = torch.rand(3)
        went_on = steps(engine, range(SAVED_AT, STEPS))
        final = weights(engine)

        engine, checkpoint = engine_of(config, degrees, seed=2)
        state = read_state(folder)
        check_resumable(state, config, engine.groups.layout)
        checkpoint.load(state)
        saved, again = weights(engine), torch.rand(3)
        resumed = steps(engine, range(SAVED_AT, STEPS))
        results[name] = {
            "folder": str(folder),
            "went_on": went_on,
            "resumed": resumed,
            "saved": saved,
            "differ": [key for key, value in weights(engine).items() if not torch.equal(value, final[key])],
            "moved": any(not torch.equal(saved[key], final[key]) for key in saved),
            "random": torch.equal(drawn, again),
            "data": state.data,
        }
    return results


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every rank of every job says."""
    root = str(tmp_path_factory.mktemp("resumed"))
    results = {}
    for world_size in (2, 4):
        names = [name for name, (degrees, _) in JOBS.items() if degrees.world_size == world_size]
        ranks = run_distributed(resume, world_size, names, root)
        results |= {name: [rank[name] for rank in ranks] for name in names}
    return results


@pytest.mark.parametrize("name", JOBS)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, resumed: dict[str, list[dict[str, Any]]]) -> None:
    for rank in resumed[name]:
        assert rank["resumed"] == rank["went_on"]  # losses, gradient norms and learning rates: no tolerance
        assert rank["differ"] == []
        assert rank["moved"]
        assert rank["random"]
        assert rank["data"] == DATA


@pytest.mark.parametrize("name", JOBS)
def test_an_export_holds_the_weights(name: str, resumed: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    """`saved` was gathered from the ranks after loading; for bf16 the export is bf16."""
    from transformers import IdeficsForVisionText2Text

    state = read_state(Path(resumed[name][0]["folder"]))
    assert state.step == SAVED_AT
    write_hf_folder(tmp_path / "out", state.model, checkpoint_tensors(state), shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model, info = IdeficsForVisionText2Text.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == (torch.bfloat16 if "bf16" in name else torch.float32)
    exported, saved = model.state_dict(), resumed[name][0]["saved"]
    assert exported.keys() == saved.keys()
    assert [key for key in saved if not torch.equal(saved[key], exported[key].float())] == []


def test_checkpoints_of_all_layouts_hold_the_same_model(resumed: dict[str, list[dict[str, Any]]]) -> None:
    """Up to rounding: layouts train alike."""
    alone = dict(checkpoint_tensors(read_state(Path(resumed["dp2"][0]["folder"]))))
    for name in ("dp2 sharded", "dp2 sharded, overlapped gather", "tp2pp2", "tp2pp2 sharded", "pp2vpp2"):
        other = dict(checkpoint_tensors(read_state(Path(resumed[name][0]["folder"]))))
        worst = max(float((alone[key] - other[key]).abs().max()) for key in alone)
        assert worst <= 1e-6, name


# What does not count, and what is refused ----------------------------------------------------------------------------


@pytest.fixture
def checkpoints(resumed: dict[str, list[dict[str, Any]]], tmp_path: Path) -> Path:
    """Three complete checkpoints of one layout."""
    source = Path(resumed["dp2 sharded"][0]["folder"])
    for step in (2, 4, 10):
        shutil.copytree(source, step_folder(tmp_path, step))
    return tmp_path


def test_the_newest_complete_one_counts(checkpoints: Path) -> None:
    lines: list[str] = []
    assert newest_complete(checkpoints, lines.append) == step_folder(checkpoints, 10)
    assert lines == []
    assert newest_complete(checkpoints / "none") is None


def test_incomplete_ones_are_passed_over_with_the_reason(checkpoints: Path) -> None:
    cut, unfinished = step_folder(checkpoints, 10), step_folder(checkpoints, 4)
    file = cut / "optimizer-00001.pt"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    (unfinished / "complete.json").unlink()
    (checkpoints / "step-00000012.tmp").mkdir()
    lines: list[str] = []
    assert newest_complete(checkpoints, lines.append) == step_folder(checkpoints, 2)
    assert len(lines) == 2
    assert str(cut) in lines[0] and f"optimizer-00001.pt has {size - 1} bytes, not {size}" in lines[0]
    assert str(unfinished) in lines[1] and "complete.json" in lines[1]
    for folder, word in ((cut, "optimizer-00001.pt"), (unfinished, "complete.json")):
        assert not is_complete(folder)
        with pytest.raises(CheckpointError, match=word):
            read_state(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', "null"])
def test_a_broken_complete_json(text: str, checkpoints: Path) -> None:
    folder = step_folder(checkpoints, 10)
    (folder / "complete.json").write_text(text)
    lines: list[str] = []
    assert newest_complete(checkpoints, lines.append) == step_folder(checkpoints, 4)
    assert "complete.json" in lines[0]


def test_a_missing_file_or_folder(checkpoints: Path) -> None:
    folder = step_folder(checkpoints, 10)
    (folder / "model-pp0-tp0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-pp0-tp0\.safetensors has no bytes"):
        read_state(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_state(checkpoints / "nowhere")


def test_another_model_is_refused(checkpoints: Path) -> None:
    config = config_of(SHARDED)
    layout = Degrees(data=2).layout(config.model)
    state = read_state(step_folder(checkpoints, 10))
    check_resumable(state, config, layout)
    config.model.norm_eps = 1e-5
    config.model.perceiver.depth = 3
    with pytest.raises(CheckpointError) as error:
        check_resumable(state, config, layout)
    for word in (str(state.folder), "model.norm_eps is 1e-06 there and 1e-05 here", "model.perceiver.depth is 2 there"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("degrees", "changes", "words"),
    [
        (Degrees(tensor=2), SHARDED, ("'tensor': 1", "'tensor': 2")),
        (Degrees(pipeline=2), SHARDED, ("'pipeline': 1", "'pipeline': 2")),
        (Degrees(data=4), SHARDED, ("'world_size': 2", "'world_size': 4")),
        (Degrees(data=2), PLAIN, ("'distributed_optimizer': True", "'distributed_optimizer': False")),
    ],
    ids=str,
)
def test_another_layout_is_refused(
    degrees: Degrees, changes: dict[str, Any], words: tuple[str, str], checkpoints: Path
) -> None:
    config, state = config_of(changes), read_state(step_folder(checkpoints, 10))
    with pytest.raises(CheckpointError) as error:
        check_resumable(state, config, degrees.layout(config.model))
    for word in (str(state.folder), *words, "checkpoint.init"):
        assert word in str(error.value)


# Writing -------------------------------------------------------------------------------------------------------------

ERRORS = {
    "the weights of one rank": ("save_file", 3, OSError("no space left")),
    "the optimizer of one rank": ("torch.save", 1, RuntimeError("file write failed")),
    "state.json": ("write_json", 0, OSError("no space left")),
    "the last rename": ("commit_folder", 0, PermissionError("not allowed")),
}


def fail(rank: int, world_size: int, root: str) -> dict[str, tuple[str, list[str]]]:
    """A checkpoint, and then one that cannot be written on one rank, for each way to fail."""
    engine, checkpoint = engine_of(config_of(PLAIN), Degrees(tensor=2, pipeline=2), seed=1)
    checkpoints = Path(root)
    checkpoint.save(checkpoints, 1, {})
    results = {}
    for name, (function, bad_rank, error) in ERRORS.items():

        def broken(*args: Any, error: Exception = error, **kwargs: Any) -> None:
            raise error

        message = ""
        with pytest.MonkeyPatch.context() as patch:
            if rank == bad_rank:
                holder, attribute = (torch, "save") if function == "torch.save" else (run_state, function)
                patch.setattr(holder, attribute, broken)
            try:
                checkpoint.save(checkpoints, 2, {})
            except CheckpointError as problem:
                message = str(problem)
        torch.distributed.barrier()
        results[name] = message, sorted(folder.name for folder in checkpoints.iterdir())
        torch.distributed.barrier()
    checkpoint.save(checkpoints, 2, {})  # it works again
    return results


def test_a_write_error_on_one_rank_is_one_on_all(tmp_path: Path) -> None:
    ranks = run_distributed(fail, 4, str(tmp_path))
    for name, (_, bad_rank, error) in ERRORS.items():
        for rank in ranks:
            message, left = rank[name]
            assert f"rank {bad_rank}: {error}" in message, name
            assert "step-00000002" in message
            assert left == ["step-00000001"], name
    assert is_complete(step_folder(tmp_path, 1)) and is_complete(step_folder(tmp_path, 2))


def keep(rank: int, world_size: int, root: str) -> dict[int, list[list[str]]]:
    """What is there after each of five checkpoints. Step 2's folder loses its complete.json."""
    results = {}
    for number in (0, 1, 2):
        config = config_of(PLAIN)
        config.checkpoint.keep = number
        _, checkpoint = engine_of(config, Degrees(), seed=1)
        folder, results[number] = Path(root) / str(number), []
        for step in (1, 2, 3, 4, 5):
            saved = checkpoint.save(folder, step, {})
            if step == 2:
                (saved / "complete.json").unlink()
            results[number].append(sorted(path.name.lstrip("step-0") for path in folder.iterdir()))
    return results


def test_only_older_complete_checkpoints_are_removed(tmp_path: Path) -> None:
    (kept,) = run_distributed(keep, 1, str(tmp_path))
    assert kept[0][-1] == ["1", "2", "3", "4", "5"]
    assert kept[1] == [["1"], ["2"], ["2", "3"], ["2", "4"], ["2", "5"]]
    assert kept[2] == [["1"], ["1", "2"], ["1", "2", "3"], ["2", "3", "4"], ["2", "4", "5"]]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run_distributed(save_twice, 1, str(tmp_path))
    assert json.loads((step_folder(tmp_path, 7) / "state.json").read_text())["data"] == {"second": True}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def save_twice(rank: int, world_size: int, root: str) -> None:
    _, checkpoint = engine_of(config_of(PLAIN), Degrees(), seed=1)
    (Path(root) / "step-00000007.tmp").mkdir()  # left by a crash
    (Path(root) / "step-00000007.tmp" / "rubbish").write_text("x")
    checkpoint.save(Path(root), 7, {"first": True})
    checkpoint.save(Path(root), 7, {"second": True})
    assert not (step_folder(Path(root), 7) / "rubbish").exists()


def change(rank: int, world_size: int, root: str) -> dict[str, Any]:
    """Save under one configuration of the optimizer, go on under another."""
    engine, checkpoint = engine_of(config_of(PLAIN), Degrees(), seed=1)
    steps(engine, range(2))
    folder = checkpoint.save(Path(root), 2, {})
    engine, checkpoint = engine_of(
        config_of({**PLAIN, "lr": 1e-4, "weight_decay": 0.3, "beta2": 0.9, "decay_steps": 50}), Degrees(), seed=2
    )
    checkpoint.load(read_state(folder))
    ((_, _, lr),) = steps(engine, range(2, 3))
    groups = engine.inner_optimizer.param_groups
    return {
        "lr": lr,
        "betas": {group["betas"] for group in groups},
        "decay": {round(group["weight_decay"], 6) for group in groups},
        "adam_steps": {int(state["step"]) for state in engine.inner_optimizer.state.values()},
    }


def test_a_resumed_run_follows_its_configuration(tmp_path: Path) -> None:
    (found,) = run_distributed(change, 1, str(tmp_path))
    assert found["lr"] == pytest.approx(1e-4 * (1 - 2 / 50))  # linear to 0, at the saved step
    assert found["betas"] == {(0.9, 0.9)}
    assert found["decay"] == {0.0, 0.3}
    assert found["adam_steps"] == {3}


def save_below(rank: int, world_size: int, root: str) -> list[str]:
    config = config_of(PLAIN)
    config.checkpoint.keep = 1
    _, checkpoint = engine_of(config, Degrees(), seed=1)
    for step in (8, 9, 3):
        checkpoint.save(Path(root), step, {})
    return sorted(path.name for path in Path(root).iterdir())


def test_a_checkpoint_is_never_removed_for_later_ones(tmp_path: Path) -> None:
    assert run_distributed(save_below, 1, str(tmp_path)) == [["step-00000003", "step-00000009"]]
