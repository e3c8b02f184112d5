"""Routed expert matmuls on TPU: two kernels, rows times weights (`multiply`) and outer products (`outer_products`).

`multiply` is the forward pass and, with the weights contracted along F, the gradient to the rows.

- Tiled: rows into strips of up to 2048, columns of the result into tiles of 512. The contracted axis is whole, so a
  product is finished when it leaves the matrix units: no accumulator in memory, no masks on the way.
- The grid walks over steps, each a (strip, column tile, group) with rows in common; `list_steps` lists them and no
  other is visited. Strips change slowest and groups fastest: a strip is read once, a tile of the result is written
  once, a group's weights are read once for each strip in which the group has rows. Two cores share the columns.
- In VMEM, each twice for the pipeline: the strip [strip, D], a tile of each weight [D, 512], the result [strip, 512].
- A step multiplies only the rows of its group, in blocks that begin at the group's first row (rounded down to 16): in
  vain are at most 15 rows before and a part of the last block. Only blocks at a group's edge are masked, when stored.
- Bytes: the ideal (rows, results and weights of groups with rows, once) plus the weights of a group again for each
  strip boundary inside of it: for 8192 rows of 16 experts 1.8 GB instead of 1.56, in decoding (one strip) nothing.
  The pipeline fetches one step ahead, so a new strip is waited for: 21 MB, 5% of its time at the bandwidth of v6e.

`outer_products` is the gradient to the weights. A tile of the result, up to [2560, 2048], stays in VMEM as a float32
sum while its group's rows pass; the grid walks over (row tile, column tile, step), a step being a (strip, group) with
rows in common. Bytes: results once, rows F / 2048 times, gradients D / 2560 times (2.55 GB, ideal 1.78, for 16384 rows
of 16 experts). Rows of others are zeroed in both operands of every block: 3% more bundles than none.

Quantised weights move as they are stored, and become the rows' dtype inside the product. fp8 does so natively on tpu7x
only; elsewhere it takes 4.8 thousand bundles per 5120 x 512 tile, int8 and int4 at most 1.8: on v6e decoding in fp8
waits for that, not for memory (2.8 thousand cycles).

SwiGLU's backward pass reads gate and up as its forward pass saved them, 2 R F numbers in the rows' dtype; to compute
them again would be a third more multiplications, and rematerialised layers hold them only briefly. Its element-wise
part is one fusion of XLA, between the kernels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.grouped_matmul import gradients, tiles
from pallas_kernels.grouped_matmul.gradients import Kernels, Stack
from pallas_kernels.grouped_matmul.groups import Groups, local_groups
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.tpu import INTERPRET, refuse_platform

Shaped = Array | jax.ShapeDtypeStruct


class Steps(NamedTuple):
    """What each step of `multiply` does: scalars that the grid reads ahead of time.

    Attributes:
        strip: strip of the result.
        rows_strip: strip of the rows; lags or leads where the result strip has no group, to read nothing for zeros.
        cols: column tile of the result.
        weight_cols: column tile of the weights; lags or leads likewise.
        group: whose rows.
        matrix: whose weights.
        clears: whether the step is the first of its result tile, and must zero it as it has rows of nobody.
        groups: rows of each group.
    """

    strip: Int[Array, " S"]
    rows_strip: Int[Array, " S"]
    cols: Int[Array, " S"]
    weight_cols: Int[Array, " S"]
    group: Int[Array, " S"]
    matrix: Int[Array, " S"]
    clears: Int[Array, " S"]
    groups: Groups


def list_steps(
    groups: Groups, num_rows: int, strip: int, num_cols: int, first_matrix: int | Int[Array, ""] = 0
) -> tuple[Steps, Int[Array, ""]]:
    """Returns the steps of `multiply`, and how many of them there are.

    A strip without groups is visited too, once per column tile, to be zeroed.
    """
    num_groups, num_strips = groups.start_e.shape[0], pl.cdiv(num_rows, strip)
    has_rows_e = groups.end_e > groups.start_e
    first_row = jnp.min(jnp.where(has_rows_e, groups.start_e, num_rows))
    end_row = jnp.max(jnp.where(has_rows_e, groups.end_e, 0))
    nth_e = jnp.cumsum(has_rows_e) - 1  # among the groups that have rows

    top_s = jnp.arange(num_strips) * strip
    bottom_s = jnp.minimum(top_s + strip, num_rows)
    first_s = jnp.sum(has_rows_e & (groups.end_e <= top_s[:, None]), 1)
    num_groups_s = jnp.sum(has_rows_e & (groups.start_e < bottom_s[:, None]), 1) - first_s
    owned_s = jnp.minimum(bottom_s, end_row) - jnp.maximum(top_s, first_row)
    visits_s = jnp.maximum(num_groups_s, 1)
    end_s = jnp.cumsum(visits_s * num_cols)

    step = jnp.arange((num_strips + num_groups - 1) * num_cols)
    strip_of = jnp.minimum(jnp.sum(step[:, None] >= end_s, 1), num_strips - 1)
    visits = _take(visits_s, strip_of)
    visit = step - _take(end_s, strip_of) + visits * num_cols
    cols, nth = visit // visits, visit % visits
    wanted = jnp.minimum(_take(first_s, strip_of) + nth, nth_e[-1])
    group = jnp.sum(jnp.where(has_rows_e & (nth_e == wanted[:, None]), jnp.arange(num_groups), 0), 1)

    # Where a strip has no group, name the blocks of the next step or the last one that has: nothing is read for it.
    last_strip = jnp.maximum(end_row - 1, 0) // strip
    first_strip = jnp.minimum(first_row // strip, last_strip)
    waiting_cols = jnp.where(strip_of < first_strip, 0, num_cols - 1)
    steps = Steps(
        strip=strip_of,
        rows_strip=jnp.clip(strip_of, first_strip, last_strip),
        cols=cols,
        weight_cols=jnp.where(_take(num_groups_s, strip_of) > 0, cols, waiting_cols),
        group=group,
        matrix=first_matrix + group,
        clears=(nth == 0) & (_take(owned_s - (bottom_s - top_s), strip_of) != 0),
        groups=groups,
    )
    return jax.tree.map(lambda table: table.astype(jnp.int32), steps), end_s[-1].astype(jnp.int32)


def _take(table_s: Int[Array, " s"], index: Int[Array, " S"]) -> Int[Array, " S"]:
    """Returns `table_s[index]`, by comparison: faster on TPUs than a gather when the table is small."""
    return jnp.sum(jnp.where(index[:, None] == jnp.arange(table_s.shape[0]), table_s, 0), 1)


def multiply(
    rows: list[Array],
    weights: list[Array | QuantizedArray],
    groups: Groups,
    num_groups: int,
    finish: Callable[..., list[Array]],
    transposed: bool = False,
    num_results: int = 1,
    first_matrix: int | Int[Array, ""] = 0,
    interpret: bool = False,
) -> list[Array]:
    """Returns `finish(*products)` of every row with its group's weights; rows of no group give zeros.

    Args:
        rows: [R, depth]; one array for all weights, or one for each.
        weights: [m, depth, width], or [m, width, depth] if transposed; m >= e.
        groups: the rows of the e groups.
        num_groups: groups that share the rows, whether here or elsewhere.
        finish: takes float32 products, one per weight, to a list of results; element-wise.
        transposed: see weights.
        num_results: length of that list.
        first_matrix: which of the m matrices is that of the first group.
    """
    (num_rows, depth), dtype = rows[0].shape, rows[0].dtype
    width = weights[0].shape[1 if transposed else 2]
    t = row_tiles_for(rows, weights, num_groups, transposed, num_results)
    num_cols = pl.cdiv(width, t.cols)
    num_cores = tiles.chip().num_cores if num_cols % tiles.chip().num_cores == 0 else 1
    num_cols //= num_cores
    steps, num_steps = list_steps(groups, num_rows, t.strip, num_cols, first_matrix)

    def rows_index(core, step, steps):
        return steps.rows_strip[step], 0

    def result_index(core, step, steps):
        return steps.strip[step], core * num_cols + steps.cols[step]

    def weights_index(core, step, steps):
        cols = core * num_cols + steps.weight_cols[step]
        return (steps.matrix[step], cols, 0) if transposed else (steps.matrix[step], 0, cols)

    def scales_index(core, step, steps):
        return (steps.matrix[step], 0, 0) if transposed else weights_index(core, step, steps)

    def weights_spec(weight):
        if isinstance(weight, QuantizedArray):
            scales = pl.BlockSpec((None, weight.scales.shape[1], depth if transposed else t.cols), scales_index)
            return QuantizedArray(weights_spec(weight.values), scales)
        return pl.BlockSpec((None, t.cols, depth) if transposed else (None, depth, t.cols), weights_index)

    def kernel(steps, rows, weights, results, sums):
        step = pl.program_id(1)
        first_col = (pl.program_id(0) * num_cols + steps.cols[step]) * t.cols
        top, group = steps.strip[step] * t.strip, steps.group[step]
        first = jnp.maximum(steps.groups.start_e[group] - top, 0)
        end = jnp.minimum(steps.groups.end_e[group] - top, t.strip)

        @pl.when(steps.clears[step] == 1)
        def _clear():
            for result in results:
                result[...] = jnp.zeros_like(result)

        def product(x, weight):
            return _product_transposed(x, weight, first_col, width) if transposed else _product(x, weight)

        def multiply_block(at, size):
            at = pl.multiple_of(at, tiles.ALIGNMENT)
            block = pl.ds(at, size)
            xs = [x[block, :] for x in rows * (len(weights) // len(rows))]
            # All but the last wait in memory: the matrix units of tpu7x have accumulators for one, and would start
            # over for parts of two (counted: 6.8 thousand bundles instead of 5.4).
            for held, x, weight in zip(sums, xs, weights, strict=False):
                held[:size, :] = product(x, weight)
            products = [*(held[:size, :] for held in sums), product(xs[-1], weights[-1])]
            finished = [value.astype(dtype) for value in finish(*products)]
            within = (at >= first) & (at + size <= end)

            @pl.when(within)
            def _store():
                for result, value in zip(results, finished, strict=True):
                    result[block, :] = value

            @pl.when(~within)
            def _store_own_rows():
                row = at + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
                own = (row >= first) & (row < end)
                for result, value in zip(results, finished, strict=True):
                    result[block, :] = jnp.where(own, value, result[block, :])

        start = first // tiles.ALIGNMENT * tiles.ALIGNMENT
        num_small = jnp.where(end > first, pl.cdiv(end - start, t.small), 0)
        num_big = num_small // (t.big // t.small)
        _for(num_big, lambda i: multiply_block(jnp.minimum(start + i * t.big, t.strip - t.big), t.big))
        if t.small < t.big:
            rest = start + num_big * t.big
            num_small -= num_big * (t.big // t.small)
            _for(num_small, lambda i: multiply_block(jnp.minimum(rest + i * t.small, t.strip - t.small), t.small))

    weight_bytes = (
        sum(math.prod(leaf.shape[1:]) * tiles.bits(leaf.dtype) // 8 for leaf in jax.tree.leaves(weights))
        * groups.start_e.shape[0]
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_cores, num_steps),
            in_specs=[
                [pl.BlockSpec((t.strip, depth), rows_index) for _ in rows],
                [weights_spec(weight) for weight in weights],
            ],
            out_specs=[[pl.BlockSpec((t.strip, t.cols), result_index)] * num_results],
            scratch_shapes=[[pltpu.VMEM((t.big, t.cols), jnp.float32)] * (len(weights) - 1)],
        ),
        out_shape=[[jax.ShapeDtypeStruct((num_rows, width), dtype)] * num_results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.chip().vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * depth * width * len(weights),
            bytes_accessed=(len(rows) * depth + num_results * width) * num_rows * dtype.itemsize + weight_bytes,
            transcendentals=0,
        ),
        interpret=INTERPRET if interpret else False,
        name="grouped_rows_times_weights",
    )(steps, rows, weights)[0]


def row_tiles_for(
    rows: Sequence[Shaped],
    weights: Sequence[Shaped | QuantizedArray],
    num_groups: int,
    transposed: bool,
    num_results: int,
) -> tiles.RowTiles | None:
    """Returns the tiles of `multiply` for these operands, None if nothing fits."""
    (num_rows, depth), itemsize = rows[0].shape, rows[0].dtype.itemsize
    width = weights[0].shape[-2 if transposed else -1]
    column_bytes = fixed_bytes = 0
    for weight in weights:
        column_bytes += 2 * depth * tiles.bits(weight.dtype) // 8
        if itemsize == 4:
            column_bytes += 3 * 2 * depth  # the compiler multiplies float32 as three bfloat16 parts
        if isinstance(weight, QuantizedArray):
            scale_bytes = 2 * 4 * tiles.round_up(weight.scales.shape[-2], 8)  # of one column of scales
            column_bytes += depth * itemsize  # the compiler keeps the decoded tile
            if transposed:
                fixed_bytes += depth * scale_bytes
            else:
                column_bytes += scale_bytes
    return tiles.row_tiles(
        num_rows, num_groups, width, len(rows) * depth * itemsize, num_results * itemsize, column_bytes, fixed_bytes
    )


def _dot(x: Array, y: Array, contracting: tuple[tuple[int], tuple[int]]) -> Array:
    """Returns the product with float32 sums; float32 operands are not rounded to bfloat16 on the way."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _for(count: Array | int, body: Callable[[Array], None]) -> None:
    lax.fori_loop(0, count, lambda i, _: body(i), None)


