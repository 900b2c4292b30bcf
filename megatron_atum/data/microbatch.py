"""One microbatch from the packs of its rows: reads, tokenises and decodes.

Stateless, so it runs in the training process or in any worker with the same result.

Legend: b rows of the microbatch, S tokens of a row, N images of the microbatch, n images this rank decodes,
H, W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_atum.batch import Batch, image_slice, position_ids_from_mask, shift_labels
from megatron_atum.data.image_attention import next_image_index, previous_image_index
from megatron_atum.data.images import decode_image, eval_transform, train_transform
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.planner import Pack
from megatron_atum.data.rng import Random
from megatron_atum.data.shards import Member, ShardReader
from megatron_atum.data.text import SampleFault, encode_sample, parse_sample
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError


@dataclass(frozen=True)
class ImagePlace:
    """Where an image of a microbatch lies, and its number within its row (it seeds the crop)."""

    shard: str
    key: str
    member: Member
    pack_id: int
    number: int


@dataclass(frozen=True)
class ImageShare:
    """Which images a rank decodes: a slice per tensor rank, or none at all."""

    encodes_images: bool = True
    tensor_rank: int = 0
    tensor_size: int = 1

    def of(self, images: list[ImagePlace]) -> list[ImagePlace]:
        return images[image_slice(len(images), self.tensor_rank, self.tensor_size)] if self.encodes_images else []


@dataclass
class MicrobatchBuilder:
    """Builds microbatches. As a map-style dataset its keys are the packs of a microbatch."""

    indexes: Sequence[SourceIndex]
    tokenizer: Tokenizer
    sequence_length: int
    image_size: int
    seed: int
    share: ImageShare
    augment: bool
    p_next: float
    pad_token_id: int

    def __post_init__(self) -> None:
        self._reader = ShardReader()

    def __getitem__(self, packs: Sequence[Pack]) -> Batch | DataError:
        """A DataError is handed back instead of raised: a worker would wrap it in its traceback."""
        try:
            return self.build(packs)
        except DataError as error:
            return error

    def build(self, packs: Sequence[Pack]) -> Batch:
        """The microbatch whose rows are these packs. Raises DataError."""
        rows, images, images_per_row = [], [], []
        for pack in packs:
            ids, places = self._read_row(pack)
            rows.append(ids)
            images += places
            images_per_row.append(len(places))
        ids_bS, mask_bS = self._pad(rows)
        labels_bS, loss_mask_bS = shift_labels(ids_bS, mask_bS)
        return Batch(
            input_ids=ids_bS,
            labels=labels_bS,
            loss_mask=loss_mask_bS,
            z_mask=(mask_bS * (ids_bS != self.tokenizer.image_id)).to(torch.float32),
            position_ids=position_ids_from_mask(mask_bS),
            pixels=self._pixels(self.share.of(images)),
            image_index=torch.stack([self._image_index(p, ids_S) for p, ids_S in zip(packs, ids_bS, strict=True)]),
            images_per_row=torch.tensor(images_per_row, dtype=torch.int64),
            source=tuple(self.indexes[pack.source].name for pack in packs),
            pack_ids=torch.tensor([pack.id for pack in packs], dtype=torch.int64),
        )

    def _read_row(self, pack: Pack) -> tuple[list[int], list[ImagePlace]]:
        """Token ids of a pack and the places of its images, in the order of its <image> tokens."""
        index = self.indexes[pack.source]
        ids: list[int] = []
        places: list[ImagePlace] = []
        for sample in pack.samples:
            shard, key = index.location(sample)
            text, *images = index.members(sample)
            ids += self._sample_ids(index, sample, self._reader.read(shard, text))
            places += [ImagePlace(shard, key, m, pack.id, len(places) + i) for i, m in enumerate(images)]
        return ids, places

    def _sample_ids(self, index: SourceIndex, sample: int, raw: bytes) -> list[int]:
        try:
            encoded = encode_sample(parse_sample(raw, index.kind), self.tokenizer)
        except SampleFault:
            encoded = None
        found = None if encoded is None else (len(encoded.ids), len(encoded.image_positions))
        if encoded is None or found != (index.tokens[sample], index.images[sample]):
            shard, key = index.location(sample)
            raise DataError(f"shard {shard}, key {key}: text changed since the run started; restore it or start again")
        return encoded.ids

    def _pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows padded on the right: [b,S] int64 token ids, and [b,S] int64 with 1 at real tokens."""
        ids_bS = torch.full((len(rows), self.sequence_length), self.pad_token_id, dtype=torch.int64)
        mask_bS = torch.zeros_like(ids_bS)
        for row, ids in enumerate(rows):
            ids_bS[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask_bS[row, : len(ids)] = 1
        return ids_bS, mask_bS

    def _image_index(self, pack: Pack, ids_S: Tensor) -> Tensor:
        """[S] int64. Whether a row looks ahead is drawn for the whole row."""
        looks_ahead = Random(self.seed, "p_next", pack.id).uniform() < self.p_next
        index_of = next_image_index if looks_ahead else previous_image_index
        return index_of(ids_S, self.tokenizer.image_id, self.tokenizer.eos_id)

    def _pixels(self, images: list[ImagePlace]) -> Tensor:
        """[n,3,H,W] float32."""
        pixels_n3HW = torch.empty(len(images), 3, self.image_size, self.image_size)
        for number, place in enumerate(images):
            pixels_n3HW[number] = self._decode(place)
        return pixels_n3HW

    def _decode(self, place: ImagePlace) -> Tensor:
        """[3,H,W] float32. Raises DataError naming shard and key."""
        data = self._reader.read(place.shard, place.member)
        image = decode_image(data, f"shard {place.shard}, key {place.key}")
        if not self.augment:
            return eval_transform(image, self.image_size)
        return train_transform(image, self.image_size, Random(self.seed, "crop", place.pack_id, place.number))
