"""What a run is, said once before its first step; and a trial of the largest batch it can meet.

Legend: b rows, S tokens, I images of a row, N images of a microbatch.
"""

from __future__ import annotations

import platform
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from megatron_atum import __version__
from megatron_atum.batch import NO_IMAGE, Batch, image_slice, shift_labels
from megatron_atum.checkpoint.optimizer_state import optimizer_shards
from megatron_atum.config.revision import git_state
from megatron_atum.config.schema import Config
from megatron_atum.errors import ConfigError, first_line
from megatron_atum.model.frozen_gemm import frozen_matrices, weight_bytes
from megatron_atum.parallel.device import (
    device_name,
    has_accelerator,
    is_out_of_memory,
    memory_gib,
    reset_peak_memory,
    wait_for_device,
)
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.parallel.random_state import random_state, set_random_state
from megatron_atum.training.engine import Engine
from megatron_atum.training.kernels import describe_layers
from megatron_atum.training.optimizer import overlaps_param_gather

_PACKAGES = ("megatron-core", "transformer-engine", "apex")


def describe(engine: Engine, shares: dict[str, float], weights_from: str) -> str:
    """Several lines, to be shown by rank 0. Collective over all ranks.

    Args:
        shares: of the sources' tokens.
        weights_from: where the weights come from.
    """
    config, groups = engine.config, engine.groups
    mixture = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    return "\n".join(
        [
            # On one rank: hundreds that ask git at once would keep a shared file system busy.
            f"Megatron-ATUM {__version__} ({git_state() if groups.rank == 0 else 'code as on rank 0'}), "
            f"Python {platform.python_version()}, {_versions()}",
            f"devices: {groups.layout.world_size} x {device_name()}, {dist.get_backend()}, weights {engine.dtype}",
            f"layout: {groups.layout.describe()}",
            f"groups of rank 0: {_groups(groups)}",
            *_stages(engine),
            f"kernels: {describe_layers(config.kernels)}; {_optimizer(engine)}",
            *_frozen_products(engine),
            f"{_recompute(config)}; schedule {config.optimizer.schedule}, "
            f"lr {config.optimizer.lr:g} to {config.optimizer.min_lr:g}",
            f"batch: {_batch(config)}",
            f"weights: {weights_from}",
            f"data: shares of tokens: {mixture}",
        ]
    )


