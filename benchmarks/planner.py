"""Plans packs from a synthetic data set as large as the real ones: speed, memory, start, restore, mixture and fill.

Writes sidecars and manifests of four sources in the published mixture, in the format that tools/data/index.py writes,
10,000 samples a shard. Numbers of samples follow from the shares of tokens. Lengths are log-normal with the means of
the real sources: documents of obelics 570 tokens and 2.5 images, of wikipedia 630 and 7.7; pairs of laion 30 tokens,
of pmd 24. The planner never reads token ids, so that array is a hole in the file; there are no tars.

A fresh process then opens the manifests and plans, and another restores the state of a run at pack 1.5e8: a real
state, its positions and counts moved to where such a run would be. Both find the files outside the page cache.

    start_s        from opening the manifests to the first pack
    packs_per_s    over --packs packs, changes of shard groups included
    rss_gib        ru_maxrss of the process that planned, which counts mapped files too
    restore_s      from load_state_dict to the next pack; restore_all_s: until every source has given one
    max_share_error_pct   largest difference of a realised share of tokens from the asked one, in percent points;
                   max_relative_share_error_pct: in percent of the asked one
    fill           tokens / (rows x 1024); fill_bound: no packing exceeds it; fill_first_fit: on the same samples

    python benchmarks/planner.py                  # 1e8 samples; table; one JSON object on the last line
    python benchmarks/planner.py --entries 1e6    # quick
    python benchmarks/planner.py --entries 1e9 --folder /mnt/disk

Needs about 55 bytes of disk per sample.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import numpy as np
from numpy.typing import NDArray

from megatron_atum.config.schema import FILTERS, DataConfig, SourceConfig
from megatron_atum.data.fill import fill_of
from megatron_atum.data.flags import mask_of
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from megatron_atum.data.mixture import shares
from megatron_atum.data.order import Epoch
from megatron_atum.data.planner import Planner
from megatron_atum.data.sidecar import SIDECAR_VERSION, Sidecar, SidecarInfo, sidecar_path, usage
from megatron_atum.data.storage import Storage
from megatron_atum.data.stream import WINDOW

GIB = 1 << 30
SHARD_SAMPLES = 10_000
BYTES_PER_SAMPLE = 55
SEED, ROW_TOKENS = 42, DataConfig().sequence_length
GROUP_SAMPLES = DataConfig().shuffle_samples
RESUME_AT = 150_000_000  # packs
SOURCES = {  # kind, mean tokens, their spread (sigma of the logarithm), mean images
    "obelics": ("documents", 570, 0.9, 2.5),
    "wikipedia": ("documents", 630, 0.9, 7.7),
    "laion": ("pairs", 30, 0.5, 1),
    "pmd": ("pairs", 24, 0.4, 1),
}
FILTERED = 0.03  # share of documents that a filter drops
TOKENIZER = sha256(b"").hexdigest()


# A data set --------------------------------------------------------------------------------------------------------


def source_configs(folder: Path) -> list[SourceConfig]:
    return [SourceConfig(name, str(folder / name / "manifest.json"), kind=kind) for name, (kind, *_) in SOURCES.items()]


def asked_shares() -> dict[str, float]:
    return shares([SourceConfig(name, "") for name in SOURCES], "published", {})


def samples_of(entries: int) -> dict[str, int]:
    """Samples of each source: in proportion to its share of tokens over its tokens per sample."""
    asked = asked_shares()
    weights = {name: asked[name] / SOURCES[name][1] for name in SOURCES}
    return {name: max(100, round(entries * weight / sum(weights.values()))) for name, weight in weights.items()}


def write_data_set(folder: Path, entries: int) -> int:
    """Returns the number of samples."""
    counts = samples_of(entries)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir()
        random = np.random.default_rng([SEED, number])
        shards = []
        for first in range(0, count, SHARD_SAMPLES):
            path = str(folder / name / f"{first // SHARD_SAMPLES:06d}.tar")
            shards.append(write_sidecar(path, name, first, min(SHARD_SAMPLES, count - first), random))
        manifest = Manifest(SOURCES[name][0], TOKENIZER, tuple(shards))
        write_manifest(str(folder / name / "manifest.json"), manifest, Storage())
        print(f"{name:10} {count:>12,} samples in {len(shards):,} shards", flush=True)
    return sum(counts.values())


def write_sidecar(path: str, name: str, first: int, count: int, random: np.random.Generator) -> ShardEntry:
    kind = SOURCES[name][0]
    tokens, images = lengths(name, count, random)
    arrays = {
        "first_token": starts(tokens),
        "first_image": starts(images),
        "image_position": image_positions(tokens, images, random),
        "flags": np.zeros(count, np.uint16),
        **members(count, images, random),
        "first_key": np.arange(0, 9 * (count + 1), 9, np.uint32),
        "keys": keys(first, count),
    }
    if kind == "documents":
        arrays["flags"][random.random(count) < FILTERED] = mask_of(["only_image_last"])
    size = int(arrays["member_block"][-1]) * 512 + (1 << 20)
    digest = sha256(b"".join(array.data for array in arrays.values())).hexdigest()  # of all arrays but the hole
    info = SidecarInfo(SIDECAR_VERSION, kind, TOKENIZER, size, "", "", 0, digest)
    hole = int(arrays["first_token"][-1])
    write_safetensors(sidecar_path(path), info, arrays, hole)
    sidecar = Sidecar(info, {**arrays, "ids": np.zeros(0, np.uint16)})
    return ShardEntry(path, count, size, "", digest, "", 0, usage(sidecar))


def lengths(name: str, count: int, random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[n] tokens and images of the samples of a shard."""
    kind, mean, sigma, mean_images = SOURCES[name]
    images = random.geometric(1 / mean_images, count) if kind == "documents" else np.ones(count, np.int64)
    tokens = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count).astype(np.int64)
    return np.maximum(tokens, 5 * images + 3), images  # <s> FAKE IMG FAKE word </s>


