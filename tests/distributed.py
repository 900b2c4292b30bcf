"""Runs a function in several processes that form a torch.distributed group.

With gloo all processes are forks of one server that imports the heavy packages once per test session, so a launch
costs some tenths of a second after the first; they see no accelerator. With nccl they start anew. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What the server imports. Nothing of this project: a child must see the code that the test sees.
PRELOAD = [
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "megatron.core",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.models.gpt.gpt_layer_specs",
    "transformers.models.clip.modeling_clip",
    "transformers.models.idefics.image_processing_idefics",
    "transformers.models.idefics.modeling_idefics",
    "transformers.models.llama.modeling_llama",
    "omegaconf",
    "PIL.Image",
    "safetensors.torch",
    "sentencepiece",
    "webdataset",
]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    # megatron-core warns six times that the packages are not there, which they need not be.
    "PYTHONWARNINGS": "ignore:Transformer Engine and Apex are not installed,ignore:Apex is not installed",
}

SERVER_ENVIRONMENT = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}  # its forks could not use a device it had opened

EXIT_GRACE_S = 15.0  # from the last result to the end of the last process
STACK_WAIT_S = 3.0  # for the ranks of a hanging run to write their stacks


class DistributedError(AssertionError):
    """A rank raised, died or hung. `rank` is the one to look at first; None if the run hung."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", timeout: float = 120.0
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` on every rank and returns the results in rank order.

    Args:
        fn: a function at the top level of a module that can be imported.
        world_size: number of processes.
        args: whatever `torch.save` can write; each rank gets its own copy.
        backend: gloo or nccl. With nccl rank r has cuda:r as its current device.
        timeout: seconds for everything, from launch to the end of the last process.

    Every rank has the default process group, one thread, and RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT in its environment. The rest of the environment is that of the first launch of the
    session: pass what a test changes as an argument. What the ranks print is printed here after the run.

    Raises:
        DistributedError: as soon as a rank raises or dies, with its traceback; after `timeout` seconds, with the
            stack of every rank that still runs. No process outlives the call.
    """
    if "<" in fn.__qualname__ or fn.__module__ == "__main__":
        raise TypeError(f"{fn.__module__}.{fn.__qualname__} must be a function at the top level of a test module")
    deadline = time.monotonic() + timeout
    payload = _dumps((fn, args))
    # The store lives here, so that no rank can take it along when it dies, and binds its port before anyone uses it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = _server() if backend == "gloo" else _fresh()
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="run-distributed-") as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(world_size)]
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child,
                    args=(rank, world_size, store.port, backend, timeout, str(logs[rank]), sender, payload),
                    name=f"{fn.__name__}[{rank}]",
                )
                with _environment(ENVIRONMENT):  # of a fresh process; the server has its own
                    process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            results = _collect(fn.__name__, processes, pipes, logs, deadline)
        finally:
            _kill(processes)
            for pipe in pipes:
                pipe.close()
        for log in logs:
            sys.stdout.write(_read(log))
        return [_loads(result) for result in results]


def _collect(
    name: str, processes: list[BaseProcess], pipes: list[Connection], logs: list[Path], deadline: float
) -> list[bytes]:
    """Waits for one message of each rank, then for the processes to end."""
    results: dict[int, bytes] = {}
    while len(results) < len(processes):
        waiting = [rank for rank in range(len(processes)) if rank not in results]
        patience = max(0.0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait([pipes[rank] for rank in waiting], timeout=patience)
        if not ready:
            raise _hang(name, processes, waiting, logs)
        errors: list[tuple[float, int, str]] = []
        for rank in waiting:
            if pipes[rank] not in ready:
                continue
            try:
                when, error, result = pipes[rank].recv()
            except EOFError:  # died without a word; a rank that raised at the same time knows more
                processes[rank].join(EXIT_GRACE_S)
                when, error, result = float("inf"), f"died, {_exit_reason(processes[rank].exitcode)}", b""
            if error:
                errors.append((when, rank, error))
            results[rank] = result
        if errors:
            _, rank, error = min(errors)
            raise DistributedError(f"rank {rank} of {name}: {error}{_tail(logs[rank])}", rank)
    exit_deadline = min(deadline, time.monotonic() + EXIT_GRACE_S)
    for process in processes:
        process.join(max(0.0, exit_deadline - time.monotonic()))
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    if alive:
        raise _hang(f"{name}, after its result,", processes, alive, logs)
    for rank, process in enumerate(processes):
        if process.exitcode != 0:
            reason = _exit_reason(process.exitcode)
            raise DistributedError(
                f"rank {rank} of {name} ended after its result with {reason}{_tail(logs[rank])}", rank
            )
    return [results[rank] for rank in range(len(processes))]


def _child(
    rank: int, world_size: int, port: int, backend: str, timeout: float, log: str, pipe: Connection, payload: bytes
) -> None:
    """What every rank runs."""
    os.setpgid(0, 0)  # so that the parent can end this process together with its own children
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the server, which dies with the test run
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    faulthandler.enable(log_fd)
    faulthandler.register(signal.SIGUSR1, file=log_fd, all_threads=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.environ.update(
        ENVIRONMENT,  # a server that somebody else has started does not have it
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        torch.set_num_threads(1)
        fn, args = _loads(payload)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        # The group waits longer than the parent, so that a hang is reported by the parent, with all stacks.
        patience = datetime.timedelta(seconds=timeout + 60)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
        result = _dumps(fn(rank, world_size, *args))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        when = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            pipe.send((when, "raised\n" + traceback.format_exc(), b""))
        os._exit(1)
    pipe.send((time.monotonic(), "", result))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()


def _server() -> multiprocessing.context.ForkServerContext:
    """The context whose server is started, with the heavy packages, by the first call of the session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)  # without effect once the server runs
    with _environment(SERVER_ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    return context


def _fresh() -> multiprocessing.context.SpawnContext:
    """For accelerators. Every process imports everything anew."""
    return multiprocessing.get_context("spawn")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _hang(name: str, processes: list[BaseProcess], ranks: list[int], logs: list[Path]) -> DistributedError:
    """Asks the ranks that have not finished for their stacks."""
    before = {rank: len(_read(logs[rank])) for rank in ranks}
    for rank in ranks:
        if logs[rank].exists():  # else it has not come as far as to handle the signal
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[rank].pid or 0, signal.SIGUSR1)
    wait_until = time.monotonic() + STACK_WAIT_S
    while time.monotonic() < wait_until and any(len(_read(logs[rank])) == before[rank] for rank in ranks):
        time.sleep(0.05)
    time.sleep(0.1)  # a stack is written line by line
    stacks = "".join(f"\n--- rank {rank} ---\n{_read(logs[rank])[-8000:] or '(not started)'}" for rank in ranks)
    return DistributedError(f"{name} did not end in time; still running: ranks {ranks}{stacks}")


def _kill(processes: list[BaseProcess]) -> None:
    """Ends every process and what it started."""
    for process in processes:
        try:
            os.killpg(process.pid or 0, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
    for process in processes:
        process.join()
        process.close()


def _exit_reason(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _read(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def _tail(log: Path, characters: int = 4000) -> str:
    text = _read(log)[-characters:]
    return f"\n--- what it printed ---\n{text}" if text else ""


def _dumps(value: Any) -> bytes:
    """Through torch.save, which copies tensors; pickling them for a process would share their memory."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loads(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
