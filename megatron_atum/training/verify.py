"""Compares a checkpoint with a Hugging Face folder: every weight bit for bit, and logits on random input.

Legend: b rows, S tokens of a row, I images of a row, N images, C words of the whole vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_atum.batch import NO_IMAGE, Batch, image_slice, position_ids_from_mask, shift_labels
from megatron_atum.checkpoint.source import TensorSource
from megatron_atum.checkpoint.stored import StoredCheckpoint
from megatron_atum.checkpoint.tensor_file import row_slices
from megatron_atum.config.schema import Config, ModelConfig, ParallelConfig
from megatron_atum.errors import CheckpointError, ConfigError
from megatron_atum.parallel.device import hide_accelerators
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.parallel.spawn import spawn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}  # of logits, relative to the largest one
GATES = ("alpha_cross_attn", "alpha_dense")  # how names of gates end
OPEN_GATE = 0.5


# Weights ------------------------------------------------------------------------------------------------------------


@dataclass
class WeightReport:
    tensors: int = 0
    different: dict[str, float] = field(default_factory=dict)  # largest absolute difference, by name
    converted: dict[str, str] = field(default_factory=dict)  # tensors of other dtypes: "theirs -> ours"


def compare_weights(
    theirs: TensorSource, ours: TensorSource, progress: Callable[[int], object] = lambda count: None
) -> WeightReport:
    """Compare all tensors bit for bit, a piece at a time.

    Where dtypes differ, both are compared in the smaller one, as a conversion would have rounded them.

    Raises:
        CheckpointError: a tensor cannot be read, or is not finite.
    """
    report = WeightReport()
    for name in sorted(ours.names()):
        report.tensors += 1
        worst, one, other = -1.0, theirs.dtype(name), ours.dtype(name)
        if one != other:
            report.converted[name] = f"{_name(one)} and {_name(other)}"
        dtype = one if one.itemsize < other.itemsize else other
        for rows in row_slices(ours.shape(name), other.itemsize):
            a, b = theirs.read(name, rows), ours.read(name, rows)
            worst = max(worst, _difference(a.to(dtype), b.to(dtype)))
            progress(b.nbytes)
        if worst >= 0:
            report.different[name] = worst
    return report


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; -1 where all bits are the same (0.0: a zero has another sign)."""
    if torch.equal(_bits(a), _bits(b)):
        return -1.0
    return float((a.double() - b.double()).abs().max())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def closed_gates(sources: list[TensorSource]) -> tuple[str, ...]:
    """The kinds of gates that are zero in every layer of every source."""
    return tuple(
        kind
        for kind in GATES
        if not any(source.read(name).any() for source in sources for name in source.names() if name.endswith(kind))
    )


# Input --------------------------------------------------------------------------------------------------------------


def random_batch(model: ModelConfig, rows: int, tokens: int, images: int, seed: int) -> Batch:
    """Random tokens and images. The last of several rows has text only; a token sees the last image before it.

    Raises:
        ConfigError: there are fewer tokens than the images need.
    """
    if tokens < images + 2:
        raise ConfigError(f"--tokens {tokens} leaves no place for {images} images; --tokens {images + 2} would work")
    generator = torch.Generator().manual_seed(seed)
    words, size = model.vocab_size + model.additional_vocab_size, model.vision.image_size
    ids_bS = torch.randint(words, (rows, tokens), generator=generator)
    counts = torch.full((rows,), images)
    counts[-1] = 0 if rows > 1 else images
    pixels_N = torch.randn(int(counts.sum()), model.vision.num_channels, size, size, generator=generator)
    mask_bS = torch.ones(rows, tokens, dtype=torch.bool)
    labels_bS, loss_mask_bS = shift_labels(ids_bS, mask_bS)
    return Batch(
        input_ids=ids_bS,
        labels=labels_bS,
        loss_mask=loss_mask_bS,
        z_mask=mask_bS.float(),
        position_ids=position_ids_from_mask(mask_bS),
        pixels=pixels_N,
        image_index=torch.stack([_image_index(int(count), tokens, generator) for count in counts]),
        images_per_row=counts,
        source=("random",) * rows,
        pack_ids=torch.arange(rows),
    )


def _image_index(count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Images begin at random places; the first token sees none."""
    index_S = torch.full((tokens,), NO_IMAGE)
    starts = (1 + torch.randperm(tokens - 1, generator=generator)[:count]).sort().values
    for image, start in enumerate(starts.tolist()):
        index_S[start:] = image
    return index_S


# Hugging Face -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hf_logits(folder: Path, batch: Batch, dtype: torch.dtype, open_gates: tuple[str, ...] = ()) -> Tensor:
    """[b,S,C] fp32 of transformers' model, which is gone when this returns."""
    from transformers import IdeficsForVisionText2Text

    model: Any = IdeficsForVisionText2Text.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(open_gates):
            parameter.fill_(OPEN_GATE)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=torch.ones_like(batch.input_ids),
        position_ids=batch.position_ids,
        pixel_values=_hf_pixels(batch).to(dtype),
        image_attention_mask=_hf_image_mask(batch),
        use_cache=False,
    ).logits.float()
    del model
    gc.collect()
    return logits


