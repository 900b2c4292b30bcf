"""The batches of a training step on one rank.

Every rank runs the same planner over all packs and builds only its own microbatches. Step k takes the packs
`k * global_batch_size` to `(k + 1) * global_batch_size - 1`. Within the step, global microbatch q holds
`micro_batch_size` consecutive packs, and belongs to data-parallel rank `q % data_parallel_size`. So the packs of a
step, and which of them share a microbatch, do not depend on the parallel layout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from megatron_atum.batch import Batch, StepData
from megatron_atum.config.schema import DataConfig
from megatron_atum.data.index import SourceIndex, build_index
from megatron_atum.data.microbatch import ImageShare, MicrobatchBuilder
from megatron_atum.data.planner import Pack, Planner
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import ConfigError, DataError


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
    ) -> None:
        """Builds the index of every source.

        Args:
            model_vocab_size: `model.vocab_size`; the tokenizer must have as many pieces.
            image_size: side of the square the vision tower takes, in pixels.
            micro_batch_size: packs of a microbatch.
            global_batch_size: packs of a step over all data-parallel ranks.
            tensor_rank, tensor_size: decide which images of a microbatch this rank decodes.
            encodes_images: False on pipeline stages without the vision tower; they get no pixels.

        Raises:
            ConfigError: the global batch cannot be dealt evenly.
            DataError: tokenizer or shards cannot be used.
        """
        per_round = micro_batch_size * data_parallel_size
        if global_batch_size < 1 or global_batch_size % per_round:
            raise ConfigError(
                f"training.global_batch_size={global_batch_size} is no multiple of training.micro_batch_size x "
                f"data-parallel size = {per_round}; use e.g. {max(1, global_batch_size // per_round) * per_round}"
            )
        self.tokenizer = _load_tokenizer(data_config, model_vocab_size)
        length = data_config.sequence_length
        self.indexes: list[SourceIndex] = [build_index(s, self.tokenizer, length) for s in data_config.sources]
        weights = {source.name: source.weight for source in data_config.sources}
        self._planner = Planner(self.indexes, weights, length, seed)
        self._builder = MicrobatchBuilder(
            indexes=self.indexes,
            tokenizer=self.tokenizer,
            sequence_length=length,
            image_size=image_size,
            seed=seed,
            share=ImageShare(encodes_images, tensor_rank, tensor_size),
            augment=data_config.augment,
            p_next=data_config.p_next,
            pad_token_id=pad_token_id,
        )
        self._workers = data_config.workers
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._dp_rank, self._dp_size = data_parallel_rank, data_parallel_size
        self._microbatches = global_batch_size // per_round
        self._state = self._planner.state_dict()
        self._planned_states: deque[dict[str, Any]] = deque()  # one per step that is planned but not handed out
        self._stream: Iterator[Batch | DataError] | None = None

    def next_step(self) -> StepData:
        """The microbatches of this rank for the next step. Raises DataError (e.g. an image that cannot be decoded)."""
        if self._stream is None:
            self._stream = self._start()
        microbatches = []
        for _ in range(self._microbatches):
            built = next(self._stream)
            if isinstance(built, DataError):
                self.close()
                raise built
            microbatches.append(built)
        self._state = self._planned_states.popleft()
        return StepData(microbatches, faults=sum(index.dropped for index in self.indexes))

    def fault_report(self) -> dict[str, dict[str, int]]:
        """Samples dropped, by source and reason."""
        return {index.name: dict(index.faults) for index in self.indexes}

    def state_dict(self) -> dict[str, Any]:
        """State after the last step handed out, whatever was prefetched beyond it. The same on every rank."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the step the state was taken at, under any layout. Raises DataError."""
        self._planner.load_state_dict(state)
        self._state = dict(state)
        self.close()

    def close(self) -> None:
        """Stops the workers. The next step after it is again the one after the last that was handed out."""
        self._stream = None  # the iterator's destructor ends its processes
        self._planned_states.clear()
        self._planner.load_state_dict(self._state)

    def _start(self) -> Iterator[Batch | DataError]:
        loader: DataLoader[Any] = DataLoader(
            self._builder,  # type: ignore[arg-type]  # keys are tuples of packs
            batch_size=None,
            sampler=self._plan(),
            num_workers=self._workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # else it draws a number from the global generator of the training process
        )
        return iter(loader)

    def _plan(self) -> Iterator[tuple[Pack, ...]]:
        """Packs of each microbatch of this rank. Runs in the training process, ahead of what is handed out."""
        size = self._micro_batch_size
        while True:
            packs = tuple(self._planner.next() for _ in range(self._global_batch_size))
            self._planned_states.append(self._planner.state_dict())
            for q in range(self._dp_rank, self._global_batch_size // size, self._dp_size):
                yield packs[q * size : (q + 1) * size]


def _unchanged(batch: Any) -> Any:
    return batch


def _load_tokenizer(data_config: DataConfig, vocab_size: int) -> Tokenizer:
    if not data_config.tokenizer:
        raise DataError("data.tokenizer is not set; give the language model's tokenizer.model or its folder")
    return Tokenizer.load(data_config.tokenizer, vocab_size)
