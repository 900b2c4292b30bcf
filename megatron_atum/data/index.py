"""What a source holds, in arrays: for every usable sample its key, members, tokens and images.

Built by reading the tar headers and the text members once; images are not opened. The index of a source is a pure
function of its shards, the tokenizer and the sequence length, so every rank builds the same one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from megatron_atum.config.schema import SourceConfig
from megatron_atum.data.shards import Member, ShardReader, StoredSample, expand_shards, scan_shard
from megatron_atum.data.text import Sample, SampleFault, encode_sample, parse_sample
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError

KINDS = ("documents", "pairs")


@dataclass(frozen=True)
class SourceIndex:
    """Usable samples of one source. n samples, m members of all samples.

    The members of sample i are the rows `first_member[i]` to `first_member[i + 1]`: first its text, then its images
    in the order in which the text shows them.
    """

    name: str
    kind: str  # documents | pairs
    max_images: int  # most images in one pack
    shards: tuple[str, ...]
    tokenizer_sha256: str
    keys: NDArray[np.bytes_]  # [n] UTF-8
    shard: NDArray[np.int32]  # [n] position in `shards`
    tokens: NDArray[np.int32]  # [n] with <s>, </s> and image tokens
    images: NDArray[np.int32]  # [n]
    first_member: NDArray[np.int64]  # [n+1]
    member_offset: NDArray[np.int64]  # [m] bytes
    member_size: NDArray[np.int64]  # [m] bytes
    faults: dict[str, int] = field(default_factory=dict)  # reason -> samples dropped
    lost_images: int = 0  # images of used documents that were lost before the shards were written

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def dropped(self) -> int:
        """Samples that cannot be used, for all reasons."""
        return sum(self.faults.values())

    def location(self, sample: int) -> tuple[str, str]:
        """Shard and key of a sample."""
        return self.shards[self.shard[sample]], self.keys[sample].decode()

    def members(self, sample: int) -> list[Member]:
        """Places of the text member and of the images."""
        rows = range(self.first_member[sample], self.first_member[sample + 1])
        return [Member(int(self.member_offset[row]), int(self.member_size[row])) for row in rows]

    def digest(self) -> str:
        """Hash of everything that decides how samples are packed and what they say.

        Where the shards lie is left out, so that a data set can be moved.
        """
        digest = hashlib.sha256(f"{self.name}/{self.kind}/{self.max_images}/{self.tokenizer_sha256}".encode())
        for array in (self.keys, self.tokens, self.images, self.member_size):
            digest.update(f"/{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def build_index(source: SourceConfig, tokenizer: Tokenizer, sequence_length: int) -> SourceIndex:
    """Reads all shards of a source.

    Samples with a fault, with more than `sequence_length` tokens or with more than `source.max_images` images are
    dropped and counted by reason.

    Raises:
        DataError: no shard, a damaged shard, an unknown kind, or no usable sample.
    """
    if source.kind not in KINDS:
        raise DataError(f"source {source.name} has kind {source.kind!r}; use one of {', '.join(KINDS)}")
    builder = _Builder(source, tokenizer, sequence_length)
    for path in expand_shards(source.shards):
        builder.add_shard(path)
    return builder.finish()


class _Builder:
    """The index of one source while it grows."""

    def __init__(self, source: SourceConfig, tokenizer: Tokenizer, sequence_length: int) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length
        self._text_name = "json" if source.kind == "documents" else "txt"
        self._reader = ShardReader()
        self._seen: set[str] = set()
        self._shards: list[str] = []
        self._keys: list[bytes] = []
        self._numbers: list[tuple[int, int, int]] = []  # shard, tokens, images of each sample
        self._members: list[list[Member]] = []
        self._faults: Counter[str] = Counter()
        self._lost_images = 0

    def add_shard(self, path: str) -> None:
        """Adds the samples of a shard, or counts why not. Raises DataError when the shard is damaged."""
        self._shards.append(path)
        for stored in scan_shard(path):
            try:
                self._add(path, stored)
            except SampleFault as fault:
                self._faults[fault.reason] += 1

    def finish(self) -> SourceIndex:
        self._reader.close()
        if not self._keys:
            self._raise_empty()
        shard, tokens, images = np.array(self._numbers, np.int32).T.copy()
        places = np.array([member for members in self._members for member in members], np.int64)
        counts = [len(members) for members in self._members]
        return SourceIndex(
            name=self._source.name,
            kind=self._source.kind,
            max_images=self._source.max_images,
            shards=tuple(self._shards),
            tokenizer_sha256=self._tokenizer.sha256,
            keys=np.array(self._keys, dtype=np.bytes_),
            shard=shard,
            tokens=tokens,
            images=images,
            first_member=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            member_offset=places[:, 0].copy(),
            member_size=places[:, 1].copy(),
            faults=dict(sorted(self._faults.items())),
            lost_images=self._lost_images,
        )

    def _add(self, path: str, stored: StoredSample) -> None:
        if stored.key in self._seen:
            raise SampleFault("duplicate_key")
        self._seen.add(stored.key)
        if self._text_name not in stored.members:
            raise SampleFault("missing_part")
        text_member = stored.members[self._text_name]
        sample = parse_sample(self._reader.read(path, text_member), self._source.kind)
        members = [text_member, *self._image_members(stored, sample)]
        encoded = encode_sample(sample, self._tokenizer)
        tokens, images = len(encoded.ids), len(encoded.image_positions)
        if tokens > self._sequence_length:
            raise SampleFault("too_long")
        if images > self._source.max_images:
            raise SampleFault("too_many_images")
        self._keys.append(stored.key.encode("utf-8", "surrogateescape"))
        self._numbers.append((len(self._shards) - 1, tokens, images))
        self._members.append(members)
        self._lost_images += sample.lost_images

    def _image_members(self, stored: StoredSample, sample: Sample) -> list[Member]:
        """The images in the order in which the text shows them."""
        present = stored.image_names()
        listed = present[:1] if self._source.kind == "pairs" else [image.name for image in sample.images]
        if len(listed) < len(sample.images) or any(name not in stored.members for name in listed):
            raise SampleFault("missing_part")
        if set(present) - set(listed):
            raise SampleFault("image_count_mismatch")
        return [stored.members[name] for name in listed]

    def _raise_empty(self) -> NoReturn:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self._faults.items()))
        raise DataError(
            f"source {self._source.name} ({self._source.shards}) has no usable sample ({reasons or 'empty shards'}); "
            "mend the shards, or raise data.sequence_length or max_images if samples are too long"
        )
