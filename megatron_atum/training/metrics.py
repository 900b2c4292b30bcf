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
        """Cut what a run that is being resumed wrote after the checkpoint it goes on from.

        What a rollback to that checkpoint, or one before it, has undone stays: it belongs to the history of the run.
        """
        if not self.writes or not self.path.exists():
            return
        lines = self.path.read_text().splitlines()
        last_pass = _last_pass(lines, step)
        kept = [line for at, line in enumerate(lines) if _step_of(line) <= (step if at >= last_pass else _WHOLE)]
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


_WHOLE = float(2**63)  # above every step, and below what a line that is not whole has


def _last_pass(lines: list[str], step: int) -> int:
    """Place behind the last rollback that a run at this step has behind it (its line has the step it went to)."""
    for at in range(len(lines), 0, -1):
        line = lines[at - 1]
        if '"rollback"' in line and _step_of(line) <= step and json.loads(line).get("event") == "rollback":
            return at
    return 0


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


def print_line(line: str) -> None:
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
        self.total = total
        self.seconds, self.done = 0.0, 0  # of the steps of this process, those that a rollback repeats included

    def say(self, line: str) -> None:
        if not self.shows:
            return
        if self.bar is not None:
            self.bar.write(line)
        else:
            print_line(line)

    def step(self, values: dict[str, Any]) -> None:
        """Show a step: the names of metrics.jsonl; `mfu` and `bad_steps` may be missing."""
        if not self.shows:
            return
        self.seconds += values["step_s"] + values.get("checkpoint_s", 0.0) + values.get("validation_s", 0.0)
        self.done += 1
        step = values["step"]
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {values['loss']:.4f}  {_speed(values)}{_bad(values)}", refresh=False)
            self.bar.update(step - self.bar.n)  # back, after a rollback
            self.bar.refresh()
        elif step % self.every == 0 or step == self.total:
            print_line(
                f"step {step}/{self.total}  loss {values['loss']:.4f}  z {values['z_loss']:.2f}  "
                f"grad norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  {_speed(values)}  "
                f"ETA {self._eta(step)}{_bad(values)}"
            )

    def _eta(self, step: int) -> str:
        left = (self.total - step) * self.seconds / self.done
        return f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _speed(values: dict[str, Any]) -> str:
    speed = f"{values['tokens_per_s_per_device']:.0f} tokens/s/device"
    return f"{speed}  MFU {values['mfu']:.1%}" if "mfu" in values else speed


def _bad(values: dict[str, Any]) -> str:
    bad = values.get("bad_steps", 0)
    return f"  {bad} bad step{'s' * (bad > 1)}" if bad else ""
