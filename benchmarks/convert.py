"""How fast is a model converted, compared with copying its files, and how much memory does it take?

Makes an IDEFICS folder of random bf16 weights, then in each round, in changing order,

    cp      `cp --reflink=never` of its weights, with fsync of every copy and of their folder
    import  tools/checkpoint/hf_to_atum.py, from start to end of its process
    export  tools/checkpoint/atum_to_hf.py of what was imported

A ratio is the time of `cp` divided by that of the conversion in the same round; the median over the rounds counts. All
three read the same bytes from the page cache if they fit into memory, and write to the same disk until everything is
on it. Peak memory is `ru_maxrss` of the conversion's process, which counts mapped files too. At the end the exported
tensors are compared with the first ones, bit for bit.

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
from collections.abc import Callable, Iterator
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
    return sorted(folder.glob("*.safetensors"))


def copy(source: Path, out: Path) -> float:
    """Seconds of a copy with everything on disk."""
    out.mkdir()
    start = time.perf_counter()
    for file in weight_files(source):
        subprocess.run(["cp", "--reflink=never", str(file), str(out)], check=True)
        sync(out / file.name)
    sync(out)
    return time.perf_counter() - start


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


def one_round(folder: Path, backwards: bool) -> dict[str, tuple[float, int]]:
    """Seconds and peak memory of each. The export needs the import, so the copy changes its place."""
    source, atum, hf, copied = (folder / name for name in ("source", "atum", "exported", "copied"))
    for made in (atum, hf, copied):
        shutil.rmtree(made, ignore_errors=True)
    os.sync()
    steps: dict[str, Callable[[], tuple[float, int]]] = {
        "cp": lambda: (copy(source, copied), 0),
        "import": lambda: convert("hf_to_atum.py", "--hf", source, "--out", atum),
        "export": lambda: convert("atum_to_hf.py", "--checkpoint", atum, "--out", hf),
    }
    order = ["import", "export", "cp"] if backwards else ["cp", "import", "export"]
    result = {}
    for name in order:
        result[name] = steps[name]()
        if name == "cp":
            shutil.rmtree(copied)
            os.sync()
    return result


def measure(folder: Path, rounds: int, gib: float) -> dict[str, float]:
    print(f"{'round':>5} {'cp s':>8} {'import s':>9} {'export s':>9} {'import/cp':>10} {'export/cp':>10}", flush=True)
    ratios: dict[str, list[float]] = {"import": [], "export": []}
    seconds: dict[str, list[float]] = {"cp": [], "import": [], "export": []}
    peak = 0
    for number in range(rounds):
        done = one_round(folder, backwards=number % 2 == 1)
        for name, (time_taken, memory) in done.items():
            seconds[name].append(time_taken)
            peak = max(peak, memory)
        for name, found in ratios.items():
            found.append(done["cp"][0] / done[name][0])
        times = " ".join(f"{done[name][0]:{width}.2f}" for name, width in (("cp", 8), ("import", 9), ("export", 9)))
        print(f"{number + 1:>5} {times} {ratios['import'][-1]:>10.2f} {ratios['export'][-1]:>10.2f}", flush=True)
    speed = {f"{name}_gib_per_s": round(gib / statistics.median(values), 3) for name, values in seconds.items()}
    medians = {f"{name}_ratio": round(statistics.median(values), 3) for name, values in ratios.items()}
    return medians | speed | {"peak_rss_gib": round(peak / GIB, 3), "rounds": rounds}


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
