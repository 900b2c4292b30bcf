"""How the tensors of one weight are split over tensor ranks, one class per kind.

A rule answers one question: where in the Hugging Face tensors do the values lie that a tensor rank holds? The answer
is a list of boxes. Import, export, checkpoints of any layout and the shards of the distributed optimizer all read it,
so there is one description for every direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """Values that lie in a box of one Hugging Face tensor, and in a run of a rank's own, flattened tensor.

    part: number of the Hugging Face tensor among those of the weight.
    offsets, sizes: the box in it.
    start, dims: where the run starts, and the dimensions it is seen with.
    pick: (dimension, index) that takes this part's values out of a run that holds several parts.
    """

    part: int
    offsets: Shape
    sizes: Shape
    start: int
    dims: Shape
    pick: tuple[int, int] | None = None

    def view(self, flat: Tensor) -> Tensor:
        """The values in a flattened tensor of the rank. Not always contiguous, nor of shape `sizes`."""
        run = flat[self.start : self.start + math.prod(self.dims)].view(self.dims)
        return run if self.pick is None else run.select(*self.pick)


@dataclass(frozen=True)
class Geometry:
    """A rank's tensor in C order: `dims`, one of which may count the Hugging Face tensors (`part_dim`).

    The others are the dimensions of a Hugging Face tensor, from `origin` on; with `merged`, the first two of them
    (head, row of the head) together are its first.
    """

    dims: Shape
    origin: Shape
    part_dim: int | None = None
    merged: bool = False

    def boxes(self, hf_shape: Shape, start: int, stop: int) -> Iterator[Box]:
        """The boxes of the values `start` to `stop` of the flattened tensor. Padding rows are left out."""
        for first, offsets, sizes in runs(self.dims, start, stop):
            parts = range(1) if self.part_dim is None else range(sizes[self.part_dim])
            for part in parts:
                box = self._box(hf_shape, first, offsets, sizes, part)
                if min(box.sizes, default=1) > 0:
                    yield box

    def _box(self, hf_shape: Shape, first: int, offsets: Shape, sizes: Shape, part: int) -> Box:
        number, pick, run = 0, None, sizes
        if self.part_dim is not None:
            pick, number = (self.part_dim, part), offsets[self.part_dim] + part
        theirs = [(a, b) for dim, (a, b) in enumerate(zip(offsets, sizes, strict=True)) if dim != self.part_dim]
        if self.merged:  # a run over several heads covers all rows of each
            (head, heads), (row, rows), *rest = theirs
            width = _without(self.dims, self.part_dim)[1]
            theirs = [(head * width + row, heads * rows), *rest]
        offsets = tuple(a + b for a, (b, _) in zip(self.origin, theirs, strict=True))
        sizes = tuple(size for _, size in theirs)
        if sizes and offsets[0] + sizes[0] > hf_shape[0]:  # padding of the vocabulary
            sizes = (max(0, hf_shape[0] - offsets[0]), *sizes[1:])
            run = sizes
        return Box(number, offsets, sizes, first, run, pick)


def _without(shape: Sequence[int], dim: int | None) -> Shape:
    return tuple(size for place, size in enumerate(shape) if place != dim)


def runs(dims: Shape, start: int, stop: int) -> Iterator[tuple[int, Shape, Shape]]:
    """Cut the values `start` to `stop` of a C-ordered array into boxes: at most 2 n - 1 for n dimensions.

    Yields:
        (place of the box's first value in the flattened array, offsets, sizes). Each is one run of the flattened
        array: only one dimension is cut, those before it have size 1, and those behind it are whole.
    """
    if start >= stop:
        return
    if not dims:
        yield 0, (), ()
        return
    inner = math.prod(dims[1:])
    first, last = -(-start // inner), stop // inner  # whole rows
    if first > last:  # inside one row
        yield from _in_row(dims, last, start, stop)
        return
    if start % inner:
        yield from _in_row(dims, first - 1, start, first * inner)
    if last > first:
        yield first * inner, (first, *(0 for _ in dims[1:])), (last - first, *dims[1:])
    if stop % inner:
        yield from _in_row(dims, last, last * inner, stop)


def _in_row(dims: Shape, row: int, start: int, stop: int) -> Iterator[tuple[int, Shape, Shape]]:
    base = row * math.prod(dims[1:])
    for place, offsets, sizes in runs(dims[1:], start - base, stop - base):
        yield base + place, (row, *offsets), (1, *sizes)


# The rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replicated:
    """Every rank holds all of it."""

    def geometry(self, hf_shape: Shape, rank: int, size: int) -> Geometry:
        return Geometry(hf_shape, _zeros(hf_shape))


@dataclass(frozen=True)
class Split:
    """Split along one dimension: 0 for column-parallel weights, 1 for row-parallel ones."""

    dim: int

    def geometry(self, hf_shape: Shape, rank: int, size: int) -> Geometry:
        dims, origin = list(hf_shape), list(_zeros(hf_shape))
        dims[self.dim] //= size
        origin[self.dim] = rank * dims[self.dim]
        return Geometry(tuple(dims), tuple(origin))


@dataclass(frozen=True)
class Fused:
    """Several column-parallel weights one behind the other on each rank (gate and up; key and value)."""

    parts: int = 2

    def geometry(self, hf_shape: Shape, rank: int, size: int) -> Geometry:
        rows = hf_shape[0] // size
        return Geometry((self.parts, rows, *hf_shape[1:]), (rank * rows, *_zeros(hf_shape[1:])), part_dim=0)


@dataclass(frozen=True)
class HeadsInterleaved:
    """Query, key and value of each head next to each other, as megatron-core's linear_qkv holds them.

    `split=False`: interleaved, but whole on every rank (the vision tower).
    """

    heads: int
    split: bool = True

    def geometry(self, hf_shape: Shape, rank: int, size: int) -> Geometry:
        width, shares = hf_shape[0] // self.heads, size if self.split else 1
        heads = self.heads // shares
        first = rank * heads * width if self.split else 0
        dims = (heads, 3, width, *hf_shape[1:])
        return Geometry(dims, (first, *_zeros(hf_shape[1:])), part_dim=1, merged=True)


@dataclass(frozen=True)
class Vocabulary:
    """Rows split over ranks after padding with zeros to a multiple of their number."""

    def geometry(self, hf_shape: Shape, rank: int, size: int) -> Geometry:
        share = -(-hf_shape[0] // size)
        return Geometry((share, *hf_shape[1:]), (rank * share, *_zeros(hf_shape[1:])))


def _zeros(shape: Sequence[int]) -> Shape:
    return (0,) * len(shape)


Rule = Replicated | Split | Fused | HeadsInterleaved | Vocabulary


def is_split(rule: Rule) -> bool:
    """Whether tensor ranks hold different values."""
    return not isinstance(rule, Replicated) and getattr(rule, "split", True)
