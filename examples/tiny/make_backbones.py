"""Writes a small random LLaMA and a small random CLIP in Hugging Face format.

    python examples/tiny/make_backbones.py --out DIR --tokenizer FILE [--seed N]

They take the place of pretrained backbones: `tools/checkpoint/init_from_backbones.py --preset tiny` makes an ATUM
from DIR/llama and DIR/clip. Their sizes are those of the preset `tiny`, and two runs with one seed write the same
weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed
os.environ["HF_HUB_OFFLINE"] = "1"

from megatron_atum.config.loader import preset
from megatron_atum.config.schema import ModelConfig
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError

LLAMA_STD = 0.05  # of the LLaMA's weights. With the usual 0.02 so narrow a model has such small hidden states that the
# first gates that open overwhelm them; much above 0.05 they open too slowly for a run of 150 steps.

if TYPE_CHECKING:
    from transformers import CLIPConfig, LlamaConfig, PreTrainedModel


def llama_config(model: ModelConfig) -> LlamaConfig:
    """A decoder with the sizes of `model`; one key head per query head, as ATUM has it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        rms_norm_eps=model.norm_eps,
        max_position_embeddings=model.max_position_embeddings,
        pad_token_id=model.pad_token_id,
        bos_token_id=model.bos_token_id,
        eos_token_id=model.eos_token_id,
        initializer_range=LLAMA_STD,
        tie_word_embeddings=False,
    )


def clip_config(model: ModelConfig) -> CLIPConfig:
    """A CLIP whose vision tower has the sizes of `model.vision`; its text tower is as small as can be."""
    from transformers import CLIPConfig

    vision = model.vision
    return CLIPConfig(
        vision_config={
            "hidden_size": vision.embed_dim,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": vision.num_channels,
            "hidden_act": vision.hidden_act,
            "layer_norm_eps": vision.norm_eps,
        },
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": model.vocab_size,
            "bos_token_id": model.bos_token_id,
            "eos_token_id": model.eos_token_id,
        },
        projection_dim=16,
    )


def save(model: PreTrainedModel, folder: Path) -> None:
    """Replace a model folder."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)


def make_backbones(out: Path, tokenizer: Path, seed: int) -> None:
    """Write OUT/llama, with the tokenizer in it, and OUT/clip. Raises DataError if the tokenizer does not fit."""
    model = preset("tiny")
    Tokenizer.load(tokenizer, model.vocab_size)
    import torch
    from transformers import CLIPModel, LlamaForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    save(LlamaForCausalLM(llama_config(model)), out / "llama")
    shutil.copyfile(tokenizer, out / "llama" / "tokenizer.model")
    save(CLIPModel(clip_config(model)), out / "clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.model of the data")
    parser.add_argument("--seed", type=int, default=1, help="of the random weights (default: %(default)s)")
    options = parser.parse_args()
    make_backbones(options.out, options.tokenizer, options.seed)
    print(f"wrote {options.out / 'llama'} and {options.out / 'clip'}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"make_backbones: {error}")
