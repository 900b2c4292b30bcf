"""Small runs that save and go on, for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.run_checkpoint import RunCheckpoint, check_resumable
from megatron_atum.checkpoint.stored import read_state
from megatron_atum.checkpoint.weights import gather_rows, initialise
from megatron_atum.config.schema import Config
from megatron_atum.training.engine import Engine
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
BF16_PLAIN = {**PLAIN, "precision": "bf16"}
DATA = {"position": 17, "sources": [{"name": "a", "faults": 3}]}


def config_of(changes: dict[str, Any], *, frozen: bool = False, asynchronous: bool = False) -> Config:
    config = test_config(from_hf({"model_type": "idefics", **hf_config(CASE)}), **changes)
    freeze = config.model.freeze
    freeze.text = freeze.vision = freeze.lm_head = frozen
    config.checkpoint.asynchronous = asynchronous
    return config


def engine_of(config: Config, degrees: Degrees, checkpoints: Path, seed: int) -> tuple[Engine, RunCheckpoint]:
    groups = groups_of(config.model, degrees)
    engine = Engine(config, groups)
    initialise(engine.stages, config.model, groups, seed)
    engine.build_optimizer()
    return engine, RunCheckpoint(config, groups, engine, checkpoints, {"tokenizer.model": b"pieces"})


def resumed_engine(
    config: Config,
    degrees: Degrees,
    folder: Path,
    checkpoints: Path | None = None,
) -> tuple[Engine, RunCheckpoint]:
    """A run that goes on from a checkpoint; it saves beside it unless `checkpoints` says where."""
    engine, checkpoint = engine_of(config, degrees, checkpoints or folder.parent, seed=99)
    state = read_state(folder)
    check_resumable(state, config)
    checkpoint.load(state)
    checkpoint.take_frozen(folder)
    return engine, checkpoint


def saved(checkpoint: RunCheckpoint, step: int, data: dict[str, Any] = DATA) -> Path:
    """Save and wait for it."""
    over = checkpoint.save(step, data) + checkpoint.wait()
    assert [(one.step, one.error) for one in over] == [(step, "")]
    return over[0].folder


def steps(engine: Engine, numbers: range) -> list[Any]:
    """Take steps; what each said: losses, gradient norm, learning rate."""
    batches = make_batches(CASE)
    done = [engine.step(own_share(rotate(batches, number), engine.groups)) for number in numbers]
    return [(result.losses, result.grad_norm, result.lr) for result in done]


def weights(engine: Engine) -> dict[str, Tensor]:
    for chunk in engine.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return gather_rows(engine.stages, engine.config.model, engine.groups, lambda parameter: parameter.data)
