"""TensorBoard and Weights & Biases beside metrics.jsonl.

A thread feeds them, so that neither a slow disk nor a network that is gone holds training up, and what goes wrong in
there is said once and ends that tracker, not the run. metrics.jsonl has everything in any case.
"""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import queue
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from megatron_atum.config.loader import to_yaml
from megatron_atum.config.schema import Config
from megatron_atum.errors import ConfigError, first_line
from megatron_atum.training.metrics import print_line

WAITING = 10_000  # lines that may wait for a tracker that does not keep up
CLOSE_S = 60.0  # for what still waits at the end of a run
INIT_S = 60.0  # for Weights & Biases to answer
_INSTALL = "pip install 'megatron_atum[logging]'"


class Tracker(Protocol):
    def step(self, values: dict[str, Any]) -> None: ...
    def event(self, name: str, step: int, values: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def check_trackers(config: Config) -> None:
    """For rank 0, before any process group.

    Raises:
        ConfigError: a package is missing, or logging.wandb=online has no key.
    """
    logging = config.logging
    if logging.tensorboard:
        _check_package("tensorboard", "logging.tensorboard=true")
    if logging.wandb != "disabled":
        _check_package("wandb", f"logging.wandb={logging.wandb}")
    if logging.wandb == "online" and not _has_wandb_key():
        raise ConfigError(
            "logging.wandb=online: no key was found; run `wandb login`, set WANDB_API_KEY, or use logging.wandb=offline"
        )


def open_trackers(config: Config, run_folder: Path, writes: bool, say: Callable[[str], None] = print_line) -> Trackers:
    """The trackers that the configuration asks for.

    Args:
        writes: False on all ranks but 0, where nothing is opened.
        say: takes what a user should know; called from another thread.
    """
    opens: dict[str, Callable[[], Tracker]] = {}
    if writes and config.logging.tensorboard:
        opens["TensorBoard"] = lambda: TensorBoard(config, run_folder)
    if writes and config.logging.wandb != "disabled":
        opens["Weights & Biases"] = lambda: WeightsAndBiases(config, run_folder, say)
    return Trackers([_Feeder(name, make, say) for name, make in opens.items()])


class Trackers:
    """All trackers of a run. No call waits (but `close`, for a limited time), and none raises."""

    def __init__(self, feeders: list[_Feeder]) -> None:
        self._feeders = feeders

    def step(self, values: dict[str, Any]) -> None:
        """Args: values: a line of metrics.jsonl."""
        copy = dict(values)
        self._put(lambda tracker: tracker.step(copy))

    def event(self, name: str, step: int, values: dict[str, Any]) -> None:
        """Args: values: what the line of metrics.jsonl has besides name and step."""
        copy = dict(values)
        self._put(lambda tracker: tracker.event(name, step, copy))

    def close(self) -> None:
        for feeder in self._feeders:
            feeder.finish()
        for feeder in self._feeders:
            feeder.wait()

    def _put(self, call: Callable[[Tracker], None]) -> None:
        for feeder in self._feeders:
            feeder.put(call)


class _Feeder:
    """A thread that opens one tracker and hands it what was put."""

    def __init__(self, name: str, make: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self.name, self._make, self._say = name, make, say
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(WAITING)
        self._over = False
        self._thread = threading.Thread(target=self._feed, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Tracker], None]) -> None:
        if self._over:
            return
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            self._give_up(f"{WAITING:,} lines wait for it")

    def finish(self) -> None:
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            self._give_up(f"{WAITING:,} lines wait for it")

    def wait(self) -> None:
        self._thread.join(0.0 if self._over else CLOSE_S)
        if self._thread.is_alive() and not self._over:
            self._give_up(f"it took more than {CLOSE_S:.0f} s to finish")

    def _feed(self) -> None:
        try:
            tracker = self._make()
            while (call := self._waiting.get()) is not None and not self._over:
                call(tracker)
            tracker.close()
        except Exception as error:  # whatever a package raises
            self._give_up(f"{type(error).__name__}: {first_line(error)}")

    def _give_up(self, why: str) -> None:
        if not self._over:
            self._over = True
            self._say(f"{self.name} gets nothing from here on: {why}; training goes on, metrics.jsonl has everything")


