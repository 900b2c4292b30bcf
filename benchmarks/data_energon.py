"""The energon part of data.py, run in an environment of its own: DATA IMAGES WORKERS; JSON on the last line."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from data import KINDS, VOCAB_SIZE, _cpu_s, cook
from megatron.energon import (
    BaseWebdatasetFactory,
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    TextSample,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_train_dataset,
    stateless,
)

from megatron_atum.data.tokenizer import Tokenizer

DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
    """Samples as they are read; `cook` makes pixels and token ids of them."""

    decoder = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.cookers = [Cooker(self._cook)]

    @stateless  # type: ignore[untyped-decorator]
    def _cook(self, sample: CrudeSample) -> TextSample:
        return TextSample(**basic_sample_keys(sample), text=cook(sample, self._tokenizer))

    def batch(self, samples: list[Any]) -> Any:
        return [sample.text for sample in samples]


def prepare(data: Path) -> Path:
    """energon's files, beside the shards of each source and once for all of them."""
    for name in KINDS:
        folder = data / name
        if not (folder / ".nv-meta").exists():
            shards = sorted(path.name for path in folder.glob("*.tar"))
            BaseWebdatasetFactory.prepare_dataset(folder, shards, split_parts_ratio=[("train", 1.0)], workers=1)
            (folder / ".nv-meta" / "dataset.yaml").write_text(DATASET_YAML)
    blend = "".join(f"      - path: ./{name}\n        weight: {1 / len(KINDS)}\n" for name in KINDS)
    file = data / "energon.yaml"
    file.write_text("__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n" + blend)
    return file


def main() -> None:
    data, images, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        dataset_file = prepare(data)
    cpu = _cpu_s()
    dataset = get_train_dataset(
        dataset_file,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=1,
        task_encoder=Encoder(Tokenizer.load(data, VOCAB_SIZE)),
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
    )
    done, began = 0, time.perf_counter()
    for batch in get_loader(dataset):
        done += sum(len(pixels) for pixels, _ in batch)
        if done >= images:
            break
    wall = time.perf_counter() - began
    # Its workers do not end by themselves, so they are not counted as ended children either.
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    cpu_s = _cpu_s() - cpu + sum(used.user + used.system for used in times)
    print(json.dumps({"images_per_s": done / wall, "cpu_ms_per_image": cpu_s / done * 1e3}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
