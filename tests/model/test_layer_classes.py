"""Decoder layers of a provider's classes: which are asked for, and that they are the same model as torch's."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.index import read_index
from megatron_atum.checkpoint.weights import gather_rows, named_weights
from megatron_atum.config.schema import KernelsConfig
from megatron_atum.errors import ConfigError
from megatron_atum.model import layer_classes
from megatron_atum.model.attention import TorchAttention
from megatron_atum.model.layer_classes import TORCH, of_provider
from megatron_atum.model.norm import RMSNorm
from megatron_atum.parallel.device import has_fp8_products
from megatron_atum.training import engine as engine_module
from tests.checkpoint.runs import PLAIN, config_of, engine_of, saved
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees, build_engine, test_config
from tests.model.cases import Case, Expected, reference
from tests.model.parity import gradient_of
from tests.training.equivalence import own_share

TE = KernelsConfig(backend="te")
TE_FP8 = KernelsConfig(backend="te", frozen_gemm="fp8")


class _WithExtraState:
    """As Transformer Engine's layers have it."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3)


class Column(_WithExtraState, ColumnParallelLinear):
    pass


class Row(_WithExtraState, RowParallelLinear):
    pass


class Foreign(nn.Module):
    """A linear layer that is none of megatron-core's, on one tensor rank. Its weight says that it is split."""

    def __init__(self, inputs: int, outputs: int, *, config: Any, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class ForeignColumn(Foreign):
    pass


class ForeignRow(Foreign):
    bias = None


class Norm(nn.Module):
    """Under sequence parallelism its weight has the mark by which megatron-core sums its gradient, as TE's has."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(DotProductAttention):
    """megatron-core's, which looks at the mask only. Counts its calls."""

    calls = 0

    def forward(self, *inputs: Any, attn_mask_type: AttnMaskType, **_: Any) -> Tensor:
        Attention.calls += 1
        assert attn_mask_type == (AttnMaskType.causal if inputs[3] is None else AttnMaskType.arbitrary)
        return super().forward(*inputs, attn_mask_type=attn_mask_type)


class Provider(LocalSpecProvider):
    """Writes down what it is asked for."""

    def __init__(self, *, foreign: bool = False) -> None:
        self.asked: Counter[str] = Counter()
        self._linears = (ForeignColumn, ForeignRow) if foreign else (Column, Row)

    def __getattribute__(self, name: str) -> Any:
        if name != "asked" and not name.startswith("_"):
            self.asked[name] += 1
        return super().__getattribute__(name)

    def column_parallel_linear(self) -> type:
        return self._linears[0]

    def row_parallel_linear(self) -> type:
        return self._linears[1]

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        assert rms_norm and not for_qk
        return Norm

    def core_attention(self) -> type:
        return Attention


@contextlib.contextmanager
def provided(*, foreign: bool = False) -> Iterator[Provider]:
    """kernels.backend=te takes the provider of this test."""
    provider = Provider(foreign=foreign)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_classes, "te_provider", lambda: provider)
        yield provider


def test_what_is_asked_of_a_provider() -> None:
    """Nothing fused, so that names stay."""
    provider = Provider()
    classes = of_provider(provider)
    assert provider.asked == dict.fromkeys(
        ("layer_norm", "column_parallel_linear", "row_parallel_linear", "core_attention"), 1
    )
    assert (classes.norm, classes.column, classes.row) == (Norm, Column, Row)
    assert issubclass(classes.attention, Attention)
    assert (TORCH.norm, TORCH.column) == (RMSNorm, ColumnParallelLinear)
    assert (TORCH.row, TORCH.attention) == (RowParallelLinear, TorchAttention)


def test_without_transformer_engine() -> None:
    with pytest.raises(ConfigError, match=r"kernels\.backend=te .*pip install.*kernels\.backend=torch would work"):
        layer_classes.te_provider()


def test_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with provided():
        for accelerator, version in ((False, True), (True, False)):
            monkeypatch.setattr(layer_classes, "has_accelerator", lambda there=accelerator: there)
            monkeypatch.setattr(layer_classes, "is_te_min_version", lambda _, new=version: new)
            monkeypatch.setattr(layer_classes, "get_te_version", lambda: "2.1")
            with pytest.raises(ConfigError, match="needs a GPU" if version else "2.2 or later.*2.1"):
                layer_classes.check_backend(TE_FP8)
            if accelerator:
                layer_classes.check_backend(TE)
    layer_classes.check_backend(KernelsConfig(frozen_gemm="fp8"))


