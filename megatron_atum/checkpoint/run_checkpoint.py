"""Saving and loading the state of a run: any layout to any layout, beside the training, complete or absent.

A save has three phases. All ranks copy what trains into host memory (this blocks training); a thread of each rank
writes the copies to files; when all have written, and all know it, rank 0 writes the records and renames the folder
into place. Only the first and the last phase communicate, both in the training thread.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from megatron_atum.checkpoint.files import aside_of, commit_folder
from megatron_atum.checkpoint.folder import (
    folders_of,
    missing,
    remove,
    remove_unfinished,
    retire_old,
    step_folder,
    step_folders,
)
from megatron_atum.checkpoint.hf_folder import check_same_model
from megatron_atum.checkpoint.index import Written, read_index
from megatron_atum.checkpoint.rank_tensors import ExactWeights, RankTensors, Staging, load_optimizer, stored_random
from megatron_atum.checkpoint.stored import RunState, add_assets, complete, complete_frozen, write_state
from megatron_atum.checkpoint.tensor_file import FileRecord
from megatron_atum.checkpoint.weights import fill
from megatron_atum.checkpoint.writer import Item, write_items
from megatron_atum.config.schema import Config
from megatron_atum.errors import CheckpointError
from megatron_atum.parallel.agreement import all_true, together
from megatron_atum.parallel.device import wait_for_device
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.parallel.random_state import set_random_state


def check_resumable(state: RunState, config: Config) -> None:
    """Raises CheckpointError if a run cannot go on from a checkpoint. Any layout can."""
    check_same_model(str(state.folder), state.model, config.model)
    if state.is_training and state.model.freeze != config.model.freeze:
        raise CheckpointError(
            f"{state.folder} was trained with {state.model.freeze}, and this run has {config.model.freeze}; its "
            f"optimizer state does not fit. Start a new run from its weights to change model.freeze: "
            f"checkpoint.init={state.folder} with another logging.run"
        )


def layout_record(layout: ParallelLayout) -> dict[str, Any]:
    return {**asdict(layout), "units_per_chunk": list(layout.units_per_chunk)}


@dataclass
class Saved:
    """How a save ended. `error` is empty if it is complete; else nothing of it is left, and older ones stay."""

    step: int
    folder: Path
    error: str
    blocked_s: float  # how long training stood still for it
    total_s: float


@dataclass
class _Job:
    step: int
    folder: Path
    state: dict[str, Any]  # for state.json
    steps: dict[str, int]
    items: dict[str, list[Item]]  # by prefix of the file
    frozen_items: list[Item] | None  # None: they are there already
    began: float
    blocked_s: float = 0.0
    result: Future[_Result] = field(default_factory=Future)


@dataclass
class _Result:
    """What a rank has written."""

    records: list[FileRecord]
    written: list[Written]
    frozen_records: list[FileRecord]
    frozen_written: list[Written]
    steps: dict[str, int]


class RunCheckpoint:
    """Saves and loads the engine of this rank. Every method is collective over all ranks.

    Args:
        checkpoints: where the run's checkpoints lie; all ranks see the same folder.
        assets: small files that are kept with each checkpoint.
        beat: called while a save is waited for, which may take long.
    """

    def __init__(
        self,
        config: Config,
        groups: ProcessGroups,
        engine: Any,
        checkpoints: Path,
        assets: dict[str, bytes],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.groups, self.engine, self.checkpoints = config, groups, engine, checkpoints
        self._beat = beat
        self.assets = assets
        self.tensors = RankTensors(engine.stages, config.model, groups, engine.optimizer)
        self._staging = Staging()
        self._frozen: str | None = None  # name of the frozen weights in this run's folder, once they are there
        self._pending: _Job | None = None
        self._removal = _thread("remove", remove, [])

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._pending is not None

    def clean(self) -> None:
        """Remove what an earlier run left half written. The run folder must be locked."""
        together(lambda: remove_unfinished(self.checkpoints) if self.groups.rank == 0 else None)

    # Saving ----------------------------------------------------------------------------------------------------------

    def save(self, step: int, data: dict[str, Any], health: dict[str, Any] | None = None) -> list[Saved]:
        """Save the state after `step`; what could not be written is said, not raised.

        Args:
            data: state of the loader.
            health: what of the last steps decides on the next ones.

        Returns:
            How saves ended that are over now: this one too, unless checkpoint.asynchronous.
        """
        over, began = self.wait(), time.perf_counter()
        for chunk in self.engine.chunks:
            if chunk.ddp_config.overlap_param_gather:  # else the other ranks' shards are those of the step before
                chunk.start_param_sync(force_sync=True)
        folder = step_folder(self.checkpoints, step)
        try:
            job = self._together(folder, lambda: self._start(step, folder, data, health or {}, began))
        except CheckpointError as problem:
            seconds = time.perf_counter() - began
            return [*over, Saved(step, folder, str(problem), seconds, seconds)]
        self._write_beside(job)  # also a save that is waited for: in `wait` the ranks show each other that they live
        job.blocked_s = time.perf_counter() - job.began
        self._pending = job
        return over if self.config.checkpoint.asynchronous else over + self.wait()

    def poll(self) -> list[Saved]:
        """Finish a save that all ranks have written. Costs one small all-reduce while there is one."""
        if self._pending is None or not all_true(self._pending.result.done()):
            return []
        return [self._end(self._pending)]

    def wait(self) -> list[Saved]:
        """Finish the save that is under way, if there is one, to the removal of what it replaces."""
        job, over = self._pending, []
        if job is not None:
            while not all_true(job.result.done()):  # not in one collective, which would time out for a slow disk
                self._beat()
                time.sleep(0.05)
            over = [self._end(job)]
        self._removal.join()
        return over

    def _end(self, job: _Job) -> Saved:
        self._pending = None
        began, error = time.perf_counter(), ""
        try:
            self._finish(job)
        except CheckpointError as problem:
            error = str(problem)
        now = time.perf_counter()
        blocked = job.blocked_s + now - began if self.config.checkpoint.asynchronous else now - job.began
        return Saved(job.step, job.folder, error, blocked, now - job.began)

    def _start(self, step: int, folder: Path, data: dict[str, Any], health: dict[str, Any], began: float) -> _Job:
        """Everything that training may change is copied, or in memory that it does not touch."""
        trainable, moments = self.tensors.weights(trainable=True), self.tensors.optimizer_state()
        if self.config.checkpoint.asynchronous:
            weights, optimizer = self._staging.copy(trainable), self._staging.copy(moments)
        else:
            weights, optimizer = [part.item() for part in trainable], [part.item() for part in moments]
        wait_for_device()  # files are written from another stream
        frozen = None if self._frozen else [part.item() for part in self.tensors.weights(trainable=False)]
        state = {
            "step": step,
            "layout": layout_record(self.groups.layout),
            "config": OmegaConf.to_container(OmegaConf.structured(self.config)),
            "data": data,
            "health": health,
            "scheduler": self.engine.scheduler.state_dict(),
        }
        return _Job(
            step=step,
            folder=folder,
            state=state,
            steps=self.tensors.optimizer_steps(),
            items={"weights": weights, "optimizer": [*optimizer, *self.tensors.random()]},
            frozen_items=frozen,
            began=began,
        )

    def _write_beside(self, job: _Job) -> None:
        try:
            _thread(f"save-{job.step}", self._write, job)
        except RuntimeError:  # the machine has no thread left: slower, and still saved
            self._write(job)

    def _write(self, job: _Job) -> None:
        """This rank's files. Runs in a thread; must not communicate."""
        try:
            job.result.set_result(self._write_files(job))
        except BaseException as problem:
            job.result.set_exception(problem)

    def _write_files(self, job: _Job) -> _Result:
        result = _Result([], [], [], [], job.steps)
        aside, frozen = aside_of(job.folder), self._frozen_aside
        aside.mkdir(parents=True, exist_ok=True)
        for prefix, items in job.items.items():
            records, written = write_items(aside, f"{prefix}-{self.groups.rank:05d}", items)
            result.records += records
            result.written += written
        if job.frozen_items:
            frozen.mkdir(exist_ok=True)
            name = f"weights-{self.groups.rank:05d}"
            result.frozen_records, result.frozen_written = write_items(frozen, name, job.frozen_items)
        return result

    @property
    def _frozen_aside(self) -> Path:
        return self.checkpoints / "frozen.tmp"

    def _finish(self, job: _Job) -> None:
        try:
            result = self._together(job.folder, job.result.result)
            results: list[Any] = [None] * self.groups.layout.world_size
            dist.gather_object(result, results if self.groups.rank == 0 else None)
            names = [""]
            self._together(job.folder, lambda: self._commit(job, results, names) if self.groups.rank == 0 else None)
            dist.broadcast_object_list(names)
            self._frozen = names[0]
        except CheckpointError:  # on all ranks, each of which has stopped writing
            together(lambda: self._abandon(job) if self.groups.rank == 0 else None)
            raise

    def _abandon(self, job: _Job) -> None:
        shutil.rmtree(aside_of(job.folder), ignore_errors=True)
        shutil.rmtree(self._frozen_aside, ignore_errors=True)

    def _commit(self, job: _Job, results: list[_Result], names: list[str]) -> None:
        """Rank 0: everything is on disk; make it count."""
        names[0] = self._frozen or self._commit_frozen(results)
        aside = aside_of(job.folder)
        steps: dict[str, int] = {}
        for result in results:
            for name, count in result.steps.items():
                assert steps.setdefault(name, count) == count, f"ranks differ in the updates of {name}"
        write_state(aside, **job.state, frozen=names[0] or None, optimizer_steps=steps)
        add_assets(aside, self.assets)
        records = [record for result in results for record in result.records]
        complete(aside, records, [chunk for result in results for chunk in result.written])
        commit_folder(aside, job.folder)
        self._removal = _thread("remove", self._remove_old, job.folder)

    def _remove_old(self, newest: Path) -> None:
        """Runs in a thread of rank 0: looking through many files, and freeing large ones, takes its time."""
        keep, keep_every = self.config.checkpoint.keep, self.config.checkpoint.keep_every
        remove(retire_old(self.checkpoints, newest, keep, keep_every))

    def _commit_frozen(self, results: list[_Result]) -> str:
        records = [record for result in results for record in result.frozen_records]
        if not records:
            return ""
        name = complete_frozen(
            self._frozen_aside, records, [chunk for result in results for chunk in result.frozen_written]
        )
        _put_frozen(self._frozen_aside, self.checkpoints / name)
        return name

    def _together(self, folder: Path, work: Callable[[], Any]) -> Any:
        """Do this rank's part; if any rank failed, all of them raise."""

        def guarded() -> Any:
            try:
                return work()
            except Exception as problem:  # a full disk, a storage or memory that is gone: the run has what it needs
                where = f"checkpoint {folder} could not be written: rank {self.groups.rank}"
                raise CheckpointError(f"{where}: {str(problem) or repr(problem)}") from None

        return together(guarded)

    # Loading ---------------------------------------------------------------------------------------------------------

    def load(self, state: RunState) -> None:
        """Weights, optimizer, schedule and random state; also amid a run. `check_resumable` must have passed.

        Raises:
            CheckpointError: a file does not hold what it should.
        """
        stored = together(lambda: ExactWeights(state.folder, self.engine.dtype))
        try:
            together(lambda: fill(self.engine.stages, self.config.model, self.groups, stored))
            together(lambda: load_optimizer(self.tensors, stored))
            if state.layout == layout_record(self.groups.layout):
                set_random_state(together(lambda: stored_random(self.groups, stored.reader)))
        finally:
            stored.close()
        self.engine.scheduler.num_steps = 0  # what is loaded is added to it
        self.engine.scheduler.load_state_dict(state.scheduler)

    def take_frozen(self, folder: Path) -> None:
        """Share the frozen weights of the checkpoint that the weights came from, if they are those of this run.

        In this run's folder they are named again; elsewhere they are linked, or else written with the first save.
        """
        source = together(lambda: next(iter(folders_of(folder)[1:]), None))
        if source is None or not all_true(together(lambda: self._holds_my_frozen(source))):
            return
        target = self.checkpoints / source.name
        if all_true(self.groups.rank != 0 or _linked(source, target)):
            self._frozen = source.name

    def _holds_my_frozen(self, source: Path) -> bool:
        """Whether a folder holds just the frozen ones of this rank's weights, in this run's precision."""
        found = read_index(source)
        return all(
            (name in found and found[name].dtype == parameter.dtype)
            if not parameter.requires_grad
            else name not in found
            for row, parameter in self.tensors.rows
            for name in row.hf
        )


def _thread(name: str, work: Callable[..., None], *args: Any) -> Thread:
    """A thread that does not keep a failing process alive."""
    thread = Thread(target=work, args=args, name=name, daemon=True)
    thread.start()
    return thread


def _put_frozen(aside: Path, target: Path) -> None:
    """Put a folder of frozen weights in its place. Its name says what is in it, so where steps need one that is there
    already, it stays."""
    if step_folders(target.parent) and not missing(target):
        shutil.rmtree(aside)
    else:
        commit_folder(aside, target)


def _linked(source: Path, target: Path) -> bool:
    """Have a folder of frozen weights at another place without copying it; False where that is not possible."""
    if source.resolve() == target.resolve():
        return True
    aside = aside_of(target)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for file in source.iterdir():
            os.link(file, aside / file.name)
        _put_frozen(aside, target)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        return False
    return True
