"""Data parallelism, optimizer and learning-rate schedule, all megatron-core's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_atum.checkpoint.optimizer_state import inner_optimizers
from megatron_atum.checkpoint.weights import rows_of
from megatron_atum.config.schema import Config, OptimizerConfig
from megatron_atum.model.stage import AtumStage
from megatron_atum.parallel.adam import TORCH, chosen_adam
from megatron_atum.parallel.cpu_compat import emulated_cuda
from megatron_atum.parallel.device import has_accelerator
from megatron_atum.parallel.gradients import sum_replicated
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.parallel.multi_tensor import use_foreach_kernels
from megatron_atum.training.parameter_groups import Settings, matches_of, settings


def wrap_data_parallel(stages: list[AtumStage], config: OptimizerConfig) -> list[DistributedDataParallel]:
    """Gradient buffers and their reduction over data-parallel ranks, for trainable parameters only."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=overlaps_param_gather(config),
        bucket_size=config.bucket_size,
    )
    with emulated_cuda():
        return [
            DistributedDataParallel(stage.config, ddp_config, stage, disable_bucketing=number > 0)
            for number, stage in enumerate(stages)
        ]


def overlaps_param_gather(config: OptimizerConfig) -> bool:
    """optimizer.overlap_param_gather, or its default: wherever a device can compute beside the communication."""
    if config.overlap_param_gather is None:
        return has_accelerator() and config.distributed and config.overlap_grad_reduce
    return config.overlap_param_gather


def connect_schedule(
    chunks: list[DistributedDataParallel],
    stages: list[AtumStage],
    groups: ProcessGroups,
    before_reduction: Callable[[], None] = lambda: None,
) -> None:
    """Tell megatron-core's schedules how gradients are reduced and finished."""

    def finalize(model: list[nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
        before_reduction()
        finalize_model_grads(model, num_tokens, **kwargs)
        sum_replicated(stages, groups.tensor)

    no_sync = [chunk.no_sync for chunk in chunks]
    for stage in stages:
        stage.config.finalize_model_grads_func = finalize
        if chunks[0].ddp_config.overlap_grad_reduce:
            stage.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]


def mark_settings(stages: Iterable[nn.Module], config: Config) -> set[Settings]:
    """Give every parameter of this rank its `optimizer_settings`; returns those of the ones that train."""
    found = set()
    for row, parameter in rows_of(stages, config.model):
        parameter.optimizer_settings = settings(row, config.optimizer)  # type: ignore[attr-defined]
        if parameter.requires_grad:
            found.add(settings(row, config.optimizer))
    return found


def group_overrides(found: Iterable[Settings], config: OptimizerConfig) -> dict[ParamKey, dict[str, Any]]:
    """Settings as megatron-core takes them. It collects those of all ranks, so that all have the same groups.

    They must not be left out: its default would take decay from everything with one dimension. It tells groups apart
    by `wd_mult` and `lr_mult`, so groups that differ in their learning rates need different `lr_mult`; it reads the
    rates themselves from `max_lr` and `min_lr`.
    """
    return {ParamKey(predicate=_of_settings(one)): _override(one, config) for one in found}


def _of_settings(wanted: Settings) -> ParamPredicate:
    return ParamPredicate(name=str(wanted), fn=lambda parameter: parameter.optimizer_settings == wanted)


def _override(one: Settings, config: OptimizerConfig) -> dict[str, Any]:
    override: dict[str, Any] = {} if one.decay_scale == 1.0 else {"wd_mult": one.decay_scale}
    if one.lr_scale != 1.0:
        override |= {"max_lr": config.lr * one.lr_scale, "min_lr": config.min_lr * one.lr_scale}
        override |= {"lr_mult": one.lr_scale, "matches": matches_of(one.lr_scale, config)}
    return override


def build_optimizer(
    chunks: list[DistributedDataParallel], stages: list[AtumStage], config: Config, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW over the trainable parameters, sharded over data-parallel ranks if optimizer.distributed.

    Raises:
        ConfigError: the one of kernels.adam cannot be imported here.
    """
    o = config.optimizer
    groups = group_overrides(mark_settings(stages, config), o)
    use_foreach_kernels()
    mcore = McoreOptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=o.distributed,
        overlap_param_gather=overlaps_param_gather(o),
    )
    with emulated_cuda(), chosen_adam(config.kernels.adam):
        optimizer = get_megatron_optimizer(mcore, chunks, groups, use_gloo_process_groups=False)
    for stage in stages:
        stage.config.grad_scale_func = optimizer.scale_loss
    if config.kernels.adam == TORCH:
        _use_fused_kernel(optimizer)
    return optimizer


def _use_fused_kernel(optimizer: MegatronOptimizer) -> None:
    """torch's AdamW goes over all parameters in one kernel if asked; megatron-core has no setting for it."""
    for inner in inner_optimizers(optimizer):
        assert isinstance(inner, torch.optim.AdamW)
        for group in inner.param_groups:
            group["fused"] = True


def build_scheduler(optimizer: MegatronOptimizer, config: OptimizerConfig) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then the chosen decay. Counts steps: the update number k (from 0) is made with the rate
    that transformers' get_linear_schedule_with_warmup has for k.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=config.decay_steps,
        lr_decay_style="WSD" if config.schedule == "wsd" else config.schedule,
        wsd_decay_steps=config.wsd_steps,
        lr_wsd_decay_style=config.wsd_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.decay_steps,
        wd_incr_style="constant",
        # a resumed run follows its configuration, not the values of the checkpoint
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """Of the weights that no group of optimizer.groups gives another."""
    groups = optimizer.param_groups
    default = next((group for group in groups if group["default_config"]), None)
    if default is not None:
        return float(default["lr"])
    highest = max(groups, key=lambda group: group["lr_mult"])  # all weights have a rate of their own
    return float(highest["lr"] / highest["lr_mult"]) if highest["lr_mult"] else 0.0


def learning_rates(optimizer: MegatronOptimizer) -> dict[str, float]:
    """`lr`, and `lr/<match>` of each of optimizer.groups that has another. The same on every rank, also on one whose
    stage has no weight of a group: megatron-core gives it an empty one.
    """
    rates = {"lr": learning_rate(optimizer)}
    for group in optimizer.param_groups:
        rates |= {f"lr/{match}": float(group["lr"]) for match in group.get("matches", ())}
    return rates


def scale_learning_rates(optimizer: MegatronOptimizer, factor: float) -> None:
    """Multiply highest and lowest learning rate of every group, from the scheduler's next step on.

    Factors of several calls multiply. A new optimizer starts at the configuration's rates: a run that goes on after n
    such calls makes them all again, so that the same floats come out. `scheduler.step(0)` brings the change to the
    step at hand, as loading a checkpoint does.
    """
    for group in optimizer.param_groups:
        group["max_lr"] *= factor
        group["min_lr"] *= factor
