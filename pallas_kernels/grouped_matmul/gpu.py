"""Routed expert matmuls on GPU: two Triton kernels, rows times weights (`multiply`) and outer products
(`outer_products`), which is the gradient to the weights.

`multiply` is the forward pass and, with the weights contracted along F, the gradient to the rows.

- Tiled: rows into blocks of 128 (16 to 64 where groups are small), each of one group; columns of the result by up to
  256; the contracted axis by 64 or more. Every group begins a block of its own: products are 1.12 times the least for
  8192 rows of 16 experts, 1.45 times for 128 experts.
- A program finds its group by itself, from prefix sums over the group sizes: XLA prepares no list. Blocks of rows that
  belong to nobody write zeros and read nothing.
- The grid: 16 blocks of rows change fastest, then tiles of columns. Programs that run at the same time so read the same
  weights, and their rows stay in the L2 cache.
- In registers: float32 sums. In shared memory: a pipeline of steps along the contracted axis.
- Bytes: in decoding, 1.02 to 1.13 times the least: the weights of groups with rows, once. In prefill programs load 6
  times the least, most of it from the L2 cache.
- Quantised weights of groups with few rows move as they are stored, and become the rows' dtype inside. One scale for a
  column multiplies the sums, scales for groups the products of a step. Of int4 four neighbours share a word: each place
  in the words is a product of its own, and the results are put in order at the end. With more rows, and in gradients,
  XLA makes them wide first: inside, every block of rows would do that again (an H200 took 10.7 ms for SwiGLU of 8192
  rows in int4, 4.4 in int8, where 2.7 are for bfloat16).

`outer_products`: a program sums a tile [128, 256] of the gradient of one group, while that group's rows pass by.

On an H200, 8192 rows of Scout's 16 experts in bfloat16: down 570 TFLOP/s, gate and up 513, the gradient to the rows
530, to the weights 450. Decoding, gate and up: 64 rows 0.59 ms (4.5 of 4.8 TB/s), one row 0.05 ms (3.5 TB/s); in int8
0.41 and 0.055 ms (3.3 and 1.5 TB/s), in int4 0.23 and 0.064 ms (3.1 and 0.7 TB/s): one row in few bits has too few
programs.

Why not `lax.ragged_dot`: XLA compiles it for GPUs (jax 0.10.2, default flags; read in the optimised HLO) as one dense
product of rows that are repeated for each of E groups and are zero in all but their own: E times the multiplications,
and a copy of the rows E times as large.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from pallas_kernels.dispatch import target
from pallas_kernels.gpu import (
    INT4_PER_WORD,
    Span,
    card,
    dot,
    load,
    power_of_two,
    refuse_platform,
    refuse_size,
    store,
    unpack_int4,
    widen,
)
from pallas_kernels.grouped_matmul import gradients, tiles
from pallas_kernels.grouped_matmul.gradients import Kernels, Stack
from pallas_kernels.grouped_matmul.groups import of_layer
from pallas_kernels.quantized import QuantizedArray


class Groups(NamedTuple):
    """The rows of all groups, and which of them is the first whose matrix is held here."""

    sizes_E: Int[Array, " E"]
    offset: Int[Array, " 1"]


class Block(NamedTuple):
    """Rows that one program computes.

    Attributes:
        group: which of the matrices that are held here they take; outside of 0..e-1: none, the result is zero.
        first: first row.
        end: end of the group, maybe beyond the block; at most `first` where there is nothing to do.
    """

    group: Array
    first: Array
    end: Array


def most_blocks(num_rows: int, num_groups: int, size: int) -> int:
    """Returns how many blocks of rows there are at most, however the rows are spread over the groups."""
    nonempty = min(num_rows, num_groups + 1)  # rows after the last group are one more
    return (num_rows + nonempty * (size - 1)) // size


def _group_sizes(sizes_ref, num_rows: int) -> tuple[Array, Array]:
    """Returns the rows of each group and, as one more group, those after the last; and where each of them ends."""
    num_groups = sizes_ref.shape[0]
    index = jnp.arange(power_of_two(num_groups + 1))
    sizes = load(sizes_ref, Span(0, len(index), index < num_groups))
    sizes = jnp.where(index == num_groups, num_rows - jnp.sum(sizes), sizes)
    return sizes, jnp.cumsum(sizes)


def locate_block(nth: Array, sizes_ref, offset_ref, num_rows: int, size: int) -> Block:
    """Returns the nth block of `size` rows, in a kernel: every group begins one, and rows of nobody have theirs."""
    sizes, ends = _group_sizes(sizes_ref, num_rows)
    blocks = lax.div(sizes + (size - 1), size)
    last = jnp.cumsum(blocks)
    before = last - blocks
    own = (before <= nth) & (nth < last)

    def pick(numbers):
        return jnp.sum(jnp.where(own, numbers, 0))

    group = pick(jnp.arange(len(sizes)))
    return Block(group - offset_ref[0], pick(ends - sizes + (nth - before) * size), pick(ends))


def _read(weight, matrix: Array, rows: Span, words: Span, dtype, interpret: bool) -> list[Array]:
    """Returns a tile of a matrix in a dtype to multiply in, without scales: of int4, four neighbouring columns of which
    share a word, the columns of each place in the words.
    """
    if not isinstance(weight, QuantizedArray):
        return [load(weight, matrix, rows, words)]
    values = load(weight.values, matrix, rows, words)
    return unpack_int4(values, dtype, interpret) if values.dtype == jnp.int16 else [widen(values, dtype, interpret)]


def _interleaved(parts: Sequence[Array]) -> Array:
    """Returns [n, m] arrays as one [n, m * len(parts)], their columns in turn."""

    def stack(parts):
        return parts[0] if len(parts) == 1 else jnp.stack([stack(parts[0::2]), stack(parts[1::2])], -1)

    return stack(parts).reshape(parts[0].shape[0], -1)


def multiply(
    rows: list[Array],
    weights: list[Array | QuantizedArray],
    groups: Groups,
    num_local: int,
    finish: Callable[..., list[Array]],
    transposed: bool = False,
    num_results: int = 1,
    first_matrix: int | Int[Array, ""] = 0,
    interpret: bool = False,
) -> Sequence[Array]:
    """Returns `finish(*products)` of every row with its group's weights; rows of no group give zeros.

    Args:
        rows: [R, depth]; one array for all weights, or one for each.
        weights: [m, depth, width], or [m, width, depth] if transposed.
        groups: all of them.
        num_local: of how many groups the matrices are held here.
        finish: takes float32 products, one per weight, to a list of results; element-wise.
        transposed: see weights.
        num_results: length of that list.
        first_matrix: which of the m matrices is that of the first group that is held here.
    """
    (num_rows, depth), dtype = rows[0].shape, rows[0].dtype
    if isinstance(weights[0], QuantizedArray) and (
        transposed or num_rows > tiles.GPU_FEW_ROWS * groups.sizes_E.shape[0]
    ):
        # Behind what the rows wait for, or XLA would do it for several layers at once, and keep them all.
        rows, weights = lax.optimization_barrier((rows, weights))
        weights, first_matrix = [_wide(weight, first_matrix, num_local, dtype) for weight in weights], 0
    width = weights[0].shape[1 if transposed else 2]
    num_scales = weights[0].scales.shape[1] if isinstance(weights[0], QuantizedArray) else 0
    rows_per_scale = weights[0].shape[1] // max(num_scales, 1)
    parts = INT4_PER_WORD if tiles.bits(weights[0].dtype) == 4 else 1
    t = row_tiles_for(rows, weights, groups.sizes_E.shape[0], transposed)
    num_blocks = most_blocks(num_rows, groups.sizes_E.shape[0], t.rows)
    together = min(t.together, num_blocks)

    def grouped_rows_times_weights(groups, first_matrix, rows, weights, *results):
        nth = pl.program_id(2) * together + pl.program_id(0)
        group, first, end = locate_block(nth, groups.sizes_E, groups.offset, num_rows, t.rows)
        block = Span(first, t.rows, first + jnp.arange(t.rows) < end)
        col = pl.program_id(1)
        cols, words = Span.block(col, t.cols, width), Span.block(col, t.cols // parts, width // parts)
        held, matrix = (group >= 0) & (group < num_local), first_matrix[0] + group

        def write(values):
            for result, value in zip(results, values, strict=True):
                store(result, value, block, cols)

        def scaled(products, weight, nth):
            return [x * load(weight.scales, matrix, nth, words, part) for part, x in enumerate(products)]

        def add_products(step, sums):
            numbers = Span.block(step, t.depth, depth)
            blocks = [load(x, block, numbers) for x in rows] * (len(weights) // len(rows))
            place = (words, numbers) if transposed else (numbers, words)

            def add(totals, x, weight):
                values = _read(weight, matrix, *place, dtype, interpret)
                products = [dot(x, part, (1, int(transposed)), interpret) for part in values]
                if num_scales > 1:
                    products = scaled(products, weight, numbers.start // rows_per_scale)
                return [total + product for total, product in zip(totals, products, strict=True)]

            return [add(*each) for each in zip(sums, blocks, weights, strict=True)]

        @pl.when(held & (first < end))
        def _():
            zeros = [[jnp.zeros((t.rows, t.cols // parts), jnp.float32)] * parts for _ in weights]
            sums = lax.fori_loop(0, pl.cdiv(depth, t.depth), add_products, zeros)
            if num_scales == 1:  # one for each column: it multiplies the sums
                sums = [scaled(totals, weight, 0) for totals, weight in zip(sums, weights, strict=True)]
            finished = [finish(*products) for products in zip(*sums, strict=True)]
            write([_interleaved(values) for values in zip(*finished, strict=True)])

        @pl.when(~held & (first < end))
        def _():
            write([jnp.zeros((t.rows, t.cols), dtype)] * num_results)

    return pl.pallas_call(
        grouped_rows_times_weights,
        # Blocks of rows change fastest: those of one group read the same weights at the same time.
        grid=(together, pl.cdiv(width, t.cols), pl.cdiv(num_blocks, together)),
        out_shape=[jax.ShapeDtypeStruct((num_rows, width), dtype)] * num_results,
        compiler_params=plgpu.CompilerParams(num_warps=t.num_warps, num_stages=t.num_stages),
        interpret=interpret,
        name="grouped_rows_times_weights",
    )(
        groups,
        jnp.asarray(first_matrix, jnp.int32).reshape(1),
        rows,
        [_packed(weight, parts) for weight in weights],
    )


def row_tiles_for(rows, weights, num_groups: int, transposed: bool) -> tiles.GpuRowTiles:
    """Returns the tiles of `multiply` for these operands."""
    (num_rows, depth), (first, *_) = rows[0].shape, weights
    most_depth = 256
    if isinstance(first, QuantizedArray) and first.scales.shape[1] > 1:
        # The rows of a tile of weights lie in one group: the largest power of two that divides its size.
        group_size = first.shape[1] // first.scales.shape[1]
        most_depth = group_size & -group_size
    return tiles.gpu_row_tiles(
        num_rows, num_groups, first.shape[1 if transposed else 2], depth, (len(rows), len(weights)),
        rows[0].dtype.itemsize, tiles.bits(first.dtype), most_depth,
    )  # fmt: skip


def _wide(weight: QuantizedArray, first: int | Int[Array, ""], count: int, dtype) -> Array:
    """Returns some of the matrices in the dtype of the rows."""
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, count), weight).dequantize(dtype)


def _packed(weight: Array | QuantizedArray, parts: int) -> Array | QuantizedArray:
    """Returns int4 as int16, four neighbouring columns in each: that is how a GPU holds them, so nothing moves. Scales
    [m, G, F] are [m, G, F / parts, parts]."""
    if not isinstance(weight, QuantizedArray):
        return weight
    values, scales = (leaf.reshape(*leaf.shape[:2], -1, parts) for leaf in (weight.values, weight.scales))
    return QuantizedArray(weight.values if parts == 1 else lax.bitcast_convert_type(values, jnp.int16), scales)


def outer_products(rows_RD: Array, others_RF: Array, groups: Groups, num_local: int, interpret: bool = False) -> Array:
    """Returns the sum over each group's rows of `outer(row, other)`, [e, D, F]; zeros for groups without rows."""
    (num_rows, depth), width, dtype = rows_RD.shape, others_RF.shape[1], rows_RD.dtype
    t = tiles.gpu_outer_tiles(dtype.itemsize)

    def grouped_outer_products(groups, rows, others, result):
        local = pl.program_id(2)
        sizes, ends = _group_sizes(groups.sizes_E, num_rows)
        own = jnp.arange(len(sizes)) == local + groups.offset[0]
        start, end = (jnp.sum(jnp.where(own, row, 0)) for row in (ends - sizes, ends))
        numbers, cols = Span.block(pl.program_id(0), t.depth, depth), Span.block(pl.program_id(1), t.cols, width)

        def add_block(step, product):
            first = start + step * t.rows
            block = Span(first, t.rows, first + jnp.arange(t.rows) < end)
            return product + dot(load(rows, block, numbers), load(others, block, cols), (0, 0), interpret)

        zeros = jnp.zeros((t.depth, t.cols), jnp.float32)
        product = lax.fori_loop(0, lax.div(end - start + (t.rows - 1), t.rows), add_block, zeros)
        store(result, product, local, numbers, cols)

    return pl.pallas_call(
        grouped_outer_products,
        grid=(pl.cdiv(depth, t.depth), pl.cdiv(width, t.cols), num_local),
        out_shape=jax.ShapeDtypeStruct((num_local, depth, width), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=t.num_warps, num_stages=t.num_stages),
        interpret=interpret,
        name="grouped_outer_products",
    )(groups, rows_RD, others_RF)


