"""A training step of the real 9B model on one GPU, against Hugging Face's and against the card's own matrix products.

Weights are random, everything else is the pretraining recipe: LLaMA, CLIP and head frozen, cross-attention, perceiver
and added words train, bf16 weights with fp32 main parameters and gradients, clipping, AdamW. A step is two microbatches
of full rows in which images begin at random places. Hugging Face's `IdeficsForVisionText2Text` runs in bf16 with scaled
dot product attention, torch's fused AdamW on bf16 weights, and ready-made tensors; it pads every row to the images of
the fullest. Model FLOPs are those of megatron_atum/flops.py, without recomputation and padded images.

    python benchmarks/gpu_step.py            # on CUDA: table, profile, benchmarks/results/gpu_step.json
    python benchmarks/gpu_step.py --quick    # a tiny model on any device; writes nothing

The ceiling is the rate of one large bf16 product (8192 tokens by the first matrix of the MLP) on random data in the
same run. The predicted memory is that of a dry run (megatron_atum/planning) of the same case.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import megatron.core
import torch
import transformers
from torch import Tensor, nn

from benchmarks.step import Shape, hf_inputs, make_batch
from megatron_atum.batch import Batch
from megatron_atum.checkpoint.hf_config import to_hf
from megatron_atum.config.schema import Config
from megatron_atum.flops import Work, model_flops
from megatron_atum.parallel.device import (
    device,
    device_name,
    has_accelerator,
    hide_accelerators,
    memory_gib,
    peak_flops,
    profiler_activities,
    reset_peak_memory,
    wait_for_device,
)
from megatron_atum.parallel.groups import build_groups, start_distributed, stop_distributed
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.parallel.spawn import spawn
from megatron_atum.parallel.stopwatch import Stopwatch
from megatron_atum.planning.cluster import load_cluster
from megatron_atum.planning.dry_run import dry_run
from megatron_atum.planning.measured import MICROBATCHES, recipe_of
from megatron_atum.training.engine import Engine

RESULTS = Path(__file__).with_name("results") / "gpu_step.json"
OURS, HF, HF_SAVING = "this project", "Hugging Face", "Hugging Face, gradient checkpointing"


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


CASES = (
    Case(2048, (11,) * 4),
    Case(2048, (1,) * 4),
    Case(2048, (38,) * 4),
    Case(2048, (2, 5, 10, 27)),  # 11 on average
    Case(1024, (1,) * 8),
    Case(1024, (11,) * 8),
    Case(1024, (38,) * 8),
)
AGAINST_HF = ((CASES[0], False), (CASES[0], True), (CASES[3], False))
TINY = (Case(64, (2, 2)), Case(64, (1, 3)))


@dataclass(frozen=True)
class Row:
    who: str
    length: int
    images: str  # of a row, or of each
    rows: int  # of a microbatch
    step_s: float
    tokens_per_s: float
    model_tflops: float
    of_peak: float | None
    of_ceiling: float | None
    peak_gib: float
    predicted_gib: float | None = None
    vision_share: float | None = None


def random_batch(config: Config, case: Case) -> Batch:
    return make_batch(Shape(to_hf(config.model), case.length), case.images)


def fill(module: nn.Module) -> None:
    """Random matrices; vectors (norms, gates, biases) are 1."""
    generator = torch.Generator(device=device()).manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() < 2:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02, generator=generator)


# The two sides --------------------------------------------------------------------------------------------------------


class Ours:
    def __init__(self, case: Case, preset: str) -> None:
        self.config = recipe_of(preset, case.length, case.rows)
        self.groups = build_groups(ParallelLayout.from_config(self.config, 1))
        self.engine = Engine(self.config, self.groups)
        for stage in self.engine.stages:
            fill(stage)
        self.engine.build_optimizer()
        self.batches = [random_batch(self.config, case)] * MICROBATCHES
        self.vision = Stopwatch()
        self._watch(self.engine.stages[0].vision)

    def step(self) -> float:
        return self.engine.step(self.batches).losses["loss"]

    def _watch(self, vision: nn.Module) -> None:
        encode = vision.encode_shared

        def watched(*arguments: Any) -> Tensor:
            with self.vision.running():
                return encode(*arguments)

        vision.encode_shared = watched


class HuggingFace:
    def __init__(self, case: Case, preset: str, *, checkpointing: bool) -> None:
        self.config = recipe_of(preset, case.length, case.rows)
        hf = transformers.IdeficsConfig(**to_hf(self.config.model))
        hf._attn_implementation = "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if has_accelerator() else torch.float32)
        with device():
            self.model = transformers.IdeficsForVisionText2Text(hf).train()
        torch.set_default_dtype(before)
        fill(self.model)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        o = self.config.optimizer
        self.optimizer = torch.optim.AdamW(self.trained, o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay, fused=True)
        batch = random_batch(self.config, case)
        self.inputs = {name: tensor.to(device()) for name, tensor in hf_inputs(batch).items()}
        self.labels = batch.labels.to(device())

    def step(self) -> float:
        self.optimizer.zero_grad()
        total = torch.zeros((), device=device())
        for _ in range(MICROBATCHES):
            logits = self.model(**self.inputs, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), self.labels.flatten())
            (loss / MICROBATCHES).backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.clip_grad)
        self.optimizer.step()
        return float(total) / MICROBATCHES


# Measuring ------------------------------------------------------------------------------------------------------------


def timed(step: Callable[[], Any]) -> float:
    wait_for_device()
    start = time.perf_counter()
    step()
    wait_for_device()
    return time.perf_counter() - start


def measure(who: str, side: Ours | HuggingFace, case: Case, steps: int, ceiling: float | None) -> Row:
    for _ in range(2):
        side.step()
    reset_peak_memory()
    seconds = statistics.median(timed(side.step) for _ in range(steps))
    work = Work(case.rows * MICROBATCHES, case.length, sum(case.images) * MICROBATCHES)
    rate = model_flops(side.config.model, work).total / seconds
    peak = peak_flops(torch.bfloat16)
    return Row(
        who=who,
        length=case.length,
        images=str(case),
        rows=case.rows,
        step_s=seconds,
        tokens_per_s=work.tokens / seconds,
        model_tflops=rate / 1e12,
        of_peak=rate / peak if peak else None,
        of_ceiling=rate / ceiling if ceiling else None,
        peak_gib=memory_gib(),
    )


def measure_ceiling() -> float | None:
    """FLOP/s of one large bf16 product, the median of ten times twenty."""
    if not has_accelerator():
        return None
    rows, inner, outer = 8192, 4096, 22016
    a = torch.randn(rows, inner, device=device(), dtype=torch.bfloat16)
    b = torch.randn(outer, inner, device=device(), dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(20):
            a @ b.t()

    products()
    return 20 * 2 * rows * inner * outer / statistics.median(timed(products) for _ in range(10))


def predicted_gib(rank: int, cases: tuple[Case, ...], preset: str) -> list[float]:
    """Of our side, without a device. In a process of its own."""
    hide_accelerators()
    one = replace(load_cluster("laptop"), nodes=1, devices_per_node=1)
    found = []
    for case in cases:
        config = recipe_of(preset, case.length, case.rows)
        config.training.precision = "bf16"
        found.append(dry_run(config, one, 0, list(case.images)).memory.total / 2**30)
    return found


def profile(step: Callable[[], Any]) -> tuple[str, float]:
    """The operations that take longest, and the share of matrix products in all time of the device."""
    with torch.profiler.profile(activities=profiler_activities()) as profiler:
        step()
        wait_for_device()
    by = "self_device_time_total" if has_accelerator() else "self_cpu_time_total"
    averages = profiler.key_averages()
    times = {one.key: getattr(one, by) for one in averages if one.key.startswith("aten::") or not has_accelerator()}
    every = sum(getattr(one, by) for one in averages if not (has_accelerator() and one.key.startswith("aten::")))
    products = sum(times.get(f"aten::{name}", 0.0) for name in ("mm", "addmm", "bmm", "baddbmm"))
    return averages.table(sort_by=by, row_limit=45, max_name_column_width=90), products / every


def waits(step: Callable[[], Any]) -> list[str]:
    """Where the host waits for the device in a step, and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = Counter(
        f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}"
        for one in caught
        if "called a synch" in str(one.message)
    )
    return [f"{place} ({number})" for place, number in found.items()]


