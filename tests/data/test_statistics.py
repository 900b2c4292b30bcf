"""Numbers of sources and of the stream that is made of them."""

from __future__ import annotations

import pytest

from megatron_atum.config.schema import SourceConfig
from megatron_atum.data.flags import mask_of
from megatron_atum.data.planner import Planner
from megatron_atum.data.statistics import StreamSettings, mixture_facts, source_facts
from tests.data.conftest import fake_index, fake_sidecar, random_index

ROW = 64


def test_facts_count_what_is_used() -> None:
    flags = [0, mask_of(["bad_json"]), mask_of(["few_tokens"]), mask_of(["no_image"])]
    sidecar = fake_sidecar("documents", [10, 0, 7, 20], [[2, 5], [], [2], []], flags)
    facts = source_facts(fake_index("web", [sidecar, sidecar], filters=["few_tokens"]))
    assert (facts.shards, facts.samples, facts.usable, facts.tokens, facts.images) == (2, 8, 4, 60, 4)
    assert facts.dropped == {"bad_json": 2, "few_tokens": 2}
    assert facts.tokens_per_sample == 15 and facts.images_per_1000_tokens == pytest.approx(4000 / 60)


@pytest.fixture
def settings() -> StreamSettings:
    return StreamSettings({"web": 0.75, "captions": 0.25}, ROW, 3, 200)


def indexes() -> list[object]:
    web = random_index("web", [150, 150], (10, 120), (0, 4))
    return [web, random_index("captions", [300, 200], (6, 20), (1, 2), "pairs", max_images=5)]


def test_mixture_is_that_of_the_planner(settings: StreamSettings) -> None:
    sources = [SourceConfig("web", "", epochs=2.0), SourceConfig("captions", "", kind="pairs")]
    web, captions = found = indexes()
    *parts, whole = mixture_facts(sources, "published", found, settings, packs=500, run_rows=5000)
    planner = Planner(indexes(), settings.shares, ROW, settings.seed, settings.shuffle_samples)
    packs = [planner.next() for _ in range(500)]
    total = sum(planner.tokens().values())
    for number, part in enumerate(parts):
        own = [pack for pack in packs if pack.source == number]
        assert part.realised == planner.tokens()[part.name] / total
        assert part.realised == pytest.approx(settings.shares[part.name], abs=0.005)
        assert part.fill == sum(pack.tokens for pack in own) / (len(own) * ROW)
        assert 0.5 < part.fill <= part.fill_bound <= 1 and part.fill_first_fit <= part.fill_bound
        assert (part.fewest_images, part.most_images) == (min(p.images for p in own), max(p.images for p in own))
        samples = sum(len(pack.samples) for pack in own)
        assert part.run_epochs == pytest.approx(10 * samples / found[number].usable)
    assert [part.epochs for part in parts] == [2.0, 1.0]
    assert (whole.name, whole.rows, whole.realised, whole.asked) == ("all", 500, 1.0, 1.0)
    assert whole.fill == total / (500 * ROW)
    weights = [0.75 * web.tokens / web.usable, 0.25 * captions.tokens / captions.usable]
    assert parts[0].by_samples == pytest.approx(weights[0] / sum(weights))
