import json
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import pytest
import transformers
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics.processing_idefics import IdeficsProcessor

from megatron_atum.config.schema import FILTERS
from megatron_atum.data.flags import FLAGS
from megatron_atum.data.text import (
    DOCUMENT_BOUNDARY,
    SPECIAL_TEXTS,
    Image,
    SampleFault,
    document_parts,
    encode_sample,
    filter_flags,
    parse_sample,
)
from megatron_atum.data.tokenizer import FAKE_TOKEN, IMAGE_TOKEN, Tokenizer
from tests.data.conftest import document_json

Places = tuple[str | None, ...]
WORDS = "some words that are long enough"


def names(tokenizer: Tokenizer) -> dict[str, int]:
    return {"S": 1, "E": 2, "F": tokenizer.fake_id, "I": tokenizer.image_id}


def expected(tokenizer: Tokenizer, *items: str) -> list[int]:
    """Ids from control letters ("SFIFE") and, behind a colon, runs of text."""
    ids: list[int] = []
    for item in items:
        ids += tokenizer.encode(item[1:]) if item[0] == ":" else [names(tokenizer)[letter] for letter in item]
    return ids


@pytest.mark.parametrize(
    ("places", "items"),
    [
        ((None, "a cat"), ("SFIF", ":a cat", "E")),
        (("a cat", None, "a cup"), ("S", ":a cat", "FIF", ":a cup", "E")),
        ((None, None, "two"), ("SFIFIF", ":two", "E")),
        ((None, None, None, "x", None, "y"), ("SFIFIFIF", ":x", "FIF", ":y", "E")),
        (("one", "two", None), ("S", ":one two", "FIFE")),  # text after text: a space
        ((None, " kept space"), ("SFIF", ": kept space", "E")),  # text after an image: as it is
        (("  ends ", None, "fall away  "), ("S", ":ends ", "FIF", ":fall away", "E")),
        ((None, "a", "", "b"), ("SFIF", ":a b", "E")),  # a lost image leaves no trace
        ((None, "", None, "b"), ("SFIFIF", ":b", "E")),
        ((None, "a" + DOCUMENT_BOUNDARY + " b ", None), ("SFIF", ":a", "ES", ":b", "FIFE")),
        ((None, "a" + DOCUMENT_BOUNDARY), ("SFIF", ":a", "E")),
        ((DOCUMENT_BOUNDARY + "a", None), ("S", ":a", "FIFE")),
        ((None, "a" + 2 * DOCUMENT_BOUNDARY + "b"), ("SFIF", ":a", "ES", ":b", "E")),
        ((None, "a\u0000b"), ("SFIF", ":a\u0000b", "E")),
    ],
)
def test_document(tokenizer: Tokenizer, places: Places, items: tuple[str, ...]) -> None:
    encoded = encode_sample(parse_sample(document_json(*places), "documents"), tokenizer)
    assert encoded.ids == expected(tokenizer, *items)
    assert encoded.image_positions == [i for i, token in enumerate(encoded.ids) if token == tokenizer.image_id]
    assert encoded.text_tokens == sum(not tokenizer.is_special(token) for token in encoded.ids)


def test_pair(tokenizer: Tokenizer) -> None:
    encoded = encode_sample(parse_sample(b"\n a red cup \n", "pairs"), tokenizer)
    assert encoded.ids == expected(tokenizer, "SFIF", ":a red cup", "E")
    assert encoded.image_positions == [2]


def test_caption_is_what_a_model_would_generate_after_its_prompt(tokenizer: Tokenizer) -> None:
    prompt = expected(tokenizer, "SFIF")
    ids = encode_sample(parse_sample(b"a tall temple tower", "pairs"), tokenizer).ids
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[len(prompt) :]) == "a tall temple tower"


def test_lost_images_are_counted() -> None:
    assert parse_sample(document_json(None, "a", "", "b", ""), "documents").lost_images == 2


