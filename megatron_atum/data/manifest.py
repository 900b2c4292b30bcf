"""All shards of a data set in one JSON file: what a run must know before it opens any of them.

Without it the loss of a shard, or of the end of one, could not be known.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_atum.data.flags import reason_of
from megatron_atum.data.sidecar import KINDS, Sidecar, usage
from megatron_atum.data.storage import Storage, folder_of, join
from megatron_atum.errors import DataError

MANIFEST_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard. `usage` holds samples, tokens and images by value of flags."""

    path: str
    samples: int
    bytes: int
    sha256: str  # of the tar, "" when it was not read as a whole
    index_sha256: str  # Sidecar.digest()
    damage: str
    lost_images: int
    usage: dict[int, tuple[int, int, int]]

    def used(self, drop_mask: int) -> tuple[int, int, int]:
        """Samples, tokens and images without a flag in the mask."""
        kept = [numbers for flags, numbers in self.usage.items() if not flags & drop_mask]
        return sum(n[0] for n in kept), sum(n[1] for n in kept), sum(n[2] for n in kept)


@dataclass(frozen=True)
class Manifest:
    kind: str
    tokenizer_sha256: str
    shards: tuple[ShardEntry, ...]


def entry_of(path: str, sidecar: Sidecar) -> ShardEntry:
    info = sidecar.info
    return ShardEntry(
        path=path,
        samples=len(sidecar),
        bytes=info.tar_bytes,
        sha256=info.tar_sha256,
        index_sha256=sidecar.digest(),
        damage=info.damage,
        lost_images=info.lost_images,
        usage=usage(sidecar),
    )


def dropped(shards: Sequence[ShardEntry], drop_mask: int) -> dict[str, int]:
    """Samples with a flag in the mask, by reason; and damaged shards."""
    counts: Counter[str] = Counter()
    for shard in shards:
        counts["truncated_tar"] += bool(shard.damage)
        for flags, (samples, _, _) in shard.usage.items():
            if flags & drop_mask:
                counts[reason_of(flags & drop_mask)] += samples
    return {reason: count for reason, count in sorted(counts.items()) if count}


def write_manifest(path: str, manifest: Manifest, storage: Storage) -> None:
    """Paths of shards below the manifest's folder are written relative to it, so that a data set can be moved."""
    folder = join(folder_of(path), "")
    lines = [json.dumps(_entry_json(shard, folder)) for shard in manifest.shards]
    shards = ",\n  ".join(lines)
    head = {"version": MANIFEST_VERSION, "kind": manifest.kind, "tokenizer_sha256": manifest.tokenizer_sha256}
    head |= {name: sum(getattr(shard, name) for shard in manifest.shards) for name in ("samples", "bytes")}
    head |= {name: sum(shard.used(0)[place] for shard in manifest.shards) for name, place in _NUMBERS.items()}
    text = f'{json.dumps(head)[:-1]}, "shards": [\n  {shards}\n]}}\n'
    storage.write(path, text.encode())


def read_manifest(path: str, storage: Storage) -> Manifest:
    """Raises DataError when the file is missing, damaged or of another version."""
    content = storage.read_all(path)
    try:
        record = json.loads(content)
        if record["version"] != MANIFEST_VERSION:
            raise DataError(f"{path} has version {record['version']!r}, not {MANIFEST_VERSION}; run index.py again")
        shards = tuple(_entry(shard, folder_of(path)) for shard in record["shards"])
        manifest = Manifest(record["kind"], record["tokenizer_sha256"], shards)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no manifest ({error!r}); make it with tools/data/index.py") from error
    if manifest.kind not in KINDS or not manifest.shards:
        raise DataError(f"{path} has kind {manifest.kind!r} and {len(shards)} shards; make it with tools/data/index.py")
    return manifest


_NUMBERS = {"tokens": 1, "images": 2}  # places in `usage`


def _entry_json(shard: ShardEntry, folder: str) -> dict[str, Any]:
    _, tokens, images = shard.used(0)
    return {
        "path": shard.path.removeprefix(folder),
        "samples": shard.samples,
        "tokens": tokens,
        "images": images,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "index_sha256": shard.index_sha256,
        "damage": shard.damage,
        "lost_images": shard.lost_images,
        "usage": {str(flags): numbers for flags, numbers in shard.usage.items()},
    }


def _entry(record: dict[str, Any], folder: str) -> ShardEntry:
    usage = {int(flags): (int(n[0]), int(n[1]), int(n[2])) for flags, n in record["usage"].items()}
    names = ("samples", "bytes", "sha256", "index_sha256", "damage", "lost_images")
    return ShardEntry(path=join(folder, record["path"]), usage=usage, **{name: record[name] for name in names})
