"""ATUM-9B on one GPU against Hugging Face's implementation, against the card's own matrix products, and single ranks
of ATUM-80B.

The 9B model at its real size with random weights, in the pretraining recipe (LLaMA, CLIP and head frozen), bf16. Our
side is the engine of training: fp32 main weights and gradients, clipping, AdamW. A step is two microbatches of full
rows in which images begin at random places; `fp8` runs have kernels.frozen_gemm=fp8. Hugging Face's
`IdeficsForVisionText2Text` runs in bf16 with scaled dot product attention, torch's fused AdamW on bf16 weights, and
ready-made tensors; it pads every row to the images of the fullest. Model FLOPs are those of megatron_atum/flops.py,
without recomputation and padded images.

A shard is one rank of ATUM-80B in 512, in megatron-core's schedule of its stage, with real kernels; its other ranks do
not exist (megatron_atum/parallel/fake.py), so nothing is waited for and what tensor ranks exchange is left out. Its
rate is that of a microbatch, by the FLOPs of its stage: the time by which a step of 12 is longer than one of 4.

    python benchmarks/gpu_step.py               # on CUDA: tables, profiles, benchmarks/results/gpu_step.json
    python benchmarks/gpu_step.py --only NAME,NAME    # these rows (--list has the names); the others of the file stay
    python benchmarks/gpu_step.py --quick       # tiny models on any device; writes nothing unless --out is given
    python benchmarks/gpu_step.py --docs        # draws the tables of docs/performance.md from that file

The file is written after every row; a run that fails has a row that says why, and the exit code is 1. `--only` adds to
a file of the same GPU, code and versions only; ratios are of rows that one process measured. `--tokens 4096` halves the
rows of a microbatch, for cards of 80 GB.

The ceiling is the rate of one large bf16 product (8192 tokens by the first matrix of the MLP) on random data in the
same process. The predicted memory is that of a dry run (megatron_atum/planning) of the same case; dry runs take place
beside the first warm-up, in processes of their own, before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import megatron.core
import torch
import transformers

from benchmarks.gpu_step_cases import HF, HF_SAVING, SHARD_FEW, SHARD_MICROBATCHES, TOKENS, Run, full_plan, quick_plan
from benchmarks.gpu_step_cases import sides as by_side
from benchmarks.gpu_step_docs import redraw
from benchmarks.gpu_step_measure import Profile, Wait, measure_ceiling, median_of, profile, release, timed, waits
from benchmarks.gpu_step_predict import Predictions, cluster_like, planned_microbatch_s, stage_flops
from benchmarks.gpu_step_results import (
    RESULTS,
    About,
    Results,
    Row,
    Target,
    code_version,
    differences,
    empty_row,
    failed,
    targets,
)
from benchmarks.gpu_step_sides import LoneShard, Side, opened
from megatron_atum.flops import Work, model_flops
from megatron_atum.parallel.device import device_name, has_accelerator, memory_gib, peak_flops, reset_peak_memory
from megatron_atum.planning.measured import MICROBATCHES
from megatron_atum.training.self_check import git_state


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    steps: int  # of which the median counts
    ceiling: float | None  # FLOP/s
    predictions: Predictions


class Kernels:
    """A training run has one length, for which its kernels are generated; so has each run here."""

    def __init__(self) -> None:
        self._sizes: object = None

    def begin(self, run: Run) -> None:
        if run.sizes != self._sizes:
            torch._dynamo.reset()
        self._sizes = run.sizes


def measure_all(runs: Sequence[Run], bench: Bench, results: Results) -> None:
    kernels = Kernels()
    for group in by_side(runs):
        measure_side(group, bench, results, kernels)


def measure_side(runs: Sequence[Run], bench: Bench, results: Results, kernels: Kernels) -> None:
    """Runs that share a model. One that fails takes the model along, not the others."""
    waiting = list(runs)
    while waiting:
        try:
            measure_waiting(waiting, bench, results, kernels)
        except Exception as error:
            traceback.print_exc()
            run = waiting.pop(0)
            results.add(failed(run, error))
            show(results.rows[run.name])
        release()  # the model is no variable here


def measure_waiting(waiting: list[Run], bench: Bench, results: Results, kernels: Kernels) -> None:
    """Takes away what is done."""
    with opened(waiting[0]) as side:
        while waiting:
            kernels.begin(waiting[0])
            results.add(*measure(side, waiting[0], bench))
            show(results.rows[waiting.pop(0).name])


def measure(side: Side, run: Run, bench: Bench) -> tuple[Row, Profile | None, list[Wait] | None]:
    side.use(run)
    for _ in range(2):
        side.step()
    bench.predictions.wait()
    reset_peak_memory()
    seconds = median_of(bench.steps, side.step)
    row = replace(empty_row(run), step_s=seconds, peak_gib=memory_gib() if has_accelerator() else None)
    if isinstance(side, LoneShard):
        row = with_rate(row, shard_flops(run), microbatch_s(side, seconds, bench.steps), bench.ceiling)
    else:
        work = Work(run.case.rows * MICROBATCHES, run.case.length, sum(run.case.images) * MICROBATCHES)
        row = with_rate(row, model_flops(side.config.model, work).total, seconds, bench.ceiling)
        row = replace(row, tokens_per_s=work.tokens / seconds, vision_share=vision_share(side))
    row = with_planned(row, run)
    if run.who in (HF, HF_SAVING):
        return row, None, None
    prediction, why_not = bench.predictions.of(run)
    row = replace(row, predicted_gib=prediction.gib if prediction else None, error=why_not)
    if not run.profiled:
        return row, None, None
    found, places = profiled(side)
    if prediction:
        share = SHARD_FEW / SHARD_MICROBATCHES if run.shard else 1.0  # of the step that is predicted
        row = with_products(row, prediction.product_flops * share / found.product_seconds)
    return row, found, places


def microbatch_s(side: LoneShard, step_s: float, steps: int) -> float:
    side.short_step()
    return (step_s - median_of(steps, side.short_step)) / (SHARD_MICROBATCHES - SHARD_FEW)


def shard_flops(run: Run) -> float:
    assert run.shard is not None
    return stage_flops(run.config(), run.layout(), run.shard.stage, sum(run.case.images))


def with_rate(row: Row, flops: float, seconds: float, ceiling: float | None) -> Row:
    """Args: flops, seconds: of the step, or of a shard's microbatch."""
    rate, peak = flops / seconds, peak_flops(torch.bfloat16)
    return replace(
        row,
        microbatch_s=seconds if seconds != row.step_s else None,
        model_tflops=rate / 1e12,
        of_peak=rate / peak if peak else None,
        of_ceiling=rate / ceiling if ceiling else None,
        ceiling_tflops=ceiling / 1e12 if ceiling else None,
    )


