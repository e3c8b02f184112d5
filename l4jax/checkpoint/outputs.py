"""How a conversion writes one parameter: as one array, or in few bits as the two arrays of a `QuantizedArray`.

Quantised box by box, each with the contracted axes whole, so that every block of a scale is in one box: the numbers are
those that `model.quant.quantize_model` makes of the whole. What the source has in these few bits keeps them.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import tensorstore as ts

from l4jax.checkpoint import zarr
from l4jax.checkpoint.lazy import Index, LazyArray, contiguous, read_scaled

if TYPE_CHECKING:
    from l4jax.config import Llama4Config

QUANTIZE = ("int8", "int4", "fp8")
"""Names of `l4jax.model.quant.SCHEMES`, here without jax."""


class Output(Protocol):
    """One parameter and how it is written."""

    @property
    def array(self) -> LazyArray:
        """The parameter in the source."""
        ...

    @property
    def bytes_per_value(self) -> float:
        """What a number takes on disk, at most."""
        ...

    def create(self, params: Path, path: str) -> tuple[tuple[int, ...], dict[str, ts.TensorStore]]:
        """Creates the arrays; returns the shape of the boxes to be written one by one, and the arrays by name."""
        ...

    def read(self, box: Index) -> list[tuple[Index, np.ndarray]]:
        """Returns for each of the arrays the place and the content of a box of the parameter."""
        ...


@dataclass(frozen=True)
class Plain:
    """One array of `dtype`."""

    array: LazyArray
    dtype: np.dtype

    @property
    def bytes_per_value(self) -> float:
        return self.dtype.itemsize

    def create(self, params: Path, path: str) -> tuple[tuple[int, ...], dict[str, ts.TensorStore]]:
        piece = zarr.source_friendly_piece(path, self.array.shape, self.dtype.itemsize)
        return piece, {path: zarr.create_array(params, path, self.array.shape, self.dtype, piece)}

    def read(self, box: Index) -> list[tuple[Index, np.ndarray]]:
        return [(box, self.array.read(box))]


@dataclass(frozen=True)
class Quantized:
    """`PATH.values` and `PATH.scales`."""

    array: LazyArray
    few_bits: Callable[[Index], tuple[np.ndarray, np.ndarray]]
    """Makes values and scales of a box."""
    axes: tuple[int, ...]
    """Contracted: a box has them whole."""
    dtype: np.dtype
    """Of the values."""
    scales_shape: tuple[int, ...]

    @property
    def bytes_per_value(self) -> float:
        return (0.55 if self.dtype.name == "int4" else 1) + 0.04  # int4 is compressed; scales: 4 bytes for 128 values

    def create(self, params: Path, path: str) -> tuple[tuple[int, ...], dict[str, ts.TensorStore]]:
        shape = self.array.shape
        piece = zarr.piece_along_outputs(shape, 4, self.axes)  # computed in float32, whatever the source
        assert all(piece[axis] == shape[axis] for axis in self.axes), (path, piece, shape)
        scales_piece = tuple(min(size, number) for size, number in zip(piece, self.scales_shape, strict=True))
        scales = zarr.create_array(params, f"{path}.scales", self.scales_shape, np.dtype(np.float32), scales_piece)
        values = zarr.create_array(params, f"{path}.values", shape, self.dtype, piece)
        return piece, {f"{path}.values": values, f"{path}.scales": scales}

    def read(self, box: Index) -> list[tuple[Index, np.ndarray]]:
        values, scales = self.few_bits(box)
        place = tuple(slice(0, self.scales_shape[axis]) if axis in self.axes else part for axis, part in enumerate(box))
        return [(box, values), (place, scales)]


def outputs(
    config: "Llama4Config", arrays: Mapping[str, LazyArray], dtype: np.dtype | None, scheme: str | None
) -> dict[str, Output]:
    """Returns how each parameter is written.

    Args:
        arrays: the source, by stacked path.
        dtype: of what is not quantised; None keeps that of the source.
        scheme: one of QUANTIZE, None for no quantisation.
    """
    found: dict[str, Output] = {path: Plain(array, dtype or array.dtype) for path, array in arrays.items()}
    if scheme is None:
        return found
    import jax  # here, as nothing else in a conversion needs it

    from l4jax.model import quant
    from l4jax.model.params import abstract_model

    for one in quant.quantizable(abstract_model(config, scan_layers=True)):
        array = arrays[one.path]
        quantize = quant.quantizer(one, scheme)
        made = jax.eval_shape(quantize, jax.ShapeDtypeStruct(array.shape, array.dtype))
        few = np.dtype(made.values.dtype)
        few_bits = functools.partial(_few_bits, array, quantize, few, one.axes)
        found[one.path] = Quantized(array, few_bits, one.axes, few, made.scales.shape)
    return found


def _few_bits(
    array: LazyArray, quantize: Callable, dtype: np.dtype, axes: tuple[int, ...], box: Index
) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and scales of a box: those of the source if it has them, else new ones."""
    if (kept := read_scaled(array, box, dtype, axes)) is not None:
        return kept
    quantized = quantize(contiguous(array.read(box)))
    return np.asarray(quantized.values), np.asarray(quantized.scales)


def bytes_needed(written: Mapping[str, Output]) -> int:
    """Returns what the arrays take on disk, at most."""
    return math.ceil(sum(math.prod(output.array.shape) * output.bytes_per_value for output in written.values()))
