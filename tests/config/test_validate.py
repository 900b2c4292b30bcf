"""Every rule names the key, and a value that really works."""

from __future__ import annotations

import re

import pytest

from megatron_atum.config.loader import key_names, load_config
from megatron_atum.config.schema import Config, SourceConfig
from megatron_atum.config.validate import _CHOICES, _NOT_NEGATIVE, _POSITIVE, validate
from megatron_atum.errors import ConfigError

SOURCE = "{name: a, shards: x}"


def refusal(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_defaults_and_presets_are_valid() -> None:
    validate(Config())
    for name in ("tiny", "atum-9b", "atum-80b"):
        load_config(None, [f"model.preset={name}"])


@pytest.mark.parametrize("key", _CHOICES)
def test_choices(key: str) -> None:
    message = refusal([f"{key}=x"])
    assert key in message
    for choice in _CHOICES[key]:
        assert choice in message
        load_config(None, [f"{key}={choice}"])


def test_a_near_choice_is_suggested() -> None:
    assert "did you mean 'linear'" in refusal(["optimizer.schedule=liner"])


@pytest.mark.parametrize("key", _POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_positive_values(key: str, value: int) -> None:
    message = refusal([f"{key}={value}"])
    assert f"{key}={value}" in message and "at least 1" in message
    # 1 passes this rule; where another rule speaks of it, it names the keys that do not fit together
    try:
        load_config(None, [f"{key}=1"])
    except ConfigError as other:
        assert "at least 1" not in str(other)


@pytest.mark.parametrize("key", _NOT_NEGATIVE)
def test_values_that_may_be_zero(key: str) -> None:
    message = refusal([f"{key}=-1"])
    assert key in message and "negative" in message
    load_config(None, [f"{key}=0"])


def test_the_rules_name_keys_that_exist() -> None:
    assert {*_CHOICES, *_POSITIVE, *_NOT_NEGATIVE} <= set(key_names())


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.hidden_size=4100"], "model.hidden_size"),
        (["model.hidden_size=100", "model.num_heads=32"], "model.hidden_size"),  # 96 would leave an odd head width
        (["model.hidden_size=36", "model.num_heads=12"], "model.hidden_size"),  # width 3
        (["model.hidden_size=4", "model.num_heads=8"], "model.hidden_size"),
        (["model.vision.embed_dim=1281"], "model.vision.embed_dim"),
        (["model.vision.embed_dim=3", "model.vision.num_heads=7"], "model.vision.embed_dim"),
        (["data.sequence_length=4096"], "data.sequence_length"),
        (["model.max_position_embeddings=512"], "data.sequence_length"),
        (["optimizer.min_lr=1.0"], "optimizer.min_lr"),
        (["optimizer.warmup_steps=500000"], "optimizer.warmup_steps"),
        (["optimizer.decay_steps=1"], "optimizer.warmup_steps"),
    ],
)
def test_suggested_values_work(overrides: list[str], key: str) -> None:
    message = refusal(overrides)
    suggested = re.search(r"([\w.]+=[\w.]+) would work", message)
    assert suggested is not None, message
    assert suggested[1].startswith(f"{key}=")
    load_config(None, [*overrides, suggested[1]])


@pytest.mark.parametrize("lacking", ["optimizer.distributed", "optimizer.overlap_grad_reduce"])
def test_overlapped_gather_names_what_it_needs(lacking: str) -> None:
    overrides = ["optimizer.overlap_param_gather=true", f"{lacking}=false"]
    message = refusal(overrides)
    assert "optimizer.overlap_param_gather" in message
    needed = re.findall(r"optimizer\.\w+=true", message)
    load_config(None, [*overrides, *needed])


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_freeze_exceptions(tower: str) -> None:
    key = f"model.freeze.{tower}_exceptions"
    message = refusal([f"{key}=[Layernorm]"])
    assert key in message and "did you mean 'LayerNorm'" in message
    load_config(None, [f"{key}=[LayerNorm,Linear,Embedding]"])


@pytest.mark.parametrize(
    ("sources", "key", "mended"),
    [
        ("[{name: a, shards: x, kind: pair}]", "data.sources[0].kind", "[{name: a, shards: x, kind: pairs}]"),
        ("[{name: a, shards: x, weight: 0}]", "data.sources[0].weight", "[{name: a, shards: x, weight: 0.1}]"),
        (f"[{SOURCE}, {{name: b, shards: y, max_images: 0}}]", "data.sources[1].max_images", f"[{SOURCE}]"),
        (f"[{SOURCE}, {SOURCE}]", "data.sources[0].name", f"[{SOURCE}, {{name: b, shards: x}}]"),
    ],
)
def test_sources(sources: str, key: str, mended: str) -> None:
    assert key in refusal([f"data.sources={sources}"])
    load_config(None, [f"data.sources={mended}"])


def test_a_configuration_built_in_python_is_checked_alike() -> None:
    config = Config()
    config.data.sources = [SourceConfig(name="a", shards="x", weight=-1.0)]
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.weight"):
        validate(config)


@pytest.mark.parametrize(
    "override", ["data.p_next=1.5", "optimizer.beta2=1", "optimizer.lr=-1e-3", "optimizer.eps=0", "model.norm_eps=0"]
)
def test_values_outside_their_range_are_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config(None, [override])
