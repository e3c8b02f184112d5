"""Slices of large arrays inside loops, in forms that XLA:CPU does not turn into copies of the whole array.

XLA:CPU has no bfloat16 data movement: it rewrites slice and update to convert, move float32, convert back. A loop then
converts the whole operand before it starts (weights, caches: twice their memory) or, for an update, in every
iteration. float8 goes through float16 and int4 through int8 in the same way. Seen in the optimised HLO of jax 0.10.2;
float32 and int8 are not affected.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

_CONVERTED = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int4)


def read_slice(array: Array, starts: tuple[Array | int, ...], sizes: tuple[int, ...]) -> Array:
    """Returns `lax.dynamic_slice(array, starts, sizes)`; inside a loop only the slice is converted."""
    if array.dtype in _CONVERTED:
        # The barrier ties the array to the loop's index, so its conversion is not hoisted out of the loop.
        array, starts = lax.optimization_barrier((array, tuple(starts)))
    return lax.dynamic_slice(array, starts, sizes)


def to_bits(array: Array) -> Array:
    """Returns bfloat16 as uint16 with the same bits, for a buffer that a loop updates in place; others unchanged."""
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


def from_bits(array: Array, dtype: jnp.dtype) -> Array:
    """Returns the inverse of `to_bits`."""
    return lax.bitcast_convert_type(array, dtype) if array.dtype != dtype else array


def own_zeros(shape: tuple[int, ...], dtype: jnp.dtype, owner: Array) -> Array:
    """Returns zeros that no other loop starts from: XLA would make one such array and copy it for each of them.

    Args:
        owner: any array that only this loop reads; nothing is read from it.
    """
    zero, _ = lax.optimization_barrier((jnp.zeros((), dtype), owner))
    return jnp.broadcast_to(zero, shape)
