"""Writing a model folder in Hugging Face format, a piece of a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_atum.checkpoint.assets import write_assets
from megatron_atum.checkpoint.files import check_room, new_folder, refuse_existing, write_json
from megatron_atum.checkpoint.hf_config import config_json
from megatron_atum.checkpoint.hf_folder import check_names
from megatron_atum.checkpoint.source import TensorSource
from megatron_atum.checkpoint.table import hf_shapes
from megatron_atum.checkpoint.tensor_file import (
    PIECE_BYTES,
    Entry,
    FileRecord,
    TensorFileWriter,
    ahead,
    converted,
    row_slices,
)
from megatron_atum.config.schema import ModelConfig

DEFAULT_SHARD_BYTES = 5 * 10**9


def write_hf_folder(
    out: Path,
    model: ModelConfig,
    source: TensorSource,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    assets: Mapping[str, bytes] | None = None,
    write_more: Callable[[Path], None] = lambda folder: None,
    progress: bool = False,
) -> None:
    """Write config.json, safetensors shards and other files, whole or not at all.

    Args:
        dtype: of what is written; None: each tensor as it is.
        assets: files to add as they are; where config.json is among them, its other keys are kept.
        write_more: adds further files to the folder before it is put in place.

    Raises:
        CheckpointError: `out` exists, there is no room, the tensors are not exactly those of the model, or their values
            are not finite, or not in `dtype`.
    """
    refuse_existing(out)
    check_names("the source", {name: source.shape(name) for name in source.names()}, hf_shapes(model))
    tensors = [Entry(name, dtype or source.dtype(name), shape, 0) for name, shape in hf_shapes(model).items()]
    total = sum(tensor.size for tensor in tensors)
    with new_folder(out) as folder:
        check_room(folder, total)
        with tqdm(total=total, desc=f"writing {out.name}", unit="B", unit_scale=True, disable=not progress) as bar:
            _write_weights(folder, source, _shards(tensors, shard_bytes), bar.update)
        _write_rest(folder, model, tensors, dict(assets or {}))
        write_more(folder)


def _shards(tensors: list[Entry], most_bytes: int) -> dict[str, list[Entry]]:
    """Tensors by file name. A file is as large as the limit allows, and holds one tensor at least."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def _write_weights(
    folder: Path, source: TensorSource, shards: dict[str, list[Entry]], count: Callable[[int], object]
) -> None:
    synced: list[Future[FileRecord]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="sync") as pool:  # a file goes to disk while the next is written
        for name, tensors in shards.items():
            writer = TensorFileWriter(folder / name, [(t.name, t.dtype, t.shape) for t in tensors], {"format": "pt"})
            try:
                for piece in ahead(_pieces(source, tensors)):
                    writer.write(piece)
                    count(piece.nbytes)
            except BaseException:
                writer.abandon()
                raise
            synced.append(pool.submit(writer.close))
        for file in synced:
            file.result()
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        size = sum(tensor.size for tensors in shards.values() for tensor in tensors)
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )


def _pieces(source: TensorSource, tensors: list[Entry]) -> Iterator[Tensor]:
    for tensor in tensors:
        for rows in row_slices(tensor.shape, tensor.dtype.itemsize, PIECE_BYTES):
            yield converted(source.read(tensor.name, rows), tensor.dtype, tensor.name)


def _write_rest(folder: Path, model: ModelConfig, tensors: list[Entry], assets: dict[str, bytes]) -> None:
    """All that tells a folder from an unfinished one: config.json and what lies beside it."""
    original = assets.pop("config.json", b"{}")
    ids = {key: getattr(model, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assets.setdefault("generation_config.json", (json.dumps(ids, indent=2) + "\n").encode())
    write_assets(folder, assets)
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    most = max(sizes, key=lambda dtype: sizes[dtype])
    write_json(folder / "config.json", config_json(model, str(most).removeprefix("torch."), original))
