"""Going back to a checkpoint in the middle of a run, with the data going on: PaLM's remedy for loss spikes.

PaLM (arXiv 2204.02311, section 5.1) restarts from a checkpoint before the spike and leaves out the batches around it.
RUN/rollbacks.json keeps each rollback with the position of the data, because the checkpoint that is gone back to has
the position of the spike before it: a run that is killed before its next checkpoint would walk into it again.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_atum.checkpoint.files import write_text
from megatron_atum.checkpoint.folder import missing, step_folders
from megatron_atum.checkpoint.run_checkpoint import RunCheckpoint
from megatron_atum.checkpoint.stored import RunState, read_state
from megatron_atum.errors import CheckpointError
from megatron_atum.parallel.agreement import together

FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    step: int  # that it was found in
    to: int  # step of the checkpoint that training went on from
    data: dict[str, Any]  # position of the data from there on
    reason: str


def read_rollbacks(run_folder: Path, step: int) -> list[Rollback]:
    """Those that a run at this step has behind it. What came after its last one is a history that was given up; what
    came before it counts, also if it went back less far.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = run_folder / FILE
    try:
        content = json.loads(path.read_text())
        rollbacks = [Rollback(**entry) for entry in content]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it, or remove it to forget them") from None
    return rollbacks[: max((number + 1 for number, one in enumerate(rollbacks) if one.to <= step), default=0)]


def write_rollbacks(run_folder: Path, rollbacks: list[Rollback]) -> None:
    write_text(run_folder / FILE, json.dumps([asdict(rollback) for rollback in rollbacks], indent=1))


def data_position(rollbacks: list[Rollback], step: int, data: dict[str, Any]) -> dict[str, Any]:
    """Where the data goes on from a checkpoint. Args: data: what the checkpoint says."""
    here = [rollback.data for rollback in rollbacks if rollback.to == step]
    return here[-1] if here else data


def last_good(checkpoints: Path, before: int) -> Path | None:
    """The newest complete checkpoint that was saved before a step ran."""
    for folder in step_folders(checkpoints):
        if int(folder.name.removeprefix("step-")) < before and not missing(folder):
            return folder
    return None


def later_than(checkpoints: Path, folder: Path) -> list[Path]:
    """Checkpoints with what is to be undone in them."""
    return [path for path in step_folders(checkpoints) if path.name > folder.name]


def find_good(checkpoint: RunCheckpoint, before: int) -> Path | None:
    """`last_good`, the same on all ranks: one looks, since a folder may be on its way to the others. Collective."""
    found = [last_good(checkpoint.checkpoints, before) if checkpoint.groups.rank == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def roll_back(
    checkpoint: RunCheckpoint, run_folder: Path, folder: Path, rollback: Rollback, earlier: list[Rollback]
) -> RunState:
    """Load a checkpoint, put what is newer out of the way, and record it. Collective over all ranks.

    Args:
        rollback: what is to be recorded.
        earlier: the run's rollbacks so far.

    Raises:
        CheckpointError: it cannot be read, or the rollback not be recorded.
    """
    state = together(lambda: read_state(folder))
    checkpoint.load(state)

    def write() -> None:
        if checkpoint.groups.rank != 0:
            return
        try:
            # In this order: killed in between, the run starts from this checkpoint and finds the spike again.
            for later in later_than(checkpoint.checkpoints, folder):
                shutil.rmtree(later)
            write_rollbacks(run_folder, [*earlier, rollback])
        except OSError as error:
            raise CheckpointError(f"the rollback to {folder} could not be recorded: {error}") from None

    together(write)
    return state