def _hf_slots(batch: Batch) -> int:
    return max(1, int(batch.images_per_row.max()))  # transformers wants a slot even where there is no image


def _hf_image_mask(batch: Batch) -> Tensor:
    """[b,S,I]: which images a token sees."""
    return torch.nn.functional.one_hot(batch.image_index + 1, _hf_slots(batch) + 1)[..., 1:].bool()


def _hf_pixels(batch: Batch) -> Tensor:
    """[b,I,3,H,W]: the images of each row, and zeros."""
    pixels = torch.zeros(len(batch.images_per_row), _hf_slots(batch), *batch.pixels.shape[1:])
    counts = batch.images_per_row.tolist()
    for row, images in enumerate(batch.pixels.split(counts)):
        pixels[row, : counts[row]] = images
    return pixels


# This project -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What every process of our model needs."""

    checkpoint: Path
    config: Config
    batch: Batch
    open_gates: tuple[str, ...]


def run_config(
    model: ModelConfig, batch: Batch, *, tensor: int, pipeline: int, virtual: int, sequence: bool, precision: str
) -> Config:
    """The configuration of a run of this batch at a layout.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    rows, tokens = batch.input_ids.shape
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, sequence=sequence)
    config = Config(model=model, parallel=parallel)
    config.data.sequence_length = tokens
    config.training.precision = precision
    config.training.micro_batch_size = rows
    config.training.global_batch_size = rows * (pipeline if virtual > 1 else 1)  # as the interleaved schedule needs it
    ParallelLayout.from_config(config, tensor * pipeline)
    return config


def our_logits(job: Job) -> Tensor:
    """[b,S,C] fp32 of this project's model, computed in a process per rank.

    Raises:
        CheckpointError: a process failed.
    """
    world_size = job.config.parallel.tensor * job.config.parallel.pipeline
    try:
        results = spawn(_rank_logits, world_size, job)
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        raise CheckpointError(f"{job.checkpoint} could not be run at this layout: {error}") from None
    return next(logits for logits in results if logits is not None)


@torch.no_grad()
def _rank_logits(rank: int, job: Job) -> Tensor | None:
    # megatron-core is needed here only: wrong use is answered without it.
    from megatron_atum.checkpoint.weights import fill, rows_of
    from megatron_atum.parallel.groups import build_groups, start_distributed, stop_distributed
    from megatron_atum.training.engine import Engine

    hide_accelerators()
    world_size = job.config.parallel.tensor * job.config.parallel.pipeline
    start_distributed()
    groups = build_groups(ParallelLayout.from_config(job.config, world_size))
    engine = Engine(job.config, groups)
    fill(engine.stages, job.config.model, groups, StoredCheckpoint(job.checkpoint))
    for row, parameter in rows_of(engine.stages, job.config.model):
        if row.hf[0].endswith(job.open_gates):
            parameter.fill_(OPEN_GATE)
    images = image_slice(job.batch.num_images, groups.tensor_rank, groups.layout.tensor)
    batch = replace(job.batch, pixels=job.batch.pixels[images if groups.is_first_stage else slice(0)])
    microbatches = job.config.training.global_batch_size // job.config.training.micro_batch_size
    logits = engine.logits([batch] * microbatches)
    stop_distributed()
    return logits[0].float().clone() if groups.is_last_stage and groups.tensor_rank == 0 else None


# The comparison -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowReport:
    images: int
    largest: float  # absolute difference
    mean: float
    agreement: float  # share of tokens whose most likely next word is the same
    samples: tuple[tuple[int, int, float, float], ...]  # token, word, logit of Hugging Face, logit of this project


@dataclass(frozen=True)
class LogitReport:
    rows: tuple[RowReport, ...]
    scale: float  # largest logit of Hugging Face

    @property
    def largest(self) -> float:
        return float(torch.tensor([row.largest for row in self.rows]).max())  # NaN if any is

    def within(self, tolerance: float) -> bool:
        return self.largest <= tolerance * self.scale  # false where either is NaN


def compare_logits(theirs: Tensor, ours: Tensor, batch: Batch) -> LogitReport:
    rows = zip(theirs, ours, batch.images_per_row.tolist(), strict=True)
    return LogitReport(tuple(_row_report(*row) for row in rows), float(theirs.abs().max()))


def _row_report(theirs_SC: Tensor, ours_SC: Tensor, images: int) -> RowReport:
    difference_SC = (theirs_SC - ours_SC).abs()
    same_S = theirs_SC.argmax(-1) == ours_SC.argmax(-1)
    samples = tuple(_samples(theirs_SC, ours_SC))
    largest, mean = float(difference_SC.max()), float(difference_SC.mean())
    return RowReport(images, largest, mean, float(same_S.float().mean()), samples)


def _samples(theirs_SC: Tensor, ours_SC: Tensor) -> Iterator[tuple[int, int, float, float]]:
    """The most likely word after the first token, the middle one and the last."""
    for token in (0, len(theirs_SC) // 2, len(theirs_SC) - 1):
        word = int(theirs_SC[token].argmax())
        yield token, word, float(theirs_SC[token, word]), float(ours_SC[token, word])
