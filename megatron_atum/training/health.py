"""Judges each step: is it applied, and must the run go back or stop?

Everything here is a function of numbers that are equal on all ranks, so all ranks decide alike without asking.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_atum.config.schema import HealthConfig
from megatron_atum.training.engine import StepResult

NORMAL = 1.4826  # median absolute deviation of a normal distribution with standard deviation 1, inverted
LEAST_SPREAD = 0.01  # of the median: smooth losses would make every wobble a spike otherwise


@dataclass(frozen=True)
class Spike:
    """A source whose loss stands out."""

    source: str
    loss: float
    median: float
    z: float

    def __str__(self) -> str:
        return f"loss of {self.source} is {self.loss:.4g}, {self.z:.1f} deviations above its median {self.median:.4g}"


@dataclass(frozen=True)
class Verdict:
    """What to do with a step."""

    applies: bool
    finite: bool = True
    spikes: tuple[Spike, ...] = ()
    back_before: int | None = None  # roll back to a checkpoint before this step
    stop: str = ""  # why the run must end


@dataclass
class Health:
    """What of the last steps decides on the next one. Its state belongs into checkpoints."""

    config: HealthConfig
    bad_steps: int = 0  # steps that were not applied, in all
    bad_in_a_row: int = 0
    spikes_in_a_row: int = 0
    spikes_began: int = 0  # step of the first of them; steps between may have been bad for another reason
    windows: dict[str, deque[float]] = field(default_factory=dict)  # last losses by source

    def judge(self, step: int, result: StepResult) -> Verdict:
        """Args: step: number of the step that the result is of."""
        if not result.is_finite:
            return self._bad(Verdict(applies=False, finite=False))
        losses = _by_source(result.losses)
        spikes = tuple(spike for source, loss in losses.items() if (spike := self._spike(source, loss)) is not None)
        self.spikes_began = self.spikes_began if self.spikes_in_a_row else step
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if spikes else 0
        if spikes and self.config.spike == "skip_data":
            return self._bad(Verdict(applies=False, spikes=spikes))
        # With rollback, losses that are to be undone do not count as normal ones.
        if not spikes or self.config.spike == "log":
            self._remember(losses)
        if spikes and self.config.spike == "rollback" and self.spikes_in_a_row >= self.config.spike_steps:
            return Verdict(applies=False, spikes=spikes, back_before=self.spikes_began)
        self.bad_in_a_row = 0
        return Verdict(applies=True, spikes=spikes)

    def cannot_roll_back(self, verdict: Verdict) -> Verdict:
        """The step is not applied, and counts as a bad one."""
        return self._bad(Verdict(applies=False, spikes=verdict.spikes))

    def stopped(self) -> None:
        """A run that goes on after it was stopped has all its bad steps before it again."""
        self.bad_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
            "spikes_in_a_row": self.spikes_in_a_row,
            "spikes_began": self.spikes_began,
            "windows": {source: list(window) for source, window in self.windows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """An empty state is that of a new run."""
        self.bad_steps = state.get("bad_steps", 0)
        self.bad_in_a_row = state.get("bad_in_a_row", 0)
        self.spikes_in_a_row = state.get("spikes_in_a_row", 0)
        self.spikes_began = state.get("spikes_began", 0)
        self.windows = {source: self._window(losses) for source, losses in state.get("windows", {}).items()}

    def _bad(self, verdict: Verdict) -> Verdict:
        self.bad_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row < self.config.max_bad_steps:
            return verdict
        what = "with a loss spike" if verdict.finite else "with a loss or gradient that is not finite"
        stop = f"{self.bad_in_a_row} steps in a row were not applied, the last one {what}"
        return Verdict(applies=False, finite=verdict.finite, spikes=verdict.spikes, stop=stop)

    def _spike(self, source: str, loss: float) -> Spike | None:
        """Robust z-score: distance from the median in units of the median absolute deviation."""
        window = self.windows.get(source, ())
        if len(window) < max(2, self.config.spike_window // 2):
            return None
        median = statistics.median(window)
        spread = NORMAL * statistics.median(abs(value - median) for value in window)
        z = (loss - median) / max(spread, LEAST_SPREAD * abs(median), 1e-12)
        return Spike(source, loss, median, z) if z > self.config.spike_threshold else None

    def _remember(self, losses: Mapping[str, float]) -> None:
        for source, loss in losses.items():
            self.windows.setdefault(source, self._window()).append(loss)

    def _window(self, losses: Any = ()) -> deque[float]:
        return deque(losses, maxlen=self.config.spike_window)


def _by_source(losses: Mapping[str, float]) -> dict[str, float]:
    prefix = "loss/"
    return {
        name.removeprefix(prefix): loss
        for name, loss in losses.items()
        if name.startswith(prefix) and math.isfinite(loss)
    }
