"""Starts the processes of a layout on this machine, for tools and benchmarks that are started as one process."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def spawn(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(rank, *args)` in several processes and return the results in rank order.

    The processes have the environment of torchrun's workers, so `start_distributed` works in them. `fn` must be at
    the top level of a module that can be imported, and its results such that `torch.save` can write them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the process that raised.
    """
    with tempfile.TemporaryDirectory(prefix="spawn-") as folder:
        arguments = (fn, world_size, _free_port(), folder, args)
        torch.multiprocessing.start_processes(_worker, arguments, nprocs=world_size, start_method="spawn")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _worker(rank: int, fn: Callable[..., Any], world_size: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    threads = max(1, (os.cpu_count() or 1) // world_size)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(threads),
    )
    torch.set_num_threads(threads)
    torch.save(fn(rank, *args), Path(folder) / str(rank))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
