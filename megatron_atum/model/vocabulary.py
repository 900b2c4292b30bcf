"""Decoupled embedding and head: a base table of V rows, frozen in pretraining, and A added rows that train.

The base tables are split over tensor ranks by vocabulary, padded so that it divides. The added rows are on every
rank; in the head, only the last tensor rank's copy counts.

Legend: S tokens, s tokens of this rank under sequence parallelism (else S), b rows, H hidden width, C columns of
this rank (base share + A + filling).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_atum.config.schema import ModelConfig
from megatron_atum.model.linear import column_linear
from megatron_atum.parallel.fusion import fused
from megatron_atum.parallel.gradients import mark_replicated
from megatron_atum.parallel.groups import ProcessGroups

TOKENS_AT_A_TIME = 128  # of which exponentials are taken, where they are written out
ALIGNED = 64  # columns: rows begin at multiples of 128 bytes in bf16, a line of a GPU's cache


def padded_vocabulary(vocab_size: int, tensor_size: int) -> int:
    return -(-vocab_size // tensor_size) * tensor_size


class _AddedRows(nn.Module):
    """Rows for the tokens beyond the base vocabulary."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, *, sum_gradient: bool) -> None:
        super().__init__()
        self.weight = mark_replicated(nn.Parameter(torch.empty(rows, width, dtype=dtype)), sum_gradient=sum_gradient)

    def forward(self) -> Tensor:
        """The table [A,H]. Called, so that hooks on this module (the overlapped parameter gather) run."""
        return self.weight


class DecoupledEmbedding(MegatronModule):
    """Ids below V look up the base table, the others the added rows (HF: IdeficsDecoupledEmbedding)."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: ProcessGroups) -> None:
        super().__init__(config=config)
        self.vocab_size = model.vocab_size
        self.groups = groups
        self.base = VocabParallelEmbedding(
            padded_vocabulary(model.vocab_size, groups.layout.tensor),
            model.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=groups.tensor,
        )
        self.added = None
        if model.additional_vocab_size:
            self.added = _AddedRows(
                model.additional_vocab_size,
                model.hidden_size,
                config.params_dtype,
                sum_gradient=config.sequence_parallel,
            )

    def forward(self, input_ids_bS: Tensor) -> Tensor:
        """[b,S] -> [s,b,H]."""
        is_added_bS = input_ids_bS >= self.vocab_size
        base = self.base(input_ids_bS.masked_fill(is_added_bS, 0))
        base_sbH = base if self.config.sequence_parallel else base.transpose(0, 1)
        if self.added is None:
            return base_sbH.contiguous()
        index_sb, is_added_sb = self._own_tokens(input_ids_bS - self.vocab_size), self._own_tokens(is_added_bS)
        # Every added row takes part, so that its gradient is reached whatever tokens the microbatch has.
        added_sbH = nn.functional.embedding(index_sb.clamp(min=0), self.added())
        # Not in the order [b,s,H]: projections of rows that do not lie one after the other are batched, and slower.
        return torch.where(is_added_sb[:, :, None], added_sbH, base_sbH).contiguous()

    def _own_tokens(self, x_bS: Tensor) -> Tensor:
        """[b,S] -> [s,b]: this rank's share of the sequence."""
        x_Sb = x_bS.t()
        if not self.config.sequence_parallel:
            return x_Sb
        return x_Sb.chunk(self.groups.layout.tensor)[self.groups.tensor_rank]


