"""A small IDEFICS folder in Hugging Face format, and ways to spoil it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.hf_folder import IdeficsFolder
from megatron_atum.checkpoint.source import TensorSource
from megatron_atum.checkpoint.table import hf_shapes
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import CheckpointError
from tests.model.cases import Case, hf_config

MODEL = from_hf({"model_type": "idefics", **hf_config(Case("small", 0, layers=2))})
NAME = "model.layers.1.mlp.up_proj.weight"
SHAPE = hf_shapes(MODEL)[NAME]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weights(model: ModelConfig = MODEL, *dtypes: torch.dtype) -> dict[str, Tensor]:
    """Random values; tensors take the dtypes in turn."""
    generator = torch.Generator().manual_seed(0)
    kinds = dtypes or (torch.float32,)
    return {
        name: torch.randn(shape, generator=generator).to(kinds[number % len(kinds)])
        for number, (name, shape) in enumerate(hf_shapes(model).items())
    }


def all_of(source: TensorSource) -> dict[str, Tensor]:
    return {name: source.read(name) for name in sorted(source.names())}


def read_all(folder: Path) -> dict[str, Tensor]:
    with IdeficsFolder(folder) as opened:
        return all_of(opened)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_all(folder)
    for word in (folder.name, *words):
        assert word in str(error.value), str(error.value)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """The same bits."""
    return ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in ours)


def same_bits(one: Tensor, other: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(bits(one), bits(other))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def to_bins(folder: Path, parts: int = 1, **more: Any) -> None:
    """Weights as torch.save writes them, with an index where they are several files. `more`: further entries."""
    tensors = load_file(folder / "model.safetensors") | more
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    where: dict[str, str] = {}
    for part in range(parts):
        names, file = sorted(tensors)[part::parts], f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin"
        torch.save({name: tensors[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def change_header(file: Path, name: str, **changes: Any) -> None:
    """Lets the header of a safetensors file say something else of a tensor."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[name] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
