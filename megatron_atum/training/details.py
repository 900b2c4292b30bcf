"""What a step looked like inside the model: gates, and norms of activations and gradients, for each layer.

All of it is collected in one all-reduce. A value is kept as a sum and a count, so that ranks which hold the same thing
may add it more than once where it is a mean, and must add it once where it is a norm.

Legend: s tokens of this rank, b rows, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_atum.checkpoint.optimizer_state import optimizer_shards
from megatron_atum.config.schema import ModelConfig
from megatron_atum.model.stage import AtumStage
from megatron_atum.parallel.device import device
from megatron_atum.parallel.gradients import is_replicated
from megatron_atum.parallel.groups import ProcessGroups

GATE, ACTIVATION, GRADIENT = "gate", "activation_norm", "gradient_norm"
_LAYERS = {"cross_attention_layers": "cross_attention", "decoder_layers": "decoder"}
_WHOLE = ("embedding", "vision", "perceiver", "final_norm", "head")


class LayerWatch:
    """Looks at the steps that are enclosed in `begin` and `end`, and costs nothing in the others.

    Names of what `end` returns (layers have their number in the whole model):

    - `gate/<unit>/attention`, `gate/<unit>/mlp`: tanh(alpha), what the layer's output is multiplied with; the mean of
      its magnitude where there is one gate per channel (model.alpha_type=vector).
    - `activation_norm/<layer>`: root mean square of the layer's output, over all tokens (padding included), rows and
      microbatches of the step.
    - `gradient_norm/<layer>`: Euclidean norm of the gradient of all that trains in it, before clipping. `<layer>` is
      `cross_attention.<unit>`, `decoder.<number>`, `embedding`, `vision`, `perceiver`, `final_norm` or `head`; what
      is frozen has none.
    """

    def __init__(self, stages: list[AtumStage], groups: ProcessGroups) -> None:
        self._stages, self._groups = stages, groups
        names = _names(stages[0].model)
        self._row = {name: row for row, name in enumerate(names)}
        self._part_of = {p: _part(name) for stage in stages for name, p in stage.named_parameters()}
        self._hooks: list[RemovableHandle] = []

    def begin(self) -> None:
        """Before the forward of the first microbatch."""
        self._stop()
        self._sums = torch.zeros(len(self._row), 2, dtype=torch.float64, device=device())  # sum, count
        for name, layer in self._layers():
            row = self._row[f"{ACTIVATION}/{name}"]
            self._hooks.append(layer.register_forward_hook(lambda _, __, output, row=row: self._see(row, output)))

    @torch.no_grad()
    def end(self, optimizer: Any) -> dict[str, float]:
        """After gradients are reduced and before the optimizer's step. Collective over all ranks, equal on all."""
        self._stop()
        self._add_gates()
        self._add_gradients(optimizer)
        dist.all_reduce(self._sums)
        sums = self._sums.tolist()
        return {name: _value(name, *sums[row]) for name, row in self._row.items() if sums[row][1]}

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        for stage in self._stages:
            for attribute, name in _LAYERS.items():
                for number, layer in getattr(stage, attribute).items():
                    yield f"{name}.{number}", layer

    @torch.no_grad()
    def _see(self, row: int, output: Tensor | tuple[Tensor, Any]) -> None:
        """Layers that recomputation runs again count twice, in the sum as in the count."""
        hidden_sbH = output[0] if isinstance(output, tuple) else output
        self._add(row, _square(hidden_sbH), hidden_sbH.numel())

    def _add_gates(self) -> None:
        for stage in self._stages:
            for unit, layer in stage.cross_attention_layers.items():
                for part in ("attention", "mlp"):
                    gates = torch.tanh(getattr(layer, f"alpha_{part}").double())
                    value = gates if gates.numel() == 1 else gates.abs().mean()
                    self._add(self._row[f"{GATE}/{unit}/{part}"], value.squeeze(), 1)

    def _add_gradients(self, optimizer: Any) -> None:
        """Of a bucket, a rank has the reduced values of its own shard only where the optimizer is distributed."""
        sharded = bool(optimizer.config.use_distributed_optimizer)
        if self._groups.data_rank and not sharded:
            return
        for shard in optimizer_shards(optimizer):
            if self._groups.tensor_rank and is_replicated(shard.parameter):
                continue
            gradient: Tensor = shard.parameter.main_grad  # type: ignore[attr-defined]
            row = self._row[f"{GRADIENT}/{self._part_of[shard.parameter]}"]
            self._add(row, _square(gradient.view(-1)[shard.start : shard.stop]), 1)

    def _add(self, row: int, value: Tensor, count: int) -> None:
        self._sums[row, 0] += value
        self._sums[row, 1] += count


def _names(model: ModelConfig) -> list[str]:
    """Everything that can be seen at any layout, so that all ranks add up the same rows."""
    units = range(model.num_layers // model.cross_layer_interval)
    layers = [*(f"cross_attention.{u}" for u in units), *(f"decoder.{n}" for n in range(model.num_layers))]
    return [
        *(f"{GATE}/{unit}/{part}" for unit in units for part in ("attention", "mlp")),
        *(f"{ACTIVATION}/{layer}" for layer in layers),
        *(f"{GRADIENT}/{layer}" for layer in (*layers, *_WHOLE)),
    ]


def _part(parameter: str) -> str:
    """decoder_layers.3.mlp.linear_fc1.weight -> decoder.3; perceiver.latents -> perceiver."""
    first, second, *_ = [*parameter.split("."), ""]
    return f"{_LAYERS[first]}.{second}" if first in _LAYERS else first


def _square(x: Tensor) -> Tensor:
    """Squared Euclidean norm, accumulated in fp32 without a copy of `x` in it."""
    return torch.linalg.vector_norm(x, dtype=torch.float32).double() ** 2


def _value(name: str, total: float, count: float) -> float:
    if name.startswith(GRADIENT):
        return math.sqrt(total)
    return math.sqrt(total / count) if name.startswith(ACTIVATION) else total / count
