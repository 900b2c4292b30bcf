import io
from pathlib import Path

import pytest
import sentencepiece

from megatron_atum.data.tokenizer import FAKE_TOKEN, IMAGE_TOKEN, Tokenizer
from megatron_atum.errors import DataError

VOCAB_SIZE = 512


def train(**changes: object) -> bytes:
    stream = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 300,
        "byte_fallback": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "minloglevel": 2,
    }
    texts = ["a few words to train on", "some more words so that merges exist"]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=stream, **(settings | changes))
    return stream.getvalue()


def test_added_tokens_lie_above_the_vocabulary(tokenizer: Tokenizer):
    assert (tokenizer.fake_id, tokenizer.image_id) == (VOCAB_SIZE, VOCAB_SIZE + 1)


def test_loads_from_the_file_too(tiny: Path, tokenizer: Tokenizer):
    assert Tokenizer.load(tiny / "tokenizer.model", VOCAB_SIZE).sha256 == tokenizer.sha256


@pytest.mark.parametrize(
    "text", ["a red cup", "naïve 日本 \t  x", f"</s> <s> {IMAGE_TOKEN}{FAKE_TOKEN} <unk>", " a  b "]
)
def test_any_text_round_trips_without_control_tokens(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_special(token) or token == tokenizer.unk_id for token in ids)
    assert tokenizer.decode(ids) == text


def test_decode_drops_special_tokens(tokenizer: Tokenizer):
    ids = [tokenizer.bos_id, tokenizer.fake_id, tokenizer.image_id, tokenizer.fake_id]
    assert tokenizer.decode([*ids, *tokenizer.encode("a red cup"), tokenizer.eos_id]) == "a red cup"


def test_wrong_vocabulary_size_names_both_numbers(tiny: Path):
    with pytest.raises(DataError, match=r"tokenizer\.model has 512 pieces but model\.vocab_size is 32000.*=512"):
        Tokenizer.load(tiny, 32000)


def test_missing_file(tmp_path: Path):
    with pytest.raises(DataError, match=r"tokenizer\.model does not exist"):
        Tokenizer.load(tmp_path, VOCAB_SIZE)


def test_not_a_model():
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer(b"no model", VOCAB_SIZE)


def test_other_control_ids():
    with pytest.raises(DataError, match="unk_id=0"):
        Tokenizer(train(unk_id=2, bos_id=0, eos_id=1), 300)


def test_image_token_as_a_piece():
    with pytest.raises(DataError, match=r"has <image> as piece .* without image tokens and <end_of_utterance>"):
        Tokenizer(train(user_defined_symbols=[IMAGE_TOKEN]), 300)
