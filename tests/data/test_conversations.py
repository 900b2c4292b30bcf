"""Conversations from their shards to the loss: text form, index, what fits a row, and which labels count."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics.processing_idefics import IdeficsProcessor

from megatron_atum.batch import Batch
from megatron_atum.config.schema import DataConfig, SourceConfig
from megatron_atum.data.fill import sample_sizes
from megatron_atum.data.flags import FLAGS
from megatron_atum.data.image_attention import previous_image_index
from megatron_atum.data.index import SourceIndex, open_source
from megatron_atum.data.loader import StepLoader
from megatron_atum.data.pieces import whole_turns
from megatron_atum.data.planner import Pack
from megatron_atum.data.shards import ConversationRecord, read_shard, write_shard
from megatron_atum.data.sidecar import Sidecar, build_sidecar, read_sidecar, sidecar_path
from megatron_atum.data.storage import Storage
from megatron_atum.data.stream import SourceStream
from megatron_atum.data.text import SPECIAL_TEXTS, Encoded, SampleFault, encode_sample, filter_flags, parse_sample
from megatron_atum.data.tokenizer import END_OF_UTTERANCE_TOKEN, FAKE_TOKEN, IMAGE_TOKEN, Tokenizer
from megatron_atum.errors import DataError
from tests.data.conftest import PLACEMENT, VOCAB_SIZE, write_index, write_members

IMAGE = {"image": "000.jpg"}
U, A, S = "user", "assistant", "system"
Turns = list[tuple[str, list[Any]]]


def chat(*turns: tuple[str, Any]) -> bytes:
    """A KEY.json. Content: a text, or a list of texts and images."""
    spelt = [{"role": role, "content": [content] if isinstance(content, str) else content} for role, content in turns]
    return json.dumps({"version": 1, "source": "chat", "turns": spelt, "meta": {}}).encode()


def encode(tokenizer: Tokenizer, *turns: tuple[str, Any]) -> Encoded:
    return encode_sample(parse_sample(chat(*turns), "conversations"), tokenizer)


# Text form ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tiny: Path) -> IdeficsProcessor:
    """transformers' own, with the tokens of an instruct model."""
    theirs = transformers.LlamaTokenizer.from_pretrained(tiny, legacy=True)
    names = (FAKE_TOKEN, IMAGE_TOKEN, END_OF_UTTERANCE_TOKEN)
    added = [transformers.AddedToken(token, normalized=False) for token in names]
    theirs.add_special_tokens({"additional_special_tokens": added, "pad_token": "<unk>"})
    return IdeficsProcessor(IdeficsImageProcessorPil(image_size=32), theirs)


PICTURE = PIL.Image.new("RGB", (8, 8))
END = END_OF_UTTERANCE_TOKEN


@pytest.mark.parametrize(
    ("turns", "prompt"),
    [
        (  # as on the model card
            [(U, ["What is in this image?", IMAGE]), (A, "A small dog."), (U, [IMAGE, "And who is that?"]), (A, "Me.")],
            [
                "User: What is in this image?",
                PICTURE,
                END,
                f"\nAssistant: A small dog.{END}",
                "\nUser:",
                PICTURE,
                f"And who is that?{END}",
                f"\nAssistant: Me.{END}",
            ],
        ),
        ([(U, "Hello"), (A, "Good day.")], [f"User: Hello{END}\nAssistant: Good day.{END}"]),
        (
            [(U, ["One ", IMAGE, IMAGE, " and two ", "or more"]), (A, [IMAGE, "three"])],
            ["User: One", PICTURE, PICTURE, f"and two or more{END}", "\nAssistant:", PICTURE, f"three{END}"],
        ),
        (
            [(S, "Be brief."), (U, "Hello"), (A, "Yes.")],
            [f"Be brief.\nUser: Hello{END}", f"\nAssistant: Yes.{END}"],
        ),
        ([(S, ["See", IMAGE]), (A, "Yes.")], ["See", PICTURE, f"\nAssistant: Yes.{END}"]),
        ([(A, "First."), (U, "Later")], [f"Assistant: First.{END}", f"\nUser: Later{END}"]),
    ],
)
def test_equals_hugging_face(tokenizer: Tokenizer, processor: IdeficsProcessor, turns: Turns, prompt: list[Any]):
    inputs = processor(text=[prompt], add_eos_token=True, add_end_of_utterance_token=False)
    assert encode(tokenizer, *turns).ids == inputs["input_ids"][0].tolist()


