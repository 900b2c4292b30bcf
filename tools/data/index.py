"""Index shards: a sidecar beside each, and one manifest of them all.

    python tools/data/index.py shards/obelics --kind documents --tokenizer idefics-9b
    python tools/data/index.py 'shards/laion/*.tar' --kind pairs --tokenizer idefics-9b/tokenizer.model --workers 32
    python tools/data/index.py s3://bucket/pmd/ --kind pairs --tokenizer idefics-9b --no-sha256
    python tools/data/index.py shards/llava --kind conversations --tokenizer idefics-9b-instruct

A sidecar (SHARD.index.safetensors) holds the token ids of a shard, where its images lie, and why samples are dropped;
the manifest (manifest.json, written last) is what a source's `shards` names. Stopped at any time, the same command
goes on.

A shard that is cut off counts with its complete samples, and a line says so. With shards that cannot be read at all,
or keys that several shards have, no manifest is written.

Exit codes: 0 done, 2 shards that cannot be used or wrong use.
"""

from __future__ import annotations

import argparse
import sys

from megatron_atum.config.schema import FILTERS
from megatron_atum.data.flags import ALWAYS_MASK, mask_of
from megatron_atum.data.indexing import Indexing, find_shards, index_shards, manifest_for
from megatron_atum.data.keys import DoubledKeys
from megatron_atum.data.manifest import Manifest, dropped
from megatron_atum.data.processes import cores
from megatron_atum.data.sidecar import KINDS

LISTED = 5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", nargs="+", metavar="SHARDS", help="files, globs (quoted), folders; local or s3://")
    add("--kind", required=True, choices=KINDS, help="what the shards hold")
    add("--tokenizer", required=True, metavar="PATH", help="tokenizer.model of the language model, or its folder")
    add("--vocab-size", type=int, metavar="N", help="model.vocab_size, to check it (default: as many as there are)")
    add("--manifest", metavar="PATH", help="default: manifest.json in the folder of the shards")
    add("--workers", type=int, default=cores(), metavar="N", help="processes; 0 uses none beside this (%(default)s)")
    add("--no-sha256", action="store_true", help="do not read images: faster, but changed bytes are not noticed later")
    add("--force", action="store_true", help="make sidecars again that are there and fit")
    add("--allow-doubled-keys", action="store_true", help="keep samples of several shards that share a key")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    how = Indexing(
        options.kind,
        options.tokenizer,
        options.vocab_size,
        whole=not options.no_sha256,
        force=options.force,
        allow_doubled_keys=options.allow_doubled_keys,
    )
    shards = find_shards(options.shards)
    path = manifest_for(shards, options.manifest)
    try:
        manifest, doubled = index_shards(how, shards, path, max(0, options.workers), options.quiet)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    report(manifest, doubled)
    print(f"wrote {path}")


def report(manifest: Manifest, doubled: DoubledKeys) -> None:
    mask = ALWAYS_MASK | mask_of(FILTERS)
    used = [shard.used(mask) for shard in manifest.shards]
    samples, tokens, images = (sum(numbers[place] for numbers in used) for place in range(3))
    print(f"{len(manifest.shards):,} shards of {manifest.kind}, {sum(s.bytes for s in manifest.shards) / 1e9:,.2f} GB")
    print(f"{sum(shard.samples for shard in manifest.shards):,} samples, {samples:,} of them usable with all filters:")
    print(
        f"  {tokens:,} tokens, {images:,} images; {sum(s.lost_images for s in manifest.shards):,} images lost earlier"
    )
    for reason, count in dropped(manifest.shards, mask).items():
        print(f"  {reason}: {count:,}")
    for shard in manifest.shards:
        if shard.damage:
            print(f"damaged: {shard.path}: {shard.damage}; its {shard.samples:,} samples before that are used")
    for one in doubled.listed[:LISTED]:
        print(f"doubled: {one.key} in {', '.join(one.shards)}")
    if doubled.count > LISTED:
        print(f"doubled: {doubled.count:,} keys in all")


if __name__ == "__main__":
    from megatron_atum.checkpoint.command import run_command  # here: workers import this file too, and need no torch

    run_command("index", main)
