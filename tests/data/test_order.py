from __future__ import annotations

import numpy as np
import pytest

from megatron_atum.data import order
from megatron_atum.data.flags import mask_of
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.order import Epoch, Group
from tests.data.conftest import fake_index, fake_sidecar, random_index

SHARDS = [30, 0, 50, 20, 40, 60, 0]


@pytest.fixture(autouse=True)
def single_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SMALL", 1)


def source() -> SourceIndex:
    return random_index("web", SHARDS, (10, 100), (0, 5))


def groups(index: SourceIndex, seed: int = 1, number: int = 0, group_samples: int = 70, row: int = 100) -> list[Group]:
    epoch = Epoch(index, seed, number, group_samples)
    return [epoch.group(group, row) for group in range(len(epoch))]


def samples(found: list[Group]) -> list[int]:
    return [sample for group in found for sample in group.samples.tolist()]


def test_an_epoch_has_every_sample_once() -> None:
    for group_samples in (1, 7, 70, 199, 200, 10**6):
        for number in range(3):
            found = groups(source(), number=number, group_samples=group_samples)
            assert sorted(samples(found)) == list(range(sum(SHARDS)))


def test_numbers_belong_to_their_samples() -> None:
    index = source()
    for group in groups(index):
        for sample, tokens, images in zip(group.samples, group.tokens, group.images, strict=True):
            _, sidecar, row = index.sample(int(sample))
            assert (tokens, images) == (sidecar.tokens[row], sidecar.images[row])


def test_groups_hold_whole_shards_and_enough_samples() -> None:
    index = source()
    found = groups(index, group_samples=70)
    shards = [{index.locate(sample)[0] for sample in group.samples.tolist()} for group in found]
    assert sum(len(one) for one in shards) == len(set().union(*shards)) == 5
    assert len(found) > 1 and all(70 - 60 < len(group.samples) < 70 + 60 for group in found[:-1])


def test_shards_and_samples_are_shuffled_anew_in_each_epoch() -> None:
    orders = [samples(groups(source(), seed=seed, number=number)) for seed in (1, 2) for number in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert samples(groups(source())) == orders[0]
    first = groups(source())[0].samples
    assert not np.array_equal(first, np.sort(first))


def test_shards_are_read_in_another_order_in_each_epoch() -> None:
    def shards(number: int) -> tuple[int, ...]:
        index = random_index("web", [5] * 8, (10, 100), (0, 5))
        return tuple(index.locate(int(group.samples[0]))[0] for group in groups(index, number=number, group_samples=1))

    orders = {shards(number) for number in range(5)}
    assert len(orders) == 5 and tuple(range(8)) not in orders


def test_samples_of_a_group_are_mixed() -> None:
    """Each quarter of a group has samples of all its shards."""
    index = random_index("web", [100] * 4, (10, 100), (0, 5))
    (group,) = groups(index, group_samples=400)
    for quarter in np.split(group.samples, 4):
        assert {index.locate(int(sample))[0] for sample in quarter} == {0, 1, 2, 3}


def test_dropped_samples_are_left_out() -> None:
    flags = [0, mask_of(["no_image"]), mask_of(["bad_json"]), mask_of(["few_tokens", "no_image"]), 0]
    sidecar = fake_sidecar("documents", [9, 9, 0, 9, 9], [[], [], [], [], []], flags)
    for filters, kept in (([], [0, 1, 3, 4]), (["no_image"], [0, 4]), (["few_tokens"], [0, 1, 4])):
        index = fake_index("web", [sidecar], filters=filters)
        assert sorted(samples(groups(index))) == kept and index.usable == len(kept)
        assert all(group.dropped == {} for group in groups(index))


def test_pairs_that_do_not_fit_are_left_out_and_counted() -> None:
    places = [[2], [2], [2], [2, 4, 6], [2, 4, 6]]
    sidecar = fake_sidecar("pairs", [20, 21, 40, 20, 50], places)
    (group,) = groups(fake_index("pairs", [sidecar], "pairs", max_images=2), row=20)
    assert group.samples.tolist() == [0] and group.dropped == {"too_long": 3, "too_many_images": 1}
    (group,) = groups(fake_index("documents", [sidecar], max_images=2), row=20)  # documents are cut
    assert sorted(group.samples.tolist()) == [0, 1, 2, 3, 4] and group.dropped == {}


def test_a_small_source_is_shuffled_several_times_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SMALL", 500)
    index = source()
    (group,) = groups(index, group_samples=10**6)
    passes = group.samples.reshape(-1, len(index))
    assert Epoch(index, 1, 0, 70).passes == len(passes) == 3
    assert all(sorted(one) == list(range(len(index))) for one in passes.tolist())
    assert len(set(map(tuple, passes.tolist()))) == 3
