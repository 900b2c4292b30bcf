"""A window of steps under torch's profiler, written as a trace that Perfetto (ui.perfetto.dev) opens."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile, record_function

from megatron_atum.config.schema import Config, LoggingConfig
from megatron_atum.errors import ConfigError
from megatron_atum.parallel.device import profiler_activities, wait_for_device
from megatron_atum.training.metrics import print_line


def check_profile(config: Config, world_size: int) -> None:
    """Raises ConfigError: a window that the run does not reach, or ranks that it does not have."""
    logging = config.logging
    if not logging.profile_start:
        return
    if logging.profile_start > config.training.steps:
        raise ConfigError(
            f"logging.profile_start={logging.profile_start}: training.steps={config.training.steps} is before it"
        )
    missing = [rank for rank in logging.profile_ranks if not 0 <= rank < world_size]
    if missing:
        raise ConfigError(f"logging.profile_ranks={logging.profile_ranks}: ranks of this run are 0 to {world_size - 1}")


class ProfileWindow:
    """Profiles steps `profile_start` to `profile_start + profile_steps - 1` (counted from 1) on `profile_ranks`.

    Each such rank writes RUN/profile/rank-<rank>-steps-<first>-<last>.json.gz, where every step is a slice with its
    number. Once in a process: steps that a rollback repeats are not profiled again. Elsewhere nothing happens.
    """

    def __init__(
        self, logging: LoggingConfig, run_folder: Path, rank: int, say: Callable[[str], None] = print_line
    ) -> None:
        """Args: say: takes the line that a trace was written, or why it was not."""
        profiles = logging.profile_start > 0 and rank in logging.profile_ranks
        start = logging.profile_start
        self._steps = range(start, start + logging.profile_steps) if profiles else range(0)
        self._folder, self._rank, self._say = run_folder / "profile", rank, say
        self._profiler: profile | None = None
        self._slice: record_function | None = None
        self._seen: list[int] = []

    def before_step(self, step: int) -> None:
        """Args: step: number of the step that is about to run."""
        if self._profiler is not None and (step not in self._steps or step in self._seen):
            self.close()
        if step not in self._steps or (self._seen and self._profiler is None):
            return
        if self._profiler is None:
            wait_for_device()  # what the step before has left to do does not belong to the window
            self._profiler = profile(activities=profiler_activities(), record_shapes=True)
            self._profiler.start()
        self._seen.append(step)
        self._slice = record_function(f"step {step}")
        self._slice.__enter__()

    def after_step(self, step: int) -> None:
        if self._profiler is None:
            return
        self._end_slice()
        if step + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Write what there is. For the end of a run, which may come inside the window."""
        if self._profiler is None:
            return
        self._end_slice()
        profiler, self._profiler = self._profiler, None
        wait_for_device()
        profiler.stop()
        path = self._folder / f"rank-{self._rank:05d}-steps-{self._seen[0]}-{self._seen[-1]}.json.gz"
        try:
            _export(profiler, path)
        except (OSError, RuntimeError) as error:  # torch raises the latter when it cannot open the file
            self._say(f"the profile {path} could not be written: {error}")
        else:
            self._say(f"profile: {path}; open it in https://ui.perfetto.dev")

    def _end_slice(self) -> None:
        if self._slice is not None:
            self._slice.__exit__(None, None, None)
            self._slice = None


def _export(profiler: profile, path: Path) -> None:
    """All of the file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain, packed = path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.partial")
    try:
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)
        packed.replace(path)
    finally:
        plain.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)
