"""Every rule names the key, and a value that really works."""

from __future__ import annotations

import re

import pytest

from megatron_atum.config.loader import key_names, load_config
from megatron_atum.config.schema import FILTERS, Config, SourceConfig
from megatron_atum.config.validate import _CHOICES, _NOT_NEGATIVE, _POSITIVE, validate
from megatron_atum.errors import ConfigError

SOURCE = "{name: a, shards: x}"
NEEDED = {"optimizer.schedule=wsd": ["optimizer.wsd_steps=1000"]}  # what a choice does not work without


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
        load_config(None, [f"{key}={choice}", *NEEDED.get(f"{key}={choice}", [])])


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
        (["optimizer.schedule=wsd"], "optimizer.wsd_steps"),
        (["optimizer.schedule=wsd", "optimizer.wsd_steps=498001"], "optimizer.wsd_steps"),
        (
            ["optimizer.schedule=wsd", "optimizer.decay_steps=9", "optimizer.warmup_steps=8", "optimizer.wsd_steps=2"],
            "optimizer.wsd_steps",
        ),
        (["training.ramp_up={start: 3584, increment: 1, rows: 9}"], "training.ramp_up.start"),
        (["training.ramp_up={start: 84, increment: 1000, rows: 9}"], "training.ramp_up.increment"),
        (["training.ramp_up={start: 84, increment: 9999, rows: 9}"], "training.ramp_up.increment"),
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


def test_the_default_of_the_overlapped_gather_never_stands_in_the_way() -> None:
    assert load_config(None, []).optimizer.overlap_param_gather is None
    load_config(None, ["optimizer.distributed=false", "optimizer.overlap_grad_reduce=false"])


def test_the_fall_of_wsd_may_take_all_steps_behind_the_warm_up() -> None:
    load_config(None, ["optimizer.schedule=wsd", "optimizer.wsd_steps=498000"])
    load_config(None, ["optimizer.wsd_steps=498001"])  # of no other schedule


@pytest.mark.parametrize("name", ["start", "increment", "rows"])
def test_a_ramp_up_is_given_whole_or_not_at_all(name: str) -> None:
    whole = {"start": 84, "increment": 100, "rows": 5000}
    for value in (-1, 0):
        ramp = ", ".join(f"{key}: {number}" for key, number in (whole | {name: value}).items())
        if (name, value) == ("start", 0):
            load_config(None, [f"training.ramp_up={{{ramp}}}"])
        else:
            message = refusal([f"training.ramp_up={{{ramp}}}"])
            assert f"training.ramp_up.{name}={value}: must be at least 1" in message


@pytest.mark.parametrize("name", ["lr_scale", "weight_decay_scale"])
def test_scales_of_parameter_groups(name: str) -> None:
    for value in ("-0.1", ".inf", ".nan"):
        message = refusal([f"optimizer.groups=[{{match: a}}, {{match: b, {name}: {value}}}]"])
        assert f"optimizer.groups[1].{name}=" in message
    load_config(None, [f"optimizer.groups=[{{match: a, {name}: 0}}, {{match: b, {name}: 2.5}}]"])


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_freeze_exceptions(tower: str) -> None:
    key = f"model.freeze.{tower}_exceptions"
    message = refusal([f"{key}=[Layernorm]"])
    assert key in message and "did you mean 'LayerNorm'" in message
    load_config(None, [f"{key}=[LayerNorm,Linear,Embedding]"])


@pytest.mark.parametrize("section", ["sources", "validation"])
@pytest.mark.parametrize(
    ("sources", "key", "mended"),
    [
        ("[{name: a, shards: x, kind: pair}]", "[0].kind", "[{name: a, shards: x, kind: pairs}]"),
        ("[{name: a, shards: x, weight: 0}]", "[0].weight", "[{name: a, shards: x, weight: 0.1}]"),
        ("[{name: a, shards: x, weight: .inf}]", "[0].weight", "[{name: a, shards: x, weight: null}]"),
        ("[{name: a, shards: x, weight: .nan}]", "[0].weight", "[{name: a, shards: x}]"),
        ("[{name: a, shards: x, epochs: 0}]", "[0].epochs", "[{name: a, shards: x, epochs: 0.5}]"),
        ("[{name: a, shards: x, epochs: -1}]", "[0].epochs", "[{name: a, shards: x, epochs: 3}]"),
        ("[{name: a, shards: x, filters: [no_images]}]", "[0].filters", "[{name: a, shards: x, filters: [no_image]}]"),
        (f"[{SOURCE}, {{name: b, shards: y, max_images: 0}}]", "[1].max_images", f"[{SOURCE}]"),
        (f"[{SOURCE}, {SOURCE}]", "[0].name", f"[{SOURCE}, {{name: b, shards: x}}]"),
    ],
)
def test_sources(sources: str, key: str, mended: str, section: str) -> None:
    assert f"data.{section}{key}" in refusal([f"data.{section}={sources}"])
    load_config(None, [f"data.{section}={mended}"])


