"""A part of the 9B model on an accelerator: its memory against that of a dry run, and where the host waits for it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.parallel.device import memory_gib, reset_peak_memory
from megatron_atum.parallel.groups import build_groups
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.training import engine as engine_module
from megatron_atum.training.engine import Engine
from megatron_atum.training.self_check import full_batch
from tests.distributed import run_distributed
from tests.planning.cases import laptop, play

IMAGES = [11, 11]
SHORT_9B = [  # full width
    "model.preset=atum-9b",
    "model.num_layers=8",
    "model.freeze={text: true, vision: true, lm_head: true}",
    "data.sources=[{name: a, shards: x}]",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
]


def config_of() -> Config:
    return load_config(None, SHORT_9B)


def two_steps(rank: int, world_size: int) -> tuple[float, str]:
    """Peak of memory in the second step, and what forbids to wait for the device in a third."""
    config = config_of()
    groups = build_groups(ParallelLayout.from_config(config, world_size))
    engine = Engine(config, groups)
    for stage in engine.stages:
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    engine.build_optimizer()
    batches = [full_batch(config, groups, IMAGES)] * 2
    engine.step(batches)
    reset_peak_memory()
    engine.step(batches)
    return memory_gib(), waiting(engine, batches)


def waiting(engine: Engine, batches: list[Any]) -> str:
    """The first wait for the device in a step, save where it counts tokens, takes the norm and exchanges losses."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):  # it is seen
            float(torch.ones((), device=engine.device))
        engine_module.loss_settings = may_wait(engine_module.loss_settings)
        engine.optimizer.get_grad_norm = may_wait(engine.optimizer.get_grad_norm)
        engine._exchange = may_wait(engine._exchange)  # type: ignore[method-assign]
        engine.step(batches)
    except RuntimeError as error:
        return "".join(traceback.format_exception(error))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def may_wait(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return function(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    return call


@pytest.mark.gpu
def test_memory_and_waits_on_the_device() -> None:
    ((measured, waits),) = run_distributed(two_steps, 1, backend="nccl", timeout=300)
    ((run,),) = run_distributed(play, 1, config_of(), laptop(1, 1), [0], IMAGES)
    assert run.memory.total / 2**30 == pytest.approx(measured, rel=0.1)
    assert waits == ""
