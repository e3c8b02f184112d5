"""Arrays kept as small numbers and float32 scales: `array = values * scales`, one scale per block.

The scheme of the published Llama 4 checkpoints: symmetric, a block runs along the contracted axis, either the whole of
it (one scale per output channel: FP8) or groups of 128 (int4).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

DTYPES = (jnp.int8, jnp.int4, jnp.float8_e4m3fn)
"""What `quantize` makes and kernels take."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """`values * scales`, where a scale covers a block of values; a pytree of these two.

    Leading axes may be stacked, scanned, sliced and sharded like those of any tree of arrays: they have equal sizes
    in both. Fields are untyped because trees also hold specs, shardings and shapes in place of arrays.

    Attributes:
        values: int8, int4 or float8_e4m3fn, in the shape of the array.
        scales: float32, of as many axes. Each of its sizes divides that of the values: equal on axes with a scale per
            index, 1 on an axis with one scale, in between where a scale covers a group. Of weights [E, D, F],
            contracted over D, scales are [E, G, F] with G = 1 or D / group size.
    """

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype in memory; `dequantize` takes the one to compute in."""
        return self.values.dtype

    def dequantize(self, dtype: DTypeLike) -> Array:
        """Returns the array; products are made in float32 and rounded once, to `dtype`."""
        blocks = _in_blocks(self.values, self.scales.shape).astype(jnp.float32)
        return (blocks * _in_blocks(self.scales, self.scales.shape)).astype(dtype).reshape(self.shape)


def quantize(
    array: Float[Array, "..."], dtype: DTypeLike, axis: int | tuple[int, ...], group_size: int | None = None
) -> QuantizedArray:
    """Returns the array in `dtype`, each block scaled so that its largest magnitude takes the largest value.

    Args:
        array: weights, of any number of axes.
        dtype: one of `DTYPES`.
        axis: the contracted axis or axes: a block spans them.
        group_size: numbers per block along the (single) axis; None means all.

    Raises:
        ValueError: no such dtype, or groups do not divide the axis.
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"cannot quantize to {jnp.dtype(dtype)}; choose one of {', '.join(d.__name__ for d in DTYPES)}"
        )
    axes = [a % array.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
    if group_size is not None and (len(axes) > 1 or array.shape[axes[0]] % group_size):
        raise ValueError(f"groups of {group_size} do not divide axis {axis} of an array of shape {array.shape}")
    num_blocks = [
        size if index not in axes else 1 if group_size is None else size // group_size
        for index, size in enumerate(array.shape)
    ]
    blocks = _in_blocks(array.astype(jnp.float32), num_blocks)
    largest_value = float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)
    scales = jnp.max(jnp.abs(blocks), axis=range(1, 2 * array.ndim, 2), keepdims=True) / largest_value
    scales = jnp.where(scales == 0, 1.0, scales)
    values = blocks / scales
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return QuantizedArray(values.astype(dtype).reshape(array.shape), scales.reshape(num_blocks))


def _in_blocks(array: Array, num_blocks: Sequence[int]) -> Array:
    """Returns the array with each axis split in two: blocks, and numbers in a block."""
    pairs = ((count, size // count) for count, size in zip(num_blocks, array.shape, strict=True))
    return array.reshape([size for pair in pairs for size in pair])
