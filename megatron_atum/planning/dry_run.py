"""One rank of a large run, in one process without an accelerator.

What runs is the code of training itself: this rank's shard of the model, megatron-core's data parallelism, optimizer
and schedule, one optimizer step and then forward and backward of some microbatches. Its tensors have no memory (fake
tensors) and its group has no other ranks (torch's fake process group), so a rank of 512 fits into a laptop.

A step has many equal microbatches. As many are run as it takes for the most to be under way at once and two to follow
in the steady state; what belongs to microbatches is then scaled to the step, what happens once is not.

Not run, since it needs values: the norm of the gradients (one number over all ranks) and the exchange of losses (some
numbers). Their bytes are left out. The kernels are those of a CPU: a fused attention, norms of ours.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_atum.config.schema import Config, KernelsConfig, SourceConfig
from megatron_atum.model.frozen_gemm import frozen_matrices
from megatron_atum.model.inputs import StageInput
from megatron_atum.parallel.cpu_compat import emulated_cuda
from megatron_atum.parallel.fake import FakeWorld, fake_world
from megatron_atum.parallel.groups import ProcessGroups, build_groups
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.cluster import Cluster
from megatron_atum.planning.recorder import Memory, Recorder, Transfer, tensors_in
from megatron_atum.training.engine import Engine
from megatron_atum.training.self_check import full_batch

PER_MICROBATCH, ONCE = "microbatches", "once"


@dataclass(frozen=True)
class Message:
    """All messages of one kind that a rank takes part in during a step."""

    operation: str  # all_reduce | all_gather | reduce_scatter | broadcast | send | receive
    group: str  # tensor | pipeline | data | model | world | other
    ranks: int  # of the group; 2 for send and receive
    link: str  # node: inside one | network: between nodes
    calls: int
    payload: int  # bytes: the larger side of each collective (recorder.py)

    @property
    def wire(self) -> int:
        """Bytes that this rank sends, where collectives go around a ring."""
        ring = self.payload * (self.ranks - 1) // self.ranks
        sent = {"all_reduce": 2 * ring, "all_gather": ring, "reduce_scatter": ring, "receive": 0}
        return sent.get(self.operation, self.payload)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device, without what CUDA and NCCL take for themselves."""

    parameters: int
    gradients: int
    optimizer: int  # fp32 weights and moments
    inputs: int  # batches of the step
    activations: int  # the most that lives besides all of that
    host: int = 0  # not on the device: what this rank keeps in the memory of its host, originals of 8-bit weights

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.inputs + self.activations


@dataclass(frozen=True)
class DryRun:
    """What one rank does in a step."""

    rank: int
    pipeline_rank: int
    data_rank: int
    tensor_rank: int
    microbatches: int  # of a step
    microbatches_run: int
    images: int  # of a microbatch
    parameters: int  # values on this rank
    trainable: int
    memory: DeviceMemory
    kept: int  # bytes that a microbatch under way keeps, of the first chunk of this rank
    flops: dict[str, int]  # of a step: gemm | attention (causal counted in full) | convolution
    messages: list[Message]
    unreached: list[str]  # trainable tensors that backward does not reach
    seconds: float
    process_gib: float  # most memory of this process so far


def dry_run(config: Config, cluster: Cluster, rank: int, images: list[int], microbatches: int | None = None) -> DryRun:
    """Run a rank of `config` on `cluster`.

    Args:
        images: of each row of a microbatch.
        microbatches: to run; default as few as show everything.

    Raises:
        ConfigError: the layout cannot work on so many ranks.
    """
    began = time.perf_counter()
    config = as_on_accelerator(config)
    layout = ParallelLayout.from_config(config, cluster.world_size)
    of_step = config.training.global_batch_size // (config.training.micro_batch_size * layout.data)
    with fake_world(rank, layout.world_size) as world:
        groups = build_groups(layout)
        recorder = Recorder()
        run = microbatches or needed_microbatches(layout, groups.pipeline_rank, of_step)
        played = _play(config, groups, world, recorder, images, run)
        return DryRun(
            rank=rank,
            pipeline_rank=groups.pipeline_rank,
            data_rank=groups.data_rank,
            tensor_rank=groups.tensor_rank,
            microbatches=of_step,
            microbatches_run=run,
            images=sum(images),
            memory=replace(played.memory, inputs=played.memory.inputs * of_step),
            flops={
                kind: count * of_step // run
                for (phase, kind), count in recorder.flops.items()
                if phase == PER_MICROBATCH
            },
            messages=_messages(recorder, groups, cluster, of_step, run),
            parameters=played.parameters,
            trainable=played.trainable,
            kept=played.kept,
            unreached=played.unreached,
            seconds=time.perf_counter() - began,
            process_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        )


def as_on_accelerator(config: Config) -> Config:
    """The configuration with those defaults filled in that depend on having an accelerator."""
    training, optimizer, data = config.training, config.optimizer, config.data
    if training.precision == "auto":
        training = replace(training, precision="bf16")
    if optimizer.overlap_param_gather is None:
        optimizer = replace(optimizer, overlap_param_gather=optimizer.distributed and optimizer.overlap_grad_reduce)
    if not data.sources:
        data = replace(data, sources=[SourceConfig(name="rows", shards="")])
    # Other backends need a device. Of te's fp8 nothing is known here (planning/report.py says so).
    kernels = KernelsConfig(frozen_gemm=config.kernels.frozen_gemm if config.kernels.backend == "torch" else "bf16")
    return replace(config, training=training, optimizer=optimizer, data=data, kernels=kernels)


