import dataclasses
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from megatron_atum.batch import NO_IMAGE, PAD_POSITION, Batch, image_slice
from megatron_atum.config.schema import DataConfig, SourceConfig
from megatron_atum.data.faults import FaultCounts
from megatron_atum.data.image_attention import next_image_index, previous_image_index
from megatron_atum.data.images import IMAGE_FAULTS, decode_image, eval_pixels
from megatron_atum.data.loader import StepLoader
from megatron_atum.data.microbatch import MicrobatchBuilder
from megatron_atum.data.planner import Pack
from megatron_atum.data.rng import Random
from megatron_atum.data.shards import DocumentRecord, PairRecord, read_shard, write_shard
from megatron_atum.data.storage import ForbiddenFile, Storage
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import ConfigError, DataError, DataFailure
from tests.data.conftest import fake_index, fake_sidecar

MakeLoader = Callable[..., StepLoader]
MakeConfig = Callable[..., DataConfig]


def assert_equal(left: Batch, right: Batch, but: tuple[str, ...] = ()) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name not in but:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def steps(loader: StepLoader, count: int) -> list[Batch]:
    batches = [batch for _ in range(count) for batch in loader.next_step().microbatches]
    loader.close()
    return batches


def test_batch_keeps_the_contract(make_loader: MakeLoader, data_config: MakeConfig, tokenizer: Tokenizer):
    batches = steps(make_loader(data_config(p_next=0.0)), 2)
    assert len(batches) == 8
    ids = torch.cat([batch.pack_ids for batch in batches]).tolist()
    assert [sorted(ids[:8]), sorted(ids[8:])] == [list(range(8)), list(range(8, 16))]  # dealt out within each step
    assert {name for batch in batches for name in batch.source} == {"web", "captions"}
    for batch in batches:
        ids_bS = batch.input_ids
        lengths_b = batch.position_ids.max(-1).values + 1
        real_bS = torch.arange(256) < lengths_b[:, None]
        assert ids_bS.shape == (2, 256) and ids_bS.dtype == batch.labels.dtype == batch.image_index.dtype == torch.int64
        assert batch.loss_mask.dtype == batch.z_mask.dtype == torch.float32
        assert batch.pixels.dtype == torch.uint8 and batch.pixels.is_contiguous()
        assert (ids_bS[:, 0] == tokenizer.bos_id).all()
        assert (ids_bS[torch.arange(2), lengths_b - 1] == tokenizer.eos_id).all()
        assert (ids_bS[~real_bS] == 0).all() and (batch.position_ids[~real_bS] == PAD_POSITION).all()
        assert torch.equal(batch.loss_mask, (torch.arange(256) < lengths_b[:, None] - 1).float())
        counts = batch.loss_mask.bool()
        assert torch.equal(batch.labels[counts], ids_bS.roll(-1, -1)[counts])
        assert torch.equal(batch.z_mask, (real_bS & (ids_bS != tokenizer.image_id)).float())
        assert torch.equal(batch.images_per_row, (ids_bS == tokenizer.image_id).sum(-1))
        assert batch.pixels.shape == (batch.num_images, 3, 32, 32)
        assert torch.equal(batch.image_index, previous_image_index(ids_bS, tokenizer.image_id, tokenizer.eos_id))
        assert (batch.image_index[~real_bS] == NO_IMAGE).all()
        assert batch.attention_mask is None and batch.image_attention_mask is None


def test_captions_meet_their_photographs(
    make_loader: MakeLoader, data_config: MakeConfig, tiny: Path, tokenizer: Tokenizer
):
    captions = json.loads((tiny / "captions.json").read_text())
    config = data_config(augment=False)
    config.sources = config.sources[1:]
    seen = set()
    for batch in steps(make_loader(config), 2):
        pixels = iter(batch.pixels)
        for ids_S in batch.input_ids:
            documents = tokenizer_split(ids_S.tolist(), tokenizer.eos_id)
            for ids in documents:
                name = next(name for name, caption in captions.items() if caption == tokenizer.decode(ids))
                photo = eval_pixels(decode_image((tiny / "photos" / f"{name}.jpg").read_bytes()), 32)
                assert torch.equal(next(pixels), torch.tensor(photo).permute(2, 0, 1))
                seen.add(name)
        assert next(pixels, None) is None
    assert seen == set(captions)


