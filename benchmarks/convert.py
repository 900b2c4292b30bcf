"""How fast is a model converted, compared with copying its files, and how much memory does it take?

Makes an IDEFICS folder of random bf16 weights, then in each round, in changing order,

    import  tools/checkpoint/hf_to_atum.py, from start to end of its process, against
    cp      `cp --reflink=never` of the files it reads, with fsync of every copy and of their folder
    export  tools/checkpoint/atum_to_hf.py of what was imported, against
    cp      of the files that it reads

A ratio is the time of `cp` divided by that of the conversion in the same round; the median over the rounds counts. All
read their files from the disk: they are put out of the page cache before, as those of a model larger than the memory
would be. All write to the same disk until everything is on it. Peak memory is `ru_maxrss` of the conversion's process,
which counts mapped files too. At the end the exported tensors are compared with the first ones, bit for bit.

    python benchmarks/convert.py                      # 8 GiB; table; one JSON object on the last line
    python benchmarks/convert.py --gib 40 --folder /mnt/disk --rounds 5

Needs four times --gib on the disk of --folder while it runs. Exit code 1 if a tensor came back changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import torch
from torch import Tensor

from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.hf_folder import IdeficsFolder
from megatron_atum.checkpoint.table import hf_shapes
from megatron_atum.config.loader import preset
from megatron_atum.config.schema import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30


class RandomWeights:
    """Finite bf16 values at random: a TensorSource. One block of them is repeated."""

    def __init__(self, model: ModelConfig) -> None:
        self._shapes = hf_shapes(model)
        self._block = torch.randn(3_000_017, generator=torch.Generator().manual_seed(0)).bfloat16()

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        shape = self._shapes[name]
        first, last, _ = (rows or slice(None)).indices(shape[0])
        part = (last - first, *shape[1:])
        count = torch.Size(part).numel()
        return self._block.repeat(-(-count // len(self._block)))[:count].reshape(part)


def size_of(model: ModelConfig) -> int:
    return 2 * sum(torch.Size(shape).numel() for shape in hf_shapes(model).values())


def make_model(size: int) -> ModelConfig:
    """An IDEFICS of about this many bytes in bf16: the widths of the 9B model, with fewer layers."""
    model = replace(preset("atum-9b"), vocab_size=1 << 15, cross_layer_interval=1)
    if size < 3 * GIB:  # for trying out
        vision = replace(model.vision, embed_dim=64, intermediate_size=128, num_layers=1, num_heads=2)
        narrow = replace(model, hidden_size=512, intermediate_size=1024, num_heads=4, vision=vision)
        model = replace(narrow, perceiver=replace(model.perceiver, depth=1))
    one, two = (size_of(replace(model, num_layers=layers)) for layers in (1, 2))
    return replace(model, num_layers=max(1, round((size - one) / (two - one)) + 1))


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def copy(source: Path, out: Path) -> float:
    """Seconds of a copy with everything on disk."""
    out.mkdir()
    start = time.perf_counter()
    for number, file in enumerate(weight_files(source)):
        subprocess.run(["cp", "--reflink=never", str(file), str(out / str(number))], check=True)
        sync(out / str(number))
    sync(out)
    return time.perf_counter() - start


def put_out_of_cache(folder: Path) -> None:
    """The next to read these files gets them from the disk."""
    os.sync()
    for file in weight_files(folder):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def convert(tool: str, *options: str | Path) -> tuple[float, int]:
    """Seconds and peak memory, in bytes, of one of the tools."""
    command = [sys.executable, str(ROOT / "tools" / "checkpoint" / tool), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{tool} failed:\n{said.read()}")
    return seconds, usage.ru_maxrss * 1024


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    """Names of tensors that are not the same bits in the same shape and dtype."""
    with IdeficsFolder(ours) as one, IdeficsFolder(theirs) as other:
        for name in sorted(one.names() | other.names()):
            both = name in one.names() & other.names() and one.dtype(name) == other.dtype(name)
            if not both or not torch.equal(bits(one.read(name)), bits(other.read(name))):
                yield name


def one_round(folder: Path, backwards: bool) -> dict[str, float]:
    """Seconds of each conversion and of the copy it is compared with, and peak memory in bytes."""
    source, atum, hf = (folder / name for name in ("source", "atum", "exported"))
    for made in (atum, hf):
        shutil.rmtree(made, ignore_errors=True)
    done = {"memory": 0.0}
    for name, tool, read, *options in (
        ("import", "hf_to_atum.py", source, "--hf", source, "--out", atum),
        ("export", "atum_to_hf.py", atum, "--checkpoint", atum, "--out", hf),
    ):
        kinds = ("convert", "copy") if backwards else ("copy", "convert")
        for kind in kinds:
            put_out_of_cache(read)
            if kind == "copy":
                done[f"{name} cp"] = copy(read, folder / "copied")
                shutil.rmtree(folder / "copied")
            else:
                done[name], memory = convert(tool, *options)
                done["memory"] = max(done["memory"], memory)
    return done


COLUMNS = ("import cp", "import", "export cp", "export")


def measure(folder: Path, rounds: int, gib: float) -> dict[str, float]:
    print(" ".join(f"{title:>11}" for title in ("round", "cp s", "import s", "ratio", "cp s", "export s", "ratio")))
    every = []
    for number in range(rounds):
        done = one_round(folder, backwards=number % 2 == 1)
        done |= {f"{name}_ratio": done[f"{name} cp"] / done[name] for name in ("import", "export")}
        every.append(done)
        shown = (done[key] for key in ("import cp", "import", "import_ratio", "export cp", "export", "export_ratio"))
        print(f"{number + 1:>11} " + " ".join(f"{value:>11.2f}" for value in shown), flush=True)

    def middle(key: str) -> float:
        return statistics.median(done[key] for done in every)

    ratios = {key: round(middle(key), 3) for key in ("import_ratio", "export_ratio")}
    speeds = {key.replace(" ", "_") + "_gib_per_s": round(gib / middle(key), 3) for key in COLUMNS}
    peak = max(done["memory"] for done in every)
    return ratios | speeds | {"peak_rss_gib": round(peak / GIB, 3), "rounds": rounds}


def check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 4 * size:
        sys.exit(
            f"convert: {folder} has {free / GIB:.1f} GiB free and four times the size of the model are needed: "
            f"{4 * size / GIB:.1f} GiB; give a smaller --gib or another --folder"
        )


def run(folder: Path, options: argparse.Namespace) -> None:
    check_room(folder, int(options.gib * GIB))
    model = make_model(int(options.gib * GIB))
    size, largest = size_of(model), max(2 * torch.Size(shape).numel() for shape in hf_shapes(model).values())
    write_hf_folder(folder / "source", model, RandomWeights(model), shard_bytes=min(5 * 10**9, size // 3))
    files = len(weight_files(folder / "source"))
    print(f"{size / GIB:.2f} GiB in {files} files, largest tensor {largest / GIB:.3f} GiB, in {folder}")
    report = measure(folder, options.rounds, size / GIB)
    changed = list(differences(folder / "source", folder / "exported"))
    print(f"exported tensors: {'CHANGED: ' + ', '.join(changed[:5]) if changed else 'all bits as they were'}")
    allowed = 2 * largest + GIB
    print(f"peak memory {report['peak_rss_gib']} GiB; 2 x the largest tensor + 1 GiB = {allowed / GIB:.3f} GiB")
    more = {"largest_tensor_gib": round(largest / GIB, 3), "gib": round(size / GIB, 3), "identical": not changed}
    print(json.dumps(report | more))
    sys.exit(1 if changed else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where to work, on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-", dir=options.folder) as folder:
        run(Path(folder), options)


if __name__ == "__main__":
    main()
