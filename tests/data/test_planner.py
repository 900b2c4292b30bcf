from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.config.schema import SourceConfig
from megatron_atum.config.validate import _CHOICES
from megatron_atum.data import order, planner, stream
from megatron_atum.data.index import SourceIndex, open_source
from megatron_atum.data.mixture import MIXTURES, shares
from megatron_atum.data.planner import ON_CHANGE, Pack, Planner
from megatron_atum.data.storage import Storage
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError
from tests.data.conftest import random_index, write_index

LENGTH = 100
SHARES = {"web": 0.75, "pairs": 0.25}


@pytest.fixture(autouse=True)
def short_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SMALL", 1)
    monkeypatch.setattr(stream, "WINDOW", 25)


def web(last: int = 30, **changes: Any) -> SourceIndex:
    return random_index("web", [40, 20, last], (10, 160), (0, 9), **changes)


def pairs(name: str = "pairs") -> SourceIndex:
    return random_index(name, [25, 35], (8, 20), (1, 2), "pairs", 5)


def make(
    indexes: list[SourceIndex] | None = None,
    weights: dict[str, float] | None = None,
    length: int = LENGTH,
    seed: int = 1,
    group_samples: int = 30,
) -> Planner:
    return Planner(indexes or [web(), pairs()], weights or SHARES, length, seed, group_samples)


def take(source: Planner, count: int) -> list[Pack]:
    return [source.next() for _ in range(count)]


def stored(source: Planner) -> dict[str, Any]:
    """Its state, as it comes back from a checkpoint."""
    return json.loads(json.dumps(source.state_dict()))


def test_stream_is_a_function_of_its_arguments() -> None:
    packs = take(make(), 80)
    assert take(make(), 80) == packs
    others = [
        make(seed=2),
        make(length=101),
        make(group_samples=70),
        make(weights={"web": 0.5, "pairs": 0.5}),
        make([web(31), pairs()]),
        make([web(max_images=7), pairs()]),
    ]
    assert all(take(other, 80) != packs for other in others)
    assert len({make().hash, *(other.hash for other in others)}) == len(others) + 1


def test_packs_are_numbered_and_within_limits() -> None:
    one = make()
    for number, pack in enumerate(take(one, 300)):
        index = one.indexes[pack.source]
        assert pack.id == number and pack.samples
        assert 0 < pack.tokens <= LENGTH and pack.images <= index.max_images
        if not pack.cuts:
            rows = [index.sample(sample)[1:] for sample in pack.samples]
            assert pack.tokens == sum(int(sidecar.tokens[row]) for sidecar, row in rows)
            assert pack.images == sum(int(sidecar.images[row]) for sidecar, row in rows)


def test_sources_do_not_change_each_other() -> None:
    """The rows of a source are the same whatever the others are, and however much they get."""
    alone = [(pack.samples, pack.cuts) for pack in take(make([web()]), 100)]
    for other in (
        make(),
        make(weights={"web": 0.3, "pairs": 0.7}),
        make([pairs("more"), web()], {"more": 0.5} | SHARES),
    ):
        place = [index.name for index in other.indexes].index("web")
        mine = [(pack.samples, pack.cuts) for pack in take(other, 400) if pack.source == place]
        assert mine[:100] == alone[: len(mine)]


def test_every_epoch_shows_every_sample_once() -> None:
    one = make()
    seen: dict[tuple[int, int], list[int]] = {}
    for _ in range(600):
        pack = one.next()
        seen.setdefault((pack.source, one.streams[pack.source].position.epoch), []).extend(pack.samples)
    for (source, epoch), samples in seen.items():
        if epoch < one.streams[source].position.epoch:
            assert sorted(samples) == list(range(len(one.indexes[source])))
    assert min(one.streams[source].position.epoch for source in (0, 1)) > 1


@pytest.fixture(scope="module")
def published() -> list[SourceIndex]:
    """Four sources, captions about 20 times as short as documents."""
    return [
        random_index("obelics", [4000] * 3, (20, 129), (0, 5), max_images=20),
        random_index("wikipedia", [1500, 500], (30, 140), (0, 5), max_images=20),
        random_index("laion", [5000] * 4, (5, 9), (1, 2), "pairs", 30),
        random_index("pmd", [2000], (5, 8), (1, 2), "pairs", 30),
    ]


