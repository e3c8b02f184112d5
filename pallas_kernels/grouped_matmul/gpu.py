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
- Quantised weights move as they are stored, and become the rows' dtype inside. One scale for a column multiplies the
  sums; scales for groups multiply the numbers.

`outer_products`: a program sums a tile [128, 256] of the gradient of one group, while that group's rows pass by.

Why not `lax.ragged_dot`: XLA compiles it for GPUs (jax 0.10.2, default flags; read in the optimised HLO) as one dense
product of rows that are repeated for each of E groups and are zero in all but their own: E times the multiplications,
and a copy of the rows E times as large.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from pallas_kernels.dispatch import target
from pallas_kernels.gpu import Span, card, dot, load, power_of_two, refuse_platform, refuse_size, store
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
    sizes = plgpu.load(sizes_ref.at[pl.ds(0, len(index))], mask=index < num_groups, other=0)
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


def _read(weight, matrix: Array, rows: Span, cols: Span, scaled: bool, dtype) -> Array:
    """Returns a tile of a matrix in a dtype to multiply in.

    Args:
        scaled: whether quantised weights are multiplied by their scales, of which the rows of the tile share one.
    """
    if not isinstance(weight, QuantizedArray):
        return load(weight, matrix, rows, cols)
    numbers = _per_word(weight)
    part = Span.block(cols.start // cols.size, cols.size // numbers, weight.values.shape[2])
    values = _unpack(load(weight.values, matrix, rows, part), numbers).reshape(rows.size, cols.size)
    if not scaled:
        return values.astype(dtype)
    rows_per_scale = weight.values.shape[1] // weight.scales.shape[1]
    return (values.astype(jnp.float32) * _read_scales(weight, matrix, rows.start // rows_per_scale, cols)).astype(dtype)


def _read_scales(weight: QuantizedArray, matrix: Array, nth: Array | np.integer, cols: Span) -> Array:
    """Returns the nth scales of some columns of a matrix, for what `_read` makes of the values."""
    scales = load(weight.scales, matrix, nth, cols)
    return scales * 16.0 ** (1 - numbers) if (numbers := _per_word(weight)) > 1 else scales


def _per_word(weight: QuantizedArray) -> int:
    """Returns how many neighbouring columns share a number in memory."""
    return weight.scales.shape[2] // weight.values.shape[2]


def _unpack(words: Array, count: int) -> Array:
    """Returns the int4 in each word, times 16 ** (count - 1): their four bits stay at the upper end of the word."""

    def in_order(parts):
        return parts[0] if len(parts) == 1 else jnp.stack([in_order(parts[0::2]), in_order(parts[1::2])], -1)

    top = -(16 ** (count - 1))  # a mask
    return words if count == 1 else in_order([words << 4 * (count - 1 - nth) & top for nth in range(count)])


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
    width = weights[0].shape[1 if transposed else 2]
    num_scales = weights[0].scales.shape[1] if isinstance(weights[0], QuantizedArray) else 0
    t = row_tiles_for(rows, weights, groups.sizes_E.shape[0], transposed)
    num_blocks = most_blocks(num_rows, groups.sizes_E.shape[0], t.rows)
    together = min(t.together, num_blocks)

    def grouped_rows_times_weights(groups, first_matrix, rows, weights, *results):
        nth = pl.program_id(2) * together + pl.program_id(0)
        group, first, end = locate_block(nth, groups.sizes_E, groups.offset, num_rows, t.rows)
        block = Span(first, t.rows, first + jnp.arange(t.rows) < end)
        cols = Span.block(pl.program_id(1), t.cols, width)
        held, matrix = (group >= 0) & (group < num_local), first_matrix[0] + group

        def write(values):
            for result, value in zip(results, values, strict=True):
                store(result, value, block, cols)

        def add_products(step, products):
            numbers = Span.block(step, t.depth, depth)
            blocks = [load(x, block, numbers) for x in rows] * (len(weights) // len(rows))
            place = (cols, numbers) if transposed else (numbers, cols)
            scaled = transposed or num_scales > 1
            return [
                product + dot(x, _read(weight, matrix, *place, scaled, dtype), (1, int(transposed)), interpret)
                for product, x, weight in zip(products, blocks, weights, strict=True)
            ]

        @pl.when(held & (first < end))
        def _():
            zeros = [jnp.zeros((t.rows, t.cols), jnp.float32) for _ in weights]
            products = lax.fori_loop(0, pl.cdiv(depth, t.depth), add_products, zeros)
            if num_scales == 1 and not transposed:  # one scale for each column: it multiplies the sums
                scales = (_read_scales(weight, matrix, np.int32(0), cols) for weight in weights)
                products = [product * scale for product, scale in zip(products, scales, strict=True)]
            write(finish(*products))

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
    )(groups, jnp.asarray(first_matrix, jnp.int32).reshape(1), rows, [_packed(weight) for weight in weights])


def row_tiles_for(rows, weights, num_groups: int, transposed: bool) -> tiles.GpuRowTiles:
    """Returns the tiles of `multiply` for these operands."""
    (num_rows, depth), (first, *_) = rows[0].shape, weights
    most_cols = most_depth = 256
    if isinstance(first, QuantizedArray) and first.scales.shape[1] > 1:
        # The rows of a tile of weights lie in one group: the largest power of two that divides its size.
        group_size = first.shape[1] // first.scales.shape[1]
        most_cols, most_depth = (group_size & -group_size, 256) if transposed else (256, group_size & -group_size)
    return tiles.gpu_row_tiles(
        num_rows, num_groups, first.shape[1 if transposed else 2], depth, (len(rows), len(weights)),
        rows[0].dtype.itemsize, tiles.bits(first.dtype), most_cols, most_depth,
    )  # fmt: skip


def _packed(weight: Array | QuantizedArray) -> Array | QuantizedArray:
    """Returns int4 as int8, two neighbouring columns in each: that is how a GPU holds them, so nothing moves.

    Where Triton could not address so many bytes (a stack of Scout's layers), as int16, four columns in each.
    """
    if not isinstance(weight, QuantizedArray) or weight.dtype != jnp.int4:
        return weight

    def words(dtype):
        grouped = weight.values.reshape(*weight.shape[:2], -1, jnp.iinfo(dtype).bits // 4)
        return lax.bitcast_convert_type(grouped, dtype)

    too_many = refuse_size(weights=jax.eval_shape(lambda: words(jnp.int8))) is not None
    return QuantizedArray(words(jnp.int16 if too_many and weight.shape[2] % 4 == 0 else jnp.int8), weight.scales)


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
    if first.dtype == jnp.int4 and F % 2:
        return f"{F} columns of int4, of which two share a byte"
    return _refuse_size(first)


def _refuse_size(weights: Array | QuantizedArray) -> str | None:
    """Returns why Triton cannot address some matrices, None if it can."""
    packed = jax.eval_shape(_packed, weights)
    return refuse_size(weights=packed.values) if isinstance(packed, QuantizedArray) else None
