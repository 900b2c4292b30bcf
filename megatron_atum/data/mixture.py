"""Shares of the sources in the stream, in tokens.

Sample weights would do something else: with documents of 600 tokens and captions of 30, the published percentages
taken for samples give 90/8/0/1 instead of 74/6/17/3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_atum.config.schema import SourceConfig
from megatron_atum.errors import ConfigError


@dataclass(frozen=True)
class Share:
    tokens: float  # in percent of the stream
    epochs: float  # times the source's shards stand in the list that the stream was read from


BY_TOKENS = "by_tokens"
MIXTURES = {
    # The mixture of the released models. 80 % documents and 20 % pairs; inside each, sources share by size x epochs.
    "published": {
        "obelics": Share(73.85, 1),
        "wikipedia": Share(6.15, 3),
        "laion": Share(17.18, 1),
        "pmd": Share(2.82, 3),
    },
    # The table of the draft model card: the same numbers against shuffled names.
    "draft_card": {
        "pmd": Share(73.85, 3),
        "laion": Share(6.15, 1),
        "obelics": Share(2.82, 3),
        "wikipedia": Share(17.18, 1),
    },
    # The instruct models, as their card gives it: sampling ratios, taken here as shares of tokens. `pairs` are the
    # image-text pairs of pretraining, scene_difference is General Scene Difference with Spot-the-Diff.
    "instruct": {
        "obelics": Share(30.7, 1),
        "ultrachat": Share(29.1, 1),
        "svit": Share(11.4, 1),
        "m3it": Share(7.7, 1),
        "llavar": Share(6.3, 1),
        "llava_instruct": Share(5.9, 1),
        "pairs": Share(5.1, 1),
        "scene_difference": Share(2.1, 1),
        "lrv": Share(1.7, 1),
    },
}
NAMES = (*MIXTURES, BY_TOKENS)


def epochs_of(source: SourceConfig, mixture: str) -> float:
    """Its own, or the mixture's, or 1."""
    if source.epochs is not None:
        return source.epochs
    share = MIXTURES.get(mixture, {}).get(source.name)
    return share.epochs if share else 1.0


def shares(sources: Sequence[SourceConfig], mixture: str, tokens: Mapping[str, int]) -> dict[str, float]:
    """Share of each source's tokens in the stream, 1 in all.

    A source has its own weight, or the one of the mixture; with `by_tokens` it is its tokens x epochs. A lone source
    needs none.

    Args:
        tokens: usable tokens by source, for by_tokens.

    Raises:
        ConfigError: a source has no weight.
    """
    if len(sources) == 1:
        return {sources[0].name: 1.0}
    weights = {source.name: _weight(place, source, mixture, tokens) for place, source in enumerate(sources)}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def check_weights(sources: Sequence[SourceConfig], mixture: str) -> None:
    """Raises ConfigError, as `shares` would."""
    if sources:
        shares(sources, mixture, {source.name: 1 for source in sources})


def _weight(place: int, source: SourceConfig, mixture: str, tokens: Mapping[str, int]) -> float:
    key = f"data.sources[{place}].weight"
    if mixture == BY_TOKENS:
        if source.weight is not None:
            raise ConfigError(f"{key} is set, and data.mixture={BY_TOKENS} as well; leave out one of them")
        return tokens[source.name] * epochs_of(source, mixture)
    if source.weight is not None:
        return source.weight
    known = MIXTURES[mixture]
    if source.name not in known:
        raise ConfigError(
            f"{key} is not set, and data.mixture={mixture} knows {', '.join(known)} but not {source.name}; set the "
            f"weight, or data.mixture={BY_TOKENS}"
        )
    return known[source.name].tokens
