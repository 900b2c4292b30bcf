"""One microbatch from the packs of its rows: token ids from the sidecars, pixels from the shards.

Stateless, so it runs in the training process or in any worker with the same result.

Legend: b rows of the microbatch, S tokens of a row, N images of the microbatch, n images this rank decodes,
H, W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_atum.batch import Batch, image_slice, position_ids_from_mask, shift_labels
from megatron_atum.config.schema import DataConfig
from megatron_atum.data.image_attention import next_image_index, previous_image_index
from megatron_atum.data.images import IMAGE_FAULTS, ImageFault, decode_image, eval_pixels, train_pixels
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.pieces import cut_tokens
from megatron_atum.data.planner import Pack, images_of
from megatron_atum.data.rng import Random
from megatron_atum.data.scan import Member
from megatron_atum.data.storage import ForbiddenFile, MissingFile, Storage
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError

DRAFT = 2  # data.draft keeps at least this many times the model's image size


@dataclass(frozen=True)
class ImagePlace:
    """Where an image of a microbatch lies, and its number within its row (it seeds the crop)."""

    source: int
    shard: int
    row: int  # of its sample in the shard
    member: Member
    pack_id: int
    number: int


@dataclass(frozen=True)
class ImageShare:
    """Which images a rank decodes: a slice per tensor rank, or none at all."""

    encodes_images: bool = True
    tensor_rank: int = 0
    tensor_size: int = 1

    def of(self, num_images: int) -> slice:
        return image_slice(num_images, self.tensor_rank, self.tensor_size) if self.encodes_images else slice(0, 0)


@dataclass(frozen=True)
class Built:
    """A microbatch as it comes from a worker. Arrays that are no tensors cross the process boundary in one message."""

    ids: NDArray[np.int32]  # [b,S] padded on the right
    lengths: list[int]  # [b] real tokens
    looks_ahead: list[bool]  # [b] whether tokens see the next image
    images_per_row: list[int]
    packs: list[tuple[int, int]]  # [b] id and source
    learnt: NDArray[np.bool_] | None  # [b,S] whether a token counts in the loss as a label; None: all do
    pixels: Tensor | None  # [n,3,H,W] uint8; 0 where an image is broken. None: they lie in the ring
    codes: NDArray[np.uint8]  # [n] 0, or the image's fault: place in IMAGE_FAULTS + 1
    slot: int = 0  # of the ring


@dataclass
class MicrobatchBuilder:
    """Builds microbatches. As a map-style dataset its keys are a slot of the ring and the packs of a microbatch."""

    config: DataConfig
    indexes: Sequence[SourceIndex]
    tokenizer: Tokenizer
    image_size: int
    seed: int
    share: ImageShare
    storage: Storage
    pad_token_id: int

    def __post_init__(self) -> None:
        # [slots, most images, 3,H,W] uint8 in shared memory, for workers. Fresh shared memory for each microbatch would
        # cost a page fault for every 4 KiB, about as much as a tenth of the decoding.
        self.ring: Tensor | None = None
        self._known: set[tuple[int, int]] = set()  # shards whose size has been compared with their index

    def __getitem__(self, key: tuple[int, Sequence[Pack]]) -> Built | DataError:
        """A DataError is handed back instead of raised: a worker would wrap it in its traceback."""
        slot, packs = key
        try:
            if self.ring is None:
                return self.build(packs)
            return replace(self.build(packs, self.ring[slot]), pixels=None, slot=slot)
        except DataError as error:
            return error

    def build(self, packs: Sequence[Pack], into: Tensor | None = None) -> Built:
        """
        Args:
            into: [n or more,3,H,W] uint8 that pixels are written to.

        Raises:
            DataError: files are missing or are not those of the index.
        """
        ids_bS = np.full((len(packs), self.config.sequence_length), self.pad_token_id, np.int32)
        learnt_bS = np.ones(ids_bS.shape, np.bool_) if self.config.loss_on == "assistant" else None
        lengths, places = [], []
        for row, pack in enumerate(packs):
            ids = np.concatenate([self._sample_ids(pack, place) for place in range(len(pack.samples))])
            ids_bS[row, : len(ids)] = ids
            lengths.append(len(ids))
            if learnt_bS is not None and self.indexes[pack.source].kind == "conversations":
                learnt_bS[row, : len(ids)] = self._is_answer(pack) & ~np.isin(ids, self._image_tokens)
            places += self._image_places(pack)
        mine = places[self.share.of(len(places))]
        if into is None:
            into = torch.empty(len(mine), 3, self.image_size, self.image_size, dtype=torch.uint8)
        pixels_n3HW = into[: len(mine)]
        codes = self._decode_all(mine, pixels_n3HW)
        return Built(
            ids=ids_bS,
            lengths=lengths,
            looks_ahead=[self._looks_ahead(pack) for pack in packs],
            images_per_row=[pack.images for pack in packs],
            packs=[(pack.id, pack.source) for pack in packs],
            learnt=learnt_bS,
            pixels=pixels_n3HW,
            codes=codes,
        )

    def finish(self, built: Built) -> Batch:
        """What the model takes. Runs in the training process: it costs little, and few arrays need to travel."""
        assert built.pixels is not None
        ids_bS = torch.from_numpy(built.ids).to(torch.int64)
        mask_bS = (torch.arange(self.config.sequence_length) < torch.tensor(built.lengths)[:, None]).to(torch.int64)
        labels_bS, loss_mask_bS = shift_labels(ids_bS, mask_bS)
        if built.learnt is not None:
            loss_mask_bS *= torch.roll(torch.from_numpy(built.learnt), shifts=-1, dims=-1)
        return Batch(
            input_ids=ids_bS,
            labels=labels_bS,
            loss_mask=loss_mask_bS,
            z_mask=(mask_bS * (ids_bS != self.tokenizer.image_id)).to(torch.float32),
            position_ids=position_ids_from_mask(mask_bS),
            pixels=built.pixels,
            image_index=self._image_index(ids_bS, built.looks_ahead),
            images_per_row=torch.tensor(built.images_per_row, dtype=torch.int64),
            source=tuple(self.indexes[source].name for _, source in built.packs),
            pack_ids=torch.tensor([pack_id for pack_id, _ in built.packs], dtype=torch.int64),
        )

    def taken(self, built: Built) -> Built:
        """With pixels that nobody else writes to."""
        if built.pixels is not None:
            return built
        assert self.ring is not None
        return replace(built, pixels=self.ring[built.slot, : len(built.codes)].clone())

    def _image_index(self, ids_bS: Tensor, looks_ahead: list[bool]) -> Tensor:
        """[b,S] int64. Whether a row looks ahead is drawn for the whole row."""
        previous_bS = previous_image_index(ids_bS, self.tokenizer.image_id, self.tokenizer.eos_id)
        if not any(looks_ahead):
            return previous_bS
        next_bS = next_image_index(ids_bS, self.tokenizer.image_id, self.tokenizer.eos_id)
        return torch.where(torch.tensor(looks_ahead)[:, None], next_bS, previous_bS)

    def _sample_ids(self, pack: Pack, place: int) -> NDArray[np.int64]:
        index = self.indexes[pack.source]
        _, sidecar, row = index.sample(pack.samples[place])
        ids = sidecar.sample_ids(row).astype(np.int64)
        for cut in pack.cuts:
            if cut.place == place:
                ids = ids[cut.start : cut.stop]
                if index.kind == "conversations":
                    return np.append(ids, self.tokenizer.eos_id)
                whole = cut_tokens(cut.start, cut.stop, int(ids[0]), index.kind) == len(ids)
                return ids if whole else np.concatenate([[self.tokenizer.bos_id], ids])
        if index.kind == "pairs" and self._drawn(self.config.image_at_end, "image_at_end", pack.id, place):
            return np.concatenate([ids[:1], ids[4:-1], ids[1:4], ids[-1:]])  # <s> FAKE IMG FAKE caption </s>
        return ids

    @property
    def _image_tokens(self) -> tuple[int, int]:
        return self.tokenizer.fake_id, self.tokenizer.image_id

    def _is_answer(self, pack: Pack) -> NDArray[np.bool_]:
        """[tokens of the pack] Whether each lies in an answer of the assistant, for a pack of conversations."""
        stops = {cut.place: cut.stop for cut in pack.cuts}
        masks = []
        for place, sample in enumerate(pack.samples):
            _, sidecar, row = self.indexes[pack.source].sample(sample)
            mask = sidecar.answer_mask(row)
            masks.append(np.append(mask[: stops[place]], False) if place in stops else mask)
        return np.concatenate(masks)

    def _looks_ahead(self, pack: Pack) -> bool:
        """Documents only: a caption or an answer stands behind its image, and would see none."""
        documents = self.indexes[pack.source].kind == "documents"
        return documents and self._drawn(self.config.p_next, "p_next", pack.id)

    def _drawn(self, probability: float, *purpose: int | str) -> bool:
        return probability > 0 and Random(self.seed, *purpose).uniform() < probability

    def _image_places(self, pack: Pack) -> list[ImagePlace]:
        """The images of a pack in the order of its <image> tokens."""
        index = self.indexes[pack.source]
        found = [
            (shard, row, index.sidecar(shard).image_member(row, number))
            for shard, row, number in images_of(index, pack)
        ]
        assert len(found) == pack.images, pack
        return [ImagePlace(pack.source, *where, pack.id, number) for number, where in enumerate(found)]

    def _decode_all(self, places: list[ImagePlace], pixels_n3HW: Tensor) -> NDArray[np.uint8]:
        """Fills the pixels. Returns [n] codes."""
        codes = np.zeros(len(places), np.uint8)
        out = pixels_n3HW.numpy()
        for number, place in enumerate(places):
            try:
                # Channels first already here: the training process would have to do it otherwise.
                out[number] = self._decode(place).transpose(2, 0, 1)
            except ImageFault as fault:
                out[number] = 0
                codes[number] = IMAGE_FAULTS.index(fault.reason) + 1
        return codes

    def _decode(self, place: ImagePlace) -> NDArray[np.uint8]:
        """[H,W,3] uint8. Raises ImageFault, or DataError when the shard is at fault."""
        try:
            self._check_shard(place)
            data = self.storage.read(self.indexes[place.source].shards[place.shard].path, *place.member)
        except MissingFile as error:
            if self.config.on_missing_shard == "skip" and not isinstance(error, ForbiddenFile):
                raise ImageFault("missing_shard", str(error)) from error
            raise DataError(f"{error}. Restore the shard, or say data.on_missing_shard=skip") from error
        image = decode_image(data, DRAFT * self.image_size if self.config.draft else 0)
        if not self.config.augment:
            return eval_pixels(image, self.image_size)
        return train_pixels(image, self.image_size, Random(self.seed, "crop", place.pack_id, place.number))

    def _check_shard(self, place: ImagePlace) -> None:
        """The shard is as long as it was when it was indexed. Asked once by each process."""
        if (place.source, place.shard) in self._known:
            return
        entry = self.indexes[place.source].shards[place.shard]
        size = self.storage.size(entry.path)
        if size != entry.bytes:
            raise DataError(
                f"shard {entry.path} has {size} bytes, and had {entry.bytes} when it was indexed; restore it, or run "
                "tools/data/index.py again"
            )
        self._known.add((place.source, place.shard))
