"""Tokenizer and image processor files of an exported folder, written by transformers itself.

The only module of this package that imports transformers; training does not.
"""

from __future__ import annotations

from pathlib import Path

from megatron_atum.config.schema import ModelConfig
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import CheckpointError

ADDED_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")


def write_processor(folder: Path, tokenizer_model: Path, model: ModelConfig) -> None:
    """Write what `IdeficsProcessor.from_pretrained(folder)` reads.

    Args:
        tokenizer_model: sentencepiece `tokenizer.model`.

    Raises:
        DataError: not a sentencepiece model, or not of this vocabulary.
        CheckpointError: the tokenizer's ids are not those of the model.
    """
    Tokenizer.load(str(tokenizer_model), model.vocab_size)  # refuses what is no tokenizer of this model
    from transformers import LlamaTokenizer
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
    from transformers.models.idefics.processing_idefics import IdeficsProcessor

    # legacy=True encodes each run of text on its own, as sentencepiece and the training data do
    tokenizer = LlamaTokenizer.from_pretrained(
        tokenizer_model.parent, vocab_file=str(tokenizer_model), legacy=True, padding_side="left"
    )
    added = list(ADDED_TOKENS[: model.additional_vocab_size])
    tokenizer.add_special_tokens({"additional_special_tokens": added, "pad_token": "<unk>"})
    ids = tokenizer.convert_tokens_to_ids(added)
    if ids != list(range(model.vocab_size, model.vocab_size + len(added))):
        raise CheckpointError(
            f"{tokenizer_model} gives the added tokens the ids {ids}, but the model has model.vocab_size="
            f"{model.vocab_size} base tokens; use the tokenizer the model was trained with"
        )
    image_processor = IdeficsImageProcessorPil(image_size=model.vision.image_size)
    IdeficsProcessor(image_processor, tokenizer).save_pretrained(folder)