class TensorBoard:
    """RUN/tensorboard, with the names of metrics.jsonl."""

    def __init__(self, config: Config, run_folder: Path) -> None:
        self._config, self._folder = config, run_folder / "tensorboard"
        self._writer: Any = None

    def step(self, values: dict[str, Any]) -> None:
        for name, value in _numbers(values).items():
            if name != "step":
                self._open(0).add_scalar(name, value, values["step"])
        self._open(0).flush()  # else a run that is killed loses up to two minutes

    def event(self, name: str, step: int, values: dict[str, Any]) -> None:
        if name in ("start", "resume", "rollback"):
            self._go_back(step)
        writer = self._open(step)
        writer.add_text(f"event/{name}", json.dumps(values), step)
        for key, value in _numbers(values).items() if name == "validation" else ():
            writer.add_scalar(f"validation/{key}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _go_back(self, step: int) -> None:
        """What was written of later steps is hidden from here on."""
        self.close()
        self._writer = None
        self._open(step).add_text("config", "    " + to_yaml(self._config).replace("\n", "\n    "), step)

    def _open(self, step: int) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)
        return self._writer


class WeightsAndBiases:
    """A run whose id is kept in RUN/wandb-id, so that a resume goes on with it.

    W&B takes its own steps in rising order only, so `step` is a value like others, and the axis of all charts: after a
    rollback the repeated steps are drawn beside the abandoned ones.
    """

    def __init__(self, config: Config, run_folder: Path, say: Callable[[str], None]) -> None:
        self._config, self._folder, self._id = config, run_folder, _wandb_id(run_folder)
        self._run = self._open_online(say) if config.logging.wandb == "online" else self._init("offline")
        self._run.define_metric("*", step_metric="step")

    def _open_online(self, say: Callable[[str], None]) -> Any:
        import wandb

        try:
            run = self._init("online", resume="allow")
        except wandb.Error as error:
            say(
                f"Weights & Biases cannot be reached ({first_line(error)}); this run is recorded offline, for "
                f"`wandb sync {self._folder / 'wandb'}/offline-run-*-{self._id}`"
            )
            wandb.teardown()  # its process still holds the id
            return self._init("offline")
        say(f"Weights & Biases: {run.url}")
        return run

    def _init(self, mode: Literal["online", "offline"], resume: Literal["allow"] | None = None) -> Any:
        import wandb

        logging = self._config.logging
        settings = wandb.Settings(console="off", silent=True, init_timeout=INIT_S)
        if hasattr(settings, "finish_timeout"):
            settings.finish_timeout = 0.8 * CLOSE_S  # it would wait for a network that does not come back
        return wandb.init(
            mode=mode,
            project=logging.wandb_project,
            entity=logging.wandb_entity,
            name=logging.run,
            id=self._id,
            resume=resume,
            dir=self._folder,
            config=asdict(self._config),
            settings=settings,
        )

    def step(self, values: dict[str, Any]) -> None:
        self._run.log(values)

    def event(self, name: str, step: int, values: dict[str, Any]) -> None:
        prefix = "validation" if name == "validation" else f"event/{name}"
        marks = {} if name == "validation" else {prefix: 1}
        self._run.log({"step": step} | marks | {f"{prefix}/{key}": value for key, value in values.items()})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run_folder: Path) -> str:
    path = run_folder / "wandb-id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    new = uuid.uuid4().hex[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(new + "\n")
    return new


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _check_package(name: str, key: str) -> None:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a folder of that name is no package
        raise ConfigError(f"{key} needs the package {name}, which is not installed: {_INSTALL}")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
