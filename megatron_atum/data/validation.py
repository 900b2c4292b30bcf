"""Held-out sources: the same rows each time, whatever the training seed, the layout or the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_atum.batch import StepData
from megatron_atum.config.schema import DataConfig
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.loader import Agree, StepLoader, alone
from megatron_atum.errors import DataError

SEED = 0


class ValidationSet:
    """The first `data.validation_packs` rows of one source, rounded up to whole steps."""

    def __init__(self, loader: StepLoader, steps: int) -> None:
        self.loader, self.steps = loader, steps
        self._begin = loader.state_dict()

    def batches(self, agree: Agree = alone) -> Iterator[StepData]:
        """The steps of the set, from its first, each time it is called. Raises DataError as the training data does."""
        self.loader.load_state_dict(self._begin)
        for _ in range(self.steps):
            yield self.loader.next_step(agree)
        self.loader.close()


def open_validation(data_config: DataConfig, global_batch_size: int, **placement: Any) -> dict[str, ValidationSet]:
    """By source of `data.validation`, in its order.

    Args:
        placement: the other arguments of StepLoader, without the seed.

    Raises:
        ConfigError, DataError: as StepLoader.
    """
    found = {}
    for source in data_config.validation:
        config = replace(
            data_config, sources=[source], validation=[], augment=False, p_next=0.0, image_at_end=0.0, workers=0
        )
        loader = StepLoader(config, seed=SEED, global_batch_size=global_batch_size, **placement)
        found[source.name] = ValidationSet(loader, -(-data_config.validation_packs // global_batch_size))
    return found


def check_held_out(training: StepLoader, validation: Mapping[str, ValidationSet]) -> None:
    """Raises DataError: a shard of a validation source is trained on, by its content, wherever it lies."""
    trained = {digest: index.name for index in training.indexes for digest in _contents(index)}
    for name, one in validation.items():
        for index in one.loader.indexes:
            for digest, path in _contents(index).items():
                if digest in trained:
                    raise DataError(
                        f"validation source {name}: {path} is also a shard of training source {trained[digest]}; take "
                        "it out of one of them"
                    )


def _contents(index: SourceIndex) -> dict[str, str]:
    """Hash of a shard's index -> its path. An empty shard is like any other."""
    return {shard.index_sha256: shard.path for shard in index.shards if shard.samples}
