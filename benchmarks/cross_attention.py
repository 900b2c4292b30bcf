"""Cross-attention of text over image latents: does its time grow with the number of images in a row?

Measures `megatron_atum.model.image_attention.attend`, forward and backward, of one row of 1024 tokens that holds 1 to
64 images, on both paths. Queries, keys and values are given, so no projection is in the times. The images' segments
are ragged: one long, the rest short and of varied lengths, the same in every run.

A token sees one image, so the products cost the same for every number of images. What remains is that the keys and
values of all images are read and their gradients written. The column `K/V ms` is the time of one such pass by itself:
K and V read twice, and as much written once. The columns `passes` say how many of these passes the growth since one
image amounts to (from 8 images on; before, it is smaller than the noise). On the segment path these are a few,
whatever the number of images: the time grows as K and V are read, and no product grows. On the dense path the
products grow with the images: hundreds of passes.

    python benchmarks/cross_attention.py            # table; one JSON object on the last line
    python benchmarks/cross_attention.py --quick    # fewer images and repeats

One thread on a CPU, fp32; bf16 where there is a CUDA device. Exit code 1 if the paths disagree.

Legend: S tokens, I images of the row, L latents per image, A heads, D head width, K images that are seen.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_atum.model.image_attention import AttentionPlan, attend, dense_plan, segment_plan, select_latents

TOKENS, LATENTS, HEADS, HEAD_WIDTH = 1024, 64, 8, 128
IMAGES = (1, 2, 4, 8, 16, 32, 64)
SHORT = (1, 16)  # tokens of a short segment, drawn uniformly
SEED = 7
AGREE = 1e-5  # largest difference allowed between the paths in fp32


@dataclass(frozen=True)
class Problem:
    """One row with its two plans. Keys and values are in the order of the row's images."""

    images: int
    lengths: tuple[int, ...]
    segments: AttentionPlan
    dense: AttentionPlan
    query_S1AD: Tensor
    key_ILAD: Tensor
    value_ILAD: Tensor
    upstream_S1AD: Tensor

    def inputs(self, plan: AttentionPlan) -> tuple[Tensor, Tensor, Tensor]:
        """Leaves for a path: query, and keys and values in the order in which it takes them."""
        key, value = (select_latents(x, plan) for x in (self.key_ILAD, self.value_ILAD))
        query, key, value = (x.detach().requires_grad_() for x in (self.query_S1AD, key, value))
        return query, key, value


