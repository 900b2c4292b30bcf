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

from megatron_atum.checkpoint.weights import rows_of
from megatron_atum.config.schema import Config, ModelConfig, OptimizerConfig
from megatron_atum.model.stage import AtumStage
from megatron_atum.parallel.cpu_compat import emulated_cuda
from megatron_atum.parallel.gradients import sum_replicated
from megatron_atum.parallel.groups import ProcessGroups

# m4's rule: no decay where the Hugging Face name contains one of these. So the whole perceiver has none.
NO_DECAY = ("bias", "alpha", "layernorm", "ln", "perceiver_resampler", "layer_norm")


def wrap_data_parallel(stages: list[AtumStage], config: OptimizerConfig) -> list[DistributedDataParallel]:
    """Gradient buffers and their reduction over data-parallel ranks, for trainable parameters only."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        bucket_size=config.bucket_size,
    )
    with emulated_cuda():
        return [
            DistributedDataParallel(stage.config, ddp_config, stage, disable_bucketing=number > 0)
            for number, stage in enumerate(stages)
        ]


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


def mark_weight_decay(stages: Iterable[nn.Module], model: ModelConfig) -> None:
    for row, parameter in rows_of(stages, model):
        parameter.no_weight_decay = any(part in row.hf[0] for part in NO_DECAY)  # type: ignore[attr-defined]


def build_optimizer(
    chunks: list[DistributedDataParallel],
    stages: list[AtumStage],
    config: Config,
    dtype: torch.dtype,
    overrides: dict[ParamKey, dict[str, Any]] | None = None,
) -> MegatronOptimizer:
    """AdamW over the trainable parameters, sharded over data-parallel ranks if optimizer.distributed.

    Args:
        overrides: settings of further groups of parameters, as megatron-core takes them.
    """
    o = config.optimizer
    mark_weight_decay(stages, config.model)
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
        overlap_param_gather=o.overlap_param_gather,
    )
    no_decay = ParamPredicate(name="no_weight_decay", fn=lambda parameter: parameter.no_weight_decay)
    with emulated_cuda():
        optimizer = get_megatron_optimizer(
            mcore,
            chunks,
            {ParamKey(predicate=no_decay): {"wd_mult": 0.0}, **(overrides or {})},
            use_gloo_process_groups=False,
        )
    for stage in stages:
        stage.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def build_scheduler(optimizer: MegatronOptimizer, config: OptimizerConfig) -> OptimizerParamScheduler:
    """Linear warm-up, then the chosen decay. Counts steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=config.decay_steps,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.decay_steps,
        wd_incr_style="constant",
        # a resumed run follows its configuration, not the values of the checkpoint
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
