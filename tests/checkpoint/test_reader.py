"""Boxes in, boxes out: whatever boxes a tensor was written in, any box of it is read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from megatron_atum.checkpoint import writer
from megatron_atum.checkpoint.files import write_text
from megatron_atum.checkpoint.index import INDEX, Chunk, Written, merge, read_index, to_json
from megatron_atum.checkpoint.reader import CheckpointReader
from megatron_atum.checkpoint.writer import Item, write_items
from megatron_atum.errors import CheckpointError

TENSORS = {
    "matrix": torch.arange(35.0).reshape(7, 5),
    "bf16": torch.arange(24).reshape(4, 6).bfloat16(),
    "conv": torch.arange(48.0).reshape(2, 3, 2, 4),
    "vector": torch.arange(9.0),
    "gate": torch.tensor([0.5]),
    "scalar": torch.tensor(3.0),
    "state": torch.arange(10).to(torch.uint8),
    "empty": torch.zeros(0, 3),
}


def cut(shape: tuple[int, ...], chance: random.Random) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A random partition of a box into boxes."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(chance.randrange(6)):
        offsets, sizes = boxes.pop(chance.randrange(len(boxes)))
        dims = [dim for dim, size in enumerate(sizes) if size > 1]
        if not dims:
            boxes.append((offsets, sizes))
            continue
        dim = chance.choice(dims)
        first = chance.randrange(1, sizes[dim])
        second = (*offsets[:dim], offsets[dim] + first, *offsets[dim + 1 :])
        boxes.append((offsets, (*sizes[:dim], first, *sizes[dim + 1 :])))
        boxes.append((second, (*sizes[:dim], sizes[dim] - first, *sizes[dim + 1 :])))
    return boxes


def place(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))


def stored(folder: Path, tensors: dict[str, Tensor], chance: random.Random, ranks: int = 3) -> Path:
    """Write tensors in random boxes, as several ranks would."""
    items: list[list[Item]] = [[] for _ in range(ranks)]
    for key, tensor in tensors.items():
        for offsets, sizes in cut(tuple(tensor.shape), chance):
            part = tensor[place(offsets, sizes)].contiguous()
            item = Item(key, tensor.dtype, tuple(tensor.shape), offsets, sizes, lambda part=part: [part])
            items[chance.randrange(ranks)].append(item)
    folder.mkdir(parents=True)
    written: list[Written] = []
    for rank, mine in enumerate(items):
        written += write_items(folder, f"weights-{rank}", mine)[1]
    write_text(folder / INDEX, to_json(merge(written)))
    return folder


@pytest.mark.parametrize("seed", range(10))
def test_any_box_of_any_boxes(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    with CheckpointReader(stored(tmp_path / "a", TENSORS, chance)) as reader:
        for key, tensor in TENSORS.items():
            for offsets, sizes in [((0,) * tensor.dim(), tuple(tensor.shape)), *cut(tuple(tensor.shape), chance)]:
                found = reader.read(key, offsets, sizes)
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor[place(offsets, sizes)]), (key, offsets, sizes)


def test_torch_loads_it(tmp_path: Path) -> None:
    """With its default planner: a user needs nothing of this project but the reader."""
    folder = stored(tmp_path / "a", TENSORS, random.Random(1))
    state = {key: torch.full_like(tensor, 77) for key, tensor in TENSORS.items() if key != "empty"}
    dcp.load(state, storage_reader=CheckpointReader(folder), no_dist=True)
    assert all(torch.equal(value, TENSORS[key]) for key, value in state.items())


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    folder = stored(tmp_path / "a", TENSORS, random.Random(2), ranks=1)
    whole = load_file(folder / "weights-0-0.safetensors")
    assert torch.equal(whole["gate"], TENSORS["gate"])
    assert any("[" in name for name in whole)  # a box of a tensor


def test_large_files_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 100)
    folder = stored(tmp_path / "a", TENSORS, random.Random(3), ranks=1)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == "weights-0-0.safetensors"
    with CheckpointReader(folder) as reader:
        for key, tensor in TENSORS.items():
            assert torch.equal(reader.read(key, (0,) * tensor.dim(), tuple(tensor.shape)), tensor)


def test_two_folders_are_one(tmp_path: Path) -> None:
    names = list(TENSORS)
    first = stored(tmp_path / "a", {name: TENSORS[name] for name in names[:3]}, random.Random(4))
    second = stored(tmp_path / "b", {name: TENSORS[name] for name in names[3:]}, random.Random(5))
    with CheckpointReader(first, second) as reader:
        assert reader.index.keys() == TENSORS.keys()
        assert torch.equal(reader.read("vector", (2,), (5,)), TENSORS["vector"][2:7])
    again = stored(tmp_path / "c", {"matrix": TENSORS["matrix"]}, random.Random(6))
    with pytest.raises(CheckpointError, match=r"both hold matrix"):
        CheckpointReader(first, again)


# The index -----------------------------------------------------------------------------------------------------------


def test_the_index_survives_its_file(tmp_path: Path) -> None:
    folder = stored(tmp_path / "a", TENSORS, random.Random(7))
    index = read_index(folder)
    assert to_json(index) == (folder / INDEX).read_text()
    assert {key: (value.dtype, value.shape) for key, value in index.items()} == {
        key: (value.dtype, tuple(value.shape)) for key, value in TENSORS.items()
    }


WHOLE = ("w", torch.float32, (4, 2))


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([((0, 0), (3, 2))], "hold 6 of 8 values"),
        ([((0, 0), (3, 2)), ((2, 0), (2, 2))], "hold 10 of 8"),
        ([((0, 0), (2, 2)), ((0, 0), (2, 2))], "overlap"),
        ([((0, 0), (2, 2)), ((1, 0), (2, 2))], "overlap"),
        ([((0, 0), (2, 2)), ((2, 0), (2, 1)), ((1, 1), (2, 1))], "overlap"),
        ([((0, 0), (5, 2))], "outside"),
        ([((0, 1), (4, 2))], "outside"),
        ([((0,), (8,))], "dimensions"),
    ],
)
def test_what_is_not_written_whole_is_noticed(
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], problem: str, tmp_path: Path
) -> None:
    written = [(*WHOLE, Chunk(offsets, sizes, "f.safetensors", 0)) for offsets, sizes in boxes]
    with pytest.raises(AssertionError, match=problem):
        merge(written)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"f.safetensors"', '"../f.safetensors"'),
        ('"f.safetensors"', '"/etc/passwd"'),
        ('"f.safetensors"', '".."'),
        ('"format": 2', '"format": 3'),
        ('"F32"', '"F33"'),
        ("[4,2]", "[4,-2]"),
        ('"shape":[4,2]', '"shape":[4,3]'),
        ("[4,2]", "[true,8]"),
        (",0,0]]", ",1,0]]"),
        (",0,0]]", ",0,-8]]"),
        (",0,0]]", "]]"),
        ('"tensors"', '"tensor"'),
        ("{", "["),
    ],
)
def test_a_wrong_index_is_refused(old: str, new: str, tmp_path: Path) -> None:
    text = to_json(merge([(*WHOLE, Chunk((0, 0), (4, 2), "f.safetensors", 0))]))
    assert old in text
    (tmp_path / INDEX).write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=r"index\.json cannot be used"):
        read_index(tmp_path)