def _stack(weights: Array | QuantizedArray, layer: int | Int[Array, ""] | None) -> Stack:
    """Returns the weights where they lie, or a copy of the layer where Triton cannot address all of them."""
    whole = Stack.of(weights, layer)
    if layer is None or _refuse_size(whole.weights_mDF) is None:
        return whole
    return Stack.of(of_layer(weights, layer), None)


def _call(group_sizes_E, group_offset, num_local: int, interpret: bool) -> tuple[Groups, Kernels]:
    offset = jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
    static = dict(num_local=num_local, interpret=interpret)
    kernels = Kernels(functools.partial(multiply, **static), functools.partial(outer_products, **static))
    return Groups(group_sizes_E.astype(jnp.int32), offset.reshape(1)), kernels


@functools.partial(jax.jit, static_argnames="interpret")
def grouped_matmul(rows_RD, weights, group_sizes_E, group_offset=None, layer=None, interpret=False):
    stack = _stack(weights, layer)
    groups, kernels = _call(group_sizes_E, group_offset, stack.num_local, interpret)
    return gradients.grouped_matmul(rows_RD, stack.weights_mDF, groups, stack.first, kernels)


@functools.partial(jax.jit, static_argnames="interpret")
def grouped_swiglu(rows_RD, gate, up, group_sizes_E, group_offset=None, layer=None, interpret=False):
    stack, ups_mDF = _stack(gate, layer), _stack(up, layer).weights_mDF
    groups, kernels = _call(group_sizes_E, group_offset, stack.num_local, interpret)
    return gradients.grouped_swiglu(rows_RD, stack.weights_mDF, ups_mDF, groups, stack.first, kernels)


