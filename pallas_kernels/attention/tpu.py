"""Flash attention for TPUs: two Mosaic kernels, forward and backward, that walk a list of visible blocks.

Tiled: a program has `q_block` queries with the query heads of one kv head (of several, where groups are small) and
`kv_block` keys. It computes tiles of q_tile x kv_tile scores, head after head; the products of the next head start
before the softmax of this one, so that matrix and vector units work together. The heads of a group are unrolled.

In fast memory: the query block with what is summed over its keys (forward: maximum, sum and output; backward: the
gradient of the queries), and in the backward kernel the gradients of all keys and values of a row of the batch, so that
one kernel needs five products a tile; two kernels would need seven. Keys that do not fit take further passes.

The grid: blocks of heads (in parallel, for chips with two cores) x the visits of `visits.py`. Whether a tile is hidden,
full or needs a mask is decided inside, from the ranges of `blocks.py` in scalar memory. Positions and segments may be
traced: lists and ranges are arrays, and the length of the grid is a number that the program computes.

Arrays are head-major, [B, K, G, T, H]: XLA lets the projections before and after write and read that layout, whereas
[B, T, N * H] costs a copy of each array. The forward kernel has queries in rows; the maximum of a row is then one
reduction along lanes. The backward kernel has keys in rows and sums transposed gradients, [H, keys] and [H, queries]:
the probabilities are the stationary matrix then, which fills a matrix unit of 256 x 256, where a product of width
H = 128 would use half of it.

Bytes (`traffic.py` counts them): queries, outputs and gradients move once; keys and values once for each query block
that sees them, for all G query heads together. Against moving everything once, Scout's forward pass over 8192 tokens
moves 1.6 times as much. A head of 64 or 88 is stored and moved 128 wide, and its products take as long as those of 128.

Flash attention: Dao et al., 2022; online softmax: Milakov and Gimelshein, 2018.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tiles as tile_table
from pallas_kernels.attention.blocks import (
    KeyRanges,
    Keys,
    Queries,
    QueryRanges,
    key_ranges,
    make_labels,
    may_see,
    pad_labels,
    query_ranges,
    see_all,
    visible,
)
from pallas_kernels.attention.tiles import LANES
from pallas_kernels.attention.visits import MAX_VISITS, Plan, list_visits
from pallas_kernels.dispatch import target
from pallas_kernels.residuals import name_attention
from pallas_kernels.tpu import INTERPRET, refuse_platform

_LOG2_E = math.log2(math.e)
# Below every score, yet finite: -inf - -inf would be NaN.
_LOWEST = -1e30
_HEAD_DIMS = (64, 88, 128)


def refuse(q_BTNH, *_) -> str | None:
    """Returns why the kernels cannot serve a call, None if they can."""
    return refuse_platform() or refuse_interpreted(q_BTNH)


def refuse_interpreted(q_BTNH, *_) -> str | None:
    """Returns why the kernels cannot serve a call on any platform, None if they can."""
    if q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernel takes float32 and bfloat16, not {q_BTNH.dtype}"
    if q_BTNH.shape[-1] not in _HEAD_DIMS:
        return f"the kernel is made for head_dim {', '.join(map(str, _HEAD_DIMS))}, not {q_BTNH.shape[-1]}"
    return None


def _dot(a, b, a_axis, b_axis):
    """Returns the float32 product of two matrices, summed over the given axis of each."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((a_axis,), (b_axis,)), ((), ())
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _columns(row, width):
    """Returns a row [1, n] as [n, width], the same in every column; cheaper than a broadcast along lanes."""
    columns = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    return jnp.tile(columns, (1, pl.cdiv(width, LANES)))[:, :width]


def _keep(rows, array):
    """Returns the array with zeros outside of the rows. What nobody sees may hold NaN, and 0 * NaN would spread."""
    return jnp.where(rows, array.astype(jnp.float32), 0.0).astype(array.dtype)  # a mask is 32 bits wide


def _rows(tile, size):
    return pl.ds(pl.multiple_of(tile * size, size), size)


