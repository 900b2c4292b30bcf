"""A small data set of real photographs, made once, and short ways to shards, sources and loaders."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_atum.config.schema import DataConfig, SourceConfig
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.loader import StepLoader
from megatron_atum.data.manifest import Manifest, entry_of, write_manifest
from megatron_atum.data.sidecar import SIDECAR_VERSION, Sidecar, SidecarInfo, build_sidecar, sidecar_path
from megatron_atum.data.storage import Storage, list_files
from megatron_atum.data.tokenizer import Tokenizer

VOCAB_SIZE = 512
PLACEMENT: dict[str, Any] = {  # of a loader that has everything
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "data_parallel_rank": 0,
    "data_parallel_size": 1,
    "tensor_rank": 0,
    "tensor_size": 1,
    "encodes_images": True,
}


def document_json(*places: str | None, **changes: Any) -> bytes:
    """A KEY.json. Places: text, or None for the next image (000.jpg, ...), or "" for a lost one."""
    texts = [place or None for place in places]
    number = iter(range(len(places)))
    images = [f"{next(number):03d}.jpg" if place is None else "" if place == "" else None for place in places]
    return json.dumps({"version": 1, "texts": texts, "images": images} | changes).encode()


def write_members(path: Path, *members: tuple[str, bytes], format: int = tarfile.GNU_FORMAT) -> None:
    """A tar as someone else might write it."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_index(pattern: Path, kind: str, tokenizer: Tokenizer, manifest: Path | None = None) -> None:
    """A sidecar for each shard and, when it is named, a manifest."""
    storage, entries = Storage(), []
    for path in list_files(str(pattern)):
        sidecar = build_sidecar(path, kind, tokenizer, storage)
        storage.write(sidecar_path(path), sidecar.to_bytes())
        entries.append(entry_of(path, sidecar))
    if manifest is not None:
        write_manifest(str(manifest), Manifest(kind, tokenizer.sha256, tuple(entries)), storage)


def fake_sidecar(kind: str, tokens: Sequence[int], positions: Sequence[Sequence[int]], flags: Any = None) -> Sidecar:
    """The index of a shard that does not exist: n samples with so many tokens and images at these places."""
    count, images = len(tokens), [len(one) for one in positions]
    first_token, first_image = (np.cumsum([0, *sizes]).astype(np.uint32) for sizes in (tokens, images))
    arrays = {
        "first_token": first_token,
        "first_image": first_image,
        "image_position": np.array([place for one in positions for place in one], np.uint32),
        "flags": np.zeros(count, np.uint16) if flags is None else np.array(flags, np.uint16),
        "member_block": np.zeros(count + sum(images), np.uint32),
        "member_size": np.zeros(count + sum(images), np.uint32),
        "first_key": np.arange(count + 1, dtype=np.uint32),
        "keys": np.full(count, ord("k"), np.uint8),
        "ids": np.zeros(sum(tokens), np.uint16),
    }
    return Sidecar(SidecarInfo(SIDECAR_VERSION, kind, "t", 0, "", "", 0), arrays)


def fake_index(
    name: str, sidecars: Iterable[Sidecar], kind: str = "documents", max_images: int = 6, filters: Any = ()
) -> SourceIndex:
    """A source of shards that do not exist."""
    in_memory = dict(enumerate(sidecars))
    entries = tuple(entry_of(f"{number}.tar", sidecar) for number, sidecar in in_memory.items())
    source = SourceConfig(name, "*.tar", kind=kind, max_images=max_images)
    return SourceIndex(source, entries, list(filters), "t", Storage(), in_memory)


def random_index(
    name: str,
    shards: Sequence[int],
    tokens: tuple[int, int],
    images: tuple[int, int],
    kind: str = "documents",
    max_images: int = 6,
) -> SourceIndex:
    """A source with so many samples in each shard, tokens and images of a sample drawn from the two ranges."""
    random = np.random.default_rng(sum(shards))
    sidecars = []
    for count in shards:
        sizes = random.integers(*tokens, count)
        most = (sizes - 2) // 3  # <s>, </s> and three tokens of each image
        numbers = np.minimum(random.integers(*images, count), most)
        places = [2 + 3 * np.sort(random.permutation(m)[:n]) for m, n in zip(most, numbers, strict=True)]
        sidecars.append(fake_sidecar(kind, sizes.tolist(), [one.tolist() for one in places]))
    return fake_index(name, sidecars, kind, max_images)


@pytest.fixture(scope="session")
def make_data_script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "make_data.py"
    spec = importlib.util.spec_from_file_location("tiny_make_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_data_script: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_data_script.make_data(folder, repeat_documents=3)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.load(tiny, VOCAB_SIZE)


@pytest.fixture(scope="session")
def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 100, 50)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def data_config(tiny: Path) -> Callable[..., DataConfig]:
    def make(**changes: Any) -> DataConfig:
        sources = [
            SourceConfig("web", str(tiny / "documents-*.tar"), weight=3.0, kind="documents", max_images=6),
            SourceConfig("captions", str(tiny / "pairs-*.tar"), weight=1.0, kind="pairs", max_images=4),
        ]
        values = {"sources": sources, "tokenizer": str(tiny), "sequence_length": 256, "p_next": 0.5, "workers": 0}
        return DataConfig(**(values | {"filters": []} | changes))

    return make


@pytest.fixture
def make_loader(data_config: Callable[..., DataConfig]) -> Callable[..., StepLoader]:
    def make(config: DataConfig | None = None, **changes: Any) -> StepLoader:
        return StepLoader(config or data_config(), VOCAB_SIZE, 32, **({"seed": 7} | PLACEMENT | changes))

    return make
