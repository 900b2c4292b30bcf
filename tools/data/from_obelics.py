"""Convert OBELICS to shards: its parquet files hold texts and image URLs, the images are fetched here.

    python tools/data/from_obelics.py --input obelics/data --out shards/obelics --fetcher http
    python tools/data/from_obelics.py --input 'obelics/data/train-000*.parquet' --out shards/obelics --store images
    python tools/data/from_obelics.py --input obelics/data --out shards/obelics --fetcher mine.bucket:make_fetcher

Each input file becomes shards of its own. Stopped at any time, the same command goes on. What was dropped, and why,
is printed at the end and in OUT/conversion.json. An image that could not be had keeps its place in its document, with
the reason. docs/convert.md has the details.
"""

import argparse

from megatron_atum.checkpoint.command import run_command
from megatron_atum.data.converters.arguments import add_fetch_options, fetch_spec, make_parser, run
from megatron_atum.data.converters.obelics import Obelics
from megatron_atum.errors import ConfigError


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "parquet of OBELICS")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--source", default="obelics", help="name written into each document (%(default)s)")
    parser.add_argument("--require-image", action=flag, default=True, help="drop documents without any image")
    add_fetch_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    fetch = fetch_spec(options)
    if fetch.kind == "none":
        raise ConfigError("OBELICS holds URLs, not images: give --fetcher http, or --store FOLDER with the images")
    run(options, Obelics(options.source, options.require_image), fetch)


if __name__ == "__main__":
    run_command("from_obelics", main)
