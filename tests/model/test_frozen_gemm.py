"""Products of frozen weights in 8 bits: within the bounds of e4m3, at every layout, and nowhere else.

Bounds: rounding to e4m3 costs a value at most 2^-4 of itself, or 2^-10 of the row's scale where it is small
(`_cast_error`); a product's error is at most what its factors' errors add up to.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.stored import StoredCheckpoint
from megatron_atum.checkpoint.weights import gather_rows, named_weights
from megatron_atum.config.schema import Config
from megatron_atum.errors import ConfigError, HealthFailure
from megatron_atum.model import frozen_gemm
from megatron_atum.model.frozen_gemm import (
    E4M3,
    LARGEST,
    FrozenMatrix,
    cast_rows,
    check_device,
    frozen_matrices,
    weight_bytes,
)
from megatron_atum.parallel.device import device, memory_gib
from megatron_atum.planning.recorder import GRAIN, Recorder
from megatron_atum.training.corruption import FrozenWeights
from megatron_atum.training.self_check import describe
from tests.checkpoint.runs import config_of, engine_of, resumed_engine, saved, steps, weights
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees, build_engine, test_config
from tests.model.cases import Case, Expected, reference
from tests.training.equivalence import own_share

ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8}  # of a result, sums included


def random(*shape: int, seed: int = 0) -> Tensor:
    """Values of many sizes, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()


def matrix_of(weight: Tensor) -> FrozenMatrix:
    return FrozenMatrix.of(weight, None)


def multiplied(matrix: FrozenMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
    empty = torch.empty(0)
    return matrix(x, empty, bias, allreduce_dgrad=False, sequence_parallel=False, tp_group=None)


# Casts ----------------------------------------------------------------------------------------------------------------


def _cast_error(x: Tensor) -> Tensor:
    """Most that a row's cast can cost each of its values, fp64."""
    scale = x.double().abs().amax(-1, keepdim=True) / LARGEST
    return torch.maximum(x.double().abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_cast_is_within_its_bound(dtype: torch.dtype) -> None:
    x = random(64, 200).to(dtype)
    x[1] *= 1e-12
    x[2] *= 1e12
    x[3, 7] = 1e5  # all others are small beside it
    x[4] = 0.0
    values, scales = cast_rows(x)
    assert values.dtype == E4M3 and scales.dtype == torch.float32 and scales.shape == (64,)
    error = (values.double() * scales.double()[:, None] - x.double()).abs()
    assert bool((error <= _cast_error(x)).all())
    assert float(error[0].max()) > 0.3 * float(_cast_error(x)[0].max()), "else the bound says nothing"
    assert values.float().abs().amax(-1).tolist() == [LARGEST] * 4 + [0.0] + [LARGEST] * 59


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """Else a bad step would look like a good one."""
    x = random(3, 16)
    x[1, 5] = bad
    y = multiplied(matrix_of(random(8, 16)), x.requires_grad_())
    assert y.isfinite().all(-1).tolist() == [True, False, True]
    upstream = torch.ones_like(y)
    upstream[2, 3] = bad
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert gradient.isfinite().all(-1).tolist() == [True, True, False]


# Products -------------------------------------------------------------------------------------------------------------


def exact_in_8_bits(*shape: int, seed: int) -> Tensor:
    """Whole numbers up to 7, one of them in every row: scales are powers of two and nothing is rounded."""
    x = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed)).float()
    x[..., 0] = 7.0
    return x


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (16, 2), (0, 3), (4, 0)])
def test_products_of_what_8_bits_hold_are_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Also of rows that are no multiple of 16, and of none."""
    x = exact_in_8_bits(*shape, 48, seed=1).to(dtype).requires_grad_()
    weight = exact_in_8_bits(32, 48, seed=2) * 2.0 ** torch.arange(-16, 16)[:, None]
    bias = torch.arange(32.0).to(dtype).requires_grad_()
    y = multiplied(matrix_of(weight.to(dtype)), x, bias)
    expected = (F.linear(x.float(), weight).to(dtype) + bias).detach()
    assert y.dtype == dtype and torch.equal(y, expected)

    upstream = exact_in_8_bits(*shape, 32, seed=3) * 2.0 ** -torch.arange(-16, 16)  # with the scales, 8 bits again
    found, found_bias = torch.autograd.grad(y, (x, bias), upstream.to(dtype))
    assert found.dtype == dtype and torch.equal(found, (upstream @ weight).to(dtype))
    assert torch.equal(found_bias, upstream.to(dtype).flatten(0, 1).sum(0))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("M", [1, 17, 64])
def test_products_are_within_their_bounds(M: int, dtype: torch.dtype) -> None:
    _check_bounds(random(M, 80).to(dtype), random(48, 80, seed=1).to(dtype), random(M, 48, seed=2).to(dtype))


def _check_bounds(x: Tensor, weight: Tensor, upstream: Tensor) -> None:
    rounding = ROUNDING[upstream.dtype]
    matrix = matrix_of(weight)
    assert (matrix.values_NK.dtype, matrix.scales_N.dtype) == (E4M3, torch.float32)
    y = multiplied(matrix, x.requires_grad_())
    (found,) = torch.autograd.grad(y, x, upstream)
    x, weight, upstream, y, found = (tensor.detach().cpu().double() for tensor in (x, weight, upstream, y, found))
    scales = matrix.scales_N.cpu().double()
    cast_weight = matrix.values_NK.cpu().double() * scales[:, None]
    weight_error = _cast_error(weight)
    assert bool(((cast_weight - weight).abs() <= weight_error).all())

    plain = x @ weight.t()
    bound = _cast_error(x) @ cast_weight.abs().t() + x.abs() @ weight_error.t()
    bound += rounding * (x.abs() @ cast_weight.abs().t())
    assert bool(((y - plain).abs() <= bound).all())
    assert float((y - plain).norm() / plain.norm()) < 0.06

    plain = upstream @ weight
    bound = _cast_error(upstream * scales) @ matrix.values_NK.cpu().double().abs() + upstream.abs() @ weight_error
    bound += rounding * (upstream.abs() @ cast_weight.abs())
    assert bool(((found - plain).abs() <= bound).all())
    assert float((found - plain).norm() / plain.norm()) < 0.06


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_weight_is_cast_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole would be, with little memory: its product with the scales would be in fp32."""
    weight = random(510, 128).to(dtype)
    whole = matrix_of(weight)
    values, scales = cast_rows(weight)
    assert torch.equal(whole.values_NK.float(), values.float()) and torch.equal(whole.scales_N, scales)
    assert whole.ones_K.tolist() == [1.0] * 128
    assert whole.nbytes == 510 * 128 + 4 * 510 + 4 * 128
    monkeypatch.setattr(frozen_gemm, "_AT_ONCE", 16 * 128 + 5)
    with Recorder() as recorder:
        parts = matrix_of(weight)
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(parts.tensors, whole.tensors, strict=True))
    of_rows = 5 * 4 * 510  # numbers for each row
    assert recorder.memory.peak - weight.nbytes < parts.nbytes + 2 * 4 * 16 * 128 + of_rows + 100 * GRAIN
    assert 4 * weight.numel() > 2 * 4 * 16 * 128 + of_rows + 100 * GRAIN, "else the bound says nothing"


