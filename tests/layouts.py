"""The layouts that everything is compared at, and how a rank builds a model at one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_atum.checkpoint.source import Given
from megatron_atum.checkpoint.weights import fill
from megatron_atum.config.schema import Config, ModelConfig, OptimizerConfig, SourceConfig, TrainingConfig
from megatron_atum.parallel.groups import ProcessGroups, build_groups
from megatron_atum.parallel.layout import ParallelLayout, even_units


@dataclass(frozen=True)
class Degrees:
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    sequence: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = [("tp", self.tensor), ("pp", self.pipeline), ("vpp", self.virtual), ("dp", self.data)]
        name = "".join(f"{key}{value}" for key, value in parts if value > 1) or "one"
        return name + ("sp" if self.sequence else "")

    def layout(self, model: ModelConfig, units: tuple[int, ...] | None = None) -> ParallelLayout:
        num_units = model.num_layers // model.cross_layer_interval
        return ParallelLayout(
            world_size=self.world_size,
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual,
            sequence=self.sequence,
            units_per_chunk=units or even_units(num_units, self.pipeline * self.virtual),
        )


ONE = Degrees()
LAYOUTS = [
    ONE,
    Degrees(tensor=2),
    Degrees(tensor=2, sequence=True),
    Degrees(pipeline=2),
    Degrees(pipeline=2, virtual=2),
    Degrees(tensor=2, pipeline=2),
    Degrees(tensor=2, pipeline=2, sequence=True),
]


def test_config(model: ModelConfig, **changes: Any) -> Config:
    """Adam's eps is large, so that a gradient near zero cannot flip an update; learning rate from the first step."""
    optimizer = {"lr": 3e-3, "warmup_steps": 0, "decay_steps": 100, "eps": 1e-3, "overlap_grad_reduce": True}
    training = {"precision": "fp32", "z_loss": 0.01}
    for key, value in changes.items():
        (training if hasattr(TrainingConfig, key) else optimizer)[key] = value
    config = Config(model=model, optimizer=OptimizerConfig(**optimizer), training=TrainingConfig(**training))
    config.data.sources = [SourceConfig(name="a", shards=""), SourceConfig(name="b", shards="")]
    return config


test_config.__test__ = False  # type: ignore[attr-defined]


def build_engine(
    config: Config, degrees: Degrees, state: dict[str, torch.Tensor], groups: ProcessGroups | None = None
) -> Any:
    """An engine with Hugging Face's weights. Its optimizer is not built yet.

    Args:
        groups: of these degrees, from an engine before; making them takes longer than a step over gloo.
    """
    from megatron_atum.training.engine import Engine

    groups = groups or groups_of(config.model, degrees)
    engine = Engine(config, groups)
    fill(engine.stages, config.model, groups, Given(state))
    return engine


def groups_of(model: ModelConfig, degrees: Degrees) -> ProcessGroups:
    return build_groups(degrees.layout(model))
