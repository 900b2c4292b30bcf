"""The plan in words and tables, and as one JSON object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_atum.config.schema import KernelsConfig
from megatron_atum.planning.atum import against, model_flops
from megatron_atum.planning.dry_run import DryRun
from megatron_atum.planning.plan import Planner, Row, most_gib
from megatron_atum.planning.published import ValidationRow
from megatron_atum.planning.rivals import Explained, Rival
from megatron_atum.planning.wording import number, span

CLOSE = 0.05  # of a step's time: about what the model is off by for published runs (planning/published.py)
_HEAD = (
    "layout", "rows", "step s", "tokens/s", "TFLOP/s", "MFU %", "idle %", "tensor %", "network s", "network GB",
    "node GB", "uneven %", "GiB", "GiB most", "",
)  # fmt: skip
LEGEND = (
    "per device: tokens/s, model TFLOP/s (frozen parts counted as what they cost, no recomputation), GiB at the mean "
    "number of images and with the most in every row. rows: of a microbatch. idle: share of forward and backward while "
    "the pipeline fills and drains. tensor: share of the step waiting for tensor ranks. network s: waiting for other "
    "nodes. network GB: out of the busiest node in a step. node GB: out of a device to others of its node. uneven: "
    "slowest stage over the mean. The other schemes recompute everything, save row by row. At least: waiting that "
    "their bytes do not explain is left out. state: memory that a step begins with; activations come on top."
)


def layout_table(rows: Sequence[Row], chosen: Row | None) -> str:
    cells = [_HEAD, *(_cells(row, row is chosen) for row in rows)]
    return _table(cells)


def _cells(row: Row, chosen: bool) -> tuple[str, ...]:
    p = row.prediction
    memory = (number(row.gib, 1), number(row.gib_most, 1)) if row.memory else ("", "")
    remarks = [*(["the configuration's"] if chosen else []), *row.refused]
    return (
        row.name,
        str(row.candidate.rows),
        number(p.step_s, 2),
        number(p.tokens_per_s_per_device, 0),
        number(p.model_tflops, 1),
        f"{100 * p.mfu:.1f}",
        f"{100 * p.bubble_share:.1f}",
        f"{100 * p.tensor_share:.0f}",
        number(p.exposed_network_s, 2),
        number(p.network_gb_per_node, 1),
        number(p.node_link_gb_per_device, 0),
        f"{100 * p.imbalance:.1f}",
        *memory,
        "; ".join(remarks),
    )


def rival_table(rivals: Iterable[Rival]) -> str:
    head = ("scheme", "step s", "tokens/s", "network GB", "node GB", "products s", "communication s", "state GiB", "")
    return _table([head, *(_rival_cells(rival) for rival in rivals)])


def _rival_cells(rival: Rival) -> tuple[str, ...]:
    slow, fast = rival.tokens_per_s_per_device
    return (
        rival.name,
        span(rival.shortest_s, rival.longest_s, 1),
        span(slow, fast, 0),
        number(rival.network_bytes / 1e9, 0),
        number(rival.node_link_bytes / 1e9, 0),
        number(rival.compute_s, 1),
        number(rival.communication_s, 1),
        number(rival.state_bytes / 2**30, 1),
        "" if rival.overlaps else "at least",
    )


def validation_table(rows: Iterable[ValidationRow]) -> str:
    head = ("run", "layout", "quantity", "measured", "predicted", "error %", "")
    return _table([head, *(_validation_cells(row) for row in rows)])


def _validation_cells(row: ValidationRow) -> tuple[str, ...]:
    values = (f"{row.measured:.2f}", f"{row.predicted:.2f}", f"{row.error:+.1f}")
    return (row.name, row.layout, row.quantity, *values, "" if row.binding else "plausibility only")


def words(
    chosen: Row | None,
    rows: Sequence[Row],
    rivals: Sequence[Rival],
    explained: Sequence[Explained],
    planner: Planner,
) -> str:
    """Which layout to take and why; how it compares with other schemes, and what is known of the original's run."""
    usable = [row for row in rows if not row.refused]
    lines = ["none of these layouts can be used" if not usable else "fastest that can be used:"]
    if usable:
        others = usable[1:4]
        if chosen not in usable[:4] and chosen in usable:
            others.append(chosen)
        lines += [*_reasons(usable[0], others), *_too_close(usable)]
        compared = [usable[0], *([chosen] if chosen in usable[1:] else [])]
        for row in compared:
            lines.append(f"{row.name}: {_speed_ups(row, rivals, explained)}")
            slower = planner.with_slower_products(row)
            lines.append(
                f"{row.name}: {number(slower.model_tflops, 1)} TFLOP/s if matrix products reach a tenth less than "
                f"gemm_efficiency says, instead of {number(row.prediction.model_tflops, 1)}"
            )
    lines += [f"original run, {item.text}" for item in explained]
    lines.append(f"{planner.cluster.device.reserved_gib:g} GiB of each device are kept in reserve.")
    lines += kernel_remarks(planner.config.kernels)
    return "\n".join(lines)


