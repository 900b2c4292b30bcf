"""Where a run starts: everything that can be refused is refused here, before any process group exists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_atum.checkpoint.hf_folder import IdeficsFolder, check_same_model
from megatron_atum.checkpoint.run_state import RunState, check_resumable, newest_complete, read_state
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


def prepare_start(config: Config, world_size: int, rank: int) -> Start:
    """Check configuration, data and checkpoints for one rank.

    Raises:
        ConfigError, DataError, CheckpointError: naming key or file, and the fix.
    """
    layout = ParallelLayout.from_config(config, world_size)
    run_folder = Path(config.logging.root) / config.logging.run
    resume, backbones = _find_weights(config, run_folder / "checkpoints", report=rank == 0)
    if resume is not None:
        check_resumable(resume, config, layout)
    if backbones is not None:
        check_same_model(str(backbones.path), backbones.model, config.model)
    loader = _build_loader(config, layout, rank)
    if resume is not None:
        loader.load_state_dict(resume.data)
    return Start(config, layout, loader, run_folder, resume, backbones)


def _find_weights(config: Config, checkpoints: Path, *, report: bool) -> tuple[RunState | None, IdeficsFolder | None]:
    load, init = config.checkpoint.load, config.checkpoint.init
    if load == "latest":
        newest = newest_complete(checkpoints, print if report else lambda line: None)
        if newest is not None:
            return read_state(newest), None
    elif load not in (None, "none"):
        folder = Path(load)
        if (folder / "config.json").exists():
            return None, IdeficsFolder(folder)
        return read_state(folder), None
    return None, IdeficsFolder(init) if init else None


def _build_loader(config: Config, layout: ParallelLayout, rank: int) -> StepLoader:
    if not config.data.sources:
        raise ConfigError("data.sources is empty: name at least one source, {name: ..., shards: ...}")
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
