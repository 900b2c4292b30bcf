"""Process groups follow the documented rank order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from megatron_atum.config.schema import ModelConfig
from megatron_atum.parallel.groups import build_groups, keep_flight_record
from megatron_atum.parallel.layout import ParallelLayout
from tests.distributed import run_distributed
from tests.layouts import Degrees

LAYOUTS = [
    Degrees(data=4),
    Degrees(tensor=4),
    Degrees(pipeline=4),
    Degrees(tensor=2, pipeline=2),
    Degrees(tensor=2, data=2),
    Degrees(pipeline=2, data=2),
    Degrees(pipeline=2, virtual=2, tensor=2),
    Degrees(tensor=2, pipeline=2, sequence=True),
]


def layout(degrees: Degrees) -> ParallelLayout:
    return degrees.layout(ModelConfig(num_layers=4, cross_layer_interval=1))


def places(rank: int, world_size: int, layouts: list[Degrees]) -> list[dict[str, Any]]:
    """All layouts one after the other in the same processes: groups are built anew each time."""
    return [place(degrees) for degrees in [*layouts, layouts[0]]]


def place(degrees: Degrees) -> dict[str, Any]:
    groups = build_groups(layout(degrees))
    sums = {}
    for name in ("tensor", "data", "pipeline"):
        value = torch.tensor(float(10**groups.rank))
        dist.all_reduce(value, group=getattr(groups, name))
        sums[name] = int(value)
    return {
        "coordinates": (groups.pipeline_rank, groups.data_rank, groups.tensor_rank),
        "tensor": dist.get_process_group_ranks(groups.tensor),
        "data": dist.get_process_group_ranks(groups.data),
        "pipeline": dist.get_process_group_ranks(groups.pipeline),
        "sums": sums,
        "collection": (groups.collection.tp.size(), groups.collection.dp.size(), groups.collection.pp.size()),
        "alone": (groups.alone.tp.size(), dist.get_process_group_ranks(groups.alone.tp), groups.alone.dp.size()),
        "stage": (groups.is_first_stage, groups.is_last_stage),
        "chunks": [chunk.index for chunk in groups.chunks],
    }


def test_groups_are_those_of_the_layout() -> None:
    results = run_distributed(places, 4, LAYOUTS)
    for number, degrees in enumerate([*LAYOUTS, LAYOUTS[0]]):
        coordinates = [layout(degrees).coordinates(rank) for rank in range(4)]
        for rank, result in enumerate(r[number] for r in results):
            name = f"{degrees}, rank {rank}"
            p, d, t = result["coordinates"]
            assert (p, d, t) == coordinates[rank], name
            members = {
                "tensor": [r for r, x in enumerate(coordinates) if x[:2] == (p, d)],
                "data": [r for r, x in enumerate(coordinates) if (x[0], x[2]) == (p, t)],
                "pipeline": [r for r, x in enumerate(coordinates) if x[1:] == (d, t)],
            }
            for group, ranks in members.items():
                assert result[group] == ranks, (name, group)
                assert result["sums"][group] == sum(10**r for r in ranks), (name, group)
            assert result["collection"] == (degrees.tensor, degrees.data, degrees.pipeline), name
            assert result["alone"] == (1, [rank], degrees.data), name
            assert result["stage"] == (p == 0, p == degrees.pipeline - 1), name
            assert result["chunks"] == list(range(p, degrees.pipeline * degrees.virtual, degrees.pipeline)), name


@pytest.mark.parametrize(
    ("version", "set_before", "expected"),
    [
        ("2.13.0", {}, {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_FR_DUMP_TEMP_FILE": "FILE"}),
        ("2.8.0", {}, {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "FILE"}),
        (
            "2.13.0",
            {"TORCH_NCCL_TRACE_BUFFER_SIZE": "5000"},
            {"TORCH_NCCL_TRACE_BUFFER_SIZE": "5000", "TORCH_FR_DUMP_TEMP_FILE": "FILE"},
        ),
        (
            "2.13.0",
            {"TORCH_FR_DUMP_TEMP_FILE": "mine"},
            {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_FR_DUMP_TEMP_FILE": "mine"},
        ),
    ],
)
def test_flight_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, set_before: dict[str, str], expected: dict[str, str]
) -> None:
    """Under the names that this torch does not warn of, and never over the user's under another name."""
    monkeypatch.setattr(os, "environ", dict(set_before))
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    keep_flight_record(tmp_path / "logs")
    file = str(tmp_path / "logs" / "nccl-flight-record-rank-")
    wanted = {name: file if value == "FILE" else value for name, value in expected.items()}
    assert os.environ == {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", **wanted}
