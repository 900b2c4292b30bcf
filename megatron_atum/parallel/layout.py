"""How ranks are arranged and which units of the decoder each pipeline chunk holds.

Rank order is megatron-core's default `tp-cp-ep-dp-pp`: tensor ranks are neighbours (inside a node), then
data-parallel ranks, and pipeline stages are farthest apart:

    rank = (pipeline_rank * data + data_rank) * tensor + tensor_rank

The unit of the decoder is one gated cross-attention layer and the `cross_layer_interval` LLaMA layers behind it.
Pipeline cuts fall between units. Chunk c of `pipeline * virtual_pipeline` runs on stage `c % pipeline` as its
virtual stage `c // pipeline`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_atum.config.schema import Config, TrainingConfig
from megatron_atum.errors import ConfigError


@dataclass(frozen=True)
class Chunk:
    """A contiguous run of units on one (pipeline rank, virtual rank)."""

    index: int
    pipeline_rank: int
    virtual_rank: int
    first_unit: int
    num_units: int
    is_first: bool  # holds embedding, vision tower and perceiver
    is_last: bool  # holds final norm and head

    @property
    def units(self) -> range:
        return range(self.first_unit, self.first_unit + self.num_units)


@dataclass(frozen=True)
class ParallelLayout:
    """The arrangement of one run. Built by `from_config`, which validates it; passed explicitly everywhere."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    sequence: bool = False
    units_per_chunk: tuple[int, ...] = (1,)

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def sequence_shards(self) -> int:
        """Ranks that share the sequence dimension of the residual stream."""
        return self.tensor if self.sequence else 1

    @property
    def num_chunks(self) -> int:
        return self.pipeline * self.virtual_pipeline

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pipeline_rank, data_rank, tensor_rank) of a global rank."""
        rest, tensor_rank = divmod(rank, self.tensor)
        pipeline_rank, data_rank = divmod(rest, self.data)
        return pipeline_rank, data_rank, tensor_rank

    def chunk(self, index: int) -> Chunk:
        return Chunk(
            index=index,
            pipeline_rank=index % self.pipeline,
            virtual_rank=index // self.pipeline,
            first_unit=sum(self.units_per_chunk[:index]),
            num_units=self.units_per_chunk[index],
            is_first=index == 0,
            is_last=index == self.num_chunks - 1,
        )

    def chunks_of(self, pipeline_rank: int) -> list[Chunk]:
        """Chunks of a stage, in virtual order (the order megatron-core's interleaved schedule expects)."""
        return [self.chunk(v * self.pipeline + pipeline_rank) for v in range(self.virtual_pipeline)]

    def describe(self) -> str:
        parts = [f"tensor {self.tensor}{' + sequence' if self.sequence else ''}", f"pipeline {self.pipeline}"]
        if self.virtual_pipeline > 1:
            parts.append(f"virtual {self.virtual_pipeline}")
        parts += [f"data {self.data}", f"units per chunk {list(self.units_per_chunk)}"]
        return ", ".join(parts)

    @classmethod
    def from_config(cls, config: Config, world_size: int) -> ParallelLayout:
        """Build and validate the layout of a run, before any process group exists.

        Raises:
            ConfigError: naming the key and a value that would work.
        """
        p, model = config.parallel, config.model
        _check_degrees(config, world_size)
        layout = cls(
            world_size=world_size,
            tensor=p.tensor,
            pipeline=p.pipeline,
            virtual_pipeline=p.virtual_pipeline,
            sequence=p.sequence and p.tensor > 1,
            units_per_chunk=_units_per_chunk(
                model.num_layers // model.cross_layer_interval, p.pipeline, p.virtual_pipeline, p.units_per_chunk
            ),
        )
        _check_tensor(config, layout)
        _check_batch(config, layout)
        return layout


def even_units(num_units: int, num_chunks: int) -> tuple[int, ...]:
    """Units of each chunk when the user names none: even, a remainder goes to the middle.

    The first chunk also holds vision, perceiver and embedding and the last one the head, so they get the smaller
    share.
    """
    base, rest = divmod(num_units, num_chunks)
    middle_first = sorted(range(num_chunks), key=lambda c: (abs(2 * c - (num_chunks - 1)), -c))
    extra = set(middle_first[:rest])
    return tuple(base + (c in extra) for c in range(num_chunks))


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, most + 1) if n % d == 0]


