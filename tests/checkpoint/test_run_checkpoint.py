"""A run that goes on from a checkpoint is the uninterrupted one, bit for bit; a save is whole or not there."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.checkpoint import run_checkpoint
from megatron_atum.checkpoint.folder import missing, step_folder
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.run_checkpoint import check_resumable
from megatron_atum.checkpoint.stored import StoredCheckpoint, read_state
from megatron_atum.errors import CheckpointError
from tests.checkpoint.runs import (
    BF16,
    BF16_PLAIN,
    DATA,
    GATHERED,
    PLAIN,
    SHARDED,
    config_of,
    engine_of,
    resumed_engine,
    saved,
    steps,
    weights,
)
from tests.checkpoint.test_any_layout import contents
from tests.distributed import run_distributed
from tests.layouts import Degrees

SAVED_AT, STEPS = 2, 5

JOBS: dict[str, tuple[Degrees, dict[str, Any]]] = {
    "tp2pp2": (Degrees(tensor=2, pipeline=2), PLAIN),
    "tp2pp2 sharded": (Degrees(tensor=2, pipeline=2, sequence=True), SHARDED),
    "dp2": (Degrees(data=2), PLAIN),
    "dp2 sharded": (Degrees(data=2), SHARDED),
    "dp2 sharded, overlapped gather": (Degrees(data=2), GATHERED),
    "dp2 sharded, bf16": (Degrees(data=2), BF16),
    "dp2, bf16": (Degrees(data=2), BF16_PLAIN),
    "pp2vpp2": (Degrees(pipeline=2, virtual=2), SHARDED),
}


def resume(rank: int, world_size: int, names: list[str], root: str) -> dict[str, dict[str, Any]]:
    results = {}
    for name in names:
        degrees, changes = JOBS[name]
        config, checkpoints = config_of(changes), Path(root) / name
        engine, checkpoint = engine_of(config, degrees, checkpoints, seed=1)
        steps(engine, range(SAVED_AT))
        folder = saved(checkpoint, SAVED_AT)
        drawn = torch.rand(3)
        went_on = steps(engine, range(SAVED_AT, STEPS))
        final = weights(engine)

        engine, _ = resumed_engine(config, degrees, folder)
        before, again = weights(engine), torch.rand(3)
        resumed = steps(engine, range(SAVED_AT, STEPS))
        results[name] = {
            "folder": str(folder),
            "went_on": went_on,
            "resumed": resumed,
            "saved": before,
            "differ": [key for key, value in weights(engine).items() if not torch.equal(value, final[key])],
            "moved": any(not torch.equal(before[key], final[key]) for key in before),
            "random": torch.equal(drawn, again),
            "data": read_state(folder).data,
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

    stored = StoredCheckpoint(Path(resumed[name][0]["folder"]))
    assert stored.state.step == SAVED_AT
    write_hf_folder(tmp_path / "out", stored.model, stored, shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model, info = IdeficsForVisionText2Text.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == (torch.bfloat16 if "bf16" in name else torch.float32)
    exported, held = model.state_dict(), resumed[name][0]["saved"]
    assert exported.keys() == held.keys()
    assert [key for key in held if not torch.equal(held[key], exported[key].float())] == []


def test_checkpoints_of_all_layouts_hold_the_same_model(resumed: dict[str, list[dict[str, Any]]]) -> None:
    """Up to rounding: layouts train alike."""
    alone = contents(Path(resumed["dp2"][0]["folder"]))
    for name in ("dp2 sharded", "dp2 sharded, overlapped gather", "tp2pp2", "tp2pp2 sharded", "pp2vpp2"):
        other = contents(Path(resumed[name][0]["folder"]))
        assert other.keys() == alone.keys()
        worst = max(float((alone[key] - other[key]).abs().max()) for key in alone)
        assert worst <= 1e-6, name


# What may go on ------------------------------------------------------------------------------------------------------


def test_another_model_is_refused(resumed: dict[str, list[dict[str, Any]]]) -> None:
    config = config_of(SHARDED)
    state = read_state(Path(resumed["dp2 sharded"][0]["folder"]))
    check_resumable(state, config)
    config.model.norm_eps = 1e-5
    config.model.perceiver.depth = 3
    with pytest.raises(CheckpointError) as error:
        check_resumable(state, config)
    for word in (str(state.folder), "model.norm_eps is 1e-06 there and 1e-05 here", "model.perceiver.depth is 2 there"):
        assert word in str(error.value)


def test_other_freezing_is_refused(resumed: dict[str, list[dict[str, Any]]]) -> None:
    state = read_state(Path(resumed["dp2 sharded"][0]["folder"]))
    with pytest.raises(CheckpointError, match=r"model.freeze: checkpoint.init="):
        check_resumable(state, config_of(SHARDED, frozen=True))


def change(rank: int, world_size: int, root: str) -> dict[str, Any]:
    """Save under one configuration of the optimizer, go on under another."""
    engine, checkpoint = engine_of(config_of(PLAIN), Degrees(), Path(root), seed=1)
    steps(engine, range(2))
    folder = saved(checkpoint, 2)
    changed = {**PLAIN, "lr": 1e-4, "weight_decay": 0.3, "beta2": 0.9, "decay_steps": 50}
    engine, _ = resumed_engine(config_of(changed), Degrees(), folder)
    ((_, _, lr),) = steps(engine, range(2, 3))
    groups = engine.inner_optimizer.param_groups
    return {
        "lr": lr,
        "betas": {group["betas"] for group in groups},
        "decay": {round(group["weight_decay"], 6) for group in groups},
        "adam_steps": {int(state["step"]) for state in engine.inner_optimizer.state.values()},
        "counters": len({id(state["step"]) for state in engine.inner_optimizer.state.values()}),
        "parameters": sum(len(group["params"]) for group in groups),
    }


def test_a_resumed_run_follows_its_configuration(tmp_path: Path) -> None:
    (found,) = run_distributed(change, 1, str(tmp_path))
    assert found["lr"] == pytest.approx(1e-4 * (1 - 2 / 50))  # linear to 0, at the saved step
    assert found["betas"] == {(0.9, 0.9)}
    assert found["decay"] == {0.0, 0.3}
    assert found["adam_steps"] == {3}
    assert found["counters"] == found["parameters"]  # one shared counter would run away


# Asynchronous saves --------------------------------------------------------------------------------------------------


def beside(rank: int, world_size: int, root: str, place: str) -> dict[str, Any]:
    """A save that is held up while training goes on for five steps, and a synchronous one of the same step."""
    degrees, changes = JOBS[place]
    engine, checkpoint = engine_of(config_of(changes), degrees, Path(root) / "sync", seed=1)
    steps(engine, range(SAVED_AT))
    saved(checkpoint, SAVED_AT)

    engine, checkpoint = engine_of(config_of(changes, asynchronous=True), degrees, Path(root) / "async", seed=1)
    steps(engine, range(SAVED_AT))
    may_write = threading.Event()
    write_items = run_checkpoint.write_items

    def held_up(*args: Any) -> Any:
        assert may_write.wait(60)
        return write_items(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_checkpoint, "write_items", held_up)
        started = checkpoint.save(SAVED_AT, DATA)
        trained = []
        for step in range(SAVED_AT, SAVED_AT + 5):
            trained += steps(engine, range(step, step + 1))
            assert checkpoint.poll() == []
        there_before = sorted(path.name for path in (Path(root) / "async").glob("step-????????"))
        torch.distributed.barrier()
        may_write.set()
        over = checkpoint.wait()
    again = checkpoint.save(SAVED_AT + 5, DATA) + checkpoint.wait()  # the same buffers, other values
    return {"started": started, "before": there_before, "over": over, "trained": trained, "again": again}


@pytest.mark.parametrize("place", ["tp2pp2 sharded", "dp2 sharded", "dp2 sharded, bf16", "dp2, bf16", "pp2vpp2"])
def test_an_asynchronous_save_is_the_synchronous_one(place: str, tmp_path: Path) -> None:
    ranks = run_distributed(beside, JOBS[place][0].world_size, str(tmp_path), place)
    for rank in ranks:
        assert rank["started"] == [] and rank["before"] == []
        assert [(one.step, one.error) for one in rank["over"]] == [(SAVED_AT, "")]
        assert [(one.step, one.error) for one in rank["again"]] == [(SAVED_AT + 5, "")]
    folders = [step_folder(tmp_path / kind, SAVED_AT) for kind in ("sync", "async")]
    synchronous, asynchronous = (contents(folder) for folder in folders)
    assert synchronous.keys() == asynchronous.keys()
    assert [key for key in synchronous if not torch.equal(synchronous[key], asynchronous[key])] == []
    states = [read_state(folder) for folder in folders]
    assert states[0].optimizer_steps == states[1].optimizer_steps
    assert set(states[0].optimizer_steps.values()) == {SAVED_AT}
    assert states[0].scheduler == states[1].scheduler
    later = contents(step_folder(tmp_path / "async", SAVED_AT + 5))
    moved = [key for key in later if not torch.equal(later[key], asynchronous[key])]
    assert len(moved) > len(later) / 2  # training did go on
    assert set(read_state(step_folder(tmp_path / "async", SAVED_AT + 5)).optimizer_steps.values()) == {SAVED_AT + 5}


# Writing -------------------------------------------------------------------------------------------------------------

ERRORS = {
    "the files of one rank": ("write_items", 3, OSError("no space left")),
    "what the writer raises": ("write_items", 1, RuntimeError("file write failed")),
    "state.json": ("write_state", 0, OSError("no space left")),
    "the last rename": ("commit_folder", 0, PermissionError("not allowed")),
}


def fail(rank: int, world_size: int, root: str, asynchronous: bool) -> dict[str, tuple[str, list[str]]]:
    """A checkpoint, and then one that cannot be written on one rank, for each way to fail."""
    config = config_of(PLAIN, asynchronous=asynchronous)
    checkpoints = Path(root)
    _, checkpoint = engine_of(config, Degrees(tensor=2, pipeline=2), checkpoints, seed=1)
    saved(checkpoint, 1)
    results = {}
    for name, (function, bad_rank, error) in ERRORS.items():

        def broken(*args: Any, error: Exception = error, **kwargs: Any) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            if rank == bad_rank:
                patch.setattr(run_checkpoint, function, broken)
            (over,) = checkpoint.save(2, {}) + checkpoint.wait()
        torch.distributed.barrier()
        results[name] = over.error, sorted(folder.name for folder in checkpoints.iterdir())
        torch.distributed.barrier()
    saved(checkpoint, 2)  # it works again
    return results


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_write_error_on_one_rank_is_one_on_all(asynchronous: bool, tmp_path: Path) -> None:
    ranks = run_distributed(fail, 4, str(tmp_path), asynchronous)
    for name, (_, bad_rank, error) in ERRORS.items():
        for rank in ranks:
            message, left = rank[name]
            assert f"rank {bad_rank}: {error}" in message, name
            assert "step-00000002" in message
            assert len(left) == 2 and left[0].startswith("frozen-") and left[1] == "step-00000001", name
    assert missing(step_folder(tmp_path, 1)) == missing(step_folder(tmp_path, 2)) == []


def keep(rank: int, world_size: int, root: str) -> dict[tuple[int, int], list[list[str]]]:
    """What is there after each of five checkpoints. Step 2's folder loses its complete.json."""
    results = {}
    for number, every in ((0, 0), (1, 0), (2, 0), (1, 3)):
        config = config_of(PLAIN)
        config.checkpoint.keep, config.checkpoint.keep_every = number, every
        folder = Path(root) / f"{number} {every}"
        _, checkpoint = engine_of(config, Degrees(), folder, seed=1)
        here = results[number, every] = []
        for step in (1, 2, 3, 4, 5):
            at = saved(checkpoint, step)
            if step == 2:
                (at / "complete.json").unlink()
            here.append(sorted(path.name.lstrip("step-0") for path in folder.glob("step-*")))
    return results


