"""Products of a few rows with a large matrix by XLA alone, made for CPU, where decoding waits for weights.

XLA:CPU turns a bfloat16 matrix into float32 before a product with one row, and a matrix of small numbers before any
product; both are written to memory and read again. Measured on one core of a Zen 5, in 10^9 weights a second, against
7 in float32: bfloat16 3.3 with one row and 6.0 with two; int8 3.5 whole and 6 to 10 in blocks that stay in the cache.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.slices import read_slice

FEW = 16
"""Rows up to which the weights are what takes the time."""
BLOCK = 128
"""Rows of the matrix that become float32 at a time."""


def dot(rows_RC: Float[Array, "R C"], matrix_CO: Array) -> Float[Array, "R O"]:
    """Returns the product, float32.

    Args:
        rows_RC: bfloat16 or float32.
        matrix_CO: in the dtype of the rows, or in smaller numbers: int8, int4, float8.
    """
    (num_rows, depth), width = rows_RC.shape, matrix_CO.shape[1]
    if matrix_CO.dtype.itemsize >= rows_RC.dtype.itemsize:
        padding = int(num_rows == 1 and rows_RC.dtype == jnp.bfloat16)
        rows_RC = jnp.pad(rows_RC, ((0, padding), (0, 0)))
        return jnp.einsum("RC,CO->RO", rows_RC, matrix_CO, preferred_element_type=jnp.float32)[:num_rows]
    if num_rows > FEW or depth % BLOCK:
        return dot(rows_RC, matrix_CO.astype(rows_RC.dtype))

    rows_RC = rows_RC.astype(jnp.float32)

    def add_block(nth, sums_RO):
        at = nth * BLOCK
        block = read_slice(matrix_CO, (at, 0), (BLOCK, width)).astype(jnp.float32)
        return sums_RO + dot(lax.dynamic_slice_in_dim(rows_RC, at, BLOCK, axis=1), block)

    return lax.fori_loop(0, depth // BLOCK, add_block, jnp.zeros((num_rows, width)))
