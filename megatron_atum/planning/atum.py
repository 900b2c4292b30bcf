"""How long a step of ATUM takes at a layout, what it sends over which link, and why one layout beats another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_atum import flops
from megatron_atum.config.schema import Config, ModelConfig
from megatron_atum.flops import Work
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.blocks import model_blocks
from megatron_atum.planning.cluster import Cluster
from megatron_atum.planning.cost import DATA_OVERLAP, DataParallel, Group, Job, Prediction, predict
from megatron_atum.planning.traffic import GRADIENT_BYTES, Microbatch, Traffic, traffic_of
from megatron_atum.planning.wording import number, shape_name


def model_flops(model: ModelConfig, rows: int, length: int, images: float) -> float:
    """Model FLOPs of a step, for a mean number of images."""
    low, share = math.floor(images), images - math.floor(images)
    totals = [flops.model_flops(model, Work(rows, length, low + n)).total for n in (0, 1)]
    return totals[0] + share * (totals[1] - totals[0])


def atum_job(micro: Microbatch, cluster: Cluster) -> Job:
    """A step of ATUM as the cost model sees it."""
    layout, optimizer = micro.layout, micro.config.optimizer
    buffers = max(micro.buffers)
    gathers = optimizer.overlap_param_gather is not False and optimizer.overlap_grad_reduce
    return Job(
        stages=model_blocks(micro),
        microbatches=micro.number,
        tensor=_most_spread(cluster, layout, ("data", "tensor")),
        data=DataParallel(
            _most_spread(cluster, layout, ("tensor", "data")),
            GRADIENT_BYTES * buffers,
            micro.item * buffers if optimizer.distributed else 0.0,
            DATA_OVERLAP if optimizer.overlap_grad_reduce else 0.0,
            DATA_OVERLAP if gathers else 0.0,
        ),
        optimizer_values=buffers / (layout.data if optimizer.distributed else 1),
        virtual=layout.virtual_pipeline,
        exchange_bytes=micro.exchange_bytes,
        exchange_crosses_nodes=_exchanges_cross(cluster, layout),
    )


def _most_spread(cluster: Cluster, layout: ParallelLayout, order: tuple[str, str]) -> Group:
    """Of all groups of one kind the one with fewest ranks on a node, which the others wait for.

    Args:
        order: what stays the same in a group, and what its ranks differ in.
    """
    sizes = {"tensor": layout.tensor, "data": layout.data}
    strides = {"tensor": 1, "data": layout.tensor}
    fixed, inside = order
    firsts = (
        stage * layout.tensor * layout.data + place * strides[fixed]
        for stage in range(layout.pipeline)
        for place in range(sizes[fixed])
    )
    groups = {Group.of([first + n * strides[inside] for n in range(sizes[inside])], cluster) for first in firsts}
    return min(groups, key=lambda group: group.per_node)


def _exchanges_cross(cluster: Cluster, layout: ParallelLayout) -> bool:
    """Whether any stage has its neighbour on another node."""
    ranks = layout.tensor * layout.data  # of a stage
    return any(cluster.crosses_nodes((rank, rank + ranks)) for rank in range(layout.world_size - ranks))


@dataclass(frozen=True)
class LayoutPrediction:
    """One row of the planner's table."""

    layout: ParallelLayout
    micro_batch_size: int
    prediction: Prediction
    traffic: Traffic
    tokens_per_s_per_device: float
    model_tflops: float  # per device
    mfu: float  # share of the device's peak

    @property
    def step_s(self) -> float:
        return self.prediction.step_s

    @property
    def bubble_share(self) -> float:
        return self.prediction.bubble_share

    @property
    def tensor_share(self) -> float:
        return self.prediction.tensor_share

    @property
    def exposed_network_s(self) -> float:
        """Seconds of a step that wait for the network, between stages, data-parallel or even tensor ranks."""
        p = self.prediction
        waits = {"stages": p.exchange_s, "data": p.data_s, "tensor": p.tensor_s}
        return sum(seconds for kind, seconds in waits.items() if self.traffic.network[kind])

    @property
    def network_gb_per_node(self) -> float:
        """Out of the busiest node in a step."""
        return self.traffic.network_bytes / 1e9

    @property
    def node_link_gb_per_device(self) -> float:
        return self.traffic.node_link / 1e9

    @property
    def imbalance(self) -> float:
        """By how much the slowest stage exceeds the mean."""
        return self.prediction.imbalance

    @property
    def name(self) -> str:
        return layout_name(self.layout)

    @property
    def words(self) -> str:
        """What the step spends its time on beside products."""
        p = self.prediction
        where = "over the network" if self.traffic.tensor_leaves_node else "inside the node"
        parts = [
            f"{100 * self.bubble_share:.1f} % of forward and backward idle while the pipeline fills and drains",
            f"{100 * self.tensor_share:.0f} % waiting for tensor ranks {where}",
            f"{number(p.exchange_s + p.data_s, 2)} s waiting for other stages and data-parallel ranks",
            f"slowest stage {100 * self.imbalance:.1f} % above the mean",
        ]
        return f"{number(p.step_s, 1)} s a step: " + ", ".join(parts)


def layout_name(layout: ParallelLayout) -> str:
    """TP8 PP4 VPP5 DP16"""
    return shape_name(layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.data)


def predict_layout(config: Config, layout: ParallelLayout, cluster: Cluster, images_per_row: float) -> LayoutPrediction:
    """Time and traffic of a step. Args: images_per_row: mean of the mixture (`mixture.images_per_row`)."""
    rows, length = config.training.global_batch_size, config.data.sequence_length
    micro = Microbatch(config, layout, images_per_row * config.training.micro_batch_size)
    prediction = predict(atum_job(micro, cluster), cluster)
    work = model_flops(config.model, rows, length, rows * images_per_row)
    rate = work / layout.world_size / prediction.step_s
    return LayoutPrediction(
        layout=layout,
        micro_batch_size=config.training.micro_batch_size,
        prediction=prediction,
        traffic=traffic_of(micro, cluster),
        tokens_per_s_per_device=rows * length / layout.world_size / prediction.step_s,
        model_tflops=rate / 1e12,
        mfu=rate / cluster.device.peak_flops,
    )


def against(best: LayoutPrediction, other: LayoutPrediction) -> str:
    """What another layout spends more or less of than the best, in words."""
    longer = other.step_s - best.step_s
    verdict = f"{number(abs(longer), 1)} s {'longer' if longer >= 0 else 'shorter'} ({number(other.step_s, 1)} s)"
    reasons = [f"{text} {seconds:+.1f} s" for text, seconds in _differences(best.prediction, other.prediction)]
    sent = (number(row.network_gb_per_node, 0) for row in (other, best))
    bytes_ = f"{' instead of '.join(sent)} GB out of a node"
    return ", ".join([verdict, *reasons, bytes_])


def _differences(best: Prediction, other: Prediction) -> Sequence[tuple[str, float]]:
    """Parts of the step that differ by at least a tenth of a second, the largest first."""
    names = {
        "compute_s": "products",
        "tensor_s": "tensor ranks",
        "bubble_s": "idle pipeline",
        "exchange_s": "exchanges between stages",
        "data_s": "data-parallel exchange",
        "optimizer_s": "optimizer",
    }
    found = [(text, getattr(other, name) - getattr(best, name)) for name, text in names.items()]
    return sorted((item for item in found if abs(item[1]) >= 0.1), key=lambda item: -abs(item[1]))
