"""Checkpoints on disk: opened for reading, and written from any source of weights. One process, no model.

A step folder holds
    weights-*.safetensors     by Hugging Face name, in chunks
    optimizer-*.safetensors   training only: `optimizer.exp_avg/NAME` and so on, `random/RANK/...`
    index.json                where each chunk of each tensor lies
    state.json                step, model, layout, configuration, data state, schedule; the frozen folder it needs
    assets/                   tokenizer, processor and configuration files, as they came
    complete.json             every file with size and checksum, written last
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from tqdm import tqdm

from megatron_atum import __version__
from megatron_atum.checkpoint.assets import read_assets, write_assets
from megatron_atum.checkpoint.files import (
    check_room,
    commit_folder,
    new_folder,
    refuse_existing,
    sync,
    write_json,
    write_text,
)
from megatron_atum.checkpoint.folder import (
    ASSETS,
    STATE,
    Report,
    folders_of,
    missing,
    newest_complete,
    record_of,
    silent,
    step_folder,
    step_folders,
    write_record,
)
from megatron_atum.checkpoint.hf_config import from_hf, to_hf
from megatron_atum.checkpoint.hf_folder import check_dtypes
from megatron_atum.checkpoint.index import FORMAT, INDEX, Written, merge, to_json
from megatron_atum.checkpoint.source import TensorSource
from megatron_atum.checkpoint.table import hf_shapes, weight_table
from megatron_atum.checkpoint.tensor_file import FileRecord, check_finite, converted, row_slices
from megatron_atum.checkpoint.writer import Item, write_items
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import CheckpointError


@dataclass(frozen=True)
class RunState:
    """What state.json says of a checkpoint."""

    folder: Path
    step: int
    model: ModelConfig
    layout: dict[str, Any] | None  # None: weights only, as the tools write them
    config: dict[str, Any]
    data: dict[str, Any]
    health: dict[str, Any]  # of the training's last steps
    scheduler: dict[str, Any]
    optimizer_steps: dict[str, int]  # by Hugging Face name of a weight's first tensor
    versions: dict[str, str]

    @property
    def is_training(self) -> bool:
        return self.layout is not None


def read_state(folder: Path) -> RunState:
    """Read and check a checkpoint folder, without its tensors.

    Raises:
        CheckpointError: not a checkpoint, incomplete, or of another version of this format.
    """
    if problems := missing(folder):
        raise CheckpointError(f"{folder} is not a complete checkpoint: {'; '.join(problems[:5])}")
    try:
        content = json.loads((folder / STATE).read_text())
        keys = ("step", "layout", "config", "data", "scheduler", "optimizer_steps", "versions")
        model = _model(content["config"]["model"])
        return RunState(folder, model=model, health=content.get("health", {}), **{key: content[key] for key in keys})
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OmegaConfBaseException) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error!r}") from None


def _model(values: dict[str, Any]) -> ModelConfig:
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
    assert isinstance(model, ModelConfig)
    from_hf(to_hf(model), STATE)  # the checks of a configuration that comes from elsewhere
    return model


def write_state(folder: Path, *, step: int, config: dict[str, Any], frozen: str | None, **more: Any) -> None:
    """Write state.json. `more`: what a training run adds."""
    nothing: dict[str, Any] = {"layout": None, "data": {}, "health": {}, "scheduler": {}, "optimizer_steps": {}}
    versions = {"megatron_atum": __version__, "torch": torch.__version__}
    content = {"format": FORMAT, "step": step, "frozen": frozen, "versions": versions, "config": config}
    write_json(folder / STATE, content | nothing | more)


# Reading -------------------------------------------------------------------------------------------------------------


class StoredCheckpoint:
    """The weights of a checkpoint, a TensorSource, and what belongs to them."""

    def __init__(self, folder: Path, *, once: bool = False) -> None:
        """Args: once: each value is read once (`read_tensor`)."""
        from megatron_atum.checkpoint.reader import CheckpointReader  # slow to import, and writing does without

        self.folder, self.state = folder, read_state(folder)
        self.reader = CheckpointReader(*folders_of(folder), once=once)
        self.model = self.state.model
        self._check_tensors()

    def names(self) -> set[str]:
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reader.index[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.index[name].dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """See TensorSource. Raises CheckpointError."""
        shape = self.shape(name)
        if rows is None or not shape:
            return self.read_box(name, (0,) * len(shape), shape)
        first, last, _ = rows.indices(shape[0])
        return self.read_box(name, (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))

    def read_box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of a tensor: only the rows of the chunks that it needs are read. Raises CheckpointError."""
        tensor = self.reader.read(name, offsets, sizes)
        check_finite(tensor, lambda: f"{self.folder}: {name}")
        return tensor

    @property
    def assets(self) -> dict[str, bytes]:
        """Small files that came with the model, by name."""
        folder = self.folder / ASSETS
        return read_assets(folder) if folder.is_dir() else {}

    def close(self) -> None:
        self.reader.close()

    def _check_tensors(self) -> None:
        self._names = hf_shapes(self.model)
        for name, shape in self._names.items():
            stored = self.reader.index.get(name)
            if stored is None:
                raise CheckpointError(f"{self.folder} does not hold {name}")
            if stored.shape != shape:
                raise CheckpointError(f"{self.folder} holds {name} as {stored.shape}, and its model needs {shape}")
        check_dtypes(str(self.folder), {name: self.dtype(name) for name in self._names})


