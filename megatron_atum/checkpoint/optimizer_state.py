"""The state of megatron-core's optimizers by parameter, whichever of them is in use and however it is sharded.

megatron-core's own state dictionaries are not used: without apex or Transformer Engine they need a state that a new
optimizer does not have, lose the step counter, and on load share one counter between all parameters, so that Adam's
bias correction runs away without a word (distrib_optimizer.py:640, 815, 937 of 0.16.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerShard:
    """What this rank's optimizer holds of one parameter: the values `start` to `stop` of it, flattened."""

    parameter: nn.Parameter
    main: Tensor  # what the inner optimizer updates
    start: int
    stop: int
    inner: torch.optim.Optimizer  # torch's AdamW, or another FusedAdam (kernels.adam)
    group: dict[str, Any]

    @property
    def has_main(self) -> bool:
        """Whether `main` is a copy in higher precision rather than the parameter itself."""
        return self.main.dtype != self.parameter.dtype

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.parameter.numel()

    @property
    def counts_per_group(self) -> bool:
        """Whether all parameters of the group share one counter, as with Apex and Transformer Engine."""
        return not isinstance(self.inner, torch.optim.Adam)

    @property
    def step(self) -> int:
        """Updates so far; 0 before the first."""
        state = self.inner.state.get(self.main, {})
        return int(state.get("step", self.group.get("step", 0) if state else 0))

    def moments(self) -> dict[str, Tensor]:
        """Flattened; empty before the first update."""
        state = self.inner.state.get(self.main, {})
        return {name: state[name].view(-1) for name in MOMENTS if name in state}

    def forget(self) -> None:
        """As before the first update."""
        self.inner.state.pop(self.main, None)
        self.group.pop("step", None)  # of optimizers that count per group

    def start_moments(self, step: int) -> dict[str, Tensor]:
        """New moments as after `step` updates, to be filled."""
        moments = {name: torch.zeros_like(self.main, memory_format=torch.contiguous_format) for name in MOMENTS}
        if self.counts_per_group:
            self.inner.state[self.main] = dict(moments)
            self.group["step"] = step
        else:  # a counter of its own
            device = self.main.device if self.group.get("fused") else None  # as torch makes it
            self.inner.state[self.main] = {"step": torch.tensor(float(step), device=device), **moments}
        return {name: value.view(-1) for name, value in moments.items()}


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Those inside megatron-core's: torch's, Apex's or Transformer Engine's."""
    return [part.optimizer for part in parts_of(optimizer)]


def optimizer_shards(optimizer: Any) -> list[OptimizerShard]:
    """All that this rank's optimizer holds, in its own order."""
    return [
        OptimizerShard(parameter, main, start, stop, part.optimizer, group)
        for part in parts_of(optimizer)
        for group, pairs in zip(part.optimizer.param_groups, _pairs(part), strict=True)
        for parameter, main, start, stop in pairs
    ]


def parts_of(optimizer: Any) -> list[Any]:
    """megatron-core's optimizers that hold parameters of this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]  # none: a rank without trainable parameters


def _pairs(part: Any) -> Iterator[list[tuple[nn.Parameter, Tensor, int, int]]]:
    """(parameter, main, start, stop) of each parameter group."""
    if isinstance(part, DistributedOptimizer):
        fp32 = zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True)
        half = zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
        for (parameters, shards), (half_parameters, mains) in zip(fp32, half, strict=True):
            pairs = zip([*parameters, *half_parameters], [*shards, *mains], strict=True)
            ranges = [(p, main, part._get_model_param_range_map(p)["param"]) for p, main in pairs]
            yield [(p, main, r.start, r.end) for p, main, r in ranges]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        half = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        for (parameters, mains), fp32_parameters in zip(half, part.fp32_from_fp32_groups, strict=True):
            both = [*zip(parameters, mains, strict=True), *zip(fp32_parameters, fp32_parameters, strict=True)]
            yield [(p, main, 0, p.numel()) for p, main in both]
    else:
        for group in part.optimizer.param_groups:
            yield [(p, p, 0, p.numel()) for p in group["params"]]