# The same model ------------------------------------------------------------------------------------------------------

CASES = [
    Case("all trains", 61, small_norm_inputs=False),
    Case("frozen, left padding", 62, padding="left", frozen=True, small_norm_inputs=False),
]
LAYOUTS = [
    ONE,
    Degrees(tensor=2),
    Degrees(tensor=2, sequence=True),
    Degrees(pipeline=2),
]


def computed(
    expected: Expected, degrees: Degrees, kernels: KernelsConfig, *, vision: bool = True, **changes: Any
) -> dict[str, Any]:
    """Losses and gradients of one step, and of which classes the layers are.

    Args:
        vision: False: the tower trains.
    """
    config = replace(test_config(from_hf(expected.config), **changes), kernels=kernels)
    config.model.freeze.vision &= vision
    engine = build_engine(config, degrees, expected.state)
    engine.build_optimizer()
    engine.cast_frozen()
    Attention.calls = 0
    result = engine.compute(own_share(expected.batches, engine.groups))
    classes = {type(module) for stage in engine.stages for module in stage.modules()}
    return {
        "losses": result.losses,
        "norm": result.grad_norm,
        "gradients": gather_rows(engine.stages, config.model, engine.groups, gradient_of),
        "names": {name: (p.requires_grad, tuple(p.shape)) for name, p in named_weights(engine.stages).items()},
        "provided": {name.__name__ for name in classes & {Column, Row, Norm, Attention}},
        "attention": sum(isinstance(m, Attention) for stage in engine.stages for m in stage.modules()),
        "calls": Attention.calls / len(expected.batches),
    }


def both(rank: int, world_size: int, degrees: Degrees, path: str, recompute: str) -> list[tuple[Any, Any]]:
    with provided():
        return [
            (
                computed(expected, degrees, KernelsConfig(), recompute=recompute),
                computed(expected, degrees, TE, recompute=recompute),
            )
            for expected in torch.load(path, weights_only=False)
        ]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("classes") / "expected.pt"
    torch.save([reference(case) for case in CASES], path)
    return str(path)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_provider_s_layers_are_the_same_model(degrees: Degrees, recompute: str, path: str) -> None:
    for ranks in run_distributed(both, degrees.world_size, degrees, path, recompute):
        for plain, other in ranks:
            assert other["names"] == plain["names"]
            assert plain["provided"] == set() and plain["attention"] == 0
            assert other["provided"] == {"Column", "Row", "Norm"} and other["attention"] > 0
            assert other["calls"] == other["attention"] * (2 if recompute == "selective" else 1)
            assert other["losses"] == pytest.approx(plain["losses"], rel=1e-5)
            assert other["norm"] == pytest.approx(plain["norm"], rel=1e-5)
            assert other["gradients"].keys() == plain["gradients"].keys()
            for name, gradient in plain["gradients"].items():
                difference = float((other["gradients"][name] - gradient).abs().max())
                assert difference <= 1e-5 * max(1e-2, float(gradient.abs().max())), name


def foreign_linears(rank: int, world_size: int) -> tuple[set[str], dict[str, Any]]:
    """Of decoder layers: names of what trains where an exception names linear layers, and how weights are split."""
    config = replace(config_of(PLAIN, frozen=True), kernels=TE)
    config.model.freeze.text_exceptions = ["Linear"]
    with provided(foreign=True):
        engine, _ = engine_of(config, ONE, Path("unused"), seed=1)
    weights = {
        name.split(".", 2)[2]: parameter
        for name, parameter in named_weights(engine.stages).items()
        if name.startswith("decoder_layers")
    }
    trains = {name for name, parameter in weights.items() if parameter.requires_grad}
    return trains, {name: getattr(parameter, "partition_dim", None) for name, parameter in weights.items()}


def test_linear_layers_that_are_not_megatron_core_s() -> None:
    """Exceptions of freezing know them, and so do the marks of what is split."""
    split = {
        "self_attention.linear_qkv.weight": 0,
        "self_attention.linear_proj.weight": 1,
        "mlp.linear_fc1.weight": 0,
        "mlp.linear_fc2.weight": 1,
    }
    trains, dimensions = run_distributed(foreign_linears, 1)[0]
    assert trains == set(split)
    assert dimensions == split | {"input_layernorm.weight": None, "pre_mlp_layernorm.weight": None}