def our_row(case: Case, preset: str, steps: int, ceiling: float | None) -> tuple[Row, Ours]:
    ours = Ours(case, preset)
    row = measure(OURS, ours, case, steps, ceiling)
    ours.vision.take()
    seconds = timed(ours.step)
    return replace(row, vision_share=ours.vision.take() / seconds), ours


def their_row(case: Case, preset: str, steps: int, ceiling: float | None, checkpointing: bool) -> Row | None:
    """None where it does not fit."""
    who = HF_SAVING if checkpointing else HF
    try:
        return measure(who, HuggingFace(case, preset, checkpointing=checkpointing), case, steps, ceiling)
    except torch.OutOfMemoryError as error:
        print(f"{who}, {case} images: {error}", file=sys.stderr)
        return None


def release() -> None:
    gc.collect()
    if has_accelerator():
        torch.cuda.empty_cache()


# Report ---------------------------------------------------------------------------------------------------------------

HEADER = f"{'':37}{'length':>6}{'images':>14}{'rows':>5}{'step s':>8}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>8}"
HEADER += f"{'ceiling':>8}{'GiB':>7}{'dry run':>8}{'vision':>8}"


def show(row: Row) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    predicted = "-" if row.predicted_gib is None else f"{row.predicted_gib:.1f}"
    print(
        f"{row.who:37}{row.length:6}{row.images:>14}{row.rows:5}{row.step_s:8.3f}{row.tokens_per_s:10.0f}"
        f"{row.model_tflops:9.1f}{share(row.of_peak):>8}{share(row.of_ceiling):>8}{row.peak_gib:7.1f}{predicted:>8}"
        f"{share(row.vision_share):>8}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, two cases, nothing written")
    parser.add_argument("--steps", type=int, default=5, help="steps of each case, of which the median counts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not has_accelerator() and not arguments.quick:
        print("gpu_step.py needs a CUDA device; --quick runs a tiny model anywhere", file=sys.stderr)
        return 2
    preset, cases = ("tiny", TINY) if arguments.quick else ("atum-9b", CASES)
    (predicted,) = spawn(predicted_gib, 1, cases, preset)
    start_distributed()
    ceiling = measure_ceiling()
    print(
        f"{device_name()}, torch {torch.__version__}" + (f", ceiling {ceiling / 1e12:.0f} TFLOP/s" if ceiling else "")
    )
    print(HEADER)
    rows: list[Row] = []
    for case, gib in zip(cases, predicted, strict=True):
        row, ours = our_row(case, preset, arguments.steps, ceiling)
        rows.append(replace(row, predicted_gib=gib))
        show(rows[-1])
        if case is cases[0]:
            table, products = profile(ours.step)
            places = waits(ours.step) if has_accelerator() else []
        del ours
        release()
    for case, checkpointing in ((cases[0], True),) if arguments.quick else AGAINST_HF:
        theirs = their_row(case, preset, arguments.steps, ceiling, checkpointing)
        release()
        if theirs is not None:
            rows.append(theirs)
            show(theirs)
    stop_distributed()
    print(f"the host waits for the device at: {', '.join(places) or 'nothing'}\n{table}")
    result = report(rows, ceiling, arguments.steps, products, places)
    if not arguments.quick:
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def report(rows: list[Row], ceiling: float | None, steps: int, products: float, places: list[str]) -> dict[str, Any]:
    ours = {(row.length, row.images): row for row in rows if row.who == OURS}
    theirs: dict[tuple[int, str], float] = {}
    for row in rows:
        if row.who != OURS:
            key = (row.length, row.images)
            theirs[key] = max(row.tokens_per_s, theirs.get(key, 0.0))
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": device_name(),
        "versions": {
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
            "transformers": transformers.__version__,
        },
        "command": " ".join(["python benchmarks/gpu_step.py", *sys.argv[1:]]),
        "steps": steps,
        "ceiling_tflops": None if ceiling is None else ceiling / 1e12,
        "over_best_hf": {
            f"{length} tokens, {images} images": ours[length, images].tokens_per_s / best
            for (length, images), best in theirs.items()
        },
        "share_of_products": products,
        "host_waits": places,
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
