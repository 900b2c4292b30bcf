"""Asks an instruct model in Hugging Face format a question, with or without an image, and prints its answer.

python examples/finetune/ask.py --model exported "Who are you?"
python examples/finetune/ask.py --model exported --image cat.jpg "What is in this picture?"
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, IdeficsForVisionText2Text

END = "<end_of_utterance>"


def ask(model: Any, processor: Any, question: str, image: Image.Image | None, most_tokens: int) -> str:
    """The greedy answer. The prompt ends where the answers of training begin."""
    shown = ["User:", image, *without_urls(question.strip(" ") + END)] if image else [f"User: {question}{END}"]
    inputs = processor(text=[[*shown, "\nAssistant:"]], add_end_of_utterance_token=False, return_tensors="pt")
    tokens = processor.tokenizer
    with torch.no_grad():
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=most_tokens,
            do_sample=False,
            eos_token_id=[tokens.convert_tokens_to_ids(END), tokens.eos_token_id],
            bad_words_ids=tokens(["<image>", "<fake_token_around_image>"], add_special_tokens=False).input_ids,
        )
    return tokens.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def without_urls(text: str) -> list[str]:
    """Texts that the processor joins to the same prompt. It would fetch one that is nothing but a URL as an image
    (processing_idefics.py: is_url), which no text is that has a space, or no scheme in front of its colon.
    """
    return [text] if " " in text else re.split("(?=:)", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--model", type=Path, required=True, help="folder of tools/checkpoint/atum_to_hf.py")
    parser.add_argument("--image", type=Path, help="what the question is about")
    parser.add_argument("--most-tokens", type=int, default=128, help="of the answer (default: %(default)s)")
    options = parser.parse_args()
    processor = AutoProcessor.from_pretrained(options.model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = IdeficsForVisionText2Text.from_pretrained(options.model).to(device).eval()
    image = Image.open(options.image).convert("RGB") if options.image else None
    print(ask(model, processor, options.question, image, options.most_tokens))


if __name__ == "__main__":
    main()