def _fields(labels_ref, tile):
    """Returns the labels of a tile, each a row of numbers along lanes."""
    return [labels_ref[0, tile, i : i + 1] for i in range(labels_ref.shape[2])]


def _for_visible_tiles(plan, visit, q_ranges_ref, kv_ranges_ref, attend):
    """Calls `attend(q_tile, kv_tile, masked)` for the tiles of a visit in which some query may see some key."""

    def read(ranges_ref, block, num_blocks, tile, num_tiles):
        at = (plan.batch(visit) * num_blocks + block) * num_tiles + tile
        return (ranges_ref[i, at] for i in range(ranges_ref.shape[0]))

    def visit_queries(q_tile, _):
        q_range = QueryRanges(*read(q_ranges_ref, plan.q_index(visit), plan.num_q_blocks, q_tile, plan.q_tiles))

        def visit_keys(kv_tile, _):
            kv_range = KeyRanges(*read(kv_ranges_ref, plan.kv_index(visit), plan.num_kv_blocks, kv_tile, plan.kv_tiles))
            full = see_all(q_range, kv_range)
            pl.when(full)(lambda: attend(q_tile, kv_tile, masked=False))
            pl.when(may_see(q_range, kv_range) & ~full)(lambda: attend(q_tile, kv_tile, masked=True))

        lax.fori_loop(0, plan.kv_tiles, visit_keys, None)

    lax.fori_loop(0, plan.q_tiles, visit_queries, None)