def tokenizer_split(ids: list[int], eos: int) -> list[list[int]]:
    documents: list[list[int]] = [[]]
    for token in ids:
        documents[-1].append(token)
        if token == eos:
            documents.append([])
    return documents[:-1]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_same_microbatches_for_every_data_parallel_size(make_loader: MakeLoader, size: int):
    rows = {"global_batch_size": 24}
    whole = steps(make_loader(**rows), 2)
    parts = [steps(make_loader(data_parallel_rank=rank, data_parallel_size=size, **rows), 2) for rank in range(size)]
    merged = [batch for together in zip(*parts, strict=True) for batch in together]
    assert len(merged) == len(whole)
    for left, right in zip(whole, merged, strict=True):
        assert_equal(left, right)


@pytest.mark.parametrize("workers", [1, 2])
def test_same_stream_with_workers(make_loader: MakeLoader, data_config: MakeConfig, workers: int):
    inline, in_workers = steps(make_loader(), 3), steps(make_loader(data_config(workers=workers)), 3)
    for left, right in zip(inline, in_workers, strict=True):
        assert_equal(left, right)


@pytest.mark.parametrize("size", [2, 3, 16])
def test_tensor_ranks_share_the_images(make_loader: MakeLoader, size: int):
    whole = steps(make_loader(), 1)
    parts = [steps(make_loader(tensor_rank=rank, tensor_size=size), 1) for rank in range(size)]
    for number, batch in enumerate(whole):
        for rank in range(size):
            assert_equal(batch, parts[rank][number], but=("pixels",))
            share = image_slice(batch.num_images, rank, size)
            assert torch.equal(parts[rank][number].pixels, batch.pixels[share])


def test_other_stages_get_no_pixels(make_loader: MakeLoader):
    for batch, bare in zip(steps(make_loader(), 1), steps(make_loader(encodes_images=False), 1), strict=True):
        assert_equal(batch, bare, but=("pixels",))
        assert bare.pixels.shape == (0, 3, 32, 32)


@pytest.mark.parametrize(("workers", "resumed_workers"), [(0, 0), (2, 0), (0, 2)])
def test_resume_is_exact(make_loader: MakeLoader, data_config: MakeConfig, workers: int, resumed_workers: int):
    first = make_loader(data_config(workers=workers))
    for _ in range(2):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    assert state["packs"] == 16  # of the last step handed out, not of what is prefetched
    resumed = make_loader(data_config(workers=resumed_workers))
    resumed.next_step()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for left, right in zip(steps(first, 2), steps(resumed, 2), strict=True):
        assert_equal(left, right)


def test_resume_under_another_layout(make_loader: MakeLoader):
    first = make_loader()
    first.next_step()
    state = first.state_dict()
    parts = []
    for rank in range(2):
        loader = make_loader(data_parallel_rank=rank, data_parallel_size=2)
        loader.load_state_dict(state)
        parts.append(steps(loader, 1))
    merged = [batch for together in zip(*parts, strict=True) for batch in together]
    for left, right in zip(steps(first, 1), merged, strict=True):
        assert_equal(left, right)


def test_close_goes_back_to_the_last_step(make_loader: MakeLoader, data_config: MakeConfig):
    expected = steps(make_loader(), 2)[4:]
    loader = make_loader(data_config(workers=2))
    loader.next_step()
    loader.close()
    for left, right in zip(expected, steps(loader, 1), strict=True):
        assert_equal(left, right)


def test_p_next_is_drawn_per_row(make_loader: MakeLoader, data_config: MakeConfig, tokenizer: Tokenizer):
    """Of documents. A caption would see no image: FAKE IMG FAKE caption."""
    looks_ahead = []
    for batch in steps(make_loader(data_config(p_next=0.5)), 4):
        for row, (ids_S, index_S) in enumerate(zip(batch.input_ids, batch.image_index, strict=True)):
            tokens = (tokenizer.image_id, tokenizer.eos_id)
            drawn = Random(7, "p_next", int(batch.pack_ids[row])).uniform() < 0.5
            ahead = batch.source[row] == "web" and drawn
            assert torch.equal(index_S, (next_image_index if ahead else previous_image_index)(ids_S, *tokens))
            looks_ahead += [ahead] if batch.source[row] == "web" else []
    assert 0.2 < sum(looks_ahead) / len(looks_ahead) < 0.8