def test_generation_prompt_is_a_prefix(tokenizer: Tokenizer, processor: IdeficsProcessor) -> None:
    """What a model reads before its answer is what it was trained to answer, and the answer starts there."""
    prompt = ["User: What is this?", PICTURE, END, "\nAssistant:"]
    theirs = processor(text=[prompt], add_end_of_utterance_token=False)["input_ids"][0].tolist()
    encoded = encode(tokenizer, (U, ["What is this?", IMAGE]), (A, "A cup."))
    assert encoded.ids[: len(theirs)] == theirs and encoded.answer_starts[1] == len(theirs)


def answers(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    """The texts of all answers; each is closed by its <end_of_utterance>."""
    found = []
    for start, end in zip(encoded.answer_starts, encoded.turn_ends, strict=True):
        assert encoded.ids[end - 1] == tokenizer.end_of_utterance_id
        found.append(tokenizer.decode(encoded.ids[start : end - 1]))
    return found


def test_answers(tokenizer: Tokenizer) -> None:
    turns: Turns = [
        (S, "Assistant: is a word."),
        (U, "Say\nAssistant: no"),
        (A, "User: is one, too.\nAssistant: and this"),
        (U, [IMAGE]),
        (A, ["It is", IMAGE, "é"]),
    ]
    encoded = encode(tokenizer, *turns)
    assert answers(tokenizer, encoded) == ["", "User: is one, too.\nAssistant: and this", "", "It isé"]
    assert encoded.ids[-1] == tokenizer.eos_id and encoded.turn_ends[-1] == len(encoded.ids) - 1
    assert encoded.image_positions == [n for n, token in enumerate(encoded.ids) if token == tokenizer.image_id]


@pytest.mark.parametrize("special", SPECIAL_TEXTS)
def test_literal_special_token_stays_text(tokenizer: Tokenizer, special: str) -> None:
    sample = parse_sample(chat((U, f"what is {special}"), (A, special)), "conversations")
    encoded = encode_sample(sample, tokenizer)
    assert FLAGS[filter_flags(sample, encoded, "conversations").bit_length() - 1] == "special_token_in_text"
    assert encoded.ids.count(tokenizer.end_of_utterance_id) == 2 and answers(tokenizer, encoded) == ["", special]


def test_text_only_and_short_conversations_meet_no_filter(tokenizer: Tokenizer) -> None:
    for turns in ([(U, "a"), (A, "b")], [(U, [IMAGE] * 3), (A, "b")], [(A, [IMAGE])]):
        sample = parse_sample(chat(*turns), "conversations")
        assert filter_flags(sample, encode_sample(sample, tokenizer), "conversations") == 0


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"[]", "bad_json"),
        (b'{"turns": 5}', "bad_json"),
        (b'{"turns": [5]}', "bad_json"),
        (b'{"turns": [{"role": "user"}]}', "bad_json"),
        (b'{"turns": [{"role": "user", "content": "a"}]}', "bad_json"),
        (b'{"turns": [{"role": ["user"], "content": ["a"]}]}', "bad_json"),
        (b'{"turns": [{"role": "user", "content": [null]}]}', "bad_json"),
        (b'{"turns": [{"role": "user", "content": [{"image": ""}]}]}', "bad_json"),
        (chat(("gpt", "a")), "bad_json"),
        (chat((U, " "), (A, "b")), "bad_json"),
        (chat((U, "a"), (A, "b"), (S, "c")), "bad_json"),
        (b'{"turns": [{"role": "assistant", "content": ["\\ud83d"]}]}', "not_utf8"),
        (b'{"turns": []}', "no_text"),
        (chat((U, "a")), "no_text"),
        (chat((S, "a"), (U, "b")), "no_text"),
    ],
)
def test_faults(raw: bytes, reason: str) -> None:
    with pytest.raises(SampleFault) as fault:
        parse_sample(raw, "conversations")
    assert fault.value.reason == reason


