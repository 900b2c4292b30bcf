"""Where a run says what it does: metrics.jsonl, trackers, and the terminal of rank 0."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_atum.config.schema import Config
from megatron_atum.training.metrics import MetricsFile, Terminal
from megatron_atum.training.trackers import Trackers, open_trackers


class RunLog:
    """Only rank 0 writes and shows."""

    def __init__(self, config: Config, run_folder: Path, rank: int, step: int) -> None:
        """Args: step: that the run goes on from."""
        self.metrics = MetricsFile(run_folder / "metrics.jsonl", writes=rank == 0)
        self.terminal = Terminal(
            shows=rank == 0,
            bar=config.logging.progress,
            total=config.training.steps,
            start=step,
            every=config.logging.every,
        )
        self._config, self._run_folder, self._writes = config, run_folder, rank == 0
        self._trackers: Trackers | None = None

    def open(self, step: int) -> None:
        """Raises OSError: the run folder cannot be written."""
        self.metrics.resume_after(step)
        self._trackers = open_trackers(self._config, self._run_folder, self._writes, self.say)

    def step(self, values: dict[str, Any]) -> None:
        self.metrics.write(**{name: _for_json(value) for name, value in values.items()})
        if self._trackers is not None:
            self._trackers.step(values)
        self.terminal.step(values)

    def event(self, name: str, step: int, **values: Any) -> None:
        self.metrics.write(event=name, step=step, **{key: _for_json(value) for key, value in values.items()})
        if self._trackers is not None:
            self._trackers.event(name, step, values)

    def say(self, text: str) -> None:
        self.terminal.say(text)

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()
        self.terminal.close()


def _for_json(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
