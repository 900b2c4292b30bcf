"""What a source holds: its shards and, as far as they are in use, their sidecars.

A source is a manifest, or a glob of shards. Shards without a sidecar are indexed in memory when a run starts, which
is meant for small data sets; `tools/data/index.py` does it once and for all.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any

import numpy as np

from megatron_atum.config.schema import SourceConfig
from megatron_atum.data.flags import ALWAYS_MASK, FAULTS, mask_of
from megatron_atum.data.manifest import Manifest, ShardEntry, dropped, entry_of, read_manifest
from megatron_atum.data.sidecar import Sidecar, build_sidecar, read_sidecar, sidecar_path, stored_sidecar
from megatron_atum.data.storage import ForbiddenFile, MissingFile, Storage, is_remote, list_files
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError

MAX_IN_MEMORY_BYTES = 4 << 30  # of shards without a sidecar
OPEN_SIDECARS = 1024  # most of a source that a process keeps mapped
FETCHED_BYTES = 512 << 20  # most of a source's remote sidecars that a process keeps; a shuffled group takes less


class SourceIndex:
    """Samples of one source, numbered through all shards: those of shard s begin at `first_sample[s]`."""

    def __init__(
        self,
        source: SourceConfig,
        shards: tuple[ShardEntry, ...],
        filters: list[str],
        tokenizer_sha256: str,
        storage: Storage,
        in_memory: dict[int, Sidecar] | None = None,
    ) -> None:
        """Args: filters: names of flags that drop a sample, beside faults; in_memory: sidecars that are no files."""
        self.name, self.kind, self.max_images = source.name, source.kind, source.max_images
        self.shards = shards
        self.drop_mask = ALWAYS_MASK | mask_of(filters)
        self.tokenizer_sha256 = tokenizer_sha256
        self.first_sample = np.concatenate([[0], np.cumsum([shard.samples for shard in shards])]).astype(np.int64)
        self._storage = storage
        self._in_memory = in_memory or {}
        self._open: OrderedDict[int, Sidecar] = OrderedDict()
        self.dropped = dropped(shards, self.drop_mask)  # reason -> samples that are never used; damaged shards
        broken = dropped(shards, mask_of(FAULTS))
        self.faults = sum(broken[reason] for reason in broken if reason in FAULTS)  # samples that are broken
        self.usable, self.tokens, self.images = self._totals()

    def __len__(self) -> int:
        """Samples, usable or not."""
        return int(self.first_sample[-1])

    def locate(self, sample: int) -> tuple[int, int]:
        """Shard of a sample and its row there."""
        shard = int(np.searchsorted(self.first_sample, sample, side="right")) - 1
        return shard, sample - int(self.first_sample[shard])

    def sidecar(self, shard: int) -> Sidecar:
        """Raises DataError: missing, damaged, or of another shard, kind or tokenizer than the manifest says."""
        if shard in self._in_memory:
            return self._in_memory[shard]
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        self._open[shard] = self._checked(self.shards[shard])
        while len(self._open) > 1 and self._keeps_too_much():
            self._open.popitem(last=False)
        return self._open[shard]

    def sample(self, sample: int) -> tuple[int, Sidecar, int]:
        """Shard of a sample, the shard's sidecar, and the sample's row there."""
        shard, row = self.locate(sample)
        return shard, self.sidecar(shard), row

    def digest(self) -> str:
        """Hash of everything that decides how samples are packed and what they say.

        Where the shards lie is left out, so that a data set can be moved.
        """
        settings = [self.name, self.kind, self.max_images, self.drop_mask, self.tokenizer_sha256]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for shard in self.shards:
            digest.update(f"/{shard.samples}/{shard.index_sha256}".encode())
        return digest.hexdigest()

    def _keeps_too_much(self) -> bool:
        if len(self._open) > OPEN_SIDECARS:
            return True
        fetched = is_remote(self.shards[0].path)
        return fetched and sum(sidecar.nbytes for sidecar in self._open.values()) > FETCHED_BYTES

    def _totals(self) -> tuple[int, int, int]:
        used = np.array([shard.used(self.drop_mask) for shard in self.shards], np.int64).reshape(-1, 3).sum(axis=0)
        if not used[0]:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
            raise DataError(
                f"source {self.name} has no usable sample ({reasons or 'its shards are empty'}); "
                "mend the shards, or take the filters that drop them off data.filters"
            )
        return int(used[0]), int(used[1]), int(used[2])

    def _checked(self, entry: ShardEntry) -> Sidecar:
        path = sidecar_path(entry.path)
        try:
            sidecar = read_sidecar(path, self._storage)
        except ForbiddenFile:
            raise
        except MissingFile as error:
            raise DataError(f"{path} is missing; make it again with tools/data/index.py ({error})") from error
        info = sidecar.info
        found = (len(sidecar), info.tar_bytes, info.index_sha256, info.kind, info.tokenizer_sha256)
        if found != (entry.samples, entry.bytes, entry.index_sha256, self.kind, self.tokenizer_sha256):
            raise DataError(f"{path} is not the one its manifest was made with; run tools/data/index.py again")
        return sidecar

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # maps belong to one process


def open_source(source: SourceConfig, filters: list[str], tokenizer: Tokenizer, storage: Storage) -> SourceIndex:
    """The index of a source.

    Args:
        filters: `data.filters`, which the source's own replace.

    Raises:
        DataError: no shard, files of another kind or tokenizer, or no usable sample.
    """
    filters = filters if source.filters is None else source.filters
    if source.shards.endswith(".json"):
        manifest = read_manifest(source.shards, storage)
        _check_manifest(source, manifest, tokenizer)
        return SourceIndex(source, manifest.shards, filters, tokenizer.sha256, storage)
    entries: list[ShardEntry] = []
    in_memory: dict[int, Sidecar] = {}
    indexed_bytes = 0
    for number, path in enumerate(_shard_paths(source)):
        sidecar = stored_sidecar(path, source.kind, tokenizer, storage)
        if sidecar is None:
            indexed_bytes += storage.size(path)
            _check_small(source, indexed_bytes)
            sidecar = in_memory[number] = build_sidecar(path, source.kind, tokenizer, storage)
        entries.append(entry_of(path, sidecar))
    return SourceIndex(source, tuple(entries), filters, tokenizer.sha256, storage, in_memory)


def _shard_paths(source: SourceConfig) -> list[str]:
    paths = [path for path in list_files(source.shards) if not path.endswith(".tmp")]
    if not paths:
        raise DataError(
            f"source {source.name}: no shard matches {source.shards}; correct the source's `shards`, or write the "
            "shards first"
        )
    return paths


def _check_manifest(source: SourceConfig, manifest: Manifest, tokenizer: Tokenizer) -> None:
    where = f"source {source.name}: {source.shards}"
    if manifest.kind != source.kind:
        raise DataError(f"{where} holds {manifest.kind}, but kind is {source.kind}; correct the source's `kind`")
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{where} was made with another tokenizer ({manifest.tokenizer_sha256:.12}, data.tokenizer is "
            f"{tokenizer.sha256:.12}); run tools/data/index.py with this one, or correct data.tokenizer"
        )


def _check_small(source: SourceConfig, size: int) -> None:
    if size > MAX_IN_MEMORY_BYTES:
        raise DataError(
            f"source {source.name}: {source.shards} has more than {MAX_IN_MEMORY_BYTES >> 30} GiB of shards without "
            "an index; make one with tools/data/index.py, and give its manifest.json as `shards`"
        )