def test_rows_do_not_depend_on_each_other() -> None:
    """So a gather of cast rows is the cast of the gathered ones."""
    x = random(37, 64)
    values, scales = cast_rows(x)
    parts = [cast_rows(part) for part in x.split(5)]
    assert torch.equal(torch.cat([part.float() for part, _ in parts]), values.float())
    assert torch.equal(torch.cat([part for _, part in parts]), scales)


# Models ---------------------------------------------------------------------------------------------------------------

CASE = Case(
    "frozen_in_8_bits",
    51,
    rows=3,
    length=32,
    images=((2, 1, 0), (0, 0, 0), (3, 0, 1), (1, 0, 0)),
    frozen=True,
    small_norm_inputs=False,
)
PLAIN_LOSS, PLAIN_GRADIENT = 2e-3, 0.15  # most that 8 bits change, relative
LAYOUTS = {
    "one": (ONE, {}),
    "again": (ONE, {}),
    "recomputed": (ONE, {"recompute": "full"}),
    "bf16": (ONE, {"precision": "bf16"}),
    "tp2": (Degrees(tensor=2), {}),
    "tp2sp": (Degrees(tensor=2, sequence=True), {}),
    "tp2sp recomputed": (Degrees(tensor=2, sequence=True), {"recompute": "selective"}),
    "pp2": (Degrees(pipeline=2), {}),
    "pp2vpp2": (Degrees(pipeline=2, virtual=2), {}),
}


def fp8_config(expected: Expected, **changes: Any) -> Config:
    config = test_config(from_hf(expected.config), **changes)
    config.kernels.frozen_gemm = "fp8"
    return config