# Shards and index -----------------------------------------------------------------------------------------------------


def made(rng: random.Random, key: str, jpeg: bytes) -> ConversationRecord:
    """Turns of a few words, some with images; now and then two of one side, or a question at the end."""
    turns: Turns = [(S, ["Be kind."])] if rng.random() < 0.2 else []
    for _ in range(rng.randint(1, 5)):
        content: list[Any] = ["why " * rng.randint(1, 6)]
        content += [jpeg] * rng.choice([0, 0, 1, 2])
        rng.shuffle(content)
        turns += [(U, content)] * rng.choice([1, 1, 1, 2])
        turns.append((A, ["so " * rng.randint(1, 9), jpeg] if rng.random() < 0.1 else ["so " * rng.randint(1, 9)]))
    turns += [(U, ["And?"])] if rng.random() < 0.3 else []
    return ConversationRecord(key, turns, "made")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, jpeg: bytes) -> Path:
    """60 conversations in two shards, with their index."""
    folder, rng = tmp_path_factory.mktemp("chats"), random.Random(1)
    for shard in range(2):
        write_shard(folder / f"{shard}.tar", [made(rng, f"{shard}-{n}", jpeg) for n in range(30)])
    write_index(folder / "*.tar", "conversations", tokenizer, folder / "manifest.json")
    return folder


def test_layout(tmp_path: Path, jpeg: bytes) -> None:
    write_shard(tmp_path / "a.tar", [ConversationRecord("k", [(U, ["a", jpeg]), (A, ["b"])], "web", {"id": 3})])
    ((key, content),) = read_shard(tmp_path / "a.tar")
    assert key == "k" and list(content) == ["json", "000.jpg"] and content["000.jpg"] == jpeg
    assert content["json"] == (
        b'{"version":1,"source":"web","turns":[{"role":"user","content":["a",{"image":"000.jpg"}]},'
        b'{"role":"assistant","content":["b"]}],"meta":{"id":3}}'
    )


@pytest.mark.parametrize("turns", [[("gpt", ["a"])], [(U, [])], [(U, ["a"]), (S, ["b"])]])
def test_malformed_conversations_are_not_written(tmp_path: Path, turns: Turns) -> None:
    with pytest.raises(DataError, match=r"a\.tar, key k: turn \d of"):
        write_shard(tmp_path / "a.tar", [ConversationRecord("k", turns)])


def test_sidecar_says_where_answers_are(chats: Path, tokenizer: Tokenizer) -> None:
    stored = read_sidecar(sidecar_path(str(chats / "0.tar")), Storage())
    for row, (key, members) in enumerate(read_shard(chats / "0.tar")):
        encoded = encode_sample(parse_sample(members["json"], "conversations"), tokenizer)
        assert stored.key(row) == key and stored.sample_ids(row).tolist() == encoded.ids
        ends, is_answer = stored.turns(row)
        assert ends.tolist() == encoded.turn_ends
        spans = [(a, b) for a, b in zip(encoded.answer_starts, encoded.turn_ends, strict=True) if a < b]
        assert is_answer.sum() == len(spans) > 0
        inside = [any(a <= n < b for a, b in spans) for n in range(len(encoded.ids))]
        assert stored.answer_mask(row).tolist() == inside
        assert len(stored.image_members(row)) == len(members) - 1


