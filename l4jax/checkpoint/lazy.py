"""Arrays that are read by slices: the common currency of readers, writers and restores.

A checkpoint is larger than memory, so nothing here is ever read whole unless asked for. Every array has `shape`,
`dtype` and `read(index)`, where `index` is one slice with plain bounds per dimension. Numpy only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Index = tuple[slice, ...]
TILE = 128
"""Rows and columns of a tile in transposing."""


class LazyArray(Protocol):
    """Something with a shape and a dtype that hands out boxes of itself."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, index: Index) -> np.ndarray:
        """Returns the box `index`; it may be a view of the file."""
        ...


def everything(shape: Sequence[int]) -> Index:
    """Returns the index of a whole array."""
    return tuple(slice(0, size) for size in shape)


def number_of_bytes(array: LazyArray) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A numpy array, as a rule a strided view of a mapped file."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, index: Index) -> np.ndarray:
        return self.array[index]


@dataclass(frozen=True)
class Scaled:
    """Values of 8 bits times their scales, as `dtype`. The product is made in float32."""

    values: np.ndarray
    scales: np.ndarray
    """Broadcastable to `values`."""
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self, index: Index) -> np.ndarray:
        scales = np.broadcast_to(self.scales, self.values.shape)[index]
        product = self.values[index].astype(np.float32) * scales.astype(np.float32)
        return product.astype(self.dtype)


@dataclass(frozen=True)
class Joined:
    """Parts one after the other along `axis`."""

    parts: tuple[LazyArray, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, index: Index) -> np.ndarray:
        return concatenate([part.read(box) for part, box in self.parts_of(index)], self.axis)

    def parts_of(self, index: Index) -> Iterator[tuple[LazyArray, Index]]:
        """Yields the parts that the box touches, each with the box in it."""
        wanted, start = index[self.axis], 0
        for part in self.parts:
            size = part.shape[self.axis]
            low, high = max(wanted.start - start, 0), min(wanted.stop - start, size)
            if low < high:
                yield part, (*index[: self.axis], slice(low, high), *index[self.axis + 1 :])
            start += size


@dataclass(frozen=True)
class Stacked:
    """Parts of one shape under a new leading axis: layers of a cycle, experts of a layer."""

    parts: tuple[LazyArray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, index: Index) -> np.ndarray:
        return concatenate([part.read(index[1:])[None] for part in self.parts[index[0]]], 0)


@dataclass(frozen=True)
class Picked:
    """Entry `position` of the leading axis of another array: one layer of a stack."""

    stack: LazyArray
    position: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.stack.dtype

    def read(self, index: Index) -> np.ndarray:
        return self.stack.read((slice(self.position, self.position + 1), *index))[0]


def read_scaled(
    array: LazyArray, index: Index, dtype: np.dtype, axes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Reads values and scales of a box that is stored so; None if it is not.

    Args:
        dtype: of the values.
        axes: along which one scale must serve; scales are 1 there, and elsewhere as wide as the box.
    """
    match array:
        case Scaled():
            scales = np.broadcast_to(array.scales, array.shape)
            if array.values.dtype != dtype or any(scales.strides[axis] and scales.shape[axis] > 1 for axis in axes):
                return None
            one = tuple(slice(0, 1) if axis in axes else part for axis, part in enumerate(index))
            return array.values[index], scales[one].astype(np.float32)
        case Stacked():
            inner, joint = [axis - 1 for axis in axes], 0
            pieces = [read_scaled(part, index[1:], dtype, inner) for part in array.parts[index[0]]]
            pieces = [piece and (piece[0][None], piece[1][None]) for piece in pieces]
        case Joined() if array.axis not in axes:
            joint = array.axis
            pieces = [read_scaled(part, box, dtype, axes) for part, box in array.parts_of(index)]
        case _:
            return None
    if None in pieces:
        return None
    values, scales = zip(*pieces, strict=True)
    return concatenate(values, joint), concatenate(scales, joint)


def read_into(array: LazyArray, index: Index, target: np.ndarray) -> None:
    """Reads the box `index` into an array of its shape and any float dtype, which may be strided."""
    in_order = list(target.strides) == sorted(target.strides, reverse=True)
    if in_order and hasattr(array, "read_into"):
        # Stored arrays do it chunk by chunk, without a copy of the box. What is transposed numpy does faster.
        array.read_into(index, target)
        return
    values = array.read(index)
    values = values if values.dtype == target.dtype else values.astype(target.dtype)
    # Numpy copies bfloat16 item by item, its bits at full speed; and transposes twice as fast what fits the cache.
    target, values = (array.view(bits_dtype(target.dtype)) for array in (target, values))
    tile, fastest = list(target.shape), {int(np.argmin(array.strides)) for array in (target, values)}
    if len(fastest) == 2:
        for axis in fastest:
            tile[axis] = min(tile[axis], TILE)
    for box in boxes(target.shape, tile):
        target[box] = values[box]


def concatenate(pieces: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """`np.concatenate` that moves bits. Numpy copies bfloat16 and float8 item by item, many times slower."""
    if len(pieces) == 1:
        return pieces[0]
    dtype, bits = pieces[0].dtype, bits_dtype(pieces[0].dtype)
    return np.concatenate([piece.view(bits) for piece in pieces], axis).view(dtype)


def contiguous(array: np.ndarray) -> np.ndarray:
    """`np.ascontiguousarray` that moves bits, like `concatenate`."""
    return np.ascontiguousarray(array.view(bits_dtype(array.dtype))).view(array.dtype).reshape(array.shape)


def bits_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}") if dtype.itemsize <= 8 else dtype


def boxes(shape: Sequence[int], box_shape: Sequence[int]) -> Iterator[Index]:
    """Yields the boxes of a grid over `shape`, last axis fastest; those at the far edges may be smaller."""
    counts = [math.ceil(size / box) for size, box in zip(shape, box_shape, strict=True)]
    for position in np.ndindex(*counts):
        yield tuple(
            slice(i * box, min((i + 1) * box, size)) for i, size, box in zip(position, shape, box_shape, strict=True)
        )