def kernel_remarks(kernels: KernelsConfig) -> list[str]:
    """What a plan and a dry run leave out of kernels.frozen_gemm=fp8: one line, or none."""
    if kernels.frozen_gemm != "fp8":
        return []
    if kernels.backend == "torch":
        return ["kernels.frozen_gemm=fp8: times are those of bf16 products; 8 bits count in memory and bytes only."]
    return [
        f"kernels.frozen_gemm=fp8 with kernels.backend={kernels.backend}: times, memory and bytes are those of bf16; "
        "Transformer Engine's 8-bit copies of frozen weights are not counted."
    ]


def _reasons(best: Row, others: Sequence[Row]) -> list[str]:
    """What the best row spends its time and memory on, and what each of the others spends more or less of."""
    lines = [f"{best.name}: {best.prediction.words}{_memory(best)}."]
    for row in others:
        lines.append(f"{row.name}: {against(best.prediction, row.prediction)}{_memory(row)}.")
    return lines


def _memory(row: Row) -> str:
    return f", {number(row.gib_most, 1)} GiB of a device with the most images" if row.memory_most else ""


def _too_close(usable: Sequence[Row]) -> list[str]:
    """Rows, fastest first, whose order the model cannot tell."""
    close = [row for row in usable if row.prediction.step_s <= (1 + CLOSE) * usable[0].prediction.step_s]
    if len(close) < 2:
        return []
    least = min(close, key=lambda row: row.gib_most)
    fewest = min(close, key=lambda row: row.prediction.network_gb_per_node)
    return [
        f"{len(close)} layouts lie within {100 * CLOSE:.0f} %, which the model cannot tell apart: {least.name} needs "
        f"the least memory of them ({number(least.gib_most, 1)} GiB), {fewest.name} sends the least between nodes "
        f"({number(fewest.prediction.network_gb_per_node, 1)} GB out of a node)"
    ]


def speed_ups(row: Row, rivals: Sequence[Rival], explained: Sequence[Explained]) -> dict[str, tuple[float, float]]:
    """How many times as long a step of others takes: at their shortest and at their longest."""
    mine = row.prediction.step_s
    found = {f"the original by {item.source}": (item.measured_s / mine,) * 2 for item in explained}
    return found | {rival.name: (rival.shortest_s / mine, rival.longest_s / mine) for rival in rivals}


def _speed_ups(row: Row, rivals: Sequence[Rival], explained: Sequence[Explained]) -> str:
    found = [f"{span(low, high, 2)} {name}" for name, (low, high) in speed_ups(row, rivals, explained).items()]
    return f"times as fast, predicted, as: {', '.join(found)}"


