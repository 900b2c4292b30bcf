"""How much memory each stage of a layout takes, without running the layout.

Parts of the model are run under fake tensors (dry_run.py) in three small stages, with as many tensor ranks as the
layout has, and then added up: a stage is its units, and what the first or the last one has besides; under way are as
many microbatches as the schedule has at once. So the figures follow the code, not a formula of it. A small stage has
one unit, or as many as full recomputation takes together (training.recompute_layers).

With training.recompute_method=block units differ, and are taken as if nothing was recomputed: an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

from megatron_atum.batch import images_per_tensor_rank
from megatron_atum.config.schema import Config, RampUpConfig
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.cluster import Cluster
from megatron_atum.planning.dry_run import DeviceMemory, DryRun, dry_run

STAGES = 3


@dataclass(frozen=True)
class Part:
    """What a part of the model adds to a stage, in bytes."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0  # before it is shared out over data-parallel ranks
    kept: int = 0  # by a microbatch between its forward and its backward
    host: int = 0  # in the memory of the host

    def times(self, number: int) -> Part:
        return Part(*(value * number for value in vars(self).values()))

    def __add__(self, other: Part) -> Part:
        return Part(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: Part) -> Part:
        return self + other.times(-1)

    def over(self, number: int) -> Part:
        return Part(*(value // number for value in vars(self).values()))


@dataclass(frozen=True)
class Parts:
    first: Part  # embedding, vision tower, Perceiver
    unit: Part
    last: Part  # norm, head, loss
    passing: tuple[int, ...]  # bytes that live for a moment: of the first, a middle and the last stage
    inputs: tuple[int, ...]  # a microbatch's, of the same
    entry: Part  # what a chunk keeps that is not the first: text and latents as they came
    unreached: tuple[str, ...]  # trainable tensors that backward does not reach, as they are called in the small models


class MemoryModel:
    """Measures three sizes of microbatch for each number of tensor ranks. Others lie on their plane: what is kept grows
    with rows and with images."""

    def __init__(self, config: Config, cluster: Cluster) -> None:
        self._config, self._cluster = config, cluster
        self._known: dict[int, tuple[Parts, Parts, Parts]] = {}

    def measure(self, tensors: Iterable[int], processes: int) -> None:
        """Measure what `stages` will need, in several processes.

        They are started anew, so the program's main module must do nothing when it is imported.

        Args:
            tensors: numbers of tensor ranks.
        """
        missing = sorted(set(tensors) - self._known.keys())
        jobs = [(tensor, images) for tensor in missing for images in _sizes(tensor)]
        run = partial(measure_parts, self._config, self._cluster)
        if min(processes, len(jobs)) < 2:
            parts = [run(*job) for job in jobs]
        else:
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                parts = list(pool.map(run, *zip(*jobs, strict=True)))
        for place, tensor in enumerate(missing):
            self._known[tensor] = (parts[3 * place], parts[3 * place + 1], parts[3 * place + 2])

    def unreached(self, tensor: int) -> tuple[str, ...]:
        """Trainable tensors that backward does not reach. Args: tensor: ranks."""
        self.measure([tensor], 1)
        return self._known[tensor][0].unreached

    def stages(self, layout: ParallelLayout, rows: int, images: int) -> list[DeviceMemory]:
        """Of one device of each stage.

        Args:
            layout: of the model of this configuration; its degrees may be others.
            rows, images: of a microbatch; the same for all of them.
        """
        self.measure([layout.tensor], 1)
        base, more_images, two_rows = self._known[layout.tensor]
        shares = images_per_tensor_rank(
            images, layout.tensor
        )  # `two_rows` has one more than `base`, as `more_images` has
        parts = _mixed(base, [(shares - rows, more_images), (rows - 1, two_rows)])
        microbatches = self._config.training.global_batch_size // (rows * layout.data)
        shards = layout.data if self._config.optimizer.distributed else 1
        return [_stage(layout, parts, stage, microbatches, shards) for stage in range(layout.pipeline)]


def _sizes(tensor: int) -> tuple[tuple[int, ...], ...]:
    """Images of each row. As many for each tensor rank, since they pad to the busiest of them."""
    return (tensor,), (2 * tensor,), (tensor, tensor)


def _mixed(base: Any, others: Sequence[tuple[float, Any]]) -> Any:
    """base, and so many times what each of the others has more than it."""
    if isinstance(base, str):
        return base
    if isinstance(base, int):
        return round(base + sum(factor * (other - base) for factor, other in others))
    if isinstance(base, tuple):
        places = range(len(base))
        return tuple(_mixed(base[n], [(factor, other[n]) for factor, other in others]) for n in places)
    names = vars(base)
    return type(base)(*(_mixed(names[n], [(factor, vars(other)[n]) for factor, other in others]) for n in names))


def _stage(layout: ParallelLayout, parts: Parts, stage: int, microbatches: int, shards: int) -> DeviceMemory:
    chunks = [
        parts.unit.times(chunk.num_units)
        + (parts.first if chunk.is_first else parts.entry)
        + (parts.last if chunk.is_last else Part())
        for chunk in layout.chunks_of(stage)
    ]
    static = sum(chunks, Part())
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    ends = [place for place, here in ((0, is_first), (2, is_last)) if here] or [1]
    under_way = _most_under_way(layout, stage, microbatches, [chunk.kept for chunk in chunks])
    # what lives for a moment at the first stage's end of a backward comes when the head's part of it is done
    done = {0: parts.last.kept if is_last else 0}
    return DeviceMemory(
        parameters=static.parameters,
        gradients=static.gradients,
        optimizer=static.optimizer // shards,
        inputs=max(parts.inputs[place] for place in ends) * microbatches,
        activations=under_way + max(parts.passing[place] - done.get(place, 0) for place in ends),
        host=static.host,
    )


def _most_under_way(layout: ParallelLayout, stage: int, microbatches: int, kept: list[int]) -> int:
    """Bytes that the microbatches under way keep at most, in the order in which megatron-core's schedules run them.

    Args:
        kept: by a microbatch in each chunk of the stage.
    """
    P, V = layout.pipeline, layout.virtual_pipeline
    behind, total = P - stage - 1, microbatches * V
    warm_up = min(total, behind if V == 1 else 2 * behind + (V - 1) * P)
    chunk_of = [number % (P * V) // P if V > 1 else 0 for number in range(total)]
    live = most = sum(kept[chunk] for chunk in chunk_of[:warm_up])
    for number in range(warm_up, total):
        live += kept[chunk_of[number]]
        most = max(most, live)
        live -= kept[V - 1 - chunk_of[number - warm_up]]
    return most


def measure_parts(config: Config, cluster: Cluster, tensor: int, images: tuple[int, ...]) -> Parts:
    """Args: images: of each row of a microbatch."""
    units = _units_of_stage(config)
    small = partial(_run_stage, config, cluster, tensor, images, units)
    runs = [small(stage) for stage in range(STAGES)]
    unit = (_part(small(0, more_units=units, microbatches=2)) - _part(runs[0])).over(units)
    vision_layer = _part(small(0, vision_layers=2, microbatches=2)) - _part(runs[0])
    return Parts(
        first=_part(runs[0]) - unit.times(units) + vision_layer.times(config.model.vision.num_layers - 1),
        unit=unit,
        last=_part(runs[2]) - _part(runs[1]),
        passing=tuple(run.memory.activations - run.kept * (STAGES - stage) for stage, run in enumerate(runs)),
        inputs=tuple(run.memory.inputs // run.microbatches for run in runs),
        entry=_part(runs[1]) - unit.times(units),
        unreached=tuple(name for run in runs for name in run.unreached),
    )


def _run_stage(
    config: Config,
    cluster: Cluster,
    tensor: int,
    images: tuple[int, ...],
    units_of_stage: int,
    stage: int,
    more_units: int = 0,
    vision_layers: int = 1,
    microbatches: int | None = None,
) -> DryRun:
    """Of a small model, without data parallelism.

    Args:
        more_units: of the first stage.
        microbatches: fewer than show the most under way.
    """
    model, training, rows = config.model, config.training, len(images)
    units = [units_of_stage + more_units, *[units_of_stage] * (STAGES - 1)]
    recompute = "none" if training.recompute_method == "block" else training.recompute
    small = replace(
        config,
        model=replace(
            model,
            num_layers=sum(units) * model.cross_layer_interval,
            vision=replace(model.vision, num_layers=vision_layers),
        ),
        parallel=replace(config.parallel, tensor=tensor, pipeline=STAGES, virtual_pipeline=1, units_per_chunk=units),
        training=replace(
            training,
            micro_batch_size=rows,
            global_batch_size=STAGES * rows,
            ramp_up=RampUpConfig(),
            recompute=recompute,
        ),
    )
    world = replace(cluster, nodes=1, devices_per_node=STAGES * tensor)
    return dry_run(small, world, stage * tensor, list(images), microbatches)


def _units_of_stage(config: Config) -> int:
    """As many as full recomputation runs together: backward holds what all of them keep."""
    training = config.training
    if training.recompute != "full" or training.recompute_method == "block":
        return 1
    return -(-training.recompute_layers // config.model.cross_layer_interval)


def _part(run: DryRun) -> Part:
    return Part(run.memory.parameters, run.memory.gradients, run.memory.optimizer, run.kept, run.memory.host)
