"""Which weights train and decay, and what patterns of optimizer.groups may say."""

from __future__ import annotations

import math
from itertools import chain, combinations, product
from typing import Any

import pytest
import torch

from megatron_atum.checkpoint.table import Weight, weight_table
from megatron_atum.checkpoint.weights import rows_of
from megatron_atum.config.loader import load_config, preset
from megatron_atum.config.schema import Config, FreezeConfig, ModelConfig
from megatron_atum.errors import ConfigError
from megatron_atum.model.freeze import freeze
from megatron_atum.model.stage import build_stages
from megatron_atum.training.parameter_groups import Settings, check_groups, decays, settings, trains
from tests.distributed import run_distributed
from tests.layouts import ONE, groups_of

KINDS = ("LayerNorm", "Linear", "Embedding")


def values(rows: list[Weight]) -> int:
    return sum(math.prod(shape) for row in rows for shape in row.shapes)


def trained(model: ModelConfig) -> list[Weight]:
    return [row for row in weight_table(model) if trains(row, model.freeze)]


# What trains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "trainable", "total"),
    [("atum-9b", 1_560_497_936, 8_929_679_632), ("atum-80b", 14_051_416_872, 79_967_843_624)],
)
def test_trainable_values_of_the_released_models(name: str, trainable: int, total: int) -> None:
    model = preset(name)
    assert (values(trained(model)), values(weight_table(model))) == (trainable, total)


def freezes() -> list[FreezeConfig]:
    """All combinations of the flags, each with every set of exceptions."""
    exceptions = list(chain.from_iterable(combinations(KINDS, number) for number in range(4)))
    return [
        FreezeConfig(*flags, text_exceptions=list(names), vision_exceptions=list(names))
        for flags in product((False, True), repeat=3)
        for names in exceptions
    ]


def disagreements(rank: int, world_size: int) -> list[Any]:
    """Where the table says something else than the model does."""
    found, model = [], preset("tiny")
    (stage,) = build_stages(model, groups_of(model, ONE), torch.float32)
    rows = rows_of([stage], model)
    assert len(rows) == len(weight_table(model))
    for config in freezes():
        stage.requires_grad_(True)
        freeze(stage, config)
        found += [(str(config), row.name) for row, p in rows if trains(row, config) is not p.requires_grad]
    return found


def test_the_table_says_what_the_model_does() -> None:
    assert run_distributed(disagreements, 1) == [[]]


# What decays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "decaying", "others"),
    [("atum-9b", 1_434_468_352, 126_029_584), ("atum-80b", 13_925_122_048, 126_294_824)],
)
def test_weight_decay_of_the_published_recipe(name: str, decaying: int, others: int) -> None:
    rows = trained(preset(name))
    assert values([row for row in rows if decays(row, "idefics")]) == decaying
    assert values([row for row in rows if not decays(row, "idefics")]) == others


def test_the_original_rule_when_everything_trains() -> None:
    """Its oddities stay: a spelling and a name that its list does not know."""
    by_name = {name: decays(row, "idefics") for row in weight_table(preset("atum-80b")) for name in row.hf}
    assert by_name["model.norm.weight"] and by_name["model.vision_model.pre_layrnorm.weight"]
    assert by_name["model.vision_model.embeddings.class_embedding"]
    assert by_name["lm_head.additional_fc.weight"] and by_name["model.embed_tokens.additional_embedding.weight"]
    for name in ("input_layernorm.weight", "cross_attn.q_layer_norm.weight", "alpha_dense"):
        assert not by_name[f"model.gated_cross_attn_layers.3.{name}"]
    assert not by_name["model.vision_model.pre_layrnorm.bias"]
    perceiver = [decay for name, decay in by_name.items() if "perceiver_resampler" in name]
    assert len(perceiver) == 99 and not any(perceiver)


