import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_atum.data.text import (
    DOCUMENT_BOUNDARY,
    SPECIAL_TEXTS,
    Image,
    SampleFault,
    document_parts,
    encode_sample,
    parse_sample,
)
from megatron_atum.data.tokenizer import FAKE_TOKEN, IMAGE_TOKEN, Tokenizer


def document(*places: str | None, **changes: Any) -> bytes:
    """Places: text, or None for the next image, or "" for a lost one."""
    texts = [place or None for place in places]
    count = iter(range(len(places)))
    images = [f"{next(count):03d}.jpg" if place is None else "" if place == "" else None for place in places]
    return json.dumps({"version": 1, "texts": texts, "images": images} | changes).encode()


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
        ((None, "a" + DOCUMENT_BOUNDARY + " b ", None), ("SFIF", ":a", "ES", ":b", "FIFE")),
        ((None, "a" + DOCUMENT_BOUNDARY), ("SFIF", ":a", "E")),
    ],
)
def test_document(tokenizer: Tokenizer, places: tuple[str | None, ...], items: tuple[str, ...]):
    encoded = encode_sample(parse_sample(document(*places), "documents"), tokenizer)
    assert encoded.ids == expected(tokenizer, *items)
    assert encoded.image_positions == [i for i, token in enumerate(encoded.ids) if token == tokenizer.image_id]


def test_pair(tokenizer: Tokenizer):
    encoded = encode_sample(parse_sample(b"\n a red cup \n", "pairs"), tokenizer)
    assert encoded.ids == expected(tokenizer, "SFIF", ":a red cup", "E")
    assert encoded.image_positions == [2]


def test_caption_is_what_a_model_would_generate_after_its_prompt(tokenizer: Tokenizer):
    prompt = expected(tokenizer, "SFIF")
    ids = encode_sample(parse_sample(b"a tall temple tower", "pairs"), tokenizer).ids
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[len(prompt) :]) == "a tall temple tower"


def test_lost_images_are_counted():
    assert parse_sample(document(None, "a", "", "b", ""), "documents").lost_images == 2


def test_order_of_images():
    parts = document_parts(["x", None, None], [None, "001.jpg", "000.jpg"])
    assert parts == [["x", Image("001.jpg"), Image("000.jpg")]]


@pytest.mark.parametrize("special", SPECIAL_TEXTS)
@pytest.mark.parametrize("kind", ["documents", "pairs"])
def test_literal_special_token(special: str, kind: str):
    text = f"before {special} after"
    with pytest.raises(SampleFault, match="special_token_in_text"):
        parse_sample(document(None, text) if kind == "documents" else text.encode(), kind)


@pytest.mark.parametrize(
    ("raw", "kind", "reason"),
    [
        (b"\xff\xfe", "pairs", "not_utf8"),
        (b'{"texts": ["\xe9"], "images": [null]}', "documents", "not_utf8"),
        (b"{", "documents", "bad_json"),
        (b"[]", "documents", "bad_json"),
        (b'{"texts": ["a"]}', "documents", "bad_json"),
        (b'{"texts": ["a"], "images": []}', "documents", "bad_json"),
        (b'{"texts": ["a"], "images": ["000.jpg"]}', "documents", "bad_json"),
        (b'{"texts": [null], "images": [null]}', "documents", "bad_json"),
        (b'{"texts": [5], "images": [null]}', "documents", "bad_json"),
        (b'{"texts": "a", "images": "b"}', "documents", "bad_json"),
        (b"[" * 100_000, "documents", "bad_json"),
        (b" \n", "pairs", "no_text"),
        (document(None, "  "), "documents", "no_text"),
    ],
)
def test_faults(raw: bytes, kind: str, reason: str):
    with pytest.raises(SampleFault) as fault:
        parse_sample(raw, kind)
    assert fault.value.reason == reason


def test_equals_hugging_face(tiny: Path, tokenizer: Tokenizer):
    """Per-run encoding is what transformers' slow-compatible ("legacy") LLaMA tokenizer does with the same text."""
    theirs = transformers.LlamaTokenizer.from_pretrained(tiny, legacy=True)
    added = [transformers.AddedToken(token, normalized=False) for token in (FAKE_TOKEN, IMAGE_TOKEN)]
    theirs.add_special_tokens({"additional_special_tokens": added})
    image = FAKE_TOKEN + IMAGE_TOKEN + FAKE_TOKEN
    for caption in json.loads((tiny / "captions.json").read_text()).values():
        ours = encode_sample(parse_sample(caption.encode(), "pairs"), tokenizer)
        assert theirs(f"<s>{image}{caption}</s>", add_special_tokens=False)["input_ids"] == ours.ids
    ours = encode_sample(parse_sample(document("one", None, None, "two", None, "three"), "documents"), tokenizer)
    text = f"<s>one{image}{IMAGE_TOKEN}{FAKE_TOKEN}two{image}three</s>"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.ids
