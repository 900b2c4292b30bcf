"""Gates and norms of each layer: against a plain computation, and the same at every layout."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.checkpoint.hf_config import from_hf
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees, build_engine, test_config
from tests.model.cases import Case, Expected, reference
from tests.training.equivalence import own_share, rotate

SCALAR = Case("scalar", 31, rows=1, images=((2,), (0,), (1,), (3,)), small_norm_inputs=False)
VECTOR = Case(
    "vector", 32, rows=1, images=((1,), (2,), (0,), (1,)), frozen=True, alpha_type="vector", small_norm_inputs=False
)
PLAIN = {"distributed": False, "overlap_grad_reduce": False}
SHARDED = {"distributed": True, "overlap_grad_reduce": True}
BUCKETS = {**SHARDED, "bucket_size": 2000}
JOBS = [
    (Degrees(tensor=2), PLAIN),
    (Degrees(tensor=2, sequence=True), SHARDED),
    (Degrees(tensor=2, sequence=True), {**SHARDED, "recompute": "full"}),
    (Degrees(pipeline=2), SHARDED),
    (Degrees(pipeline=2, virtual=2), SHARDED),
    (Degrees(data=2), PLAIN),
    (Degrees(data=2), SHARDED),
    (Degrees(data=2), BUCKETS),
    (Degrees(data=2, tensor=2, sequence=True), BUCKETS),
    (Degrees(data=2, pipeline=2), SHARDED),
]


def watch(rank: int, world_size: int, jobs: list[tuple[Degrees, Any]], path: str) -> list[dict[str, Any]]:
    """The second of two steps, so that the weights have moved, watched; and what it says at one process."""
    expected: Expected = torch.load(path, weights_only=False)
    return [watch_one(expected, degrees, changes) for degrees, changes in jobs]


def watch_one(expected: Expected, degrees: Degrees, changes: dict[str, Any]) -> dict[str, Any]:
    from megatron_atum.training.details import LayerWatch

    engine = build_engine(test_config(from_hf(expected.config), **changes), degrees, expected.state)
    engine.build_optimizer()
    watch = LayerWatch(engine.stages, engine.groups)
    engine.step(own_share(expected.batches, engine.groups))
    outputs = record_outputs(engine.stages) if degrees == ONE else {}
    watch.begin()
    engine.forward_backward(own_share(rotate(expected.batches, 1), engine.groups))
    found = watch.end(engine.optimizer)
    hooks = sum(len(module._forward_hooks) for stage in engine.stages for module in stage.modules())
    return {"found": found, "hooks": hooks, "plain": plain(engine, outputs) if degrees == ONE else {}}


def record_outputs(stages: list[Any]) -> dict[str, list[torch.Tensor]]:
    """Every output of every layer from here on."""
    outputs: dict[str, list[torch.Tensor]] = defaultdict(list)
    for stage in stages:
        for attribute, name in (("decoder_layers", "decoder"), ("cross_attention_layers", "cross_attention")):
            for number, layer in getattr(stage, attribute).items():

                def forward(
                    *args: Any, key: str = f"{name}.{number}", inner: Any = layer.forward, **kwargs: Any
                ) -> Any:
                    out = inner(*args, **kwargs)
                    outputs[key].append((out[0] if isinstance(out, tuple) else out).detach().clone())
                    return out

                layer.forward = forward
    return outputs


def plain(engine: Any, outputs: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """The same, written as one would for a model on one device."""
    values = {f"activation_norm/{name}": float(torch.stack(x).square().mean().sqrt()) for name, x in outputs.items()}
    (stage,) = engine.stages
    for unit, layer in stage.cross_attention_layers.items():
        for part, alpha in (("attention", layer.alpha_attention), ("mlp", layer.alpha_mlp)):
            gates = alpha.tanh().tolist()
            values[f"gate/{unit}/{part}"] = gates[0] if len(gates) == 1 else sum(map(abs, gates)) / len(gates)
    parts = {f"decoder.{n}": layer for n, layer in stage.decoder_layers.items()}
    parts |= {f"cross_attention.{n}": layer for n, layer in stage.cross_attention_layers.items()}
    parts |= {name: getattr(stage, name) for name in ("embedding", "vision", "perceiver", "final_norm", "head")}
    for name, module in parts.items():
        gradients = [p.main_grad.flatten() for p in module.parameters() if p.requires_grad]
        if gradients:
            values[f"gradient_norm/{name}"] = float(torch.cat(gradients).double().norm())
    return values


@pytest.fixture(scope="module", params=[SCALAR, VECTOR], ids=lambda case: case.name)
def watched_alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("watch") / "expected.pt"
    torch.save(reference(request.param), path)
    return path, run_distributed(watch, 1, [(ONE, PLAIN)], str(path))[0][0]


def test_one_process_says_what_a_plain_computation_says(watched_alone: tuple[Path, Any]) -> None:
    _, alone = watched_alone
    assert alone["found"].keys() == alone["plain"].keys()
    assert alone["found"] == pytest.approx(alone["plain"], rel=1e-5)
    assert all(math.isfinite(value) and value != 0 for value in alone["found"].values())
    assert alone["hooks"] == 0


def test_what_is_frozen_has_no_gradient_norm(watched_alone: tuple[Path, Any]) -> None:
    path, alone = watched_alone
    frozen = torch.load(path, weights_only=False).case.frozen
    assert ("gradient_norm/decoder.3" in alone["found"]) is not frozen
    assert ("gradient_norm/vision" in alone["found"]) is not frozen
    assert {"gradient_norm/cross_attention.1", "gradient_norm/perceiver", "gradient_norm/head"} <= set(alone["found"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_says_the_same(world_size: int, watched_alone: tuple[Path, Any]) -> None:
    path, alone = watched_alone
    jobs = [job for job in JOBS if job[0].world_size == world_size]
    ranks = run_distributed(watch, world_size, jobs, str(path))
    for number, (degrees, changes) in enumerate(jobs):
        for rank in ranks:
            found = rank[number]["found"]
            assert found.keys() == alone["found"].keys(), f"{degrees} {changes}"
            assert found == ranks[0][number]["found"], f"{degrees} {changes}: ranks differ"
            for name, value in found.items():
                assert value == pytest.approx(alone["found"][name], rel=1e-5), f"{degrees} {changes}: {name}"