def test_captions_never_look_ahead(make_loader: MakeLoader, data_config: MakeConfig, tokenizer: Tokenizer):
    config = data_config(p_next=1.0)
    config.sources = config.sources[1:]
    for batch in steps(make_loader(config), 2):
        texts_bS = (batch.input_ids > tokenizer.eos_id) & (batch.input_ids < tokenizer.fake_id)
        assert texts_bS.any() and (batch.image_index[texts_bS] != NO_IMAGE).all()


def test_augmentation_and_seed_change_pixels(make_loader: MakeLoader, data_config: MakeConfig):
    plain, augmented = steps(make_loader(data_config(augment=False)), 1), steps(make_loader(), 1)
    assert torch.equal(plain[0].input_ids, augmented[0].input_ids)
    assert not torch.equal(plain[0].pixels, augmented[0].pixels)
    other = steps(make_loader(seed=8), 1)
    assert not all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(augmented, other, strict=True))


def test_every_image_has_a_crop_of_its_own(tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig):
    stream = io.BytesIO()
    Image.effect_noise((80, 80), 90).convert("RGB").save(stream, "PNG")
    photo = stream.getvalue()
    write_shard(tmp_path / "0.tar", [DocumentRecord("d", [None, None, "text"], [photo, photo, None])])
    source = SourceConfig("s", str(tmp_path / "0.tar"), kind="documents", max_images=4)
    batch = steps(make_loader(data_config(sources=[source]), global_batch_size=2), 1)[0]
    assert batch.images_per_row.tolist() == [4, 4]  # two samples a row, two images each
    assert len({pixels.numpy().tobytes() for pixels in batch.pixels}) == 8


def test_global_generator_is_left_alone(make_loader: MakeLoader, data_config: MakeConfig):
    before = torch.random.get_rng_state()
    steps(make_loader(data_config(workers=2)), 1)
    assert torch.equal(torch.random.get_rng_state(), before)


# Faults --------------------------------------------------------------------------------------------------------------


def pairs_source(tmp_path: Path, records: list[PairRecord]) -> SourceConfig:
    write_shard(tmp_path / "0.tar", records)
    return SourceConfig("s", str(tmp_path / "*.tar"), kind="pairs", max_images=4)


@pytest.fixture
def one_broken(tmp_path: Path, jpeg: bytes) -> SourceConfig:
    """Three pictures, the one of `k1` cut in half."""
    contents = [jpeg, jpeg[:-40], jpeg]
    return pairs_source(tmp_path, [PairRecord(f"k{n}", data, f"picture {n}") for n, data in enumerate(contents)])


@pytest.mark.parametrize("workers", [0, 2])
def test_no_token_sees_a_broken_image(
    make_loader: MakeLoader, data_config: MakeConfig, tokenizer: Tokenizer, one_broken: SourceConfig, workers: int
):
    loader = make_loader(data_config(sources=[one_broken], workers=workers, max_fault_rate=0.1))
    step = loader.next_step()
    loader.close()
    broken = 0
    for batch in step.microbatches:
        first = (batch.images_per_row.cumsum(0) - batch.images_per_row).tolist()
        for row, ids_S in enumerate(batch.input_ids):
            seen_S = batch.image_index[row]
            for number, ids in enumerate(tokenizer_split(ids_S.tolist(), tokenizer.eos_id)):
                is_broken = tokenizer.decode(ids) == "picture 1"
                broken += is_broken
                assert (number in seen_S) is not is_broken
                assert bool(batch.pixels[first[row] + number].any()) is not is_broken
        assert torch.equal(batch.images_per_row, (batch.input_ids == tokenizer.image_id).sum(-1))  # shapes stay
        assert torch.equal(batch.loss_mask.sum(-1), batch.position_ids.amax(-1).float())  # captions count all the same
    assert broken > 0 and step.faults == broken
    assert loader.fault_report() == {"s": {"corrupt_image": broken}}
    assert step.messages[0].startswith("s: corrupt_image: an image of k1 in ")
    assert loader.state_dict()["faults"]["s"]["all"]["corrupt_image"] == broken


