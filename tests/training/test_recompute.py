"""Recomputed activations change neither losses nor gradients nor parameters, at any layout; and they are not kept."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_atum.checkpoint.hf_config import from_hf
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees, build_engine, test_config
from tests.model.cases import Case, Expected, reference
from tests.training.equivalence import own_share, train
from tests.training.test_equivalence import GATHERED, PLAIN, SHARDED, check_equal

SHAPE: dict[str, Any] = {"layers": 8, "interval": 2, "rows": 1, "small_norm_inputs": False}
UNFROZEN = Case("unfrozen", 31, images=((2,), (0,)), **SHAPE)
# without added words nothing in the embedding trains, so what enters the first layer needs no gradient
FROZEN = Case("frozen", 32, images=((1,), (2,)), frozen=True, added=0, alpha_type="vector", **SHAPE)

LAYOUTS = [
    ONE,
    Degrees(tensor=2, sequence=True),
    Degrees(pipeline=2),
    Degrees(pipeline=2, virtual=2),
    Degrees(tensor=2, pipeline=2, sequence=True),
]
KINDS: list[dict[str, Any]] = [
    {"recompute": "selective"},
    {"recompute": "full", "recompute_layers": 3},
    {"recompute": "full", "recompute_method": "block", "recompute_layers": 1},
]


@pytest.fixture(scope="module", params=[UNFROZEN, FROZEN], ids=lambda case: case.name)
def trained_alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A case on disk, and its steps in one process without recomputation."""
    path = tmp_path_factory.mktemp("recompute") / "expected.pt"
    torch.save(reference(request.param), path)
    return path, run_distributed(train, 1, [(ONE, PLAIN)], str(path))[0][0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_steps_equal_those_without_recomputation(world_size: int, trained_alone: tuple[Path, Any]) -> None:
    path, alone = trained_alone
    layouts = [degrees for degrees in LAYOUTS if degrees.world_size == world_size]
    jobs = [(degrees, {**SHARDED, **kind}) for degrees in layouts for kind in KINDS]
    if world_size == 2:
        jobs.append((Degrees(data=2), {**GATHERED, "recompute": "full"}))  # hooks on modules run again
    results = run_distributed(train, world_size, jobs, str(path), timeout=400)
    for number, (degrees, changes) in enumerate(jobs):
        check_equal(results[0][number], alone, f"{degrees} {changes}")


def test_first_stage_trains_with_frozen_embeddings(trained_alone: tuple[Path, Any]) -> None:
    """What megatron-core's reentrant checkpoint would leave untrained without an error."""
    path, alone = trained_alone
    expected: Expected = torch.load(path, weights_only=False)
    if not expected.case.frozen:
        assert "model.embed_tokens.weight" in alone["parameters"]
        return
    assert not any("embed_tokens" in name for name in alone["parameters"])
    (ours,) = run_distributed(train, 2, [(Degrees(pipeline=2), {**PLAIN, "recompute": "full"})], str(path))[0]
    first = [name for name in ours["parameters"] if "gated_cross_attn_layers.0." in name or "perceiver" in name]
    assert len(first) > 20
    still = [name for name in first if torch.equal(ours["parameters"][name], expected.state[name])]
    assert not still


# What is computed again, and what is kept ----------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """Bytes of what is computed inside and still there."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        return sum(size for reference, size in self._seen.values() if not reference.expired())


def forwards_and_bytes(rank: int, world_size: int, kinds: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    expected: Expected = torch.load(path, weights_only=False)
    return [_forwards_and_bytes(expected, kind) for kind in kinds]


def _forwards_and_bytes(expected: Expected, kind: dict[str, Any]) -> dict[str, Any]:
    """How often layers and their parts ran in one forward and backward, and what lay in memory in between."""
    from megatron_atum.model.inputs import prepare
    from megatron_atum.parallel.cpu_compat import emulated_cuda

    engine = build_engine(test_config(from_hf(expected.config), **kind), ONE, expected.state)
    (stage,) = engine.stages
    ran: Counter[str] = Counter()
    parts = {"decoder": stage.decoder_layers, "cross": stage.cross_attention_layers, "block": stage.perceiver.blocks}
    watched = {f"{part} {name}": layer for part, layers in parts.items() for name, layer in layers.named_children()}
    watched |= {f"vision {number}": layer for number, layer in enumerate(stage.vision.layers)}
    first = stage.decoder_layers["0"]
    watched |= {"widen": first.mlp.linear_fc1, "narrow": first.mlp.linear_fc2}
    watched |= {"scores": first.self_attention.core_attention}
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda *_, name=name: ran.update([name]))
    inputs = prepare(own_share(expected.batches[:1], engine.groups), engine.config.model, *_of(engine))
    storages = Storages()
    with emulated_cuda():
        with storages:
            output = stage(inputs[0])
        kept = storages.alive()
        output.sum().backward()
    return {"ran": dict(ran), "kept": kept}


def _of(engine: Any) -> tuple[Any, torch.device, torch.dtype]:
    return engine.groups, engine.device, engine.dtype


COUNTED = {
    "none": {},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "full by threes": {"recompute": "full", "recompute_layers": 3},
    "first": {"recompute": "full", "recompute_method": "block"},
    "first three": {"recompute": "full", "recompute_method": "block", "recompute_layers": 3},
}
LONG: dict[str, Any] = {**SHAPE, "images": ((1,),), "length": 256}  # text outweighs the rest


@pytest.fixture(scope="module", params=[False, True], ids=["unfrozen", "frozen"])
def counted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Whether the case is frozen, and what `forwards_and_bytes` finds of each entry of `COUNTED`."""
    path = tmp_path_factory.mktemp("counted") / "expected.pt"
    torch.save(reference(Case("long", 33, frozen=request.param, **LONG)), path)
    found = run_distributed(forwards_and_bytes, 1, list(COUNTED.values()), str(path))[0]
    return request.param, dict(zip(COUNTED, found, strict=True))


def test_what_is_recomputed_runs_twice(counted: tuple[bool, dict[str, dict[str, Any]]]) -> None:
    frozen, found = counted
    twice = {kind: {name for name, count in of["ran"].items() if count == 2} for kind, of in found.items()}
    assert all(set(of["ran"].values()) <= {1, 2} for of in found.values())
    assert not twice["none"]
    # the attention products run again below their module: test_flops.py counts them
    assert twice["selective"] == {"widen"}
    others = {"widen", "narrow", "scores", "block 0", "block 1"} | (set() if frozen else {"vision 0", "vision 1"})
    text = {f"decoder {n}" for n in range(8)} | {f"cross {n}" for n in range(4)}
    assert twice["full"] == twice["full by threes"] == text | others
    assert twice["first"] == {"decoder 0", "cross 0"} | others
    assert twice["first three"] == {"decoder 0", "decoder 1", "decoder 2", "cross 0", "cross 1"} | others


def test_what_is_recomputed_is_not_kept(counted: tuple[bool, dict[str, dict[str, Any]]]) -> None:
    _, found = counted
    kept = {kind: of["kept"] / found["none"]["kept"] for kind, of in found.items()}
    in_order = ["none", "first", "first three", "full", "full by threes"]
    assert all(kept[more] - kept[less] > 0.01 for more, less in pairwise(in_order)), kept
    assert kept["full"] < 0.3, kept
    assert kept["selective"] < 0.8, kept
