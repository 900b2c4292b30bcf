"""Convert conversations of images and turns (LLaVA's form, or chat messages) to shards for instruction tuning.

    python tools/data/from_conversations.py --input llava_instruct_150k.json --images coco/train2017 --out shards/llava
    python tools/data/from_conversations.py --input mine.jsonl --out shards/mine --source mine

The input is JSONL, one conversation a line, or a JSON list of them, with images by path or URL:

    {"id": 1, "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                               {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}]}

Images stand where <image> is; without any <image> they come first. Conversations without images are fine.
Each input file becomes shards of its own. Stopped at any time, the same command goes on. What was dropped, and why,
is printed at the end and in OUT/conversion.json. docs/convert.md has the details, docs/finetune.md what comes next.
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
from megatron_atum.data.converters.conversations import Conversations


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "JSONL, also compressed (.gz), or JSON lists")
    add_local_options(parser, "conversations")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    check_local_options(options)
    run(options, Conversations(options.source, options.images), fetch_spec(options))


if __name__ == "__main__":
    run_command("from_conversations", main)
