"""Both attention paths against each other and against attention written out token by token in float64.

Legend: b rows, S tokens, I images of a row, N images of all rows, L latents, A heads, D head width, V latent width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_atum.batch import NO_IMAGE, Batch
from megatron_atum.errors import DataError
from megatron_atum.model.image_attention import (
    AttentionPlan,
    DensePlan,
    SegmentPlan,
    attend,
    dense_plan,
    make_plan,
    segment_plan,
    select_latents,
)

L, A, D = 3, 2, 4
X = NO_IMAGE

# name: which image of its row each token sees, and the images of each row
INDICES: dict[str, tuple[list[list[int]], list[int]]] = {
    "one image": ([[X, X, 0, 0, 0, 0]], [1]),
    "every token sees the image": ([[0, 0, 0, 0]], [1]),
    "ragged segments": ([[X, 0, 1, 1, 1, 1, 1, 2, 2, X]], [3]),
    "segments of equal length": ([[0, 0, 1, 1, 2, 2, 3, 3, 3]], [4]),
    "rows with 0, 2 and 1 images": ([[X, X, X, X], [0, 1, 1, X], [X, X, X, 0]], [0, 2, 1]),
    "row without an image in the middle": ([[0, 0, 0], [X, X, X], [0, 1, 1]], [1, 0, 2]),
    "no image at all": ([[X, X, X], [X, X, X]], [0, 0]),
    "images that no token sees": ([[X, 0, 0, 2, 2], [X, X, X, X, X]], [3, 1]),
    "no token sees any of the images": ([[X, X, X], [X, X, X]], [2, 1]),
    "next image": ([[0, 0, 1, 1, 1, 2, X, X], [0, 0, 0, 0, 0, 0, 0, 0]], [3, 1]),
    "indices decrease": ([[2, 2, 1, 0, 0, X]], [3]),
    "indices come back": ([[0, 1, 0, 2, X, 1, 0], [1, X, 1, X, 0, X, 1]], [3, 2]),
}


def random_indices(seed: int) -> tuple[list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    b, S = int(torch.randint(1, 4, (), generator=generator)), 20
    counts = torch.randint(0, 7, (b,), generator=generator).tolist()
    return [torch.randint(-1, n, (S,), generator=generator).tolist() if n else [X] * S for n in counts], counts


INDICES |= {f"random {seed}": random_indices(seed) for seed in range(6)}
Case = tuple[list[list[int]], list[int]]
cases = pytest.mark.parametrize("case", INDICES.values(), ids=INDICES.keys())


def plan_tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """image_index [b,S], images_per_row [b] and the equivalent mask [b,S,I]."""
    index_bS, counts_b = torch.tensor(case[0]), torch.tensor(case[1])
    return index_bS, counts_b, F.one_hot(index_bS + 1, int(counts_b.max()) + 1)[..., 1:].bool()


def both_plans(case: Case) -> dict[str, AttentionPlan]:
    index_bS, counts_b, mask_bSI = plan_tensors(case)
    return {"segments": segment_plan(index_bS, counts_b), "dense": dense_plan(mask_bSI, counts_b)}


def random_inputs(mask_bSI: Tensor, counts_b: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query [S,b,A,D], key and value [N,L,A,D], float64."""
    generator = torch.Generator().manual_seed(seed)
    b, S, _ = mask_bSI.shape
    shapes = ((S, b, A, D), (int(counts_b.sum()), L, A, D), (int(counts_b.sum()), L, A, D))
    query, key, value = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query, key, value


def naive(query_SbAD: Tensor, key_NLAD: Tensor, value_NLAD: Tensor, mask_bSI: Tensor, counts_b: Tensor) -> Tensor:
    """Attention of one token and one head at a time."""
    S, b = query_SbAD.shape[:2]
    first_b = (counts_b.cumsum(0) - counts_b).tolist()
    out_SbAD = torch.zeros_like(query_SbAD)
    for s, row, head in itertools.product(range(S), range(b), range(A)):
        seen = [first_b[row] + i for i in range(int(counts_b[row])) if mask_bSI[row, s, i]]
        if seen:
            keys, values = key_NLAD[seen, :, head].flatten(0, 1), value_NLAD[seen, :, head].flatten(0, 1)
            weights = torch.softmax(keys @ query_SbAD[s, row, head] / math.sqrt(D), dim=0)
            out_SbAD[s, row, head] = weights @ values
    return out_SbAD


