"""Arithmetic of a layout, and what it refuses."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import reduce
from typing import Any

import pytest
import yaml

from megatron_atum.config.loader import load_config
from megatron_atum.errors import ConfigError
from megatron_atum.parallel.layout import ParallelLayout, even_units

TINY = load_config(
    None,
    [
        "model.preset=tiny",
        "model.num_layers=4",
        "model.cross_layer_interval=2",
        "training.global_batch_size=48",
        "data.sequence_length=48",
    ],
)


def layout(world_size: int, *overrides: str) -> ParallelLayout:
    config = deepcopy(TINY)
    for override in overrides:
        key, value = override.split("=")
        *sections, name = key.split(".")
        setattr(reduce(getattr, sections, config), name, yaml.safe_load(value))
    return ParallelLayout.from_config(config, world_size)


@pytest.mark.parametrize("tensor", [1, 2, 3])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("data", [1, 2, 5])
def test_coordinates(tensor: int, pipeline: int, data: int) -> None:
    world = tensor * pipeline * data
    x = ParallelLayout(world_size=world, tensor=tensor, pipeline=pipeline, units_per_chunk=(1,) * pipeline)
    assert x.data == data
    places = [x.coordinates(rank) for rank in range(world)]
    assert sorted(set(places)) == [(p, d, t) for p in range(pipeline) for d in range(data) for t in range(tensor)]
    for rank, (p, d, t) in enumerate(places):
        assert rank == (p * data + d) * tensor + t
    # tensor ranks are neighbours
    for rank in range(0, world, tensor):
        assert [x.coordinates(rank + t) for t in range(tensor)] == [(*places[rank][:2], t) for t in range(tensor)]


@pytest.mark.parametrize("chunks", range(1, 10))
def test_even_units(chunks: int) -> None:
    for units in range(chunks, 30):
        shares = even_units(units, chunks)
        assert len(shares) == chunks
        assert sum(shares) == units
        assert min(shares) >= 1
        assert max(shares) - min(shares) <= 1
        assert max(shares[0], shares[-1]) <= max(shares[1:-1], default=units)
        if chunks > 2 and units % chunks:
            assert shares[chunks // 2] > shares[0] or shares[chunks // 2] > shares[-1]


def test_chunks() -> None:
    """Chunk c of pipeline x virtual runs on stage c % pipeline; units are contiguous over chunks."""
    x = ParallelLayout(world_size=3, pipeline=3, virtual_pipeline=2, units_per_chunk=(1, 2, 3, 1, 1, 2))
    assert [[chunk.index for chunk in x.chunks_of(p)] for p in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [[chunk.virtual_rank for chunk in x.chunks_of(p)] for p in range(3)] == [[0, 1]] * 3
    assert [chunk.pipeline_rank for p in range(3) for chunk in x.chunks_of(p)] == [0, 0, 1, 1, 2, 2]
    units = [unit for c in range(6) for unit in x.chunk(c).units]
    assert units == list(range(10))
    assert [len(x.chunk(c).units) for c in range(6)] == [1, 2, 3, 1, 1, 2]
    assert [c for c in range(6) if x.chunk(c).is_first] == [0]
    assert [c for c in range(6) if x.chunk(c).is_last] == [5]


def test_a_configuration_becomes_a_layout() -> None:
    x = layout(8, "parallel.tensor=2", "parallel.pipeline=2", "model.num_layers=10")
    assert (x.world_size, x.tensor, x.pipeline, x.virtual_pipeline, x.data) == (8, 2, 2, 1, 2)
    assert x.sequence and x.sequence_shards == 2
    assert sum(x.units_per_chunk) == 5
    assert "tensor 2 + sequence" in x.describe() and "data 2" in x.describe()
    assert not layout(1).sequence  # on by default, but there is nothing to split
    assert layout(2, "parallel.pipeline=2", "parallel.units_per_chunk=[1,1]").units_per_chunk == (1, 1)
    assert layout(
        2, "parallel.pipeline=2", "model.num_layers=10", "parallel.units_per_chunk=[4,1]"
    ).units_per_chunk == (
        4,
        1,
    )


def test_a_vocabulary_that_does_not_divide_is_allowed() -> None:
    assert layout(4, "parallel.tensor=4", "model.vocab_size=97").tensor == 4


SIXTEEN_LAYERS = "model.num_layers=16"

# name: processes, overrides, key that the message must name
REFUSED: dict[str, tuple[int, list[str], str]] = {
    "layers and interval": (1, ["model.num_layers=9"], "model.cross_layer_interval"),
    "interval above layers": (1, ["model.cross_layer_interval=6"], "model.cross_layer_interval"),
    "virtual without pipeline": (1, ["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline"),
    "too few processes": (3, ["parallel.tensor=2", "parallel.pipeline=2"], "processes"),
    "processes left over": (7, ["parallel.tensor=2"], "processes"),
    "more chunks than units": (4, ["parallel.pipeline=4"], "chunks"),
    "virtual makes too many chunks": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=4"], "chunks"),
    "units of other number": (2, ["parallel.pipeline=2", "parallel.units_per_chunk=[1,1,1]"], "units_per_chunk"),
    "units of other sum": (2, ["parallel.pipeline=2", "parallel.units_per_chunk=[1,2]"], "units_per_chunk"),
    "empty chunk": (2, ["parallel.pipeline=2", "parallel.units_per_chunk=[2,0]"], "units_per_chunk"),
    "no units": (1, ["parallel.units_per_chunk=[]"], "units_per_chunk"),
    "heads": (8, ["parallel.tensor=8"], "model.num_heads"),
    "heads of another divisor": (12, ["parallel.tensor=3"], "model.num_heads"),
    "perceiver heads": (4, ["parallel.tensor=4", "model.perceiver.num_heads=6"], "model.perceiver.num_heads"),
    "mlp width": (4, ["parallel.tensor=4", "model.intermediate_size=322"], "model.intermediate_size"),
    "several widths": (
        12,
        ["parallel.tensor=12", "model.num_heads=18", "model.hidden_size=144", "model.perceiver.num_heads=10"],
        "model.num_heads",
    ),
    "width of the images": (
        4,
        ["parallel.tensor=4", "model.vision.embed_dim=66", "model.vision.num_heads=2"],
        "model.vision.embed_dim",
    ),
    "sequence": (2, ["parallel.tensor=2", "data.sequence_length=47"], "data.sequence_length"),
    "short sequence": (4, ["parallel.tensor=4", "data.sequence_length=3"], "data.sequence_length"),
    "global batch": (5, [], "training.global_batch_size"),
    "global batch below one row each": (4, ["training.global_batch_size=3"], "training.global_batch_size"),
    "micro batch": (1, ["training.micro_batch_size=5"], "training.global_batch_size"),
    "interleaved": (
        4,
        ["parallel.pipeline=4", "parallel.virtual_pipeline=2", SIXTEEN_LAYERS, "training.global_batch_size=6"],
        "parallel.pipeline",
    ),
    "interleaved and batch": (
        8,
        ["parallel.pipeline=4", "parallel.virtual_pipeline=2", SIXTEEN_LAYERS, "training.global_batch_size=7"],
        "training.global_batch_size",
    ),
    "interleaved and small batch": (
        6,
        ["parallel.pipeline=3", "parallel.virtual_pipeline=2", SIXTEEN_LAYERS, "training.global_batch_size=1"],
        "training.global_batch_size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_key_and_what_works(name: str) -> None:
    world_size, overrides, key = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        layout(world_size, *overrides)
    message = str(error.value)
    assert key in message
    world_size, fixes = suggestions(message, world_size)
    assert fixes, message
    for fix in fixes:
        layout(world_size, *overrides, *fix)


def suggestions(message: str, world_size: int) -> tuple[int, list[list[str]]]:
    """Processes and the alternatives of overrides that a message proposes."""
    if found := re.search(r"--nproc-per-node (\d+)|start (\d+) processes instead", message):
        return int(found[1] or found[2]), [[]]
    if found := re.search(r"at most (\d+) chunks would work", message):
        return int(found[1]), [[f"parallel.pipeline={found[1]}", "parallel.virtual_pipeline=1"]]
    if found := re.search(r"; (\[[\d, ]+\]) would work", message):
        return world_size, [[f"parallel.units_per_chunk={found[1].replace(' ', '')}"]]
    found = re.search(r"([\w.]+=\w+)(?: or ([\w.]+=\w+))? would work", message)
    return world_size, [[fix] for fix in found.groups() if fix] if found else []


@pytest.mark.parametrize(
    "key",
    [
        "parallel.tensor",
        "parallel.pipeline",
        "parallel.virtual_pipeline",
        "training.micro_batch_size",
        "training.global_batch_size",
    ],
)
def test_degrees_and_batches_are_at_least_one(key: str) -> None:
    for value in (0, -2):
        with pytest.raises(ConfigError, match=rf"{key}={value}: must be at least 1"):
            layout(1, f"{key}={value}")
    layout(1, f"{key}=1")


@pytest.mark.parametrize(("microbatches", "fits"), [(4, True), (8, True), (6, False), (2, False)])
def test_interleaved_schedule_needs_a_multiple_of_the_stages(microbatches: int, fits: bool) -> None:
    def build(virtual: int) -> Any:
        rows = microbatches * 2 * 2  # two data-parallel ranks, two rows in a microbatch
        batch = (f"training.global_batch_size={rows}", "training.micro_batch_size=2")
        return layout(8, "parallel.pipeline=4", f"parallel.virtual_pipeline={virtual}", SIXTEEN_LAYERS, *batch)

    build(1)
    if fits:
        assert build(2).num_chunks == 8
    else:
        with pytest.raises(ConfigError, match="interleaved"):
            build(2)


def test_sequence_lengths_matter_under_sequence_parallelism_only() -> None:
    layout(2, "parallel.tensor=2", "data.sequence_length=47", "parallel.sequence=false")
    layout(1, "data.sequence_length=47")
    with pytest.raises(ConfigError):
        layout(2, "parallel.tensor=2", "data.sequence_length=47")


# Ramp-up of the batch size -------------------------------------------------------------------------------------------

INTERLEAVED = ("parallel.pipeline=4", "parallel.virtual_pipeline=2", SIXTEEN_LAYERS)


@pytest.mark.parametrize(
    ("world_size", "overrides", "unit"),
    [
        (1, (), 1),
        (4, ("training.micro_batch_size=2",), 8),
        (8, ("parallel.tensor=2", "parallel.pipeline=2"), 2),
        (8, INTERLEAVED, 8),
        (24, (*INTERLEAVED, "training.micro_batch_size=4"), 96),  # no room for a ramp-up
    ],
)
@pytest.mark.parametrize("start", [1, 8, 12, 16, 90])
@pytest.mark.parametrize("increment", [1, 4, 8, 24, 80])
def test_every_batch_of_a_ramp_up_is_dealt_evenly(
    world_size: int, overrides: tuple[str, ...], unit: int, start: int, increment: int
) -> None:
    """Refused or not, what is said to work does, and leads to the global batch."""
    batch = ("training.global_batch_size=96", *overrides)

    def build(start: int, increment: int) -> None:
        ramp = (f"training.ramp_up.start={start}", f"training.ramp_up.increment={increment}")
        layout(world_size, *batch, *ramp)

    if start % unit == 0 and increment % unit == 0:
        build(start, increment)
        return
    with pytest.raises(ConfigError, match=r"training\.ramp_up") as error:
        build(start, increment)
    message = str(error.value)
    assert f"multiple of {unit} " in message
    if unit == 96:
        assert "training.ramp_up.start=0 (no ramp-up) would work" in message
        return
    found = re.search(r"ramp_up\.start=(\d+) with training\.ramp_up\.increment=(\d+) would work", message)
    assert found is not None
    fit_start, fit_increment = int(found[1]), int(found[2])
    assert 0 < fit_start < 96 and (96 - fit_start) % fit_increment == 0
    build(fit_start, fit_increment)