class DecoupledHead(MegatronModule):
    """Logits over V base and A added tokens, split over tensor ranks (HF: IdeficsDecoupledLinear).

    A rank's columns are its share of the padded base vocabulary, the A added ones, and then filling: gradients of the
    base columns are a part of these rows, and products are slow where rows do not begin at multiples of 16 bytes.
    Columns that are not this rank's to count (padding; filling; the added ones except on the last rank) are -inf, so
    they add nothing to a softmax and get no gradient.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: ProcessGroups) -> None:
        super().__init__(config=config)
        self.groups = groups
        self.vocab_size, self.added_size = model.vocab_size, model.additional_vocab_size
        padded = padded_vocabulary(model.vocab_size, groups.layout.tensor)
        self.base = column_linear(config, model.hidden_size, padded, groups.tensor, reduce_input_gradient=False)
        self.added = None
        if self.added_size:
            self.added = _AddedRows(self.added_size, model.hidden_size, config.params_dtype, sum_gradient=True)
        self.share = padded // groups.layout.tensor
        self.filling = -(self.share + self.added_size) % ALIGNED if self.added_size else 0
        self.start = self.share * groups.tensor_rank
        self.is_last = groups.tensor_rank == groups.layout.tensor - 1
        has_padding = self.start + self.share > self.vocab_size
        self.has_foreign = has_padding or (self.added is not None and not self.is_last)

    def forward(self, hidden_sbH: Tensor) -> Tensor:
        """[s,b,H] -> logits of this rank's columns [S,b,C]."""
        enter = self._gather if self.config.sequence_parallel else self._copy
        hidden_SbH = enter(hidden_sbH)
        logits, _ = self.base(hidden_SbH)
        if self.added is not None:
            added = nn.functional.linear(hidden_SbH, self.added())
            filling = added.new_full((1, 1, 1), float("-inf")).expand(*added.shape[:2], self.filling)
            logits = torch.cat((logits, added, filling), dim=-1)
        if not self.has_foreign:
            return logits
        return logits.masked_fill(self._foreign_columns(logits.device), float("-inf"))

    def _gather(self, hidden_sbH: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(
            hidden_sbH, tensor_parallel_output_grad=True, group=self.groups.tensor
        )

    def _copy(self, hidden_SbH: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(hidden_SbH, group=self.groups.tensor)

    def _foreign_columns(self, device: torch.device) -> Tensor:
        columns_C = torch.arange(self.share + self.added_size + self.filling, device=device)
        padding = (columns_C < self.share) & (columns_C + self.start >= self.vocab_size)
        added = columns_C >= self.share
        return padding if self.is_last else padding | added

    def target_columns(self, labels: Tensor) -> Tensor:
        """Column of each label on this rank, -1 where another rank holds it."""
        own_base = (labels >= self.start) & (labels < min(self.start + self.share, self.vocab_size))
        column = torch.where(own_base, labels - self.start, -1)
        if self.is_last:
            column = torch.where(labels >= self.vocab_size, labels - self.vocab_size + self.share, column)
        return column

    def gather_logits(self, logits_SbC: Tensor) -> Tensor:
        """[S,b,C] -> all real columns [S,b,V+A] on every tensor rank. No gradient: for inspection and inference."""
        logits_SbC = logits_SbC.detach().contiguous()
        parts = [torch.empty_like(logits_SbC) for _ in range(self.groups.layout.tensor)]
        dist.all_gather(parts, logits_SbC, group=self.groups.tensor)
        base = torch.cat([part[..., : self.share] for part in parts], dim=-1)[..., : self.vocab_size]
        return torch.cat((base, parts[-1][..., self.share : self.share + self.added_size]), dim=-1)


class _LogSumExpAndTarget(torch.autograd.Function):
    """logsumexp over all ranks' columns and the target's logit, both fp32, keeping only the logits for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, column: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        largest = logits.amax(-1).float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        total = _of_tokens(_sum_of_exponentials, logits, largest)
        own = logits.gather(-1, column.clamp(min=0)[..., None]).squeeze(-1).float()
        target = torch.where(column >= 0, own, 0.0)
        both = torch.stack((total, target))
        dist.all_reduce(both, group=group)
        total, target = both
        log_sum_exp = largest + total.log()
        ctx.save_for_backward(logits, column, log_sum_exp)
        return log_sum_exp, target

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, column, log_sum_exp = ctx.saved_tensors
        return _of_tokens(_logits_gradient, logits, column, log_sum_exp, *gradients), None, None


def _of_tokens(function: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """`function` of tensors whose first dimension counts all tokens: a kernel need not know how many rows there are."""
    out = function(logits.flatten(0, -2), *(x.flatten() for x in others))
    return out.unflatten(0, logits.shape[:-1])


# Exponentials of all tokens would take twice the memory of logits in bf16, and more: where no kernel is generated that
# keeps them to itself, they are taken of some tokens at a time. Legend: T tokens.


def _exponentials_summed_in_parts(logits_TC: Tensor, largest_T: Tensor) -> Tensor:
    parts = zip(logits_TC.split(TOKENS_AT_A_TIME), largest_T[:, None].split(TOKENS_AT_A_TIME), strict=True)
    return torch.cat([(scores - top).exp_().sum(-1) for scores, top in parts])


@partial(fused, unfused=_exponentials_summed_in_parts)
def _sum_of_exponentials(logits_TC: Tensor, largest_T: Tensor) -> Tensor:
    return (logits_TC.float() - largest_T[:, None]).exp().sum(-1)


def _logits_gradient_in_parts(
    logits_TC: Tensor, column_T: Tensor, log_sum_exp_T: Tensor, grad_log_sum_exp_T: Tensor, grad_target_T: Tensor
) -> Tensor:
    grad_TC = torch.empty_like(logits_TC)
    here_T = torch.where(column_T >= 0, grad_target_T, 0.0)
    by_token = (log_sum_exp_T, grad_log_sum_exp_T, column_T.clamp(min=0), here_T)
    tensors = (grad_TC, logits_TC, *(x[:, None] for x in by_token))
    for out, scores, log_sum_exp, factor, column, here in zip(
        *(x.split(TOKENS_AT_A_TIME) for x in tensors), strict=True
    ):
        grad = out if out.dtype == log_sum_exp.dtype else torch.empty_like(out, dtype=log_sum_exp.dtype)
        torch.sub(scores, log_sum_exp, out=grad).exp_().mul_(factor).scatter_add_(-1, column, here)
        if grad is not out:
            out.copy_(grad)
    return grad_TC


@partial(fused, unfused=_logits_gradient_in_parts)
def _logits_gradient(
    logits_TC: Tensor, column_T: Tensor, log_sum_exp_T: Tensor, grad_log_sum_exp_T: Tensor, grad_target_T: Tensor
) -> Tensor:
    """d(loss)/d(logits) in the dtype of the logits. The target is found by comparison, since a scatter would write
    its fp32 operand out. No column is -1."""
    grad_TC = (logits_TC.float() - log_sum_exp_T[:, None]).exp() * grad_log_sum_exp_T[:, None]
    columns_C = torch.arange(logits_TC.shape[-1], device=logits_TC.device)
    grad_TC = grad_TC + torch.where(columns_C == column_T[:, None], grad_target_T[:, None], 0.0)
    return grad_TC.to(logits_TC.dtype)


def log_sum_exp_and_target(logits: Tensor, column: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Parts of cross entropy and z-loss over a vocabulary that is split over `group`.

    Args:
        logits: [..., C] of this rank, -inf where a column is not this rank's.
        column: [...] from `DecoupledHead.target_columns`.

    Returns:
        logsumexp [...] and the target's logit [...], fp32, equal on all ranks of the group. Cross entropy is their
        difference; z-loss is the square of the first.
    """
    return _LogSumExpAndTarget.apply(logits, column, group)