def test_only_older_complete_checkpoints_are_removed(tmp_path: Path) -> None:
    (kept,) = run_distributed(keep, 1, str(tmp_path))
    assert kept[0, 0][-1] == ["1", "2", "3", "4", "5"]
    assert kept[1, 0] == [["1"], ["2"], ["2", "3"], ["2", "4"], ["2", "5"]]
    assert kept[2, 0] == [["1"], ["1", "2"], ["1", "2", "3"], ["2", "3", "4"], ["2", "4", "5"]]
    assert kept[1, 3] == [["1"], ["2"], ["2", "3"], ["2", "3", "4"], ["2", "3", "5"]]


def save_twice(rank: int, world_size: int, root: str) -> None:
    _, checkpoint = engine_of(config_of(PLAIN), Degrees(), Path(root), seed=1)
    for name in ("step-00000007.tmp", "frozen.tmp"):  # left by a crash
        (Path(root) / name).mkdir()
        (Path(root) / name / "rubbish").write_text("x")
    checkpoint.clean()
    saved(checkpoint, 7, {"first": True})
    saved(checkpoint, 7, {"second": True})
    assert not (step_folder(Path(root), 7) / "rubbish").exists()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run_distributed(save_twice, 1, str(tmp_path))
    assert json.loads((step_folder(tmp_path, 7) / "state.json").read_text())["data"] == {"second": True}
    assert [path.name.split("-")[0] for path in sorted(tmp_path.iterdir())] == ["frozen", "step"]