def stored_names(rank: int, world_size: int, root: str) -> list[set[str]]:
    """What a checkpoint has of each backend."""
    found = []
    with provided():
        for kernels in (KernelsConfig(), TE):
            config = replace(config_of(PLAIN, frozen=True), kernels=kernels)
            engine, checkpoint = engine_of(config, ONE, Path(root) / kernels.backend, seed=1)
            state = engine.stages[0].state_dict()
            extra = [value for name, value in state.items() if name.endswith("_extra_state") and value is not None]
            assert bool(extra) == (kernels is TE)
            folder = saved(checkpoint, 1)
            found.append({name for part in (folder, *folder.parent.glob("frozen-*")) for name in read_index(part)})
    return found


def test_checkpoints_are_the_same(tmp_path: Path) -> None:
    plain, other = run_distributed(stored_names, 1, str(tmp_path))[0]
    assert other == plain and "model.layers.0.mlp.up_proj.weight" in plain


# 8 bits --------------------------------------------------------------------------------------------------------------


def entered(rank: int, world_size: int, path: str, frozen: int, recompute: str) -> tuple[int, int, Any]:
    """How often the context of 8 bits is entered in a forward and in a backward. Its configuration."""
    expected = torch.load(path, weights_only=False)[frozen]
    configs: list[Any] = []

    @contextlib.contextmanager
    def context(config: Any) -> Iterator[None]:
        configs.append(config)
        yield

    with provided(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_classes, "get_fp8_context", context)
        patch.setattr(engine_module, "cast_frozen", lambda stages: None)  # it would know this provider's linear layers
        config = replace(test_config(from_hf(expected.config), recompute=recompute), kernels=TE_FP8)
        engine = build_engine(config, ONE, expected.state)
        engine.build_optimizer()
        engine.cast_frozen()
        engine.forward_backward(expected.batches[:1])
        backward_too = len(configs)
        configs.clear()
        engine.evaluate(expected.batches[:1], ("a",))
        assert engine.stages[0].config.fp8 is None, "megatron-core would treat the rest of the model as fp8"
        return len(configs), backward_too, [(c.fp8, c.fp8_recipe) for c in configs[:1]]


def test_frozen_products_in_8_bits(path: str) -> None:
    products = 4 * CASES[1].layers
    forward, whole, config = run_distributed(entered, 1, path, 1, "none")[0]
    assert (forward, whole, config) == (products, products, [("hybrid", "tensorwise")])
    forward, whole, _ = run_distributed(entered, 1, path, 1, "selective")[0]
    assert (forward, whole) == (products, products + CASES[1].layers), "the MLP's first, again"
    assert run_distributed(entered, 1, path, 0, "none")[0] == (0, 0, []), "nothing is frozen"


# Transformer Engine itself -------------------------------------------------------------------------------------------


def on_a_gpu(rank: int, world_size: int, path: str, kernels: list[KernelsConfig], recompute: str) -> list[Any]:
    expected = torch.load(path, weights_only=False)[1]
    expected = replace(expected, batches=[replace(batch, attention_mask=None) for batch in expected.batches])
    # a tower that trains is not cast: its matrices are too small for 8 bits
    return [computed(expected, ONE, one, vision=False, precision="bf16", recompute=recompute) for one in kernels]


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_transformer_engine_on_a_gpu(path: str, recompute: str) -> None:
    """Against torch's layers in bf16, of which either rounds in its own way."""
    try:
        layer_classes.te_provider()
    except ConfigError as error:
        pytest.skip(f"gpu: {error}")
    kernels = [KernelsConfig(), TE] + ([TE_FP8] if has_fp8_products() else [])
    plain, *others = run_distributed(on_a_gpu, 1, path, kernels, recompute, backend="nccl")[0]
    for other, tolerance in zip(others, (0.02, 0.1), strict=False):
        assert other["names"] == plain["names"]
        assert other["losses"] == pytest.approx(plain["losses"], rel=tolerance)
        for name, gradient in plain["gradients"].items():
            difference = (other["gradients"][name] - gradient).float().norm()
            assert float(difference) <= 3 * tolerance * max(1e-3, float(gradient.float().norm())), name
