"""Check shards against their manifest, and name every fault by shard and key.

    python tools/data/validate.py shards/obelics/manifest.json
    python tools/data/validate.py shards/laion/manifest.json --images --tokenizer idefics-9b --workers 32
    python tools/data/validate.py s3://bucket/pmd/manifest.json --json > faults.jsonl

Reads every byte (headers and texts only where the index was made with --no-sha256): shards that are missing, changed
or cut off, sidecars that are not those of the manifest, samples that are broken or not where the sidecar says, keys
that two shards have, and shards beside the others that the manifest does not list. --images decodes all images as
well, --tokenizer tokenises all texts again.

One line for each fault, `SHARD KEY reason: detail` (KEY is - when the whole shard is meant), then the totals. With
--json, one JSON object a line; the last one has the totals.

Exit codes: 0 no fault, 1 faults, 2 no manifest or wrong use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict

from tqdm import tqdm

from megatron_atum.data.indexing import full_path
from megatron_atum.data.processes import cores
from megatron_atum.data.validating import REASONS, Checks, Fault, validate


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("manifest", metavar="MANIFEST", help="manifest.json of tools/data/index.py")
    add("--images", action="store_true", help="decode all images as well")
    add(
        "--tokenizer", metavar="PATH", help="tokenise all texts again with this tokenizer.model, or the one of a folder"
    )
    add("--workers", type=int, default=cores(), metavar="N", help="processes; 0 uses none beside this (%(default)s)")
    add("--json", action="store_true", help="print JSON lines")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    found: Counter[str] = Counter()
    checks = Checks(options.images, options.tokenizer)
    for fault in validate(full_path(options.manifest), checks, max(0, options.workers), options.quiet):
        found[fault.reason] += 1
        tqdm.write(json.dumps(asdict(fault)) if options.json else line(fault))  # above the bar
    if options.json:
        print(json.dumps({"faults": found.total(), "reasons": dict(sorted(found.items()))}))
    else:
        report(found)
    sys.exit(1 if found else 0)


def line(fault: Fault) -> str:
    detail = f": {fault.detail}" if fault.detail else ""
    return f"{fault.shard or '-'} {fault.key or '-'} {fault.reason}{detail}"


def report(found: Counter[str]) -> None:
    if not found:
        print("no fault")
        return
    print(f"{found.total():,} faults")
    for reason, count in sorted(found.items()):
        meaning = f"  {REASONS[reason]}" if reason in REASONS else ""
        print(f"  {reason:20} {count:10,}{meaning}")


if __name__ == "__main__":
    from megatron_atum.checkpoint.command import run_command  # here: workers import this file too, and need no torch

    run_command("validate", main)