def test_order_of_images() -> None:
    parts = document_parts(["x", None, None], [None, "001.jpg", "000.jpg"])
    assert parts == [["x", Image("001.jpg"), Image("000.jpg")]]


@pytest.mark.parametrize("special", SPECIAL_TEXTS)
@pytest.mark.parametrize("kind", ["documents", "pairs"])
def test_literal_special_token_is_flagged_and_stays_text(tokenizer: Tokenizer, special: str, kind: str) -> None:
    text = f"before {special} after, and{special}"
    sample = parse_sample(document_json(None, text) if kind == "documents" else text.encode(), kind)
    encoded = encode_sample(sample, tokenizer)
    assert FLAGS[filter_flags(sample, encoded, kind).bit_length() - 1] == "special_token_in_text"
    control = [token for token in encoded.ids if tokenizer.is_special(token)]
    assert control == expected(tokenizer, "SFIFE")
    assert encoded.ids == expected(tokenizer, "SFIF", f":{text}", "E")
    assert tokenizer.decode(encoded.ids[4:-1]) == text


@pytest.mark.parametrize("text", ["<S>", "< s>", "<image", "</ s>", "<fake_token>"])
def test_what_only_looks_like_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    sample = parse_sample(f"{text} and more words".encode(), "pairs")
    assert filter_flags(sample, encode_sample(sample, tokenizer), "pairs") == 0


def met(tokenizer: Tokenizer, raw: bytes, kind: str = "documents") -> set[str]:
    sample = parse_sample(raw, kind)
    flags = filter_flags(sample, encode_sample(sample, tokenizer), kind)
    return {name for place, name in enumerate(FLAGS) if flags >> place & 1}


@pytest.mark.parametrize(
    ("places", "flags"),
    [
        ((None, WORDS), set()),
        ((WORDS, None, WORDS), set()),
        ((None, None, WORDS, None), set()),
        ((WORDS,), {"no_image"}),
        ((WORDS, ""), {"no_image"}),
        ((WORDS, None, None), {"ends_with_two_images"}),
        ((None, WORDS, None, "", None), {"ends_with_two_images"}),  # nothing stands between them any more
        ((WORDS, None, None, WORDS), set()),
        ((None, None, None, WORDS), {"three_consecutive_images"}),
        ((None, None, WORDS, None, None, WORDS), set()),
        ((WORDS, None), {"only_image_last"}),
        ((None, WORDS, None), set()),
        ((WORDS, None, None, None), {"three_consecutive_images", "ends_with_two_images"}),
        ((WORDS, None, f"{DOCUMENT_BOUNDARY}{WORDS}", None), set()),
    ],
)
def test_document_filters(tokenizer: Tokenizer, places: Places, flags: set[str]) -> None:
    assert met(tokenizer, document_json(*places)) == flags


def test_few_tokens(tokenizer: Tokenizer) -> None:
    """Control and image tokens do not count."""
    for count in range(1, 8):
        text = "a" * count
        few = len(tokenizer.encode(text)) < 5
        assert met(tokenizer, document_json(None, None, text)) == ({"few_tokens"} if few else set())
    assert met(tokenizer, document_json(None, "a")) == {"few_tokens"}


def test_all_filters_are_met_by_some_document(tokenizer: Tokenizer) -> None:
    documents: Sequence[Places] = [
        (None, "<s>"),
        (WORDS,),
        (WORDS, None, None),
        (None, None, None, WORDS),
        (WORDS, None),
        (None, "a"),
    ]
    assert set().union(*(met(tokenizer, document_json(*places)) for places in documents)) == set(FILTERS)


def test_filters_of_documents_do_not_concern_pairs(tokenizer: Tokenizer) -> None:
    assert met(tokenizer, b"a", "pairs") == set()