def _check_degrees(config: Config, world_size: int) -> None:
    p, model = config.parallel, config.model
    for key in ("tensor", "pipeline", "virtual_pipeline"):
        if getattr(p, key) < 1:
            raise ConfigError(f"parallel.{key}={getattr(p, key)}: must be at least 1")
    if model.num_layers % model.cross_layer_interval:
        raise ConfigError(
            f"model.num_layers={model.num_layers} is not a multiple of "
            f"model.cross_layer_interval={model.cross_layer_interval}; "
            f"model.cross_layer_interval={_divisors(model.num_layers, model.cross_layer_interval)[-1]} would work"
        )
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline={p.virtual_pipeline} needs parallel.pipeline of at least 2; "
            "parallel.virtual_pipeline=1 would work"
        )
    model_ranks = p.tensor * p.pipeline
    if world_size < model_ranks:
        raise ConfigError(
            f"parallel.tensor={p.tensor} x parallel.pipeline={p.pipeline} needs {model_ranks} processes, but only "
            f"{world_size} were started; use torchrun --nproc-per-node {model_ranks}, or smaller degrees"
        )
    if world_size % model_ranks:
        raise ConfigError(
            f"{world_size} processes cannot be divided into groups of parallel.tensor={p.tensor} x "
            f"parallel.pipeline={p.pipeline} = {model_ranks}; "
            f"start {world_size - world_size % model_ranks} processes instead"
        )


def _units_per_chunk(num_units: int, pipeline: int, virtual: int, asked: list[int] | None) -> tuple[int, ...]:
    num_chunks = pipeline * virtual
    if num_chunks > num_units:
        raise ConfigError(
            f"parallel.pipeline={pipeline} x parallel.virtual_pipeline={virtual} makes {num_chunks} chunks, but the "
            f"model has only {num_units} units (num_layers / cross_layer_interval) to cut between; "
            f"at most {num_units} chunks would work"
        )
    if asked is None:
        return even_units(num_units, num_chunks)
    if len(asked) != num_chunks or sum(asked) != num_units or min(asked) < 1:
        raise ConfigError(
            f"parallel.units_per_chunk={list(asked)} must name {num_chunks} chunks of at least 1 unit that add up to "
            f"{num_units}; {list(even_units(num_units, num_chunks))} would work"
        )
    return tuple(asked)


def _check_tensor(config: Config, layout: ParallelLayout) -> None:
    model, t = config.model, layout.tensor
    widths = {
        "model.num_heads": model.num_heads,
        "model.perceiver.num_heads": model.perceiver.num_heads,
        "model.intermediate_size": model.intermediate_size,
        "model.hidden_size": model.hidden_size,
        "model.vision.embed_dim": model.vision.embed_dim,
    }
    for key, value in widths.items():
        if value % t:
            fit = _divisors(math.gcd(layout.world_size // layout.pipeline, *widths.values()), t)[-1]
            raise ConfigError(f"parallel.tensor={t} does not divide {key}={value}; parallel.tensor={fit} would work")
    if layout.sequence and config.data.sequence_length % t:
        fit = config.data.sequence_length // t * t
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} is not a multiple of parallel.tensor={t}, which "
            f"parallel.sequence needs; data.sequence_length={fit or t} or parallel.sequence=false would work"
        )


def _check_batch(config: Config, layout: ParallelLayout) -> None:
    training = config.training
    for key in ("micro_batch_size", "global_batch_size"):
        if getattr(training, key) < 1:
            raise ConfigError(f"training.{key}={getattr(training, key)}: must be at least 1")
    rows = training.micro_batch_size * layout.data
    if training.global_batch_size % rows:
        unit = rows * (layout.pipeline if layout.virtual_pipeline > 1 else 1)
        fit = max(unit, training.global_batch_size // unit * unit)
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size={training.micro_batch_size} x {layout.data} data-parallel ranks; "
            f"training.global_batch_size={fit} would work"
        )
    microbatches = training.global_batch_size // rows
    if layout.virtual_pipeline > 1 and microbatches % layout.pipeline:
        fit = -(-microbatches // layout.pipeline) * layout.pipeline * rows
        raise ConfigError(
            f"the interleaved schedule needs the {microbatches} microbatches of a step to be a multiple of "
            f"parallel.pipeline={layout.pipeline}; training.global_batch_size={fit} would work"
        )
    _check_ramp_up(training, rows * (layout.pipeline if layout.virtual_pipeline > 1 else 1))


def _check_ramp_up(training: TrainingConfig, unit: int) -> None:
    """Every batch on the way to global_batch_size must be a multiple of `unit`, as that is."""
    ramp, final = training.ramp_up, training.global_batch_size
    if not ramp.start or not (ramp.start % unit or ramp.increment % unit):
        return
    if final == unit:
        works = "training.ramp_up.start=0 (no ramp-up)"
    else:
        start = min(final - unit, max(unit, ramp.start // unit * unit))
        increment = _divisors((final - start) // unit, max(1, ramp.increment // unit))[-1] * unit
        works = f"training.ramp_up.start={start} with training.ramp_up.increment={increment}"
    raise ConfigError(
        f"training.ramp_up makes batches of {ramp.start}, {ramp.start + ramp.increment}, ... rows, and each must be a "
        f"multiple of {unit} as training.global_batch_size is (microbatch x data-parallel ranks, and x stages under "
        f"the interleaved schedule); {works} would work"
    )
