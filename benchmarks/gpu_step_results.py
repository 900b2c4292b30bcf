"""Rows of gpu_step.py, the file they are kept in, and the targets they are held against."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_step_cases import FP8, HF, HF_SAVING, OURS, Run
from benchmarks.gpu_step_measure import EVENT, STREAM, Profile, Wait

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/gpu_step.json"
MAIN = {"length": 2048, "images": "11"}  # the case of the targets


@dataclass(frozen=True)
class Row:
    """One run. What was not measured is None, and `error` says why if it should have been."""

    name: str
    who: str
    date: str
    length: int
    images: str  # of a row, or of each
    rows: int  # of a microbatch
    step_s: float | None = None
    tokens_per_s: float | None = None
    model_tflops: float | None = None  # of a shard its own, of a microbatch
    of_peak: float | None = None
    of_ceiling: float | None = None
    ceiling_tflops: float | None = None  # of the same process
    peak_gib: float | None = None
    predicted_gib: float | None = None  # by a dry run
    vision_share: float | None = None
    products_tflops: float | None = None  # of the matrix products alone, in a profiled step
    products_of_peak: float | None = None
    assumed_of_peak: float | None = None  # gemm_efficiency of the planner's cluster with this device
    microbatch_s: float | None = None  # of a shard
    planned_microbatch_s: float | None = None  # by the cost model, without waiting for other ranks
    error: str | None = None
    run: str | None = None  # when the process began that measured it; None in a file of a single one


def failed(run: Run, error: BaseException) -> Row:
    text = (str(error).strip() or "no message").splitlines()[0]
    return replace(empty_row(run), error=f"{type(error).__name__}: {text[:300]}")


def empty_row(run: Run) -> Row:
    today = datetime.date.today().isoformat()
    return Row(run.name, run.who, today, run.case.length, str(run.case), run.case.rows)


# The file -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What a file's rows have in common. The first five must agree for rows to share a file."""

    gpu: str
    versions: dict[str, str]
    code: str
    tokens_of_microbatch: int
    steps: int
    commit: str
    command: str
    peak_tflops: float | None


SHARED = ("gpu", "versions", "code", "tokens_of_microbatch", "steps")


def code_version() -> str:
    """Of the package and of what measures it, also where there is no git."""
    digest = hashlib.sha256()
    measuring = [*ROOT.glob("benchmarks/gpu_step*.py"), ROOT / "benchmarks/step.py"]
    for file in sorted([*(ROOT / "megatron_atum").rglob("*.py"), *measuring]):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return f"sha256 {digest.hexdigest()[:16]}"


class Results:
    """What was measured, written to a file after every row."""

    def __init__(self, about: About, path: Path | None, earlier: dict[str, Any] | None = None) -> None:
        """Args: earlier: a file whose rows stay, save those that are measured again."""
        earlier = earlier or {}
        self.about, self._path = about, path
        self._run = datetime.datetime.now(datetime.UTC).isoformat()
        commands = [earlier.get("command", ""), about.command]
        self._command = "; ".join(dict.fromkeys(filter(None, commands)))
        self.rows = {row["name"]: Row(**row) for row in earlier.get("rows", [])}
        self._profiles: dict[str, Any] = earlier.get("profiles", {})
        self._waits: dict[str, Any] = earlier.get("host_waits", {})

    def add(self, row: Row, profile: Profile | None = None, waits: Sequence[Wait] | None = None) -> None:
        self.rows[row.name] = replace(row, run=self._run)
        if profile is not None:
            self._profiles[row.name] = {
                "share_of_products": profile.product_seconds / profile.seconds,
                "device_s": profile.seconds,
                "waiting": profile.waiting,
                "kernels": profile.top,
            }
        if waits is not None:
            self._waits[row.name] = [asdict(wait) for wait in waits]
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self._path.with_name(f"{self._path.name}.part")
            unfinished.write_text(json.dumps(self.content(), indent=1) + "\n")
            os.replace(unfinished, self._path)

    def content(self) -> dict[str, Any]:
        rows = list(self.rows.values())
        content = {
            "date": max((row.date for row in rows), default=""),
            **asdict(self.about),
            "command": self._command,
            "over_best_hf": over_best_hf(rows),
            "profiles": self._profiles,
            "host_waits": self._waits,
            "rows": [asdict(row) for row in rows],
        }
        return {**content, "targets": [asdict(target) for target in targets(content)]}