def save_below(rank: int, world_size: int, root: str) -> list[str]:
    config = config_of(PLAIN)
    config.checkpoint.keep = 1
    _, checkpoint = engine_of(config, Degrees(), Path(root), seed=1)
    for step in (8, 9, 3):
        saved(checkpoint, step, {})
    return sorted(path.name for path in Path(root).glob("step-*"))


def test_a_checkpoint_is_never_removed_for_later_ones(tmp_path: Path) -> None:
    assert run_distributed(save_below, 1, str(tmp_path)) == [["step-00000003", "step-00000009"]]


# Frozen weights ------------------------------------------------------------------------------------------------------


def share(rank: int, world_size: int, root: str) -> dict[str, Any]:
    """Frozen weights of several saves, of a resumed run, of a run in another folder, and of one in bf16."""
    config, degrees, here = config_of(SHARDED, frozen=True), Degrees(data=2), Path(root) / "first"
    config.checkpoint.keep = 1
    engine, checkpoint = engine_of(config, degrees, here, seed=1)
    found: dict[str, Any] = {}
    for step in (1, 2):
        steps(engine, range(step, step + 1))
        folder = saved(checkpoint, step)
        (frozen,) = here.glob("frozen-*")
        found[f"step {step}"] = frozen.name, frozen.stat().st_ino, size_of(folder), size_of(frozen)
    config.checkpoint.keep = 0
    found["resumed"] = _goes_on(config, Degrees(tensor=2), folder, here)
    found["elsewhere"] = _goes_on(config, degrees, folder, Path(root) / "second")
    bf16 = config_of(BF16, frozen=True)
    found["bf16"] = _goes_on(bf16, degrees, folder, Path(root) / "third")
    return found


