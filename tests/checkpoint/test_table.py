"""The weight table against transformers, against the stages at every layout, and what it starts from."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_atum.checkpoint.draw import Drawn
from megatron_atum.checkpoint.hf_config import from_hf, to_hf
from megatron_atum.checkpoint.table import hf_shapes, weight_table
from megatron_atum.checkpoint.weights import gather_rows, initialise, named_weights, rows_of
from megatron_atum.config.loader import preset
from megatron_atum.config.schema import ModelConfig, PerceiverConfig, VisionConfig
from megatron_atum.model.stage import build_stages
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees, groups_of
from tests.model.cases import CASES, Case, hf_config


def model_of(case: Case) -> ModelConfig:
    return from_hf({"model_type": "idefics", **hf_config(case)})


MODELS = {case.name: model_of(case) for case in CASES[:5]} | {name: preset(name) for name in ("tiny", "atum-9b")}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    with torch.device("meta"):
        theirs = IdeficsForVisionText2Text(IdeficsConfig(**to_hf(MODELS[name]))).state_dict()
    assert hf_shapes(MODELS[name]) == {key: tuple(tensor.shape) for key, tensor in theirs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_no_name_is_there_twice(name: str) -> None:
    rows = weight_table(MODELS[name])
    assert len({row.name for row in rows}) == len(rows)
    assert len({hf for row in rows for hf in row.hf}) == sum(len(row.hf) for row in rows)


# At every layout -----------------------------------------------------------------------------------------------------

AT_LAYOUTS = [CASES[0], CASES[1], CASES[2]]
LAYOUTS = [ONE, Degrees(tensor=2), Degrees(pipeline=2), Degrees(pipeline=2, virtual=2)]
SEED = 11


def model_at(case: Case, degrees: Degrees) -> ModelConfig:
    return model_of(replace(case, layers=4 * case.interval) if degrees.virtual > 1 else case)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def build(rank: int, world_size: int, layouts: list[Degrees]) -> list[tuple[list[str], dict[str, str]]]:
    """For each layout and case: the names this rank holds, and digests of the whole initialised weights."""
    results = []
    for degrees in layouts:
        for case in AT_LAYOUTS:
            model = model_at(case, degrees)
            groups = groups_of(model, degrees)
            stages = build_stages(model, groups, torch.float32)
            for stage in stages:
                for parameter in stage.parameters():
                    parameter.data.fill_(float("nan"))
            initialise(stages, model, groups, SEED)
            names = [row.name for row, _ in rows_of(stages, model)]  # raises where a parameter has no row
            assert len(names) == len(named_weights(stages)) == sum(len(list(s.parameters())) for s in stages)
            whole = gather_rows(stages, model, groups, lambda parameter: parameter.data)
            results.append((names, {name: digest(tensor) for name, tensor in whole.items()}))
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_stages_hold_the_rows_and_start_alike(world_size: int) -> None:
    layouts = [degrees for degrees in LAYOUTS if degrees.world_size == world_size]
    by_rank = run_distributed(build, world_size, layouts)
    jobs = [(degrees, case) for degrees in layouts for case in AT_LAYOUTS]
    for number, (degrees, case) in enumerate(jobs):
        model = model_at(case, degrees)
        rows = weight_table(model)
        held = [by_rank[rank][number][0] for rank in range(world_size)]
        assert {name for names in held for name in names} == {row.name for row in rows}, (degrees, case.name)
        if degrees.pipeline == 2:
            assert not set(held[0]) & set(held[1])
        if degrees.tensor == 2:
            assert held[0] == held[1]
        source = Drawn(model, SEED)
        expected = {name: digest(source.read(name)) for name in source.names()}
        for rank in range(world_size):
            assert by_rank[rank][number][1] == expected, (degrees, case.name, rank)


# What the weights are drawn from -------------------------------------------------------------------------------------

LARGE = ModelConfig(
    vocab_size=600,
    additional_vocab_size=40,
    hidden_size=256,
    intermediate_size=320,
    num_layers=4,
    num_heads=4,
    cross_layer_interval=2,
    alpha_init=0.25,
    vision=VisionConfig(embed_dim=96, image_size=28, intermediate_size=64, num_heads=4, num_layers=1),
    perceiver=PerceiverConfig(depth=1, num_heads=4, head_dim=40, num_latents=64),
)
H, F, V, L = 256, 320, 96, 4
XATTN, PERCEIVER = "model.gated_cross_attn_layers.1", "model.perceiver_resampler"

STANDARD_DEVIATIONS = {
    f"{XATTN}.cross_attn.q_proj.weight": math.sqrt(0.4 / H),
    f"{XATTN}.cross_attn.k_proj.weight": math.sqrt(0.4 / V),
    f"{XATTN}.cross_attn.v_proj.weight": math.sqrt(0.4 / V),
    f"{XATTN}.cross_attn.o_proj.weight": math.sqrt(0.4 / H),
    f"{XATTN}.mlp.gate_proj.weight": math.sqrt(0.4 / H),
    f"{XATTN}.mlp.up_proj.weight": math.sqrt(0.4 / H),
    f"{XATTN}.mlp.down_proj.weight": math.sqrt(0.4 / (F * 2 * L)),
    f"{PERCEIVER}.latents": math.sqrt(1 / V),
    f"{PERCEIVER}.blocks.0.0.q_proj.weight": math.sqrt(0.4 / V),
    f"{PERCEIVER}.blocks.0.0.k_proj.weight": math.sqrt(0.4 / V),
    f"{PERCEIVER}.blocks.0.0.v_proj.weight": math.sqrt(0.4 / V),
    f"{PERCEIVER}.blocks.0.0.output_proj.weight": math.sqrt(0.4 / V),
    f"{PERCEIVER}.blocks.0.1.fc.weight": math.sqrt(0.4 / V),
    f"{PERCEIVER}.blocks.0.1.c_proj.weight": math.sqrt(0.4 / (V * 2 * L)),
    "model.embed_tokens.weight": math.sqrt(1 / H),
    "model.embed_tokens.additional_embedding.weight": math.sqrt(1 / H),
    "lm_head.additional_fc.weight": math.sqrt(1 / H),
}


@pytest.fixture(scope="module")
def started() -> dict[str, Tensor]:
    source = Drawn(LARGE, SEED)
    return {name: source.read(name) for name in source.names()}


@pytest.mark.parametrize("name", STANDARD_DEVIATIONS)
def test_standard_deviations(name: str, started: dict[str, Tensor]) -> None:
    """Within five standard errors, of the mean too."""
    expected, values = STANDARD_DEVIATIONS[name], started[name].double()
    n = values.numel()
    assert float(values.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * n))
    assert abs(float(values.mean())) < 5 * expected / math.sqrt(n)


def test_norms_and_gates(started: dict[str, Tensor]) -> None:
    for name, tensor in started.items():
        if "alpha" in name:
            assert tensor.tolist() == [0.25], name
        elif "norm" in name or ".ln." in name or "layrnorm" in name:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            assert tensor.std() > 0, name


def test_draws_differ_by_name_and_seed(started: dict[str, Tensor]) -> None:
    key, value = started[f"{XATTN}.cross_attn.k_proj.weight"], started[f"{XATTN}.cross_attn.v_proj.weight"]
    assert not torch.equal(key, value)
    again, other = (Drawn(LARGE, seed).read(f"{PERCEIVER}.latents") for seed in (SEED, SEED + 1))
    assert torch.equal(again, started[f"{PERCEIVER}.latents"])
    assert not torch.equal(other, started[f"{PERCEIVER}.latents"])
