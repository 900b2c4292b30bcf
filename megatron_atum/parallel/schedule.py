"""Runs megatron-core's pipeline schedules over the chunks of this rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_atum.parallel.cpu_compat import emulated_cuda
from megatron_atum.parallel.groups import ProcessGroups


def run_schedule(
    groups: ProcessGroups,
    chunks: list[Any],
    forward_step: Callable,
    microbatches: list[Any],
    *,
    stage_rows: int,
    rows_per_microbatch: int,
    forward_only: bool = False,
    collect: bool = False,
) -> list[Any]:
    """Forward (and backward) of all microbatches of a step through this rank's chunks.

    Args:
        chunks: modules of this rank in virtual order.
        forward_step: `(iterator, chunk) -> (output, loss_function)`, see megatron-core schedules.py.
        microbatches: the inputs, the same list for every chunk.
        stage_rows: length of the stage tensor along the sequence on one rank (see model/stage_tensor.py).
        rows_per_microbatch: its second dimension.
        forward_only: no backward.
        collect: return what `loss_function(output, non_loss_data=True)` gives instead of losses.

    Returns:
        One entry per microbatch on ranks of the last stage, in order; empty elsewhere.
    """
    layout = groups.layout
    iterators = [iter(microbatches) for _ in chunks]
    interleaved = layout.virtual_pipeline > 1
    with emulated_cuda():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=chunks if interleaved else chunks[0],
            num_microbatches=len(microbatches),
            # megatron-core divides by the tensor size under sequence parallelism to get the size on one rank
            seq_length=stage_rows * layout.sequence_shards,
            micro_batch_size=rows_per_microbatch,
            forward_only=forward_only,
            collect_non_loss_data=collect,
        )
