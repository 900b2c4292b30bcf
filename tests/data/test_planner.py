import itertools
import json
from collections import Counter

import numpy as np
import pytest

from megatron_atum.data.index import SourceIndex
from megatron_atum.data.planner import Pack, Planner
from megatron_atum.errors import DataError

LENGTH = 100
WEIGHTS = {"web": 3.0, "pairs": 1.0}


def make_index(name: str, size: int, tokens: tuple[int, int], images: tuple[int, int], max_images: int) -> SourceIndex:
    random = np.random.default_rng(size)
    empty = np.zeros(0, np.int64)
    return SourceIndex(
        name=name,
        kind="documents",
        max_images=max_images,
        shards=("0.tar",),
        tokenizer_sha256="t",
        keys=np.array([f"{i:03d}".encode() for i in range(size)]),
        shard=np.zeros(size, np.int32),
        tokens=random.integers(*tokens, size).astype(np.int32),
        images=random.integers(*images, size).astype(np.int32),
        first_member=empty,
        member_offset=empty,
        member_size=empty,
    )


def indexes() -> list[SourceIndex]:
    return [make_index("web", 40, (10, 101), (0, 4), 6), make_index("pairs", 25, (8, 20), (1, 2), 5)]


def planner(seed: int = 1, weights: dict[str, float] | None = None, length: int = LENGTH) -> Planner:
    return Planner(indexes(), weights or WEIGHTS, length, seed)


def take(source: Planner, count: int) -> list[Pack]:
    return [source.next() for _ in range(count)]


def test_stream_is_a_function_of_the_seed():
    assert take(planner(), 50) == take(planner(), 50)
    assert take(planner(), 50) != take(planner(seed=2), 50)


def test_packs_are_numbered_and_within_limits():
    stream = planner()
    for number, pack in enumerate(take(stream, 200)):
        index = stream.indexes[pack.source]
        samples = list(pack.samples)
        assert pack.id == number and samples
        assert index.tokens[samples].sum() <= LENGTH and index.images[samples].sum() <= index.max_images


def test_packing_is_greedy_and_skips_nothing():
    """A pack ends only where the next sample of its source would not have fit."""
    stream = planner()
    packs = take(stream, 200)
    for source, index in enumerate(stream.indexes):
        mine = [list(pack.samples) for pack in packs if pack.source == source]
        for pack, following in itertools.pairwise(mine):
            larger = [*pack, following[0]]
            assert index.tokens[larger].sum() > LENGTH or index.images[larger].sum() > index.max_images


def test_every_epoch_shows_every_sample_once():
    stream = planner()
    for source, index in enumerate(stream.indexes):
        order = [sample for pack in take(stream, 400) if pack.source == source for sample in pack.samples]
        skip = (-stream_position(stream, source, len(order))) % len(index)
        epochs = [order[i : i + len(index)] for i in range(skip, len(order) - len(index), len(index))]
        assert len(epochs) > 1
        assert all(sorted(epoch) == list(range(len(index))) for epoch in epochs)
        assert epochs[0] != epochs[1]


def stream_position(stream: Planner, source: int, taken: int) -> int:
    """Samples of a source handed out before the last `taken`."""
    epoch, position, _ = stream.state_dict()["sources"][stream.indexes[source].name]
    return epoch * len(stream.indexes[source]) + position - taken


def test_shares_follow_the_weights():
    stream = planner()
    tokens: Counter[int] = Counter()
    for pack in take(stream, 1000):
        tokens[pack.source] += int(stream.indexes[pack.source].tokens[list(pack.samples)].sum())
    assert tokens[0] / tokens.total() == pytest.approx(0.75, abs=0.002)
    assert all(pack.source == 0 for pack in take(planner(weights={"web": 1.0, "pairs": 0.0}), 50))


@pytest.mark.parametrize("done", [0, 1, 17, 300])
def test_state_equals_replay(done: int):
    first = planner()
    take(first, done)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = planner()
    take(resumed, 5)  # whatever it did before
    resumed.load_state_dict(state)
    assert resumed.state_dict() == first.state_dict()
    assert take(resumed, 100) == take(first, 100)
    assert len(json.dumps(state)) < 500


@pytest.mark.parametrize(
    "other",
    [
        planner(seed=2),
        planner(weights={"web": 2.0, "pairs": 1.0}),
        planner(length=101),
        Planner(indexes()[:1], WEIGHTS, LENGTH, 1),
        Planner([indexes()[0], make_index("pairs", 26, (8, 20), (1, 2), 5)], WEIGHTS, LENGTH, 1),
    ],
    ids=["seed", "weights", "length", "sources", "samples"],
)
def test_state_of_another_stream_is_refused(other: Planner):
    with pytest.raises(DataError, match="another data stream"):
        planner().load_state_dict(other.state_dict())


def test_state_of_another_version_is_refused():
    with pytest.raises(DataError, match="version 99"):
        planner().load_state_dict(planner().state_dict() | {"version": 99})


def test_scale_of_the_weights_does_not_matter():
    assert planner(weights={"web": 75.0, "pairs": 25.0}).hash == planner().hash


@pytest.mark.parametrize("weights", [{"web": 1.0, "pairs": -1.0}, {"web": 0.0, "pairs": 0.0}])
def test_impossible_weights(weights: dict[str, float]):
    with pytest.raises(DataError, match="weights"):
        planner(weights=weights)


def test_sources_need_names_of_their_own():
    with pytest.raises(DataError, match="one name"):
        Planner([indexes()[0], indexes()[0]], WEIGHTS, LENGTH, 1)
    with pytest.raises(DataError, match="no data source"):
        Planner([], WEIGHTS, LENGTH, 1)
