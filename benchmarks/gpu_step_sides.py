"""The models that gpu_step.py times. Each is open for as long as its block lasts, and does what `Side` says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn

from benchmarks.gpu_step_cases import HF, HF_SAVING, SHARD_FEW, SHARD_MICROBATCHES, Case, Run
from benchmarks.step import Shape, hf_inputs, make_batch
from megatron_atum.batch import Batch, image_slice
from megatron_atum.checkpoint.hf_config import to_hf
from megatron_atum.checkpoint.optimizer_state import inner_optimizers
from megatron_atum.config.schema import Config
from megatron_atum.model.frozen_gemm import frozen_matrices
from megatron_atum.parallel.device import device, has_accelerator
from megatron_atum.parallel.fake import lone_rank
from megatron_atum.parallel.groups import ProcessGroups, build_groups, start_distributed, stop_distributed
from megatron_atum.parallel.stopwatch import Stopwatch
from megatron_atum.planning.measured import MICROBATCHES
from megatron_atum.training.engine import Engine


class Side:
    """A model and its optimizer."""

    config: Config
    vision: Stopwatch | None = None  # around the vision tower

    def use(self, run: Run) -> None:
        """Steps are those of this run from here on."""
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError


@contextlib.contextmanager
def opened(run: Run) -> Iterator[Side]:
    """The side of a run."""
    if run.who in (HF, HF_SAVING):
        yield HuggingFace(run)
    elif run.shard:
        with lone_rank(run.shard.rank, run.shard.world_size), LoneShard(run) as shard:
            yield shard
    else:
        start_distributed()
        try:
            with Ours(run) as ours:
                yield ours
        finally:
            stop_distributed()


def random_batch(config: Config, case: Case) -> Batch:
    return make_batch(Shape(to_hf(config.model), case.length), case.images)


def pinned(batch: Batch) -> Batch:
    """As training has it (training/feed.py)."""
    if not has_accelerator():
        return batch
    tensors: dict[str, Any] = {n: value.pin_memory() for n, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


def fill(module: nn.Module) -> None:
    """Random matrices; vectors (norms, gates, biases) are 1."""
    generator = torch.Generator(device=device()).manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() < 2:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02, generator=generator)


def filled_engine(config: Config, groups: ProcessGroups) -> Engine:
    engine = Engine(config, groups)
    for stage in engine.stages:
        fill(stage)
    engine.cast_frozen()
    engine.build_optimizer()
    return engine


class OfEngine(Side):
    """At the end of its block its tensors are empty."""

    engine: Engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """megatron-core's hooks on gradients keep weights and buffers alive, also when nothing refers to them."""
        for tensor in _tensors(self.engine):
            tensor.untyped_storage().resize_(0)


def _tensors(engine: Engine) -> Iterator[Tensor]:
    """Weights, gradients and optimizer."""
    for stage in engine.stages:
        yield from stage.parameters()
    for _, _, matrix in frozen_matrices(engine.stages):
        yield from matrix.tensors
    for chunk in engine.chunks:
        for buffer in chunk.buffers:
            yield from (x for x in (buffer.param_data, buffer.grad_data) if x is not None)
    for inner in inner_optimizers(engine.optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state.get(parameter, {}).values()
                yield from (parameter, *(x for x in state if isinstance(x, Tensor)))


class Ours(OfEngine):
    def __init__(self, run: Run) -> None:
        self.config = run.config()
        self.engine = filled_engine(self.config, build_groups(run.layout()))
        self.vision = Stopwatch()
        _watch(self.engine.stages[0].vision, self.vision)

    def use(self, run: Run) -> None:
        self.batches = [pinned(random_batch(self.config, run.case))] * MICROBATCHES

    def step(self) -> None:
        self.engine.step(self.batches)


def _watch(vision: Any, watch: Stopwatch) -> None:
    encode = vision.encode_shared

    def watched(*arguments: Any) -> Tensor:
        with watch.running():
            return encode(*arguments)

    vision.encode_shared = watched


class LoneShard(OfEngine):
    """One rank of many, in megatron-core's schedule of its stage."""

    def __init__(self, run: Run) -> None:
        self.config = run.config()
        self.engine = filled_engine(self.config, build_groups(run.layout()))

    def use(self, run: Run) -> None:
        groups, batch = self.engine.groups, random_batch(self.config, run.case)
        mine = image_slice(batch.num_images, groups.tensor_rank, groups.layout.tensor)
        pixels = batch.pixels[mine] if groups.is_first_stage else batch.pixels[:0]
        self.batches = [pinned(replace(batch, pixels=pixels))] * SHARD_MICROBATCHES

    def step(self) -> None:
        self._apply(self.batches)

    def short_step(self) -> None:
        self._apply(self.batches[:SHARD_FEW])

    def _apply(self, batches: list[Batch]) -> None:
        result = self.engine.step(batches)
        assert result.is_finite, f"training would not apply this step: {result.losses}, norm {result.grad_norm}"


class HuggingFace(Side):
    def __init__(self, run: Run) -> None:
        self.config = run.config()
        hf = transformers.IdeficsConfig(**to_hf(self.config.model))
        hf._attn_implementation = "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if has_accelerator() else torch.float32)
        try:
            with device():
                self.model = transformers.IdeficsForVisionText2Text(hf).train()
        finally:
            torch.set_default_dtype(before)
        fill(self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        o = self.config.optimizer
        self.optimizer = torch.optim.AdamW(self.trained, o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay, fused=True)

    def use(self, run: Run) -> None:
        if run.who == HF_SAVING:
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()
        batch = random_batch(self.config, run.case)
        self.inputs = {name: tensor.to(device()) for name, tensor in hf_inputs(batch).items()}
        self.labels = batch.labels.to(device())

    def step(self) -> None:
        self.optimizer.zero_grad()
        total = torch.zeros((), device=device())
        for _ in range(MICROBATCHES):
            logits = self.model(**self.inputs, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), self.labels.flatten())
            (loss / MICROBATCHES).backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.clip_grad)
        self.optimizer.step()
        float(total)
