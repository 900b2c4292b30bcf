"""Finds trainable tensors that backward never reaches: they would silently not train.

Never reached is not the same as a gradient of zero: with gates at 0, every gradient behind them is rightly zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn

from megatron_atum.errors import ConfigError, listed


class ReachCheck:
    """Watches the first step. Create it before the step, call it once after the backward of all microbatches."""

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        self._missing = {
            name: parameter
            for stage in stages
            for name, parameter in stage.named_parameters()
            if parameter.requires_grad
        }
        self._hooks = [
            parameter.register_hook(lambda gradient, name=name: self._seen(name))
            for name, parameter in self._missing.items()
        ]

    def _seen(self, name: str) -> None:
        self._missing.pop(name, None)

    def stop(self) -> list[str]:
        """Ends the watch. Returns the names of tensors of this rank that backward has not reached."""
        for hook in self._hooks:
            hook.remove()
        return sorted(self._missing)

    def __call__(self) -> None:
        """Collective over all ranks, so that all of them stop.

        Raises:
            ConfigError: naming the tensors.
        """
        missing: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(missing, self.stop())
        names = sorted({name for part in missing for name in part})
        if names:
            raise ConfigError(
                f"backward never reached {len(names)} trainable tensor(s): {listed(names, 8)}; "
                "they would not train. Freeze them (model.freeze) or connect them to the loss"
            )
