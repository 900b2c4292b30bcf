"""Convert the tars that img2dataset writes (LAION and others) to shards of image-text pairs.

    python tools/data/from_img2dataset.py --input laion2b-en --out shards/laion
    python tools/data/from_img2dataset.py --input 'laion2b-en/000*.tar' --out shards/laion --incomplete use

A tar is complete when NNNNN_stats.json lies beside it; others are skipped, or taken with `--incomplete use`.
Each input file becomes shards of its own. Stopped at any time, the same command goes on. What was dropped, and why,
is printed at the end and in OUT/conversion.json. docs/convert.md has the details.
"""

import argparse

from megatron_atum.checkpoint.command import run_command
from megatron_atum.data.converters.arguments import make_parser, run
from megatron_atum.data.converters.img2dataset import Img2dataset


def parse_arguments() -> argparse.Namespace:
    # img2dataset has encoded the images already; once more would only cost quality.
    parser = make_parser(__doc__, "tars of img2dataset", keep_fitting=True)
    help_text = "tars without NNNNN_stats.json (%(default)s)"
    parser.add_argument("--incomplete", choices=("skip", "use"), default="skip", help=help_text)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    run(options, Img2dataset(options.incomplete))


if __name__ == "__main__":
    run_command("from_img2dataset", main)
