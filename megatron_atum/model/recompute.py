"""Activation recomputation (training.recompute): what is not kept for backward is computed again there.

torch's non-reentrant checkpoint is used throughout. Unlike megatron-core's reentrant one it needs no input that
requires a gradient (with frozen embeddings the first stage has none, and would silently not train), and functions may
close over tensors of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_atum.config.schema import TrainingConfig


@dataclass(frozen=True)
class Recompute:
    """What of a chunk is recomputed. An element is a decoder layer with the cross-attention in front of it, if any."""

    kind: str = "none"  # training.recompute
    method: str = "uniform"  # training.recompute_method
    layers: int = 1  # training.recompute_layers

    @classmethod
    def from_config(cls, training: TrainingConfig | None) -> Recompute:
        if training is None:
            return cls()
        return cls(training.recompute, training.recompute_method, training.recompute_layers)

    @property
    def full(self) -> bool:
        return self.kind == "full"

    def pieces(self, elements: range) -> Iterator[tuple[range, bool]]:
        """Elements that are run together, and whether they are recomputed.

        Args:
            elements: global numbers of a chunk's decoder layers.
        """
        size = self.layers if self.full and self.method == "uniform" else 1
        stop = elements.stop if self.method == "uniform" else elements.start + self.layers
        for start in range(elements.start, elements.stop, size):
            yield range(start, min(start + size, elements.stop)), self.full and start < stop


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which backward keeps the inputs only.

    No random state is kept: nothing here draws a random number, every dropout is 0 (configs.py).
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class RecomputesInside:
    """A module with a part that selective recomputation does not keep. That part goes through `inside`."""

    recompute_inside = False

    def inside(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return checkpointed(function, *inputs) if self.recompute_inside else function(*inputs)


def select(modules: Iterable[nn.Module]) -> None:
    """Turn selective recomputation on in all parts of these modules that have it."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, RecomputesInside):
                part.recompute_inside = True
