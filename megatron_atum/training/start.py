"""Where a run starts: configuration, data and checkpoints are checked here, before any process group exists."""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_atum.checkpoint.hf_folder import IdeficsFolder, check_same_model
from megatron_atum.checkpoint.run_state import RunState, check_resumable, newest_complete, read_state
from megatron_atum.config.loader import to_yaml
from megatron_atum.config.schema import Config
from megatron_atum.data.loader import StepLoader
from megatron_atum.errors import ConfigError
from megatron_atum.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Start:
    """A checked run: its layout, its data, and what its weights come from."""

    config: Config
    layout: ParallelLayout
    loader: StepLoader
    run_folder: Path
    resume: RunState | None  # go on from this checkpoint
    backbones: IdeficsFolder | None  # or start from this folder; neither: weights are drawn from the seed

    @property
    def checkpoints(self) -> Path:
        return self.run_folder / "checkpoints"

    def identity(self) -> dict[str, Any]:
        """What must be the same on every rank."""
        return {
            "configuration": to_yaml(self.config),
            "checkpoint to resume": str(self.resume.folder) if self.resume else None,
            "step": self.resume.step if self.resume else 0,
            "data stream": self.loader.state_dict(),
        }


def prepare_start(config: Config, world_size: int, rank: int) -> Start:
    """Check configuration, data and checkpoints for one rank.

    Raises:
        ConfigError, DataError, CheckpointError: naming key or file, and the fix.
    """
    layout = ParallelLayout.from_config(config, world_size)
    run_folder = Path(config.logging.root) / config.logging.run
    says = rank == 0 and config.checkpoint.load == "latest"
    newest = newest_complete(run_folder / "checkpoints", print if says else lambda line: None)
    resume, backbones = _find_weights(config, newest)
    _check_goes_on(config, newest, resume)
    if resume is not None:
        check_resumable(resume, config, layout)
    if backbones is not None:
        check_same_model(str(backbones.path), backbones.model, config.model)
    loader = _build_loader(config, layout, rank)
    if resume is not None:
        loader.load_state_dict(resume.data)
    return Start(config, layout, loader, run_folder, resume, backbones)


def _find_weights(config: Config, newest: Path | None) -> tuple[RunState | None, IdeficsFolder | None]:
    load, init = config.checkpoint.load, config.checkpoint.init
    if load == "latest":
        if newest is not None:
            return read_state(newest), None
    elif load not in (None, "none"):
        folder = Path(load)
        if (folder / "config.json").exists():
            return None, IdeficsFolder(folder)
        return read_state(folder), None
    return None, IdeficsFolder(init) if init else None


def _check_goes_on(config: Config, newest: Path | None, resume: RunState | None) -> None:
    """A run does not start below checkpoints that its folder already holds: two histories would mix."""
    step = resume.step if resume else 0
    if newest is not None and read_state(newest).step > step:
        raise ConfigError(
            f"checkpoint.load={config.checkpoint.load} starts at step {step}, but {newest.parent} already goes on to "
            f"{newest.name}; use checkpoint.load=latest, another logging.run, or remove what it should replace"
        )


def lock_run_folder(folder: Path) -> IO[str]:
    """Keep other runs out of a run folder for as long as the returned file is open.

    Raises:
        ConfigError: another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another run is still writing to {folder} (torchrun's workers outlive it when it is killed); stop it, or "
            "choose another logging.run"
        ) from None
    except OSError:  # a file system without locks
        pass
    return file


def _build_loader(config: Config, layout: ParallelLayout, rank: int) -> StepLoader:
    if not config.data.sources:
        raise ConfigError("data.sources is empty: name at least one source, {name: ..., shards: ...}")
    if config.model.additional_vocab_size < 2:
        raise ConfigError(
            f"model.additional_vocab_size={config.model.additional_vocab_size}: the two tokens of an image need rows "
            "of their own; 2 would work"
        )
    pipeline_rank, data_rank, tensor_rank = layout.coordinates(rank)
    return StepLoader(
        config.data,
        config.model.vocab_size,
        config.model.vision.image_size,
        seed=config.training.seed,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        data_parallel_rank=data_rank,
        data_parallel_size=layout.data,
        tensor_rank=tensor_rank,
        tensor_size=layout.tensor,
        encodes_images=pipeline_rank == 0,
        pad_token_id=config.model.pad_token_id,
    )
