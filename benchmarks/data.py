"""How much does the loader cost on top of decoding images? And what do others cost on the same shards?

A small data set is made of crops of the photographs inside scikit-image and scikit-learn: documents and captions in
the published mixture. Then, round after round, as many processes each time:

    bare        decode + resize + normalise, of images that lie in memory, in a loop: nothing else
    loader      StepLoader: plan, read, decode, tokens, masks, batches; pixels normalised where batches arrive
    webdataset  the same shards through webdataset: read, decode, resize, normalise, tokenise, sample by sample
    energon     the same through megatron-energon, which gets an environment of its own (.venvs/energon)

Times include the start of the processes, not what is made once before. Ratios are medians over the rounds of images per
second against bare in the same round; CPU time is that of all processes together.

    python benchmarks/data.py                     # one JSON object on the last line
    python benchmarks/data.py --images 500 --rounds 1 --without energon
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_atum.batch import normalise_pixels
from megatron_atum.config.schema import DataConfig, SourceConfig
from megatron_atum.data.images import decode_image, eval_pixels
from megatron_atum.data.loader import StepLoader
from megatron_atum.data.manifest import Manifest, entry_of, write_manifest
from megatron_atum.data.shards import DocumentRecord, PairRecord, read_shard, write_shard
from megatron_atum.data.sidecar import build_sidecar, sidecar_path
from megatron_atum.data.storage import Storage
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import ConfigError
from megatron_atum.launch.own_environment import make_environment

ROOT = Path(__file__).resolve().parents[1]
IMAGE_SIZE = 224
SEQUENCE_LENGTH = 1024
VOCAB_SIZE = 4000
ROWS_PER_STEP = 8
SAMPLES = {"obelics": 300, "wikipedia": 60, "laion": 900, "pmd": 300}
PER_SHARD = {"documents": 60, "pairs": 150}
KINDS = {"obelics": "documents", "wikipedia": "documents", "laion": "pairs", "pmd": "pairs"}
ENGINES = ("loader", "webdataset", "energon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6000, help="in each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--without", nargs="*", default=[], choices=ENGINES, help="what to leave out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engines = [engine for engine in ENGINES if engine not in options.without]
    if "energon" in engines:
        make_energon()
    with tempfile.TemporaryDirectory(prefix="data-", dir=Path(__file__).parent) as folder:
        data = make_data(Path(folder))
        names = ["bare", *engines]
        rounds = [
            {name: measure(name, data, options.images, options.workers) for name in names}
            for _ in range(options.rounds)
        ]
        fill = fill_of(data)
    report(rounds, options, fill)


def measure(engine: str, data: Path, images: int, workers: int) -> dict[str, float]:
    """Images per second, and CPU milliseconds per image of all processes."""
    if engine == "energon":
        return energon(data, images, workers)
    run: Callable[[Path, int, int], tuple[int, float]] = {"bare": bare, "loader": loader, "webdataset": webdataset}[
        engine
    ]
    cpu = _cpu_s()
    done, wall = run(data, images, workers)
    return {"images_per_s": done / wall, "cpu_ms_per_image": (_cpu_s() - cpu) / done * 1e3}


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


# The engines ---------------------------------------------------------------------------------------------------------


def bare(data: Path, images: int, workers: int) -> tuple[int, float]:
    began = time.perf_counter()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_decode_loop, args=(data, rank, workers, images)) for rank in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return images, time.perf_counter() - began


def _decode_loop(data: Path, rank: int, workers: int, images: int) -> None:
    contents = _contents[data]
    for number in range(rank, images, workers):
        to_pixels(contents[number % len(contents)])


def to_pixels(content: bytes) -> torch.Tensor:
    """[1,3,H,W] float32: what all engines do with each image."""
    pixels = torch.from_numpy(eval_pixels(decode_image(content), IMAGE_SIZE).copy())
    return normalise_pixels(pixels.permute(2, 0, 1)[None])


def step_loader(data: Path, workers: int) -> StepLoader:
    sources = [
        SourceConfig(name, str(data / name / "manifest.json"), kind=kind, max_images=70) for name, kind in KINDS.items()
    ]
    config = DataConfig(sources, tokenizer=str(data), sequence_length=SEQUENCE_LENGTH, augment=False, workers=workers)
    return StepLoader(
        config,
        VOCAB_SIZE,
        IMAGE_SIZE,
        seed=1,
        micro_batch_size=1,
        global_batch_size=ROWS_PER_STEP,
        data_parallel_rank=0,
        data_parallel_size=1,
        tensor_rank=0,
        tensor_size=1,
        encodes_images=True,
    )


def loader(data: Path, images: int, workers: int) -> tuple[int, float]:
    steps, done = step_loader(data, workers), 0
    began = time.perf_counter()
    while done < images:
        for batch in steps.next_step().microbatches:
            done += len(normalise_pixels(batch.pixels))
    wall = time.perf_counter() - began
    steps.close()
    return done, wall


def webdataset(data: Path, images: int, workers: int) -> tuple[int, float]:
    import webdataset as wds

    shards = sorted(str(path) for path in data.glob("*/*.tar"))
    samples = wds.WebDataset(shards, resampled=True, shardshuffle=False, nodesplitter=None).shuffle(500)
    tokenizer = Tokenizer.load(data, VOCAB_SIZE)
    rows = torch.utils.data.DataLoader(
        samples.map(lambda sample: cook(sample, tokenizer)), batch_size=None, num_workers=workers
    )
    done, began = 0, time.perf_counter()
    for pixels, _ in rows:
        done += len(pixels)
        if done >= images:
            break
    wall = time.perf_counter() - began
    del rows
    return done, wall


def cook(sample: dict[str, Any], tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and token ids of a sample as webdataset reads it."""
    contents = [sample[name] for name in sample if name.endswith("jpg")]
    texts = json.loads(sample["json"])["texts"] if "json" in sample else [sample["txt"].decode()]
    ids = [token for text in texts if text for token in tokenizer.encode(text)]
    return torch.cat([to_pixels(content) for content in contents]), torch.tensor(ids)


