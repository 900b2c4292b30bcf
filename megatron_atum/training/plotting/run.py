"""A run as its folder tells it: the steps that counted, those that a rollback undid, and events."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_atum.errors import DataError

FILE = "metrics.jsonl"
Line = dict[str, Any]
STEP_PARTS = ("data_s", "forward_backward_s", "optimizer_s", "checkpoint_s")


@dataclass(frozen=True)
class Curve:
    """Values of one name by step. NaN where a value is not finite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Event:
    name: str
    step: int
    values: Line


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path
    steps: list[Line]  # in rising order, each step once: as it was taken last
    abandoned: list[list[Line]]  # what each rollback undid
    events: list[Event]
    config: dict[str, Any]  # of config.yaml; empty without one
    notes: list[str] = field(default_factory=list)

    @cached_property
    def keys(self) -> list[str]:
        """All names of steps, in the order in which they first appear."""
        return list(dict.fromkeys(key for line in self.steps for key in line))

    def families(self, prefix: str) -> list[str]:
        """Names that begin so."""
        return [key for key in self.keys if key.startswith(prefix)]

    def curve(self, key: str) -> Curve:
        return _curve(self.steps, key)

    def abandoned_curves(self, key: str) -> list[Curve]:
        return [curve for part in self.abandoned if len(curve := _curve(part, key))]

    def events_named(self, *names: str) -> list[Event]:
        return [event for event in self.events if event.name in names]

    def validation(self, key: str) -> Curve:
        """Without what was undone."""
        lines: list[Line] = []
        for event in self.events_named("validation", "rollback"):
            if event.name == "rollback":
                lines = [line for line in lines if line["step"] <= event.step]
            else:
                lines.append({"step": event.step, **event.values})
        return _curve(lines, key)

    def validation_keys(self, prefix: str) -> list[str]:
        events = self.events_named("validation")
        return list(dict.fromkeys(key for event in events for key in event.values if key.startswith(prefix)))


def read_run(path: Path) -> Run:
    """Args: path: a run folder, or a metrics.jsonl.

    Raises:
        DataError: there is no run, it has no step, or a line is damaged. Only the last line may be cut, as a crash or
            a full disk leaves it: it is left out, and `notes` says so.
    """
    file = path / FILE if path.is_dir() else path
    if not file.exists():
        raise DataError(f"{path}: no such run; give run folders, which hold metrics.jsonl, such as runs/default")
    folder = file.resolve().parent
    notes: list[str] = []
    lines = list(_lines(file, notes))
    steps, abandoned = _passes(lines)
    if not steps:
        raise DataError(f"{file} holds no step: the run has not finished its first one")
    events = [Event(line["event"], line["step"], _rest(line)) for line in lines if "event" in line]
    return Run(folder.name, folder, steps, abandoned, events, _config(folder, notes), notes)


def _lines(file: Path, notes: list[str]) -> Iterator[Line]:
    texts = file.read_text(errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            step = line["step"]
        except (ValueError, KeyError, TypeError):
            line, step = None, None
        if isinstance(line, dict) and isinstance(step, int):
            yield line
        elif number == len(texts) and number > 1:
            notes.append(f"line {number} of {file.name}, the last one, is cut and was left out")
        else:
            raise DataError(f"{file}, line {number} is damaged: it should be one JSON object with a step")


def _passes(lines: Iterable[Line]) -> tuple[list[Line], list[list[Line]]]:
    """Steps as they counted in the end, and what was undone: by a rollback to a step, or by a step that comes again."""
    steps: list[Line] = []
    abandoned: list[list[Line]] = []
    for line in lines:
        event = line.get("event")
        if event not in (None, "rollback"):
            continue
        first_undone = line["step"] + (event == "rollback")
        if steps and first_undone <= steps[-1]["step"]:
            at = bisect_left(steps, first_undone, key=itemgetter("step"))
            abandoned.append(steps[at:])
            del steps[at:]
        if event is None:
            steps.append(line)
    return steps, abandoned


def _curve(lines: list[Line], key: str) -> Curve:
    there = [line for line in lines if isinstance(line.get(key), int | float)]
    steps = np.array([line["step"] for line in there], dtype=np.int64)
    values = np.array([line[key] for line in there], dtype=np.float64)
    return Curve(steps, np.where(np.isfinite(values), values, np.nan))


def _rest(line: Line) -> Line:
    return {key: value for key, value in line.items() if key not in ("event", "step")}


def _config(folder: Path, notes: list[str]) -> dict[str, Any]:
    path = folder / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        notes.append("no config.yaml that could be read")
        return {}
    return found


# Numbers ------------------------------------------------------------------------------------------------------------


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the values around each. NaN counts as missing.

    At the start it takes as many on both sides as there are, so that a steep fall keeps its height; at the end as many
    before as elsewhere, so that the last values do not stand alone.
    """
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    at = np.arange(len(values))
    half = np.minimum(window // 2, at)
    low, high = at - half, np.minimum(at + half + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def window_of(points: int) -> int:
    """Points that are averaged: one in fifty."""
    return max(1, points // 50)


def differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Configuration keys in which the runs differ, with the value of each."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    values = {key: [one.get(key) for one in flat] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
