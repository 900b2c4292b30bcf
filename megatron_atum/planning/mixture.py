"""How many images a row has on average, before any data is read."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_atum.config.schema import Config, SourceConfig
from megatron_atum.data.flags import ALWAYS_MASK, mask_of
from megatron_atum.data.manifest import read_manifest
from megatron_atum.data.mixture import shares
from megatron_atum.data.storage import MissingFile, Storage
from megatron_atum.errors import ConfigError, DataError

# Tokens and images of the sources of the released models, in billions (model card of idefics-80b).
PUBLISHED = {
    "obelics": (114.9, 0.353),
    "wikipedia": (3.192, 0.039),
    "laion": (29.9, 1.120),
    "pmd": (1.6, 0.070),
}
OPTION = "--images-per-row"


@dataclass(frozen=True)
class SourceImages:
    name: str
    share: float  # of the tokens, 1 in all
    per_row: float  # images of a row of this source
    origin: str  # manifest | published


def images_per_row(config: Config) -> float:
    """Mean images of a packed row of the mixture. Raises as `source_images`."""
    return sum(source.share * source.per_row for source in source_images(config))


def source_images(config: Config) -> list[SourceImages]:
    """Images of each source: what its manifest says where there is one, the published density elsewhere.

    Raises:
        ConfigError: a source has neither, or no share of the mixture.
        DataError: a manifest cannot be used.
    """
    data = config.data
    if not data.sources:
        raise ConfigError(f"data.sources is empty, so the images of a row are not known; give {OPTION}")
    found = {source.name: _counts(source, data.filters) for source in data.sources}
    share = shares(data.sources, data.mixture, {name: round(tokens) for name, (tokens, _, _) in found.items()})
    images = []
    for source in data.sources:
        tokens, of_source, origin = found[source.name]
        per_row = min(of_source / tokens * data.sequence_length, source.max_images)
        images.append(SourceImages(source.name, share[source.name], per_row, origin))
    return images


def _counts(source: SourceConfig, filters: list[str]) -> tuple[float, float, str]:
    """Tokens and images of a source that are used, and who says so."""
    try:
        if source.shards.endswith(".json"):
            return (*_of_manifest(source, filters), "manifest")
    except MissingFile:
        pass
    if source.name not in PUBLISHED:
        raise ConfigError(
            f"how many images source {source.name} has is not known: {source.shards} is no manifest that can be read, "
            f"and only {', '.join(PUBLISHED)} are published; make one with tools/data/index.py, or give {OPTION}"
        )
    tokens, images = PUBLISHED[source.name]
    return tokens * 1e9, images * 1e9, "published"


def _of_manifest(source: SourceConfig, filters: list[str]) -> tuple[float, float]:
    mask = ALWAYS_MASK | mask_of(filters if source.filters is None else source.filters)
    used = [shard.used(mask) for shard in read_manifest(source.shards, Storage(tries=1)).shards]
    tokens, images = sum(numbers[1] for numbers in used), sum(numbers[2] for numbers in used)
    if not tokens:
        raise DataError(f"{source.shards} has no usable sample; take filters off data.filters, or mend the shards")
    return tokens, images