def _goes_on(config: Any, degrees: Degrees, folder: Path, checkpoints: Path) -> tuple[str, int]:
    _, checkpoint = resumed_engine(config, degrees, folder, checkpoints)
    again = saved(checkpoint, 3)
    (frozen,) = checkpoints.glob("frozen-*")
    assert missing(again) == []
    return frozen.name, next(frozen.glob("weights-*")).stat().st_nlink


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_frozen_weights_are_written_once_and_shared(tmp_path: Path) -> None:
    first, second = run_distributed(share, 2, str(tmp_path))
    assert first == second
    assert first["step 1"][:2] == first["step 2"][:2]
    assert first["resumed"][0] == first["elsewhere"][0] == first["step 1"][0] != first["bf16"][0]
    assert first["elsewhere"][1] == 2  # linked, not copied
    assert first["bf16"][1] == 1


def unused(rank: int, world_size: int, root: str) -> list[list[str]]:
    """Frozen folders go when no step names them, and stay while one does."""
    results = []
    for step, changes in ((1, SHARDED), (2, BF16)):
        config = config_of(changes, frozen=True)
        config.checkpoint.keep = 1 if step == 2 else 0
        _, checkpoint = engine_of(config, Degrees(), Path(root), seed=1)
        saved(checkpoint, step)
        results.append(sorted(path.name for path in Path(root).glob("frozen-*")))
    saved(checkpoint, 3)
    results.append(sorted(path.name for path in Path(root).glob("frozen-*")))
    return results


def test_frozen_weights_that_no_step_names_are_removed(tmp_path: Path) -> None:
    ((one, two, three),) = run_distributed(unused, 1, str(tmp_path))
    assert len(one) == len(two) == len(three) == 1
    assert one != two == three