def test_a_source_is_trained_on_or_held_out() -> None:
    held_out = "data.validation=[{name: b, shards: y}, {name: c, shards: x}]"
    message = refusal([f"data.sources=[{SOURCE}]", held_out])
    assert "data.sources[0].shards=x is also under data.validation" in message
    message = refusal([f"data.sources=[{SOURCE}]", "data.validation=[{name: a, shards: y}]"])
    assert "data.sources[0].name='a' is used twice" in message
    load_config(None, [f"data.sources=[{SOURCE}]", "data.validation=[{name: b, shards: y}]"])


def test_filters() -> None:
    message = refusal(["data.filters=[few_token]"])
    assert "data.filters" in message and "did you mean 'few_tokens'" in message
    assert load_config(None, []).data.filters == list(FILTERS)
    for names in ([], FILTERS[:2], FILTERS):
        assert load_config(None, [f"data.filters=[{','.join(names)}]"]).data.filters == list(names)
    message = refusal(["data.sources=[{name: a, shards: x, filters: [bad_json]}]"])  # faults are no choice
    assert "data.sources[0].filters" in message


def test_a_configuration_built_in_python_is_checked_alike() -> None:
    config = Config()
    config.data.sources = [SourceConfig(name="a", shards="x", weight=-1.0)]
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.weight"):
        validate(config)


@pytest.mark.parametrize(
    "override",
    [
        *("data.p_next=1.5", "data.p_next=-0.1", "data.image_at_end=1.01", "data.max_fault_rate=-1e-9"),
        "data.max_fault_rate=1.1",
        "optimizer.beta2=1",
        "optimizer.lr=-1e-3",
        "optimizer.eps=0",
        "model.norm_eps=0",
    ],
)
def test_values_outside_their_range_are_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config(None, [override])


@pytest.mark.parametrize("section", ["sources", "validation"])
def test_conversations_need_a_third_added_token(section: str) -> None:
    source = f"data.{section}=[{{name: a, shards: x, kind: conversations}}]"
    message = refusal([source])
    assert "model.additional_vocab_size=2" in message and f"data.{section}[0]" in message
    assert "model.additional_vocab_size=3 would work" in message
    load_config(None, [source, "model.additional_vocab_size=3"])


def test_a_rollback_needs_checkpoints_and_validation_needs_sources() -> None:
    message = refusal(["health.spike=rollback", "checkpoint.save_every=0"])
    assert "health.spike" in message and "checkpoint.save_every=250 would work" in message
    load_config(None, ["health.spike=rollback"])
    message = refusal(["training.validate_every=100"])
    assert "training.validate_every=100 needs data.validation" in message
    load_config(None, ["training.validate_every=100", "data.validation=[{name: a, shards: b}]"])


@pytest.mark.parametrize(
    "override", ["health.rollback_lr_scale=1.5", "health.spike_threshold=0", "health.max_bad_steps=0"]
)
def test_health_keys_have_ranges(override: str) -> None:
    assert override.split("=")[0] in refusal([override])


FP8 = ["kernels.frozen_gemm=fp8", "model.freeze={text: true, vision: true, lm_head: true}"]


@pytest.mark.parametrize(
    ("key", "value", "changes"),
    [
        ("model.hidden_size", 4104, ["model.num_heads=4"]),
        ("model.intermediate_size", 11000, []),
        ("model.intermediate_size", 11008 + 16, ["parallel.tensor=2"]),
        ("model.vision.embed_dim", 1288, ["model.vision.num_heads=4"]),
        ("model.vision.intermediate_size", 5128, []),
    ],
)
def test_sides_of_matrices_in_8_bits(key: str, value: int, changes: list[str]) -> None:
    message = refusal([*FP8, f"{key}={value}", *changes])
    assert f"{key}={value}" in message and message.endswith("kernels.frozen_gemm=bf16 would work")
    load_config(None, [*FP8, "kernels.frozen_gemm=bf16", f"{key}={value}", *changes])
    load_config(None, [*FP8, "model.freeze={text: false, vision: false}", f"{key}={value}", *changes])


@pytest.mark.parametrize("name", ["tiny", "atum-9b", "atum-80b"])
def test_models_that_have_such_sides(name: str) -> None:
    load_config(None, [*FP8, f"model.preset={name}", "parallel.tensor=4"])


def test_rows_of_transformer_engine_in_8_bits() -> None:
    """A multiple of 8 on each rank that has a part of the sequence."""
    te = [*FP8, "kernels.backend=te", "training.micro_batch_size=2", "model.preset=tiny"]
    split = ["data.sequence_length=36", "parallel.tensor=2"]
    for changes in (["data.sequence_length=42"], split):
        message = refusal([*te, *changes])
        assert changes[0] in message and message.endswith("kernels.frozen_gemm=bf16 would work")
        for other in ("kernels.frozen_gemm=bf16", "kernels.backend=torch", "model.freeze.text=false"):
            load_config(None, [*te, *changes, other])
        load_config(None, [*te, *changes, "model.freeze.text_exceptions=[Linear]"])
    load_config(None, [*te, *split, "parallel.sequence=false"])
    load_config(None, [*te, "data.sequence_length=44"])
