"""What a rank computes of a case, against what Hugging Face expects."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.weights import gather_rows, named_weights
from tests.layouts import Degrees, build_engine, test_config
from tests.model.cases import Expected, pixels_of_rank
from tests.training.losses import report_sums

NEVER_TRAINED = "post_layernorm"


def run_cases(rank: int, world_size: int, degrees: Degrees, path: str) -> list[dict[str, Any]]:
    """All cases at one layout. Returns one dict of differences per case."""
    return [compare(expected, degrees) for expected in torch.load(path, weights_only=False)]


def compare(expected: Expected, degrees: Degrees) -> dict[str, Any]:
    case = expected.case
    model = from_hf(expected.config)
    model.vision.interpolate_positions = case.pixels is not None
    engine = build_engine(test_config(model), degrees, expected.state)
    groups = engine.groups
    batches = [pixels_of_rank(batch, groups.tensor_rank, degrees.tensor) for batch in expected.batches]
    if not groups.is_first_stage:
        batches = [replace(batch, pixels=batch.pixels[:0]) for batch in batches]
    logits = engine.logits(batches)
    engine.build_optimizer()
    settings, reports = engine.forward_backward(batches)
    losses = report_sums(reports, settings, groups, engine.device)
    gradients = gather_rows(engine.stages, model, groups, gradient_of)
    return {
        "case": case.name,
        "logits": logits_difference(logits, expected),
        "loss": abs(losses["loss"] + 0.01 * losses["z_loss"] - expected.loss),
        "gradients": gradient_differences(gradients, expected.gradients),
        "missing": sorted(name for name in set(expected.gradients) ^ set(gradients) if NEVER_TRAINED not in name),
        "replicated": replicated_difference(engine),
    }


def gradient_of(parameter: torch.nn.Parameter) -> Tensor | None:
    return parameter.main_grad if parameter.requires_grad else None


def logits_difference(logits: list[Tensor], expected: Expected) -> float:
    """Largest absolute difference over real tokens; 0 on ranks that hold no logits."""
    worst = 0.0
    for ours, theirs, batch in zip(logits, expected.logits, expected.batches, strict=False):
        real = batch.input_ids != 0  # random ids are at least 3
        assert ours.shape == theirs.shape
        worst = max(worst, float((ours.cpu() - theirs)[real].abs().max()))
    return worst


# A constant added to all keys leaves a softmax as it is: these gradients are zero, and what is computed is rounding.
ZERO_GRADIENT = re.compile(r"perceiver_resampler.*k_layer_norm.bias|vision_model.*k_proj.bias")


def gradient_differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, relative to its largest gradient (to 1 where that is zero by nature)."""
    return {name: _difference(name, ours[name], theirs[name]) for name in set(ours) & set(theirs)}


def _difference(name: str, ours: Tensor, theirs: Tensor) -> float:
    size = 1.0 if ZERO_GRADIENT.search(name) else float(theirs.abs().max())
    if size == 0.0:
        return float(ours.abs().max())
    return float((ours - theirs).abs().max()) / size


def replicated_difference(engine: Any) -> float:
    """Largest difference of a replicated gradient between tensor ranks."""
    worst = 0.0
    for parameter in named_weights(engine.stages).values():
        if parameter.requires_grad and not getattr(parameter, "tensor_model_parallel", False):
            parts: list[Any] = [None] * engine.groups.layout.tensor
            torch.distributed.all_gather_object(parts, parameter.main_grad.clone(), group=engine.groups.tensor)
            worst = max(worst, *(float((part - parts[0]).abs().max()) for part in parts), 0.0)
    return worst
