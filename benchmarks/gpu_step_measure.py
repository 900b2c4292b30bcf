"""How gpu_step.py measures: times, the ceiling, profiles, and where the host waits for the device."""

from __future__ import annotations

import ast
import gc
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import DeviceType

from megatron_atum.parallel.device import device, has_accelerator, profiler_activities, wait_for_device

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_scaled_mm_v2")
# Where a step decides something, file and function: counts of tokens before it, norm and losses after it.
KNOWN_WAITS = {
    ("training/loss.py", "loss_settings"),
    ("optimizer/clip_grads.py", "get_grad_norm_fp32"),
    ("training/engine.py", "_exchange"),
}
TOP = 25  # kernels of a profile that are kept
STREAM, DEVICE, EVENT = "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"
WAITING = (STREAM, DEVICE, EVENT)  # as CUDA's runtime calls them


def timed(step: Callable[[], Any]) -> float:
    wait_for_device()
    start = time.perf_counter()
    step()
    wait_for_device()
    return time.perf_counter() - start


def median_of(steps: int, step: Callable[[], Any]) -> float:
    return statistics.median(timed(step) for _ in range(steps))


def release() -> None:
    """Memory of what is gone."""
    gc.collect()
    if has_accelerator():
        torch.cuda.empty_cache()


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
    return 20 * 2 * rows * inner * outer / median_of(10, products)


# Profile --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Of one step. Times are the device's; on a CPU those of operations."""

    seconds: float  # of all kernels
    product_seconds: float  # of matrix products without attention
    top: list[dict[str, Any]]  # name, calls, ms
    waiting: dict[str, int]  # calls of CUDA's runtime that wait; the end of the profile adds some to the device's
    table: str


def profile(step: Callable[[], Any]) -> Profile:
    with torch.profiler.profile(activities=profiler_activities()) as profiler:
        step()
        wait_for_device()
    averages = profiler.key_averages()
    time_of = _device_time if has_accelerator() else _cpu_time
    operations = {one.key: time_of(one) for one in averages if one.device_type == DeviceType.CPU}
    kernels = [one for one in averages if _is_kernel(one)] if has_accelerator() else list(averages)
    kernels.sort(key=time_of, reverse=True)
    by = "self_device_time_total" if has_accelerator() else "self_cpu_time_total"
    return Profile(
        seconds=sum(map(time_of, kernels)) / 1e6,
        product_seconds=sum(operations.get(f"aten::{name}", 0.0) for name in PRODUCTS) / 1e6,
        top=[{"name": one.key[:100], "calls": one.count, "ms": time_of(one) / 1e3} for one in kernels[:TOP]],
        waiting={one.key: one.count for one in averages if one.key in WAITING},
        table=averages.table(sort_by=by, row_limit=TOP, max_name_column_width=90),
    )


def _device_time(one: FunctionEventAvg) -> float:
    return float(one.self_device_time_total)


def _cpu_time(one: FunctionEventAvg) -> float:
    return float(one.self_cpu_time_total)


def _is_kernel(one: FunctionEventAvg) -> bool:
    """Else it is an operation, or a range that someone named, whose time is that of the kernels in it."""
    return one.device_type == DeviceType.CUDA and not getattr(one, "is_user_annotation", False)


# Waiting --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the device in a step."""

    file: str  # the end of its path
    line: int
    function: str
    times: int
    known: bool
    call: str = STREAM  # of CUDA's runtime


def waits(step: Callable[[], Any]) -> list[Wait]:
    """Of a step, as torch sees them; and calls of torch.cuda.synchronize, which it does not."""
    if not has_accelerator():
        return []
    calls: Counter[tuple[str, int, str]] = Counter()
    synchronize = torch.cuda.synchronize

    def counted(*arguments: Any) -> None:
        caller = traceback.extract_stack(limit=2)[0]
        calls[caller.filename, caller.lineno or 0, DEVICE] += 1
        synchronize(*arguments)

    torch.cuda.synchronize = counted
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize = synchronize
    calls.update((one.filename, one.lineno, STREAM) for one in caught if "called a synch" in str(one.message))
    return [wait_at(file, line, times, call) for (file, line, call), times in calls.items()]


def wait_at(file: str, line: int, times: int, call: str = STREAM) -> Wait:
    function, short = function_at(Path(file), line), "/".join(Path(file).parts[-2:])
    return Wait(short, line, function, times, (short, function) in KNOWN_WAITS, call)


def function_at(file: Path, line: int) -> str:
    """Name of the innermost function there; empty outside of all."""
    if not file.is_file():
        return ""
    functions = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    return max(functions, key=lambda node: node.lineno).name if functions else ""