def test_faulty_conversations_have_no_turns(tmp_path: Path, tokenizer: Tokenizer, jpeg: bytes) -> None:
    good = chat((U, ["a", IMAGE]), (A, "b"))
    members = [("a.json", b"{"), ("b.json", good), ("b.000.jpg", jpeg), ("c.json", good), ("d.json", chat((A, "x")))]
    members += [("d.000.jpg", jpeg)]
    write_members(tmp_path / "a.tar", *members)
    found = build_sidecar(str(tmp_path / "a.tar"), "conversations", tokenizer, Storage())
    reasons = [FLAGS[int(flags).bit_length() - 1] if flags else "" for flags in found.flags]
    assert reasons == ["bad_json", "", "missing_part", "image_count_mismatch"]
    assert [len(found.turns(row)[0]) for row in range(4)] == [0, 2, 0, 0]
    assert found.answer_mask(0).tolist() == []


def test_sidecar_without_its_turns_is_refused(tmp_path: Path, chats: Path) -> None:
    whole = read_sidecar(sidecar_path(str(chats / "0.tar")), Storage())
    for name in ("first_turn", "turn_end", "answer_start"):
        arrays = {key: value for key, value in whole.arrays.items() if key != name}
        (tmp_path / "x").write_bytes(Sidecar(whole.info, arrays).to_bytes())
        with pytest.raises(DataError, match="is no sidecar"):
            read_sidecar(str(tmp_path / "x"), Storage())


# What fits a row ------------------------------------------------------------------------------------------------------


def test_whole_turns() -> None:
    """Against one look at each turn."""
    for seed in range(300):
        rng = random.Random(seed)
        ends = np.cumsum([rng.randint(2, 12) for _ in range(rng.randint(1, 6))])
        is_answer = np.array([rng.random() < 0.5 for _ in ends])
        images = np.array(sorted(rng.sample(range(int(ends[-1])), rng.randint(0, 5) % int(ends[-1]))), np.int64)
        row_tokens, row_images = rng.randint(3, 50), rng.randint(1, 4)
        best, short = 0, False
        for end, answer in zip(ends.tolist(), is_answer, strict=True):
            if answer and end + 1 <= row_tokens:
                short = True
                best = end if (images < end).sum() <= row_images else best
        reason = "" if best else "too_many_images" if short else "too_long"
        assert whole_turns(ends.astype(np.uint32), is_answer, images, row_tokens, row_images) == (best, reason)


ROW, MOST_IMAGES = 60, 3


@pytest.fixture
def index(chats: Path, tokenizer: Tokenizer) -> SourceIndex:
    source = SourceConfig("chat", str(chats / "manifest.json"), kind="conversations", max_images=MOST_IMAGES)
    return open_source(source, [], tokenizer, Storage())


