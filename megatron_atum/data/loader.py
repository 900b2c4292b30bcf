"""The batches of a training step on one rank.

Every rank runs the same planner over all packs and builds only its own microbatches. A step takes the next packs, as
many as ramp_up.py says for the number of rows before it; which of them share a microbatch, and the order of the
microbatches, is decided by their images (deal.py). Microbatch q belongs to data-parallel rank
`q % data_parallel_size`. So what a step computes does not depend on the parallel layout.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_atum.batch import Batch, StepData, images_per_tensor_rank
from megatron_atum.config.schema import DataConfig, RampUpConfig
from megatron_atum.data.deal import deal
from megatron_atum.data.faults import FaultCounts, hide_images
from megatron_atum.data.index import open_source
from megatron_atum.data.microbatch import Built, ImageShare, MicrobatchBuilder
from megatron_atum.data.mixture import shares
from megatron_atum.data.planner import Pack, Planner
from megatron_atum.data.ramp_up import BatchSize
from megatron_atum.data.storage import Storage
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import AtumError, ConfigError, DataError, DataFailure

PREFETCH = 4  # microbatches that each worker has under way
SAME_REQUEST_S = 1.0  # signals closer together are one request: launchers pass on what all processes have got

# Takes a hash of the step's rows, the fault codes of all its images as this rank knows them, and what went wrong here
# (then without rows and codes); returns the largest of all ranks' codes, or raises on all ranks what went wrong on one.
Agree = Callable[[int, Tensor, Exception | None], Tensor]


def alone(plan: int, codes: Tensor, error: Exception | None) -> Tensor:
    """Agreement of a single process."""
    if error is not None:
        raise error
    return codes


@dataclass(frozen=True)
class PlannedStep:
    """What every rank knows of a step before anything is read."""

    microbatches: list[list[Pack]]
    state: dict[str, Any]  # of the planner after it

    @cached_property
    def packs(self) -> list[Pack]:
        return [pack for packs in self.microbatches for pack in packs]

    @property
    def fingerprint(self) -> int:
        """64-bit hash, signed. Python hashes numbers, and tuples of them, the same in every process."""
        return hash(tuple((pack.id, pack.source, pack.samples, pack.cuts) for pack in self.packs))

    @cached_property
    def first_image(self) -> list[int]:
        """Number within the step of each microbatch's first image; at the end, images of the step."""
        counts = (sum(pack.images for pack in packs) for packs in self.microbatches)
        return list(accumulate(counts, initial=0))


