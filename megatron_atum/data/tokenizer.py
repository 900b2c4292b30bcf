"""The sentencepiece tokenizer of the language model, and the tokens added to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from megatron_atum.errors import DataError

FAKE_TOKEN = "<fake_token_around_image>"
IMAGE_TOKEN = "<image>"
END_OF_UTTERANCE_TOKEN = "<end_of_utterance>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
FILE_NAME = "tokenizer.model"


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.model that `data.tokenizer` names, itself or by its folder."""
    return Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)


class Tokenizer:
    """Text to token ids and back.

    The ids of the added tokens lie above the sentencepiece vocabulary: `fake_id` = vocab_size,
    `image_id` = vocab_size + 1, and `end_of_utterance_id` = vocab_size + 2, which only models with
    `model.additional_vocab_size` of 3 have. `encode` never yields them, nor `<s>` or `</s>`: a literal `</s>` in a text
    is spelt out in ordinary pieces.
    """

    unk_id, bos_id, eos_id = UNK_ID, BOS_ID, EOS_ID

    def __init__(self, model: bytes, vocab_size: int, name: str = FILE_NAME) -> None:
        """Args: model: content of a tokenizer.model; vocab_size: `model.vocab_size`; name: for messages.

        Raises:
            DataError: the content is no sentencepiece model, or it does not fit the language model.
        """
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name} is not a sentencepiece model; give the language model's {FILE_NAME}") from error
        self.vocab_size = vocab_size
        self.fake_id, self.image_id, self.end_of_utterance_id = vocab_size, vocab_size + 1, vocab_size + 2
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._check(name)

    @classmethod
    def load(cls, path: str | Path, vocab_size: int) -> Tokenizer:
        """Reads a tokenizer.model, given as the file or as its folder. Raises DataError."""
        file = tokenizer_file(path)
        if not file.is_file():
            raise DataError(f"tokenizer {file} does not exist; set data.tokenizer to a {FILE_NAME} or its folder")
        return cls(file.read_bytes(), vocab_size, str(file))

    def encode(self, text: str) -> list[int]:
        """Token ids of one run of text, without `<s>` and `</s>`."""
        return self._pieces.encode(text, out_type=int, add_bos=False, add_eos=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens end a run of text and leave nothing behind."""
        runs: list[list[int]] = [[]]
        for token in ids:
            if self.is_special(int(token)):
                runs.append([])
            else:
                runs[-1].append(int(token))
        return "".join(self._pieces.decode(run) for run in runs if run)

    def is_special(self, token: int) -> bool:
        """Whether an id is `<s>`, `</s>` or an added token."""
        return token in (BOS_ID, EOS_ID) or token >= self.vocab_size

    def _check(self, name: str) -> None:
        pieces = self._pieces.get_piece_size()
        if pieces != self.vocab_size:
            raise DataError(
                f"tokenizer {name} has {pieces} pieces but model.vocab_size is {self.vocab_size}; "
                f"set model.vocab_size={pieces} or give the tokenizer this model was trained with"
            )
        found = (self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id())
        if found != (UNK_ID, BOS_ID, EOS_ID):
            raise DataError(
                f"tokenizer {name} has the ids {found} for <unk>, <s>, </s>, not {(UNK_ID, BOS_ID, EOS_ID)}; "
                "train it with unk_id=0, bos_id=1, eos_id=2"
            )
        added = {
            FAKE_TOKEN: self.fake_id,
            IMAGE_TOKEN: self.image_id,
            END_OF_UTTERANCE_TOKEN: self.end_of_utterance_id,
        }
        for token, wanted in added.items():
            piece = self._pieces.piece_to_id(token)
            if piece not in (UNK_ID, wanted):  # piece_to_id answers <unk> for what is no piece
                raise DataError(
                    f"tokenizer {name} has {token} as piece {piece}, but the model expects it added with id {wanted}; "
                    "give the one that the language model was trained with, without image tokens and <end_of_utterance>"
                )