def output_and_gradients(
    inputs: tuple[Tensor, Tensor, Tensor], attention: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Output, and gradients of query, key and value for a fixed random upstream gradient."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    # nothing is connected to the output when no token sees an image
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype), materialize_grads=True)]


def through(plan: AttentionPlan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda query, key, value: attend(query, select_latents(key, plan), select_latents(value, plan), plan)


def assert_equal(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, x, y in zip(("output", "query", "key", "value"), ours, expected, strict=True):
        assert x.shape == y.shape, name
        torch.testing.assert_close(x.double(), y, rtol=0.0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
def test_both_paths_equal_the_naive_reference(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    _, counts_b, mask_bSI = plan_tensors(case)
    inputs = random_inputs(mask_bSI, counts_b, seed=len(case[0][0]))
    expected = output_and_gradients(inputs, lambda q, k, v: naive(q, k, v, mask_bSI, counts_b) + 0 * q)
    query, key, value = (x.to(dtype) for x in inputs)
    for plan in both_plans(case).values():
        assert_equal(output_and_gradients((query, key, value), through(plan)), expected, tolerance)


@pytest.mark.parametrize("seed", range(6))
def test_several_images_per_token(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts_b = torch.randint(0, 5, (3,), generator=generator)
    # room for more images than there are, and marks there that must not count
    mask_bSI = torch.rand(3, 8, 6, generator=generator) > 0.6
    inputs = random_inputs(mask_bSI, counts_b, seed)
    expected = output_and_gradients(inputs, lambda q, k, v: naive(q, k, v, mask_bSI, counts_b) + 0 * q)
    assert_equal(output_and_gradients(inputs, through(dense_plan(mask_bSI, counts_b))), expected, 1e-12)


def test_a_mask_may_be_of_integers() -> None:
    mask_bSI, counts_b = torch.tensor([[[1, 0], [0, 1], [0, 0]]]), torch.tensor([2])
    inputs = random_inputs(mask_bSI, counts_b)
    as_integers, as_bool = (through(dense_plan(m, counts_b))(*inputs) for m in (mask_bSI, mask_bSI.bool()))
    assert torch.equal(as_integers, as_bool)


@cases
def test_tokens_without_an_image_get_exactly_zero(case: Case) -> None:
    index_bS, counts_b, mask_bSI = plan_tensors(case)
    inputs = random_inputs(mask_bSI, counts_b)
    for plan in both_plans(case).values():
        out_bSAD = through(plan)(*inputs).transpose(0, 1)
        assert (out_bSAD[index_bS == NO_IMAGE] == 0).all()
        assert (out_bSAD[index_bS != NO_IMAGE] != 0).all()


@cases
def test_exchanging_an_image_changes_exactly_the_tokens_that_see_it(case: Case) -> None:
    _, counts_b, mask_bSI = plan_tensors(case)
    query, key, value = random_inputs(mask_bSI, counts_b)
    images = [(row, i) for row, n in enumerate(counts_b.tolist()) for i in range(n)]
    for plan in both_plans(case).values():
        before_SbAD = through(plan)(query, key, value)
        for n, (row, i) in enumerate(images):
            other_key, other_value = key.clone(), value.clone()
            other_key[n], other_value[n] = torch.randn(2, L, A, D, dtype=torch.float64)
            after_SbAD = through(plan)(query, other_key, other_value)
            sees_Sb = torch.zeros(query.shape[:2], dtype=torch.bool)
            sees_Sb[:, row] = mask_bSI[row, :, i]
            assert torch.equal((after_SbAD != before_SbAD).any(-1).any(-1), sees_Sb)


@pytest.mark.parametrize("name", ["no image at all", "no token sees any of the images", "images that no token sees"])
@pytest.mark.parametrize("path", ["segments", "dense"])
def test_hooks_fire_without_images(name: str, path: str) -> None:
    """Every microbatch must reach every trainable weight, or the overlapped gradient reduction waits for ever."""
    case = INDICES[name]
    _, counts_b, mask_bSI = plan_tensors(case)
    plan = both_plans(case)[path]
    query, _, _ = random_inputs(mask_bSI, counts_b)
    V = 5
    weights = {x: torch.randn(A * D, width, dtype=torch.float64) for x, width in (("q", A * D), ("k", V), ("v", V))}
    fired = set()
    for x, weight in weights.items():
        weight.requires_grad_().register_hook(lambda gradient, x=x: fired.add(x))
    latents_KLV = select_latents(torch.randn(int(counts_b.sum()), L, V, dtype=torch.float64), plan)
    key, value = (F.linear(latents_KLV, weights[x]).unflatten(-1, (A, D)) for x in "kv")
    attend(F.linear(query.flatten(2), weights["q"]).view_as(query), key, value, plan).square().sum().backward()
    assert fired == set("qkv")
    if name != "images that no token sees":
        assert all((weight.grad == 0).all() for weight in weights.values())


@pytest.mark.parametrize("path", ["segments", "dense"])
def test_hooks_of_empty_keys_and_values_fire(path: str) -> None:
    plan = both_plans(INDICES["no image at all"])[path]
    fired = []
    query = torch.randn(3, 2, A, D)
    key, value = (torch.randn(0, L, A, D, requires_grad=True) for _ in "kv")
    for name, leaf in (("key", key), ("value", value)):
        leaf.register_hook(lambda gradient, name=name: fired.append(name))
    attend(query, key, value, plan).sum().backward()
    assert sorted(fired) == ["key", "value"]


@pytest.mark.parametrize(
    ("index", "counts"),
    [([[0, 1, 2]], [2]), ([[X, 0, 0]], [0]), ([[X, X], [X, 0]], [1, 0]), ([[1, 0], [0, 0]], [1, 1])],
    ids=["beyond the last", "no image in the row", "row without, image before", "image of the next row"],
)
def test_an_index_beyond_the_images_of_its_row_is_an_error(index: list[list[int]], counts: list[int]) -> None:
    with pytest.raises(DataError, match="image_index >= images_per_row"):
        segment_plan(torch.tensor(index), torch.tensor(counts))


def test_more_images_than_the_mask_has_room_for_is_an_error() -> None:
    with pytest.raises(DataError, match="a row has 3 images, but image_attention_mask has room for 2"):
        dense_plan(torch.ones(2, 4, 2, dtype=torch.bool), torch.tensor([1, 3]))


def batch_of(case: Case, mask_bSI: Tensor | None) -> Batch:
    index_bS, counts_b, _ = plan_tensors(case)
    ids, ones = torch.zeros_like(index_bS), torch.ones(index_bS.shape)
    return Batch(
        input_ids=ids,
        labels=ids,
        loss_mask=ones,
        z_mask=ones,
        position_ids=ids,
        pixels=torch.zeros(0, 3, 4, 4),
        image_index=index_bS,
        images_per_row=counts_b,
        source=("a",) * len(index_bS),
        pack_ids=torch.arange(len(index_bS)),
        image_attention_mask=mask_bSI,
    )


def test_the_dense_path_is_only_for_batches_with_a_mask() -> None:
    case = INDICES["ragged segments"]
    _, _, mask_bSI = plan_tensors(case)
    assert isinstance(make_plan(batch_of(case, None)), SegmentPlan)
    assert isinstance(make_plan(batch_of(case, mask_bSI)), DensePlan)


def test_images_with_equally_many_tokens_share_one_product() -> None:
    index_bS, counts_b, _ = plan_tensors(INDICES["segments of equal length"])
    assert segment_plan(index_bS, counts_b).groups == ((3, 2), (1, 3))


def test_only_images_that_are_seen_are_projected() -> None:
    index_bS, counts_b, _ = plan_tensors(INDICES["images that no token sees"])
    seen = select_latents(torch.arange(4), segment_plan(index_bS, counts_b))
    assert sorted(seen.tolist()) == [0, 2]
