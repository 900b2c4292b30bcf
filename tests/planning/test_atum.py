"""Predictions for ATUM: what must be in a row of the planner's table, and that it moves as it should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_atum import flops
from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.flops import Work
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.atum import LayoutPrediction, against, atum_job, model_flops, predict_layout
from megatron_atum.planning.cluster import Cluster, load_cluster
from megatron_atum.planning.cost import Group, Job
from megatron_atum.planning.traffic import Microbatch
from tests.planning.cases import EIGHT

RECIPE = Path(__file__).parents[2] / "examples/atum-80b/pretrain.yaml"
IMAGES = 10.95


def predicted(*overrides: str, cluster: str = "p4de", images: float = IMAGES) -> LayoutPrediction:
    config = load_config(RECIPE, [*EIGHT, "parallel.units_per_chunk=null", *overrides])
    nodes = load_cluster(cluster)
    return predict_layout(config, ParallelLayout.from_config(config, nodes.world_size), nodes, images)


FOUR = ("parallel.tensor=4", "training.micro_batch_size=2")


def test_a_row_of_the_table() -> None:
    row = predicted()
    assert (row.name, row.micro_batch_size) == ("TP8 PP4 DP16", 4)
    tokens = 3584 * 1024 / 512
    assert row.tokens_per_s_per_device == pytest.approx(tokens / row.step_s)
    config = load_config(RECIPE, [*EIGHT])
    work = flops.model_flops(config.model, Work(3584, 1024, round(3584 * IMAGES))).total
    assert row.model_tflops == pytest.approx(work / 512 / row.step_s / 1e12, rel=1e-4)
    assert row.mfu == pytest.approx(row.model_tflops / 312)
    p = row.prediction
    assert row.exposed_network_s == pytest.approx(p.exchange_s + p.data_s)
    assert len(p.stages) == 4
    assert p.stages[0].total == max(stage.total for stage in p.stages)  # vision tower and perceiver


def test_the_80b_model_on_64_nodes() -> None:
    """At least the issue's 150 model TFLOP/s somewhere, against 51 of the original; orders of the known trade-offs."""
    tp8pp4, tp4pp4 = predicted(), predicted(*FOUR)
    interleaved = predicted("parallel.virtual_pipeline=5")
    flat = predicted("parallel.pipeline=1")
    assert tp4pp4.model_tflops > 150
    assert tp4pp4.step_s < tp8pp4.step_s  # half the waiting for tensor ranks
    assert tp4pp4.prediction.tensor_s < 0.6 * tp8pp4.prediction.tensor_s
    assert interleaved.bubble_share < 0.015 < 0.04 < tp8pp4.bubble_share < 0.06
    assert interleaved.network_gb_per_node > 2 * tp8pp4.network_gb_per_node
    assert flat.bubble_share == flat.imbalance == flat.traffic.network["stages"] == 0
    assert flat.network_gb_per_node > 2.5 * tp8pp4.network_gb_per_node
    assert tp8pp4.imbalance < 0.1


def test_a_slow_network_hurts_flat_layouts_most(tmp_path: Path) -> None:
    text = (Path(load_cluster.__code__.co_filename).parent / "clusters/p4de.yaml").read_text()
    slow = tmp_path / "slow.yaml"
    slow.write_text(text.replace("42.5e9", "5e9"))
    loss = {
        pipeline: predicted(f"parallel.pipeline={pipeline}", cluster=str(slow)).step_s
        - predicted(f"parallel.pipeline={pipeline}").step_s
        for pipeline in (1, 4)
    }
    assert loss[1] > 2 * loss[4] > 0


def test_units_change_the_balance() -> None:
    even = predicted()
    heavy = predicted("parallel.units_per_chunk=[6,5,5,4]")
    light = predicted("parallel.units_per_chunk=[4,5,5,6]")
    assert heavy.imbalance > 0.1 > even.imbalance
    assert light.prediction.stages[3].total > light.prediction.stages[0].total
    assert heavy.step_s > even.step_s


def test_images_cost_the_first_stage() -> None:
    none, many = predicted(images=0), predicted(images=30)
    assert none.imbalance < 0.02
    assert many.imbalance > predicted().imbalance
    assert many.step_s > predicted().step_s > none.step_s


def test_tensor_ranks_that_leave_the_node_are_slow() -> None:
    wide = predicted("parallel.tensor=16", "parallel.pipeline=2")
    assert wide.traffic.tensor_leaves_node
    assert wide.tensor_share > 0.5
    assert wide.exposed_network_s > wide.prediction.tensor_s
    assert "waiting for tensor ranks over the network" in wide.words


def test_recomputation_takes_time() -> None:
    none, selective, full = (predicted(f"training.recompute={kind}").step_s for kind in ("none", "selective", "full"))
    assert none < selective < full < 1.5 * none


def test_options_of_the_optimizer() -> None:
    plain = predicted()
    apart = predicted("optimizer.overlap_grad_reduce=false", "optimizer.overlap_param_gather=false")
    assert apart.prediction.data_s > 2 * plain.prediction.data_s
    whole = predicted("optimizer.distributed=false", "optimizer.overlap_param_gather=false")
    assert whole.prediction.optimizer_s > plain.prediction.optimizer_s
    assert whole.traffic.stages[0].parameters == 0


def job_of(config: Config, cluster: Cluster) -> Job:
    layout = ParallelLayout.from_config(config, cluster.world_size)
    return atum_job(Microbatch(config, layout, IMAGES * config.training.micro_batch_size), cluster)


def test_places_on_the_cluster() -> None:
    config = load_config(RECIPE, [*EIGHT, *FOUR, "parallel.units_per_chunk=null"])
    cluster = load_cluster("p4de")
    job = job_of(config, cluster)
    assert (job.tensor, job.data.group) == (Group(4, 4), Group(32, 2))
    assert job.exchange_crosses_nodes
    small = load_config(RECIPE, ["parallel.tensor=2", "parallel.pipeline=2", "training.global_batch_size=56"])
    small.parallel.units_per_chunk = None
    job = job_of(small, load_cluster("p4de-1"))
    assert (job.data.group, job.exchange_crosses_nodes) == (Group(2, 2), False)
    # two stages share a node, so the first exchange stays inside; the second does not, and all wait for it
    shared = load_config(
        RECIPE, ["parallel.pipeline=8", "parallel.units_per_chunk=null", "training.global_batch_size=56"]
    )
    assert job_of(shared, load_cluster("p4d-4")).exchange_crosses_nodes


def test_model_flops_of_a_mean() -> None:
    model = load_config(RECIPE, [*EIGHT]).model
    two, three = (flops.model_flops(model, Work(1, 1024, images)).total for images in (2, 3))
    assert model_flops(model, 1, 1024, 2) == two
    assert model_flops(model, 1, 1024, 2.5) == pytest.approx((two + three) / 2)


def test_the_choice_is_explained() -> None:
    best, other, flat = predicted(*FOUR), predicted(), predicted("parallel.pipeline=1")
    assert f"{100 * best.bubble_share:.1f} % of forward and backward" in best.words
    text = against(best, other)
    assert "longer" in text
    assert f"tensor ranks +{other.prediction.tensor_s - best.prediction.tensor_s:.1f} s" in text
    assert "shorter" in against(other, best)
    seconds = [abs(float(number)) for number in re.findall(r" ([+-]\d+\.\d) s", against(best, flat))]
    assert len(seconds) > 2
    assert seconds == sorted(seconds, reverse=True)  # what differs most comes first
