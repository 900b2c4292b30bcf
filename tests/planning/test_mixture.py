"""Images of a row before any data is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config, SourceConfig
from megatron_atum.data.flags import mask_of
from megatron_atum.data.manifest import Manifest, ShardEntry, write_manifest
from megatron_atum.data.storage import Storage
from megatron_atum.errors import ConfigError, DataError
from megatron_atum.planning.mixture import images_per_row, source_images
from tests.planning.cases import EIGHT

RECIPE = Path(__file__).parents[2] / "examples/atum-80b/pretrain.yaml"


def config_of(*sources: SourceConfig, length: int = 1000, mixture: str = "published") -> Config:
    config = Config()
    config.data.sources, config.data.sequence_length, config.data.mixture = list(sources), length, mixture
    return config


def manifest(folder: Path, *used: tuple[int, int], dropped: tuple[int, int] = (0, 0)) -> str:
    """One shard for each (tokens, images), and samples without an image, which a filter drops."""
    shards = tuple(
        ShardEntry(
            str(folder / f"{n}.tar"), 2, 1, "", "", "", 0, {0: (1, *numbers), mask_of(["no_image"]): (1, *dropped)}
        )
        for n, numbers in enumerate(used)
    )
    path = str(folder / "manifest.json")
    write_manifest(path, Manifest("documents", "t", shards), Storage())
    return path


def test_the_published_mixture() -> None:
    config = load_config(RECIPE, [*EIGHT])
    densities = {source.name: source.per_row / 1.024 for source in source_images(config)}
    assert densities == pytest.approx({"obelics": 3.1, "wikipedia": 12.2, "laion": 37.5, "pmd": 43.8}, rel=0.02)
    shares = {source.name: 100 * source.share for source in source_images(config)}
    assert shares == pytest.approx({"obelics": 73.85, "wikipedia": 6.15, "laion": 17.18, "pmd": 2.82})
    by_hand = 1.024 * (3.07 * 0.7385 + 12.22 * 0.0615 + 37.46 * 0.1718 + 43.75 * 0.0282)
    assert images_per_row(config) == pytest.approx(by_hand, rel=0.001)
    assert round(images_per_row(config)) == 11
    assert {source.origin for source in source_images(config)} == {"published"}


def test_a_row_has_at_most_max_images() -> None:
    assert images_per_row(config_of(SourceConfig("laion", "missing.json", max_images=70))) == pytest.approx(
        37.46, rel=1e-3
    )
    assert images_per_row(config_of(SourceConfig("laion", "missing.json", max_images=20))) == 20
    assert images_per_row(config_of(SourceConfig("pmd", "missing.json"), length=2000)) == 70


def test_a_manifest_counts_instead(tmp_path: Path) -> None:
    path = manifest(tmp_path, (300, 6), (700, 4), dropped=(10_000, 0))
    source = SourceConfig("laion", path)
    assert images_per_row(config_of(source)) == pytest.approx(10)
    assert source_images(config_of(source))[0].origin == "manifest"
    kept = SourceConfig("laion", path, filters=[])  # nothing is dropped: 21,000 tokens
    assert images_per_row(config_of(kept)) == pytest.approx(10 / 21)


def test_shares_by_tokens(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a = SourceConfig("a", manifest(tmp_path / "a", (900, 9)))
    b = SourceConfig("b", manifest(tmp_path / "b", (300, 30)), epochs=1.0)
    assert images_per_row(config_of(a, b, mixture="by_tokens")) == pytest.approx(0.75 * 10 + 0.25 * 70)


def test_what_is_not_known_is_asked_for(tmp_path: Path) -> None:
    for source in (SourceConfig("mine", "missing.json"), SourceConfig("mine", str(tmp_path / "*.tar"))):
        with pytest.raises(ConfigError, match=r"source mine.*--images-per-row"):
            images_per_row(config_of(source))
    with pytest.raises(ConfigError, match=r"data\.sources is empty.*--images-per-row"):
        images_per_row(config_of())
    with pytest.raises(ConfigError, match="weight"):
        images_per_row(config_of(SourceConfig("laion", "missing.json"), SourceConfig("x", manifest(tmp_path, (9, 1)))))


def test_a_manifest_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="no manifest"):
        images_per_row(config_of(SourceConfig("laion", str(tmp_path / "manifest.json"))))
    with pytest.raises(DataError, match="no usable sample"):
        images_per_row(config_of(SourceConfig("laion", manifest(tmp_path, (0, 0)))))
