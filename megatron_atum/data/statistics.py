"""What is in the sources, and what a run would make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_atum.config.schema import SourceConfig
from megatron_atum.data.fill import Fill, fill_of
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.manifest import read_manifest
from megatron_atum.data.mixture import epochs_of
from megatron_atum.data.planner import Pack, Planner
from megatron_atum.data.storage import Storage

PER_TOKENS = 1000  # images are counted per so many tokens


@dataclass(frozen=True)
class SourceFacts:
    """One source. Tokens and images are those of usable samples."""

    name: str
    kind: str
    shards: int
    samples: int
    usable: int
    tokens: int
    images: int
    lost_images: int  # before the shards were written
    dropped: dict[str, int]  # reason -> samples; and damaged shards

    @property
    def tokens_per_sample(self) -> float:
        return self.tokens / self.usable

    @property
    def images_per_1000_tokens(self) -> float:
        return PER_TOKENS * self.images / self.tokens


@dataclass(frozen=True)
class MixtureFacts:
    """A source's part in a stream of rows. Shares are of tokens, 1 in all; those of the whole stream are 1."""

    name: str
    asked: float
    epochs: float  # the setting: times its tokens count with data.mixture=by_tokens
    by_samples: float  # its share of tokens if the shares were shares of samples
    realised: float
    rows: int
    fill: float  # tokens over room for tokens
    fill_bound: float  # no packing exceeds it
    fill_first_fit: float  # of first-fit on the same samples
    images_per_row: float
    fewest_images: int  # of a row
    most_images: int
    run_epochs: float  # times that a run of `run_rows` reads the source
    too_long: dict[str, int] = field(default_factory=dict)  # as Group.dropped, of what was read whole


@dataclass(frozen=True)
class StreamSettings:
    """What the planner is given, beside the sources."""

    shares: Mapping[str, float]
    sequence_length: int
    seed: int
    shuffle_samples: int


def source_facts(index: SourceIndex) -> SourceFacts:
    return SourceFacts(
        name=index.name,
        kind=index.kind,
        shards=len(index.shards),
        samples=len(index),
        usable=index.usable,
        tokens=index.tokens,
        images=index.images,
        lost_images=sum(shard.lost_images for shard in index.shards),
        dropped=index.dropped,
    )


def open_manifest(path: str, name: str, filters: list[str], storage: Storage) -> SourceIndex:
    """A source without a configuration. Raises DataError."""
    manifest = read_manifest(path, storage)
    source = SourceConfig(name, path, kind=manifest.kind)
    return SourceIndex(source, manifest.shards, filters, manifest.tokenizer_sha256, storage)


def mixture_facts(
    sources: Sequence[SourceConfig],
    mixture: str,
    indexes: Sequence[SourceIndex],
    settings: StreamSettings,
    packs: int,
    run_rows: int,
) -> list[MixtureFacts]:
    """Plans `packs` packs; the last entry is the whole stream.

    Args:
        run_rows: rows of the whole run.

    Raises:
        DataError: a sidecar cannot be used.
    """
    planner = Planner(indexes, settings.shares, settings.sequence_length, settings.seed, settings.shuffle_samples)
    planned = [planner.next() for _ in range(packs)]
    too_long = planner.dropped()
    by_samples = _by_samples(indexes, settings.shares)
    facts, fills = [], []
    for number, (source, index) in enumerate(zip(sources, indexes, strict=True)):
        own = [pack for pack in planned if pack.source == number]
        fills.append(fill_of(index, own, settings.sequence_length))
        samples_per_row = sum(len(pack.samples) for pack in own) / packs
        facts.append(
            MixtureFacts(
                name=index.name,
                asked=settings.shares[index.name],
                epochs=epochs_of(source, mixture),
                by_samples=by_samples[index.name],
                run_epochs=run_rows * samples_per_row / index.usable,
                too_long=too_long[index.name],
                **_row_facts(own, fills[-1], planned, settings.sequence_length),
            )
        )
    total = Fill(*(sum(getattr(fill, name) for fill in fills) for name in Fill.__dataclass_fields__))
    whole = _row_facts(planned, total, planned, settings.sequence_length)
    return [*facts, MixtureFacts("all", 1.0, 1.0, 1.0, run_epochs=0.0, **whole)]


def _by_samples(indexes: Sequence[SourceIndex], shares: Mapping[str, float]) -> dict[str, float]:
    tokens = {index.name: shares[index.name] * index.tokens / index.usable for index in indexes}
    return {name: value / sum(tokens.values()) for name, value in tokens.items()}


def _row_facts(own: Sequence[Pack], fill: Fill, planned: Sequence[Pack], row_tokens: int) -> dict[str, Any]:
    images = [pack.images for pack in own]
    return {
        "realised": fill.tokens / sum(pack.tokens for pack in planned),
        "rows": fill.rows,
        "fill": _filled(fill.tokens, fill.rows, row_tokens),
        "fill_bound": _filled(fill.tokens, fill.bound_rows, row_tokens),
        "fill_first_fit": _filled(fill.tokens, fill.first_fit_rows, row_tokens),
        "images_per_row": sum(images) / max(1, len(images)),
        "fewest_images": min(images, default=0),
        "most_images": max(images, default=0),
    }


def _filled(tokens: int, rows: int, row_tokens: int) -> float:
    return tokens / (rows * row_tokens) if rows else 0.0
