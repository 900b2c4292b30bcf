"""Runs of pretrain_atum.py, from its first line to its exit code, in processes that may die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import _child, _dumps, _hang, _kill, _read, _server
from tests.faults.points import Kill, Points, install, write_death

ROOT = Path(__file__).parents[2]
RUN = "run"

# Two units of two layers, whose weights take a few kilobytes.
SMALL = [
    "model.preset=tiny",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_layers=2",
    "model.vision={embed_dim: 16, image_size: 28, intermediate_size: 24, num_heads: 2, num_layers: 1}",
    "model.perceiver={depth: 1, num_heads: 2, head_dim: 8, num_latents: 4}",
    "model.alpha_init=0.5",
    "data.sequence_length=128",
    "data.workers=0",
    "training.global_batch_size=2",
    "training.precision=fp32",
    "optimizer.lr=3e-3",
    "optimizer.warmup_steps=2",
    "optimizer.decay_steps=20",
    f"logging.run={RUN}",
    "logging.progress=false",
]
# What the machine decides, and not the run.
OF_THE_CLOCK = re.compile(r"_s$|_tflops$|_per_s|^slowest_|^memory_gib$|^joules$|^mfu$")
FROZEN = "model.freeze={text: true, vision: true, lm_head: true}"


@dataclass(frozen=True)
class Clock:
    """Kill a rank from outside, so many seconds after the run has logged its first step."""

    rank: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    codes: list[int | None]  # exit code of each rank, negative for a signal
    logs: list[str]  # what each rank printed
    death: dict[str, Any] | None  # of the rank that was killed: the point, and the checkpoints that were there


def data_overrides(data: Path) -> list[str]:
    sources = (
        f"[{{name: pairs, shards: '{data}/pairs-*.tar', kind: pairs, weight: 0.7, max_images: 8}},"
        f"{{name: documents, shards: '{data}/documents-*.tar', kind: documents, weight: 0.3, max_images: 8}}]"
    )
    return [f"data.tokenizer={data}/tokenizer.model", f"data.sources={sources}"]


def make_data(folder: Path) -> Path:
    runpy.run_path(str(ROOT / "examples/tiny/make_data.py"))["make_data"](folder)
    return folder


def checkpoints_of(root: Path) -> Path:
    return root / RUN / "checkpoints"


def metrics_of(root: Path) -> Path:
    return root / RUN / "metrics.jsonl"


def lines_of(root: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without a last line that is cut."""
    path = metrics_of(root)
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def events_of(root: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(root) if line.get("event") == name]


def numbers_of(root: Path) -> list[dict[str, Any]]:
    """Everything of every step but what the clock decides."""
    return [
        {key: value for key, value in line.items() if not OF_THE_CLOCK.search(key)}
        for line in lines_of(root)
        if "event" not in line
    ]


# In the processes ----------------------------------------------------------------------------------------------------


def train(
    rank: int, world_size: int, root: str, overrides: list[str], kill: Kill | None, hook: Callable[[int], None] | None
) -> None:
    """pretrain_atum.py on one rank. `hook` may break what it likes beforehand."""
    mine = kill if kill is not None and kill.rank == rank else None
    points = Points(Path(root), checkpoints_of(Path(root)), mine)
    install(points)
    _draw_each_step()
    if hook is not None:
        hook(rank)
    sys.argv = ["pretrain_atum.py", *overrides, f"logging.root={root}"]
    try:
        runpy.run_path(str(ROOT / "pretrain_atum.py"), run_name="__main__")
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    (Path(root) / f"points-{rank}.json").write_text(json.dumps(points.order))


def _draw_each_step() -> None:
    """Random numbers that each rank draws in each step get into the metrics, as dropout would get into the loss."""
    from megatron_atum.parallel.random_state import get_cuda_rng_tracker
    from megatron_atum.training.engine import Engine

    compute = Engine.compute

    def drawing(self: Engine, *arguments: Any) -> Any:
        result = compute(self, *arguments)
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(()).item()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [torch.rand(()).item(), tracked])
        drawn = {f"drawn/{rank}/{n}": x for rank, values in enumerate(everyone) for n, x in enumerate(values)}
        result.losses.update(drawn)
        return result

    Engine.compute = drawing  # type: ignore[method-assign]


# In the test ---------------------------------------------------------------------------------------------------------


def run(
    root: Path,
    overrides: list[str],
    world_size: int,
    kill: Kill | Clock | None = None,
    *,
    outlive_s: float = 0.0,
    hook: Callable[[int], None] | None = None,
    timeout: float = 90.0,
) -> Outcome:
    """Run to the end, or until a rank dies; the others are killed `outlive_s` later.

    Args:
        root: logging.root.
        hook: a function at the top level of a module, called with the rank before the run starts.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "death.json").unlink(missing_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    payload = _dumps((train, (str(root), overrides, kill if isinstance(kill, Kill) else None, hook)))
    logs = [root / f"rank-{rank}.log" for rank in range(world_size)]
    processes, context = [], _server()
    try:
        for rank, log in enumerate(logs):
            log.unlink(missing_ok=True)
            receiver, sender = context.Pipe(duplex=False)
            arguments = (rank, world_size, store.port, "gloo", timeout, str(log), sender, payload)
            process = context.Process(target=_child, args=arguments)
            process.start()
            sender.close()
            processes.append((process, receiver))
        codes = _watch([process for process, _ in processes], logs, root, kill, outlive_s, timeout)
        raised = [_raised(receiver) for _, receiver in processes]
    finally:
        _kill([process for process, _ in processes])
        for _, receiver in processes:
            receiver.close()
    death = root / "death.json"
    said = [_read(log) + error for log, error in zip(logs, raised, strict=True)]
    return Outcome(codes, said, json.loads(death.read_text()) if death.exists() else None)


def _raised(pipe: Connection) -> str:
    """The traceback of a rank that raised, if it did."""
    try:
        return pipe.recv()[1] if pipe.poll() else ""
    except EOFError:
        return ""


def _strike(process: Any, root: Path) -> None:
    write_death(root, checkpoints_of(root), "clock")
    with contextlib.suppress(ProcessLookupError):  # over, and the fork server has taken note of it
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode != -signal.SIGKILL:  # it was over already
        (root / "death.json").unlink()


def _watch(
    processes: list[Any], logs: list[Path], root: Path, kill: Any, outlive_s: float, timeout: float
) -> list[int | None]:
    """Wait for the end of all; after the first that dies, for no longer than `outlive_s`."""
    deadline, clock = time.monotonic() + timeout, kill if isinstance(kill, Clock) else None
    strike: float | None = None
    while any(process.exitcode is None for process in processes):
        if time.monotonic() > deadline:
            raise _hang("the run", processes, [r for r, p in enumerate(processes) if p.exitcode is None], logs)
        if any(process.exitcode for process in processes):
            gentle = all(process.exitcode in (None, 0, 2, 85) for process in processes)  # all ranks end by themselves
            if not gentle:
                time.sleep(outlive_s)
                break
        if clock is not None and strike is None and any("event" not in line for line in lines_of(root)):
            strike = time.monotonic() + clock.seconds
        if clock is not None and strike is not None and time.monotonic() >= strike:
            _strike(processes[clock.rank], root)
            clock = None
        wait([process.sentinel for process in processes if process.exitcode is None], timeout=0.02 if clock else 1.0)
    return [process.exitcode for process in processes]