def starts(sizes: NDArray[np.int64]) -> NDArray[np.uint32]:
    """[n+1] from [n]"""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint32)


def image_positions(
    tokens: NDArray[np.int64], images: NDArray[np.int64], random: np.random.Generator
) -> NDArray[np.uint32]:
    """[p] one image somewhere in each of as many equal parts of a document; FAKE IMG FAKE lies inside the part."""
    width = np.repeat((tokens - 3) / images, images)
    number = np.arange(len(width)) - np.repeat(np.cumsum(images) - images, images)
    within = np.repeat(images > 1, images) * random.random(len(width)) * (width - 4)
    return (2 + number * width + within).astype(np.uint32)


def members(count: int, images: NDArray[np.int64], random: np.random.Generator) -> dict[str, NDArray[np.uint32]]:
    """[n+p] places of texts and images: a header of one block, then the contents in whole blocks."""
    size = random.integers(100, 60_000, count + int(images.sum()))
    blocks = 1 + -(-size // 512)
    return {"member_block": (np.cumsum(blocks) - blocks + 1).astype(np.uint32), "member_size": size.astype(np.uint32)}


def keys(first: int, count: int) -> NDArray[np.uint8]:
    """[9n] numbers of nine digits"""
    digits = np.arange(first, first + count)[:, None] // 10 ** np.arange(8, -1, -1) % 10
    return (digits + ord("0")).astype(np.uint8).reshape(-1)


def write_safetensors(path: str, info: SidecarInfo, arrays: dict[str, NDArray[Any]], hole: int) -> None:
    """As Sidecar.to_bytes() would write it, with `hole` token ids that are never written."""
    ids = np.broadcast_to(np.uint16(0), hole)
    names = sorted([*arrays, "ids"], key=lambda name: (-(arrays | {"ids": ids})[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {name: str(value) for name, value in asdict(info).items()}}
    place = 0
    for name in names:
        array = ids if name == "ids" else arrays[name]
        dtype = f"U{8 * array.itemsize}"
        header[name] = {"dtype": dtype, "shape": [len(array)], "data_offsets": [place, place + array.nbytes]}
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            if name == "ids":
                file.seek(ids.nbytes, os.SEEK_CUR)
            else:
                file.write(arrays[name].data)
        file.truncate(8 + len(text) + place)


def put_out_of_cache(folder: Path) -> None:
    """The next to read these files gets them from the disk."""
    os.sync()
    for file in folder.glob("*/*"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


# Measured in processes of their own ---------------------------------------------------------------------------------


def open_planner(folder: Path) -> Planner:
    configs = source_configs(folder)
    indexes = []
    for config in configs:
        manifest = read_manifest(config.shards, Storage())
        indexes.append(SourceIndex(config, manifest.shards, list(FILTERS), TOKENIZER, Storage()))
    return Planner(indexes, asked_shares(), ROW_TOKENS, SEED, GROUP_SAMPLES)


def plan(folder: Path, count: int) -> dict[str, Any]:
    """Starts, plans `count` packs, and says what is in them."""
    begin = time.perf_counter()
    planner = open_planner(folder)
    packs = [planner.next()]
    start_s = time.perf_counter() - begin
    begin, cpu = time.perf_counter(), time.process_time()
    packs += [planner.next() for _ in range(count - 1)]
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    state = planner.state_dict()
    return {
        "packs": count,
        "packs_per_s": round((count - 1) / seconds),
        "packs_per_cpu_s": round((count - 1) / cpu),
        "start_s": round(start_s, 3),
        "rss_gib": round(rss / GIB, 3),
        "state_bytes": len(json.dumps(state)),
        "groups_read": {name: 1 + sum(state["sources"][name][1][:2]) for name in SOURCES},
        **mixture_of(planner),
        **fill_table(planner, packs),
        "state": far_state(planner, packs),
    }


def mixture_of(planner: Planner) -> dict[str, Any]:
    tokens = planner.tokens()
    total = sum(tokens.values())
    asked = asked_shares()
    realised = {name: 100 * tokens[name] / total for name in SOURCES}
    return {
        "shares_pct": {name: round(value, 4) for name, value in realised.items()},
        "max_share_error_pct": round(max(abs(realised[name] - 100 * asked[name]) for name in SOURCES), 4),
        "max_relative_share_error_pct": round(max(abs(realised[n] / asked[n] - 100) for n in SOURCES), 4),
    }


def fill_table(planner: Planner, packs: list[Any]) -> dict[str, Any]:
    """Fill of each source and of all; the same with the fewest rows possible, and with first-fit."""
    fills = [
        fill_of(index, [pack for pack in packs if pack.source == number], ROW_TOKENS)
        for number, index in enumerate(planner.indexes)
    ]
    table = {}
    for title, field in (("fill", "rows"), ("fill_bound", "bound_rows"), ("fill_first_fit", "first_fit_rows")):
        rows = [getattr(fill, field) for fill in fills]
        of = {name: fill.tokens / (count * ROW_TOKENS) for name, fill, count in zip(SOURCES, fills, rows, strict=True)}
        of["all"] = sum(fill.tokens for fill in fills) / (sum(rows) * ROW_TOKENS)
        table[title] = {name: round(value, 4) for name, value in of.items()}
    images = [pack.images for pack in packs]
    return {**table, "images_per_row": [min(images), round(sum(images) / len(images), 2), max(images)]}


def far_state(planner: Planner, packs: list[Any]) -> dict[str, Any]:
    """The state of this planner, moved to RESUME_AT packs."""
    state = planner.state_dict()
    total = sum(planner.tokens().values()) / len(packs) * RESUME_AT
    for number, index in enumerate(planner.indexes):
        own = [pack for pack in packs if pack.source == number]
        tokens = round(asked_shares()[index.name] * total)
        samples = tokens * sum(len(pack.samples) for pack in own) / sum(pack.tokens for pack in own)
        state["sources"][index.name][1] = [*place_of(index, samples), tokens, {}]
    return {**state, "packs": RESUME_AT}


def place_of(index: SourceIndex, samples: float) -> list[int]:
    """Epoch, group, window and row after so many samples: the last window of a group, which needs the most work."""
    number, rest = divmod(int(samples), index.usable)
    epoch = Epoch(index, SEED, number, GROUP_SAMPLES)
    group = int(rest / index.usable * len(epoch))
    usable = len(epoch.group(group, ROW_TOKENS).samples)
    return [number, group, max(1, -(-usable // WINDOW)) - 1, 1]


def restore(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    begin = time.perf_counter()
    planner = open_planner(folder)
    opened = time.perf_counter()
    planner.load_state_dict(state)
    pack = planner.next()
    first = time.perf_counter()
    assert pack.id == RESUME_AT
    seen = {pack.source}
    while len(seen) < len(SOURCES):
        seen.add(planner.next().source)
    every = time.perf_counter()
    return {
        "open_s": round(opened - begin, 3),
        "restore_s": round(first - opened, 3),
        "restore_all_s": round(every - opened, 3),
        "restore_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3),
    }


def in_fresh_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# All of it ------------------------------------------------------------------------------------------------------------


def check_room(folder: Path, entries: int) -> None:
    free, need = shutil.disk_usage(folder).free, BYTES_PER_SAMPLE * entries
    if free < 1.2 * need:
        sys.exit(
            f"planner: {folder} has {free / GIB:.1f} GiB free, and {entries:,} entries need {1.2 * need / GIB:.1f}; "
            "give fewer --entries or another --folder"
        )


def table(report: dict[str, Any]) -> Iterator[str]:
    yield f"{'':12}{'tokens %':>10}{'fill':>9}{'bound':>9}{'first-fit':>11}"
    for name in [*SOURCES, "all"]:
        share = report["shares_pct"].get(name, 100.0)
        values = [report[key][name] for key in ("fill", "fill_bound", "fill_first_fit")]
        yield f"{name:12}{share:10.3f}{values[0]:9.4f}{values[1]:9.4f}{values[2]:11.4f}"
    for key in ("packs_per_s", "rss_gib", "start_s", "restore_s", "restore_all_s", "max_share_error_pct"):
        yield f"{key:20} {report[key]}"


def run(folder: Path, entries: int, packs: int) -> None:
    check_room(folder, entries)
    begin = time.perf_counter()
    written = write_data_set(folder, entries)
    size = sum(file.stat().st_blocks * 512 for file in folder.glob("*/*"))
    print(f"{size / GIB:.2f} GiB in {folder}, written in {time.perf_counter() - begin:.0f} s", flush=True)
    put_out_of_cache(folder)
    report = {"entries": written, **in_fresh_process(plan, folder, packs)}
    state = report.pop("state")
    put_out_of_cache(folder)
    report |= in_fresh_process(restore, folder, state)
    print("\n".join(table(report)))
    print(json.dumps(report | {"disk_gib": round(size / GIB, 3)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=float, default=1e8, help="samples of all sources (default: %(default)g)")
    parser.add_argument("--packs", type=float, default=30_000, help="packs to plan (default: %(default)g)")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where to work (default: here)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="planner-", dir=options.folder) as folder:
        run(Path(folder), int(options.entries), int(options.packs))


if __name__ == "__main__":
    main()
