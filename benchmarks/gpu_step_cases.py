"""What gpu_step.py measures: one run for each row of its tables, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_atum.config.schema import Config
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.measured import recipe_of

OURS, FP8 = "this project", "this project, frozen_gemm=fp8"
HF, HF_SAVING = "Hugging Face", "Hugging Face, gradient checkpointing"
SHARD, SHARD_FP8 = "80B shard", "80B shard, frozen_gemm=fp8"
SHARDS = (SHARD, SHARD_FP8)

TOKENS = (8192, 4096)  # of a microbatch; the second for cards of 80 GB
RAGGED = {4: (2, 5, 10, 27), 2: (4, 18)}  # images of each row, 11 on average, by rows
SHARD_MICROBATCHES = 12  # of a step of a shard; the time of one is taken from steps of so many and of SHARD_FEW
SHARD_FEW = 4


@dataclass(frozen=True)
class Case:
    length: int
    images: tuple[int, ...]  # of each row of a microbatch

    @property
    def rows(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        counts = set(self.images)
        return str(self.images[0]) if len(counts) == 1 else ", ".join(map(str, self.images))


@dataclass(frozen=True)
class Shard:
    """One rank of a model whose other ranks do not exist."""

    stage: int
    tensor: int
    pipeline: int = 4
    data: int = 16

    @property
    def rank(self) -> int:
        """The first of its stage."""
        return self.stage * self.tensor * self.data

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"stage {self.stage + 1} of {self.pipeline}, TP{self.tensor}"


@dataclass(frozen=True)
class Run:
    name: str
    who: str
    preset: str
    case: Case
    shard: Shard | None = None
    profiled: bool = False

    @property
    def side(self) -> tuple[str, Shard | None]:
        """Runs of one side share a model: whose it is, and which part of it."""
        return (HF if self.who == HF_SAVING else self.who), self.shard

    @property
    def sizes(self) -> tuple[str, int, int]:
        """What the kernels that are generated for it depend on, images aside."""
        return self.preset, self.case.length, self.shard.tensor if self.shard else 1

    @property
    def frozen_gemm(self) -> str:
        return "fp8" if self.who in (FP8, SHARD_FP8) else "bf16"

    def config(self) -> Config:
        """Raises: ConfigError."""
        overrides = [f"kernels.frozen_gemm={self.frozen_gemm}"]
        if self.shard:
            rows = self.case.rows * self.shard.data * SHARD_MICROBATCHES
            overrides += [f"parallel.tensor={self.shard.tensor}", f"parallel.pipeline={self.shard.pipeline}"]
            overrides += [f"training.global_batch_size={rows}", "optimizer.overlap_param_gather=true"]
        return recipe_of(self.preset, self.case.length, self.case.rows, *overrides)

    def layout(self) -> ParallelLayout:
        return ParallelLayout.from_config(self.config(), self.shard.world_size if self.shard else 1)


def full_plan(tokens: int = TOKENS[0]) -> tuple[Run, ...]:
    """Args: tokens: of a microbatch of the 9B model, one of `TOKENS`."""

    def run(kind: str, who: str, length: int, images: int | None, profiled: bool = False) -> Run:
        rows = tokens // length
        case = Case(length, RAGGED[rows] if images is None else (images,) * rows)
        name = f"{kind}-{length}-{'ragged' if images is None else images}"
        return Run(name, who, "atum-9b", case, profiled=profiled)

    def shard(kind: str, who: str, stage: int, tensor: int, rows: int, profiled: bool = False) -> Run:
        case = Case(1024, (11,) * rows)
        return Run(f"shard-{kind}", who, "atum-80b", case, Shard(stage, tensor, data=512 // (4 * tensor)), profiled)

    # What is most likely to fail comes last.
    return (
        run("ours", OURS, 2048, 11, profiled=True),
        *(run("ours", OURS, 2048, images) for images in (1, 38, None)),
        *(run("ours", OURS, 1024, images) for images in (1, 11, 38)),
        *(
            run(kind, who, 2048, images)
            for images in (11, None)
            for kind, who in (("hf", HF), ("hf-saving", HF_SAVING))
        ),
        shard("middle", SHARD, 1, 8, 4, profiled=True),
        shard("first", SHARD, 0, 8, 4),
        shard("last", SHARD, 3, 8, 4),
        shard("middle-tp4", SHARD, 1, 4, 2, profiled=True),  # the recipe's layout
        run("fp8", FP8, 2048, 11, profiled=True),
        *(run("fp8", FP8, 2048, images) for images in (1, 38, None)),
        run("fp8", FP8, 1024, 11),
        shard("middle-fp8", SHARD_FP8, 1, 8, 4),
    )


def quick_plan() -> tuple[Run, ...]:
    """A tiny model, for any device."""
    even, ragged = Case(64, (2, 2)), Case(64, (1, 3))
    return (
        Run("ours-64-2", OURS, "tiny", even, profiled=True),
        Run("ours-64-ragged", OURS, "tiny", ragged),
        Run("hf-64-2", HF, "tiny", even),
        Run("hf-saving-64-ragged", HF_SAVING, "tiny", ragged),
        Run("shard-middle", SHARD, "tiny", even, Shard(1, 2, data=2), profiled=True),
        Run("shard-first", SHARD, "tiny", even, Shard(0, 2, data=2)),
        Run("shard-last", SHARD, "tiny", even, Shard(3, 2, data=2)),
        Run("fp8-64-2", FP8, "tiny", even),
    )


def sides(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that share a model, together."""
    ordered = sorted(runs, key=lambda run: [one.side for one in runs].index(run.side))
    return [list(group) for _, group in groupby(ordered, key=lambda run: run.side)]
