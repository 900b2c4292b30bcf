"""How fast shards are read and checkpoints written, by all processes at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_atum.errors import first_line, listed
from megatron_atum.launch.check_report import FAILED, NOT_CHECKED, OK, WARNING, Line, Node, in_gb

BLOCK = 8 << 20
MOST_FILES = 10_000  # that are looked for in a folder
STRAGGLER = 0.5  # of the median node
NEARLY_FULL = 0.05  # of the space is left


@dataclass(frozen=True)
class Moved:
    """Of one process."""

    size: int = 0  # bytes
    seconds: float = 0.0
    problem: str = ""
    free_bytes: int = 0  # where it was written
    total_bytes: int = 0


def read_files(path: Path, rank: int, size: int) -> Moved:
    """Read up to so many bytes of the files at or below a path, each process beginning with another one."""
    try:
        found = islice((file for file in path.rglob("*") if file.is_file()), MOST_FILES)
        files = [path] if path.is_file() else sorted(found)
        if not files:
            return Moved(problem=f"{path} is no file and no folder with files")
        first = rank % len(files)
        done = 0
        began = time.perf_counter()
        for file in files[first:] + files[:first]:
            done += _read(file, size - done)
            if done >= size:
                break
        return Moved(done, time.perf_counter() - began)
    except OSError as error:
        return Moved(problem=first_line(error))


def _read(file: Path, most: int) -> int:
    """From the storage, as far as this host's memory can be told to forget the file."""
    done = 0
    with open(file, "rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while done < most and (block := source.read(min(BLOCK, most - done))):
            done += len(block)
    return done


def write_file(folder: Path, rank: int, size: int) -> Moved:
    """Write, flush to the storage, read back and delete a file of this process."""
    file = folder / f".check_cluster-{rank}-{os.getpid()}"
    block = os.urandom(min(BLOCK, size))  # nothing that storage could compress
    try:
        began = time.perf_counter()
        with open(file, "wb", buffering=0) as target:
            done = 0
            while done < size:
                done += target.write(block[: size - done])
            os.fsync(target.fileno())
        seconds = time.perf_counter() - began
        space = shutil.disk_usage(folder)
        problem = "" if _holds(file, block, size) else f"{folder} gives back something else than was written"
        return Moved(size, seconds, problem, space.free, space.total)
    except OSError as error:
        return Moved(problem=first_line(error))
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _holds(file: Path, block: bytes, size: int) -> bool:
    left = size
    with open(file, "rb") as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while left > 0:
            wanted = block[:left]
            if source.read(len(wanted)) != wanted:
                return False
            left -= len(wanted)
    return True


def storage_line(name: str, path: Path | None, option: str, moved: Mapping[int, Moved], nodes: Sequence[Node]) -> Line:
    """Args: option: that names the path. moved: by rank."""
    if path is None:
        return Line(name, NOT_CHECKED, f"{option} not given")
    problems = {rank: one.problem for rank, one in moved.items() if one.problem}
    if problems:
        found = listed([f"rank {rank}: {problem}" for rank, problem in problems.items()], 3, "; ")
        return Line(name, FAILED, found, f"{option} must be there, with the same rights, on every node")
    silent = [str(rank) for node in nodes for rank in node.ranks if rank not in moved]
    if silent:
        advice = "they ended before, or stand still there: a mount that does not answer (df, dmesg)"
        return Line(name, FAILED, f"nothing from ranks {listed(silent, 8)}", advice)
    of_nodes = {node.label: _rate([moved[rank] for rank in node.ranks]) for node in nodes}
    worst = min(of_nodes, key=lambda label: of_nodes[label])
    total, median = _rate(list(moved.values())), statistics.median(of_nodes.values())
    found = f"{in_gb(total)} by all together, {in_gb(of_nodes[worst])} at the slowest node"
    spaces = [one for one in moved.values() if one.total_bytes]
    if spaces:
        fullest = min(spaces, key=lambda one: one.free_bytes / one.total_bytes)
        found += f", {fullest.free_bytes / 1e9:.0f} GB free"
        if fullest.free_bytes < NEARLY_FULL * fullest.total_bytes:
            return Line(name, WARNING, found, "nearly full: a checkpoint that does not fit ends a run; make room")
    if of_nodes[worst] < STRAGGLER * median:
        return Line(name, WARNING, found, f"{worst} is much slower than the others ({in_gb(median)} in the median)")
    return Line(name, OK, found)


def _rate(moved: Sequence[Moved]) -> float:
    """Of processes that began at about the same time."""
    seconds = max((one.seconds for one in moved), default=0.0)
    return sum(one.size for one in moved) / seconds if seconds else 0.0
