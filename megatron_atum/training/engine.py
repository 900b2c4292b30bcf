"""One optimizer step over all ranks: the parts of a step, without data, logging or checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_atum.batch import Batch
from megatron_atum.checkpoint.optimizer_state import inner_optimizers, parts_of
from megatron_atum.config.schema import Config
from megatron_atum.flops import Work, executed_flops, model_flops
from megatron_atum.model.frozen_gemm import cast_frozen
from megatron_atum.model.inputs import StageInput, prepare, stage_rows
from megatron_atum.model.stage import build_stages
from megatron_atum.parallel.cpu_compat import emulated_cuda
from megatron_atum.parallel.device import device, training_dtype
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.parallel.schedule import run_schedule
from megatron_atum.parallel.stopwatch import Stopwatch
from megatron_atum.training.loss import (
    LossSettings,
    loss_function,
    loss_settings,
    own_report,
    read_report,
)
from megatron_atum.training.optimizer import (
    build_optimizer,
    build_scheduler,
    connect_schedule,
    learning_rate,
    wrap_data_parallel,
)
from megatron_atum.training.reach import ReachCheck

# (to be summed over ranks, to be kept by rank), under the same names on all ranks
Tell = Callable[[], tuple[Mapping[str, float], Mapping[str, float]]]


@dataclass(frozen=True)
class StepResult:
    """Gradients of a step, judged by nobody yet. Equal on every rank."""

    losses: dict[str, float]  # loss, z_loss, loss/<source>
    grad_norm: float
    lr: float  # that the step is taken with
    images: int  # over all data-parallel ranks
    text_tokens: int  # real tokens without those of images
    real_tokens: int  # positions that are no padding
    sums: dict[str, float]  # of what ranks told
    per_rank: dict[str, list[float]]  # what ranks told, and forward_s

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, [*self.losses.values(), self.grad_norm]))


class Engine:
    """Model, data parallelism, optimizer and schedule of this rank.

    Weights must be filled (checkpoint/weights.py) before `build_optimizer`: the optimizer takes
    its fp32 copies from them; and frozen ones before `cast_frozen`. A step is `compute`, then `apply` or not.
    """

    def __init__(self, config: Config, groups: ProcessGroups) -> None:
        self.config, self.groups = config, groups
        self.device, self.dtype = device(), training_dtype(config.training)
        self.sources = tuple(source.name for source in config.data.sources)
        self.stages = build_stages(config.model, groups, self.dtype, config.training, config.kernels)
        for stage in self.stages:
            if any(parameter.device != self.device for parameter in stage.parameters()):
                stage.to(self.device)  # not for nothing: fake tensors (planning/dry_run.py) cannot be moved
        self.forward_watch, self.optimizer_watch = Stopwatch(), Stopwatch()
        self._frozen_as_configured = config.kernels.frozen_gemm == "bf16"

    def build_optimizer(self) -> None:
        self.chunks = wrap_data_parallel(self.stages, self.config.optimizer)
        connect_schedule(self.chunks, self.stages, self.groups, before_reduction=self._check_reach)
        self.optimizer = build_optimizer(self.chunks, self.stages, self.config, self.dtype)
        self.scheduler = build_scheduler(self.optimizer, self.config.optimizer)
        self.reach: ReachCheck | None = ReachCheck(self.stages)

    def cast_frozen(self) -> None:
        """What kernels.frozen_gemm asks for, once all weights are there. Collective over the tensor group."""
        if not self._frozen_as_configured:
            cast_frozen(self.stages)
        self._frozen_as_configured = True

    def step(self, batches: list[Batch]) -> StepResult:
        """Forward, backward, reduce, clip, update. Collective over all ranks."""
        result = self.compute(batches)
        self.apply(result)
        return result

    def compute(self, batches: list[Batch], tell: Tell = lambda: ({}, {})) -> StepResult:
        """Losses, and gradients ready to be applied. Collective over all ranks.

        Args:
            tell: numbers of this rank, asked for when all gradients are there, that travel with the losses.
        """
        settings, reports = self.forward_backward(batches)
        with emulated_cuda():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
        sums, per_rank = tell()
        per_rank = {**per_rank, "grad_norm": grad_norm, "forward_s": self.forward_watch.take()}
        report = own_report(reports, settings.sources, self.groups, self.device)
        losses, sums, table = self._exchange(report, settings.sources, sums, per_rank)
        return StepResult(
            losses=losses,
            # The largest: where ranks disagree, one of them has seen something that is not finite.
            grad_norm=max(table.pop("grad_norm"), key=lambda norm: (not math.isfinite(norm), norm)),
            lr=learning_rate(self.optimizer),
            images=settings.images,
            text_tokens=int(settings.z_tokens),
            real_tokens=settings.real_tokens,
            sums=sums,
            per_rank=table,
        )

    def apply(self, result: StepResult) -> None:
        """Clip the gradients of `compute` and update the weights."""
        with emulated_cuda(), self.optimizer_watch.running():
            for part in parts_of(self.optimizer):  # as megatron-core's ChainedOptimizer.step clips
                if part.config.clip_grad > 0.0:
                    clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, result.grad_norm)
            self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)

    def forward_backward(self, batches: list[Batch]) -> tuple[LossSettings, list[Tensor]]:
        """Gradients of a step, reduced. Returns what `own_report` needs."""
        settings, inputs = self.prepare(batches)
        return settings, self.run(settings, inputs)

    def prepare(self, batches: list[Batch]) -> tuple[LossSettings, list[StageInput]]:
        """What `run` takes. Collective over the data-parallel group."""
        settings = loss_settings(batches, self.config.training, self.groups, self.sources, self.device)
        return settings, prepare(batches, self.config.model, self.groups, self.device, self.dtype)

    def run(self, settings: LossSettings, inputs: list[StageInput]) -> list[Tensor]:
        """Forward and backward of all microbatches, and the reduction of gradients. Nothing waits for the device."""
        self.forget_gradients()
        return self._run(inputs, partial(_timed_forward_step, self.forward_watch, settings), self.chunks)

    def forget_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], sources: tuple[str, ...]) -> Tensor:
        """This rank's part of the report (loss.py: own_report) of batches with these sources. No gradients.

        Collective over the ranks of a pipeline and their data-parallel peers.
        """
        settings = loss_settings(batches, self.config.training, self.groups, sources, self.device)
        inputs = prepare(batches, self.config.model, self.groups, self.device, self.dtype)
        reports = self._run(inputs, partial(_forward_step, settings), self.chunks, forward_only=True)
        return own_report(reports, sources, self.groups, self.device)

    def row_losses(self, batches: list[Batch]) -> list[list[float]]:
        """Mean loss of each row of each microbatch on ranks of the last stage; empty elsewhere. No gradients."""
        inputs = prepare(batches, self.config.model, self.groups, self.device, self.dtype)
        with torch.no_grad():
            found = self._run(inputs, _row_loss_step, self.stages, forward_only=True, collect=True)
        return [losses.tolist() for losses in found]

    def logits(self, batches: list[Batch]) -> list[Tensor]:
        """[b,S,V+A] of each microbatch on ranks of the last stage; empty elsewhere. No gradients."""
        inputs = prepare(batches, self.config.model, self.groups, self.device, self.dtype)
        with torch.no_grad():
            return self._run(inputs, _logits_step, self.stages, forward_only=True, collect=True)

    def flops(self, tokens: int, images: int) -> tuple[int, int]:
        """Model FLOPs and executed FLOPs of a step over all ranks (flops.py).

        Args:
            tokens: positions computed, padding included.
        """
        length, training = self.config.data.sequence_length, self.config.training
        work = Work(tokens // length, length, images)
        executed = executed_flops(
            self.config.model,
            work,
            training.recompute,
            method=training.recompute_method,
            layers=training.recompute_layers,
            units_per_chunk=self.groups.layout.units_per_chunk,
        )
        return model_flops(self.config.model, work).total, executed.total

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        return inner_optimizers(self.optimizer)[0]

    def _run(self, inputs: list[StageInput], forward_step: Any, chunks: list[Any], **options: bool) -> list[Any]:
        assert self._frozen_as_configured, "cast_frozen() comes before the first step"
        return run_schedule(
            self.groups,
            chunks,
            forward_step,
            inputs,
            stage_rows=stage_rows(inputs, self.groups),
            rows_per_microbatch=inputs[0].shape[0],
            **options,
        )

    def _exchange(
        self, report: Tensor, sources: tuple[str, ...], sums: Mapping[str, float], per_rank: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float], dict[str, list[float]]]:
        """Losses, sums, and a column of numbers by rank, in one all-reduce over all ranks."""
        size, rank = self.groups.layout.world_size, self.groups.rank
        table = torch.zeros(len(per_rank), size, dtype=torch.float64)
        table[:, rank] = torch.tensor(list(per_rank.values()), dtype=torch.float64)
        mine = torch.cat((torch.tensor(list(sums.values()), dtype=torch.float64), table.flatten()))
        values = torch.cat((report, mine.to(report.device)))
        dist.all_reduce(values)
        numbers = values.tolist()
        after_report = numbers[len(report) :]
        after_sums = after_report[len(sums) :]
        columns = {name: after_sums[place * size : (place + 1) * size] for place, name in enumerate(per_rank)}
        losses = read_report(numbers[: len(report)], sources)
        return losses, dict(zip(sums, after_report, strict=False)), columns

    def _check_reach(self) -> None:
        if self.reach is not None:
            self.reach()
            self.reach = None


def _forward_step(settings: LossSettings, inputs: Iterator[StageInput], chunk: Any) -> tuple[Tensor, Any]:
    batch = next(inputs)
    return chunk(batch), loss_function(settings, batch)


def _timed_forward_step(
    watch: Stopwatch, settings: LossSettings, inputs: Iterator[StageInput], chunk: Any
) -> tuple[Tensor, Any]:
    with watch.running():
        return _forward_step(settings, inputs, chunk)


def _row_loss_step(inputs: Iterator[StageInput], stage: Any) -> tuple[Tensor, Any]:
    batch = next(inputs)

    def mean_losses(output: Tensor, non_loss_data: bool) -> Tensor:
        return (output[0] * batch.loss_mask).sum(-1) / batch.loss_mask.sum(-1).clamp(min=1.0)

    return stage(batch), mean_losses


def _logits_step(inputs: Iterator[StageInput], stage: Any) -> tuple[Tensor, Any]:
    return stage(next(inputs), logits=True), lambda output, non_loss_data: output