def dry_run_text(run: DryRun) -> str:
    """Several lines about one rank."""
    m, gib = run.memory, 2**30
    parts = {name: value / gib for name, value in vars(m).items() if name != "host"}
    lines = [
        f"rank {run.rank}: stage {run.pipeline_rank}, data {run.data_rank}, tensor {run.tensor_rank}; "
        f"{run.microbatches_run} of {run.microbatches} microbatches run, {run.images} images in each",
        f"  parameters: {run.parameters:,}, of which {run.trainable:,} train",
        f"  GiB: {most_gib([m]):.2f} = " + " + ".join(f"{name} {value:.2f}" for name, value in parts.items()),
        *([f"  GiB in the memory of the host: {m.host / gib:.2f}, originals of 8-bit weights"] if m.host else []),
        "  TFLOP of a step: " + ", ".join(f"{kind} {count / 1e12:.2f}" for kind, count in run.flops.items()),
    ]
    head = ("", "operation", "group", "ranks", "link", "calls", "payload GB", "sent GB")
    cells = [
        (
            "",
            x.operation,
            x.group,
            str(x.ranks),
            x.link,
            f"{x.calls:,}",
            f"{x.payload / 1e9:.3f}",
            f"{x.wire / 1e9:.3f}",
        )
        for x in run.messages
    ]
    lines.append(_table([head, *cells]))
    lines.append(f"  took {run.seconds:.1f} s and {run.process_gib:.2f} GiB of this machine")
    return "\n".join(lines)


def summary(
    chosen: Row | None,
    rows: Sequence[Row],
    rivals: Sequence[Rival],
    explained: Sequence[Explained],
    planner: Planner,
    seconds: float,
) -> dict[str, Any]:
    best = next((row for row in rows if not row.refused), None)
    # model FLOPs of a step are the same for all: rates are as the inverse of times
    work = step_tflop(planner)
    predicted = work / rivals[0].longest_s
    return {
        "images_per_row": planner.images.mean,
        "most_images_per_row": planner.images.most,
        "layouts": [_row_json(row) for row in rows],
        "chosen": chosen.name if chosen else None,
        "best": best.name if best else None,
        "model_tflops": best.prediction.model_tflops if best else None,
        "zero3_tflops": work / explained[0].measured_s if explained else predicted,
        "zero3_is": "measured" if explained else "predicted",
        "zero3_predicted_tflops": predicted,
        "rivals": [_rival_json(rival, work) for rival in rivals],
        "original": [vars(item) | {"model_tflops": work / item.measured_s} for item in explained],
        "speed_ups": {row.name: speed_ups(row, rivals, explained) for row in (best, chosen) if row},
        "seconds": seconds,
    }


def step_tflop(planner: Planner) -> float:
    """Model TFLOP of a step on each device."""
    config = planner.config
    rows = config.training.global_batch_size
    work = model_flops(config.model, rows, config.data.sequence_length, rows * planner.images.mean)
    return work / planner.cluster.world_size / 1e12


def _rival_json(rival: Rival, work: float) -> dict[str, Any]:
    return {
        "name": rival.name,
        "step_s": [rival.shortest_s, rival.longest_s],
        "model_tflops": [work / rival.longest_s, work / rival.shortest_s],
        "network_gb_per_node": rival.network_bytes / 1e9,
        "node_link_gb_per_device": rival.node_link_bytes / 1e9,
        "state_gib": rival.state_bytes / 2**30,
    }


def dry_run_json(run: DryRun) -> dict[str, Any]:
    return asdict(run) | {"memory_gib": run.memory.total / 2**30}


def _row_json(row: Row) -> dict[str, Any]:
    p, layout = row.prediction, row.candidate.layout
    parts = ("compute_s", "tensor_s", "bubble_s", "exchange_s", "data_s", "optimizer_s")
    return {
        "name": row.name,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline,
        "data": layout.data,
        "units_per_chunk": list(layout.units_per_chunk),
        "micro_batch_size": row.candidate.rows,
        "step_s": p.step_s,
        "tokens_per_s_per_device": p.tokens_per_s_per_device,
        "model_tflops": p.model_tflops,
        "mfu": p.mfu,
        "bubble_share": p.bubble_share,
        "tensor_share": p.tensor_share,
        "exposed_network_s": p.exposed_network_s,
        "network_gb_per_node": p.network_gb_per_node,
        "node_link_gb_per_device": p.node_link_gb_per_device,
        "imbalance": p.imbalance,
        "memory_gib": row.gib if row.memory else None,
        "most_memory_gib": row.gib_most if row.memory else None,
        "refused": list(row.refused),
        "stages_s": [stage.total for stage in p.prediction.stages],  # a microbatch forward and backward
        "parts": {part: getattr(p.prediction, part) for part in parts},
    }


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 or column == len(row) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