def _product(x: Array, weight) -> Array:
    """Returns the float32 product of rows [rows, depth] and a tile [depth, cols], plain or quantised.

    Scales multiply whatever is less: the sums, [rows, cols] per scale, or the tile. That every block decodes the tile
    anew costs little: vector units do it while the matrix units work or wait for weights.
    """
    if not isinstance(weight, QuantizedArray):
        return _dot(x, weight[...], ((1,), (0,)))
    numbers_per_scale = x.shape[1] // weight.scales.shape[0]
    if x.shape[0] > numbers_per_scale:
        return _dot(x, _decode(weight, x.dtype, numbers_per_scale), ((1,), (0,)))
    product = 0.0
    for nth, start in enumerate(range(0, x.shape[1], numbers_per_scale)):
        part = slice(start, start + numbers_per_scale)
        sums = _dot(x[:, part], weight.values[part, :].astype(x.dtype), ((1,), (0,)))
        product += sums * weight.scales[nth : nth + 1, :]
    return product


def _product_transposed(x: Array, weight, first_col: Array, width: int) -> Array:
    """Returns the float32 product of rows [rows, depth] and a tile [cols, depth], plain or quantised.

    Args:
        first_col: which of the `width` columns of the result is the tile's first: scales are those of all columns.
    """
    if not isinstance(weight, QuantizedArray):
        return _dot(x, weight[...], ((1,), (1,)))
    return _dot(x, _decode(weight, x.dtype, width // weight.scales.shape[0], first_col), ((1,), (1,)))


def _decode(weight: QuantizedArray, dtype: jnp.dtype, rows_per_scale: int, first_row: Array | int = 0) -> Array:
    """Returns a tile of quantised weights as numbers.

    Args:
        rows_per_scale: rows of the matrix that share a row of scales.
        first_row: which row of the matrix is the tile's first: scales are those of all rows.
    """
    num_rows, num_scales = weight.values.shape[0], weight.scales.shape[0]
    step = math.gcd(rows_per_scale, num_rows) if num_scales > 1 else num_rows
    parts = []
    for start in range(0, num_rows, step):
        nth = jnp.minimum((first_row + start) // rows_per_scale, num_scales - 1)
        values = weight.values[start : start + step, :].astype(jnp.float32)
        parts.append((values * weight.scales[pl.ds(nth, 1), :]).astype(dtype))
    return jnp.concatenate(parts)


class OuterSteps(NamedTuple):
    """What each step of `outer_products` does.

    Attributes:
        strip: strip of the rows.
        group: whose result.
        opens: whether the step is the first of its group.
        closes: whether it is the last.
        groups: rows of each group.
    """

    strip: Int[Array, " S"]
    group: Int[Array, " S"]
    opens: Int[Array, " S"]
    closes: Int[Array, " S"]
    groups: Groups


def list_outer_steps(groups: Groups, num_rows: int, strip: int) -> tuple[OuterSteps, Int[Array, ""]]:
    """Returns the steps of `outer_products`, and how many: the strips of each group, one for a group without rows."""
    num_groups, num_strips = groups.start_e.shape[0], pl.cdiv(num_rows, strip)
    first_e = jnp.minimum(groups.start_e // strip, num_strips - 1)
    visits_e = jnp.where(groups.end_e > groups.start_e, (groups.end_e - 1) // strip - first_e + 1, 1)
    end_e = jnp.cumsum(visits_e)
    step = jnp.arange(num_strips + num_groups)
    group = jnp.minimum(jnp.sum(step[:, None] >= end_e, 1), num_groups - 1)
    nth = step - _take(end_e - visits_e, group)
    steps = OuterSteps(_take(first_e, group) + nth, group, nth == 0, step == _take(end_e, group) - 1, groups)
    return jax.tree.map(lambda table: table.astype(jnp.int32), steps), end_e[-1].astype(jnp.int32)


def outer_products(rows_RD: Array, others_RF: Array, groups: Groups, num_groups: int, interpret: bool = False) -> Array:
    """Returns the sum over each group's rows of `outer(row, other)`, [e, D, F]; zeros for groups without rows."""
    (num_rows, depth), width, dtype = rows_RD.shape, others_RF.shape[1], rows_RD.dtype
    t = tiles.outer_tiles(num_rows, num_groups, depth, width, dtype.itemsize)
    steps, num_steps = list_outer_steps(groups, num_rows, t.strip)

    def kernel(steps, rows, others, result, sums):
        step = pl.program_id(2)
        top, group = steps.strip[step] * t.strip, steps.group[step]
        first = jnp.maximum(steps.groups.start_e[group] - top, 0)
        end = jnp.minimum(steps.groups.end_e[group] - top, t.strip)
        start = first // tiles.ALIGNMENT * tiles.ALIGNMENT

        def add_block(i):
            # The last block starts early enough to fit; what the one before it has seen is masked.
            at = pl.multiple_of(jnp.minimum(start + i * t.big, t.strip - t.big), tiles.ALIGNMENT)
            row = at + lax.broadcasted_iota(jnp.int32, (t.big, 1), 0)
            own = (row >= jnp.maximum(first, start + i * t.big)) & (row < end)
            x, y = (jnp.where(own, ref[pl.ds(at, t.big), :], 0) for ref in (rows, others))
            is_first = (steps.opens[step] == 1) & (i == 0)
            sums[...] = jnp.where(is_first, 0.0, sums[...]) + _dot(x, y, ((0,), (0,)))

        _for(jnp.where(end > first, pl.cdiv(end - start, t.big), 0), add_block)

        @pl.when(steps.closes[step] == 1)
        def _store():
            has_rows = steps.groups.end_e[group] > steps.groups.start_e[group]
            result[...] = jnp.where(has_rows, sums[...], 0.0).astype(dtype)

    num_local = groups.start_e.shape[0]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(depth, t.depth), pl.cdiv(width, t.cols), num_steps),
            in_specs=[
                pl.BlockSpec((t.strip, t.depth), lambda i, j, step, steps: (steps.strip[step], i)),
                pl.BlockSpec((t.strip, t.cols), lambda i, j, step, steps: (steps.strip[step], j)),
            ],
            out_specs=pl.BlockSpec((None, t.depth, t.cols), lambda i, j, step, steps: (steps.group[step], i, j)),
            scratch_shapes=[pltpu.VMEM((t.depth, t.cols), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_local, depth, width), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.chip().vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * depth * width,
            bytes_accessed=(num_rows * (depth + width) + num_local * depth * width) * dtype.itemsize,
            transcendentals=0,
        ),
        interpret=INTERPRET if interpret else False,
        name="grouped_outer_products",
    )(steps, rows_RD, others_RF)


def _kernels(num_groups: int, interpret: bool) -> Kernels:
    static = dict(num_groups=num_groups, interpret=interpret)
    return Kernels(functools.partial(multiply, **static), functools.partial(outer_products, **static))


@functools.partial(jax.jit, static_argnames="interpret")
def grouped_matmul(rows_RD, weights, group_sizes_E, group_offset=None, layer=None, interpret=False):
    stack = Stack.of(weights, layer)
    groups = local_groups(group_sizes_E, group_offset, stack.num_local)
    kernels = _kernels(group_sizes_E.shape[0], interpret)
    return gradients.grouped_matmul(rows_RD, stack.weights_mDF, groups, stack.first, kernels)


@functools.partial(jax.jit, static_argnames="interpret")
def grouped_swiglu(rows_RD, gate, up, group_sizes_E, group_offset=None, layer=None, interpret=False):
    stack = Stack.of(gate, layer)
    groups = local_groups(group_sizes_E, group_offset, stack.num_local)
    kernels, ups_mDF = _kernels(group_sizes_E.shape[0], interpret), Stack.of(up, layer).weights_mDF
    return gradients.grouped_swiglu(rows_RD, stack.weights_mDF, ups_mDF, groups, stack.first, kernels)


def refuse(rows_RD, *weights_and_groups) -> str | None:
    """Returns why the kernels cannot serve a call, None if they can."""
    return refuse_platform() or refuse_interpreted(rows_RD, *weights_and_groups)


def refuse_interpreted(rows_RD, *weights_and_groups) -> str | None:
    """Returns why the kernels cannot serve a call on any platform."""
    *weights, _, _, _ = weights_and_groups
    (num_rows, D), F, dtype = rows_RD.shape, weights[0].shape[-1], rows_RD.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows are {dtype}, not float32 or bfloat16"
    if 0 in (num_rows, D, F):
        return "there is nothing to multiply"
    if isinstance(weights[0], QuantizedArray):
        group_size = D // weights[0].scales.shape[-2]
        if group_size < D and group_size % 128:
            return f"scales for groups of {group_size} numbers; a register has 128 lanes, groups need a multiple of it"
    gradients = [jax.ShapeDtypeStruct((num_rows, F), dtype)] * len(weights)
    for rows, transposed, num_results in (([rows_RD], False, 2 * len(weights) - 1), (gradients, True, 1)):
        if row_tiles_for(rows, weights, 1, transposed, num_results) is None:
            return f"tiles of weights [{D}, {F}] in {weights[0].dtype} and rows in {dtype} do not fit in fast memory"
    return None
