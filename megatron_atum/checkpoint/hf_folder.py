"""Reading a model folder in Hugging Face format, with the checks that transformers itself does not make."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_atum.checkpoint.hf_bin import BinFile
from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.table import hf_shapes
from megatron_atum.checkpoint.tensor_file import TensorFile, check_finite
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import CheckpointError

# In the order in which transformers looks for them: one file, or an index of several.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# Left over in old files, and recomputed by every implementation.
_DROPPED = (".rotary_emb.inv_freq", ".position_ids")
_FLOATING = (torch.bfloat16, torch.float16, torch.float32)


class HfFolder:
    """Tensors of a folder by name, read when asked for: a TensorSource. Safetensors, or else `.bin` files.

    `dropped`: names of old files that no implementation reads any more, which are left out.

    Args:
        once: each tensor is read once (`read_tensor`).

    Raises:
        CheckpointError: not such a folder, or one with damaged, unsafe or missing files.
    """

    def __init__(self, path: str | Path, *, once: bool = False) -> None:
        self.path, self._once = Path(path), once
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a folder")
        self.config = self._read_json("config.json")
        self._files: dict[str, TensorFile] = {}
        try:
            where = self._find_tensors()
        except BaseException:
            self.close()
            raise
        self.dropped = sorted(name for name in where if name.endswith(_DROPPED))
        self._where = {name: file for name, file in where.items() if not name.endswith(_DROPPED)}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._where[name].entries[name].dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows. Raises CheckpointError: it cannot be read, or holds NaN or infinite values."""
        file = self._where[name]
        tensor = file.read(name, rows)
        check_finite(tensor, lambda: f"{file.path}: {name}")
        return tensor

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} has no {name}; is it a model folder in Hugging Face format?") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read {self.path / name}: {error}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.path / name} is not a JSON object")
        return content

    def _find_tensors(self) -> dict[str, TensorFile]:
        for single, index in _WEIGHTS:
            if (self.path / single).exists():
                file = self._open(single)
                return dict.fromkeys(file.entries, file)
            if (self.path / index).exists():
                return self._indexed(index)
        wanted = ", ".join(name for pair in _WEIGHTS for name in pair)
        raise CheckpointError(f"{self.path} has no weights: none of {wanted}")

    def _indexed(self, index: str) -> dict[str, TensorFile]:
        named = self._read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise CheckpointError(f"{self.path / index} has no weight_map")
        where = {name: self._open(file) for name, file in named.items()}
        for name, file in where.items():
            if name not in file.entries:
                raise CheckpointError(f"{file.path} does not hold {name}, as {index} says")
        for file in self._files.values():  # transformers would load them
            for name in file.entries:
                if where.get(name) is not file and not name.endswith(_DROPPED):
                    raise CheckpointError(f"{file.path} holds {name}, which {index} does not say; mend the index")
        return where

    def _open(self, name: Any) -> TensorFile:
        if not isinstance(name, str) or Path(name).name != name or not (self.path / name).is_file():
            raise CheckpointError(f"{self.path}: the index names {name!r}, which is not a file of this folder")
        if name not in self._files:
            kind = BinFile if name.endswith(".bin") else TensorFile
            self._files[name] = kind(self.path / name, once=self._once)
        return self._files[name]


class IdeficsFolder(HfFolder):
    """An IDEFICS folder whose tensors are exactly those of its configuration."""

    def __init__(self, path: str | Path, *, once: bool = False) -> None:
        super().__init__(path, once=once)
        try:
            self.model: ModelConfig = from_hf(self.config, str(self.path / "config.json"))
            check_names(str(self.path), {name: self.shape(name) for name in self.names()}, hf_shapes(self.model))
            check_dtypes(str(self.path), {name: self.dtype(name) for name in self.names()})
        except BaseException:
            self.close()
            raise


def check_names(where: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError listing what is missing, unknown or has another shape."""
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unknown: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape of {name} is {found[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    _refuse(where, problems)


def check_dtypes(where: str, dtypes: dict[str, torch.dtype]) -> None:
    """Raises CheckpointError listing what is not of a dtype that weights have."""
    problems = [
        f"dtype of {name} is {dtype}, not bfloat16, float16 or float32"
        for name, dtype in sorted(dtypes.items())
        if dtype not in _FLOATING
    ]
    _refuse(where, problems)


def _refuse(where: str, problems: list[str]) -> None:
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"the tensors in {where} are not those of its model:\n  " + "\n  ".join(problems[:10]) + more
        )


def check_same_model(where: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    """The shapes of two configurations agree; freezing and names of presets may differ.

    Raises:
        CheckpointError: naming the keys that differ.
    """
    different = _differences("model", theirs, ours)
    if different:
        raise CheckpointError(f"{where} holds another model than the configuration asks for: " + "; ".join(different))


def check_start(where: str, theirs: ModelConfig, ours: ModelConfig) -> str:
    """The same of weights that a new run starts from, except that it may have more added tokens.

    Returns:
        What is drawn (draw.py: AddedRows), for the log; "" if nothing is.

    Raises:
        CheckpointError: naming the keys that differ.
    """
    there, here = theirs.additional_vocab_size, ours.additional_vocab_size
    if not 0 < there < here:
        check_same_model(where, theirs, ours)
        return ""
    check_same_model(where, replace(theirs, additional_vocab_size=here), ours)
    rows = f"row {here} is" if here - there == 1 else f"rows {there + 1} to {here} are"
    return f"{where} has {there} added tokens, and this model {here}: {rows} drawn, in added embedding and added head"


_MAY_DIFFER = {"preset", "freeze", "alpha_init", "interpolate_positions", "max_position_embeddings"}


def _differences(key: str, theirs: Any, ours: Any) -> list[str]:
    if not hasattr(theirs, "__dataclass_fields__"):
        return [] if theirs == ours else [f"{key} is {theirs} there and {ours} here"]
    return [
        difference
        for name in theirs.__dataclass_fields__
        if name not in _MAY_DIFFER
        for difference in _differences(f"{key}.{name}", getattr(theirs, name), getattr(ours, name))
    ]
