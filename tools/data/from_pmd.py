"""Convert PMD (parquet, or the Arrow files of `datasets`) to shards of image-text pairs.

    python tools/data/from_pmd.py --input pmd --out shards/pmd --exclude sbu
    python tools/data/from_pmd.py --input pmd --out shards/pmd --fetcher http

Some subsets of PMD hold images, others only their URLs: without a fetcher or a store those are dropped and counted.
Each input file becomes shards of its own. Stopped at any time, the same command goes on. What was dropped, and why,
is printed at the end and in OUT/conversion.json. docs/convert.md has the details.
"""

import argparse

from megatron_atum.checkpoint.command import run_command
from megatron_atum.data.converters.arguments import add_fetch_options, fetch_spec, make_parser, run
from megatron_atum.data.converters.pmd import Pmd


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "parquet or Arrow files of PMD")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="SOURCE", help="subsets to leave out, such as sbu")
    add_fetch_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    fetch = fetch_spec(options)
    run(options, Pmd(tuple(options.exclude), fetch.kind != "none"), fetch)


if __name__ == "__main__":
    run_command("from_pmd", main)