def vision_share(side: Side) -> float | None:
    if side.vision is None:
        return None
    side.vision.take()
    seconds = timed(side.step)
    return side.vision.take() / seconds


def with_planned(row: Row, run: Run) -> Row:
    """What the planner assumes of this device. For bf16 only: it knows no other products."""
    cluster = cluster_like(device_name())
    if cluster is None or run.frozen_gemm != "bf16":
        return row
    planned = planned_microbatch_s(run, run.shard, cluster) if run.shard else None
    assumed = cluster.device.gemm_efficiency if run.profiled else None
    return replace(row, planned_microbatch_s=planned, assumed_of_peak=assumed)


def with_products(row: Row, rate: float) -> Row:
    """Args: rate: FLOP/s of matrix products while they run."""
    peak = peak_flops(torch.bfloat16)
    return replace(row, products_tflops=rate / 1e12, products_of_peak=rate / peak if peak else None)


def profiled(side: Side) -> tuple[Profile, list[Wait]]:
    step = side.short_step if isinstance(side, LoneShard) else side.step
    places = waits(step)
    found = profile(step)
    print(found.table)
    print(f"the host waits at: {', '.join(map(str, places)) or 'nothing'}")
    return found, places


# Report ---------------------------------------------------------------------------------------------------------------

HEADER = f"{'':24}{'length':>6}{'images':>14}{'rows':>5}{'step s':>8}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>7}"
HEADER += f"{'ceiling':>8}{'GiB':>7}{'dry run':>8}{'vision':>7}{'products':>9}{'assumed':>8}{'planned':>8}"


