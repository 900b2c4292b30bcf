"""Where the values of a tensor rank lie in the Hugging Face tensors, for every rule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_atum.checkpoint.rules import (
    Box,
    Fused,
    HeadsInterleaved,
    Replicated,
    Rule,
    Split,
    Vocabulary,
    is_split,
    runs,
)
from megatron_atum.model.vocabulary import padded_vocabulary

# name: rule, shape of each tensor, how many tensors
RULES: dict[str, tuple[Rule, tuple[int, ...], int]] = {
    "replicated": (Replicated(), (5, 3), 1),
    "replicated gate": (Replicated(), (1, 1, 6), 1),
    "columns": (Split(0), (8, 3), 1),
    "column bias": (Split(0), (8,), 1),
    "rows": (Split(1), (3, 8), 1),
    "fused": (Fused(), (8, 3), 2),
    "three fused": (Fused(3), (12, 2), 3),
    "heads": (HeadsInterleaved(4), (12, 12), 3),
    "heads of width 1": (HeadsInterleaved(4), (4, 5), 3),
    "head biases": (HeadsInterleaved(4), (12,), 3),
    "heads on every rank": (HeadsInterleaved(4, split=False), (12, 5), 3),
    "vocabulary": (Vocabulary(), (96, 4), 1),
    "odd vocabulary": (Vocabulary(), (97, 4), 1),
    "vocabulary that leaves a rank without rows": (Vocabulary(), (5, 2), 1),
}


def numbered(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """Tensors in which every value is another one."""
    size = math.prod(shape)
    return [torch.arange(1, size + 1).reshape(shape) + part * size for part in range(count)]


def boxes(
    rule: Rule, shape: tuple[int, ...], rank: int, size: int, start: int = 0, stop: int | None = None
) -> list[Box]:
    geometry = rule.geometry(shape, rank, size)
    return list(geometry.boxes(shape, start, math.prod(geometry.dims) if stop is None else stop))


def place(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))


def local(rule: Rule, tensors: list[Tensor], rank: int, size: int) -> Tensor:
    """What a tensor rank holds, with the dimensions of the rule; padding is 0."""
    shape = tuple(tensors[0].shape)
    dims = rule.geometry(shape, rank, size).dims
    flat = torch.zeros(math.prod(dims), dtype=tensors[0].dtype)
    for box in boxes(rule, shape, rank, size):
        view = box.view(flat)
        view.copy_(tensors[box.part][place(box)].reshape(view.shape))
    return flat.view(dims)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", RULES)
def test_all_ranks_together_hold_every_value_once(name: str, size: int) -> None:
    rule, shape, count = RULES[name]
    tensors = numbered(shape, count)
    shards = [local(rule, tensors, rank, size) for rank in range(size)]
    held = torch.cat([shard.flatten() for shard in (shards if is_split(rule) else shards[:1])])
    assert torch.equal(held[held != 0].sort().values, torch.cat([t.flatten() for t in tensors]))
    assert len({shard.shape for shard in shards}) == 1


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", RULES)
def test_any_run_of_values_is_found_in_the_tensors(name: str, size: int) -> None:
    """Every start and stop of a shard, as the distributed optimizer may cut it."""
    rule, shape, count = RULES[name]
    tensors = numbered(shape, count)
    for rank in range(size):
        flat = local(rule, tensors, rank, size).flatten()
        for start in range(flat.numel()):
            ends = {start + 1, start + 2, (start + flat.numel()) // 2, flat.numel()}
            for stop in (end for end in ends if start < end <= flat.numel()):
                found = torch.zeros_like(flat)
                for box in boxes(rule, shape, rank, size, start, stop):
                    view = box.view(found)
                    assert not view.any()  # no value twice
                    view.copy_(tensors[box.part][place(box)].reshape(view.shape))
                assert torch.equal(found[start:stop], flat[start:stop])
                assert not found[:start].any() and not found[stop:].any()


def test_query_key_and_value_of_a_head_lie_side_by_side() -> None:
    """Row n of the query is 100 n, of the key 100 n + 1, of the value 100 n + 2; heads are 3 rows wide."""
    tensors = [(torch.arange(12) * 100 + part)[:, None].repeat(1, 2) for part in range(3)]
    for size in (1, 2, 4):
        for rank in range(size):
            rows = local(HeadsInterleaved(4), tensors, rank, size).flatten(0, 2)[:, 0].tolist()
            heads = range(rank * 4 // size, (rank + 1) * 4 // size)
            assert rows == [100 * (3 * head + row) + part for head in heads for part in range(3) for row in range(3)]


def test_fused_parts_lie_one_behind_the_other_on_each_rank() -> None:
    gate, up = torch.arange(8)[:, None], torch.arange(8)[:, None] + 100
    assert local(Fused(), [gate, up], 1, 2).flatten().tolist() == [4, 5, 6, 7, 104, 105, 106, 107]


def test_column_and_row_shares() -> None:
    table = torch.arange(16).reshape(4, 4)
    assert torch.equal(local(Split(0), [table], 1, 2), table[2:])
    assert torch.equal(local(Split(1), [table], 1, 2), table[:, 2:])


@pytest.mark.parametrize(("rows", "size"), [(97, 2), (97, 4), (96, 4), (5, 4), (3, 4)])
def test_the_padding_of_a_vocabulary_is_as_the_model_has_it(rows: int, size: int) -> None:
    table = torch.ones(rows, 3)
    together = torch.cat([local(Vocabulary(), [table], rank, size) for rank in range(size)])
    assert together.shape[0] == padded_vocabulary(rows, size)
    assert torch.equal(together[:rows], table)
    assert not together[rows:].any()


@pytest.mark.parametrize("dims", [(7,), (3, 4), (2, 3, 4), (1, 1, 5), (2, 1, 3, 2), ()])
def test_runs_are_few_and_cover_what_is_asked(dims: tuple[int, ...]) -> None:
    size = math.prod(dims)
    numbers = torch.arange(size).reshape(dims)
    for start in range(size):
        for stop in range(start + 1, size + 1):
            found = []
            for first, offsets, sizes in runs(dims, start, stop):
                values = numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten()
                assert values.tolist() == list(range(first, first + len(values)))
                found += values.tolist()
            assert found == list(range(start, stop))
            assert len(list(runs(dims, start, stop))) <= max(1, 2 * len(dims) - 1)
    assert list(runs(dims, 0, 0)) == []