def segment_lengths(images: int, generator: torch.Generator) -> tuple[int, ...]:
    """Tokens of each image's segment: all short except for one, which takes the rest and stands in the middle."""
    low, high = SHORT
    lengths = torch.randint(low, high + 1, (images - 1,), generator=generator).tolist()
    lengths.insert(images // 2, TOKENS - sum(lengths))
    return tuple(lengths)


def make_problem(images: int, device: torch.device, dtype: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(SEED)
    lengths = segment_lengths(images, generator)
    index_1S = torch.repeat_interleave(torch.arange(images), torch.tensor(lengths))[None]
    count_1 = torch.tensor([images])
    mask_1SI = F.one_hot(index_1S, images).bool()

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, HEADS, HEAD_WIDTH, generator=generator).to(device, dtype)

    return Problem(
        images,
        lengths,
        segment_plan(index_1S, count_1).to(device),
        dense_plan(mask_1SI, count_1).to(device),
        random(TOKENS, 1),
        random(images, LATENTS),
        random(images, LATENTS),
        random(TOKENS, 1),
    )


def step_of(problem: Problem, plan: AttentionPlan) -> Callable[[], Any]:
    """One forward and backward of a path. Which inputs it reads is settled here, outside of the measured time."""
    leaves = problem.inputs(plan)

    def step() -> tuple[Tensor, ...]:
        out = attend(*leaves, plan)
        return (out.detach(), *torch.autograd.grad(out, leaves, problem.upstream_S1AD))

    return step


def traffic_of(problem: Problem) -> Callable[[], Any]:
    """One pass over K and V, the least that any path does: read both forward and backward, write their gradients."""
    key, value = problem.key_ILAD, problem.value_ILAD

    def step() -> tuple[Tensor, ...]:
        return key.sum(), value.sum(), key.clone(), value.clone()

    return step


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def difference(problem: Problem) -> float:
    """Largest absolute difference between the paths, of the output and of the gradients of q, k and v."""
    dense = step_of(problem, problem.dense)()
    segments = step_of(problem, problem.segments)()
    # the segment path takes keys and values in an order of its own
    reordered = [*dense[:2], *(select_latents(gradient, problem.segments) for gradient in dense[2:])]
    return max(float((x - y).abs().max()) for x, y in zip(segments, reordered, strict=True))


def measure(images: tuple[int, ...], repeats: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Best times of all steps. They take turns, so that a disturbance hits all of them alike."""
    problems = [make_problem(n, device, dtype) for n in images]
    steps = {
        (problem.images, name): step
        for problem in problems
        for name, step in {
            "segment": step_of(problem, problem.segments),
            "dense": step_of(problem, problem.dense),
            "kv": traffic_of(problem),
        }.items()
    }
    times: dict[tuple[int, str], list[float]] = {key: [] for key in steps}
    for turn in range(repeats + 2):
        for key, step in steps.items():
            elapsed = seconds(step, device)
            if turn >= 2:  # the first two warm up
                times[key].append(1e3 * elapsed)
    return [
        _row(problem, {name: times[problem.images, name] for name in ("segment", "dense", "kv")})
        for problem in problems
    ]


def _row(problem: Problem, times: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "images": problem.images,
        "longest": max(problem.lengths),
        "lengths": len(set(problem.lengths)),
    }
    for name, values in times.items():
        row[f"{name}_ms"] = round(min(values), 3)
        row[f"{name}_median_ms"] = round(statistics.median(values), 3)
    return row


def passes(row: dict[str, Any], first: dict[str, Any], path: str) -> str:
    """Growth since one image, in passes over K and V."""
    return f"{(row[f'{path}_ms'] - first[f'{path}_ms']) / row['kv_ms']:.1f}" if row["images"] >= 8 else ""


def print_table(rows: list[dict[str, Any]]) -> None:
    print("images  longest  lengths  segment ms  dense ms  dense/segment  K/V ms  segment passes  dense passes")
    for row in rows:
        print(
            f"{row['images']:6}  {row['longest']:7}  {row['lengths']:7}  {row['segment_ms']:10.2f}  "
            f"{row['dense_ms']:8.2f}  {row['dense_ms'] / row['segment_ms']:13.2f}  {row['kv_ms']:6.2f}  "
            f"{passes(row, rows[0], 'segment'):>14}  {passes(row, rows[0], 'dense'):>12}"
        )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(rows: list[dict[str, Any]], largest_difference: float, device: torch.device) -> dict[str, Any]:
    """What the last line says. Times are the best of all repeats."""
    few, many = rows[0], rows[-1]
    return {
        "core_segment_64_over_1": round(many["segment_ms"] / few["segment_ms"], 3),
        "core_dense_over_segment_at_64": round(many["dense_ms"] / many["segment_ms"], 3),
        "max_abs_difference": largest_difference,
        "rows": rows,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="1 and 64 images only, few repeats")
    parser.add_argument("--repeats", type=int, help="measured repeats of everything (default 15, quick 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    images = (IMAGES[0], IMAGES[-1]) if arguments.quick else IMAGES
    rows = measure(images, arguments.repeats or (2 if arguments.quick else 15), device, dtype)
    largest_difference = difference(make_problem(images[-1], device, torch.float32))
    print(f"{TOKENS} tokens, {LATENTS} latents per image, {HEADS} heads x {HEAD_WIDTH}, forward + backward, {dtype}")
    print_table(rows)
    print(
        f"largest difference between the paths at {images[-1]} images, output and gradients: {largest_difference:.1e}"
    )
    print(json.dumps(report(rows, largest_difference, device)))
    if largest_difference > AGREE:
        print(f"the paths differ by more than {AGREE}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
