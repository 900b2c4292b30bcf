"""How long does a checkpoint stop training: saved synchronously, and beside training?

Two processes (data parallel, distributed optimizer), at least --gib of weights and optimizer state on each, all of it
trainable, fp32. In each round every process saves once synchronously and once asynchronously, and once writes as many
bytes to a plain file; all is on disk at the end of each. After the asynchronous save training goes on, step by step,
until the checkpoint is complete. Blocked is what training does not get: synchronously the whole save, asynchronously
the copy and the final agreement. Reported are medians over the rounds, of the slowest process in each; the first
asynchronous save also allocates the memory for the copies and is reported by itself.

    python benchmarks/checkpoint_stall.py              # 1.1 GiB per process; one JSON object on the last line
    python benchmarks/checkpoint_stall.py --gib 0.05   # quick
    python benchmarks/checkpoint_stall.py --folder F   # on another disk

On one machine the processes share the disk and, while they train, the cores with the writing threads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_atum.batch import NO_IMAGE, Batch
from megatron_atum.checkpoint.run_checkpoint import RunCheckpoint, Saved
from megatron_atum.checkpoint.weights import initialise
from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.parallel.groups import build_groups, start_distributed, stop_distributed
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.parallel.spawn import spawn
from megatron_atum.training.engine import Engine

WORLD_SIZE = 2
TOKENS = 32
BYTES_PER_WEIGHT = 4 / WORLD_SIZE + 8 / WORLD_SIZE  # weights are dealt out, moments sharded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.1, help="per process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where to write (default: beside this program)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stall-", dir=options.folder or Path(__file__).parent) as folder:
        _check_space(Path(folder), options.gib)
        ranks = spawn(measure, WORLD_SIZE, options.gib, options.rounds, folder)
    report(ranks)


def _check_space(folder: Path, gib: float) -> None:
    need, free = int(gib * WORLD_SIZE * 4 * 2**30), shutil.disk_usage(folder).free
    if free < need:
        raise SystemExit(f"{folder} has {free / 2**30:.1f} GiB free, {need / 2**30:.1f} are needed: use --folder")


def measure(rank: int, gib: float, rounds: int, folder: str) -> dict[str, Any]:
    start_distributed()
    config = _config(gib)
    groups = build_groups(ParallelLayout.from_config(config, WORLD_SIZE), seed=1)
    engine = Engine(config, groups)
    initialise(engine.stages, config.model, groups, seed=1)
    engine.build_optimizer()
    checkpoint = RunCheckpoint(config, groups, engine, Path(folder) / "checkpoints", {})
    batches = [_batch(config)]
    engine.step(batches)
    _saved(checkpoint, checkpoint.save(0, {}) + checkpoint.wait())  # the frozen weights, too, if there are any
    size = sum(file.stat().st_size for file in (Path(folder) / "checkpoints").rglob(f"*-{rank:05d}-*"))
    found = [_round(number, size, checkpoint, engine, batches, folder) for number in range(rounds)]
    stop_distributed()
    return {"bytes": size, "rounds": found}


def _config(gib: float) -> Config:
    """A model with so many weights that each process holds `gib` of weights and moments."""
    width = 1024 if gib >= 0.5 else 256
    per_layer = (4 + 6) * width**2 + (2 + 6) * width**2  # decoder layer, cross-attention layer
    layers = max(1, round((gib * 2**30 / BYTES_PER_WEIGHT) / per_layer))
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_layers": layers, "num_heads": 8}
    return load_config(
        None,
        [
            "model.preset=tiny",
            *(f"model.{key}={value}" for key, value in sizes.items()),
            f"data.sequence_length={TOKENS}",
            "training.global_batch_size=2",
            "training.precision=fp32",
            "optimizer.warmup_steps=0",
            "checkpoint.keep=1",
            "data.sources=[{name: random, shards: none}]",
        ],
    )


def _batch(config: Config) -> Batch:
    """A row of random tokens without images."""
    ids = torch.randint(3, config.model.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    side = config.model.vision.image_size
    return Batch(
        input_ids=ids,
        labels=torch.roll(ids, -1, -1),
        loss_mask=torch.ones(1, TOKENS),
        z_mask=torch.ones(1, TOKENS),
        position_ids=torch.arange(TOKENS)[None],
        pixels=torch.zeros(0, 3, side, side),
        image_index=torch.full((1, TOKENS), NO_IMAGE),
        images_per_row=torch.zeros(1, dtype=torch.int64),
        source=("random",),
        pack_ids=torch.zeros(1, dtype=torch.int64),
    )


def _round(
    number: int, size: int, checkpoint: RunCheckpoint, engine: Engine, batches: list[Batch], folder: str
) -> dict[str, float]:
    config, first = checkpoint.config.checkpoint, 10 * number + 1
    alone = _timed(lambda: engine.step(batches))
    config.asynchronous = False
    synchronous = _saved(checkpoint, checkpoint.save(first, {}))
    config.asynchronous = True
    over, steps = checkpoint.save(first + 1, {}), []
    while not over:
        steps.append(_timed(lambda: engine.step(batches)))
        over = checkpoint.poll()
    asynchronous = _saved(checkpoint, over)
    return {
        "sync": synchronous.blocked_s,
        "async": asynchronous.blocked_s,
        "async_total": asynchronous.total_s,
        "raw": _raw_write(Path(folder) / f"raw-{dist.get_rank()}", size),
        "step_alone": alone,
        "step_beside": statistics.median(steps),
    }


def _timed(work: Any) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _saved(checkpoint: RunCheckpoint, over: list[Saved]) -> Saved:
    (saved,) = over
    if saved.error:
        raise SystemExit(saved.error)
    dist.barrier()
    return saved


def _raw_write(path: Path, size: int) -> float:
    """Seconds to have as many bytes on disk in one plain file."""
    piece = memoryview(torch.randint(0, 256, (64 << 20,), dtype=torch.uint8).numpy())

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for place in range(0, size, len(piece)):
                file.write(piece[: min(len(piece), size - place)])
            os.fsync(file.fileno())

    seconds = _timed(write)
    path.unlink()
    return seconds


def report(ranks: list[dict[str, Any]]) -> None:
    rounds = [
        {key: max(rank["rounds"][number][key] for rank in ranks) for key in ranks[0]["rounds"][0]}
        for number in range(len(ranks[0]["rounds"]))
    ]
    print("round   sync s  async s  ratio  in all s   raw s  step alone / beside s")
    for number, one in enumerate(rounds):
        print(
            f"{number:>5} {one['sync']:>8.3f} {one['async']:>8.3f} {one['async'] / one['sync']:>6.2f} "
            f"{one['async_total']:>9.3f} {one['raw']:>7.3f} {one['step_alone']:>11.3f} / {one['step_beside']:.3f}"
        )
    later = rounds[1:] or rounds

    def middle(key: str) -> float:
        return round(statistics.median(one[key] for one in later), 4)

    result = {
        "blocked_s_sync": middle("sync"),
        "blocked_s_async": middle("async"),
        "blocked_s_async_first": round(rounds[0]["async"], 4),
        "raw_write_s": middle("raw"),
        "ratio": round(statistics.median(one["async"] / one["sync"] for one in later), 4),
        "async_until_complete_s": middle("async_total"),
        "step_s_alone": middle("step_alone"),
        "step_s_beside": middle("step_beside"),
        "gib_per_rank": round(min(rank["bytes"] for rank in ranks) / 2**30, 3),
        "rounds": len(rounds),
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(result))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
