"""Writes a few conversations about photographs, and some without any, as one's own data might look.

    python examples/finetune/make_chats.py --out DIR

DIR/chats.jsonl holds one conversation a line, DIR/photos their images. The photographs and their captions are those of
examples/tiny/make_data.py. Two runs write identical bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny"))

from make_data import PHOTOS, load_photo

QUESTION = "What is in this picture?"
SHOWN = ("cat", "coffee", "rocket")
TALKS = (
    ("Who are you?", "I am a small model on two cores."),
    ("Is tea hot?", "Yes, at first.", "And later?", "Later it is cold."),
)


def conversations() -> list[dict[str, Any]]:
    """In the two forms that tools/data/from_conversations.py reads."""
    about_photos = [
        {
            "id": name,
            "image": f"{name}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": PHOTOS[name][2]},
            ],
        }
        for name in SHOWN
    ]
    roles = ("user", "assistant")
    without = [
        {"messages": [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]}
        for texts in TALKS
    ]
    return about_photos + without


def make_chats(out: Path) -> None:
    (out / "photos").mkdir(parents=True, exist_ok=True)
    for name in SHOWN:
        (out / "photos" / f"{name}.jpg").write_bytes(load_photo(name))
    (out / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in conversations()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    options = parser.parse_args()
    make_chats(options.out)
    print(f"wrote {options.out / 'chats.jsonl'}")


if __name__ == "__main__":
    main()