def gradients_of(engine: Any, expected: Expected) -> dict[str, Any]:
    batches = own_share(expected.batches, engine.groups)
    result = engine.compute(batches)
    found = gather_rows(
        engine.stages,
        engine.config.model,
        engine.groups,
        lambda parameter: parameter.main_grad if parameter.requires_grad else None,
    )
    return {"loss": result.losses["loss"], "norm": result.grad_norm, "gradients": found}


def compute(rank: int, world_size: int, path: str, names: list[str]) -> dict[str, Any]:
    expected: Expected = torch.load(path, weights_only=False)
    results = {}
    for name in names:
        degrees, changes = LAYOUTS[name]
        engine = build_engine(fp8_config(expected, **changes), degrees, expected.state)
        engine.build_optimizer()
        engine.cast_frozen()
        results[name] = gradients_of(engine, expected)
        results[name]["cast"] = {
            name: matrix.values_NK.cpu() for name, _, matrix in frozen_matrices(engine.stages) if degrees.tensor == 1
        }
    return results


def compute_plain(rank: int, world_size: int, path: str, precision: str) -> dict[str, Any]:
    expected: Expected = torch.load(path, weights_only=False)
    engine = build_engine(test_config(from_hf(expected.config), precision=precision), ONE, expected.state)
    engine.build_optimizer()
    return gradients_of(engine, expected)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frozen_gemm") / "expected.pt"
    torch.save(reference(CASE), path)
    return path


@pytest.fixture(scope="module")
def found(path: Path) -> dict[str, dict[str, Any]]:
    """Loss and gradients at every layout in 8 bits, and of plain products."""
    results = {}
    for size in (1, 2):
        names = [name for name, (degrees, _) in LAYOUTS.items() if degrees.world_size == size]
        results |= run_distributed(compute, size, str(path), names)[0]
    results["plain"] = run_distributed(compute_plain, 1, str(path), "fp32")[0]
    return results


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Of all gradients together, relative."""
    ours, theirs = (torch.cat([x["gradients"][name].flatten() for name in sorted(b["gradients"])]) for x in (a, b))
    return float((ours - theirs).norm() / theirs.norm())


def test_gradients_are_those_of_plain_products_but_for_rounding(found: dict[str, dict[str, Any]]) -> None:
    """Each product is off by some 4 % of its norm. bf16's rounding alone changes these gradients by 9 %."""
    ours, plain = found["one"], found["plain"]
    assert 0 < abs(ours["loss"] / plain["loss"] - 1) < PLAIN_LOSS
    assert 0.01 < difference(ours, plain) < PLAIN_GRADIENT


def test_gradients_reach_every_weight_that_trains(found: dict[str, dict[str, Any]]) -> None:
    for name, result in found.items():
        assert result["gradients"].keys() == found["plain"]["gradients"].keys(), name
        assert all(bool(gradient.any()) for gradient in result["gradients"].values()), name


def test_two_runs_give_the_same_bits(found: dict[str, dict[str, Any]]) -> None:
    assert difference(found["again"], found["one"]) == 0.0 and found["again"]["loss"] == found["one"]["loss"]