class StepLoader:
    """Hands out one StepData per global step; its state is that of the last step handed out."""

    def __init__(
        self,
        data_config: DataConfig,
        model_vocab_size: int,
        image_size: int,
        *,
        seed: int,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        tensor_rank: int,
        tensor_size: int,
        encodes_images: bool,
        pad_token_id: int = 0,
        ramp_up: RampUpConfig | None = None,
    ) -> None:
        """Opens every source.

        Args:
            model_vocab_size: `model.vocab_size`; the tokenizer must have as many pieces.
            image_size: side of the square the vision tower takes, in pixels.
            micro_batch_size: packs of a microbatch.
            global_batch_size: packs of a step over all data-parallel ranks.
            tensor_rank, tensor_size: decide which images of a microbatch this rank decodes.
            encodes_images: False on pipeline stages without the vision tower; they get no pixels.
            ramp_up: how the first steps grow to `global_batch_size`; None if they do not.

        Raises:
            ConfigError: a global batch cannot be dealt evenly, or a source has no weight.
            DataError: tokenizer or shards cannot be used, or too much of a source is broken.
        """
        self._batch_size = BatchSize(global_batch_size, ramp_up or RampUpConfig())
        _check_sizes(self._batch_size, micro_batch_size * data_parallel_size)
        self.tokenizer = load_tokenizer(data_config, model_vocab_size)
        storage = Storage()
        sources = data_config.sources
        self.indexes = [open_source(source, data_config.filters, self.tokenizer, storage) for source in sources]
        self.faults = FaultCounts(self.indexes, data_config.max_fault_rate)
        tokens = {index.name: index.tokens for index in self.indexes}
        self.shares = shares(sources, data_config.mixture, tokens)
        length = data_config.sequence_length
        self._planner = Planner(self.indexes, self.shares, length, seed, data_config.shuffle_samples)
        share = ImageShare(encodes_images, tensor_rank, tensor_size)
        self._builder = MicrobatchBuilder(
            data_config, self.indexes, self.tokenizer, image_size, seed, share, storage, pad_token_id
        )
        # Token ids are copied from maps: too little work for a process of its own.
        self._workers = data_config.workers if encodes_images else 0
        self._on_change = data_config.on_change
        self._micro_batch_size = micro_batch_size
        self._dp_rank, self._dp_size = data_parallel_rank, data_parallel_size
        self._planned: deque[PlannedStep] = deque()  # steps that are not handed out yet
        self.last_step: list[Pack] = []  # rows of the last step handed out, those of other ranks too
        self._planner_state = self._planner.state_dict()
        self._stream: Iterator[Built | DataError] | None = None
        self._most_images = micro_batch_size * max(index.max_images for index in self.indexes)

    def next_step(self, agree: Agree = alone) -> StepData:
        """The microbatches of this rank for the next step.

        Raises:
            DataError, DataFailure: with `agree`, on all ranks.
        """
        built, error = self._collect()
        if error is not None:
            self.close()
            agree(0, torch.zeros(0, dtype=torch.uint8), error)
        step = self._planned.popleft()
        self.last_step = step.packs
        codes = agree(step.fingerprint, self._codes(step, built), None)
        lost = self.faults.add(step.packs, codes)
        mine = self._mine(len(step.microbatches))
        batches = [self._finish(step, q, one, codes) for q, one in zip(mine, built, strict=True)]
        self._planner_state = step.state
        self.faults.check()
        return StepData(batches, self.faults.total, tuple(lost))

    def start(self) -> None:
        """Starts the workers, so that they read ahead."""
        if self._stream is None:
            if self._workers and self._builder.ring is None:
                self._builder.ring = self._make_ring()
            handler = signal.getsignal(signal.SIGCHLD)
            self._stream = iter(self._loader())
            if threading.current_thread() is threading.main_thread():
                # torch's raises in the middle of whatever this thread does when a worker dies; the loader's own look at
                # its workers, every few seconds, tells `_collect` instead.
                signal.signal(signal.SIGCHLD, handler)

    def fault_report(self) -> dict[str, dict[str, int]]:
        """Samples dropped and images lost, by source and reason, so far."""
        report = self.faults.report()
        for name, reasons in self._dropped_by_length().items():
            report[name] |= reasons
        return report

    def state_dict(self) -> dict[str, Any]:
        """State after the last step handed out, whatever was prefetched beyond it. The same on every rank."""
        return {**self._planner_state, "faults": self.faults.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the step the state was taken at, under any layout. Raises DataError."""
        self._planner.load_state_dict(state, self._on_change)
        self._planner_state = self._planner.state_dict()
        self.faults.load_state_dict(state.get("faults", {}))
        self.close()

    def close(self) -> None:
        """Stops the workers. The next step after it is again the one after the last that was handed out."""
        self._stream = None  # the iterator's destructor ends its processes
        self._planned.clear()
        self._planner.load_state_dict(self._planner_state)

    def _mine(self, microbatches: int) -> range:
        """Numbers of this rank's microbatches in a step of so many."""
        return range(self._dp_rank, microbatches, self._dp_size)

    def _turns(self, microbatches: int) -> list[int]:
        """The same in the order in which workers take turns: to and fro, since the first ones have the most images."""
        mine, workers = self._mine(microbatches), max(1, self._workers)
        rounds = [mine[begin : begin + workers] for begin in range(0, len(mine), workers)]
        return [q for number, turn in enumerate(rounds) for q in (turn[::-1] if number % 2 else turn)]

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._builder,  # type: ignore[arg-type]  # keys are lists of packs
            batch_size=None,
            sampler=self._plan(),
            num_workers=self._workers,
            prefetch_factor=PREFETCH if self._workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_stay_for_the_parent,
            generator=torch.Generator(),  # else it draws a number from the global generator of the training process
        )

    def _make_ring(self) -> Tensor:
        """A slot for each microbatch that is under way, and one for that which is being taken out."""
        slots, side = PREFETCH * self._workers + 1, self._builder.image_size
        most = images_per_tensor_rank(self._most_images, self._builder.share.tensor_size)
        return torch.empty(slots, most, 3, side, side, dtype=torch.uint8).share_memory_()

    def _plan(self) -> Iterator[tuple[int, list[Pack]]]:
        """Slot and packs of each microbatch of this rank. Runs in the training process, ahead of what is handed out."""
        slot, slots = 0, 1 if self._builder.ring is None else len(self._builder.ring)
        while True:
            packs = [self._planner.next() for _ in range(self._batch_size.at(self._planner.rows))]
            step = PlannedStep(deal(packs, self._micro_batch_size), self._planner.state_dict())
            self._planned.append(step)
            for q in self._turns(len(step.microbatches)):
                yield slot, step.microbatches[q]
                slot = (slot + 1) % slots

    def _collect(self) -> tuple[list[Built], Exception | None]:
        """This rank's microbatches of a step, or why there are none."""
        built: list[Built] = []
        rows = self._batch_size.at(self._planner_state["rows"])  # nothing of the step may be planned so far
        turns = self._turns(rows // self._micro_batch_size)
        try:
            self.start()
            assert self._stream is not None
            for _ in turns:
                one = next(self._stream)
                if isinstance(one, DataError):
                    return [], one
                built.append(self._builder.taken(one))  # before its slot is written to again
        except AtumError as error:  # of the planner
            return [], error
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            return [], DataFailure(_told(error))
        return [one for _, one in sorted(zip(turns, built, strict=True), key=itemgetter(0))], None

    def _codes(self, step: PlannedStep, built: list[Built]) -> Tensor:
        """[images of the step] uint8: what this rank found."""
        codes = torch.zeros(step.first_image[-1], dtype=torch.uint8)
        for q, one in zip(self._mine(len(step.microbatches)), built, strict=True):
            share = self._builder.share.of(sum(one.images_per_row))
            first = step.first_image[q] + share.start
            codes[first : first + len(one.codes)] = torch.from_numpy(one.codes)
        return codes

    def _finish(self, step: PlannedStep, q: int, built: Built, codes: Tensor) -> Batch:
        mine = codes[step.first_image[q] : step.first_image[q + 1]]
        is_chat = [self.indexes[pack.source].kind == "conversations" for pack in step.microbatches[q]]
        return hide_images(self._builder.finish(built), mine, is_chat, self.tokenizer.eos_id)

    def _dropped_by_length(self) -> dict[str, dict[str, int]]:
        positions = self._planner_state["sources"]
        return {index.name: dict(positions[index.name][1][-1]) for index in self.indexes}


def _check_sizes(batch_size: BatchSize, per_round: int) -> None:
    """Raises ConfigError: some batch cannot be dealt to all ranks in whole microbatches."""
    for size in batch_size.all:
        if size < 1 or size % per_round:
            key = "global_batch_size" if size == batch_size.final else "ramp_up makes a batch"
            raise ConfigError(
                f"training.{key}={size} is no multiple of training.micro_batch_size x data-parallel size = "
                f"{per_round}; use e.g. {max(1, size // per_round) * per_round}"
            )


def load_tokenizer(data_config: DataConfig, vocab_size: int) -> Tokenizer:
    """Raises DataError."""
    if not data_config.tokenizer:
        raise DataError("data.tokenizer is not set; give the language model's tokenizer.model or its folder")
    return Tokenizer.load(data_config.tokenizer, vocab_size)


def _unchanged(batch: Any) -> Any:
    return batch


def _stay_for_the_parent(worker: int) -> None:
    """For a worker. A scheduler signals all processes of a job, and what the training process makes of it, such as a
    last checkpoint, may need the worker. So it ends with the training process, or at a second SIGTERM.
    """
    signal.set_wakeup_fd(-1)  # the training process reads from it
    first_at = 0.0

    def terminate(*_: Any) -> None:
        nonlocal first_at
        now = time.monotonic()
        first_at = first_at or now
        if now - first_at > SAME_REQUEST_S:
            os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _told(error: Exception) -> str:
    """What happened, with the place: it may be another rank's."""
    if "DataLoader worker" in str(error):
        return f"a decoding process ended ({error}); if it lacked memory, lower data.workers"
    return f"reading data failed: {''.join(traceback.format_exception(error))}"