def find_checkpoint(path: Path, step: int | None = None, report: Report = silent) -> Path:
    """The folder of a step, from a run folder, a folder of steps, or a step's own folder.

    Raises:
        CheckpointError: there is none, or not this step.
    """
    if (path / STATE).exists() or not path.is_dir():
        if step is not None and path.is_dir() and read_state(path).step != step:
            raise CheckpointError(f"{path} is step {read_state(path).step}, not {step}")
        return path
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if step is not None:
        return step_folder(checkpoints, step)
    found = newest_complete(checkpoints, report)
    if found is None:
        there = "no step folder" if not step_folders(checkpoints) else "no complete checkpoint"
        raise CheckpointError(f"{path} holds {there}; give a run folder, a folder with step-* or a step folder")
    return found


def open_checkpoint(
    path: Path, step: int | None = None, report: Report = print, *, once: bool = False
) -> StoredCheckpoint:
    """Open a checkpoint by run folder or step folder; the newest complete step unless `step` says which.

    Raises:
        CheckpointError: there is none, or it is incomplete.
    """
    return StoredCheckpoint(find_checkpoint(path, step, report), once=once)


# Writing weights -----------------------------------------------------------------------------------------------------


def write_weights(
    out: Path,
    model: ModelConfig,
    source: TensorSource,
    *,
    dtype: torch.dtype | None = None,
    standalone: bool = False,
    assets: dict[str, bytes] | None = None,
    progress: bool = False,
) -> None:
    """Write a checkpoint of weights only, whole or not at all.

    Args:
        out: must not exist. Gets step-00000000 and frozen-<hash> (the backbones), or, standalone, is itself the
            folder of one step that needs no other.
        dtype: None keeps that of each tensor.
        assets: small files to keep with the model, by name.

    Raises:
        CheckpointError: `out` exists, or the source does not hold this model, or a value does not fit the dtype.
    """
    refuse_existing(out)
    backbone = {name for row in weight_table(model) if row.backbone for name in row.hf}
    items = [_item(source, name, shape, dtype) for name, shape in hf_shapes(model).items()]
    total = sum(item.size for item in items)
    bar = tqdm(total=total, desc=f"writing {out.name}", unit="B", unit_scale=True, disable=not progress)
    config = {"model": OmegaConf.to_container(OmegaConf.structured(model))}
    with bar, new_folder(out) as folder:
        check_room(folder, total)
        frozen, step = None, folder
        if not standalone:
            frozen = _write_frozen(folder, [item for item in items if item.key in backbone], bar.update)
            items = [item for item in items if item.key not in backbone]
            step = step_folder(folder, 0)
            step.mkdir()
        records, written = write_items(step, "weights", items, bar.update)
        write_state(step, step=0, config=config, frozen=frozen)
        add_assets(step, assets or {})
        complete(step, records, written)


def _item(source: TensorSource, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Item:
    theirs = source.dtype(name)
    ours = dtype or theirs

    def pieces() -> Iterator[Tensor]:
        for rows in row_slices(shape, max(theirs.itemsize, ours.itemsize)):
            piece = source.read(name, rows)
            yield converted(piece, ours, name)

    return Item(name, ours, shape, (0,) * len(shape), shape, pieces)


def _write_frozen(folder: Path, items: Iterable[Item], progress: Callable[[int], object]) -> str:
    aside = folder / "frozen"
    aside.mkdir()
    records, written = write_items(aside, "weights", items, progress)
    name = complete_frozen(aside, records, written)
    commit_folder(aside, folder / name)
    return name


def add_assets(folder: Path, assets: dict[str, bytes]) -> None:
    """Put small files into the folder of a step. Raises CheckpointError for a name that none of them has."""
    if assets:
        (folder / ASSETS).mkdir(exist_ok=True)
        write_assets(folder / ASSETS, assets)
        for path in sorted((folder / ASSETS).iterdir()):
            sync(path)


def complete(folder: Path, records: list[FileRecord], written: Iterable[Written]) -> None:
    """Write index and completion record of a folder whose other files are on disk."""
    write_text(folder / INDEX, to_json(merge(written)))
    small = [folder / INDEX, folder / STATE, *sorted((folder / ASSETS).glob("*"))]
    names = [str(path.relative_to(folder)) for path in small if path.exists()]
    write_record(folder, [*records, *(record_of(folder / name, name) for name in names)])


def complete_frozen(folder: Path, records: list[FileRecord], written: Iterable[Written]) -> str:
    """The same for frozen weights. Returns the folder's name, which says what it holds."""
    complete(folder, records, written)
    content = sorted((record.name, record.size, record.checksum) for record in records)
    digest = hashlib.sha256(json.dumps([(folder / INDEX).read_text(), content]).encode())
    return f"frozen-{digest.hexdigest()[:16]}"
