"""Memory of a layout, added up from parts, against single ranks that are played whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megatron_atum.config.loader import load_config
from megatron_atum.parallel.device import hide_accelerators
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.dry_run import DeviceMemory, dry_run
from megatron_atum.planning.memory import MemoryModel, _mixed, _most_under_way
from tests.distributed import run_distributed
from tests.planning.cases import laptop

BIG = [  # so large that tensors fill what the allocator gives
    "model.preset=tiny",
    "model.hidden_size=1024",
    "model.intermediate_size=2048",
    "model.num_layers=12",
    "data.sequence_length=256",
    "training.micro_batch_size=2",
    "training.global_batch_size=32",
    "data.sources=[{name: a, shards: x}]",
    "model.freeze={text: true, vision: true, lm_head: true}",
]
CASES = {
    "three stages and data": ["parallel.pipeline=3", "training.global_batch_size=48"],
    "interleaved, vision trains": [
        *("parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=3"),
        "model.freeze.vision=false",
    ],
    "one stage": ["parallel.tensor=2"],
    "frozen in 8 bits": ["parallel.tensor=2", "parallel.pipeline=2", "kernels.frozen_gemm=fp8"],
    "one stage, recomputed": [
        *("parallel.tensor=4", "training.micro_batch_size=4"),
        "training.recompute=full",
        "training.recompute_layers=3",
    ],
}
IMAGES = 6  # of a row


Both = list[tuple[DeviceMemory, DeviceMemory]]  # of each stage: added up, played


def both_ways(rank: int, world_size: int) -> Both:
    """Of one case. Ranks work side by side and have nothing to do with each other."""
    hide_accelerators()
    dist.destroy_process_group()
    config = load_config(None, [*BIG, *list(CASES.values())[rank]])
    nodes = 2 * config.parallel.pipeline * config.parallel.tensor
    cluster, rows = laptop(1, nodes), config.training.micro_batch_size
    layout = ParallelLayout.from_config(config, nodes)
    added = MemoryModel(config, cluster).stages(layout, rows, rows * IMAGES)
    ranks = [stage * layout.data * layout.tensor for stage in range(layout.pipeline)]
    return [
        (stage, dry_run(config, cluster, rank, [IMAGES] * rows).memory)
        for stage, rank in zip(added, ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def both() -> dict[str, Both]:
    return dict(zip(CASES, run_distributed(both_ways, len(CASES), timeout=300), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_parts_add_up(name: str, both: dict[str, Both]) -> None:
    assert both[name]
    for added, played in both[name]:
        assert added.parameters == pytest.approx(played.parameters, rel=0.001)
        assert added.gradients == pytest.approx(played.gradients, rel=0.01)  # padding of buffers
        assert added.optimizer == pytest.approx(played.optimizer, rel=0.03)
        assert added.activations == pytest.approx(played.activations, rel=0.02)
        assert added.total == pytest.approx(played.total, rel=0.02)
        assert added.host == played.host and bool(played.host) == (name == "frozen in 8 bits")


def under_way(stage: int, pipeline: int, virtual: int, microbatches: int, kept: list[int]) -> int:
    layout: Any = ParallelLayout(pipeline, pipeline=pipeline, virtual_pipeline=virtual)
    return _most_under_way(layout, stage, microbatches, kept)


def test_how_many_are_under_way() -> None:
    """One forward, one backward: as many as stages follow, and one."""
    assert [under_way(stage, 4, 1, 8, [1]) for stage in range(4)] == [4, 3, 2, 1]
    assert under_way(0, 4, 1, 2, [1]) == 2, "no more than there are"
    # two stages of two chunks: warm-up of 2 x 1 + 2 and of 2, and one more (Narayanan et al., figure 4)
    assert [under_way(stage, 2, 2, 4, [1, 1]) for stage in range(2)] == [5, 3]
    # all four have been through its first chunk before one comes back to it; then one is left in the second
    assert under_way(0, 2, 2, 4, [100, 1]) == 401


def test_sizes_between_those_measured() -> None:
    base, images, rows = (1, (10, 20)), (3, (14, 20)), (6, (10, 25))
    assert _mixed(base, [(2, images), (3, rows)]) == (1 + 2 * 2 + 3 * 5, (10 + 2 * 4, 20 + 3 * 5))
