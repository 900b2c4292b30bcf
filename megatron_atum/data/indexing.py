"""Makes the sidecar of each shard, then the manifest of them all.

A sidecar that fits its shard is kept, so that an index that was stopped goes on, and one of a data set that has grown
takes the time of the new shards.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import sentencepiece
from tqdm import tqdm

from megatron_atum.data.keys import DoubledKeys, find_doubled_keys
from megatron_atum.data.manifest import FILE_NAME, Manifest, ShardEntry, entry_of, write_manifest
from megatron_atum.data.processes import in_processes
from megatron_atum.data.sidecar import Sidecar, build_sidecar, sidecar_path, stored_sidecar
from megatron_atum.data.storage import Storage, folder_of, is_remote, join, list_files
from megatron_atum.data.tokenizer import Tokenizer, tokenizer_file
from megatron_atum.errors import DataError

SHARDS = "*.tar"  # of a folder
NAMED = 5  # doubled keys in a message
_LEFT_OVER = re.compile(r"\.[0-9a-f]{8}\.tmp$")  # what a killed process leaves; see Storage.write


@dataclass(frozen=True)
class Indexing:
    """How shards are indexed."""

    kind: str  # of sidecar.KINDS
    tokenizer: str  # tokenizer.model or its folder
    vocab_size: int | None = None  # pieces of the tokenizer; None: as many as it has
    whole: bool = True  # read whole shards, for their SHA-256
    force: bool = False  # also where there is a sidecar that fits
    allow_doubled_keys: bool = False


@dataclass(frozen=True)
class Failed:
    """A shard that cannot be read."""

    message: str


def index_shards(
    how: Indexing, shards: Sequence[str], manifest_path: str, workers: int = 0, quiet: bool = True
) -> tuple[Manifest, DoubledKeys]:
    """Writes what is missing of the sidecars, and the manifest. Returns it, and the keys that several shards have.

    Args:
        shards: paths as `find_shards` gives them.
        workers: processes; 0 works in this one.
        quiet: without a progress bar.

    Raises:
        DataError: shards that cannot be read (after all others are done), keys that several shards have, a tokenizer
            that does not fit. Then no manifest is written.
    """
    sha256 = load_tokenizer(how.tokenizer, how.vocab_size).sha256
    entries: dict[str, ShardEntry] = {}
    failed: dict[str, str] = {}
    with tqdm(total=len(shards), unit="shard", desc="indexing", disable=quiet) as bar:
        for path, done in in_processes(_ShardIndexer(how), shards, workers):
            if isinstance(done, Failed):
                failed[path] = done.message
            else:
                entries[path] = done
            bar.update()
    _refuse_failed(failed, len(shards))
    manifest = Manifest(how.kind, sha256, tuple(entries[path] for path in sorted(entries)))
    doubled = find_doubled_keys(sorted(entries), sum(entry.samples for entry in manifest.shards), workers)
    if doubled.count and not how.allow_doubled_keys:
        raise DataError(_doubled_message(doubled))
    write_manifest(manifest_path, manifest, Storage())
    return manifest, doubled


def find_shards(patterns: Iterable[str]) -> list[str]:
    """Sorted full paths of shards: of files, globs (with `**`), and folders, whose `*.tar` count; local or remote.

    Raises:
        DataError: nothing matches one of them.
    """
    found: set[str] = set()
    for pattern in patterns:
        paths = [path for path in list_files(_in_folder(pattern)) if not path.endswith(".tmp")]
        if not paths:
            raise DataError(f"no shard matches {_in_folder(pattern)}; correct the path, or write the shards first")
        found.update(paths)
    return sorted(found)


def manifest_for(shards: Sequence[str], given: str | None) -> str:
    """Full path of the manifest: the one given, or `manifest.json` in the folder of the shards.

    Raises:
        DataError: none is given, and the shards lie in several folders.
    """
    if given is not None:
        return full_path(given)
    folders = sorted({folder_of(path) for path in shards})
    if len(folders) > 1:
        raise DataError(f"shards lie in {len(folders)} folders, such as {folders[0]} and {folders[1]}; set --manifest")
    return join(folders[0], FILE_NAME)


def full_path(path: str) -> str:
    """A manifest holds paths relative to itself, or full ones: never relative to where the tool was started."""
    return path if is_remote(path) else os.path.abspath(path)


def load_tokenizer(path: str, vocab_size: int | None = None) -> Tokenizer:
    """A tokenizer.model or the one of a folder; vocab_size None takes it as it is. Raises DataError."""
    return Tokenizer.load(path, _pieces(path) if vocab_size is None else vocab_size)


def _pieces(path: str) -> int:
    try:
        return int(sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file(path))).get_piece_size())
    except (RuntimeError, OSError):
        return 0  # Tokenizer says what is wrong


def _in_folder(pattern: str) -> str:
    pattern = full_path(pattern)
    is_folder = os.path.isdir(pattern) or (is_remote(pattern) and not re.search(r"[*?\[]|\.tar$", pattern))
    return join(glob.escape(pattern) if not is_remote(pattern) else pattern, SHARDS) if is_folder else pattern


@dataclass
class _ShardIndexer:
    """Sidecar and entry of one shard."""

    how: Indexing
    storage: Storage = field(default_factory=Storage)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.how.tokenizer, self.how.vocab_size)

    def __call__(self, path: str) -> ShardEntry | Failed:
        try:
            sidecar = None if self.how.force else self._stored(path)
            if sidecar is None:
                sidecar = build_sidecar(path, self.how.kind, self.tokenizer, self.storage, whole=self.how.whole)
                _remove_left_over(sidecar_path(path))
                self.storage.write(sidecar_path(path), sidecar.to_bytes())
            return entry_of(path, sidecar)
        except DataError as error:
            return Failed(str(error))

    def _stored(self, path: str) -> Sidecar | None:
        """The sidecar that is there, if it is the one that would be made."""
        sidecar = stored_sidecar(path, self.how.kind, self.tokenizer, self.storage)
        return sidecar if sidecar is not None and (sidecar.info.tar_sha256 or not self.how.whole) else None


def _remove_left_over(path: str) -> None:
    if not is_remote(path):
        for file in glob.glob(f"{glob.escape(path)}.*.tmp"):
            if _LEFT_OVER.fullmatch(file.removeprefix(path)):
                os.remove(file)


def _refuse_failed(failed: dict[str, str], of: int) -> None:
    if failed:
        lines = "\n".join(f"  {failed[path]}" for path in sorted(failed))
        raise DataError(
            f"{len(failed)} of {of} shards cannot be read:\n{lines}\n"
            "no manifest was written; mend or remove them and start again: the others are not read a second time"
        )


def _doubled_message(doubled: DoubledKeys) -> str:
    lines = "\n".join(f"  {one.key} in {', '.join(one.shards)}" for one in doubled.listed[:NAMED])
    return (
        f"{doubled.count} keys are in several shards, such as\n{lines}\n"
        "no manifest was written; remove what is there twice, or, when these are different samples after all, "
        "start again with --allow-doubled-keys"
    )
