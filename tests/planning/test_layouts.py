"""Which layouts a cluster allows: all that training accepts, and no other."""

from __future__ import annotations

import pytest

from megatron_atum.errors import ConfigError
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.layouts import MOST_ROWS, candidates, chosen
from tests.planning.plans import cluster_of, config_of

Shape = tuple[int, int, int]  # tensor, pipeline and chunks of a stage


def found(*overrides: str, nodes: int = 1, devices: int = 2) -> dict[Shape, list[int]]:
    """Rows of a microbatch, by shape."""
    shapes: dict[Shape, list[int]] = {}
    for one in candidates(config_of(*overrides), cluster_of(nodes, devices)):
        shape = (one.layout.tensor, one.layout.pipeline, one.layout.virtual_pipeline)
        shapes.setdefault(shape, []).append(one.rows)
    return shapes


def test_two_devices() -> None:
    """Four units; 24 rows, of which data-parallel ranks take equal parts."""
    assert found() == {
        (1, 1, 1): [1, 2, 3, 4, 6],  # each of two ranks has 12
        (1, 2, 1): [1, 2, 3, 4, 6, 8],
        (1, 2, 2): [1, 2, 3, 4, 6],  # 8 rows make 3 microbatches, which two stages cannot interleave
        (2, 1, 1): [1, 2, 3, 4, 6, 8],
    }


def test_tensor_ranks_go_beyond_a_node_and_stages_end_with_the_units() -> None:
    shapes = found("model.num_heads=8", "model.perceiver.num_heads=8", nodes=4, devices=2)
    assert {tensor for tensor, _, _ in shapes} == {1, 2, 4}  # 8 would be four nodes
    assert {pipeline for _, pipeline, _ in shapes} == {1, 2, 4}
    assert (1, 4, 1) in shapes and (1, 2, 2) in shapes and (1, 4, 2) not in shapes
    assert {tensor * pipeline for tensor, pipeline, _ in shapes} == {1, 2, 4, 8}


def test_chunks_cut_stages_evenly() -> None:
    shapes = found("model.num_layers=6", "training.micro_batch_size=1")
    assert {shape for shape in shapes if shape[1] == 2} == {(1, 2, 1), (1, 2, 3)}
    uneven = found("model.num_layers=5")
    assert {shape for shape in uneven if shape[1] == 2} == {(1, 2, 1)}


def test_what_training_refuses_is_not_there() -> None:
    three = ["model.num_heads=3", "model.hidden_size=96"]
    with pytest.raises(ConfigError, match="does not divide"):
        ParallelLayout.from_config(config_of(*three, "parallel.tensor=2"), 2)
    assert {tensor for tensor, _, _ in found(*three)} == {1}
    with pytest.raises(ConfigError, match="global_batch_size"):
        ParallelLayout.from_config(config_of("training.micro_batch_size=5"), 2)
    assert all(5 not in rows for rows in found().values())


def test_units_that_were_named_count_for_the_configuration_only() -> None:
    named = config_of("parallel.pipeline=2", "parallel.units_per_chunk=[1,3]", "training.global_batch_size=40")
    assert chosen(named, cluster_of(1, 2)).layout.units_per_chunk == (1, 3)
    for one in candidates(named, cluster_of(1, 2)):
        assert one.config.parallel.units_per_chunk is None and sum(one.layout.units_per_chunk) == 4
        assert one.config.training.micro_batch_size == one.rows <= MOST_ROWS


def test_the_configuration_must_fit_the_cluster() -> None:
    own = chosen(config_of("parallel.tensor=2"), cluster_of(2, 2))
    assert (own.rows, own.layout.tensor, own.layout.data) == (2, 2, 2)
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 x parallel\.pipeline=2 needs 4"):
        chosen(config_of("parallel.tensor=2", "parallel.pipeline=2"), cluster_of(1, 2))
