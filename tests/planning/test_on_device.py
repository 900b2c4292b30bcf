"""Memory of a dry run against that of an accelerator."""

from __future__ import annotations

import pytest
import torch

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.parallel.device import memory_gib, reset_peak_memory
from megatron_atum.parallel.groups import build_groups
from megatron_atum.parallel.layout import ParallelLayout
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


def peak_gib(rank: int, world_size: int) -> float:
    """Of the second step."""
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
    return memory_gib()


@pytest.mark.gpu
def test_peak_memory_is_that_of_the_device() -> None:
    (measured,) = run_distributed(peak_gib, 1, backend="nccl", timeout=300)
    ((run,),) = run_distributed(play, 1, config_of(), laptop(1, 1), [0], IMAGES)
    assert run.memory.total / 2**30 == pytest.approx(measured, rel=0.1)
