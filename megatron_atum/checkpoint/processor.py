"""Tokenizer and image processor files of an exported folder, written by transformers itself.

The only module of this package that imports transformers; training does not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_atum.checkpoint.assets import OF_A_TOKENIZER
from megatron_atum.config.schema import ModelConfig
from megatron_atum.data.tokenizer import FILE_NAME, Tokenizer
from megatron_atum.errors import CheckpointError

ADDED_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")


def has_processor(folder: Path) -> bool:
    """Whether `AutoProcessor.from_pretrained(folder)` finds its files."""

    def any_of(*names: str) -> bool:
        return any((folder / name).exists() for name in names)

    tokenizer = any_of("tokenizer.json", FILE_NAME) and any_of("tokenizer_config.json")
    return tokenizer and any_of("processor_config.json", "preprocessor_config.json")


def write_processor(folder: Path, tokenizer_model: Path | bytes, model: ModelConfig) -> None:
    """Write what `AutoProcessor.from_pretrained(folder)` reads.

    Args:
        tokenizer_model: sentencepiece `tokenizer.model`, or its content.

    Raises:
        DataError: not a sentencepiece model, or not of this vocabulary.
        CheckpointError: the tokenizer's ids are not those of the model.
    """
    where = FILE_NAME if isinstance(tokenizer_model, bytes) else str(tokenizer_model)
    try:
        content = tokenizer_model if isinstance(tokenizer_model, bytes) else tokenizer_model.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the tokenizer {where}: {error.strerror}") from None
    Tokenizer(content, model.vocab_size, where)  # refuses what is no tokenizer of this model
    for name in OF_A_TOKENIZER:
        (folder / name).unlink(missing_ok=True)
    (folder / FILE_NAME).write_bytes(content)
    _save(folder, content, where, model)


def _save(folder: Path, content: bytes, where: str, model: ModelConfig) -> None:
    from transformers import LlamaTokenizer
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
    from transformers.models.idefics.processing_idefics import IdeficsProcessor

    with tempfile.TemporaryDirectory() as alone:  # transformers would prefer a tokenizer.json that lies next to it
        file = Path(alone, FILE_NAME)
        file.write_bytes(content)
        # legacy=True encodes each run of text on its own, as sentencepiece and the training data do
        tokenizer = LlamaTokenizer.from_pretrained(alone, vocab_file=str(file), legacy=True, padding_side="left")
    added = list(ADDED_TOKENS[: model.additional_vocab_size])
    tokenizer.add_special_tokens({"additional_special_tokens": added, "pad_token": "<unk>"})
    ids = tokenizer.convert_tokens_to_ids(added)
    if ids != list(range(model.vocab_size, model.vocab_size + len(added))):
        raise CheckpointError(
            f"{where} gives the added tokens the ids {ids}, but the model has model.vocab_size="
            f"{model.vocab_size} base tokens; use the tokenizer the model was trained with"
        )
    image_processor = IdeficsImageProcessorPil(image_size=model.vision.image_size)
    IdeficsProcessor(image_processor, tokenizer).save_pretrained(folder)
