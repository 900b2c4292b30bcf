"""Convert interleaved documents with local images (Wikipedia, or your own) to shards.

    python tools/data/from_documents.py --input wikipedia --out shards/wiki --source wikipedia
    python tools/data/from_documents.py --input mine.jsonl --images photos --out shards/mine

The input is JSONL, one document a line, with images by path:

    {"texts": ["A cat.", null], "images": [null, "cat.jpg"]}
    {"parts": [{"text": "A cat."}, {"image": "cat.jpg"}], "id": 7, "meta": {"url": "..."}}

Each input file becomes shards of its own. Stopped at any time, the same command goes on. What was dropped, and why,
is printed at the end and in OUT/conversion.json. docs/convert.md has the details.
"""

import argparse

from megatron_atum.checkpoint.command import run_command
from megatron_atum.data.converters.arguments import (
    add_local_options,
    check_local_options,
    fetch_spec,
    make_parser,
    run,
)
from megatron_atum.data.converters.documents import Documents


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "JSONL, also compressed (.gz)")
    flag = argparse.BooleanOptionalAction
    add_local_options(parser, "documents")
    parser.add_argument("--require-image", action=flag, default=True, help="drop documents without any image")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    check_local_options(options)
    run(options, Documents(options.source, options.images, options.require_image), fetch_spec(options))


if __name__ == "__main__":
    run_command("from_documents", main)