def test_every_conversation_is_shown_cut_or_counted(index: SourceIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_atum.data.order.SMALL", 1)
    stream = SourceStream(index, ROW, seed=1, group_samples=10)
    rows = []
    while stream.position.epoch == 0:
        rows.append(stream.next())
    rows.pop()  # of the next epoch
    dropped = stream.dropped()
    shown = [sample for row in rows for sample in row.samples]
    assert set(dropped) == {"too_long", "too_many_images", "shortened"}
    shortened = dropped.pop("shortened")
    assert len(set(shown)) == len(shown) == len(index) - sum(dropped.values())
    cuts = 0
    for row in rows:
        places = {cut.place: cut for cut in row.cuts}
        for place, sample in enumerate(row.samples):
            _, sidecar, number = index.sample(sample)
            whole = (sidecar.tokens[number], sidecar.images[number])
            assert (place in places) == (whole[0] > ROW or whole[1] > MOST_IMAGES)
            if place in places:
                ends, is_answer = sidecar.turns(number)
                assert places[place].start == 0 and places[place].stop in ends[is_answer]
                cuts += 1
    assert cuts == shortened > 5
    packs = [Pack(0, 0, *row) for row in rows]
    for row, pack in zip(rows, packs, strict=True):
        sizes = list(sample_sizes(index, [pack]))
        assert (row.tokens, row.images) == tuple(map(sum, zip(*sizes, strict=True)))
        assert row.tokens <= ROW and row.images <= MOST_IMAGES


# The loss -------------------------------------------------------------------------------------------------------------


def batches(data_config: Callable[..., DataConfig], chats: Path, row: int, images: int, **changes: Any) -> list[Batch]:
    """Those of a few steps of conversations, documents and pairs."""
    shown = SourceConfig("chat", str(chats / "manifest.json"), weight=4.0, kind="conversations", max_images=images)
    config = data_config(sequence_length=row, **changes)
    config.sources.append(shown)
    loader = StepLoader(config, VOCAB_SIZE, 32, seed=7, **PLACEMENT)
    found = [batch for _ in range(4) for batch in loader.next_step().microbatches]
    loader.close()
    return found


def slow_answer_mask(ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    """Walks over a row: between two <end_of_utterance>, what follows the tokens of "Assistant:" and is no image."""
    heads = [tokenizer.encode("\nAssistant:"), [tokenizer.bos_id, *tokenizer.encode("Assistant:")]]
    mask, begin = [False] * len(ids), 0
    for place, token in enumerate(ids):
        if token == tokenizer.eos_id:
            begin = place + 1
        if token == tokenizer.end_of_utterance_id:
            for head in heads:
                if ids[begin : begin + len(head)] == head:
                    for n in range(begin + len(head), place + 1):
                        mask[n] = ids[n] not in (tokenizer.fake_id, tokenizer.image_id)
            begin = place + 1
    return mask


@pytest.mark.parametrize(("row", "images", "workers"), [(ROW, MOST_IMAGES, 0), (240, 12, 1)])
def test_only_answers_count(
    data_config: Callable[..., DataConfig], chats: Path, tokenizer: Tokenizer, row: int, images: int, workers: int
) -> None:
    """With cut conversations, and with several in a row; rows of other kinds count in full."""
    everything = batches(data_config, chats, row, images)
    answers_only = batches(data_config, chats, row, images, loss_on="assistant", workers=workers)
    seen = {"chat": 0, "web": 0, "captions": 0}
    for plain, batch in zip(everything, answers_only, strict=True):
        for name in ("input_ids", "labels", "z_mask", "image_index", "position_ids", "pixels"):
            assert torch.equal(getattr(plain, name), getattr(batch, name)), name
        for place, source in enumerate(batch.source):
            ids, counts = batch.input_ids[place].tolist(), batch.loss_mask[place].bool().tolist()
            seen[source] += ids.count(tokenizer.bos_id)
            if source == "chat":
                assert counts == [*slow_answer_mask(ids, tokenizer)[1:], False] and any(counts)
            else:
                assert counts == plain.loss_mask[place].bool().tolist()
    assert min(seen.values()) > 0 and seen["chat"] > 15


def test_a_cut_conversation_ends_like_a_whole_one(
    data_config: Callable[..., DataConfig], chats: Path, tokenizer: Tokenizer
) -> None:
    for batch in batches(data_config, chats, ROW, MOST_IMAGES):
        for place, source in enumerate(batch.source):
            if source != "chat":
                continue
            length = int(batch.position_ids[place].max()) + 1
            ids = batch.input_ids[place, :length].tolist()
            text = "".join({1: "S", 2: "E", tokenizer.end_of_utterance_id: "U"}.get(token, "t") for token in ids)
            assert all(one.startswith("S") and one.endswith("U") for one in text.split("E")[:-1]) and text.endswith("E")
            assert batch.images_per_row[place] == ids.count(tokenizer.image_id)


def test_answers_never_look_ahead(data_config: Callable[..., DataConfig], chats: Path, tokenizer: Tokenizer) -> None:
    """They stand behind the image that they are about."""
    for batch in batches(data_config, chats, 240, 12, p_next=1.0):
        for place, source in enumerate(batch.source):
            if source == "chat":
                ids_S = batch.input_ids[place]
                behind_S = previous_image_index(ids_S, tokenizer.image_id, tokenizer.eos_id)
                assert torch.equal(batch.image_index[place], behind_S)


# Broken images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def some_broken(tmp_path: Path, jpeg: bytes, tokenizer: Tokenizer) -> SourceConfig:
    """Two images each, of which "second" and "both" lost some, and a conversation without any."""
    broken = jpeg[:-40]
    images = {"fine": [jpeg, jpeg], "second": [jpeg, broken], "both": [broken, broken], "none": []}
    records = [
        ConversationRecord(name, [(U, ["a", *found]), (A, [name]), (U, ["b"]), (A, [name])])
        for name, found in images.items()
    ]
    write_shard(tmp_path / "0.tar", records)
    return SourceConfig("mine", str(tmp_path / "*.tar"), kind="conversations", max_images=5)


LOST = ("second", "both")


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_a_conversation_with_a_broken_image_is_not_learnt(
    data_config: Callable[..., DataConfig], some_broken: SourceConfig, tokenizer: Tokenizer, loss_on: str
) -> None:
    """Beside others in its row, which are."""
    config = data_config(sources=[some_broken], sequence_length=150, loss_on=loss_on, max_fault_rate=0.2)
    loader, plain = (StepLoader(config, VOCAB_SIZE, 32, seed=7, **PLACEMENT) for _ in range(2))
    step = loader.next_step()
    whole = plain.next_step(lambda plan, codes, error: torch.zeros_like(codes))  # as if none were broken
    seen, mixed = dict.fromkeys(("fine", "none", *LOST), 0), 0
    for batch, other in zip(step.microbatches, whole.microbatches, strict=True):
        for name in ("input_ids", "labels", "z_mask", "position_ids", "images_per_row"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name
        for row, ids_S in enumerate(batch.input_ids):
            ids, begin = ids_S.tolist(), 0
            names = []
            while tokenizer.eos_id in ids[begin:]:
                end = ids.index(tokenizer.eos_id, begin) + 1
                labels = slice(max(0, begin - 1), end - 1)  # the positions that predict its tokens
                name = next(name for name in seen if name in tokenizer.decode(ids[begin:end]))
                counts = batch.loss_mask[row, labels]
                expected = other.loss_mask[row, labels]
                assert torch.equal(counts, torch.zeros_like(expected) if name in LOST else expected) and expected.any()
                seen[name], begin = seen[name] + 1, end
                names.append(name in LOST)
            assert not batch.loss_mask[row, begin:].any()
            mixed += len(set(names)) == 2
    assert min(seen.values()) > 0 and mixed > 2
    report = {"corrupt_image": seen["second"] + 2 * seen["both"], "masked_conversation": seen["second"] + seen["both"]}
    assert loader.fault_report() == {"mine": report}
    assert step.faults == report["corrupt_image"]  # conversations are no faults of their own
    assert "does not count in the loss" in step.messages[0]
    resumed = StepLoader(config, VOCAB_SIZE, 32, seed=7, **PLACEMENT)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert resumed.fault_report() == loader.fault_report() and resumed.faults.total == step.faults


def test_all_ranks_mask_the_same(data_config: Callable[..., DataConfig], some_broken: SourceConfig) -> None:
    """Tensor ranks that decode other images, and a stage that decodes none."""
    config = data_config(sources=[some_broken], sequence_length=150, max_fault_rate=0.2)

    def loader(**place: Any) -> StepLoader:
        return StepLoader(config, VOCAB_SIZE, 32, seed=7, **(PLACEMENT | place))

    alone = loader()
    whole = alone.next_step()
    places = [{"tensor_rank": rank, "tensor_size": 2} for rank in range(2)] + [{"encodes_images": False}]
    found: list[torch.Tensor] = []
    for place in places:
        loader(**place).next_step(lambda plan, codes, error: found.append(codes) or codes)
    assert not torch.equal(found[0], found[1]) and not found[2].any()
    merged = torch.stack(found).amax(0)
    for place in places:
        one = loader(**place)
        for ours, theirs in zip(one.next_step(lambda *_: merged).microbatches, whole.microbatches, strict=True):
            assert torch.equal(ours.loss_mask, theirs.loss_mask)
            assert torch.equal(ours.image_index, theirs.image_index)
        assert one.fault_report() == alone.fault_report() and one.faults.total == whole.faults
