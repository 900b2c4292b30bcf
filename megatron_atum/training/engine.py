"""One optimizer step over all ranks: the parts of a step, without data, logging or checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_atum.batch import Batch
from megatron_atum.checkpoint.optimizer_state import inner_optimizers
from megatron_atum.config.schema import Config
from megatron_atum.flops import Work, model_flops
from megatron_atum.model.inputs import StageInput, prepare, stage_rows
from megatron_atum.model.stage import build_stages
from megatron_atum.parallel.cpu_compat import emulated_cuda
from megatron_atum.parallel.device import device, training_dtype
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.parallel.schedule import run_schedule
from megatron_atum.training.loss import LossSettings, loss_function, loss_settings, report_sums
from megatron_atum.training.optimizer import (
    build_optimizer,
    build_scheduler,
    connect_schedule,
    learning_rate,
    wrap_data_parallel,
)
from megatron_atum.training.reach import ReachCheck


@dataclass(frozen=True)
class StepResult:
    losses: dict[str, float]  # loss, z_loss, loss/<source>; equal on every rank
    grad_norm: float
    lr: float  # that the step was taken with
    images: int  # over all data-parallel ranks


class Engine:
    """Model, data parallelism, optimizer and schedule of this rank.

    Weights must be filled (checkpoint/weights.py) before `build_optimizer`: the optimizer takes
    its fp32 copies from them.
    """

    def __init__(self, config: Config, groups: ProcessGroups) -> None:
        self.config, self.groups = config, groups
        self.device, self.dtype = device(), training_dtype(config.training)
        self.sources = tuple(source.name for source in config.data.sources)
        self.stages = [stage.to(self.device) for stage in build_stages(config.model, groups, self.dtype)]

    def build_optimizer(self, overrides: dict[Any, Any] | None = None) -> None:
        """overrides: further groups of parameters with settings of their own (`build_optimizer` of optimizer.py)."""
        self.chunks = wrap_data_parallel(self.stages, self.config.optimizer)
        connect_schedule(self.chunks, self.stages, self.groups, before_reduction=self._check_reach)
        self.optimizer = build_optimizer(self.chunks, self.stages, self.config, self.dtype, overrides)
        self.scheduler = build_scheduler(self.optimizer, self.config.optimizer)
        self._reach: ReachCheck | None = ReachCheck(self.stages)

    def step(self, batches: list[Batch]) -> StepResult:
        """Forward, backward, reduce, clip, update. Collective over all ranks."""
        settings, reports = self.forward_backward(batches)
        lr = learning_rate(self.optimizer)
        with emulated_cuda():
            _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        losses = report_sums(reports, settings, self.groups, self.device)
        return StepResult(losses, float(grad_norm or 0.0), lr, settings.images)

    def forward_backward(self, batches: list[Batch]) -> tuple[LossSettings, list[Tensor]]:
        """Gradients of a step, reduced. Returns what `report_sums` needs."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        settings = loss_settings(batches, self.config.training, self.groups, self.sources, self.device)
        inputs = prepare(batches, self.config.model, self.groups, self.device, self.dtype)
        reports = self._run(inputs, partial(_forward_step, settings), self.chunks)
        return settings, reports

    def logits(self, batches: list[Batch]) -> list[Tensor]:
        """[b,S,V+A] of each microbatch on ranks of the last stage; empty elsewhere. No gradients."""
        inputs = prepare(batches, self.config.model, self.groups, self.device, self.dtype)
        with torch.no_grad():
            return self._run(inputs, _logits_step, self.stages, forward_only=True, collect=True)

    def model_flops(self, tokens: int, images: int) -> int:
        """Model FLOPs of a step over all ranks (flops.py). tokens: positions computed, padding included."""
        length = self.config.data.sequence_length
        return model_flops(self.config.model, Work(tokens // length, length, images)).total

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        return inner_optimizers(self.optimizer)[0]

    def _run(self, inputs: list[StageInput], forward_step: Any, chunks: list[Any], **options: bool) -> list[Any]:
        return run_schedule(
            self.groups,
            chunks,
            forward_step,
            inputs,
            stage_rows=stage_rows(inputs, self.groups),
            rows_per_microbatch=inputs[0].shape[0],
            **options,
        )

    def _check_reach(self) -> None:
        if self._reach is not None:
            self._reach()
            self._reach = None


def _forward_step(settings: LossSettings, inputs: Iterator[StageInput], chunk: Any) -> tuple[Tensor, Any]:
    batch = next(inputs)
    return chunk(batch), loss_function(settings, batch)


def _logits_step(inputs: Iterator[StageInput], stage: Any) -> tuple[Tensor, Any]:
    return stage(next(inputs), logits=True), lambda output, non_loss_data: output
