"""A small data set of real photographs, made once, and short ways to shards, sources and loaders."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from megatron_atum.config.schema import DataConfig, SourceConfig
from megatron_atum.data.loader import StepLoader
from megatron_atum.data.tokenizer import Tokenizer

VOCAB_SIZE = 512


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
        return DataConfig(**(values | changes))

    return make


@pytest.fixture
def make_loader(data_config: Callable[..., DataConfig]) -> Callable[..., StepLoader]:
    def make(config: DataConfig | None = None, **changes: Any) -> StepLoader:
        values: dict[str, Any] = {
            "seed": 7,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "data_parallel_rank": 0,
            "data_parallel_size": 1,
            "tensor_rank": 0,
            "tensor_size": 1,
            "encodes_images": True,
        }
        return StepLoader(config or data_config(), VOCAB_SIZE, 32, **(values | changes))

    return make
