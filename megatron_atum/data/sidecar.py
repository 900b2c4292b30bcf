"""The index of one shard: what the planner and the loader need to know of each of its samples.

A sidecar is a safetensors file beside its shard, `SHARD.index.safetensors`, mapped into memory. n samples, p images and
t tokens of all of them:

    first_token    [n+1] u32   ids of sample i are first_token[i]:first_token[i+1]
    first_image    [n+1] u32   its images are first_image[i]:first_image[i+1]
    image_position [p]   u32   place of the <image> token of each image among the ids of its sample
    flags          [n]   u16   why it may be dropped (flags.py)
    member_block   [n+p] u32   start of its members in the tar, in blocks of 512 bytes: text, then images in the
    member_size    [n+p] u32   order of the text; those of sample i begin at i + first_image[i]. Sizes in bytes
    first_key      [n+1] u32   its key is keys[first_key[i]:first_key[i+1]]
    keys           [..]  u8    UTF-8
    ids            [t]   u16   token ids, <s> ... </s> (u32 where the vocabulary needs it)

And of conversations, with u turns:

    first_turn     [n+1] u32   turns of sample i are first_turn[i]:first_turn[i+1]
    turn_end       [u]   u32   place behind the <end_of_utterance> of each turn among the ids of its sample
    answer_start   [u]   u32   place behind "Assistant:"; turn_end where the turn is not the assistant's

A sample with a fault is there with its key and flags, and without tokens and images.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from megatron_atum.data.flags import mask_of
from megatron_atum.data.scan import BLOCK, Member, ShardScan, StoredSample
from megatron_atum.data.storage import Storage, is_remote
from megatron_atum.data.text import Encoded, Sample, SampleFault, encode_sample, filter_flags, parse_sample
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError

SIDECAR_VERSION = 1  # another one is indexed again; raise it whenever the same shard would give other arrays
SUFFIX = ".index.safetensors"  # energon writes files named SHARD.tar.idx
MAX_MEMBER_BYTES = 2**32 - 1
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}
TEXT_NAMES = {"documents": "json", "pairs": "txt", "conversations": "json"}  # kind -> member that holds the texts
KINDS = tuple(TEXT_NAMES)


@dataclass(frozen=True)
class SidecarInfo:
    """What a sidecar belongs to; its safetensors metadata."""

    version: int
    kind: str  # of KINDS
    tokenizer_sha256: str
    tar_bytes: int
    tar_sha256: str  # "" when only the headers were read
    damage: str  # "" or where the tar is cut off
    lost_images: int  # of usable documents, lost before the shard was written
    index_sha256: str = ""  # Sidecar.digest() when the file was written


class Sidecar:
    """Arrays of a shard's index, by the names in the legend above."""

    def __init__(self, info: SidecarInfo, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.info = info
        self.arrays = dict(arrays)
        self.first_token, self.first_image = arrays["first_token"], arrays["first_image"]
        self.image_position, self.flags, self.ids = arrays["image_position"], arrays["flags"], arrays["ids"]

    def __len__(self) -> int:
        return len(self.flags)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """[n]"""
        return _differences(self.first_token)

    @property
    def images(self) -> NDArray[np.int64]:
        """[n]"""
        return _differences(self.first_image)

    def key(self, row: int) -> str:
        start, stop = self.arrays["first_key"][row : row + 2]
        return self.arrays["keys"][start:stop].tobytes().decode("utf-8", "surrogateescape")

    def sample_ids(self, row: int) -> NDArray[Any]:
        return self.ids[self.first_token[row] : self.first_token[row + 1]]

    def image_positions(self, row: int) -> NDArray[Any]:
        return self.image_position[self.first_image[row] : self.first_image[row + 1]]

    def turns(self, row: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """[turns of a conversation] their ends, and which are the assistant's."""
        ends, starts = self.turn_bounds(row)
        return ends, starts < ends

    def turn_bounds(self, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """[turns of a conversation] `turn_end` and `answer_start`."""
        part = slice(*self.arrays["first_turn"][row : row + 2].tolist())
        return self.arrays["turn_end"][part], self.arrays["answer_start"][part]

    def answer_mask(self, row: int) -> NDArray[np.bool_]:
        """[tokens of a conversation] Whether a token lies in an answer, its <end_of_utterance> included."""
        ends, starts = self.turn_bounds(row)
        edges = np.zeros(int(self.first_token[row + 1] - self.first_token[row]) + 1, np.int8)
        np.add.at(edges, starts, 1)
        np.add.at(edges, ends, -1)
        return edges[:-1].cumsum() > 0

    def text_member(self, row: int) -> Member:
        return self._member(row + int(self.first_image[row]))

    def image_member(self, row: int, number: int) -> Member:
        return self._member(row + 1 + int(self.first_image[row]) + number)

    def image_members(self, row: int) -> list[Member]:
        return [self.image_member(row, number) for number in range(len(self.image_positions(row)))]

    def _member(self, place: int) -> Member:
        return Member(int(self.arrays["member_block"][place]) * BLOCK, int(self.arrays["member_size"][place]))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def digest(self) -> str:
        """SHA-256 of all arrays: the same for the same shard, kind and tokenizer, wherever it lies."""
        digest = hashlib.sha256(f"{self.info.kind}/{self.info.tokenizer_sha256}".encode())
        for name in sorted(self.arrays):
            digest.update(f"/{name}{self.arrays[name].dtype.str}{self.arrays[name].shape}".encode())
            digest.update(np.ascontiguousarray(self.arrays[name]).data)
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The file: the same bytes each time, which safetensors alone does not promise of its metadata."""
        info = replace(self.info, index_sha256=self.digest())
        metadata = {name: str(value) for name, value in asdict(info).items()}
        content = save(self.arrays, metadata=metadata)
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length]) | {"__metadata__": metadata}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        return content[:8] + text.ljust(length) + content[8 + length :]


def sidecar_path(shard: str) -> str:
    return shard + SUFFIX


def read_sidecar(path: str, storage: Storage) -> Sidecar:
    """Maps a local sidecar into memory, or fetches a remote one.

    Raises:
        MissingFile, or DataError when it is damaged or of another version.
    """
    try:
        if is_remote(path) or not Path(path).exists():
            content = np.frombuffer(storage.read_all(path), np.uint8)
        else:
            content = np.asarray(np.memmap(path, np.uint8, mode="r"))  # slices of the subclass are slow
        info, arrays = _parse(content)
        if info.version != SIDECAR_VERSION:
            raise DataError(f"{path} has version {info.version}, not {SIDECAR_VERSION}; run tools/data/index.py again")
        _check_lengths(arrays, info.kind)
        return Sidecar(info, arrays)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); restore it") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error) as error:
        raise DataError(f"{path} is no sidecar ({error}); make it again with tools/data/index.py") from error


def stored_sidecar(path: str, kind: str, tokenizer: Tokenizer, storage: Storage) -> Sidecar | None:
    """The sidecar beside a shard, if it is that of this shard, kind and tokenizer as they are now."""
    place = sidecar_path(path)
    # The size of a rewritten tar is often what it was: tars are filled up to 10 KiB.
    if not storage.exists(place) or (not is_remote(path) and os.path.getmtime(place) < os.path.getmtime(path)):
        return None
    try:
        sidecar = read_sidecar(place, storage)
    except DataError:
        return None
    info = sidecar.info
    same = (info.tar_bytes, info.kind, info.tokenizer_sha256) == (storage.size(path), kind, tokenizer.sha256)
    return sidecar if same else None


def _parse(content: NDArray[np.uint8]) -> tuple[SidecarInfo, dict[str, NDArray[Any]]]:
    (length,) = struct.unpack("<Q", content[:8].tobytes())
    header = json.loads(content[8 : 8 + length].tobytes())
    metadata = header.pop("__metadata__")
    body = content[8 + length :]
    arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if stop > len(body):
            raise ValueError("cut off")
        arrays[name] = body[start:stop].view(_DTYPES[entry["dtype"]])
    numbers = {name: int(metadata[name]) for name in ("version", "tar_bytes", "lost_images")}
    return SidecarInfo(**(metadata | numbers)), arrays


def _check_lengths(arrays: Mapping[str, NDArray[Any]], kind: str) -> None:
    """Raises ValueError: the arrays do not fit together. Their contents are compared by tools/data/validate.py."""
    n, images, tokens, keys = (
        len(arrays["flags"]),
        *(int(arrays[name][-1]) for name in ("first_image", "first_token", "first_key")),
    )
    wanted = {"first_token": n + 1, "first_image": n + 1, "first_key": n + 1, "image_position": images}
    wanted |= {"member_block": n + images, "member_size": n + images, "ids": tokens, "keys": keys}
    if kind == "conversations":
        turns = int(arrays["first_turn"][-1])
        wanted |= {"first_turn": n + 1, "turn_end": turns, "answer_start": turns}
    for name, length in wanted.items():
        if len(arrays[name]) != length:
            raise ValueError(f"{name} has {len(arrays[name])} entries, not {length}")


def build_sidecar(path: str, kind: str, tokenizer: Tokenizer, storage: Storage, *, whole: bool = False) -> Sidecar:
    """Reads a shard and tokenises its texts.

    Args:
        whole: read the images as well, for the SHA-256 of the tar.

    Raises:
        DataError: the shard is missing, compressed or no tar.
    """
    builder = _Builder(kind, tokenizer)
    scan = ShardScan(storage, path, whole=whole)
    for stored in scan:
        builder.add(stored)
    info = SidecarInfo(
        version=SIDECAR_VERSION,
        kind=kind,
        tokenizer_sha256=tokenizer.sha256,
        tar_bytes=scan.size,
        tar_sha256=scan.sha256,
        damage=scan.damage,
        lost_images=builder.lost_images,
    )
    return Sidecar(info, builder.arrays())


class _Builder:
    """The arrays of one shard while they grow."""

    def __init__(self, kind: str, tokenizer: Tokenizer) -> None:
        self._kind, self._tokenizer = kind, tokenizer
        self._text_name = TEXT_NAMES[kind]
        self._seen: set[str] = set()
        self._keys: list[bytes] = []
        self._flags: list[int] = []
        self._encoded: list[Encoded] = []
        self._members: list[Member] = []
        self.lost_images = 0

    def add(self, stored: StoredSample) -> None:
        encoded = Encoded()
        members = [Member(0, 0)]
        try:
            self._check(stored)
            sample = parse_sample(stored.texts[self._text_name], self._kind)
            members = [stored.members[self._text_name], *self._image_members(stored, sample)]
            encoded = encode_sample(sample, self._tokenizer)
            flags = filter_flags(sample, encoded, self._kind)
            self.lost_images += sample.lost_images
        except SampleFault as fault:
            flags, members = mask_of([fault.reason]), members[:1]
        self._seen.add(stored.key)
        self._keys.append(stored.key.encode("utf-8", "surrogateescape"))
        self._flags.append(flags)
        self._encoded.append(encoded)
        self._members += members

    def arrays(self) -> dict[str, NDArray[Any]]:
        chats, tokenizer = self._kind == "conversations", self._tokenizer
        wide = (tokenizer.end_of_utterance_id if chats else tokenizer.image_id) >= 2**16
        ids = [encoded.ids for encoded in self._encoded]
        positions = [encoded.image_positions for encoded in self._encoded]
        arrays = {
            "first_token": _first(ids),
            "first_image": _first(positions),
            "image_position": _flat(positions, np.uint32),
            "flags": np.array(self._flags, np.uint16),
            "member_block": np.array([member.offset // BLOCK for member in self._members], np.uint32),
            "member_size": np.array([member.size for member in self._members], np.uint32),
            "first_key": _first(self._keys),
            "keys": np.frombuffer(b"".join(self._keys), np.uint8),
            "ids": _flat(ids, np.uint32 if wide else np.uint16),
        }
        return arrays | self._turn_arrays() if chats else arrays

    def _turn_arrays(self) -> dict[str, NDArray[Any]]:
        ends = [encoded.turn_ends for encoded in self._encoded]
        starts = [encoded.answer_starts for encoded in self._encoded]
        return {
            "first_turn": _first(ends),
            "turn_end": _flat(ends, np.uint32),
            "answer_start": _flat(starts, np.uint32),
        }

    def _check(self, stored: StoredSample) -> None:
        """Raises SampleFault, the worst fault first."""
        if stored.bad_name:
            raise SampleFault("bad_name")
        if stored.cut_off:
            raise SampleFault("cut_off")
        if stored.key in self._seen:
            raise SampleFault("duplicate_key")
        if self._text_name not in stored.members:
            raise SampleFault("missing_part")
        if self._text_name not in stored.texts or any(not 0 < m.size <= MAX_MEMBER_BYTES for m in _images(stored)):
            raise SampleFault("absurd_size")

    def _image_members(self, stored: StoredSample, sample: Sample) -> list[Member]:
        """The images in the order in which the text shows them."""
        present = stored.image_names()
        listed = present[:1] if self._kind == "pairs" else [image.name for image in sample.images]
        if len(listed) < len(sample.images) or any(name not in stored.members for name in listed):
            raise SampleFault("missing_part")
        if set(present) - set(listed):
            raise SampleFault("image_count_mismatch")
        return [stored.members[name] for name in listed]


def _images(stored: StoredSample) -> list[Member]:
    return [stored.members[name] for name in stored.image_names()]


def _first(rows: list[Any]) -> NDArray[np.uint32]:
    """[n+1]: where each row begins when all are written one behind the other."""
    return np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.uint32)


def _differences(first: NDArray[Any]) -> NDArray[np.int64]:
    """[n] from [n+1]"""
    return first[1:].astype(np.int64) - first[:-1].astype(np.int64)


def _flat(rows: list[list[int]], dtype: Any) -> NDArray[Any]:
    return np.fromiter((value for row in rows for value in row), dtype)


def usage(sidecar: Sidecar) -> dict[int, tuple[int, int, int]]:
    """Samples, tokens and images by value of flags."""
    found = {}
    for flags in np.unique(sidecar.flags):
        chosen = sidecar.flags == flags
        tokens, images = sidecar.tokens[chosen].sum(), sidecar.images[chosen].sum()
        found[int(flags)] = (int(chosen.sum()), int(tokens), int(images))
    return found
