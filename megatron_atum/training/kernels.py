"""Which kernels a run uses (kernels.*): whether they can be had, and what is said of them."""

from __future__ import annotations

from megatron_atum.checkpoint.stored import RunState
from megatron_atum.config.schema import Config, KernelsConfig
from megatron_atum.model.layer_classes import check_backend
from megatron_atum.parallel.adam import check_adam

_EXPERIMENTAL = "experimental: no measured run with it is recorded"


def check_kernels(kernels: KernelsConfig) -> None:
    """Whether layers and AdamW can be had here. Needs no process group.

    Raises:
        ConfigError: naming the key, and what would work.
    """
    check_backend(kernels)
    check_adam(kernels.adam)


def describe_layers(kernels: KernelsConfig) -> str:
    """What decoder layers are made of."""
    if kernels.backend == "torch":
        return "torch"
    products = ", frozen products in its fp8" if kernels.frozen_gemm == "fp8" else ""
    return f"Transformer Engine in decoder layers{products} ({_EXPERIMENTAL})"


def other_adam(state: RunState, config: Config) -> str:
    """A line if another AdamW goes on with a checkpoint's moments than the one that made them; else empty.

    A checkpoint that does not say whose they are is of a run without the key, and says nothing.
    """
    made = state.config.get("kernels", {}).get("adam")
    if made is None or made == config.kernels.adam:
        return ""
    return f"{state.folder} was trained with kernels.adam={made}; {config.kernels.adam} goes on with its moments"
