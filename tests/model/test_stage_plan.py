"""Uneven stages and virtual stages: layer numbers and names are global."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_atum.checkpoint.table import weight_table
from megatron_atum.config.loader import preset
from megatron_atum.config.schema import ModelConfig
from megatron_atum.model.stage import build_stages
from megatron_atum.parallel.groups import build_groups
from megatron_atum.parallel.layout import ParallelLayout
from tests.distributed import run_distributed


def small_model(num_units: int) -> ModelConfig:
    model = preset("tiny")
    model.num_layers, model.cross_layer_interval = 2 * num_units, 2
    return model


def numbers(rank: int, world_size: int, layout: ParallelLayout, num_units: int) -> dict[str, Any]:
    import torch

    groups = build_groups(layout)
    stages = build_stages(small_model(num_units), groups, torch.float32)
    return {
        "layer_numbers": {
            name: (layer.layer_number, layer.self_attention.layer_number)
            for stage in stages
            for name, layer in stage.decoder_layers.items()
        },
        "order": [[int(name) for name in stage.decoder_layers] for stage in stages],
        "names": [name for stage in stages for name, _ in stage.named_parameters()],
    }


@pytest.mark.parametrize(
    ("layout", "num_units"),
    [
        (ParallelLayout(3, pipeline=3, units_per_chunk=(1, 2, 1)), 4),
        (ParallelLayout(3, pipeline=3, units_per_chunk=(2, 2, 1)), 5),
        (ParallelLayout(2, pipeline=2, virtual_pipeline=2, units_per_chunk=(1, 1, 1, 1)), 4),
        (ParallelLayout(2, pipeline=2, virtual_pipeline=2, units_per_chunk=(1, 2, 3, 1)), 7),
        (ParallelLayout(3, pipeline=3, virtual_pipeline=2, units_per_chunk=(1, 2, 1, 2, 2, 1)), 9),
    ],
    ids=lambda value: "-".join(map(str, value.units_per_chunk)) if isinstance(value, ParallelLayout) else None,
)
def test_layer_numbers_and_names_are_global(layout: ParallelLayout, num_units: int) -> None:
    ranks = run_distributed(numbers, layout.world_size, layout, num_units)
    for rank in ranks:
        for name, found in rank["layer_numbers"].items():
            assert found == (int(name) + 1, int(name) + 1)
    by_chunk = [ranks[c % layout.pipeline]["order"][c // layout.pipeline] for c in range(layout.num_chunks)]
    assert [layer for chunk in by_chunk for layer in chunk] == list(range(2 * num_units))
    assert [len(chunk) // 2 for chunk in by_chunk] == list(layout.units_per_chunk)
    names = [name for rank in ranks for name in rank["names"]]
    assert sorted(names) == sorted(row.name for row in weight_table(small_model(num_units)))