def test_ranks_learn_of_each_others_broken_images(
    make_loader: MakeLoader, data_config: MakeConfig, one_broken: SourceConfig
):
    """As with real ranks: what one of them found is merged and handed to all."""
    config = data_config(sources=[one_broken], max_fault_rate=0.1)
    whole = make_loader(config).next_step()
    places = [{"tensor_rank": rank, "tensor_size": 2} for rank in range(2)] + [{"encodes_images": False}]
    found: list[torch.Tensor] = []
    for place in places:
        make_loader(config, **place).next_step(lambda plan, codes, error: found.append(codes) or codes)
    assert not found[2].any() and not torch.equal(found[0], found[1])
    merged = torch.stack(found).amax(0)
    for place in places:
        step = make_loader(config, **place).next_step(lambda plan, codes, error: merged)
        assert step.faults == whole.faults
        for ours, theirs in zip(step.microbatches, whole.microbatches, strict=True):
            assert_equal(ours, theirs, but=("pixels",))


def test_too_many_broken_images_stop_the_run(
    make_loader: MakeLoader, data_config: MakeConfig, one_broken: SourceConfig
):
    loader = make_loader(data_config(sources=[one_broken], max_fault_rate=0.02))
    with pytest.raises(
        DataError, match=r"source s: 2\d of \d+ images are broken .*\(corrupt_image: .*max_fault_rate=0.02"
    ):
        for _ in range(50):
            loader.next_step()
    endless = make_loader(data_config(sources=[one_broken], max_fault_rate=1.0))
    assert [endless.next_step().faults for _ in range(20)][-1] > 20


def test_the_count_of_broken_images_survives_a_resume(
    make_loader: MakeLoader, data_config: MakeConfig, one_broken: SourceConfig
):
    config = data_config(sources=[one_broken], max_fault_rate=0.1)
    first = make_loader(config)
    first.next_step()
    resumed = make_loader(config)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.faults.total == first.faults.total > 0
    assert first.next_step().faults == resumed.next_step().faults
    assert first.state_dict() == resumed.state_dict()


def test_too_many_broken_samples_are_refused_at_the_start(
    tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig, jpeg: bytes
):
    records = [PairRecord(f"k{n}", jpeg, "fine") for n in range(3)]
    source = pairs_source(tmp_path, records)
    shard = tmp_path / "0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"fine", b"\xff\xfe\xfd\xfc", 1))
    make_loader(data_config(sources=[source]))
    with pytest.raises(DataError, match=r"source s: 1 of 3 samples are broken .*\(not_utf8: 1\)"):
        make_loader(data_config(sources=[source], max_fault_rate=0.0))