@pytest.mark.parametrize("name", ["recomputed", "pp2", "pp2vpp2"])
def test_recomputation_and_pipelines_change_nothing(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[name]["loss"] == pytest.approx(found["one"]["loss"], rel=1e-6)
    assert difference(found[name], found["one"]) < 1e-6


@pytest.mark.parametrize("name", ["tp2", "tp2sp", "tp2sp recomputed"])
def test_tensor_parallelism_changes_the_scales_of_split_rows_only(name: str, found: dict[str, dict[str, Any]]) -> None:
    """Inputs of row-parallel layers, and gradients of column-parallel ones, are cast in parts. That is nearer to one
    process than both are to plain products."""
    assert found[name]["loss"] == pytest.approx(found["one"]["loss"], rel=PLAIN_LOSS / 2)
    assert difference(found[name], found["one"]) < PLAIN_GRADIENT / 2
    assert difference(found[name], found["plain"]) < PLAIN_GRADIENT


def test_sequence_parallelism_gathers_cast_rows_exactly(found: dict[str, dict[str, Any]]) -> None:
    assert found["tp2sp"]["loss"] == pytest.approx(found["tp2"]["loss"], rel=1e-6)
    assert difference(found["tp2sp"], found["tp2"]) < 1e-5
    assert difference(found["tp2sp recomputed"], found["tp2sp"]) < 1e-6


# What is cast ---------------------------------------------------------------------------------------------------------


def test_what_is_cast(found: dict[str, dict[str, Any]]) -> None:
    """Four matrices in each of four decoder and two vision layers; no head, no table, nothing that trains."""
    cast = found["one"]["cast"]
    parts = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    places = [*(f"decoder_layers.{n}" for n in range(4)), *(f"vision.layers.{n}" for n in range(2))]
    assert sorted(cast) == sorted(f"{place}.{part}.weight" for place in places for part in parts)
    assert sorted(found["pp2vpp2"]["cast"].keys() & cast.keys()) == sorted(found["pp2vpp2"]["cast"])


def cast_twice(rank: int, world_size: int, path: str, degrees: Degrees) -> dict[str, Any]:
    expected: Expected = torch.load(path, weights_only=False)
    engine = build_engine(fp8_config(expected, precision="bf16"), degrees, expected.state)
    engine.build_optimizer()
    refused = ""
    try:
        engine.compute(own_share(expected.batches, engine.groups))
    except AssertionError as error:
        refused = str(error)
    before, elements = weight_bytes(engine.stages), {p: p.numel() for p in named_weights(engine.stages).values()}
    original = {name: p.detach().clone() for name, p in named_weights(engine.stages).items()}
    casts: list[int] = []
    of = FrozenMatrix.of
    FrozenMatrix.of = lambda *arguments: casts.append(1) or of(*arguments)  # type: ignore[method-assign]
    engine.cast_frozen()
    matrices = {name: matrix for name, _, matrix in frozen_matrices(engine.stages)}
    engine.compute(own_share(expected.batches, engine.groups))
    engine.cast_frozen()
    frozen_gemm.cast_frozen(engine.stages)
    return {
        "refused": refused,
        "casts": len(casts),
        "same": all(matrix is matrices[name] for name, _, matrix in frozen_matrices(engine.stages)),
        "saved": before - weight_bytes(engine.stages),
        "halved": sum(elements[weight] for _, weight, _ in frozen_matrices(engine.stages)),
        "scales": sum(4 * sum(matrix.values_NK.shape) for matrix in matrices.values()),
        "originals": sum(weight.nbytes for _, weight, _ in frozen_matrices(engine.stages)),
        "unchanged": all(torch.equal(p, original[name]) for name, p in named_weights(engine.stages).items()),
        "values": {name: matrix.values_NK for name, matrix in matrices.items()},
        "said": describe(engine, {"a": 1.0}, "x"),
    }


@pytest.fixture(scope="module")
def twice(path: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        str(degrees): run_distributed(cast_twice, degrees.world_size, str(path), degrees)
        for degrees in (ONE, Degrees(tensor=2), Degrees(pipeline=2))
    }


def test_weights_are_cast_once_and_take_half_the_memory(twice: dict[str, list[dict[str, Any]]]) -> None:
    for ranks in twice.values():
        for rank in ranks:
            assert "cast_frozen() comes before" in rank["refused"]
            assert rank["casts"] == len(rank["values"]) > 0 and rank["same"] and rank["unchanged"]
            assert rank["saved"] == rank["halved"] - rank["scales"], "one byte of each two, but for the scales"


def test_a_run_says_what_is_cast(twice: dict[str, list[dict[str, Any]]]) -> None:
    lines = {
        name: next(line for line in ranks[0]["said"].splitlines() if line.startswith("frozen products"))
        for name, ranks in twice.items()
    }
    assert lines["one"] == lines["pp2"]
    assert all("24 matrices in fp8" in line and "which the hosts keep" in line for line in lines.values())
    values = sum(value.numel() for value in twice["one"][0]["values"].values())
    assert f"in the place of {2 * values / 2**30:.3g}" in lines["one"]
    for name, ranks in twice.items():  # all of them on one host
        gib = sum(rank["originals"] for rank in ranks) / 2**30
        assert lines[name].endswith(f"which the hosts keep: at most {gib:.3g} GiB in the memory of a node")


def test_split_matrices_are_cast_as_whole_ones(twice: dict[str, list[dict[str, Any]]]) -> None:
    """Both parts of a row of a row-parallel layer have the row's scale."""
    parts = [rank["values"] for rank in twice["tp2"]]
    for name, whole in twice["one"][0]["values"].items():
        if name.startswith("vision"):
            assert all(torch.equal(part[name].float(), whole.float()) for part in parts)
        elif "proj" in name or "fc2" in name:
            assert torch.equal(torch.cat([part[name].float() for part in parts], dim=1), whole.float())
        else:  # the two halves of a gated projection lie side by side in each part
            rows = [sorted(values.float().tolist()) for values in (torch.cat([p[name].float() for p in parts]), whole)]
            assert rows[0] == rows[1]


def all_train(rank: int, world_size: int, expected: Expected) -> tuple[int, str]:
    config = fp8_config(expected)
    config.model.freeze = replace(config.model.freeze, text=False, vision=False, lm_head=False)
    engine = build_engine(config, ONE, expected.state)
    engine.build_optimizer()
    engine.cast_frozen()
    engine.step(expected.batches)
    return len(list(frozen_matrices(engine.stages))), describe(engine, {"a": 1.0}, "x")


def test_trained_backbones_have_nothing_to_cast() -> None:
    ((number, said),) = run_distributed(all_train, 1, reference(replace(CASE, frozen=False)))
    assert number == 0 and "kernels.frozen_gemm=fp8 has nothing to cast" in said


# Checkpoints and health -----------------------------------------------------------------------------------------------


def in_8_bits(asynchronous: bool = False) -> Config:
    config = config_of({"precision": "bf16"}, frozen=True, asynchronous=asynchronous)
    config.kernels.frozen_gemm = "fp8"
    return config


def saved_and_resumed(rank: int, world_size: int, root: str, degrees: Degrees) -> dict[str, Any]:
    config = in_8_bits(asynchronous=True)
    engine, checkpoint = engine_of(config, degrees, Path(root), seed=1)
    start = weights(engine)
    engine.cast_frozen()
    matrices = [matrix for *_, matrix in frozen_matrices(engine.stages)]
    steps(engine, range(2))
    folder = saved(checkpoint, 2)
    went_on = steps(engine, range(2, 4))
    second = saved(checkpoint, 4)
    other, _ = resumed_engine(config, degrees, folder, Path(root) / "other")
    other.cast_frozen()
    resumed = steps(other, range(2, 4))
    from megatron_atum.checkpoint.stored import read_state

    checkpoint.load(read_state(folder))  # a rollback
    same = all(old is new for old, (*_, new) in zip(matrices, frozen_matrices(engine.stages), strict=True))
    rolled_back = steps(engine, range(2, 4))
    names = {name for name, parameter in _frozen_names(engine)}
    stored = StoredCheckpoint(second)
    return {
        "resumed": resumed == went_on,
        "rolled_back": rolled_back == went_on and same,
        "exact": [
            name for name in sorted(names & start.keys()) if not torch.equal(stored.read(name), start[name].bfloat16())
        ],
        "frozen": len(names),
        "dtypes": sorted({str(stored.dtype(name)) for name in stored.names()}),
    }


def _frozen_names(engine: Any) -> list[tuple[str, Any]]:
    from megatron_atum.checkpoint.weights import rows_of

    rows = rows_of(engine.stages, engine.config.model)
    return [(name, parameter) for row, parameter in rows if not parameter.requires_grad for name in row.hf]


@pytest.mark.parametrize("degrees", [ONE, Degrees(tensor=2), Degrees(pipeline=2), Degrees(data=2)], ids=str)
def test_checkpoints_hold_the_originals_and_runs_go_on_from_them(degrees: Degrees, tmp_path: Path) -> None:
    for rank in run_distributed(saved_and_resumed, degrees.world_size, str(tmp_path), degrees):
        assert rank["resumed"] and rank["rolled_back"]
        assert rank["exact"] == [] and rank["frozen"] >= 20
        assert rank["dtypes"] == ["torch.bfloat16"]


def flipped(rank: int, world_size: int, path: str, degrees: Degrees) -> list[str]:
    """What the watch says of sound copies, of a flipped bit in each of their parts, and of one in an original."""
    expected: Expected = torch.load(path, weights_only=False)
    engine = build_engine(fp8_config(expected, precision="bf16"), degrees, expected.state)
    engine.build_optimizer()
    engine.cast_frozen()
    watch = FrozenWeights(engine.stages, engine.groups)
    _, weight, matrix = next(frozen_matrices(engine.stages))
    said = [_said(watch.check)]
    parts = (matrix.values_NK.view(torch.uint8), matrix.scales_N.view(torch.int32), matrix.ones_K.view(torch.int32))
    for bits in parts:
        bits.view(-1)[5] ^= 1 if rank == world_size - 1 else 0
        said.append(_said(watch.check))
        bits.view(-1)[5] ^= 1 if rank == world_size - 1 else 0
    weight.data.view(torch.int16)[0, 5] ^= 1 if rank == world_size - 1 else 0
    return [*said, _said(lambda: FrozenWeights(engine.stages, engine.groups))]


def _said(act: Any) -> str:
    try:
        act()
    except HealthFailure as error:
        return str(error)
    return ""


def test_a_flipped_bit_in_a_copy_is_found(path: Path) -> None:
    name = "vision.layers.0.self_attention.linear_proj.weight"
    sound, value, scale, one, original = run_distributed(flipped, 2, str(path), Degrees(data=2))[0]
    assert sound == ""
    for said, what in ((value, f"{name} in 8 bits"), (scale, f"scales of {name}"), (one, f"ones of {name}")):
        assert said.startswith("frozen weights have changed: rank 1 on ") and f" since the start: {what}." in said
    assert original.startswith("frozen weights differ at the start") and f": {name}." in original


# Where it cannot be ---------------------------------------------------------------------------------------------------


def refusal(precision: str, monkeypatch: pytest.MonkeyPatch, *, fp8: bool, accelerator: bool = True) -> str:
    config = Config()
    config.kernels.frozen_gemm, config.training.precision = "fp8", precision
    monkeypatch.setattr(frozen_gemm, "has_accelerator", lambda: accelerator)
    monkeypatch.setattr(frozen_gemm, "has_fp8_products", lambda: fp8)
    monkeypatch.setattr(frozen_gemm, "device_name", lambda: "an A100")
    try:
        check_device(config)
    except ConfigError as error:
        return str(error)
    return ""


def test_devices_without_such_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal("bf16", monkeypatch, fp8=False)
    assert "this is an A100" in said and said.endswith("kernels.frozen_gemm=bf16 would work")
    assert "training.precision=bf16 would work" in refusal("fp32", monkeypatch, fp8=True)
    assert refusal("bf16", monkeypatch, fp8=True) == ""
    assert refusal("fp32", monkeypatch, fp8=False, accelerator=False) == "", "a CPU emulates it"
    check_device(Config())


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_products_on_a_gpu() -> None:
    if not frozen_gemm.has_fp8_products():
        with pytest.raises(ConfigError, match="compute capability"):
            config = Config()
            config.kernels.frozen_gemm = "fp8"
            check_device(config)
        return
    for M, K, N in ((1, 64, 32), (17, 4096, 12288), (512, 11008, 4096), (1000, 1280, 5120)):
        x, weight, upstream = (random(*s, seed=n) for n, s in enumerate(((M, K), (N, K), (M, N))))
        _check_bounds(*(tensor.to(device(), torch.bfloat16) for tensor in (x, weight, upstream)))
    empty = torch.empty(5, 0, 64, dtype=torch.bfloat16, device=device(), requires_grad=True)
    y = multiplied(matrix_of(torch.ones(32, 64, dtype=torch.bfloat16, device=device())), empty)
    assert y.shape == (5, 0, 32) and torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


def trained_on_gpu(rank: int, world_size: int, path: str, fp8: bool) -> dict[str, Any]:
    expected: Expected = torch.load(path, weights_only=False)
    config = fp8_config(expected, precision="bf16") if fp8 else test_config(from_hf(expected.config), precision="bf16")
    engine = build_engine(config, ONE, expected.state)
    engine.build_optimizer()
    engine.cast_frozen()
    places = {weight.device.type for _, weight, _ in frozen_matrices(engine.stages)}
    watch = FrozenWeights(engine.stages, engine.groups)  # of weights on the host and on the device
    losses = [engine.step(expected.batches).losses["loss"] for _ in range(3)]
    watch.check()
    return {"losses": losses, "places": places, "gib": memory_gib()}


@pytest.mark.gpu
def test_a_model_on_a_gpu(tmp_path: Path) -> None:
    """Sides of a multiple of 16; its weights are in the memory of the host."""
    torch.save(reference(replace(CASE, heads=8)), tmp_path / "expected.pt")
    fp8, bf16 = (
        run_distributed(trained_on_gpu, 1, str(tmp_path / "expected.pt"), fp8, backend="nccl", timeout=300)[0]
        for fp8 in (True, False)
    )
    assert fp8["places"] == {"cpu"} and bf16["places"] == set()
    assert fp8["losses"] == pytest.approx(bf16["losses"], rel=0.02)
