"""Where a run starts: configuration, data and checkpoints are checked here, before any process group exists."""

from __future__ import annotations

import fcntl
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from megatron_atum.checkpoint.assets import OF_A_TOKENIZER, read_assets
from megatron_atum.checkpoint.folder import damaged, newest_complete, silent, step_folders
from megatron_atum.checkpoint.hf_folder import IdeficsFolder, check_start
from megatron_atum.checkpoint.run_checkpoint import check_resumable
from megatron_atum.checkpoint.stored import RunState, StoredCheckpoint, find_checkpoint, read_state
from megatron_atum.config.loader import to_yaml
from megatron_atum.config.schema import Config
from megatron_atum.data.loader import StepLoader
from megatron_atum.data.tokenizer import FILE_NAME
from megatron_atum.data.validation import ValidationSet, check_held_out, open_validation
from megatron_atum.errors import CheckpointError, ConfigError
from megatron_atum.model.frozen_gemm import check_device
from megatron_atum.parallel.agreement import check_equal, together
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.training.kernels import check_kernels, other_adam
from megatron_atum.training.parameter_groups import check_groups
from megatron_atum.training.profiling import check_profile
from megatron_atum.training.rollback import Rollback, data_position, read_rollbacks
from megatron_atum.training.trackers import check_trackers


@dataclass(frozen=True)
class Start:
    """A checked run: its layout, its data, and what its weights come from."""

    config: Config
    layout: ParallelLayout
    loader: StepLoader
    validation: dict[str, ValidationSet]  # held-out sources by name
    run_folder: Path
    resume: RunState | None  # go on from this checkpoint
    weights: IdeficsFolder | StoredCheckpoint | None  # or start from these; neither: drawn from the seed
    rollbacks: tuple[Rollback, ...] = ()  # that the run has behind it
    lock: IO[str] | None = None  # rank 0's, of the run folder; it keeps other runs out while it is open

    @property
    def checkpoints(self) -> Path:
        return self.run_folder / "checkpoints"

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint of this project's format that is read at the start."""
        if self.resume is not None:
            return self.resume.folder
        return self.weights.folder if isinstance(self.weights, StoredCheckpoint) else None

    def identity(self) -> dict[str, Any]:
        """What must be the same on every rank."""
        return {
            "configuration": to_yaml(self.config),
            "checkpoint to start from": str(self.checkpoint),
            "step": self.resume.step if self.resume else 0,
            "data stream": self.loader.state_dict(),
        }

    def assets(self) -> dict[str, bytes]:
        """Small files that are kept with each checkpoint: those the weights came with, and the tokenizer in use."""
        found: dict[str, bytes] = {}
        if self.checkpoint is not None:
            found = StoredCheckpoint(self.checkpoint).assets
        elif isinstance(self.weights, IdeficsFolder):
            found = read_assets(self.weights.path)
        ours = self.loader.tokenizer.model
        added = self.config.model.additional_vocab_size
        other = self.weights is not None and self.weights.model.additional_vocab_size != added
        if other or found.get(FILE_NAME, ours) != ours:  # files of another tokenizer would be wrong
            found = {name: content for name, content in found.items() if name not in OF_A_TOKENIZER}
        return found | {FILE_NAME: ours}


def prepare_start(
    config: Config, world_size: int, rank: int, without: Collection[Path] = (), *, goes_on: bool = True
) -> Start:
    """Check configuration, data and checkpoints for one rank.

    Args:
        without: checkpoints of this run that do not count.
        goes_on: whether the run is to be continued; if not, it may begin anywhere.

    Raises:
        ConfigError, DataError, CheckpointError: naming key or file, and the fix.
    """
    layout = ParallelLayout.from_config(config, world_size)
    run_folder = Path(config.logging.root) / config.logging.run
    says = rank == 0 and config.checkpoint.load == "latest"
    checkpoints = run_folder / "checkpoints"
    newest = newest_complete(checkpoints, print if says else silent, without)
    if newest is None and config.checkpoint.load == "latest" and step_folders(checkpoints):
        raise CheckpointError(
            f"{checkpoints} holds steps, and none of them can be used (said above, by rank 0); wait until all files "
            "have arrived, mend them, or start anew with another logging.run"
        )
    resume, weights = _find_weights(config, newest)
    if goes_on:
        _check_goes_on(config, newest, resume)
    if resume is not None:
        check_resumable(resume, config)
        if rank == 0 and (other := other_adam(resume, config)):
            print(other, flush=True)
    if weights is not None:
        drawn = check_start(place_of(weights), weights.model, config.model)
        if drawn and rank == 0:
            print(drawn, flush=True)
    check_groups(config)
    check_kernels(config.kernels)
    check_device(config)
    check_profile(config, world_size)
    if rank == 0:
        check_trackers(config)
    loader, validation = _open_data(config, layout, rank)
    rollbacks = read_rollbacks(run_folder, resume.step if resume else 0)
    if resume is not None:
        loader.load_state_dict(data_position(rollbacks, resume.step, resume.data))
    return Start(config, layout, loader, validation, run_folder, resume, weights, tuple(rollbacks))


