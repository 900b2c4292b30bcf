from __future__ import annotations

import pytest

from megatron_atum.config.schema import DataConfig, SourceConfig
from megatron_atum.config.validate import _CHOICES
from megatron_atum.data.mixture import MIXTURES, NAMES, check_weights, epochs_of, shares
from megatron_atum.errors import ConfigError

PUBLISHED = {"obelics": 0.7385, "wikipedia": 0.0615, "laion": 0.1718, "pmd": 0.0282}

INSTRUCT = {
    "ultrachat": 29.1,
    "obelics": 30.7,
    "svit": 11.4,
    "m3it": 7.7,
    "llavar": 6.3,
    "llava_instruct": 5.9,
    "pairs": 5.1,
    "scene_difference": 2.1,
    "lrv": 1.7,
}


def sources(*names: str, **changes: float | None) -> list[SourceConfig]:
    return [SourceConfig(name, "x", **changes) for name in names]  # type: ignore[arg-type]


def test_the_default_is_the_published_mixture() -> None:
    assert DataConfig().mixture == "published"
    assert shares(sources(*PUBLISHED), DataConfig().mixture, {}) == pytest.approx(PUBLISHED)


def test_published_shares_are_tokens_times_epochs_within_each_kind() -> None:
    """80 % documents and 20 % pairs; inside, the numbers of the model card, to the precision they are printed with."""
    tokens = {"obelics": 114.9, "wikipedia": 3.192, "laion": 29.9, "pmd": 1.6}
    epochs = {source.name: epochs_of(source, "published") for source in sources(*tokens)}
    assert epochs == {"obelics": 1, "wikipedia": 3, "laion": 1, "pmd": 3}
    for part, names in ((80.0, ("obelics", "wikipedia")), (20.0, ("laion", "pmd"))):
        sizes = {name: tokens[name] * epochs[name] for name in names}
        for name in names:
            wanted = part * sizes[name] / sum(sizes.values())
            assert MIXTURES["published"][name].tokens == pytest.approx(wanted, abs=0.06)


def test_draft_card_has_the_same_numbers_against_other_names() -> None:
    draft = {name: 100 * share for name, share in shares(sources(*PUBLISHED), "draft_card", {}).items()}
    assert draft == pytest.approx({"pmd": 73.85, "laion": 6.15, "obelics": 2.82, "wikipedia": 17.18})
    published = MIXTURES["published"].values()
    assert sorted(share.tokens for share in published) == sorted(s.tokens for s in MIXTURES["draft_card"].values())
    epochs = {source.name: epochs_of(source, "draft_card") for source in sources(*PUBLISHED)}
    assert epochs == {"pmd": 3, "laion": 1, "obelics": 3, "wikipedia": 1}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_presets_are_complete(mixture: str) -> None:
    assert sum(share.tokens for share in MIXTURES[mixture].values()) == pytest.approx(100)
    assert set(MIXTURES[mixture]) == (set(INSTRUCT) if mixture == "instruct" else set(PUBLISHED))


def test_the_mixture_of_the_instruct_models() -> None:
    found = shares(sources(*INSTRUCT), "instruct", {})
    assert found == pytest.approx({name: share / 100 for name, share in INSTRUCT.items()})


def test_weights_of_its_own_go_before_the_mixture() -> None:
    some = sources("obelics", "laion")
    some[1].weight = 73.85
    assert shares(some, "published", {}) == {"obelics": 0.5, "laion": 0.5}
    own = [SourceConfig("a", "x", weight=3.0), SourceConfig("b", "x", weight=1.0)]
    assert shares(own, "published", {}) == {"a": 0.75, "b": 0.25}
    assert shares([SourceConfig("a", "x", weight=75), SourceConfig("b", "x", weight=25)], "published", {}) == {
        "a": 0.75,
        "b": 0.25,
    }


def test_by_tokens() -> None:
    some = sources("a", "b", "c")
    some[1].epochs = 3.0
    assert shares(some, "by_tokens", {"a": 500, "b": 100, "c": 200}) == {"a": 0.5, "b": 0.3, "c": 0.2}
    assert epochs_of(sources("wikipedia")[0], "by_tokens") == 1.0  # as often as the source says, not a preset


def test_epochs() -> None:
    wikipedia = sources("wikipedia", epochs=2.0)[0]
    assert epochs_of(wikipedia, "published") == 2.0
    assert epochs_of(sources("mine")[0], "published") == 1.0


@pytest.mark.parametrize("mixture", NAMES)
def test_a_lone_source_needs_no_weight(mixture: str) -> None:
    assert shares(sources("mine"), mixture, {"mine": 5}) == {"mine": 1.0}
    check_weights(sources("mine"), mixture)
    check_weights([], mixture)


def test_a_source_that_the_mixture_does_not_know() -> None:
    for check in (lambda some: shares(some, "published", {}), lambda some: check_weights(some, "published")):
        with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.weight is not set, and data\.mixture=published"):
            check(sources("obelics", "mine"))
    check_weights(sources("obelics", "mine"), "by_tokens")
    check_weights([*sources("obelics"), *sources("mine", weight=1.0)], "published")


def test_two_ways_to_weigh() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.weight is set, and data\.mixture=by_tokens as well"):
        check_weights([*sources("a", weight=1.0), *sources("b")], "by_tokens")


def test_names_are_those_of_the_configuration() -> None:
    assert _CHOICES["data.mixture"] == NAMES