def test_faults_and_filters_are_reported(tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig, jpeg: bytes):
    texts = ["fine", " ", "bad <image>", "long " * 300]
    source = pairs_source(tmp_path, [PairRecord(str(n), jpeg, text) for n, text in enumerate(texts)])
    loader = make_loader(data_config(sources=[source], filters=["special_token_in_text"]), encodes_images=False)
    for _ in range(80):  # an epoch of a source as small as this is 2048 samples
        assert loader.next_step().faults == 0  # nothing is broken
    dropped = loader.fault_report()["s"]
    assert dropped.pop("too_long") >= 1  # counted with each epoch
    assert dropped == {"no_text": 1, "special_token_in_text": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_stops_the_run_or_is_skipped(
    tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig, jpeg: bytes, workers: int
):
    source = pairs_source(tmp_path, [PairRecord("k", jpeg, "a picture")])
    write_shard(tmp_path / "1.tar", [PairRecord("j", jpeg, "another")])
    stops = make_loader(data_config(sources=[source], workers=workers))
    skips = make_loader(data_config(sources=[source], workers=workers, on_missing_shard="skip"))
    bare = make_loader(data_config(sources=[source], workers=workers), encodes_images=False)
    before = stops.state_dict()
    (tmp_path / "1.tar").unlink()
    with pytest.raises(DataError, match=r"1\.tar.*data\.on_missing_shard=skip"):
        stops.next_step()
    assert stops.state_dict() == before
    step = skips.next_step()
    assert skips.fault_report() == {"s": {"missing_shard": step.faults}} and step.faults > 0
    bare.next_step()  # who decodes nothing does not need it
    for loader in (stops, skips):
        loader.close()


def test_a_shard_that_changes_under_way(tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig, jpeg: bytes):
    source = pairs_source(tmp_path, [PairRecord("k", jpeg, "seven words")])
    loader = make_loader(data_config(sources=[source]))
    write_shard(tmp_path / "0.tar", [PairRecord("k", jpeg * 200, "seven words")])
    with pytest.raises(DataError, match=r"0\.tar has \d+ bytes, and had \d+ when it was indexed"):
        loader.next_step()


def test_a_worker_that_dies_is_an_error_with_a_message(
    make_loader: MakeLoader, data_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(MicrobatchBuilder, "build", lambda self, packs: os._exit(9))
    loader = make_loader(data_config(workers=1))
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataFailure, match="a decoding process ended"):
        loader.next_step()
    assert signal.getsignal(signal.SIGCHLD) is before  # torch's would raise anywhere in the main thread


def test_a_bug_is_told_with_its_place(
    make_loader: MakeLoader, data_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
):
    def build(self: MicrobatchBuilder, packs: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(MicrobatchBuilder, "build", build)
    with pytest.raises(DataFailure, match=r"(?s)reading data failed: .*in build.*MemoryError: no room"):
        make_loader().next_step()


def counted(used: int, broken: int, reason: str = "corrupt_image", rate: float = 0.01, before: int = 0) -> FaultCounts:
    """Counts of a source after so many images, `before` of them long ago and fine."""
    found = FaultCounts([fake_index("s", [fake_sidecar("pairs", [9], [[2]])], "pairs")], rate)
    code = IMAGE_FAULTS.index(reason) + 1
    for images, bad in ((before, 0), (used, broken)):
        codes = torch.zeros(images, dtype=torch.uint8)
        codes[:bad] = code
        found.add([Pack(0, 0, (0,) * images, 9 * images, images)], codes)
        found.check()
    return found


def test_a_rate_is_taken_of_at_least_a_thousand():
    counted(20, 10)
    with pytest.raises(DataError, match="11 of 20 images are broken"):
        counted(20, 11)
    with pytest.raises(DataError, match="21 of 2000 images"):
        counted(2000, 21)


def test_what_goes_wrong_late_in_a_run_is_seen():
    """Ten times the rate among the last images, however many were fine before."""
    counted(2000, 200, before=10_000_000)
    with pytest.raises(DataError, match="201 of 2000 of the last images"):
        counted(2000, 201, before=10_000_000)


def test_not_all_shards_may_be_missing():
    counted(2000, 1000, "missing_shard")
    with pytest.raises(DataError, match=r"1001 of 2000 of the last images .*missing_shard: 1001"):
        counted(2000, 1001, "missing_shard", rate=1.0)


def test_access_that_is_refused_is_no_missing_shard(
    tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig, jpeg: bytes, monkeypatch: pytest.MonkeyPatch
):
    def refused(self: Storage, path: str) -> int:
        raise ForbiddenFile(f"{path}: access was refused")

    source = pairs_source(tmp_path, [PairRecord("k", jpeg, "a picture")])
    loader = make_loader(data_config(sources=[source], on_missing_shard="skip"))
    monkeypatch.setattr(Storage, "size", refused)
    with pytest.raises(DataError, match=r"0\.tar: access was refused"):
        loader.next_step()


def test_the_hash_of_a_step_is_that_of_its_rows(make_loader: MakeLoader, data_config: MakeConfig):
    seen: list[int] = []

    def agree(plan: int, codes: torch.Tensor, error: Exception | None) -> torch.Tensor:
        seen.append(plan)
        return codes

    for loader in (make_loader(), make_loader(data_parallel_size=2, data_parallel_rank=1), make_loader(seed=8)):
        loader.next_step(agree)
        loader.next_step(agree)
    assert seen[:2] == seen[2:4] and len(set(seen)) == 4


def test_an_error_is_agreed_on_by_all(make_loader: MakeLoader):
    """A rank without an error of its own raises what `agree` raises."""

    def agree(plan: int, codes: torch.Tensor, error: Exception | None) -> torch.Tensor:
        assert error is None
        raise DataError("on another rank")

    with pytest.raises(DataError, match="on another rank"):
        make_loader().next_step(agree)


# The rest ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_images_are_level_over_the_ranks(make_loader: MakeLoader, data_config: MakeConfig, size: int):
    options = {"micro_batch_size": 1, "global_batch_size": 16, "data_parallel_size": size}
    loaders = [make_loader(data_config(), data_parallel_rank=rank, **options) for rank in range(size)]
    for _ in range(3):
        batches = [loader.next_step().microbatches for loader in loaders]
        counts = [[batch.num_images for batch in mine] for mine in batches]
        sums = [sum(mine) for mine in counts]
        every = [count for mine in counts for count in mine]
        assert max(sums) - min(sums) <= max(every) - min(every)


def test_documents_are_cut_to_a_row(make_loader: MakeLoader, data_config: MakeConfig, tokenizer: Tokenizer):
    config = data_config(sequence_length=40, p_next=0.0)
    config.sources = config.sources[:1]
    config.sources[0].max_images = 1
    seen = []
    for batch in steps(make_loader(config), 4):
        assert (batch.images_per_row <= 1).all()
        assert torch.equal(batch.images_per_row, (batch.input_ids == tokenizer.image_id).sum(-1))
        assert (batch.input_ids[:, 0] == tokenizer.bos_id).all()
        assert batch.pixels.shape[0] == batch.num_images
        assert torch.equal(
            batch.image_index, previous_image_index(batch.input_ids, tokenizer.image_id, tokenizer.eos_id)
        )
        seen += [pixels.numpy().tobytes() for pixels in batch.pixels]
    assert len(set(seen)) > 3


def test_captions_before_their_images(make_loader: MakeLoader, data_config: MakeConfig, tokenizer: Tokenizer):
    found = set()
    config = data_config(image_at_end=0.5)
    config.sources = config.sources[1:]
    plain = data_config()
    plain.sources = config.sources
    for ours, theirs in zip(steps(make_loader(config), 3), steps(make_loader(plain), 3), strict=True):
        assert torch.equal(ours.pixels, theirs.pixels)
        for left, right in zip(ours.input_ids.tolist(), theirs.input_ids.tolist(), strict=True):
            assert sorted(left) == sorted(right)
            for ids in tokenizer_split(left, tokenizer.eos_id):
                place = ids.index(tokenizer.image_id)
                assert place in (2, len(ids) - 3)
                assert ids[place - 1] == ids[place + 1] == tokenizer.fake_id
                found.add(place == 2)
    assert found == {True, False}


def test_workers_are_not_made_where_nothing_is_decoded(make_loader: MakeLoader, data_config: MakeConfig):
    loader = make_loader(data_config(workers=2), encodes_images=False)
    before = psutil.Process().children()
    loader.next_step()
    assert psutil.Process().children() == before


def test_codes_name_all_faults():
    assert len(IMAGE_FAULTS) < 256 and len(set(IMAGE_FAULTS)) == len(IMAGE_FAULTS)


def test_state_of_other_data_is_refused(tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig, tiny: Path):
    state = make_loader().state_dict()
    (name, content), *_ = read_shard(str(tiny / "pairs-00000.tar"))
    shutil.copy(tiny / "documents-00000.tar", tmp_path)
    write_shard(tmp_path / "pairs-00000.tar", [PairRecord(name, content["jpg"], "only one")])
    config = data_config()
    for source in config.sources:
        source.shards = str(tmp_path / Path(source.shards).name)
    with pytest.raises(DataError, match="another data stream"):
        make_loader(config).load_state_dict(state)


def test_moved_data_resumes(tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig, tiny: Path):
    config = data_config()
    for source in config.sources:
        source.shards = str(tmp_path / Path(source.shards).name)
    for path in tiny.glob("*.tar"):
        shutil.copy(path, tmp_path)
    make_loader(config).load_state_dict(make_loader().state_dict())


def test_uneven_batch_is_refused(make_loader: MakeLoader):
    with pytest.raises(ConfigError, match=r"training\.global_batch_size=8 .* = 6; use e\.g\. 6"):
        make_loader(data_parallel_size=3)


def test_tokenizer_must_be_set(make_loader: MakeLoader, data_config: MakeConfig):
    with pytest.raises(DataError, match=r"data\.tokenizer is not set"):
        make_loader(data_config(tokenizer=None))
