"""Folders are written piece by piece, bit for bit, and whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_atum.checkpoint import hf_export
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.hf_folder import IdeficsFolder
from megatron_atum.checkpoint.source import Given
from megatron_atum.checkpoint.stored import open_checkpoint, write_weights
from megatron_atum.checkpoint.table import hf_shapes
from megatron_atum.errors import CheckpointError
from tests.checkpoint.folders import DTYPES, MODEL, NAME, read_all, same, weights

ROOT = Path(__file__).parents[2]
KINDS = [DTYPES[:1], DTYPES[1:2], DTYPES[2:], DTYPES]
SMALL_PIECES = 1000  # bytes, so that small tensors are cut


@pytest.mark.parametrize("dtypes", KINDS, ids=["bf16", "fp16", "fp32", "mixed"])
def test_reading_and_writing_keep_every_bit(
    dtypes: tuple[torch.dtype, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_export, "PIECE_BYTES", SMALL_PIECES)
    tensors = weights(MODEL, *dtypes)
    tensors[NAME].view(torch.int16).flatten()[:2] = torch.tensor([-(2**15), 1])  # minus zero and the smallest number
    write_hf_folder(tmp_path / "first", MODEL, Given(tensors), shard_bytes=20_000)
    with IdeficsFolder(tmp_path / "first") as first:
        write_hf_folder(tmp_path / "second", first.model, first)
        write_weights(tmp_path / "atum", first.model, first)
    write_hf_folder(tmp_path / "third", MODEL, open_checkpoint(tmp_path / "atum"))
    for name in ("first", "second", "third"):
        assert same(read_all(tmp_path / name), tensors), name


def test_several_shards(tmp_path: Path) -> None:
    tensors, out = weights(), tmp_path / "out"
    write_hf_folder(out, MODEL, Given(tensors), shard_bytes=20_000)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert set(index["weight_map"].values()) == set(files)
    sizes = [tensor.nbytes for tensor in tensors.values()]
    assert all((out / file).stat().st_size <= max(20_000, *sizes) + 5_000 for file in files)
    with safe_open(out / files[0], framework="pt") as file:  # the safetensors package agrees, and so does transformers
        assert file.metadata() == {"format": "pt"}
    from transformers import IdeficsForVisionText2Text

    model, info = IdeficsForVisionText2Text.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert same({name: tensor for name, tensor in model.state_dict().items()}, tensors)


def test_the_dtype_can_be_chosen(tmp_path: Path) -> None:
    tensors = weights(MODEL, *DTYPES)
    for dtype in DTYPES:
        out = tmp_path / str(dtype)
        write_hf_folder(out, MODEL, Given(tensors), dtype=dtype)
        assert same(read_all(out), {name: tensor.to(dtype) for name, tensor in tensors.items()})
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_values_that_the_dtype_does_not_have(tmp_path: Path) -> None:
    tensors = weights()
    tensors[NAME][-1, -1] = -70_000.0
    with pytest.raises(CheckpointError, match=rf"{NAME} has values that are too large for float16"):
        write_hf_folder(tmp_path / "out", MODEL, Given(tensors), dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    write_hf_folder(tmp_path / "out", MODEL, Given(tensors), dtype=torch.bfloat16)


def test_what_cannot_be_written_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    short, odd = weights(), weights()
    short.pop(NAME)
    odd[NAME] = torch.ones(3)

    class Breaks(Given):
        def read(self, name: str, rows: slice | None = None) -> Tensor:
            if name == NAME:
                raise RuntimeError
            return super().read(name, rows)

    def no_more(folder: Path) -> None:
        raise KeyboardInterrupt

    cases: list[tuple[Any, type[BaseException], dict[str, Any]]] = [
        (Given(short), CheckpointError, {}),
        (Given(odd), CheckpointError, {}),
        (Breaks(weights()), RuntimeError, {}),
        (Given(weights()), KeyboardInterrupt, {"write_more": no_more}),
        (Given(weights()), CheckpointError, {"assets": {"../x": b""}}),
    ]
    for source, kind, more in cases:
        with pytest.raises(kind):
            write_hf_folder(out, MODEL, source, shard_bytes=20_000, **more)
        assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("out", "link"):
        with pytest.raises(CheckpointError, match="exists already"):
            write_hf_folder(tmp_path / name, MODEL, Given(weights()))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="GB free"):
        write_hf_folder(tmp_path / "out", MODEL, Given(weights()))
    assert list(tmp_path.iterdir()) == []


def test_files_that_came_with_the_model(tmp_path: Path) -> None:
    config = {
        "model_type": "idefics",
        "vocab_size": 3,
        "_name_or_path": "x",
        "torch_dtype": "float16",
        "use_cache": True,
    }
    config |= {"vision_config": {"embed_dim": 1, "attention_dropout": 0.0}, "rope_theta": 3.0}
    assets = {"config.json": json.dumps(config).encode(), "tokenizer_config.json": b"{ }", "chat_template.jinja": b"x"}
    write_hf_folder(tmp_path / "out", MODEL, Given(weights()), assets=assets)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["use_cache"] is True and written["vision_config"]["attention_dropout"] == 0.0
    assert written["vocab_size"] == MODEL.vocab_size and written["vision_config"]["embed_dim"] == 16
    assert written["dtype"] == "float32"
    assert not written.keys() & {"_name_or_path", "torch_dtype", "rope_theta"}
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == assets[name]
    ids = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with IdeficsFolder(tmp_path / "out") as opened:
        assert opened.model == MODEL


# Large folders -------------------------------------------------------------------------------------------------------

# in fp32 almost 2 GB, in tensors of 128 MiB, on a model that is narrow otherwise
LARGE = replace(MODEL, vocab_size=1 << 20, hidden_size=32, intermediate_size=1 << 20, num_layers=2)

CONVERT = """
import resource, sys
from pathlib import Path
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.hf_folder import IdeficsFolder
source, out = map(Path, sys.argv[1:])
with IdeficsFolder(source) as folder:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("start", flush=True)
    write_hf_folder(out, folder.model, folder, shard_bytes=200 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "hf"
    ones = {name: torch.ones(1).expand(shape) for name, shape in hf_shapes(LARGE).items()}
    write_hf_folder(folder, LARGE, Given({name: tensor for name, tensor in ones.items()}))
    return folder


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CONVERT, str(source), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_memory_does_not_grow_with_the_model(large: Path, tmp_path: Path) -> None:
    """The pieces that are in memory are a fraction of one tensor."""
    process = start(large, tmp_path / "out")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    largest = 4 * LARGE.vocab_size * LARGE.hidden_size
    assert size > 1.2e9 and largest == 128 << 20
    assert int(said.split()[-1]) < largest


def test_a_killed_conversion_leaves_no_folder(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(large, out)
    assert process.stdout is not None and process.stdout.readline() == "start\n"
    while process.poll() is None and not list(tmp_path.glob("*/model-00002*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert not (left / "config.json").exists() and not list(left.glob("*.index.json"))
    with pytest.raises(CheckpointError):
        IdeficsFolder(left)
    write_hf_folder(out, MODEL, Given(weights()))  # what is left is in nobody's way
    assert sorted(tmp_path.iterdir()) == [out, left]