def differences(about: About, content: dict[str, Any]) -> list[str]:
    """Why rows that are measured here cannot stand in that file."""
    mine = asdict(about)
    return [
        f"{key} is {mine[key]} here and {content.get(key)} there" for key in SHARED if mine[key] != content.get(key)
    ]


# What follows from the rows -------------------------------------------------------------------------------------------


def over_best_hf(rows: Sequence[Row]) -> dict[str, float]:
    """Our tokens per second over those of the better of Hugging Face's settings, by case, where one process measured
    all of them: rates of two may lie apart for reasons of their own."""
    found = {}
    for row in rows:
        theirs = [
            other
            for other in rows
            if other.who in (HF, HF_SAVING) and (other.length, other.images) == (row.length, row.images)
        ]
        rates = [other.tokens_per_s for other in theirs if other.tokens_per_s]
        if row.who == OURS and row.tokens_per_s and rates and all(other.run == row.run for other in theirs):
            found[f"{row.length} tokens, {row.images} images"] = row.tokens_per_s / max(rates)
    return found


@dataclass(frozen=True)
class Target:
    what: str
    wanted: str
    found: str | None  # None: not measured
    met: bool | None
    stretch: bool = False


def targets(content: dict[str, Any]) -> list[Target]:
    """Those of the main case. Args: content: of a file, as `Results.content`."""
    rows = [Row(**row) for row in content["rows"]]

    def main(who: str) -> Row | None:
        fits = (row for row in rows if row.who == who and {"length": row.length, "images": row.images} == MAIN)
        return next(fits, None)

    ours, fp8 = main(OURS), main(FP8)
    over_bf16 = _ratio(fp8.model_tflops, ours.model_tflops) if ours and fp8 and ours.run == fp8.run else None
    over_hf = content["over_best_hf"].get("{length} tokens, {images} images".format(**MAIN))
    return [
        _least("model rate in bf16, of the ceiling", 0.60, ours and ours.of_ceiling, percent=True),
        _least("model rate with frozen_gemm=fp8, over bf16", 1.2, over_bf16),
        _least("model rate with frozen_gemm=fp8, over bf16", 1.35, over_bf16, stretch=True),
        _least("tokens/s over the better of Hugging Face's settings", 1.5, over_hf),
        _least("tokens/s over the better of Hugging Face's settings", 2.0, over_hf, stretch=True),
        _most("vision tower's share of a step", 0.15, ours and ours.vision_share),
        _no_other_waits(content, (ours, fp8)),
        _most("peak memory's difference from the dry run's, largest of all rows", 0.10, memory_error(rows)),
    ]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _least(what: str, wanted: float, found: float | None, *, percent: bool = False, stretch: bool = False) -> Target:
    def text(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.2f}"

    shown = None if found is None else text(found)
    return Target(what, f"at least {text(wanted)}", shown, None if found is None else found >= wanted, stretch)


def _most(what: str, wanted: float, found: float | None) -> Target:
    shown = None if found is None else f"{100 * found:.1f} %"
    return Target(what, f"below {100 * wanted:.0f} %", shown, None if found is None else found < wanted)


def _no_other_waits(content: dict[str, Any], rows: Sequence[Row | None]) -> Target:
    """torch's places, and what the profile saw of CUDA's runtime."""
    what = "places in a step where the host waits, besides counts of tokens, norm and losses"
    names = [row.name for row in rows if row and row.name in content["host_waits"]]
    if not names or "CPU" in content["gpu"]:
        return Target(what, "none", None, None)
    others = []
    for name in names:
        places = content["host_waits"][name]
        others += [f"{one['file']}:{one['line']}" for one in places if not one["known"]]
        seen = content["profiles"].get(name, {}).get("waiting", {})
        # Each kind against its own; a profile's end waits for the device itself, so those calls say nothing.
        unseen = seen.get(STREAM, 0) - sum(one["times"] for one in places if one.get("call", STREAM) == STREAM)
        unseen = max(0, unseen) + seen.get(EVENT, 0)
        others += [f"{unseen} more in the profile of {name}"] if unseen else []
    return Target(what, "none", ", ".join(others) or "none", not others)


def memory_error(rows: Sequence[Row]) -> float | None:
    """Largest relative difference between measured and predicted peak."""
    errors = [abs(row.peak_gib / row.predicted_gib - 1) for row in rows if row.peak_gib and row.predicted_gib]
    return max(errors, default=None)
