"""Whose AdamW steps (kernels.adam).

megatron-core 0.16.1 takes Transformer Engine's where that can be imported, else Apex's, else torch's
(optimizer/__init__.py, optimizer/distrib_optimizer.py). What is installed must not decide how a run goes on, so the
choice is made here, for as long as its optimizers are built; later it looks at it in its own checkpoints only, which
are not used.

All three keep the same two moments in fp32. torch's counts updates for each weight, the others for each group.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.optimizer import distrib_optimizer

from megatron_atum.errors import ConfigError, first_line
from megatron_atum.parallel.device import has_accelerator
from megatron_atum.parallel.patching import replaced

TORCH = "torch"
_FUSED = {  # module of the FusedAdam, and how it gets there
    "te": ("transformer_engine.pytorch.optimizers", "pip install --no-build-isolation 'transformer-engine[pytorch]'"),
    "apex": ("apex.optimizers", "NVIDIA's apex, built with its CUDA extensions; PyPI's apex is another package"),
}


def adam_class(name: str) -> type[torch.optim.Optimizer]:
    """
    Args:
        name: kernels.adam.

    Raises:
        ConfigError: it cannot be imported here.
    """
    if name == TORCH:
        return torch.optim.AdamW
    module, source = _FUSED[name]
    try:
        found = importlib.import_module(module).FusedAdam
    except (ImportError, OSError, AttributeError) as error:
        raise ConfigError(
            f"kernels.adam={name}: {module} has no FusedAdam here ({first_line(error)}); install it ({source}), or "
            f"kernels.adam={TORCH} would work"
        ) from None
    assert issubclass(found, torch.optim.Optimizer)
    return found


def check_adam(name: str) -> None:
    """Raises ConfigError: kernels.adam cannot be had on this machine."""
    adam_class(name)
    if name != TORCH and not has_accelerator():
        raise ConfigError(f"kernels.adam={name} needs a GPU, and here is none; kernels.adam={TORCH} would work")


@contextlib.contextmanager
def chosen_adam(name: str) -> Iterator[None]:
    """Within the block megatron-core builds its optimizers around this AdamW.

    Raises:
        ConfigError: it cannot be imported here.
    """
    chosen = adam_class(name)
    with replaced(
        (mcore_optimizer, "Adam", chosen),
        (mcore_optimizer, "USING_PYTORCH_OPTIMIZER", name == TORCH),  # else it passes arguments that torch's lacks
        (distrib_optimizer, "Adam", chosen),
    ):
        yield
