"""Which layout to train with: every one that the cluster allows, with its time, traffic and memory, or why not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from megatron_atum.config.schema import Config
from megatron_atum.config.suggest import unknown
from megatron_atum.errors import ConfigError, listed
from megatron_atum.planning.atum import LayoutPrediction, layout_name, predict_layout
from megatron_atum.planning.cluster import Cluster
from megatron_atum.planning.dry_run import DeviceMemory, DryRun, dry_run
from megatron_atum.planning.layouts import Candidate, candidates, chosen
from megatron_atum.planning.memory import MemoryModel
from megatron_atum.planning.wording import number

MOST_IMBALANCE = 0.10  # of the slowest stage over the mean
SHOWN = 12  # layouts of the table, besides the configuration's

Ways = list[tuple[Candidate, LayoutPrediction]]  # one shape with several microbatches, the fastest first


@dataclass(frozen=True)
class Row:
    """A layout of the table."""

    candidate: Candidate
    prediction: LayoutPrediction
    memory: tuple[DeviceMemory, ...]  # of each stage at the mean number of images
    memory_most: tuple[DeviceMemory, ...]  # when every row has the most images it can have
    refused: tuple[str, ...]  # why it cannot be used

    @property
    def name(self) -> str:
        return self.prediction.name

    @property
    def gib(self) -> float:
        return most_gib(self.memory)

    @property
    def gib_most(self) -> float:
        return most_gib(self.memory_most)


def most_gib(stages: Iterable[DeviceMemory]) -> float:
    return max(stage.total for stage in stages) / 2**30


@dataclass(frozen=True)
class Images:
    """Of a row."""

    mean: float
    most: int

    def of_microbatch(self, rows: int) -> list[int]:
        """Of each row of a microbatch with the mean number, rounded up to a whole one."""
        total = math.ceil(self.mean * rows)
        return [total // rows + (row < total % rows) for row in range(rows)]


class Planner:
    """Judges layouts of one configuration on one cluster."""

    def __init__(self, config: Config, cluster: Cluster, images: Images, processes: int = 1) -> None:
        """processes: that measure memory (memory.py: MemoryModel.measure)."""
        self.config, self.cluster, self.images, self.processes = config, cluster, images, processes
        self._memory = MemoryModel(config, cluster)

    def chosen(self, measured: bool = True) -> Row:
        """The layout of the configuration. Args: measured: with its memory.

        Raises:
            ConfigError: it is no layout of this cluster.
        """
        candidate = chosen(self.config, self.cluster)
        return self._row(candidate, self._predict(candidate), measured)

    def rows(self, which: str, own: Row | None) -> list[Row]:
        """Rows of the table, the fastest first, one of each shape besides the configuration's own.

        Args:
            which: usable (the fastest that can be used) | all | chosen | names with commas between them.
            own: the configuration's; None: it is no layout of this cluster.

        Raises:
            ConfigError: there is no layout of such a name.
        """
        ways = {} if which == "chosen" else self._by_shape()
        found = [] if own is None else [own]
        for way in self._asked(ways, which):
            if which == "usable" and len(found) > SHOWN:
                break
            row = self._first_that_fits(way, which)
            is_own = own is not None and (row.name, row.candidate.rows) == (own.name, own.candidate.rows)
            if not is_own and (which != "usable" or not row.refused):
                found.append(row)
        return sorted(found, key=lambda row: row.prediction.step_s)

    def _asked(self, ways: dict[str, Ways], which: str) -> list[Ways]:
        """Shapes that may become rows, the fastest first; their memory is measured together."""
        if which in ("usable", "all", "chosen"):
            asked = list(ways.values())
        else:
            asked = [ways[name] for name in _names(which, ways)]
        asked.sort(key=lambda way: way[0][1].step_s)
        likely = [way[0] for way in asked if which != "usable" or not self._refusals(way[0][1])]
        tensors = [candidate.layout.tensor for candidate, _ in likely[: SHOWN if which == "usable" else None]]
        self._memory.measure(tensors, self.processes)
        return asked

    def _by_shape(self) -> dict[str, Ways]:
        """By name without data-parallel ranks."""
        shapes: dict[str, Ways] = {}
        for candidate in candidates(self.config, self.cluster):
            name = layout_name(candidate.layout).rpartition(" ")[0].replace(" ", "")
            shapes.setdefault(name, []).append((candidate, self._predict(candidate)))
        return {name: sorted(way, key=lambda one: one[1].step_s) for name, way in shapes.items()}

    def _first_that_fits(self, ways: Ways, which: str) -> Row:
        """The fastest microbatch that fits into memory; the one that takes least if none does."""
        rows = []
        for candidate, prediction in ways:
            row = self._row(candidate, prediction, which != "usable" or not self._refusals(prediction))
            if not row.memory or not self._too_much(row.memory_most):
                return row
            rows.append(row)
        return min(rows, key=lambda row: row.gib_most)

    # Single ranks -----------------------------------------------------------------------------------------------------

    def dry_runs(self, ranks: str) -> list[DryRun]:
        """Args: ranks: stages (the first of each) | numbers with commas between them.

        Raises:
            ConfigError: there is no such rank.
        """
        layout = chosen(self.config, self.cluster).layout
        if ranks == "stages":
            numbers = [stage * layout.data * layout.tensor for stage in range(layout.pipeline)]
        else:
            numbers = [_rank(text, layout.world_size) for text in ranks.split(",")]
        images = self.images.of_microbatch(self.config.training.micro_batch_size)
        run = partial(dry_run, self.config, self.cluster, images=images)
        if min(self.processes, len(numbers)) < 2:
            return [run(rank) for rank in numbers]
        with ProcessPoolExecutor(self.processes, get_context("spawn")) as pool:
            return list(pool.map(run, numbers))

    def with_slower_products(self, row: Row) -> LayoutPrediction:
        """The same where matrix products reach a tenth less than `gemm_efficiency`."""
        device = replace(self.cluster.device, gemm_efficiency=0.9 * self.cluster.device.gemm_efficiency)
        candidate = row.candidate
        return predict_layout(
            candidate.config, candidate.layout, replace(self.cluster, device=device), self.images.mean
        )

    def faults_of(self, run: DryRun) -> list[str]:
        """Why training could not go on like this rank."""
        faults = self._too_much([run.memory]) + _unreached(run.unreached)
        return [f"stage {run.pipeline_rank}: {fault}" for fault in faults]

    def _predict(self, candidate: Candidate) -> LayoutPrediction:
        return predict_layout(candidate.config, candidate.layout, self.cluster, self.images.mean)

    def _row(self, candidate: Candidate, prediction: LayoutPrediction, measured: bool = True) -> Row:
        refused = self._refusals(prediction)
        mean: list[DeviceMemory] = []
        most: list[DeviceMemory] = []
        if measured:
            images = sum(self.images.of_microbatch(candidate.rows)), self.images.most * candidate.rows
            mean, most = (self._memory.stages(candidate.layout, candidate.rows, number) for number in images)
            refused += self._too_much(most) + _unreached(self._memory.unreached(candidate.layout.tensor))
        return Row(candidate, prediction, tuple(mean), tuple(most), tuple(refused))

    def _too_much(self, stages: Iterable[DeviceMemory]) -> list[str]:
        needed, device = most_gib(stages), self.cluster.device
        if needed + device.reserved_gib <= device.memory_gib:
            return []
        left = number(device.memory_gib - device.reserved_gib, 1)
        return [
            f"needs {number(needed, 1)} GiB, and {device.name} has {left} besides {device.reserved_gib:g} in reserve"
        ]

    def _refusals(self, prediction: LayoutPrediction) -> list[str]:
        refused = []
        if prediction.traffic.tensor_leaves_node:
            refused.append(
                f"tensor ranks leave the node ({prediction.layout.tensor} of them, "
                f"{self.cluster.devices_per_node} devices)"
            )
        if prediction.imbalance > MOST_IMBALANCE:
            refused.append(
                f"the slowest stage takes {100 * prediction.imbalance:.1f} % more than the mean, and "
                f"{100 * MOST_IMBALANCE:.0f} % are the most"
            )
        return refused


def _unreached(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"backward never reaches {len(names)} trainable tensors, which would not train: {listed(names, 8)}"]


def _names(which: str, ways: Iterable[str]) -> list[str]:
    """Shapes that were asked for, each once, also as the table prints them (with spaces and data-parallel ranks)."""
    names = dict.fromkeys(text.partition("DP")[0] for text in which.replace(" ", "").upper().split(","))
    for name in names:
        if name not in ways:
            raise ConfigError(
                f"{unknown('layout', name, ways)}; layouts are called TP4PP4 or TP4PP4VPP5, or usable, all, chosen"
            )
    return list(names)


def _rank(text: str, world_size: int) -> int:
    if text.strip().isdecimal() and int(text) < world_size:
        return int(text)
    raise ConfigError(
        f"--ranks: {text!r} is no rank of {world_size}; use stages, or numbers from 0 to {world_size - 1}"
    )
