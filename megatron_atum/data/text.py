"""From texts and images to one sequence of token ids.

A document is `<s> ... </s>`. One image is FAKE IMG FAKE, consecutive images share the FAKE between them. Each run of
text is encoded on its own. A text after a text is joined to it by a space, a text after an image follows as it is,
and spaces at both ends of the document fall away.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import groupby

from megatron_atum.data.flags import MAX_CONSECUTIVE_IMAGES, MIN_TEXT_TOKENS, mask_of
from megatron_atum.data.tokenizer import FAKE_TOKEN, IMAGE_TOKEN, Tokenizer

DOCUMENT_BOUNDARY = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"  # stands inside OBELICS texts where the topic changes
SPECIAL_TEXTS = ("<s>", "</s>", "<unk>", FAKE_TOKEN, IMAGE_TOKEN, "<end_of_utterance>")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: json can spell one, UTF-8 cannot


class SampleFault(Exception):
    """A sample that cannot be used. `reason` is the word it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Image:
    """Place of an image in a text. `name` is its member's name after `KEY.`, or "" in a pair (it has one image)."""

    name: str = ""


Part = str | Image


@dataclass
class Sample:
    """Text and image places of one sample: one or more documents, and how many images were lost earlier on."""

    documents: list[list[Part]]
    lost_images: int = 0

    @property
    def parts(self) -> list[Part]:
        return [part for parts in self.documents for part in parts]

    @property
    def images(self) -> list[Image]:
        return [part for part in self.parts if isinstance(part, Image)]

    @property
    def texts(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]


@dataclass
class Encoded:
    """Token ids of a sample and the positions of its `<image>` tokens, in order."""

    ids: list[int] = field(default_factory=list)
    image_positions: list[int] = field(default_factory=list)
    text_tokens: int = 0  # without control and image tokens


def parse_sample(raw: bytes, kind: str) -> Sample:
    """The text member of a sample (`KEY.json` of documents, `KEY.txt` of pairs) as a Sample. Raises SampleFault."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleFault("not_utf8") from error
    return parse_document(text) if kind == "documents" else parse_pair(text)


def parse_pair(text: str) -> Sample:
    """Image, then its caption."""
    caption = text.strip()
    if not caption:
        raise SampleFault("no_text")
    return Sample([[Image(), caption]])


def parse_document(text: str) -> Sample:
    """A `KEY.json` of shard format v1."""
    try:
        record = json.loads(text)
        texts, images = record["texts"], record["images"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SampleFault("bad_json") from error
    if not _well_formed(texts, images):
        raise SampleFault("bad_json")
    if any(_SURROGATE.search(text) for text in texts if text):
        raise SampleFault("not_utf8")
    sample = Sample(document_parts(texts, images), lost_images=sum(name == "" for name in images))
    if not sample.texts:
        raise SampleFault("no_text")
    return sample


def document_parts(texts: list[str | None], images: list[str | None]) -> list[list[Part]]:
    """Splits a record at document boundaries and joins neighbouring texts.

    A lost image (name "") leaves no trace, as in the original pipeline: the text around it is still worth training on.
    """
    documents: list[list[Part]] = [[]]
    for text, image in zip(texts, images, strict=True):
        if image:
            documents[-1].append(Image(image))
        elif text:
            first, *rest = text.split(DOCUMENT_BOUNDARY)
            _append_text(documents[-1], first.strip() if rest else first)
            for piece in rest:
                documents.append([])
                _append_text(documents[-1], piece.strip())
    return [parts for parts in map(_strip_ends, documents) if parts]


def encode_sample(sample: Sample, tokenizer: Tokenizer) -> Encoded:
    """Token ids of all documents of a sample, each `<s> ... </s>`."""
    encoded = Encoded()
    for parts in sample.documents:
        encoded.ids.append(tokenizer.bos_id)
        after_image = False
        for part in parts:
            if isinstance(part, str):
                pieces = tokenizer.encode(part)
                encoded.text_tokens += len(pieces)
                encoded.ids += pieces
            else:
                if not after_image:
                    encoded.ids.append(tokenizer.fake_id)
                encoded.image_positions.append(len(encoded.ids))
                encoded.ids += [tokenizer.image_id, tokenizer.fake_id]
            after_image = isinstance(part, Image)
        encoded.ids.append(tokenizer.eos_id)
    return encoded


def filter_flags(sample: Sample, encoded: Encoded, kind: str) -> int:
    """Bits of the filters (flags.py) that a well-formed sample meets. The neighbourhood of images is that of the whole
    sample, also where it holds several documents.
    """
    found = []
    # Harmless to this tokenizer, which spells them out, but others (HF's) would read them as control tokens.
    if any(special in text for text in sample.texts for special in SPECIAL_TEXTS):
        found.append("special_token_in_text")
    if kind == "documents":
        found += _document_filters([isinstance(part, Image) for part in sample.parts], encoded.text_tokens)
    return mask_of(found)


def _document_filters(is_image: list[bool], text_tokens: int) -> list[str]:
    longest = max((len(list(run)) for image, run in groupby(is_image) if image), default=0)
    met = {
        "no_image": longest == 0,
        "ends_with_two_images": all(is_image[-2:]) and len(is_image) > 1,
        "three_consecutive_images": longest > MAX_CONSECUTIVE_IMAGES,
        "only_image_last": sum(is_image) == 1 and is_image[-1],
        "few_tokens": text_tokens < MIN_TEXT_TOKENS,
    }
    return [name for name, is_met in met.items() if is_met]


def _well_formed(texts: object, images: object) -> bool:
    """Equal lengths, and at each place exactly one of text and image (strings)."""
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        return False
    pairs = zip(texts, images, strict=True)
    return all((isinstance(t, str) and i is None) or (t is None and isinstance(i, str)) for t, i in pairs)


def _append_text(parts: list[Part], text: str) -> None:
    if not text:
        return
    if parts and isinstance(parts[-1], str):
        parts[-1] += f" {text}"
    else:
        parts.append(text)


def _strip_ends(parts: list[Part]) -> list[Part]:
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip(" ")
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip(" ")
    return [part for part in parts if part != ""]