def _versions() -> str:
    found = [f"torch {torch.__version__}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _stages(engine: Engine) -> Iterable[str]:
    """One line per pipeline stage: what one device of it holds."""
    mine = (engine.groups.pipeline_rank, _counts(engine), _expected_gib(engine))
    everyone: list[Any] = [None] * engine.groups.layout.world_size
    dist.all_gather_object(everyone, mine)
    for stage in range(engine.groups.layout.pipeline):
        (trains, frozen), memory = next((counts, gib) for place, counts, gib in everyone if place == stage)
        parts = ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
        yield f"stage {stage}: {trains:,} trainable and {frozen:,} frozen parameters per device; GiB: {parts}"


def _frozen_products(engine: Engine) -> Iterable[str]:
    """A line about what was cast for kernels.frozen_gemm=fp8: what all devices of one model replica hold."""
    if engine.config.kernels.frozen_gemm != "fp8":
        return
    groups, found = engine.groups, list(frozen_matrices(engine.stages))
    mine = torch.zeros(3, dtype=torch.int64, device=engine.device)
    if groups.data_rank == 0:
        sizes = [(matrix.nbytes, weight.nbytes) for _, weight, matrix in found]
        now, before = (sum(bytes_) for bytes_ in zip(*sizes, strict=True)) if sizes else (0, 0)
        mine += torch.tensor([0 if groups.tensor_rank else len(found), now, before], device=engine.device)
    dist.all_reduce(mine)
    matrices, now, before = mine.tolist()
    hosts = _of_hosts(sum(weight.nbytes for _, weight, _ in found))
    if not matrices:
        yield "frozen products: kernels.frozen_gemm=fp8 has nothing to cast, as no matrix of torch's layers is frozen"
        return
    gib = f"{now / 2**30:.3g} GiB on the devices of each model replica in the place of {before / 2**30:.3g}"
    node = f"{max(hosts.values()) / 2**30:.3g} GiB in the memory of a node"
    yield f"frozen products: {matrices} matrices in fp8, {gib}, which the hosts keep: at most {node}"


def _of_hosts(mine: int) -> Counter[str]:
    """The sum of a number of all ranks, by host. Collective over all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), mine))
    hosts: Counter[str] = Counter()
    for host, number in everyone:
        hosts[host] += number
    return hosts


def _groups(groups: ProcessGroups) -> str:
    """Rank 0's; those of the others are these, moved on."""
    kinds = {"tensor": groups.tensor, "data": groups.data, "pipeline": groups.pipeline}
    ranks = {name: _shortened(dist.get_process_group_ranks(group)) for name, group in kinds.items()}
    return ", ".join(f"{name} {text}" for name, text in ranks.items())


def _shortened(ranks: list[int]) -> str:
    """0, 8, 16, ... 504"""
    shown = [str(rank) for rank in ranks]
    return ", ".join(shown if len(ranks) <= 4 else [*shown[:3], f"... {ranks[-1]}"])


def _counts(engine: Engine) -> tuple[int, int]:
    parameters = [p for stage in engine.stages for p in stage.parameters()]
    trains = sum(p.numel() for p in parameters if p.requires_grad)
    return trains, sum(p.numel() for p in parameters) - trains


def _expected_gib(engine: Engine) -> dict[str, float]:
    """Memory that is known before a step; activations come on top."""
    weights = weight_bytes(engine.stages)
    gradients = sum(buffer.grad_data.numel() * 4 for chunk in engine.chunks for buffer in chunk.buffers)
    optimizer = sum(
        (shard.stop - shard.start) * (12 if shard.has_main else 8) for shard in optimizer_shards(engine.optimizer)
    )
    return {name: x / 2**30 for name, x in (("weights", weights), ("gradients", gradients), ("optimizer", optimizer))}


def _optimizer(engine: Engine) -> str:
    o, inner = engine.config.optimizer, type(engine.inner_optimizer)
    parts = [f"optimizer: {inner.__module__.split('.')[0]} {inner.__name__}"]
    parts += ["sharded over data-parallel ranks"] if o.distributed else []
    parts += ["gradient reduction overlapped"] if o.overlap_grad_reduce else []
    parts += ["weight gather overlapped"] if overlaps_param_gather(o) else []
    return ", ".join(parts)


def _batch(config: Config) -> str:
    training = config.training
    begins = f"from {training.ramp_up.start} to " if training.ramp_up.start else ""
    rows = f"{begins}{training.global_batch_size} rows of {config.data.sequence_length} tokens"
    return f"{rows}, {training.micro_batch_size} per microbatch"


def _recompute(config: Config) -> str:
    training = config.training
    if training.recompute != "full":
        return f"recompute: {training.recompute}"
    return f"recompute: full, {training.recompute_method}, {training.recompute_layers} layers"


# The trial -----------------------------------------------------------------------------------------------------------


def wants_dry_step(config: Config) -> bool:
    return config.health.dry_step == "always" or (config.health.dry_step == "auto" and has_accelerator())


def dry_step(engine: Engine, most_images: int) -> str:
    """Run the largest batch forward and backward and forget it. Collective over all ranks.

    Gradients, random state and data are as if it had not been; times and peaks of memory count from its end.
    Memory of optimizer states that do not exist before the first step is taken for as long as it lasts.

    Args:
        most_images: of a row.

    Returns:
        a line about what it took.

    Raises:
        ConfigError: on a rank that it does not fit. The others end with it.
    """
    state = random_state()
    batches = [largest_batch(engine.config, engine.groups, most_images)] * _microbatches(engine)
    images = batches[0].num_images
    what = f"the largest microbatch ({batches[0].input_ids.shape[0]} rows, {images} images)"
    try:
        states = [
            torch.empty(2, shard.stop - shard.start, device=engine.device)
            for shard in optimizer_shards(engine.optimizer)
            if not shard.moments()
        ]
        engine.forward_backward(batches)
        del states
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{what} does not fit on rank {engine.groups.rank}: {first_line(error)}; lower "
            "training.micro_batch_size or data.sources[*].max_images, raise parallel.tensor or parallel.pipeline, or "
            "use training.recompute"
        ) from None
    engine.forget_gradients()
    set_random_state(state)
    peak = torch.tensor(memory_gib(), device=engine.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    wait_for_device()
    engine.forward_watch.take()
    reset_peak_memory()
    return f"{what} takes {float(peak):.2f} GiB at most on a device, optimizer states included"


def largest_batch(config: Config, groups: ProcessGroups, most_images: int) -> Batch:
    """Full rows with as many images as one can have."""
    return full_batch(config, groups, [most_images] * config.training.micro_batch_size)


def full_batch(config: Config, groups: ProcessGroups, images: Sequence[int]) -> Batch:
    """Rows without padding, each with so many images, among which its tokens are shared out evenly."""
    b, S, N = len(images), config.data.sequence_length, sum(images)
    ids = torch.full((b, S), config.model.eos_token_id, dtype=torch.int64)
    mask = torch.ones(b, S, dtype=torch.int64)
    labels, loss_mask = shift_labels(ids, mask)
    index = [torch.arange(S) * I // S if I else torch.full((S,), NO_IMAGE) for I in images]
    mine = image_slice(N, groups.tensor_rank, groups.layout.tensor) if groups.is_first_stage else slice(0, 0)
    side = config.model.vision.image_size
    return Batch(
        input_ids=ids,
        labels=labels,
        loss_mask=loss_mask,
        z_mask=mask.to(torch.float32),
        position_ids=torch.arange(S).expand(b, S).contiguous(),
        pixels=torch.zeros(mine.stop - mine.start, 3, side, side, dtype=torch.uint8),
        image_index=torch.stack(index),
        images_per_row=torch.tensor(images, dtype=torch.int64),
        source=(config.data.sources[0].name,) * b,
        pack_ids=torch.zeros(b, dtype=torch.int64),
    )


def _microbatches(engine: Engine) -> int:
    """Enough that as many are under way at once as in a real step."""
    layout, training = engine.groups.layout, engine.config.training
    all_of_them = training.global_batch_size // (training.micro_batch_size * layout.data)
    return min(all_of_them, 2 * layout.pipeline)
