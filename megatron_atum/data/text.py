"""From texts and images to one sequence of token ids.

A document is `<s> ... </s>`. One image is FAKE IMG FAKE, consecutive images share the FAKE between them. Each run of
text is encoded on its own. A text after a text is joined to it by a space, a text after an image follows as it is,
and spaces at both ends of the document fall away.

A conversation is `<s>User: ...<end_of_utterance>\\nAssistant: ...<end_of_utterance>\\nUser: ... </s>`, with images
where they stand (`encode_conversation`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import groupby

from megatron_atum.data.flags import MAX_CONSECUTIVE_IMAGES, MIN_TEXT_TOKENS, mask_of
from megatron_atum.data.tokenizer import END_OF_UTTERANCE_TOKEN, FAKE_TOKEN, IMAGE_TOKEN, Tokenizer

DOCUMENT_BOUNDARY = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"  # stands inside OBELICS texts where the topic changes
SPECIAL_TEXTS = ("<s>", "</s>", "<unk>", FAKE_TOKEN, IMAGE_TOKEN, END_OF_UTTERANCE_TOKEN)
SPEAKERS = {"system": "", "user": "User:", "assistant": "Assistant:"}  # role -> what its turns begin with
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
class Turn:
    """What one side says: no text follows a text, and none begins or ends with a space."""

    role: str  # of SPEAKERS
    parts: list[Part]


@dataclass
class Sample:
    """Text and image places of one sample: one or more documents, and how many images were lost earlier on."""

    documents: list[list[Part]]  # the parts of all turns, if it is a conversation
    lost_images: int = 0
    turns: list[Turn] = field(default_factory=list)  # of a conversation

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
    """Token ids of a sample, the positions of its `<image>` tokens in order, and where its turns lie."""

    ids: list[int] = field(default_factory=list)
    image_positions: list[int] = field(default_factory=list)
    text_tokens: int = 0  # without control and image tokens
    turn_ends: list[int] = field(default_factory=list)  # place behind the <end_of_utterance> of each turn
    answer_starts: list[int] = field(default_factory=list)  # behind "Assistant:"; the end of a turn that is no answer

    def add(self, parts: list[Part], tokenizer: Tokenizer) -> None:
        """Appends texts and images."""
        after_image = False
        for part in parts:
            if isinstance(part, str):
                pieces = tokenizer.encode(part)
                self.text_tokens += len(pieces)
                self.ids += pieces
            else:
                if not after_image:
                    self.ids.append(tokenizer.fake_id)
                self.image_positions.append(len(self.ids))
                self.ids += [tokenizer.image_id, tokenizer.fake_id]
            after_image = isinstance(part, Image)


def parse_sample(raw: bytes, kind: str) -> Sample:
    """The text member of a sample (`KEY.txt` of pairs, else `KEY.json`) as a Sample. Raises SampleFault."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleFault("not_utf8") from error
    parse = {"documents": parse_document, "pairs": parse_pair, "conversations": parse_conversation}[kind]
    return parse(text)


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


def parse_conversation(text: str) -> Sample:
    """A `KEY.json` of a conversation. One that has no turn of the assistant counts as `no_text`."""
    try:
        turns = [_turn(turn["role"], turn["content"]) for turn in json.loads(text)["turns"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SampleFault("bad_json") from error
    if any(turn.role == "system" for turn in turns[1:]):
        raise SampleFault("bad_json")
    sample = Sample([[part for turn in turns for part in turn.parts]], turns=turns)
    if any(_SURROGATE.search(text) for text in sample.texts):
        raise SampleFault("not_utf8")
    if not any(turn.role == "assistant" for turn in turns):
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
    """Token ids of a conversation, or of all documents of a sample, each `<s> ... </s>`."""
    if sample.turns:
        return encode_conversation(sample.turns, tokenizer)
    encoded = Encoded()
    for parts in sample.documents:
        encoded.ids.append(tokenizer.bos_id)
        encoded.add(parts, tokenizer)
        encoded.ids.append(tokenizer.eos_id)
    return encoded


def encode_conversation(turns: list[Turn], tokenizer: Tokenizer) -> Encoded:
    """Token ids of turns, in the form in which the released instruct models are prompted.

    Equal to what `IdeficsProcessor(text=items, add_end_of_utterance_token=False, add_eos_token=True)` gives
    (processing_idefics.py: __call__) for items such as those of their model card: "User: What is this?", image,
    "<end_of_utterance>", "\\nAssistant: A dog.<end_of_utterance>", "\\nUser:", image, "And this?<end_of_utterance>".
    There is no space between an image and the text behind it. A system turn stands in front, as it is and without
    `<end_of_utterance>`, like the prompt of the models' public demonstration; it belongs to the turn behind it.

    The answer of an assistant's turn begins where its tokens leave those of the prompt "\\nAssistant:", so it is what
    generation has to produce behind that.
    """
    encoded = Encoded([tokenizer.bos_id])
    opening = turns[0].parts if turns[0].role == "system" else []
    for turn in turns[1:] if opening else turns:
        start = len(encoded.ids)
        prompt = _joined(opening, ("\n" if opening or start > 1 else "") + SPEAKERS[turn.role])
        encoded.add(_joined(prompt, *turn.parts, space=" "), tokenizer)
        encoded.ids.append(tokenizer.end_of_utterance_id)
        end = len(encoded.ids)
        encoded.turn_ends.append(end)
        if turn.role == "assistant":
            prompted = Encoded()
            prompted.add(prompt, tokenizer)
            end = start + _common_prefix(prompted.ids, encoded.ids[start:])
        encoded.answer_starts.append(end)
        opening = []
    encoded.ids.append(tokenizer.eos_id)
    return encoded


def _joined(before: list[Part], first: Part, *others: Part, space: str = "") -> list[Part]:
    """A text at the end of `before` and a text at the start of the rest are one run of text."""
    if before and isinstance(before[-1], str) and isinstance(first, str):
        return [*before[:-1], f"{before[-1]}{space}{first}", *others]
    return [*before, first, *others]


def _common_prefix(one: list[int], other: list[int]) -> int:
    """Tokens at the start of both."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return (*same, False).index(False)


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


def _turn(role: object, content: object) -> Turn:
    """Raises ValueError: an unknown role, content that is no list of texts and images, or nothing in it."""
    if role not in SPEAKERS or not isinstance(content, list):
        raise ValueError("no turn")
    parts: list[Part] = []
    for item in content:
        if isinstance(item, str):
            _append_text(parts, item.strip(" "))
        elif isinstance(item, dict) and isinstance(name := item.get("image"), str) and name:
            parts.append(Image(name))
        else:
            raise ValueError("no content")
    if not parts:
        raise ValueError("an empty turn")
    return Turn(str(role), parts)


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
