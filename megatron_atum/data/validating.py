"""Checks shards against their manifest and their sidecars, byte by byte, and names whatever does not fit."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from megatron_atum.data.flags import ALWAYS_MASK, FAULT_MASK, reason_of
from megatron_atum.data.images import ImageFault, decode_image
from megatron_atum.data.indexing import SHARDS, load_tokenizer
from megatron_atum.data.keys import find_doubled_keys
from megatron_atum.data.manifest import Manifest, ShardEntry, read_manifest
from megatron_atum.data.processes import in_processes
from megatron_atum.data.scan import Member, ShardScan, StoredSample
from megatron_atum.data.sidecar import TEXT_NAMES, Sidecar, build_sidecar, read_sidecar, sidecar_path
from megatron_atum.data.storage import ForbiddenFile, MissingFile, Storage, folder_of, join, list_files
from megatron_atum.data.text import SampleFault, parse_sample
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError

REASONS = {  # beside those of flags.py and images.py
    "missing_shard": "the manifest lists it, but it is not there",
    "unlisted_shard": "it lies beside the others, but no manifest lists it",
    "unreadable_shard": "it is no tar, or its storage fails",
    "size_differs": "it has another size than when it was indexed",
    "sha256_differs": "it has other bytes than when it was indexed",
    "truncated_tar": "it is cut off or damaged inside",
    "missing_index": "it has no sidecar",
    "damaged_index": "its sidecar cannot be read",
    "wrong_index": "its sidecar is not the one that the manifest was made with",
    "missing_sample": "the sidecar has it, the shard does not",
    "unindexed_sample": "the shard has it, the sidecar does not",
    "wrong_place": "its members are not where the sidecar says",
    "flags_differ": "other filters meet it than when it was indexed",
    "ids_differ": "other token ids than when it was indexed",
}
_NO_MANIFESTS = ("_stats.json", ".counts.json")  # what converters leave beside shards


@dataclass(frozen=True)
class Checks:
    """What is looked at, beside the bytes of shards and sidecars."""

    images: bool = False  # decode all of them
    tokenizer: str | None = None  # tokenise again with this one


@dataclass(frozen=True)
class Fault:
    """`key` is "" when the shard as a whole is meant."""

    shard: str
    key: str
    reason: str
    detail: str = ""


def validate(path: str, checks: Checks, workers: int = 0, quiet: bool = True) -> Iterator[Fault]:
    """All faults of the data set of a manifest, those of a shard together, shards in order.

    Args:
        workers: processes; 0 works in this one.
        quiet: without a progress bar.

    Raises:
        DataError: the manifest cannot be used, or the tokenizer is not the one it was made with.
    """
    manifest = read_manifest(path, Storage())
    _check_tokenizer(checks, manifest, path)
    check = _ShardCheck(manifest.kind, manifest.tokenizer_sha256, checks)
    sound = []
    with tqdm(total=len(manifest.shards), unit="shard", desc="checking", disable=quiet) as bar:
        for entry, faults in _in_order(check, manifest, workers):
            bar.update()
            yield from faults
            if not {"missing_index", "damaged_index", "wrong_index"} & {fault.reason for fault in faults}:
                sound.append(entry)
    yield from _doubled_keys(sound, workers)
    yield from _unlisted(manifest)


def _check_tokenizer(checks: Checks, manifest: Manifest, path: str) -> None:
    if checks.tokenizer is not None and load_tokenizer(checks.tokenizer).sha256 != manifest.tokenizer_sha256:
        raise DataError(f"{path} was made with another tokenizer than {checks.tokenizer}; give that one, or none")


def _in_order(check: _ShardCheck, manifest: Manifest, workers: int) -> Iterator[tuple[ShardEntry, list[Fault]]]:
    waiting: dict[int, list[Fault]] = {}
    turn = 0
    for (number, _), faults in in_processes(check, list(enumerate(manifest.shards)), workers):
        waiting[number] = faults
        while turn in waiting:
            yield manifest.shards[turn], waiting.pop(turn)
            turn += 1


# One shard ------------------------------------------------------------------------------------------------------------


@dataclass
class _ShardCheck:
    """The faults of one shard, to be called in any process."""

    kind: str
    tokenizer_sha256: str
    checks: Checks
    storage: Storage = field(default_factory=Storage)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return None if self.checks.tokenizer is None else load_tokenizer(self.checks.tokenizer)

    def __call__(self, item: tuple[int, ShardEntry]) -> list[Fault]:
        entry = item[1]
        sidecar, faults = self._sidecar(entry)
        try:
            return [*faults, *self._tar(entry, sidecar)]
        except ForbiddenFile as error:
            return [*faults, Fault(entry.path, "", "unreadable_shard", str(error))]
        except MissingFile:
            return [*faults, Fault(entry.path, "", "missing_shard")]
        except DataError as error:
            return [*faults, Fault(entry.path, "", "unreadable_shard", str(error))]

    def _sidecar(self, entry: ShardEntry) -> tuple[Sidecar | None, list[Fault]]:
        """The sidecar if it is the one of the manifest."""
        try:
            sidecar = read_sidecar(sidecar_path(entry.path), self.storage)
        except ForbiddenFile as error:
            return None, [Fault(entry.path, "", "damaged_index", str(error))]
        except MissingFile:
            return None, [Fault(entry.path, "", "missing_index")]
        except DataError as error:
            return None, [Fault(entry.path, "", "damaged_index", str(error))]
        info = sidecar.info
        found = (len(sidecar), info.tar_bytes, info.kind, info.tokenizer_sha256, sidecar.digest())
        if found != (entry.samples, entry.bytes, self.kind, self.tokenizer_sha256, entry.index_sha256):
            return None, [Fault(entry.path, "", "wrong_index")]
        return sidecar, []

    def _tar(self, entry: ShardEntry, sidecar: Sidecar | None) -> Iterator[Fault]:
        scan = ShardScan(self.storage, entry.path, whole=bool(entry.sha256))
        samples = iter(scan) if sidecar is None else _compared(scan, sidecar, self.kind)
        sample_faults = [fault for fault in samples if isinstance(fault, Fault)]
        if scan.size != entry.bytes:
            yield Fault(entry.path, "", "size_differs", f"{scan.size} bytes, not {entry.bytes}")
        if scan.sha256 != entry.sha256:
            yield Fault(entry.path, "", "sha256_differs")
        if scan.damage:
            yield Fault(entry.path, "", "truncated_tar", scan.damage)
        yield from sample_faults
        if sidecar is None:
            return
        if self.tokenizer is not None:
            yield from _tokenised(entry, sidecar, build_sidecar(entry.path, self.kind, self.tokenizer, self.storage))
        if self.checks.images:
            yield from _images(entry, sidecar, self.storage)


def _compared(scan: ShardScan, sidecar: Sidecar, kind: str) -> Iterator[Fault]:
    """Samples of a shard beside those of its sidecar, also where one of them has more."""
    rows: dict[str, deque[int]] = defaultdict(deque)
    for row in range(len(sidecar)):
        rows[sidecar.key(row)].append(row)
    for stored in scan:
        if not rows.get(stored.key):
            yield Fault(scan.path, stored.key, "unindexed_sample")
            continue
        row = rows[stored.key].popleft()
        flags = int(sidecar.flags[row])
        if flags & FAULT_MASK:
            yield Fault(scan.path, stored.key, reason_of(flags))
        elif not flags & ALWAYS_MASK and (reason := _changed(stored, sidecar, row, kind)):
            yield Fault(scan.path, stored.key, reason)
    for row in sorted(row for left in rows.values() for row in left):
        yield Fault(scan.path, sidecar.key(row), "missing_sample")


def _changed(stored: StoredSample, sidecar: Sidecar, row: int, kind: str) -> str:
    """Why a sample is not as it was when it was indexed, or "". What its texts say is not compared."""
    text_name = TEXT_NAMES[kind]
    if stored.cut_off:
        return "cut_off"
    if text_name not in stored.texts:
        return "missing_part"
    try:
        sample = parse_sample(stored.texts[text_name], kind)
    except SampleFault as fault:
        return fault.reason
    images = stored.image_names()
    shown = images if kind == "pairs" else [image.name for image in sample.images]
    members = [stored.members.get(name) for name in (text_name, *shown)]
    same = members == [sidecar.text_member(row), *sidecar.image_members(row)] and set(images) == set(shown)
    return "" if same else "wrong_place"


def _tokenised(entry: ShardEntry, sidecar: Sidecar, fresh: Sidecar) -> Iterator[Fault]:
    if fresh.digest() == sidecar.digest():
        return
    rows = {fresh.key(row): row for row in reversed(range(len(fresh)))}  # the first of a doubled key
    for row in range(len(sidecar)):
        key, flags = sidecar.key(row), int(sidecar.flags[row])
        if flags & ALWAYS_MASK or key not in rows:
            continue
        now = int(fresh.flags[rows[key]])
        if now & ALWAYS_MASK:
            continue  # _compared has told of it
        if now != flags:
            yield Fault(entry.path, key, "flags_differ")
        elif not _same_ids(fresh, rows[key], sidecar, row):
            yield Fault(entry.path, key, "ids_differ")


def _same_ids(one: Sidecar, one_row: int, other: Sidecar, other_row: int) -> bool:
    same = [
        np.array_equal(one.sample_ids(one_row), other.sample_ids(other_row)),
        np.array_equal(one.image_positions(one_row), other.image_positions(other_row)),
    ]
    if one.info.kind == "conversations":
        same += map(np.array_equal, one.turn_bounds(one_row), other.turn_bounds(other_row))
    return all(same)


def _images(entry: ShardEntry, sidecar: Sidecar, storage: Storage) -> Iterator[Fault]:
    with storage.open(entry.path) as file:
        for row in range(len(sidecar)):
            for number, member in enumerate(sidecar.image_members(row)):
                try:
                    decode_image(_content(file, member))
                except ImageFault as fault:
                    yield Fault(entry.path, sidecar.key(row), fault.reason, f"image {number}: {fault.detail}")


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


# All shards -----------------------------------------------------------------------------------------------------------


def _doubled_keys(entries: Sequence[ShardEntry], workers: int) -> Iterator[Fault]:
    doubled = find_doubled_keys([e.path for e in entries], sum(e.samples for e in entries), workers)
    for one in doubled.listed:
        first, *others = one.shards
        for shard in others:
            yield Fault(shard, one.key, "duplicate_key", f"also in {first}")
    if doubled.count > len(doubled.listed):
        yield Fault("", "", "duplicate_key", f"{doubled.count - len(doubled.listed)} keys more")


def _unlisted(manifest: Manifest) -> Iterator[Fault]:
    for folder in sorted({folder_of(entry.path) for entry in manifest.shards}):
        there = {path for path in list_files(join(folder, SHARDS)) if not path.endswith(".tmp")}
        missed = there - {entry.path for entry in manifest.shards}
        if missed:
            missed -= _listed_elsewhere(folder)
        for path in sorted(missed):
            yield Fault(path, "", "unlisted_shard")


def _listed_elsewhere(folder: str) -> set[str]:
    """Shards of all manifests in a folder: several data sets may share it."""
    listed: set[str] = set()
    for path in list_files(join(folder, "*.json")):
        if not path.endswith(_NO_MANIFESTS):
            try:
                listed.update(entry.path for entry in read_manifest(path, Storage()).shards)
            except DataError:
                continue
    return listed
