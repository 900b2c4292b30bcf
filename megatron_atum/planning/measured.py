"""Steps of this project measured on a GPU, and what the cost model says to them.

They test the counts of `blocks.py`, which no published run does. No constant was given its value by them; the counts of
elementwise work are those of the code that ran.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.atum import predict_layout
from megatron_atum.planning.cluster import load_cluster
from megatron_atum.planning.published import ValidationRow

MICROBATCHES = 2  # of a step


def recipe_of(preset: str, length: int, rows: int, *overrides: str) -> Config:
    """Frozen backbones on one device.

    Args:
        rows: of a microbatch.
        overrides: `section.key=value`.
    """
    return load_config(
        None,
        [
            f"model.preset={preset}",
            "model.freeze={text: true, vision: true, lm_head: true}",
            "data.sources=[{name: random, shards: none}]",
            f"data.sequence_length={length}",
            f"training.micro_batch_size={rows}",
            f"training.global_batch_size={rows * MICROBATCHES}",
            "optimizer.warmup_steps=0",
            *overrides,
        ],
    )


@dataclass(frozen=True)
class Step:
    """Of ATUM-9B with frozen backbones on one H200."""

    length: int
    images: int  # of each row
    rows: int  # of a microbatch
    seconds: float


# benchmarks/results/gpu_step.json of 2026-11-26
STEPS = (Step(2048, 11, 4, 1.200), Step(2048, 1, 4, 1.148), Step(2048, 38, 4, 1.448), Step(1024, 11, 8, 1.268))


def measured_rows() -> list[ValidationRow]:
    """Every measured step beside its prediction."""
    one = replace(load_cluster("p5en"), nodes=1, devices_per_node=1)
    rows = []
    for step in STEPS:
        config = recipe_of("atum-9b", step.length, step.rows)
        found = predict_layout(config, ParallelLayout.from_config(config, 1), one, step.images)
        name = f"ATUM-9B, {step.length} tokens, {step.images} images, this project on one H200"
        rows.append(ValidationRow(name, found.name, "s per step", found.step_s, step.seconds, True, found.prediction))
    return rows