def _for_heads(num_kv_heads, group, most, visit):
    """Calls `visit` with lists of (kv head, head of its group): whole groups, of about `most` heads together."""
    together = math.gcd(num_kv_heads, max(1, most // group))

    def visit_heads(index, _):
        visit([(index * together + k, g) for k in range(together) for g in range(group)])

    lax.fori_loop(0, num_kv_heads // together, visit_heads, None)


def _forward_kernel(
    visits_ref, q_ranges_ref, kv_ranges_ref, q_labels_ref, kv_labels_ref, q_ref, k_ref, v_ref,
    out_ref, lse_ref, largest_ref, sum_ref, acc_ref, *, plan, scale,
):  # fmt: skip
    step = pl.program_id(1)
    visit = visits_ref[step]
    q_size, kv_size = plan.tiles.q_tile, plan.tiles.kv_tile
    num_kv_heads, group, _, head_dim = q_ref.shape[1:]

    @pl.when((step == 0) | (plan.row(visits_ref[jnp.maximum(step - 1, 0)]) != plan.row(visit)))
    def start():
        largest_ref[...] = jnp.full_like(largest_ref, _LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend(q_tile, kv_tile, masked):
        q_rows, kv_rows = _rows(q_tile, q_size), _rows(kv_tile, kv_size)
        if masked:
            q_labels = (_columns(field, kv_size) for field in _fields(q_labels_ref, q_tile))
            mask = visible(Queries(*q_labels), Keys(*_fields(kv_labels_ref, kv_tile)))
            seen = _columns(jnp.where(mask, 1.0, 0.0).max(0, keepdims=True), head_dim) > 0

        def score(kv_head, g):
            return _dot(q_ref[0, kv_head, g, q_rows], k_ref[0, kv_head, kv_rows], 1, 1)

        def visit_heads(heads):
            following = score(*heads[0])
            for head, next_head in zip(heads, [*heads[1:], None], strict=True):
                scores = following
                if next_head is not None:
                    following = score(*next_head)
                if masked:
                    scores = jnp.where(mask, scores, -jnp.inf)
                # Row statistics are repeated along all lanes, except that the sum is kept as one partial sum per lane.
                at = *head, q_rows
                largest = jnp.maximum(largest_ref[at], scores.max(1, keepdims=True))
                weights = jnp.exp2((scores - jnp.tile(largest, (1, kv_size // LANES))) * (scale * _LOG2_E))
                shrink = jnp.exp2((largest_ref[at] - largest) * (scale * _LOG2_E))
                largest_ref[at] = largest
                sum_ref[at] = sum_ref[at] * shrink + sum(weights[:, i : i + LANES] for i in range(0, kv_size, LANES))
                v = v_ref[0, head[0], kv_rows]
                if masked:
                    v = _keep(seen, v)
                acc_ref[at] = acc_ref[at] * shrink[:, :head_dim] + _dot(weights.astype(v.dtype), v, 1, 0)

        _for_heads(num_kv_heads, group, 2, visit_heads)

    _for_visible_tiles(plan, visit, q_ranges_ref, kv_ranges_ref, attend)

    @pl.when(plan.row(visits_ref[step + 1]) != plan.row(visit))
    def finish():
        lane = lax.broadcasted_iota(jnp.int32, (q_size, LANES), 1)

        def finish_tile(q_tile, _):
            def visit_heads(heads):
                # Each head's numbers go to a lane of their own: one transposition turns all columns into rows.
                sums = largest = jnp.zeros(lane.shape)
                for i, head in enumerate(heads):
                    at = *head, _rows(q_tile, q_size)
                    total = jnp.broadcast_to(sum_ref[at].sum(1, keepdims=True), lane.shape)
                    # A row that saw nothing has the sum 0. NaN is not 0: it came from the inputs and has to come out.
                    out_ref[0, *at] = (acc_ref[at] / jnp.where(total == 0, 1.0, total)[:, :head_dim]).astype(
                        q_ref.dtype
                    )
                    sums = jnp.where(lane == i, total, sums)
                    largest = jnp.where(lane == i, largest_ref[at], largest)
                sums, largest = sums.T[: len(heads)], largest.T[: len(heads)]
                lse = jnp.where(sums == 0, -jnp.inf, largest * scale + jnp.log(sums))
                for i in range(0, len(heads), group):
                    lse_ref[0, heads[i][0], q_tile] = lse[i : i + group]

            _for_heads(num_kv_heads, group, 8, visit_heads)

        lax.fori_loop(0, plan.q_tiles, finish_tile, None)


def _backward_kernel(
    visits_ref, q_ranges_ref, kv_ranges_ref, q_labels_ref, kv_labels_ref, q_ref, d_out_ref, lse_ref, delta_ref,
    k_ref, v_ref, *refs, plan, scale,
):  # fmt: skip
    *sum_so_far_ref, d_q_ref, d_k_ref, d_v_ref, d_q_acc_ref, d_k_acc_ref, d_v_acc_ref = refs
    step = pl.program_id(1)
    visit, before = visits_ref[step], visits_ref[jnp.maximum(step - 1, 0)]
    q_size, kv_size = plan.tiles.q_tile, plan.tiles.kv_tile
    num_kv_heads, group, _, head_dim = q_ref.shape[1:]
    kv_block_start = plan.kv_index(visit) * plan.kv_tiles

    @pl.when((step == 0) | (plan.batch(before) != plan.batch(visit)))
    def start_batch():
        def clear(kv_tile, _):
            for kv_head in range(num_kv_heads):
                d_k_acc_ref[kv_head, kv_tile] = jnp.zeros((head_dim, kv_size))
                d_v_acc_ref[kv_head, kv_tile] = jnp.zeros((head_dim, kv_size))

        lax.fori_loop(0, d_k_acc_ref.shape[1], clear, None)

    def for_query_tiles(visit_tile):
        """Calls `visit_tile(head, tile, rows of the tile in a block)`."""

        def visit_tiles(q_tile, _):
            def visit_heads(heads):
                for head in heads:
                    visit_tile((*head, q_tile), (0, *head, _rows(q_tile, q_size)))

            _for_heads(num_kv_heads, group, 2, visit_heads)

        lax.fori_loop(0, plan.q_tiles, visit_tiles, None)

    @pl.when((step == 0) | (plan.row(before) != plan.row(visit)))
    def start_queries():
        def start(at, rows):
            if sum_so_far_ref:
                d_q_acc_ref[at] = sum_so_far_ref[0][rows].T
            else:
                d_q_acc_ref[at] = jnp.zeros((head_dim, q_size))

        for_query_tiles(start)

    def attend(q_tile, kv_tile, masked):
        q_rows, kv_rows = _rows(q_tile, q_size), _rows(kv_tile, kv_size)
        if masked:
            kv_labels = (_columns(field, q_size) for field in _fields(kv_labels_ref, kv_tile))
            mask = visible(Queries(*_fields(q_labels_ref, q_tile)), Keys(*kv_labels))
            ones = jnp.where(mask, 1.0, 0.0)
            kv_seen = jnp.broadcast_to(ones.max(1, keepdims=True), (kv_size, head_dim)) > 0
            q_seen = _columns(ones.max(0, keepdims=True), head_dim) > 0

        def load(kv_head, g):
            """Returns keys, queries and cotangents, and the two products that need nothing else."""
            k, v = k_ref[0, kv_head, kv_rows], v_ref[0, kv_head, kv_rows]
            q, d_out = q_ref[0, kv_head, g, q_rows], d_out_ref[0, kv_head, g, q_rows]
            if masked:
                k, v, q, d_out = _keep(kv_seen, k), _keep(kv_seen, v), _keep(q_seen, q), _keep(q_seen, d_out)
            return k, q, d_out, _dot(k, q, 1, 1), _dot(v, d_out, 1, 1)

        def visit_heads(heads):
            following = load(*heads[0])
            d_k = d_v = 0.0
            for (kv_head, g), next_head in zip(heads, [*heads[1:], None], strict=True):
                k, q, d_out, scores, d_weights = following
                if next_head is not None:
                    following = load(*next_head)
                statistics = 0, kv_head, q_tile, pl.ds(g, 1)
                weights = jnp.exp2(scores * (scale * _LOG2_E) - lse_ref[statistics])
                if masked:
                    weights = jnp.where(mask, weights, 0.0)
                d_v += _dot(d_out, weights.astype(k.dtype), 0, 1)
                d_scores = (weights * (d_weights - delta_ref[statistics])).astype(k.dtype)
                d_k += _dot(q, d_scores, 0, 1)
                d_q_acc_ref[kv_head, g, q_tile] += _dot(k, d_scores, 0, 0)
                if g == group - 1:
                    d_k_acc_ref[kv_head, kv_block_start + kv_tile] += d_k
                    d_v_acc_ref[kv_head, kv_block_start + kv_tile] += d_v
                    d_k = d_v = 0.0

        _for_heads(num_kv_heads, group, 2, visit_heads)

    @pl.when(plan.stores(visit) == 0)
    def compute():
        _for_visible_tiles(plan, visit, q_ranges_ref, kv_ranges_ref, attend)

    @pl.when(plan.row(visits_ref[step + 1]) != plan.row(visit))
    def finish_queries():
        def store(at, rows):
            d_q = d_q_acc_ref[at].T
            d_q_ref[rows] = d_q if sum_so_far_ref else (d_q * scale).astype(d_q_ref.dtype)

        for_query_tiles(store)

    @pl.when(plan.stores(visit) == 1)
    def store_keys():
        def store(kv_tile, _):
            for kv_head in range(num_kv_heads):
                at, rows = (kv_head, kv_block_start + kv_tile), (0, kv_head, _rows(kv_tile, kv_size))
                d_k_ref[rows] = (d_k_acc_ref[at].T * scale).astype(d_k_ref.dtype)
                d_v_ref[rows] = d_v_acc_ref[at].T.astype(d_v_ref.dtype)

        lax.fori_loop(0, plan.kv_tiles, store, None)


def _spec(shape, index):
    """Returns blocks of the given shape, one row of the batch each; `index` takes the block of heads and the visit."""
    return pl.BlockSpec((1, *shape), lambda heads, step, visits, *_: index(heads, visits[step]))


class _Specs(NamedTuple):
    """The blocks of each kind of array."""

    queries: pl.BlockSpec
    statistics: pl.BlockSpec
    keys: pl.BlockSpec
    key_gradients: pl.BlockSpec

    @classmethod
    def create(cls, plan: Plan, group: int, head_dim: int) -> "_Specs":
        tiles, batch, q_index = plan.tiles, plan.batch, plan.q_index
        kv_block = tiles.kv_heads, tiles.kv_block, head_dim
        return cls(
            _spec((tiles.kv_heads, group, tiles.q_block, head_dim), lambda h, v: (batch(v), h, 0, q_index(v), 0)),
            _spec((tiles.kv_heads, plan.q_tiles, group, tiles.q_tile), lambda h, v: (batch(v), h, q_index(v), 0, 0)),
            _spec(kv_block, lambda h, v: (batch(v), h, plan.kv_to_load(v), 0)),
            _spec(kv_block, lambda h, v: (batch(v), h, plan.kv_to_store(v), 0)),
        )


def _most_pairs(T, S, causal, chunk_size):
    """Returns the pairs of a query and a key that see each other, at most: positions are not known to XLA's scheduler.

    As many keys as queries are taken for the same tokens; others may all come before.
    """
    if not causal:
        return T * S
    reach = min(S, chunk_size or S)
    return T * (reach + 1) // 2 if T == S else T * reach


def _cost(q_BKGTH, num_pairs, num_products, plan):
    """Returns the estimate of a call for XLA's scheduler: each query block reads the keys that it sees."""
    B, K, group, T, H = q_BKGTH.shape
    num_numbers = B * K * H * (num_products * group * T + 2 * num_pairs // plan.tiles.q_block)
    return pl.CostEstimate(
        flops=2 * num_products * B * K * group * num_pairs * H,
        transcendentals=B * K * group * num_pairs,
        bytes_accessed=num_numbers * q_BKGTH.dtype.itemsize,
    )


def _launch(kernel, plan, queries, keys, visits, inputs, outputs, scratch, cost, vmem_limit, interpret, aliases=None):
    """Calls a kernel on visits, ranges of the tiles, labels, and then the inputs.

    Args:
        queries, keys: labels padded to whole blocks.
        visits: the result of `list_visits`.
        inputs: pairs of an array and its blocks.
        outputs: pairs of a shape with dtype and its blocks.
        scratch: shapes in float32.
    """
    tiles = plan.tiles
    visits, num_visits = visits

    def ranges(of):
        return jnp.stack([jnp.ravel(x) for x in of if x is not None])

    def labels(of, size, num_tiles, index):
        cut = jnp.stack([jnp.reshape(x, (x.shape[0], -1, size)) for x in of if x is not None], 2)
        return cut, _spec((num_tiles, cut.shape[2], size), lambda _, visit: (plan.batch(visit), index(visit), 0, 0))

    inputs = [
        labels(queries, tiles.q_tile, plan.q_tiles, plan.q_index),
        labels(keys, tiles.kv_tile, plan.kv_tiles, plan.kv_to_load),
        *inputs,
    ]
    num_kv_heads = inputs[2][0].shape[1]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_kv_heads // tiles.kv_heads, num_visits),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        input_output_aliases=aliases or {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=cost,
        interpret=INTERPRET if interpret else False,
        name=kernel.func.__name__.strip("_"),
    )(
        visits,
        ranges(query_ranges(queries, tiles.q_tile)),
        ranges(key_ranges(keys, tiles.kv_tile)),
        *(array for array, _ in inputs),
    )


def _head_major(x_BSNH, group=None):
    """Returns [B, N, S, H], or [B, K, G, S, H] if the size G of a group is given."""
    B, S, N, H = x_BSNH.shape
    x_BNSH = x_BSNH.transpose(0, 2, 1, 3)
    return x_BNSH if group is None else x_BNSH.reshape(B, N // group, group, S, H)


def _cut(labels, start, stop):
    return type(labels)(*(None if x is None else x[:, start:stop] for x in labels))


def _forward(q_BTNH, k_BSKH, v_BSKH, given, causal, chunk_size, scale, interpret):
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    group = N // K
    tiles = tile_table.forward_tiles(T, S, N, K, target().device_kind)
    queries, keys = make_labels((B, T, S), *given, causal, chunk_size)
    keys = pad_labels(keys, tiles.kv_block)
    q, k, v = _head_major(q_BTNH, group), _head_major(k_BSKH), _head_major(v_BSKH)
    num_kv_blocks, num_pairs = pl.cdiv(S, tiles.kv_block), _most_pairs(T, S, causal, chunk_size)

    def attend(start, stop):
        length = min(stop, T) - start
        part = pad_labels(_cut(queries, start, stop), tiles.q_block)
        plan = Plan(tiles, pl.cdiv(length, tiles.q_block), num_kv_blocks)
        specs = _Specs.create(plan, group, H)
        row_statistics = tiles.kv_heads, group, tiles.q_block, LANES
        out, lse = _launch(
            functools.partial(_forward_kernel, plan=plan, scale=scale),
            plan,
            part,
            keys,
            list_visits(plan, part, keys, every_query=True, store_keys=False),
            inputs=[(q[:, :, :, start:stop], specs.queries), (k, specs.keys), (v, specs.keys)],
            outputs=[
                (jax.ShapeDtypeStruct((B, K, group, length, H), q.dtype), specs.queries),
                (
                    jax.ShapeDtypeStruct((B, K, plan.num_q_blocks * plan.q_tiles, group, tiles.q_tile), jnp.float32),
                    specs.statistics,
                ),
            ],
            scratch=[row_statistics, row_statistics, (*row_statistics[:3], H)],
            cost=_cost(q[:, :, :, start:stop], num_pairs * length // T, 2, plan),
            vmem_limit=tile_table.forward_vmem_limit(),
            interpret=interpret,
        )
        lse_BTN = lse.transpose(0, 2, 4, 1, 3).reshape(B, -1, N)[:, :length]
        return out.reshape(B, N, length, H).transpose(0, 2, 1, 3), lse_BTN

    # Scalar memory holds the visits of so many queries; more go in several calls.
    step = max(1, MAX_VISITS // (B * num_kv_blocks)) * tiles.q_block
    outs, lses = zip(*(attend(start, start + step) for start in range(0, T, step)), strict=True)
    return (outs[0], lses[0]) if len(outs) == 1 else (jnp.concatenate(outs, 1), jnp.concatenate(lses, 1))


def _backward(q_BTNH, k_BSKH, v_BSKH, given, out, lse, d_out, d_lse, causal, chunk_size, scale, interpret):
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    group = N // K
    kind = target().device_kind
    tiles = tile_table.backward_tiles(T, S, N, K, kind)
    queries, keys = make_labels((B, T, S), *given, causal, chunk_size)
    queries = pad_labels(queries, tiles.q_block)
    num_q_blocks = pl.cdiv(T, tiles.q_block)
    # d scores = weights * (d weights - delta): sum(out * d_out) comes from the normalisation, d_lse from the result.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1) - d_lse
    delta = jnp.where(jnp.isneginf(lse), 0.0, delta)

    def statistics(x_BTN):
        x = jnp.pad(x_BTN, ((0, 0), (0, num_q_blocks * tiles.q_block - T), (0, 0)))
        return x.reshape(B, -1, tiles.q_tile, K, group).transpose(0, 3, 1, 4, 2)

    q, d_out = _head_major(q_BTNH, group), _head_major(d_out, group)
    k, v = _head_major(k_BSKH), _head_major(v_BSKH)
    lse, delta = statistics(lse * _LOG2_E), statistics(delta)

    def sum_over(k, v, keys, d_q_so_far):
        """Returns the gradients from these keys; that of the queries is added to the one so far, if there is one."""
        plan = Plan(tiles, num_q_blocks, pl.cdiv(k.shape[2], tiles.kv_block))
        specs = _Specs.create(plan, group, H)
        kv_gradients = tiles.kv_heads, plan.num_kv_blocks * plan.kv_tiles, H, tiles.kv_tile
        inputs = [
            (q, specs.queries), (d_out, specs.queries), (lse, specs.statistics), (delta, specs.statistics),
            (k, specs.keys), (v, specs.keys), *([] if d_q_so_far is None else [(d_q_so_far, specs.queries)]),
        ]  # fmt: skip
        return _launch(
            functools.partial(_backward_kernel, plan=plan, scale=scale),
            plan,
            queries,
            keys,
            list_visits(plan, queries, keys, every_query=d_q_so_far is None, store_keys=True),
            inputs=inputs,
            outputs=[
                (q if d_q_so_far is None else d_q_so_far, specs.queries),
                (k, specs.key_gradients),
                (v, specs.key_gradients),
            ],
            scratch=[(tiles.kv_heads, group, plan.q_tiles, H, tiles.q_tile), kv_gradients, kv_gradients],
            cost=_cost(q, _most_pairs(T, S, causal, chunk_size) * k.shape[2] // S, 5, plan),
            vmem_limit=tile_table.backward_vmem_limit(kind),
            interpret=interpret,
            aliases=None if d_q_so_far is None else {len(inputs) + 4: 0},
        )

    # The gradients of so many keys fit into fast memory, and their visits into scalar memory.
    fitting = tile_table.keys_per_pass(tiles, H, kind) // tiles.kv_block
    fitting = max(1, min(fitting, MAX_VISITS // (B * (num_q_blocks + 1))))
    num_passes = pl.cdiv(S, fitting * tiles.kv_block)
    length = pl.cdiv(S, num_passes * tiles.kv_block) * tiles.kv_block
    if num_passes == 1:
        d_q, d_k, d_v = sum_over(k, v, pad_labels(keys, tiles.kv_block), None)
    else:

        def one_pass(d_q_so_far, part):
            d_q, *d_kv = sum_over(*part, d_q_so_far)
            return d_q, d_kv

        def cut(labels_BS):
            return labels_BS.reshape(B, num_passes, length).swapaxes(0, 1)

        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, num_passes * length - S), (0, 0))) for x in (k, v))
        parts = (
            *(x.reshape(B, K, num_passes, length, H).transpose(2, 0, 1, 3, 4) for x in (k, v)),
            jax.tree.map(cut, pad_labels(keys, num_passes * length)),
        )
        # In float32 and in place. Whole blocks, as the interpreter cannot alias an array that ends inside of one.
        d_q = jnp.zeros((B, K, group, num_q_blocks * tiles.q_block, H))
        d_q, d_kv = lax.scan(one_pass, d_q, parts)
        d_q = (d_q[:, :, :, :T] * scale).astype(q.dtype)
        d_k, d_v = (x.transpose(1, 2, 0, 3, 4).reshape(B, K, -1, H)[:, :, :S] for x in d_kv)
    return d_q.reshape(B, N, T, H).transpose(0, 2, 1, 3), d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _attention(q, k, v, given, causal, chunk_size, scale, interpret):
    return _forward(q, k, v, given, causal, chunk_size, scale, interpret)


def _attention_forward(q, k, v, given, causal, chunk_size, scale, interpret):
    out, lse = name_attention(*_forward(q, k, v, given, causal, chunk_size, scale, interpret))
    return (out, lse), (q, k, v, given, out, lse)


def _attention_backward(causal, chunk_size, scale, interpret, residuals, cotangents):
    return (*_backward(*residuals, *cotangents, causal, chunk_size, scale, interpret), None)


_attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.jit, static_argnames=("causal", "chunk_size", "scale", "interpret"))
def attention_gradients(
    q_BTNH, k_BSKH, v_BSKH, given, out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN, causal, chunk_size, scale, interpret=False
):
    arrays = q_BTNH, k_BSKH, v_BSKH, given, out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN
    return _backward(*arrays, causal, chunk_size, scale, interpret)


@functools.partial(jax.jit, static_argnames=("causal", "chunk_size", "scale", "interpret"))
def attention(
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS,
    causal, chunk_size, scale, interpret=False,
):  # fmt: skip
    if 0 in (*q_BTNH.shape[:2], k_BSKH.shape[1]):
        return jnp.zeros_like(q_BTNH), jnp.full(q_BTNH.shape[:3], -jnp.inf)
    given = q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS
    return _attention(q_BTNH, k_BSKH, v_BSKH, given, causal, chunk_size, scale, interpret)
