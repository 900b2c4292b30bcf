"""Checkpoints of a run: saved and loaded at the same layout.

RUN/checkpoints/step-00000250/
    model-pp0-tp0.safetensors   weights of one (pipeline, tensor) rank, by global name
    optimizer-00000.pt          optimizer shard and random state of one rank
    state.json                  step, schedule, data state, layout, versions, resolved configuration
    complete.json               every file with its size; written last, so a folder without it does not count
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_atum import __version__
from megatron_atum.checkpoint.files import commit_folder, sync, write_json
from megatron_atum.checkpoint.hf_folder import check_same_model
from megatron_atum.checkpoint.weights import named_weights
from megatron_atum.config.schema import Config, ModelConfig
from megatron_atum.errors import CheckpointError
from megatron_atum.parallel.agreement import together
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.parallel.layout import ParallelLayout

_COMPLETE = "complete.json"


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def is_complete(folder: Path) -> bool:
    return not missing_files(folder)


def missing_files(folder: Path) -> list[str]:
    """What keeps a folder from being a complete checkpoint; empty if it is one."""
    try:
        files = dict(json.loads((folder / _COMPLETE).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"no readable {_COMPLETE}"]
    found = {file.name: file.stat().st_size for file in folder.iterdir()}
    return [
        f"{name} has {found.get(name, 'no')} bytes, not {size}"
        for name, size in files.items()
        if found.get(name) != size
    ]


def newest_complete(checkpoints: Path, report: Callable[[str], None] = lambda line: None) -> Path | None:
    """The complete checkpoint with the highest step. Those passed over are reported with the reason."""
    for folder in sorted(checkpoints.glob("step-????????"), reverse=True):
        problems = missing_files(folder)
        if not problems:
            return folder
        report(f"passing over {folder}: {'; '.join(problems)}")
    return None


@dataclass(frozen=True)
class RunState:
    """What state.json says of a checkpoint."""

    folder: Path
    step: int
    layout: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    scheduler: dict[str, Any]

    @property
    def model(self) -> ModelConfig:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), self.config["model"])
        model = OmegaConf.to_object(merged)
        assert isinstance(model, ModelConfig)
        return model


def read_state(folder: Path) -> RunState:
    """Read and check a checkpoint folder, without its tensors.

    Raises:
        CheckpointError: not a checkpoint, incomplete, or of another version of this format.
    """
    problems = missing_files(folder) if folder.is_dir() else ["there is no such folder"]
    if problems:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {'; '.join(problems)}")
    try:
        content = json.loads((folder / "state.json").read_text())
        return RunState(
            folder=folder, **{key: content[key] for key in ("step", "layout", "config", "data", "scheduler")}
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}/state.json cannot be read: {error!r}") from None


def check_resumable(state: RunState, config: Config, layout: ParallelLayout) -> None:
    """Raises CheckpointError if this run cannot go on from a checkpoint."""
    check_same_model(str(state.folder), state.model, config.model)
    if state.model.freeze != config.model.freeze:
        raise CheckpointError(
            f"{state.folder} was trained with {state.model.freeze}, and this run has {config.model.freeze}; its "
            "optimizer state does not fit. Export it and start from there (checkpoint.init) to change model.freeze"
        )
    ours = _layout_record(layout, config)
    if state.layout != ours:
        raise CheckpointError(
            f"{state.folder} was saved at the layout {state.layout}, and this run has {ours}; "
            "a checkpoint can be resumed at its own layout only. Export it with tools/checkpoint/atum_to_hf.py and "
            "start from there (checkpoint.init) to change the layout"
        )


def _layout_record(layout: ParallelLayout, config: Config) -> dict[str, Any]:
    record = {**asdict(layout), "distributed_optimizer": config.optimizer.distributed}
    return json.loads(json.dumps(record))  # lists for tuples, as read back


class RunCheckpoint:
    """Saves and loads the engine of this rank."""

    def __init__(self, config: Config, groups: ProcessGroups, engine: Any) -> None:
        self.config, self.groups, self.engine = config, groups, engine

    @property
    def _model_file(self) -> str:
        return model_file(self.groups.pipeline_rank, self.groups.tensor_rank)

    @property
    def _optimizer_file(self) -> str:
        return f"optimizer-{self.groups.rank:05d}.pt"

    def save(self, checkpoints: Path, step: int, data: dict[str, Any]) -> Path:
        """Write a checkpoint. Collective over all ranks; all of them raise if one could not write.

        Raises:
            CheckpointError: with the reason; what was there before is untouched.
        """
        for chunk in self.engine.chunks:
            if chunk.ddp_config.overlap_param_gather:  # else the other ranks' shards are those of the step before
                chunk.start_param_sync(force_sync=True)
        folder = step_folder(checkpoints, step)
        aside = folder.with_name(folder.name + ".tmp")
        self._together(lambda: self._write_first(aside, step, data) if self.groups.rank == 0 else None, aside)
        self._together(lambda: self._write_own(aside), aside)
        self._together(lambda: self._commit(aside, folder) if self.groups.rank == 0 else None, aside)
        return folder

    def _write_first(self, aside: Path, step: int, data: dict[str, Any]) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        state = {
            "step": step,
            "layout": _layout_record(self.groups.layout, self.config),
            "config": OmegaConf.to_container(OmegaConf.structured(self.config)),
            "data": data,
            "scheduler": self.engine.scheduler.state_dict(),
            "versions": {"megatron_atum": __version__, "torch": torch.__version__},
        }
        write_json(aside / "state.json", state)

    def _write_own(self, aside: Path) -> None:
        if self.groups.data_rank == 0:
            weights = {name: p.detach().cpu().contiguous() for name, p in named_weights(self.engine.stages).items()}
            save_file(weights, aside / self._model_file)
            sync(aside / self._model_file)
        torch.save(self._optimizer_state(), aside / self._optimizer_file)
        sync(aside / self._optimizer_file)

    def _commit(self, aside: Path, folder: Path) -> None:
        files = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
        write_json(aside / _COMPLETE, {"files": files})
        commit_folder(aside, folder)
        self._remove_old(folder)

    def _remove_old(self, newest: Path) -> None:
        keep = self.config.checkpoint.keep
        folders = sorted(newest.parent.glob("step-????????"))
        complete = [folder for folder in folders if folder.name <= newest.name and is_complete(folder)]
        for folder in complete[:-keep] if keep else []:
            shutil.rmtree(folder)

    def _together(self, work: Callable[[], None], aside: Path) -> None:
        """Do this rank's part; if any rank failed, all of them raise, and what was written is removed."""

        def guarded() -> None:
            try:
                work()
            except (OSError, RuntimeError, SafetensorError) as problem:  # torch and safetensors wrap what the disk says
                where = f"checkpoint {aside.with_suffix('')} could not be written: rank {self.groups.rank}"
                raise CheckpointError(f"{where}: {problem}") from None

        try:
            together(guarded)
        except CheckpointError:
            if self.groups.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def load(self, state: RunState) -> None:
        """Weights, optimizer and random state of this rank. `check_resumable` must have passed.

        Raises:
            CheckpointError: a file does not hold what it should.
        """
        parameters = named_weights(self.engine.stages)
        weights, saved = self._read(state.folder)
        if weights.keys() != parameters.keys():
            raise CheckpointError(f"{state.folder / self._model_file} does not hold the tensors of this rank")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        self._load_optimizer(saved)
        torch.set_rng_state(saved["cpu_rng"])
        self.engine.scheduler.load_state_dict(state.scheduler)

    def _read(self, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        try:
            weights = load_file(folder / self._model_file)
            return weights, torch.load(folder / self._optimizer_file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise CheckpointError(
                f"{folder} is damaged ({error}); remove it to go on from the checkpoint before it"
            ) from None

    def _optimizer_state(self) -> dict[str, Any]:
        inner = inner_optimizers(self.engine.optimizer)
        return {
            "inner": [optimizer.state_dict() for optimizer in inner],
            # fp32 copies (bf16 training) or the parameters themselves
            "parameters": [[p.detach().cpu() for p in group["params"]] for o in inner for group in o.param_groups],
            "cpu_rng": torch.get_rng_state(),
        }

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        inner = inner_optimizers(self.engine.optimizer)
        for optimizer, state in zip(inner, saved["inner"], strict=True):
            configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            # torch takes learning rate, betas, decay ... from the checkpoint; the run's configuration decides
            for group, settings in zip(optimizer.param_groups, configured, strict=True):
                group.update(settings)
        groups = [group["params"] for optimizer in inner for group in optimizer.param_groups]
        with torch.no_grad():
            for parameters, values in zip(groups, saved["parameters"], strict=True):
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.copy_(value)


def model_file(pipeline_rank: int, tensor_rank: int) -> str:
    return f"model-pp{pipeline_rank}-tp{tensor_rank}.safetensors"


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """torch's (or apex's) optimizers inside megatron-core's."""
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
