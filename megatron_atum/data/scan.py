"""What lies where in a shard: one pass over a tar, from its first byte to its last."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from megatron_atum.data.storage import Storage
from megatron_atum.errors import DataError

BLOCK = 512  # bytes of a tar block
TEXT_SUFFIXES = ("json", "txt")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_TEXT_BYTES = 64 << 20  # of a json or txt member
_MEMBER_NAME = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")
_READ_AT_ONCE = 1 << 20


class Member(NamedTuple):
    """Where the bytes of a member lie in its shard."""

    offset: int
    size: int


@dataclass
class StoredSample:
    """Adjacent members of one key, by name after `KEY.`, and what its json and txt say."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    bad_name: bool = False  # key and suffix cannot be told apart, or the name would leave the folder
    cut_off: bool = False  # the shard ends inside a member of it

    def image_names(self) -> list[str]:
        return [name for name in self.members if name.rsplit(".", 1)[-1].lower() in IMAGE_SUFFIXES]


class ShardScan:
    """The samples of a shard in order. A key that comes back later is a sample of its own.

    After the last sample, `damage` says what is wrong with the tar as a whole: "" or where it is cut off or damaged.
    Samples before the damage are complete.
    """

    def __init__(self, storage: Storage, path: str, *, whole: bool = False) -> None:
        """Args: whole: read every byte, for `sha256`; otherwise images are passed over."""
        self.path, self.damage, self.size, self.sha256 = path, "", 0, ""
        self._storage, self._whole = storage, whole

    def __iter__(self) -> Iterator[StoredSample]:
        """Raises DataError when the shard is missing, compressed or no tar at all."""
        self.size = self._storage.size(self.path)
        with self._storage.open(self.path) as file:
            stream = _Hashing(file) if self._whole else file
            yield from self._samples(stream)
            if isinstance(stream, _Hashing):
                self.sha256 = stream.finish()

    def _samples(self, stream: Any) -> Iterator[StoredSample]:
        sample: StoredSample | None = None
        for name, member, text in self._members(stream):
            found = _MEMBER_NAME.match(name)
            bad = found is None or name.startswith("/") or ".." in name.split("/")
            # A member without key and suffix becomes a sample without members, so that it is counted.
            key, suffix = found.groups() if found else (name, "")
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = StoredSample(key, bad_name=bad)
            sample.members[suffix] = member
            if text is not None:
                sample.texts[suffix] = text
            sample.cut_off |= member.offset + member.size > self.size
        if sample is not None:
            yield sample

    def _members(self, stream: Any) -> Iterator[tuple[str, Member, bytes | None]]:
        """Name, place and, for json and txt, content of each file.

        tarfile ends quietly at a damaged header and, read by seeking, at the end of a cut file. So the end is checked
        here: a complete tar has zeros behind its last member, and nothing else.
        """
        end = 0
        try:
            with tarfile.open(fileobj=stream, mode="r|" if self._whole else "r:", bufsize=_READ_AT_ONCE) as tar:
                for info in tar:
                    if info.size < 0:
                        break  # tarfile would go back and read the same headers for ever
                    end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                    if not info.isdir():
                        yield info.name, Member(info.offset_data, info.size), self._text(tar, info)
                    if info.offset_data + info.size > self.size:
                        break  # a stream would look for its end, however far away
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:  # the last two: absurd sizes
            if end == 0:
                raise DataError(
                    f"shard {self.path} is no uncompressed tar ({error}); copy or write it again"
                ) from error
        self.damage = self._what_follows(end)

    def _what_follows(self, end: int) -> str:
        """What is wrong behind the last member: "" if there are only zeros, and at least a block of them. Samples may
        lie behind a page of zeros that a crash left, or behind the end of the first of two tars that were joined."""
        if end + BLOCK > self.size or self._storage.read(self.path, end, BLOCK) != bytes(BLOCK):
            return f"cut off or damaged at byte {min(end, self.size)} of {self.size}"
        for begin in range(end, self.size, _READ_AT_ONCE):
            rest = self._storage.read(self.path, begin, min(_READ_AT_ONCE, self.size - begin))
            if rest.count(0) != len(rest):
                return f"damaged at byte {end} of {self.size}, or there are data behind its end"
        return ""

    def _text(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | None:
        is_text = info.name.rsplit(".", 1)[-1].lower() in TEXT_SUFFIXES
        if not is_text or not info.isreg() or info.size > MAX_TEXT_BYTES or info.offset_data + info.size > self.size:
            return None
        file = tar.extractfile(info)
        return file.read() if file is not None else None


class _Hashing(io.RawIOBase):
    """A stream that is hashed as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data

    def finish(self) -> str:
        """SHA-256 of the whole file, also of what nobody has read yet."""
        while self.read(_READ_AT_ONCE):
            pass
        return self._digest.hexdigest()
