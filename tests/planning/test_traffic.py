"""Closed forms of what ranks send, against hand counts and against real ranks over gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.cluster import load_cluster
from megatron_atum.planning.traffic import Microbatch, Traffic, traffic_of
from tests.planning.cases import EIGHT, IMAGES, LAYOUTS, RealRun, config_of

RECIPE = Path(__file__).parents[2] / "examples/atum-80b/pretrain.yaml"


def micro_of(config: Config, layout: ParallelLayout, images_per_row: float) -> Microbatch:
    return Microbatch(config, layout, images_per_row * config.training.micro_batch_size)


def planned(*overrides: str, images: float = 11, cluster: str = "p4de") -> Traffic:
    config = load_config(RECIPE, [*EIGHT, *overrides])
    nodes = load_cluster(cluster)
    return traffic_of(micro_of(config, ParallelLayout.from_config(config, nodes.world_size), images), nodes)


def test_a_middle_stage_of_the_80b_recipe_by_hand() -> None:
    """TP8 PP4 DP16, 56 microbatches of 4 x 1024 tokens and 44 images."""
    stage = planned().stages[1]
    text, units, layers = 4096 * 8192 * 2, 5, 20
    # 44 images x 64 latents x 1280 over 8 ranks in rows of 4 x 8192: 13.75, so 14
    latents = 8 * 14 * 4 * 8192 * 2
    gathers = 56 * ((4 * layers + 6 * units) * text + latents)
    scatters = 56 * ((4 * layers + 4 * units) * text + latents)
    assert (stage.tensor["all_gather"], stage.tensor["reduce_scatter"]) == (gathers, scatters)
    # once a step, in fp32: norms, query and key norms, gates
    assert stage.tensor["all_reduce"] == 4 * units * (2 * 8192 + 2 * 128 + 2)
    assert stage.tensor_calls == {
        "all_gather": 56 * (4 * layers + 6 * units + 1),
        "reduce_scatter": 56 * (4 * layers + 4 * units + 1),
        "all_reduce": 1,
    }
    assert stage.to_next == stage.to_previous == 56 * (128 + 14) * 4 * 8192 * 2
    assert stage.parameters * 2 == stage.gradients


def test_the_ends_of_the_80b_recipe_by_hand() -> None:
    stages = planned().stages
    # vision states of 8 x 6 images; perceiver: three all-reduces of latents and one of all states, each block
    assert stages[0].tensor["all_gather"] - stages[1].tensor["all_gather"] == 56 * (
        48 * 257 * 1280 * 2 + 8 * 14 * 4 * 8192 * 2
    )
    perceiver = 56 * 6 * 44 * 1280 * 2 * (3 * 64 + 257 + 64)
    added_rows, head_norms = 2 * 8192, 6 * 2 * 2 * 96
    unit_norms = 5 * (2 * 8192 + 2 * 128 + 2)
    assert stages[0].tensor["all_reduce"] == perceiver + 4 * (unit_norms + added_rows + head_norms)
    # maximum of each token, then sum and target
    assert stages[3].tensor["all_reduce"] == 56 * 12 * 4096 + 4 * (unit_norms + added_rows)
    assert (stages[0].to_previous, stages[3].to_next) == (0, 0)


def test_what_leaves_a_node_of_the_80b_recipe() -> None:
    """A ring over 16 nodes leaves each of them once; eight of them run beside each other."""
    found = planned()
    stage = found.stages[0]  # it has the perceiver; but a middle one sends two ways
    middle = found.stages[1]
    assert found.network["tensor"] == 0
    assert not found.tensor_leaves_node
    assert found.network["stages"] == 8 * middle.exchanges
    assert found.network["data"] == pytest.approx(8 * 15 / 16 * (middle.gradients + middle.parameters))
    assert stage.gradients > middle.gradients
    # about 20 and 7.5 GB without images (the latents add a tenth)
    assert 19e9 < found.network["data"] < 20e9
    assert 7.5e9 < found.network["stages"] < 8.5e9
    wire = 7 / 8 * (middle.tensor["all_gather"] + middle.tensor["reduce_scatter"])
    assert wire < found.node_link < 1.1 * wire


def test_interleaving_sends_more_and_reduces_the_same() -> None:
    plain, interleaved = planned(), planned("parallel.virtual_pipeline=5", "parallel.units_per_chunk=null")
    assert interleaved.stages[1].to_next == 5 * plain.stages[1].to_next
    assert interleaved.stages[3].to_next == 4 * plain.stages[1].to_next  # to the first stage, but for the last chunk
    assert interleaved.stages[0].to_previous == 4 * plain.stages[1].to_next
    assert interleaved.network["data"] == pytest.approx(plain.network["data"], rel=1e-4)  # padding apart


def test_data_parallel_groups_with_two_ranks_on_a_node() -> None:
    """TP4: twice the bytes of each device, on half as many rings that leave a node."""
    eight, four = planned(), planned("parallel.tensor=4", "training.micro_batch_size=2")
    assert four.stages[1].gradients == pytest.approx(2 * eight.stages[1].gradients, rel=1e-3)
    assert four.network["data"] == pytest.approx(4 * 31 / 32 * 1.5 * four.stages[1].gradients)


def test_tensor_ranks_on_two_nodes() -> None:
    found = planned("parallel.tensor=16", "parallel.pipeline=2", "parallel.units_per_chunk=null")
    assert found.tensor_leaves_node
    rings = [s.tensor["all_gather"] + s.tensor["reduce_scatter"] + 2 * s.tensor["all_reduce"] for s in found.stages]
    assert found.network["tensor"] == pytest.approx(15 / 16 * max(rings))


def test_groups_of_one_rank_send_nothing() -> None:
    config = load_config(None, ["model.preset=tiny", "training.global_batch_size=4"])
    cluster = replace(load_cluster("laptop"), nodes=1, devices_per_node=1)
    found = traffic_of(micro_of(config, ParallelLayout.from_config(config, 1), 3), cluster)
    (stage,) = found.stages
    assert (stage.tensor, stage.exchanges, stage.gradients, stage.parameters) == ({}, 0, 0, 0)
    assert (found.network_bytes, found.node_link) == (0, 0)


# Against real ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_what_ranks_send(name: str, real: list[dict[str, RealRun]]) -> None:
    config = config_of(name)
    layout = ParallelLayout.from_config(config, 4)
    found = traffic_of(micro_of(config, layout, sum(IMAGES) / len(IMAGES)), load_cluster("laptop"))
    for rank, runs in enumerate(real):
        run, stage = runs[name], found.stages[layout.coordinates(rank)[0]]
        tensor = {operation: size for (group, operation), size in run.payload.items() if group == "tensor"}
        calls = {operation: number for (group, operation), number in run.calls.items() if group == "tensor"}
        assert (tensor, calls) == (stage.tensor, stage.tensor_calls)
        assert run.payload.get(("pipeline", "send"), 0) == stage.exchanges
        reduction = "reduce_scatter" if config.optimizer.distributed else "all_reduce"
        assert run.payload.get(("data", reduction), 0) == stage.gradients
        assert run.payload.get(("data", "all_gather"), 0) == stage.parameters
