"""Routed expert matmuls by XLA alone, made for CPU: a loop over the groups that have rows, and over their row blocks.

A group's matrix is sliced once (and dequantised, one group's at a time); its rows go through in big blocks and the
remainder in small ones, so few padding rows are computed. Trip counts are dynamic: an empty group costs nothing, and
its weights are never read. A dynamic loop has no reverse mode, so the gradients are written out, as the same kind of
loop.

Each block of `block` rows reads the group's matrix again (from cache), so blocks are as large as the mean group; the
ideal is every matrix once and every row once. `lax.ragged_dot` is 13 times slower here: XLA:CPU computes every expert
for every row.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import few_rows
from pallas_kernels.grouped_matmul.groups import Groups, local_groups, of_layer
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.slices import from_bits, own_zeros, read_slice, to_bits

Matrices = Float[Array, "e _ _"] | QuantizedArray
Stacked = Float[Array, "*L e _ _"] | QuantizedArray


def block_sizes(num_rows: int, num_groups: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Returns (big, small) rows per block for groups of `num_rows / num_groups` rows on average.

    Within 4..128 for the big block and a quarter of that for the small one: a matmul of 128 rows reaches the speed
    limit of a core, one of 4 rows takes little longer than one of 1, as both wait for the weights.
    """
    big = 2 ** round(math.log2(max(num_rows / num_groups, 4)))
    smallest = _smallest_block(dtype)
    return min(big, 128, num_rows), min(max(big // 4, smallest), 32, num_rows)


def _smallest_block(dtype: jnp.dtype) -> int:
    # A bfloat16 product with one row leaves XLA:CPU's fast path: 13 times slower than with two.
    return 2 if dtype == jnp.bfloat16 else 1


def block_counts(group_sizes_E: Int[Array, " E"], big: int, small: int) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """Returns how many big blocks and then how many small ones each group takes.

    A remainder of more than half a big block takes one more big block instead of several small ones.
    """
    num_big_E = (group_sizes_E + (big - 1) // 2) // big
    rest_E = jnp.maximum(group_sizes_E - num_big_E * big, 0)
    return num_big_E, (rest_E + small - 1) // small


class _Cuts(NamedTuple):
    """Where each group's rows lie and how they are cut into blocks."""

    blocks: tuple[int, int]
    groups: Groups
    num_big_e: Int[Array, " e"]
    num_small_e: Int[Array, " e"]


def _cut(groups: Groups, num_rows: int, dtype: jnp.dtype) -> _Cuts:
    blocks = block_sizes(num_rows, groups.start_e.shape[0], dtype)
    return _Cuts(blocks, groups, *block_counts(groups.end_e - groups.start_e, *blocks))


def _for_each_block(cuts: _Cuts, group: Array, visit: Callable, carry):
    """Runs `carry = visit(carry, block, first, end)` over the group's blocks: rows first..end-1, at most `block`."""
    start, end, (big, small) = cuts.groups.start_e[group], cuts.groups.end_e[group], cuts.blocks
    num_big = cuts.num_big_e[group]
    carry = lax.fori_loop(0, num_big, lambda i, carry: visit(carry, big, start + i * big, end), carry)
    rest = start + num_big * big
    return lax.fori_loop(0, cuts.num_small_e[group], lambda i, carry: visit(carry, small, rest + i * small, end), carry)


def _locate(num_rows: int, block: int, first: Array, end: Array) -> tuple[Array, Array]:
    """Returns where the block starts, and which of its rows are `first..end-1`.

    The last block of the array starts early enough to fit: its leading rows belong to somebody else.
    """
    at = jnp.minimum(first, num_rows - block)
    row = at + jnp.arange(block, dtype=at.dtype)
    return at, ((row >= first) & (row < end))[:, None]


def _own_matrix(matrices: Matrices, group: Array, dtype: jnp.dtype) -> Float[Array, "_ _"]:
    """Returns one group's matrix, to compute with in `dtype`."""

    def read(array):
        return read_slice(array, (group, 0, 0), (1, *array.shape[1:]))

    if isinstance(matrices, QuantizedArray):
        return jax.tree.map(read, matrices).dequantize(dtype)[0]
    return read(matrices)[0]


def _map_blocks(
    compute: Callable[..., list[Array]],
    rows: list[Float[Array, "R _"]],
    matrices: list[Matrices],
    groups: Groups,
    widths: list[int],
) -> list[Float[Array, "R _"]]:
    """Returns `compute(*blocks of rows, *the group's matrices)` for all rows, one array per output width."""
    dtype, num_rows = rows[0].dtype, rows[0].shape[0]
    cuts = _cut(groups, num_rows, dtype)
    has_rows_e = groups.end_e > groups.start_e
    with_rows_e = jnp.argsort(~has_rows_e, stable=True)

    def visit_group(i, outs):
        group = with_rows_e[i]
        own = [_own_matrix(m, group, dtype) for m in matrices]

        def visit_block(outs, block, first, end):
            at, owned = _locate(num_rows, block, first, end)
            results = compute(*[read_slice(array, (at, 0), (block, array.shape[1])) for array in rows], *own)
            written = []
            for out, result in zip(outs, results, strict=True):
                others = lax.dynamic_slice(out, (at, 0), (block, out.shape[1]))
                merged = jnp.where(owned, to_bits(result.astype(dtype)), others)
                written.append(lax.dynamic_update_slice(out, merged, (at, 0)))
            return written

        return _for_each_block(cuts, group, visit_block, outs)

    outs = [to_bits(own_zeros((num_rows, width), dtype, rows[0])) for width in widths]
    outs = lax.fori_loop(0, jnp.sum(has_rows_e), visit_group, outs)
    return [from_bits(out, dtype) for out in outs]


def _outer_products(
    rows_RD: Float[Array, "R D"], others: list[Float[Array, "R F"]], groups: Groups
) -> list[Float[Array, "e D F"]]:
    """Returns the sum over each group's rows of `outer(row, other)`, for each of the others: weight gradients.

    A product is as large as a matrix of weights, so the cost is to write it: one block takes a whole group as a rule,
    and only groups far above the mean add further ones.
    """
    dtype, num_rows, num_groups = rows_RD.dtype, rows_RD.shape[0], groups.start_e.shape[0]
    block = min(math.ceil(5 * num_rows / (32 * num_groups)) * 8, 128, num_rows)

    def visit_group(group, outs):
        start, end = groups.start_e[group], groups.end_e[group]

        def products(first):
            at, owned = _locate(num_rows, block, first, end)

            def read(array):
                return jnp.where(owned, read_slice(array, (at, 0), (block, array.shape[1])), 0)

            block_RD = read(rows_RD)
            return [
                jnp.einsum("RD,RF->DF", block_RD, read(other), preferred_element_type=jnp.float32) for other in others
            ]

        def add_block(i, sums):
            return [total + more for total, more in zip(sums, products(start + i * block), strict=True)]

        num_blocks = (end - start + block - 1) // block
        sums = lax.fori_loop(1, num_blocks, add_block, products(start))
        return [
            lax.dynamic_update_slice(out, to_bits(total.astype(dtype))[None], (group, 0, 0))
            for out, total in zip(outs, sums, strict=True)
        ]

    shapes = [(num_groups, rows_RD.shape[1], other.shape[1]) for other in others]
    outs = [to_bits(own_zeros(shape, dtype, other)) for shape, other in zip(shapes, others, strict=True)]
    return [from_bits(out, dtype) for out in lax.fori_loop(0, num_groups, visit_group, outs)]


def _swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)


@jax.custom_vjp
def _grouped_matmul(rows_RD: Float[Array, "R D"], weights_eDF: Matrices, groups: Groups) -> Float[Array, "R F"]:
    def compute(block_RD, weights_DF):
        return [few_rows.dot(block_RD, weights_DF)]

    (out_RF,) = _map_blocks(compute, [rows_RD], [weights_eDF], groups, [weights_eDF.shape[2]])
    return out_RF


def _grouped_matmul_forward(rows_RD, weights_eDF, groups):
    return _grouped_matmul(rows_RD, weights_eDF, groups), (rows_RD, weights_eDF, groups)


def _grouped_matmul_backward(residuals, d_out_RF):
    rows_RD, weights_eDF, groups = residuals

    def compute(d_out_RF, weights_DF):
        return [few_rows.dot(d_out_RF, weights_DF.T)]

    (d_rows_RD,) = _map_blocks(compute, [d_out_RF], [weights_eDF], groups, [rows_RD.shape[1]])
    if isinstance(weights_eDF, QuantizedArray):
        return d_rows_RD, None, None
    (d_weights_eDF,) = _outer_products(rows_RD, [d_out_RF], groups)
    return d_rows_RD, d_weights_eDF, None


@jax.custom_vjp
def _grouped_swiglu(
    rows_RD: Float[Array, "R D"], gate_eDF: Matrices, up_eDF: Matrices, groups: Groups
) -> Float[Array, "R F"]:
    def compute(block_RD, gate_DF, up_DF):
        return [_swiglu(few_rows.dot(block_RD, gate_DF), few_rows.dot(block_RD, up_DF))]

    (out_RF,) = _map_blocks(compute, [rows_RD], [gate_eDF, up_eDF], groups, [gate_eDF.shape[2]])
    return out_RF


def _grouped_swiglu_forward(rows_RD, gate_eDF, up_eDF, groups):
    def compute(block_RD, gate_DF, up_DF):
        return [few_rows.dot(block_RD, gate_DF), few_rows.dot(block_RD, up_DF)]

    width = gate_eDF.shape[2]
    gate_RF, up_RF = _map_blocks(compute, [rows_RD], [gate_eDF, up_eDF], groups, [width, width])
    out_RF = _swiglu(gate_RF, up_RF).astype(rows_RD.dtype)
    return out_RF, (rows_RD, gate_eDF, up_eDF, groups, gate_RF, up_RF)


def _grouped_swiglu_backward(residuals, d_out_RF):
    rows_RD, gate_eDF, up_eDF, groups, gate_RF, up_RF = residuals
    _, backward = jax.vjp(lambda gate, up: _swiglu(gate, up).astype(d_out_RF.dtype), gate_RF, up_RF)
    d_gate_RF, d_up_RF = backward(d_out_RF)

    def compute(d_gate_RF, d_up_RF, gate_DF, up_DF):
        return [few_rows.dot(d_gate_RF, gate_DF.T) + few_rows.dot(d_up_RF, up_DF.T)]

    (d_rows_RD,) = _map_blocks(compute, [d_gate_RF, d_up_RF], [gate_eDF, up_eDF], groups, [rows_RD.shape[1]])
    if isinstance(gate_eDF, QuantizedArray):
        return d_rows_RD, None, None, None
    d_gate_eDF, d_up_eDF = _outer_products(rows_RD, [d_gate_RF, d_up_RF], groups)
    return d_rows_RD, d_gate_eDF, d_up_eDF, None


_grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)
_grouped_swiglu.defvjp(_grouped_swiglu_forward, _grouped_swiglu_backward)


@jax.jit
def grouped_matmul(
    rows_RD: Float[Array, "R D"],
    weights_eDF: Stacked,
    group_sizes_E: Int[Array, " E"],
    group_offset: int | Int[Array, ""] | None = None,
    layer: int | Int[Array, ""] | None = None,
) -> Float[Array, "R F"]:
    weights_eDF = of_layer(weights_eDF, layer)
    return _grouped_matmul(rows_RD, weights_eDF, local_groups(group_sizes_E, group_offset, weights_eDF.shape[0]))


@jax.jit
def grouped_swiglu(
    rows_RD: Float[Array, "R D"],
    gate_eDF: Stacked,
    up_eDF: Stacked,
    group_sizes_E: Int[Array, " E"],
    group_offset: int | Int[Array, ""] | None = None,
    layer: int | Int[Array, ""] | None = None,
) -> Float[Array, "R F"]:
    gate_eDF, up_eDF = of_layer(gate_eDF, layer), of_layer(up_eDF, layer)
    return _grouped_swiglu(rows_RD, gate_eDF, up_eDF, local_groups(group_sizes_E, group_offset, gate_eDF.shape[0]))