def test_shares_of_the_published_mixture(published: list[SourceIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 0.1 % after 20000 packs, as far as rows go, which do not hold the same number of tokens."""
    monkeypatch.setattr(stream, "WINDOW", 4096)
    wanted = shares([SourceConfig(index.name, "x") for index in published], "published", {})
    one = Planner(published, wanted, 128, 3, 8192)
    tokens: Counter[str] = Counter()
    for number in range(20_000):
        pack = one.next()
        tokens[published[pack.source].name] += pack.tokens
        if number in (5_000, 19_999):
            found = {name: 100 * count / tokens.total() for name, count in tokens.items()}
            assert found == pytest.approx({name: share.tokens for name, share in PUBLISHED.items()}, abs=0.1)
    assert one.tokens() == dict(tokens)


PUBLISHED = MIXTURES["published"]


def test_weights_of_samples_would_give_other_shares(published: list[SourceIndex]) -> None:
    tokens = {index.name: PUBLISHED[index.name].tokens * index.tokens / index.usable for index in published}
    found = {name: 100 * count / sum(tokens.values()) for name, count in tokens.items()}
    assert found["obelics"] > 85 and found["laion"] < 5


@pytest.fixture
def edges() -> list[int]:
    """Numbers of packs around which a window, a group or an epoch of some source ends."""
    one, found, last = make(), [0, 1, 2, 150], [(0, 0, 0)] * 2
    for number in range(150):
        one.next()
        places = [(at.epoch, at.group, at.window) for at in (source.position for source in one.streams)]
        if places != last:
            found, last = [*found, number, number + 1], places
    return sorted(set(found))


def test_state_equals_replay(edges: list[int]) -> None:
    packs = take(make(), 220)
    one, used = make(), make()
    assert len(edges) > 15
    for done, pack in enumerate(packs[:151]):
        if done in edges:
            for resumed in (make(), used):  # whatever it did before
                resumed.load_state_dict(stored(one))
                assert resumed.state_dict() == one.state_dict() and resumed.tokens() == one.tokens()
                assert take(resumed, 60) == packs[done : done + 60]
        assert one.next() == pack


def test_state_of_a_finished_run_of_resumes() -> None:
    """Resumed after every pack, the stream is the same."""
    packs, state = [], stored(make())
    for _ in range(60):
        one = make()
        one.load_state_dict(state)
        packs.append(one.next())
        state = stored(one)
    assert packs == take(make(), 60)


def test_state_is_bounded(published: list[SourceIndex]) -> None:
    one = Planner(published, {name: share.tokens / 100 for name, share in PUBLISHED.items()}, 120, 3, 4096)
    take(one, 500)
    assert len(json.dumps(one.state_dict())) < 1500
    many = [random_index(f"source {number:030d}", [3], (9, 10), (1, 2)) for number in range(100)]
    one = make(many, {index.name: 0.01 for index in many})
    take(one, 300)
    assert len(json.dumps(one.state_dict())) < 64 << 10


OTHERS: dict[str, tuple[Callable[[], Planner], str]] = {
    "seed": (lambda: make(seed=2), "source web changed .*; source pairs changed"),
    "length": (lambda: make(length=101), "source web changed .*; source pairs changed"),
    "shuffle": (lambda: make(group_samples=70), "source web changed"),
    "samples": (lambda: make([web(31), pairs()]), r"stream: source web changed \(its shards, filters"),
    "images": (lambda: make([web(max_images=7), pairs()]), "stream: source web changed"),
    "new": (lambda: make([web(), pairs(), pairs("more")], {"more": 0.5} | SHARES), "stream: source more is gone"),
    "gone": (lambda: make([web()]), "stream: source pairs is new"),
    "weights": (lambda: make(weights={"web": 0.5, "pairs": 0.5}), "stream: the weights or their order changed"),
    "order": (lambda: make([pairs(), web()]), "stream: the weights or their order changed"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_state_of_another_stream_is_refused(what: str) -> None:
    other, text = OTHERS[what]
    one = make()
    packs = take(one, 10)
    with pytest.raises(DataError, match=f"data state belongs to another data .*{text}") as error:
        one.load_state_dict(stored(other()))
    assert "data.on_change=continue or restart" in str(error.value)
    assert take(one, 10) == take(make(), 20)[len(packs) :]  # it stayed where it was


@pytest.mark.parametrize("what", OTHERS)
def test_restart_begins_at_the_first_pack(what: str) -> None:
    before = OTHERS[what][0]()
    take(before, 70)
    one = make()
    take(one, 5)
    one.load_state_dict(stored(before), "restart")
    assert take(one, 50) == take(make(), 50)
    assert (one.state_dict()["packs"], one.rows) == (50, 120)  # the rows of the run go on
    again = make()
    again.load_state_dict(stored(one))
    assert again.rows == 120


@pytest.mark.parametrize("on_change", ON_CHANGE)
def test_the_same_stream_goes_on_whatever_is_asked_for(on_change: str) -> None:
    before = make()
    take(before, 70)
    one = make()
    one.load_state_dict(stored(before), on_change)
    assert take(one, 50) == take(before, 50)


def test_a_state_without_rows_is_one_that_was_never_restarted() -> None:
    before = make()
    take(before, 70)
    old = {key: value for key, value in stored(before).items() if key != "rows"}
    for state, on_change in ((old, "error"), (old | {"hash": "x"}, "continue"), (old | {"hash": "x"}, "restart")):
        one = make()
        one.load_state_dict(state, on_change)
        assert one.rows == 70
    assert one.state_dict()["packs"] == 0


def test_continue_goes_on_with_what_is_unchanged() -> None:
    before = make([web(), pairs(), pairs("gone")], {"gone": 0.2, "web": 0.5, "pairs": 0.3})
    packs = take(before, 200)
    one = make([pairs("new"), web(31), pairs()], {"new": 0.25, "web": 0.5, "pairs": 0.25})
    one.load_state_dict(stored(before), "continue")
    following = take(one, 200)
    assert [pack.id for pack in following] == list(range(200, 400))
    rows = {
        name: [pack.samples for pack in following if pack.source == n] for n, name in enumerate(("new", "web", "pairs"))
    }
    done = sum(pack.source == 1 for pack in packs)
    assert rows["pairs"] == rows_of(pairs(), done + len(rows["pairs"]))[done:]  # goes on
    assert rows["web"] == rows_of(web(31), len(rows["web"])) and rows["new"] == rows_of(pairs("new"), len(rows["new"]))
    counts: Counter[str] = Counter()  # what came before does not count
    for pack in following:
        counts[one.indexes[pack.source].name] += pack.tokens
    total = counts.total()
    assert {name: count / total for name, count in counts.items()} == pytest.approx(
        {"new": 0.25, "web": 0.5, "pairs": 0.25}, abs=0.01
    )


def rows_of(index: SourceIndex, count: int) -> list[tuple[int, ...]]:
    return [pack.samples for pack in take(make([index], {index.name: 1.0}), count)]


def test_continue_with_other_weights_replays_nothing() -> None:
    before = make()
    first = take(before, 60)
    one = make(weights={"web": 0.25, "pairs": 0.75})
    one.load_state_dict(stored(before), "continue")
    following = take(one, 60)
    for source, index in enumerate((web(), pairs())):
        mine = [pack.samples for pack in [*first, *following] if pack.source == source]
        assert mine == rows_of(index, len(mine))
    resumed = make(weights={"web": 0.25, "pairs": 0.75})  # and its own state is one like any other
    resumed.load_state_dict(stored(one))
    assert take(resumed, 20) == take(one, 20)


@pytest.mark.parametrize(
    "state",
    [
        None,
        7,
        [],
        {},
        {"version": 2},
        {"version": 2, "hash": "x"},
        {"version": 2, "hash": None, "packs": 3, "sources": []},
        {"version": 2, "hash": None, "packs": 3, "sources": {"web": [], "pairs": []}},
        {"version": 2, "hash": None, "packs": 3, "sources": {"web": ["x", [0, 0]], "pairs": ["x", [0, 0]]}},
        {"version": 2, "hash": None, "packs": "x", "sources": {"web": [0, 0], "pairs": [0, 0]}},
    ],
)
def test_what_is_no_state(state: Any) -> None:
    one = make()
    if isinstance(state, dict) and "hash" in state and state["hash"] is None:
        state["hash"] = one.hash
    with pytest.raises(DataError, match=r"data state .*; start a new run|belongs to another"):
        one.load_state_dict(state)


def test_state_of_another_version_is_refused() -> None:
    with pytest.raises(DataError, match="version 99"):
        make().load_state_dict(make().state_dict() | {"version": 99})


def test_choices_of_the_configuration() -> None:
    assert _CHOICES["data.on_change"] == planner.ON_CHANGE


def test_a_data_set_that_moved_has_the_same_stream(tmp_path: Path, tiny: Path, tokenizer: Tokenizer) -> None:
    """Indexed in memory, by sidecars or by a manifest, here or elsewhere."""

    def planned(pattern: Path) -> tuple[list[Pack], dict[str, Any]]:
        source = SourceConfig("web", str(pattern), kind="documents", max_images=2)
        one = make([open_source(source, [], tokenizer, Storage())], length=80)
        return take(one, 40), stored(one)

    here, there = tmp_path / "a", tmp_path / "b"
    here.mkdir()
    for number in range(3):
        shutil.copy(tiny / "documents-00000.tar", here / f"{number}.tar")
    found = [planned(here / "*.tar")]
    write_index(here / "*.tar", "documents", tokenizer, here / "set.json")
    found += [planned(here / "*.tar"), planned(here / "set.json")]
    here.rename(there)
    found += [planned(there / "*.tar"), planned(there / "set.json")]
    assert all(one == found[0] for one in found) and any(pack.cuts for pack in found[0][0])