def confirm_start(start: Start, rank: int) -> Start:
    """Read the checkpoint to start from against its checksums, each rank a share of the files.

    Collective over all ranks. With checkpoint.load=latest a damaged one is passed over for the one before it.

    Raises:
        ConfigError: ranks would start differently.
        CheckpointError: the checkpoint is damaged and was asked for by name.
    """
    without: set[Path] = set()
    world_size = start.layout.world_size
    lock = together(lambda: _locked(start) if rank == 0 else None)
    start = replace(start, lock=lock)
    while True:
        check_equal(start.identity())
        folder = start.checkpoint
        if folder is None or not start.config.checkpoint.verify:
            return start
        problems = _damage(folder, rank, world_size)
        if not problems:
            return start
        what = f"{folder} is damaged: {'; '.join(problems[:5])}"
        if start.resume is None or start.config.checkpoint.load != "latest":
            raise CheckpointError(f"{what}. Use another checkpoint, or a whole copy of this one")
        if rank == 0:
            print(f"passing over {what}", flush=True)
        without.add(folder)
        again = together(partial(prepare_start, start.config, world_size, rank, without))
        start = replace(again, lock=lock)


def _locked(start: Start) -> IO[str]:
    """Raises ConfigError: another run has the folder, or had it until now and went on."""
    lock = lock_run_folder(start.run_folder)
    newest = newest_complete(start.checkpoints)
    if start.config.checkpoint.load == "latest" and newest != (start.resume.folder if start.resume else None):
        raise ConfigError(f"{start.checkpoints} changed while this run was starting: {newest} is new; start it again")
    return lock


def _damage(folder: Path, rank: int, world_size: int) -> list[str]:
    mine = together(lambda: damaged(folder, rank, world_size))
    everyone: list[list[str]] = [[] for _ in range(world_size)]
    dist.all_gather_object(everyone, mine)
    return [problem for part in everyone for problem in part]


def _find_weights(
    config: Config, newest: Path | None
) -> tuple[RunState | None, IdeficsFolder | StoredCheckpoint | None]:
    load, init = config.checkpoint.load, config.checkpoint.init
    if load == "latest":
        if newest is not None:
            return read_state(newest), None
    elif load not in (None, "none"):
        if (Path(load) / "config.json").exists():
            return None, IdeficsFolder(load)
        state = read_state(find_checkpoint(Path(load)))
        return (state, None) if state.is_training else (None, StoredCheckpoint(state.folder))
    if not init:
        return None, None
    if (Path(init) / "config.json").exists() or not Path(init).is_dir():
        return None, IdeficsFolder(init)
    return None, StoredCheckpoint(find_checkpoint(Path(init)))


def place_of(weights: IdeficsFolder | StoredCheckpoint) -> str:
    """Where weights come from, for messages."""
    return str(weights.path if isinstance(weights, IdeficsFolder) else weights.folder)


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
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): see to it that one run at a time uses it", flush=True)
    return file


def _open_data(config: Config, layout: ParallelLayout, rank: int) -> tuple[StepLoader, dict[str, ValidationSet]]:
    if not config.data.sources:
        raise ConfigError("data.sources is empty: name at least one source, {name: ..., shards: ...}")
    if config.model.additional_vocab_size < 2:
        raise ConfigError(
            f"model.additional_vocab_size={config.model.additional_vocab_size}: the two tokens of an image need rows "
            "of their own; 2 would work"
        )
    pipeline_rank, data_rank, tensor_rank = layout.coordinates(rank)
    placement: dict[str, Any] = {
        "model_vocab_size": config.model.vocab_size,
        "image_size": config.model.vision.image_size,
        "micro_batch_size": config.training.micro_batch_size,
        "global_batch_size": config.training.global_batch_size,
        "data_parallel_rank": data_rank,
        "data_parallel_size": layout.data,
        "tensor_rank": tensor_rank,
        "tensor_size": layout.tensor,
        "encodes_images": pipeline_rank == 0,
        "pad_token_id": config.model.pad_token_id,
    }
    loader = StepLoader(config.data, seed=config.training.seed, ramp_up=config.training.ramp_up, **placement)
    validation = open_validation(config.data, **placement)
    check_held_out(loader, validation)
    return loader, validation