def energon(data: Path, images: int, workers: int) -> dict[str, float]:
    command = [str(ENERGON / "bin" / "python"), str(Path(__file__).with_name("data_energon.py")), str(data)]
    command += [str(images), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"energon failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


ENERGON = ROOT / ".venvs" / "energon"
ENERGON_PACKAGES = ["megatron-energon==7.4.1", "sentencepiece", "omegaconf", "safetensors", "xxhash"]


def make_energon() -> None:
    """An environment with megatron-energon and what `cook` needs, made once. Ends the program if that cannot be."""
    try:
        make_environment(ENERGON, [f"torch=={torch.__version__.split('+')[0]}", *ENERGON_PACKAGES])
    except ConfigError as error:
        raise SystemExit(f"data: no energon, which --without energon leaves out: {error}") from None


# The data ------------------------------------------------------------------------------------------------------------

_contents: dict[Path, list[bytes]] = {}  # the images of a data set, for `bare`


def make_data(folder: Path) -> Path:
    chance = random.Random(1)
    photos = list(_photos(chance, 400))
    words = _words(chance)
    (folder / "tokenizer.model").write_bytes(_train_tokenizer(chance, words))
    tokenizer, storage = Tokenizer.load(folder, VOCAB_SIZE), Storage()
    for name, kind in KINDS.items():
        (folder / name).mkdir()
        records = [_record(name, number, chance, photos, words) for number in range(SAMPLES[name])]
        entries = []
        for begin in range(0, len(records), PER_SHARD[kind]):
            shard = str(folder / name / f"{begin:06d}.tar")
            write_shard(shard, records[begin : begin + PER_SHARD[kind]])
            sidecar = build_sidecar(shard, kind, tokenizer, storage)
            storage.write(sidecar_path(shard), sidecar.to_bytes())
            entries.append(entry_of(shard, sidecar))
        write_manifest(str(folder / name / "manifest.json"), Manifest(kind, tokenizer.sha256, tuple(entries)), storage)
    shards = sorted(folder.glob("*/*.tar"))
    samples = [members for shard in shards for _, members in read_shard(shard)]
    _contents[folder] = [content for members in samples for name, content in members.items() if name.endswith("jpg")]
    chance.shuffle(_contents[folder])
    return folder


def _photos(chance: random.Random, count: int) -> Iterator[bytes]:
    """JPEGs of 256 to 512 pixels, crops of the photographs of the tiny example."""
    sys.path.insert(0, str(ROOT / "examples" / "tiny"))
    from make_data import PHOTOS, photo_path

    originals = [Image.open(photo_path(package, file)).convert("RGB") for package, file, _ in PHOTOS.values()]
    for number in range(count):
        photo = originals[number % len(originals)]
        width, height = (round(side * chance.uniform(0.5, 1.0)) for side in photo.size)
        left, top = chance.randint(0, photo.width - width), chance.randint(0, photo.height - height)
        size = (chance.randint(256, 512), chance.randint(256, 512))
        stream = io.BytesIO()
        photo.crop((left, top, left + width, top + height)).resize(size).save(stream, "JPEG", quality=88)
        yield stream.getvalue()


def _words(chance: random.Random) -> list[str]:
    return ["".join(chance.choices("etaoinshrdlucmfwypvbgkjqxz", k=chance.randint(2, 9))) for _ in range(6000)]


def _text(chance: random.Random, words: list[str], count: int) -> str:
    return " ".join(words[min(int(chance.expovariate(1 / 900)), len(words) - 1)] for _ in range(count))


def _train_tokenizer(chance: random.Random, words: list[str]) -> bytes:
    import sentencepiece

    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([_text(chance, words, 40) for _ in range(4000)]),
        model_writer=stream,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        minloglevel=2,
    )
    return stream.getvalue()


