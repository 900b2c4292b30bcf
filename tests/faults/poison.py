"""A source that is learnt quickly, with one shard in its middle that is garbage."""

from __future__ import annotations

import io
import random
from pathlib import Path

from PIL import Image

from megatron_atum.data.rng import Random
from megatron_atum.data.shards import PairRecord, write_shard

SOURCE, SEED = "poisoned", 42
GOOD_SAMPLES, BAD_SAMPLES = 1000, 100
CAPTIONS = ("a red cup of coffee on a wooden table", "many distant galaxies in a black sky")
LETTERS = "bcdfghjklmnpqrstvwxz"


def make_poisoned(folder: Path, tokenizer: Path) -> list[str]:
    """Overrides of a run that reads the shards one after the other, the garbage as the second one."""
    folder.mkdir(parents=True)
    second = int(Random(SEED, "shards", SOURCE, 0).permutation(3)[1])
    for shard in range(3):
        write_shard(folder / f"{SOURCE}-{shard:05d}.tar", _records(shard, garbage=shard == second))
    source = f"{{name: {SOURCE}, shards: '{folder}/{SOURCE}-*.tar', kind: pairs, weight: 1.0, max_images: 8}}"
    return [
        f"data.tokenizer={tokenizer}",
        f"data.sources=[{source}]",
        "data.shuffle_samples=1",  # whole shards
        f"training.seed={SEED}",
        "optimizer.lr=1e-2",
        "optimizer.decay_steps=1000",
        "health.spike_window=16",
        "checkpoint.keep=0",
    ]


def _records(shard: int, garbage: bool) -> list[PairRecord]:
    rng, image = random.Random(shard), _image()
    count = BAD_SAMPLES if garbage else GOOD_SAMPLES
    return [
        PairRecord(f"{shard}-{number}", image, _garbage(rng) if garbage else CAPTIONS[number % len(CAPTIONS)])
        for number in range(count)
    ]


def _garbage(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(20))


def _image() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (28, 28), (200, 60, 20)).save(stream, "JPEG")
    return stream.getvalue()
