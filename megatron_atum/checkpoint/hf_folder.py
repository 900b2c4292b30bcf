"""Reading a model folder in Hugging Face format, with the checks that transformers itself does not make."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.table import Weight, hf_shapes
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import CheckpointError

# Left over in old files, and recomputed by every implementation.
_DROPPED = (".rotary_emb.inv_freq", ".position_ids")


class HfFolder:
    """Tensors of a folder by name, read when asked for. Safetensors only."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a folder")
        self.config = self._read_json("config.json")
        self._files: dict[Path, Any] = {}
        self._where = self._find_tensors()

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} has no {name}; is it a model folder in Hugging Face format?") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.path / name}: {error}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.path / name} is not a JSON object")
        return content

    def _find_tensors(self) -> dict[str, Path]:
        if (self.path / "model.safetensors").exists():  # transformers, too, takes it where both are there
            file = self.path / "model.safetensors"
            files = dict.fromkeys(self._open(file).keys(), file)
        elif (self.path / "model.safetensors.index.json").exists():
            index = self._read_json("model.safetensors.index.json").get("weight_map")
            if not isinstance(index, dict):
                raise CheckpointError(f"{self.path}/model.safetensors.index.json has no weight_map")
            files = {name: self._inside(file) for name, file in index.items()}
        else:
            raise CheckpointError(
                f"{self.path} has no model.safetensors and no index of one; "
                "save it with transformers' save_pretrained, which writes safetensors"
            )
        return {name: file for name, file in files.items() if not name.endswith(_DROPPED)}

    def _inside(self, name: Any) -> Path:
        if not isinstance(name, str) or Path(name).name != name or not (self.path / name).is_file():
            raise CheckpointError(f"{self.path}: the index names {name!r}, which is not a file of this folder")
        return self.path / name

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {file}: {error}") from None
        return self._files[file]

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        try:
            return self._open(self._where[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._where[name]} does not hold {name}: {error}") from None

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises CheckpointError if it is not of a floating dtype, or not finite."""
        self._slice(name)
        tensor: Tensor = self._open(self._where[name]).get_tensor(name)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self._where[name]}: {name} has dtype {tensor.dtype}, not a floating one")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self._where[name]}: {name} holds NaN or infinite values")
        return tensor

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()


class IdeficsFolder(HfFolder):
    """An IDEFICS folder whose tensors are exactly those of its configuration."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.model: ModelConfig = from_hf(self.config, str(self.path / "config.json"))
        check_names(str(self.path), {name: self.shape(name) for name in self.names()}, hf_shapes(self.model))

    def read(self, row: Weight) -> list[Tensor]:
        """The Hugging Face tensors of a row of the weight table."""
        return [self.tensor(name) for name in row.hf]


def check_names(where: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError listing what is missing, unknown or has another shape."""
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unknown: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape of {name} is {found[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
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
