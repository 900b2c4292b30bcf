"""Every rule and its inverse, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_atum.checkpoint.rules import Fused, HeadsInterleaved, Replicated, Rule, Split, Vocabulary
from megatron_atum.model.vocabulary import padded_vocabulary

# name: rule, shape of each tensor, how many tensors
RULES: dict[str, tuple[Rule, tuple[int, ...], int]] = {
    "replicated": (Replicated(), (5, 3), 1),
    "replicated of another shape": (Replicated(shape=(6,), hf_shape=(1, 1, 6)), (1, 1, 6), 1),
    "columns": (Split(0), (8, 3), 1),
    "column bias": (Split(0), (8,), 1),
    "rows": (Split(1), (3, 8), 1),
    "fused": (Fused(), (8, 3), 2),
    "three fused": (Fused(3), (12, 2), 3),
    "heads": (HeadsInterleaved(4), (12, 12), 3),
    "heads of width 1": (HeadsInterleaved(4), (4, 5), 3),
    "head biases": (HeadsInterleaved(4), (12,), 3),
    "heads on every rank": (HeadsInterleaved(4, split=False), (12, 5), 3),
    "vocabulary": (Vocabulary(96), (96, 4), 1),
    "odd vocabulary": (Vocabulary(97), (97, 4), 1),
    "vocabulary that leaves a rank without rows": (Vocabulary(5), (5, 2), 1),
}


def drawn(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", RULES)
def test_the_inverse_is_exact(name: str, size: int, dtype: torch.dtype) -> None:
    rule, shape, count = RULES[name]
    tensors = drawn(shape, count, dtype)
    shards = [rule.to_local(tensors, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    whole = rule.to_full(shards)
    assert len(whole) == count
    for tensor, again in zip(tensors, whole, strict=True):
        assert again.shape == tensor.shape and again.dtype == dtype
        assert torch.equal(again, tensor)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["columns", "rows", "fused", "heads", "vocabulary", "odd vocabulary"])
def test_ranks_share_without_repeating(name: str, size: int) -> None:
    rule, shape, count = RULES[name]
    tensors = drawn(shape, count, torch.float32)
    values = torch.cat([rule.to_local(tensors, rank, size).flatten() for rank in range(size)])
    assert torch.equal(values[values != 0].sort().values, torch.cat([t.flatten() for t in tensors]).sort().values)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_query_key_and_value_of_a_head_lie_side_by_side(size: int) -> None:
    """Row n of the query is 100 n, of the key 100 n + 1, of the value 100 n + 2; heads are 3 rows wide."""
    rule = HeadsInterleaved(4)
    tensors = [(torch.arange(12) * 100 + part)[:, None].repeat(1, 2) for part in range(3)]
    for rank in range(size):
        rows = rule.to_local(tensors, rank, size)[:, 0].tolist()
        heads = range(rank * 4 // size, (rank + 1) * 4 // size)
        assert rows == [100 * (3 * head + row) + part for head in heads for part in range(3) for row in range(3)]


def test_fused_parts_lie_one_behind_the_other_on_each_rank() -> None:
    gate, up = torch.arange(8)[:, None], torch.arange(8)[:, None] + 100
    assert Fused().to_local([gate, up], 1, 2)[:, 0].tolist() == [4, 5, 6, 7, 104, 105, 106, 107]


def test_column_and_row_shares() -> None:
    table = torch.arange(16).reshape(4, 4)
    assert torch.equal(Split(0).to_local([table], 1, 2), table[2:])
    assert torch.equal(Split(1).to_local([table], 1, 2), table[:, 2:])


@pytest.mark.parametrize(("rows", "size"), [(97, 2), (97, 4), (96, 4), (5, 4), (3, 4)])
def test_the_padding_of_a_vocabulary_is_zero_and_as_the_model_has_it(rows: int, size: int) -> None:
    table = torch.ones(rows, 3)
    shards = [Vocabulary(rows).to_local([table], rank, size) for rank in range(size)]
    together = torch.cat(shards)
    assert together.shape[0] == padded_vocabulary(rows, size)
    assert torch.equal(together[:rows], table)
    assert not together[rows:].any()