def refuse(rows_RD, *weights_and_groups) -> str | None:
    """Returns why the kernels cannot serve a call, None if they can."""
    reason = refuse_platform() or refuse_arguments(rows_RD, *weights_and_groups)
    if reason is None and weights_and_groups[0].dtype == jnp.float8_e4m3fn and not card().converts_fp8:
        return f"{target().device_kind} is not known to convert float8_e4m3fn"
    return reason


def refuse_arguments(rows_RD, *weights_and_groups) -> str | None:
    """Returns why the kernels are not made for a call on any platform, None if they are."""
    *weights, _, _, layer = weights_and_groups
    first = jax.eval_shape(of_layer, weights[0], layer)
    _, D, F = first.shape
    if rows_RD.dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows are {rows_RD.dtype}, not float32 or bfloat16"
    if 0 in (rows_RD.shape[0], D, F):
        return "there is nothing to multiply"
    if not isinstance(first, QuantizedArray):
        return None
    group_size = D // first.scales.shape[1]
    if group_size < D and group_size % 16:
        return f"scales for groups of {group_size} numbers; a product takes 16, groups need a multiple of it"
    if first.dtype == jnp.int4 and F % INT4_PER_WORD:
        return f"{F} columns of int4, of which {INT4_PER_WORD} share a word"
    return _refuse_size(first)


def _refuse_size(weights: Array | QuantizedArray) -> str | None:
    """Returns why Triton cannot address some matrices, None if it can."""
    if isinstance(weights, QuantizedArray) and weights.dtype != jnp.int4:
        return refuse_size(weights=weights.values)
    return None
