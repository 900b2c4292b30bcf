"""The layouts a cluster allows for a model, each with its microbatch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_atum.config.schema import Config
from megatron_atum.errors import ConfigError
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.cluster import Cluster

MOST_ROWS = 8  # of a microbatch


@dataclass(frozen=True)
class Candidate:
    """A configuration and its layout on the cluster."""

    config: Config
    layout: ParallelLayout

    @property
    def rows(self) -> int:
        """Of a microbatch."""
        return self.config.training.micro_batch_size


def chosen(config: Config, cluster: Cluster) -> Candidate:
    """The layout that the configuration names.

    Raises:
        ConfigError: it does not work on this cluster.
    """
    return Candidate(config, ParallelLayout.from_config(config, cluster.world_size))


def candidates(config: Config, cluster: Cluster) -> Iterator[Candidate]:
    """Every layout that training would accept: tensor ranks up to two nodes, every number of stages that leaves
    each a unit, every number of chunks that cuts stages evenly, microbatches of 1 to 8 rows."""
    units = config.model.num_layers // config.model.cross_layer_interval
    for tensor in _divisors(cluster.world_size, min(cluster.world_size, 2 * cluster.devices_per_node)):
        for pipeline in _divisors(cluster.world_size // tensor, units):
            for virtual in range(1, units // pipeline + 1) if pipeline > 1 else (1,):
                if virtual > 1 and units % (pipeline * virtual):
                    continue
                for rows in range(1, MOST_ROWS + 1):
                    yield from _candidate(config, cluster, tensor, pipeline, virtual, rows)


def _candidate(
    config: Config, cluster: Cluster, tensor: int, pipeline: int, virtual: int, rows: int
) -> Iterator[Candidate]:
    parallel = replace(
        config.parallel, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, units_per_chunk=None
    )
    changed = replace(config, parallel=parallel, training=replace(config.training, micro_batch_size=rows))
    try:
        yield Candidate(changed, ParallelLayout.from_config(changed, cluster.world_size))
    except ConfigError:  # widths or batch do not divide: no layout of this model
        return


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, most + 1) if number % n == 0]
