"""Random state of this process: torch's generators, and megatron-core's tracker for model-parallel regions."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_atum.parallel.device import has_accelerator

_TRACKER = "tracker."


def random_state() -> dict[str, Tensor]:
    """Everything that decides the next random numbers, as CPU tensors of bytes."""
    state = {"cpu": torch.get_rng_state()}
    if has_accelerator():
        state["device"] = torch.cuda.get_rng_state()
    tracked = {_TRACKER + name: value.cpu() for name, value in get_cuda_rng_tracker().get_states().items()}
    return {name: value.clone() for name, value in (state | tracked).items()}


def set_random_state(state: dict[str, Tensor]) -> None:
    """Go on as where `random_state` was taken. Parts for a device that this process has not are left out."""
    torch.set_rng_state(state["cpu"])
    if has_accelerator() and "device" in state:
        torch.cuda.set_rng_state(state["device"])
    tracked = {name.removeprefix(_TRACKER): value for name, value in state.items() if name.startswith(_TRACKER)}
    get_cuda_rng_tracker().set_states(tracked)
