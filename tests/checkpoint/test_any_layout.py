"""A checkpoint of any layout goes on at any other, optimizer included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.checkpoint.stored import StoredCheckpoint
from tests.checkpoint.runs import (
    BF16,
    BF16_PLAIN,
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
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees

SAVED_AT, STEPS = 3, 6
HOME = Degrees(tensor=2, pipeline=2, sequence=True)
PLACES: dict[str, tuple[Degrees, dict[str, Any]]] = {
    "home": (HOME, SHARDED),
    "one": (ONE, PLAIN),
    "dp2": (Degrees(data=2), SHARDED),
    "dp2 gathered": (Degrees(data=2), GATHERED),
    "dp2 plain": (Degrees(data=2), PLAIN),
    "pp4": (Degrees(pipeline=4), SHARDED),
    "tp2pp2vpp2sp": (Degrees(tensor=2, pipeline=2, virtual=2, sequence=True), SHARDED),
    "tp4": (Degrees(tensor=4), SHARDED),
    "pp2dp2": (Degrees(pipeline=2, data=2), SHARDED),
    "tp2dp2sp": (Degrees(tensor=2, data=2, sequence=True), SHARDED),
}


def start(rank: int, world_size: int, root: str, place: str, frozen: bool) -> list[Any]:
    """Save at a layout and go on there: what the steps after the save said."""
    degrees, changes = PLACES[place]
    engine, checkpoint = engine_of(config_of(changes, frozen=frozen), degrees, Path(root), seed=1)
    steps(engine, range(SAVED_AT))
    saved(checkpoint, SAVED_AT)
    return steps(engine, range(SAVED_AT, STEPS))


def go_on(rank: int, world_size: int, root: str, places: list[str], frozen: bool) -> dict[str, tuple[Any, str]]:
    """Go on from the checkpoint at other layouts; save it again there at once, before any step."""
    results = {}
    for place in places:
        degrees, changes = PLACES[place]
        folder = Path(root) / f"step-{SAVED_AT:08d}"
        engine, checkpoint = resumed_engine(config_of(changes, frozen=frozen), degrees, folder, Path(root) / place)
        again = saved(checkpoint, SAVED_AT)
        results[place] = steps(engine, range(SAVED_AT, STEPS)), str(again)
    return results


def close(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for (losses, norm, lr), (expected, expected_norm, expected_lr) in zip(ours, theirs, strict=True):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        assert lr == expected_lr


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint but the random state, which belongs to ranks."""
    reader = StoredCheckpoint(folder).reader
    keys = [key for key in reader.index if not key.startswith("random/")]
    return {key: reader.read(key, (0,) * len(reader.index[key].shape), reader.index[key].shape) for key in keys}


def check_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("frozen", [False, True], ids=["all train", "frozen"])
def test_there_and_elsewhere(frozen: bool, tmp_path: Path) -> None:
    """Losses after the switch equal those without it; and what is saved again at once is the same, bit for bit."""
    root = str(tmp_path)
    went_on = run_distributed(start, 4, root, "home", frozen)[0]
    places = [place for place in PLACES if not frozen or place in ("one", "tp4", "pp2dp2")]
    original = contents(tmp_path / f"step-{SAVED_AT:08d}")
    moments = [key for key in original if key.startswith("optimizer.")]
    assert moments and all(original[key].any() for key in moments if "bias" not in key and "key" not in key)
    assert any("self_attn" in key for key in moments) != frozen
    for world_size in (1, 2, 4):
        here = [place for place in places if PLACES[place][0].world_size == world_size]
        for said, folder in run_distributed(go_on, world_size, root, here, frozen)[0].values():
            close(said, went_on)
            check_same(contents(Path(folder)), original)


@pytest.mark.parametrize("place", ["one", "dp2", "pp4", "tp2pp2vpp2sp", "tp4", "pp2dp2"])
def test_and_back(place: str, tmp_path: Path) -> None:
    root = str(tmp_path)
    world_size = PLACES[place][0].world_size
    went_on = run_distributed(start, world_size, root, place, False)[0]
    ((said, _),) = run_distributed(go_on, 4, root, ["home"], False)[0].values()
    close(said, went_on)


# Precision -----------------------------------------------------------------------------------------------------------


def precise(rank: int, world_size: int, root: str) -> dict[str, Any]:
    """bf16 with fp32 copies: at other layouts, with another optimizer, and in a run that computes in fp32."""
    engine, checkpoint = engine_of(config_of(BF16), Degrees(data=2), Path(root), seed=1)
    steps(engine, range(SAVED_AT))
    folder = saved(checkpoint, SAVED_AT)
    went_on = steps(engine, range(SAVED_AT, STEPS))
    results: dict[str, Any] = {"went on": went_on}
    for name, degrees, changes in (
        ("again", Degrees(data=2), BF16),
        ("unsharded", Degrees(data=2), BF16_PLAIN),
        ("pp2", Degrees(pipeline=2), BF16),
        ("fp32", Degrees(data=2), SHARDED),
    ):
        engine, checkpoint = resumed_engine(config_of(changes), degrees, folder, Path(root) / name)
        results[name] = str(saved(checkpoint, SAVED_AT)), weights(engine), steps(engine, range(SAVED_AT, STEPS))
    return results


def test_higher_precision_survives(tmp_path: Path) -> None:
    result = run_distributed(precise, 2, str(tmp_path))[0]
    original = contents(tmp_path / f"step-{SAVED_AT:08d}")
    main = {key.removeprefix("optimizer.main/"): value for key, value in original.items() if "main/" in key}
    assert main and all(value.dtype == torch.float32 for value in main.values())
    for name in ("again", "unsharded", "pp2"):
        check_same(contents(Path(result[name][0])), original)
    assert result["again"][2] == result["went on"]
    close(result["unsharded"][2], result["went on"])
    for name, value in result["fp32"][1].items():  # from the copies, not from bf16
        assert torch.equal(value, main.get(name, value)), name
    assert any((value.bfloat16() != value).any() for value in main.values())
    exact = contents(Path(result["fp32"][0]))
    assert "optimizer.main/lm_head.weight" not in exact and exact["lm_head.weight"].dtype == torch.float32


def raised(rank: int, world_size: int, root: str) -> bool:
    """An fp32 checkpoint goes on in bf16: the copies are exact, the weights their roundings."""
    engine, checkpoint = engine_of(config_of(SHARDED), Degrees(data=2), Path(root), seed=1)
    steps(engine, range(SAVED_AT))
    folder = saved(checkpoint, SAVED_AT)
    exact = contents(folder)
    _, checkpoint = resumed_engine(config_of(BF16), Degrees(data=2), folder, Path(root) / "bf16")
    rounded = contents(saved(checkpoint, SAVED_AT))
    names = [key for key in exact if not key.startswith("optimizer.") and f"optimizer.main/{key}" in rounded]
    return bool(names) and all(
        torch.equal(rounded[f"optimizer.main/{name}"], exact[name])
        and torch.equal(rounded[name], exact[name].bfloat16())
        for name in names
    )


def test_from_fp32_to_bf16(tmp_path: Path) -> None:
    assert run_distributed(raised, 2, str(tmp_path)) == [True, True]
