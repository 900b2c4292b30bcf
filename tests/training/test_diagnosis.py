"""What is kept of a step that was not applied, and what it says of the origin."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_atum.checkpoint.table import weight_table
from megatron_atum.errors import DataError
from megatron_atum.training import diagnosis
from megatron_atum.training.diagnosis import (
    diagnose,
    in_forward_order,
    part_of,
    read_bad_step,
    summary_of,
    write_bad_step,
)
from megatron_atum.training.health import Spike, Verdict
from tests.checkpoint.runs import CASE, SHARDED, config_of, engine_of
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees
from tests.model.cases import make_batches
from tests.training.equivalence import own_share

BAD = Verdict(applies=False, finite=False)


# Where it arose ------------------------------------------------------------------------------------------------------


def test_names_are_sorted_as_a_forward_pass_meets_them() -> None:
    model = config_of(SHARDED).model
    model.cross_layer_interval = 2
    names = [row.hf[0] for row in weight_table(model)]
    parts = list(dict.fromkeys(part_of(name) for name in in_forward_order(reversed(names), model)))
    layers = [part for part in parts if part.startswith(("model.layers.", "model.gated"))]
    assert layers[:6] == [
        "model.gated_cross_attn_layers.0",
        "model.layers.0",
        "model.layers.1",
        "model.gated_cross_attn_layers.1",
        "model.layers.2",
        "model.layers.3",
    ]
    assert parts[0] == "model.embed_tokens" and parts[-3] == "model.norm" and parts[-1].startswith("lm_head")
    assert len(in_forward_order(names * 2, model)) == len(names)


def spoil_backward(engine: Any, unit: str) -> None:
    """What flows back out of a gated layer of this unit is not finite."""

    def spoil(module: Any, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)

    for stage in engine.stages:
        if unit in stage.cross_attention_layers:
            stage.cross_attention_layers[unit].register_forward_hook(spoil)


def spoil_forward(engine: Any) -> None:
    for stage in engine.stages:
        if hasattr(stage, "embedding"):
            stage.embedding.base.weight.data.fill_(math.nan)


def diagnosed(rank: int, world_size: int, folder: str, degrees: Degrees, spoil: str) -> dict[str, Any]:
    engine, _ = engine_of(config_of(SHARDED), degrees, Path(folder), seed=1)
    spoil_forward(engine) if spoil == "forward" else spoil_backward(engine, "2")
    batches = own_share(make_batches(CASE), engine.groups)
    found = diagnose(engine.stages, engine.config.model, batches, BAD, engine.compute(batches))
    return {**found, "said": summary_of(found)}


@pytest.mark.parametrize("degrees", [ONE, Degrees(pipeline=2, virtual=2), Degrees(tensor=2)], ids=str)
def test_the_last_bad_part_is_where_backward_went_wrong(degrees: Degrees, tmp_path: Path) -> None:
    ranks = run_distributed(diagnosed, degrees.world_size, str(tmp_path), degrees, "backward")
    assert all(found == ranks[0] for found in ranks)
    found = ranks[0]
    assert all(math.isfinite(float(loss)) for loss in found["losses"].values())
    assert found["last_bad_part"] == "model.gated_cross_attn_layers.2"
    assert found["first_bad_part"] == "model.embed_tokens"
    origin = part_of(found["bad_parameters"][-1])
    assert origin == "model.gated_cross_attn_layers.2", "cut in the middle, not at the end that matters"
    assert len(found["bad_parameters"]) == 20
    assert "look at model.gated_cross_attn_layers.2 first" in found["said"]


def test_what_arises_forward_shows_in_the_losses(tmp_path: Path) -> None:
    (found,) = run_distributed(diagnosed, 1, str(tmp_path), ONE, "forward")
    assert not math.isfinite(float(found["losses"]["loss"]))
    assert found["last_bad_part"].startswith("lm_head")
    assert "arose in the forward pass" in found["said"] and "look at" not in found["said"]


def spiked(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    engine, _ = engine_of(config_of(SHARDED), ONE, Path(folder), seed=1)
    batches = make_batches(CASE)
    return diagnose(engine.stages, engine.config.model, batches, Verdict(applies=False), engine.compute(batches))


def test_a_spike_has_no_bad_part(tmp_path: Path) -> None:
    (found,) = run_distributed(spiked, 1, str(tmp_path))
    assert found["reason"] == "spike"
    assert (found["first_bad_part"], found["last_bad_part"], found["bad_parameters"]) == (None, None, [])


def test_a_spike_is_said_with_its_sources() -> None:
    found = {
        "losses": {"loss": "9.0"},
        "grad_norm": "1.0",
        "spikes": [str(Spike("a", 9.0, 2.0, 7.0))],
        "first_bad_part": None,
        "last_bad_part": None,
        "packs": [(3, "a"), (4, "b")],
    }
    assert summary_of(found) == (
        "loss 9.0, grad norm 1.0; loss of a is 9, 7.0 deviations above its median 2; packs of a, b"
    )


# What is kept --------------------------------------------------------------------------------------------------------


def write(run: Path, step: int, at: int) -> None:
    path = write_bad_step(run, step, {"position": step}, {"packs": []})
    os.utime(path, (at, at))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "bad-steps").iterdir())


def test_the_last_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "MOST_FILES", 3)
    for at, step in enumerate((7, 8, 9)):
        write(tmp_path, step, at)
    replay = tmp_path / "bad-steps" / "step-00000008.replay.json"
    replay.write_text("{}")
    os.utime(replay, (0, 0))
    write(tmp_path, 8, 3)  # again, after a restart
    assert names(tmp_path) == [
        "step-00000007.json",
        "step-00000008.json",
        "step-00000008.replay.json",
        "step-00000009.json",
    ]
    write(tmp_path, 2, 4)  # after a rollback: a low number, and the newest
    write(tmp_path, 3, 5)
    assert names(tmp_path) == [
        "step-00000002.json",
        "step-00000003.json",
        "step-00000008.json",
        "step-00000008.replay.json",
    ]
    assert read_bad_step(tmp_path, 8)["data"] == {"position": 8}


def test_one_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    write(tmp_path, 7, 0)
    (tmp_path / "bad-steps" / "step-00000007.replay.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad steps kept of this run: step-00000007$"):
        read_bad_step(tmp_path, 8)
    (tmp_path / "bad-steps" / "step-00000008.json").write_text(json.dumps({"step": 8}))
    with pytest.raises(DataError, match="cannot be read"):
        read_bad_step(tmp_path, 8)