def test_the_clean_rule_is_about_matrices() -> None:
    model = preset("atum-9b")
    by_name = {name: decays(row, "clean") for row in weight_table(model) for name in row.hf}
    undecayed = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "alpha_cross_attn", "alpha_dense", ".ln.weight")
    undecayed += (".latents", "class_embedding", "position_embedding.weight")
    for name, decay in by_name.items():
        assert decay is not name.endswith(undecayed), name
    assert by_name["model.perceiver_resampler.blocks.0.0.q_proj.weight"]
    assert by_name["model.vision_model.embeddings.patch_embedding.weight"] and by_name["model.embed_tokens.weight"]
    model.alpha_type, model.cross_layer_interval = "vector", 2
    assert not any(decays(row, "clean") for row in weight_table(model) if "alpha" in row.name)


# Groups --------------------------------------------------------------------------------------------------------------


def configured(*groups: str, **others: str) -> Config:
    overrides = [f"optimizer.groups=[{', '.join(groups)}]", *(f"{key}={value}" for key, value in others.items())]
    return load_config(None, ["model.preset=atum-9b", *overrides])


def found(config: Config, name: str) -> Settings:
    row = next(row for row in weight_table(config.model) if name in row.hf)
    return settings(row, config.optimizer)


def test_the_first_group_that_matches_counts() -> None:
    config = configured(
        "{match: '*.latents', lr_scale: 0.1, weight_decay_scale: 2}",
        "{match: model.perceiver_resampler.*, lr_scale: 0.5}",
        "{match: '*.additional_*', weight_decay_scale: 0}",
    )
    check_groups(config)
    assert found(config, "model.perceiver_resampler.latents") == Settings(0.1, 2.0)
    assert found(config, "model.perceiver_resampler.blocks.0.0.k_proj.weight") == Settings(0.5, 0.0)
    assert found(config, "lm_head.additional_fc.weight") == Settings(1.0, 0.0)
    assert found(config, "model.gated_cross_attn_layers.0.mlp.up_proj.weight") == Settings(1.0, 1.0)
    assert found(config, "model.gated_cross_attn_layers.0.alpha_dense") == Settings(1.0, 0.0)


@pytest.mark.parametrize(
    ("groups", "needles"),
    [
        (
            ["{match: model.perceiver_resample.*}"],
            ["groups[0].match 'model.perceiver_resample.*'", "did you mean 'model.perceiver_resampler.*'", "no weight"],
        ),
        (
            ["{match: '*.alpha_dense'}", "{match: model.gated_cross_attn_layers.0.mlp.up_proj}"],
            ["groups[1].match 'model.gated", "did you mean 'model.gated_cross_attn_layers.0.mlp.up_proj.*'"],
        ),
        (["{match: model.layers.*}"], ["groups[0].match='model.layers.*' matches frozen weights only", "model.freeze"]),
        (
            ["{match: 'model.*'}", "{match: model.perceiver_resampler.*}"],
            ["groups[1].match='model.perceiver_resampler.*'", "groups[0] stands before it"],
        ),
        (
            ["{match: '*.mlp.gate_proj.weight'}"],
            ["groups[0].match='*.mlp.gate_proj.weight'", "0.mlp.gate_proj.weight without", "0.mlp.up_proj.weight;"],
        ),
        (
            ["{match: '*.k_proj.weight', lr_scale: 0.5}", "{match: '*.v_proj.weight', lr_scale: 0.5}"],
            ["groups[0].match='*.k_proj.weight'", "k_proj.weight without", "v_proj.weight;"],
        ),
    ],
)
def test_patterns_that_cannot_be_followed(groups: list[str], needles: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_groups(configured(*groups))
    for needle in needles:
        assert needle in str(error.value)


def test_parts_of_frozen_weights_do_not_matter() -> None:
    """`q_proj` is one of three parts in the frozen decoder, and whole where it trains."""
    check_groups(configured("{match: '*.q_proj.weight', lr_scale: 0.5}"))
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight without"):
        check_groups(configured("{match: '*.q_proj.weight'}", **{"model.freeze.text": "false"}))
