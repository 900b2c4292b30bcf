"""Writing a model folder in Hugging Face format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_atum.checkpoint.files import new_folder, write_json
from megatron_atum.checkpoint.hf_config import to_hf
from megatron_atum.checkpoint.run_state import RunState, model_file
from megatron_atum.checkpoint.table import hf_shapes, weight_table
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 * 10**9


def write_hf_folder(
    out: Path,
    model: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write config.json and safetensors shards, whole or not at all.

    Args:
        tensors: every tensor of the model by Hugging Face name, in any order.
        write_more: adds further files to the folder before it is put in place.

    Raises:
        CheckpointError: `out` exists, or the tensors are not exactly those of the model.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another folder or remove it")
    expected = hf_shapes(model)
    with new_folder(out) as folder:
        writer = _ShardWriter(folder, shard_bytes)
        for name, tensor in tensors:
            if tuple(tensor.shape) != expected.pop(name, None):
                raise CheckpointError(f"{name} {tuple(tensor.shape)} is not a tensor of this model")
            writer.add(name, tensor)
        if expected:
            raise CheckpointError(f"tensors are missing: {', '.join(sorted(expected)[:5])}")
        writer.finish()
        dtype = str(writer.dtype).removeprefix("torch.")
        write_json(folder / "config.json", to_hf(model, dtype))
        ids = {key: getattr(model, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / "generation_config.json", ids)
        write_more(folder)


class _ShardWriter:
    """Collects tensors and writes a file whenever the next one would make it too large."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.held: dict[str, Tensor] = {}
        self.held_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []
        self.dtype = torch.float32

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.held_bytes + size > self.shard_bytes:
            self._write()
        # a copy where a tied head and its embedding share memory, which safetensors refuses
        shared = any(tensor.data_ptr() == other.data_ptr() for other in self.held.values())
        self.held[name] = tensor.clone() if shared else tensor.contiguous()
        self.held_bytes += size
        self.total_bytes += size
        self.dtype = tensor.dtype

    def _write(self) -> None:
        self.shards.append(list(self.held))
        save_file(self.held, self.folder / f"part-{len(self.shards)}", metadata={"format": "pt"})
        self.held, self.held_bytes = {}, 0

    def finish(self) -> None:
        self._write()
        count = len(self.shards)
        if count == 1:
            (self.folder / "part-1").rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self.shards, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)


def checkpoint_tensors(state: RunState) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by Hugging Face name, put together from the files of all ranks."""
    ranks = range(state.layout["tensor"])
    stages: list[list[Any]] = [
        [safe_open(state.folder / model_file(stage, rank), framework="pt") for rank in ranks]
        for stage in range(state.layout["pipeline"])
    ]
    holders = {name: shards for shards in stages for name in list(shards[0].keys())}
    for row in weight_table(state.model):
        if row.name not in holders:
            raise CheckpointError(f"{state.folder} does not hold {row.name}")
        whole = row.rule.to_full([shard.get_tensor(row.name) for shard in holders[row.name]])
        yield from zip(row.hf, whole, strict=True)
