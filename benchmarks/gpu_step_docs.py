"""Draws the tables of docs/performance.md, "On one GPU", from the file of gpu_step.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu_step_cases import FP8, HF, OURS, SHARDS, Run, full_plan
from benchmarks.gpu_step_results import ROOT, Row, memory_error, targets

PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- drawn by benchmarks/gpu_step.py --docs: begin -->", "<!-- drawn: end -->"
MISSING = "not measured"
ORDER = (OURS, FP8, HF)


def redraw(content: dict[str, Any]) -> None:
    PAGE.write_text(redrawn(PAGE.read_text(), content))


def redrawn(page: str, content: dict[str, Any]) -> str:
    """The page with what stands between the two marks drawn anew. Args: content: of a file of results."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{drawn(content)}\n\n{END}{after}"


def drawn(content: dict[str, Any]) -> str:
    rows = {row["name"]: Row(**row) for row in content["rows"]}
    plan = full_plan(content["tokens_of_microbatch"])
    models = sorted((run for run in plan if not run.shard), key=lambda run: ORDER.index(run.side[0]))
    shards = sorted((run for run in plan if run.shard), key=lambda run: (run.frozen_gemm, str(run.shard)))
    parts = [
        _caption(content, list(rows.values())),
        _table(MODEL_COLUMNS, content, [(run, rows.get(run.name)) for run in models]),
        "One rank of ATUM-80B:",
        _table(SHARD_COLUMNS, content, [(run, rows.get(run.name)) for run in shards]),
        _targets(content),
        _remarks(content, list(rows.values())),
    ]
    return "\n\n".join(part for part in parts if part)


def _caption(content: dict[str, Any], rows: Sequence[Row]) -> str:
    dates = sorted({row.date for row in rows})
    ceilings = {f"{row.ceiling_tflops:.0f}" for row in rows if row.ceiling_tflops} or {MISSING}
    tokens = content["tokens_of_microbatch"]
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    return _wrapped(
        f"Measured on {' and '.join(dates)}: one {content['gpu']}, {versions}; ceiling, TFLOP/s: "
        f"{', '.join(sorted(ceilings))}; code {content['code']}. "
        f"Medians of {content['steps']} steps of {2 * tokens:,} tokens:"
    )


# Tables ---------------------------------------------------------------------------------------------------------------


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


# Heading, and what stands below it; the first four are there without a measurement.
MODEL_COLUMNS = (
    ("", lambda run, row: run.who),
    ("tokens, rows of a microbatch", lambda run, row: f"{run.case.length} x {run.case.rows}"),
    ("images in a row", lambda run, row: str(run.case)),
    ("step s", lambda run, row: _number(row.step_s, ".3f")),
    ("tokens/s", lambda run, row: _number(row.tokens_per_s, ",.0f")),
    ("model TFLOP/s", lambda run, row: _number(row.model_tflops, ".0f")),
    ("of the data sheet's {peak}", lambda run, row: _share(row.of_peak)),
    ("of the ceiling", lambda run, row: _share(row.of_ceiling)),
    ("peak GiB", lambda run, row: _number(row.peak_gib, ".1f")),
    ("dry run's GiB", lambda run, row: _number(row.predicted_gib, ".1f")),
    ("vision", lambda run, row: _share(row.vision_share)),
)
SHARD_COLUMNS = (
    ("", lambda run, row: f"{run.shard}" + (", frozen_gemm=fp8" if run.frozen_gemm == "fp8" else "")),
    ("tokens, rows of a microbatch", lambda run, row: f"{run.case.length} x {run.case.rows}"),
    ("images in a row", lambda run, row: str(run.case)),
    ("microbatch ms", lambda run, row: _number(row.microbatch_s and 1e3 * row.microbatch_s, ".1f")),
    ("planner's ms", lambda run, row: _number(row.planned_microbatch_s and 1e3 * row.planned_microbatch_s, ".1f")),
    ("model TFLOP/s", lambda run, row: _number(row.model_tflops, ".0f")),
    ("of the data sheet's {peak}", lambda run, row: _share(row.of_peak)),
    ("of the ceiling", lambda run, row: _share(row.of_ceiling)),
    ("products alone, of the data sheet's", lambda run, row: _share(row.products_of_peak)),
    ("planner's assumption", lambda run, row: _share(row.assumed_of_peak)),
    ("peak GiB", lambda run, row: _number(row.peak_gib, ".1f")),
    ("dry run's GiB", lambda run, row: _number(row.predicted_gib, ".1f")),
)


def _table(columns: Any, content: dict[str, Any], runs: Iterable[tuple[Run, Row | None]]) -> str:
    peak = _number(content["peak_tflops"], ".0f") or "peak"
    lines = [[heading.format(peak=peak) for heading, _ in columns]]
    for run, row in runs:
        if row is None or row.step_s is None:
            why = MISSING if row is None else f"failed: {row.error}"
            lines.append([*(cell(run, row) for _, cell in columns[:3]), why] + [""] * (len(columns) - 4))
        else:
            lines.append([cell(run, row) for _, cell in columns])
    rule = f"|{'|'.join(['---'] * 3 + ['--:'] * (len(columns) - 3))}|"
    return "\n".join([_line(lines[0]), rule, *map(_line, lines[1:])])


def _line(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def _targets(content: dict[str, Any]) -> str:
    lines = ["| at 2048 tokens, 11 images a row | target | found | |", "|---|--:|--:|---|"]
    for target in targets(content):
        verdict = {None: MISSING, True: "met", False: "missed"}[target.met]
        what = f"{target.what} (stretch)" if target.stretch else target.what
        lines.append(_line([what, target.wanted, target.found or "", verdict]))
    return "\n".join(lines)


def _remarks(content: dict[str, Any], rows: Sequence[Row]) -> str:
    said = [
        f"{ratio:.2f} times the tokens of the better of Hugging Face's settings with {case}."
        for case, ratio in content["over_best_hf"].items()
    ]
    named = {row.name: row for row in rows}
    said += [
        f"In a step of {_title(named[name])}, {100 * profile['share_of_products']:.0f} % of the device's time goes "
        f"into matrix products{_products(named[name])}."
        for name, profile in content["profiles"].items()
    ]
    said += [
        f"In a step of {_title(named[name])}, the host also waits at {one['file']}, {one['function']} "
        f"({one['times']} times)."
        for name, places in content["host_waits"].items()
        for one in places
        if not one["known"]
    ]
    error = memory_error(rows)
    if error is not None:
        said.append(f"Peak memory is within {100 * error:.1f} % of the dry run's.")
    said += [f"{_title(row)}: {row.error}." for row in rows if row.error and row.step_s is not None]
    return _wrapped(" ".join(said))


def _title(row: Row) -> str:
    what = row.name if row.who in SHARDS else row.who
    return f"{what}, {row.length} tokens, {row.images} images"


def _products(row: Row) -> str:
    """How fast they are, and what the planner assumes of that."""
    if row.products_of_peak is None:
        return ""
    assumed = f"; the planner assumes {_share(row.assumed_of_peak)}" if row.assumed_of_peak else ""
    return f", at {_share(row.products_of_peak)} of the data sheet{assumed}"


def _wrapped(text: str, width: int = 120) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