def needed_microbatches(layout: ParallelLayout, pipeline_rank: int, of_step: int) -> int:
    """How many show the most that is under way at once, and two in the steady state (megatron-core schedules.py)."""
    behind = layout.pipeline - pipeline_rank - 1
    if layout.virtual_pipeline == 1:
        return min(of_step, behind + 2)
    chunks = 2 * behind + (layout.virtual_pipeline - 1) * layout.pipeline + 2
    rounds = -(-chunks // (layout.virtual_pipeline * layout.pipeline))
    return min(of_step, max(2, rounds) * layout.pipeline)


@dataclass(frozen=True)
class _Played:
    memory: DeviceMemory  # inputs of one microbatch
    parameters: int
    trainable: int
    kept: int
    unreached: list[str]


def _play(
    config: Config, groups: ProcessGroups, world: FakeWorld, recorder: Recorder, images: list[int], run: int
) -> _Played:
    memory = recorder.memory
    with world.tensors(), recorder:
        engine = Engine(config, groups)
        every = [parameter for stage in engine.stages for parameter in stage.parameters()]
        memory.watch(every)
        engine.cast_frozen()
        originals = [weight for _, weight, _ in frozen_matrices(engine.stages)]  # a real run's host has them
        host = sum(weight.nbytes for weight in originals)
        memory.release(originals)
        parameters = memory.live
        engine.build_optimizer()
        gradients = sum(buffer.grad_data.nbytes for chunk in engine.chunks for buffer in chunk.buffers)
        recorder.phase = ONCE
        _first_update(engine)
    static = memory.live
    settings, inputs = engine.prepare([full_batch(config, groups, images)] * run)
    snapshots = engine.forward_watch = _Snapshots(memory)  # type: ignore[assignment]
    reach, engine.reach = engine.reach, None
    for stage in engine.stages:
        stage.config.deallocate_pipeline_outputs = True  # as with an accelerator (model/configs.py)
    recorder.phase, memory.peak = PER_MICROBATCH, static
    with world.tensors(), recorder, _phase_of_finish(engine, recorder):
        engine.run(settings, inputs)
    assert reach is not None
    return _Played(
        memory=DeviceMemory(
            parameters=parameters,
            gradients=gradients,
            optimizer=static - parameters - gradients,
            inputs=_input_bytes(inputs[0]),
            activations=memory.peak - static,
            host=host,
        ),
        parameters=sum(parameter.numel() for parameter in every),
        trainable=sum(parameter.numel() for parameter in every if parameter.requires_grad),
        kept=snapshots.kept(waits=not groups.is_last_stage),
        unreached=reach.stop(),
    )


def _first_update(engine: Engine) -> None:
    """Makes the optimizer's state, as the first step of training does. Gradients are zero."""
    with emulated_cuda():
        engine.optimizer.prepare_grads()
        engine.optimizer.step_with_ready_grads()


@contextlib.contextmanager
def _phase_of_finish(engine: Engine, recorder: Recorder) -> Iterator[None]:
    """What follows the microbatches is recorded as `ONCE`: megatron-core calls one function for it."""
    configs = [stage.config for stage in engine.stages]
    finish = configs[0].finalize_model_grads_func

    def marked(*args: Any, **kwargs: Any) -> None:
        recorder.phase = ONCE
        finish(*args, **kwargs)

    for config in configs:
        config.finalize_model_grads_func = marked
    yield
    for config in configs:
        config.finalize_model_grads_func = finish


class _Snapshots:
    """In the place of the stopwatch around each forward: how much lives before and after it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._before: list[int] = []
        self._after: list[int] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._before.append(self._memory.live)
        yield
        self._after.append(self._memory.live)

    def kept(self, waits: bool) -> int:
        """Args: waits: a second forward comes before the first backward."""
        return (self._before[1] if waits else self._after[0]) - self._before[0]


def _input_bytes(inputs: StageInput) -> int:
    values = [vars(inputs), vars(inputs.plan)]
    return sum(tensor.nbytes for tensor in tensors_in(values))


def _messages(recorder: Recorder, groups: ProcessGroups, cluster: Cluster, of_step: int, run: int) -> list[Message]:
    """Those of the run scaled to a step. What data-parallel ranks exchange happens once, whenever it does."""
    totals: dict[tuple[str, str, int, str], tuple[int, int]] = {}
    for transfer, calls in recorder.calls.items():
        if not transfer.phase:  # building
            continue
        kind = kind_of(transfer, groups)
        factor = of_step / run if transfer.phase == PER_MICROBATCH and kind != "data" else 1
        key = (transfer.operation, kind, max(2, len(transfer.ranks)), _link(transfer, groups.rank, cluster))
        before = totals.get(key, (0, 0))
        payload = recorder.payload[transfer]
        totals[key] = (before[0] + round(calls * factor), before[1] + round(payload * factor))
    return [Message(*key, calls=calls, payload=payload) for key, (calls, payload) in totals.items()]


def kind_of(transfer: Transfer, groups: ProcessGroups) -> str:
    """What the group of a message is for. Of two stages, megatron-core sends one way over the group of all ranks."""
    return "pipeline" if transfer.operation in ("send", "receive") else groups.kinds.get(transfer.group, "other")


def _link(transfer: Transfer, rank: int, cluster: Cluster) -> str:
    return "network" if cluster.crosses_nodes((rank, *transfer.ranks)) else "node"