def _record(
    name: str, number: int, chance: random.Random, photos: list[bytes], words: list[str]
) -> DocumentRecord | PairRecord:
    key = f"{name}{number:06d}"
    if KINDS[name] == "pairs":
        return PairRecord(key, chance.choice(photos), _text(chance, words, chance.randint(8, 22)))
    texts: list[str | None] = []
    images: list[bytes | None] = []
    for _ in range(chance.randint(1, 4) if name == "obelics" else chance.randint(5, 10)):
        texts += [None, _text(chance, words, int(np.clip(chance.lognormvariate(4.3, 0.8), 8, 600)))]
        images += [chance.choice(photos), None]
    return DocumentRecord(key, texts, images, source=name)


# The report ----------------------------------------------------------------------------------------------------------


def fill_of(data: Path) -> float:
    """Real tokens over positions, of 50 steps."""
    steps = step_loader(data, 0)
    packs = [steps._planner.next() for _ in range(50 * ROWS_PER_STEP)]
    return sum(pack.tokens for pack in packs) / (len(packs) * SEQUENCE_LENGTH)


def report(rounds: list[dict[str, dict[str, float]]], options: argparse.Namespace, fill: float) -> None:
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "workers": options.workers,
        "images": options.images,
        "rounds": options.rounds,
    }
    for name in rounds[0]:
        values = {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
        print(f"{name:11} {values['images_per_s']:8.0f} images/s  {values['cpu_ms_per_image']:6.2f} CPU ms/image")
        result[f"{name}_images_per_s"] = round(values["images_per_s"], 1)
        result[f"{name}_cpu_ms_per_image"] = round(values["cpu_ms_per_image"], 3)
        if name != "bare":
            ratios = [one[name]["images_per_s"] / one["bare"]["images_per_s"] for one in rounds]
            result[f"{name}_over_bare_decode"] = round(statistics.median(ratios), 3)
            result[f"{name}_over_bare_decode_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    result["cpu_ms_per_image"] = result.get("loader_cpu_ms_per_image")
    result["fill"] = round(fill, 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