def show(row: Row) -> None:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    planned = row.microbatch_s / row.planned_microbatch_s if row.microbatch_s and row.planned_microbatch_s else None
    print(
        f"{row.name:24}{row.length:6}{row.images:>14}{row.rows:5}{number(row.step_s, '.3f'):>8}"
        f"{number(row.tokens_per_s, '.0f'):>10}{number(row.model_tflops, '.1f'):>9}{number(row.of_peak, '.1%'):>7}"
        f"{number(row.of_ceiling, '.1%'):>8}{number(row.peak_gib, '.1f'):>7}{number(row.predicted_gib, '.1f'):>8}"
        f"{number(row.vision_share, '.1%'):>7}{number(row.products_of_peak, '.1%'):>9}"
        f"{number(row.assumed_of_peak, '.1%'):>8}{number(planned, '.2f'):>8}"
        f"{'  ' + row.error if row.error else ''}",
        flush=True,
    )


def show_target(target: Target) -> None:
    verdict = {None: "not measured", True: "met", False: "missed"}[target.met]
    print(f"{'stretch' if target.stretch else 'target':8}{target.what}: {target.wanted}; {target.found}: {verdict}")


def main() -> int:
    arguments = parse()
    if arguments.docs:
        redraw(json.loads(arguments.out.read_text()))
        return 0
    runs = quick_plan() if arguments.quick else full_plan(arguments.tokens)
    if arguments.list:
        print("\n".join(run.name for run in runs))
        return 0
    names = arguments.only.split(",") if arguments.only else [run.name for run in runs]
    if unknown := sorted(set(names) - {run.name for run in runs}):
        print(f"--only: there is no {', '.join(unknown)}; --list has the names", file=sys.stderr)
        return 2
    if not has_accelerator() and not arguments.quick:
        print("gpu_step.py needs a CUDA device; --quick runs tiny models anywhere", file=sys.stderr)
        return 2
    about = about_this(arguments)
    earlier = earlier_file(arguments, about)
    if isinstance(earlier, str):
        print(earlier, file=sys.stderr)
        return 2
    results = Results(about, arguments.out, earlier)
    measure_these([run for run in runs if run.name in names], arguments, results)
    content = results.content()
    print(f"\n{HEADER}")
    for row in results.rows.values():
        show(row)
    for target in targets(content):
        show_target(target)
    print(json.dumps(content))
    return int(any(row.error for row in results.rows.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, nothing written")
    parser.add_argument("--steps", type=int, default=5, help="steps of each run, of which the median counts")
    parser.add_argument("--only", help="names of rows to measure, with commas between them")
    parser.add_argument("--list", action="store_true", help="the names of all rows")
    parser.add_argument("--tokens", type=int, choices=TOKENS, default=TOKENS[0], help="of a microbatch of the 9B model")
    parser.add_argument("--out", type=Path, help=f"file of the results (default {RESULTS.name} beside the others)")
    parser.add_argument("--docs", action="store_true", help="only draw the tables of docs/performance.md")
    arguments = parser.parse_args()
    if arguments.out is None and not arguments.quick:
        arguments.out = RESULTS
    return arguments


def about_this(arguments: argparse.Namespace) -> About:
    peak = peak_flops(torch.bfloat16)
    return About(
        gpu=device_name(),
        versions={
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
            "transformers": transformers.__version__,
        },
        code=code_version(),
        tokens_of_microbatch=arguments.tokens,
        steps=arguments.steps,
        commit=git_state(),
        command=" ".join(["python benchmarks/gpu_step.py", *sys.argv[1:]]),
        peak_tflops=peak / 1e12 if peak else None,
    )


def earlier_file(arguments: argparse.Namespace, about: About) -> dict | str | None:
    """What --only adds to; a text if it cannot."""
    if not arguments.only or arguments.out is None or not arguments.out.exists():
        return None
    content = json.loads(arguments.out.read_text())
    if different := differences(about, content):
        return f"--only cannot add to {arguments.out}: {'; '.join(different)}; --out FILE begins another file"
    return content


def measure_these(runs: Sequence[Run], arguments: argparse.Namespace, results: Results) -> None:
    predictions = Predictions(runs, 1 if arguments.quick else max(1, (os.cpu_count() or 1) // 2))
    try:
        ceiling = measure_ceiling()
        print(f"{device_name()}, torch {torch.__version__}, ceiling {ceiling / 1e12 if ceiling else 0:.0f} TFLOP/s")
        print(HEADER)
        measure_all(runs, Bench(arguments.steps, ceiling, predictions), results)
    finally:
        predictions.close()


if __name__ == "__main__":
    sys.exit(main())