@pytest.mark.parametrize(
    ("raw", "kind", "reason"),
    [
        (b"\xff\xfe", "pairs", "not_utf8"),
        (b"caf\xe9", "pairs", "not_utf8"),
        (b"\xed\xa0\x80", "pairs", "not_utf8"),  # half a character
        (b'{"texts": ["\xe9"], "images": [null]}', "documents", "not_utf8"),
        (b'{"texts": ["\\ud83d"], "images": [null]}', "documents", "not_utf8"),
        (b"", "documents", "bad_json"),
        (b"{", "documents", "bad_json"),
        (b"[]", "documents", "bad_json"),
        (b"null", "documents", "bad_json"),
        (b'{"texts": ["a"]}', "documents", "bad_json"),
        (b'{"texts": ["a"], "images": []}', "documents", "bad_json"),
        (b'{"texts": ["a"], "images": ["000.jpg"]}', "documents", "bad_json"),
        (b'{"texts": [null], "images": [null]}', "documents", "bad_json"),
        (b'{"texts": [5], "images": [null]}', "documents", "bad_json"),
        (b'{"texts": [null], "images": [5]}', "documents", "bad_json"),
        (b'{"texts": "a", "images": "b"}', "documents", "bad_json"),
        (b'{"texts": {"0": "a"}, "images": {"0": null}}', "documents", "bad_json"),
        (b'{"texts": ["a"], "images": [null], "n": ' + b"1" * 5000 + b"}", "documents", "bad_json"),
        (b"[" * 100_000, "documents", "bad_json"),
        (b'{"texts": ["a"], "images": [null], "meta": ' + b'{"a":' * 100_000, "documents", "bad_json"),
        (b"", "pairs", "no_text"),
        (b" \n", "pairs", "no_text"),
        (document_json(None, "  "), "documents", "no_text"),
        (document_json(None, DOCUMENT_BOUNDARY), "documents", "no_text"),
        (document_json(), "documents", "no_text"),
        (document_json(None, None), "documents", "no_text"),
    ],
)
def test_faults(raw: bytes, kind: str, reason: str) -> None:
    with pytest.raises(SampleFault) as fault:
        parse_sample(raw, kind)
    assert fault.value.reason == reason and reason in FLAGS


def test_whole_characters_in_escapes_are_text(tokenizer: Tokenizer) -> None:
    sample = parse_sample(b'{"texts": ["\\ud83d\\ude00 \\u00e9"], "images": [null]}', "documents")
    assert sample.texts == ["😀 é"]
    assert tokenizer.decode(encode_sample(sample, tokenizer).ids) == "😀 é"


@pytest.fixture(scope="module")
def processor(tiny: Path) -> IdeficsProcessor:
    """transformers' own, as a checkpoint is given it."""
    theirs = transformers.LlamaTokenizer.from_pretrained(tiny, legacy=True)
    added = [transformers.AddedToken(token, normalized=False) for token in (FAKE_TOKEN, IMAGE_TOKEN)]
    theirs.add_special_tokens({"additional_special_tokens": added, "pad_token": "<unk>"})
    return IdeficsProcessor(IdeficsImageProcessorPil(image_size=32), theirs)


def test_equals_hugging_face(tiny: Path, tokenizer: Tokenizer, processor: IdeficsProcessor) -> None:
    """Ids of training texts are those of the inference form with </s>."""
    image = PIL.Image.new("RGB", (8, 8))
    for caption in json.loads((tiny / "captions.json").read_text()).values():
        ours = encode_sample(parse_sample(caption.encode(), "pairs"), tokenizer)
        assert theirs(processor, [image, caption]) == ours.ids
    for places in [("one", None, None, "two", None, "three"), (None, WORDS, None), (None, None, "x\ny", None, None)]:
        ours = encode_sample(parse_sample(document_json(*places), "documents"), tokenizer)
        assert theirs(processor, [place or image for place in places]) == ours.ids


def theirs(processor: IdeficsProcessor, prompt: list[str | PIL.Image.Image]) -> list[int]:
    return processor(text=[prompt], add_eos_token=True)["input_ids"][0].tolist()
