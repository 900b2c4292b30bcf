"""metrics.jsonl of a run, and what rank 0 shows of it on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class MetricsFile:
    """One JSON object per step, and one per event. Only rank 0 has one that writes."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path, self.writes = path, writes
        self._unwritten = b""
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)

    def resume_after(self, step: int) -> None:
        """Cut what a run that is being resumed wrote after the checkpoint it goes on from."""
        if not self.writes or not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(line + "\n" for line in kept))
        aside.replace(self.path)

    def write(self, **values: Any) -> None:
        """What a full disk does not take is written later; a run does not end for it."""
        if not self.writes:
            return
        self._unwritten += json.dumps(values).encode() + b"\n"
        with contextlib.suppress(OSError), self.path.open("ab", buffering=0) as file:
            end, left = file.tell(), memoryview(self._unwritten)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(end)
                raise
            self._unwritten = b""


def _step_of(line: str) -> float:
    """Step of a line; one that a crash left half written is cut."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics file, without events."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def _print(line: str) -> None:
    """A log on a full disk is no reason to end a run."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere; nothing on other ranks than 0."""

    def __init__(self, *, shows: bool, bar: bool, total: int, start: int, every: int) -> None:
        self.shows, self.every = shows, every
        self.bar = (
            tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=sys.stdout)
            if shows and bar and sys.stdout.isatty()
            else None
        )
        self.total, self.start = total, start
        self.seconds = 0.0

    def say(self, line: str) -> None:
        if not self.shows:
            return
        if self.bar is not None:
            self.bar.write(line)
        else:
            _print(line)

    def step(self, values: dict[str, Any]) -> None:
        if not self.shows:
            return
        self.seconds += values["step_s"]
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {values['loss']:.4f}  {self._speed(values)}")
            self.bar.update()
        elif values["step"] % self.every == 0 or values["step"] == self.total:
            _print(
                f"step {values['step']}/{self.total}  loss {values['loss']:.4f}  z {values['z_loss']:.2f}  "
                f"grad norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  {self._speed(values)}  "
                f"ETA {self._eta(values['step'])}"
            )

    def _speed(self, values: dict[str, Any]) -> str:
        return f"{values['tokens_per_s_per_device']:,.0f} tokens/s/device"

    def _eta(self, step: int) -> str:
        left = (self.total - step) * self.seconds / max(1, step - self.start)
        return f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
