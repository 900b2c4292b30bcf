import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_atum.batch import NO_IMAGE, PAD_POSITION, Batch, image_slice
from megatron_atum.config.schema import DataConfig, SourceConfig
from megatron_atum.data.image_attention import next_image_index, previous_image_index
from megatron_atum.data.images import decode_image, eval_transform
from megatron_atum.data.loader import StepLoader
from megatron_atum.data.shards import DocumentRecord, PairRecord, read_shard, write_shard
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import ConfigError, DataError

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
    assert torch.cat([batch.pack_ids for batch in batches]).tolist() == list(range(16))
    assert {name for batch in batches for name in batch.source} == {"web", "captions"}
    for batch in batches:
        ids_bS = batch.input_ids
        lengths_b = batch.position_ids.max(-1).values + 1
        real_bS = torch.arange(256) < lengths_b[:, None]
        assert ids_bS.shape == (2, 256) and ids_bS.dtype == batch.labels.dtype == batch.image_index.dtype == torch.int64
        assert batch.loss_mask.dtype == batch.z_mask.dtype == batch.pixels.dtype == torch.float32
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
                photo = decode_image((tiny / "photos" / f"{name}.jpg").read_bytes(), name)
                assert torch.equal(next(pixels), eval_transform(photo, 32))
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


@pytest.mark.parametrize("size", [2, 4])
def test_same_microbatches_for_every_data_parallel_size(make_loader: MakeLoader, size: int):
    whole = steps(make_loader(), 3)
    parts = [steps(make_loader(data_parallel_rank=rank, data_parallel_size=size), 3) for rank in range(size)]
    merged = [batch for together in zip(*parts, strict=True) for batch in together]
    assert len(merged) == len(whole)
    for left, right in zip(whole, merged, strict=True):
        assert_equal(left, right)


def test_same_stream_with_workers(make_loader: MakeLoader, data_config: MakeConfig):
    inline, workers = steps(make_loader(), 3), steps(make_loader(data_config(workers=2)), 3)
    for left, right in zip(inline, workers, strict=True):
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
    looks_ahead = []
    for batch in steps(make_loader(data_config(p_next=0.5)), 4):
        for ids_S, index_S in zip(batch.input_ids, batch.image_index, strict=True):
            tokens = (tokenizer.image_id, tokenizer.eos_id)
            looks_ahead.append(torch.equal(index_S, next_image_index(ids_S, *tokens)))
            assert looks_ahead[-1] or torch.equal(index_S, previous_image_index(ids_S, *tokens))
    assert 0.2 < sum(looks_ahead) / len(looks_ahead) < 0.8


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


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_names_shard_and_key(
    tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig, jpeg: bytes, workers: int
):
    write_shard(tmp_path / "bad-0.tar", [PairRecord("k7", jpeg[:-40], "half a picture")])
    config = data_config(sources=[SourceConfig("s", str(tmp_path / "*.tar"), kind="pairs")], workers=workers)
    loader = make_loader(config)
    before = loader.state_dict()
    with pytest.raises(DataError, match=r"^shard .*bad-0\.tar, key k7: image cannot be decoded"):
        loader.next_step()
    assert loader.state_dict() == before
    loader.close()


def test_faults_are_reported(tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig, jpeg: bytes):
    records = [PairRecord("a", jpeg, "fine"), PairRecord("b", jpeg, " "), PairRecord("c", jpeg, "bad <image>")]
    write_shard(tmp_path / "0.tar", records)
    loader = make_loader(data_config(sources=[SourceConfig("s", str(tmp_path / "*.tar"), kind="pairs")]))
    assert loader.next_step().faults == 2
    assert loader.fault_report() == {"s": {"no_text": 1, "special_token_in_text": 1}}


def test_text_that_changes_under_way(tmp_path: Path, make_loader: MakeLoader, data_config: MakeConfig, jpeg: bytes):
    path = tmp_path / "0.tar"
    write_shard(path, [PairRecord("k", jpeg, "seven words")])
    loader = make_loader(data_config(sources=[SourceConfig("s", str(path), kind="pairs")]))
    write_shard(path, [PairRecord("k", jpeg, "xqzjkvbwqzj")])
    loader._builder._reader.close()
    with pytest.raises(DataError, match=r"0\.tar, key k: text changed"):
        loader.next_step()


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
