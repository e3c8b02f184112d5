"""Decode attention as a Mosaic kernel: reads the used slots of the cache once, as they lie, and nothing else.

Tiled: blocks of slots with all their kv heads. A slot [K, 128] is contiguous in TPU memory (a tile of 8 x 128, or a
part of one), so a block is one DMA, or one per page, of exact length: of 700 used slots 700 are read. (In a view
[S, K * 128] heads would lie side by side; XLA would have to copy the whole cache.)

Grid: (splits, sequences). A program walks over the blocks of its sequence in a loop of dynamic length. A cursor runs
two blocks ahead of it, across the borders of sequences, and starts their DMAs. Splits run on the cores of one chip,
each with its part of every sequence; they merge by log-sum-exp.

VMEM: two buffers of a block of keys and values, and the block in work as 32-bit words, which frees its buffer for the
cursor; queries and sums of one sequence.

Compute: a 32-bit word of the cache holds two heads of a slot in bfloat16, four in int8. A strided load gathers the same
word of all slots. Its heads share one product, interleaved: rows are the G * T queries of each head, columns (slot,
head) pairs, and a score of a query with another head is masked. That is cheaper than unpacking the heads, as the MXU
is busy with loading keys and values, not with rows of queries.

Bytes: the used slots, once. `tiles.bytes_read` counts them.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.attention import merge_partial_attention
from pallas_kernels.decode_attention.slots import newest_slot
from pallas_kernels.decode_attention.tiles import (
    LANES,
    MAX_BLOCK_BYTES,
    SUBLANES,
    Tiles,
    choose_tiles,
    num_lanes,
    num_tiles,
    slot_bytes,
)
from pallas_kernels.dispatch import target
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.tpu import INTERPRET, refuse_platform

# Below every score, yet finite: -inf - -inf would be NaN.
_LOWEST = -1e30
_LOG2_E = math.log2(math.e)

# Three blocks, two of them on their way, and scores that leave the registers. The smallest chips (v5p, tpu7x) have 64.
_VMEM_LIMIT = 40 << 20

# All chips have 1 MiB of scalar memory; the page table must leave a little.
_MAX_TABLE_BYTES = 960 << 10

# Queries per kv head, of all tokens: more scores would not fit beside the largest block.
_MAX_QUERIES = 80


class _Layout(NamedTuple):
    """What the kernel knows of the caches when it is compiled."""

    dtype: jnp.dtype
    num_kv_heads: int
    page_size: int | None
    pages_per_sequence: int
    block_slots: int

    @property
    def rows_per_word(self) -> int:
        """Rows [H] of a cache that share 32-bit words."""
        return 4 // self.dtype.itemsize

    @property
    def group_heads(self) -> int:
        """Heads of a slot that share words, and therefore a product."""
        return min(self.rows_per_word, self.num_kv_heads)

    @property
    def num_groups(self) -> int:
        return self.num_kv_heads // self.group_heads


class _Blocks(NamedTuple):
    """The blocks of one split, and their way from the caches into VMEM: keys, values and in int8 the scales of both."""

    layout: _Layout
    used_ref: jax.Ref
    table_ref: jax.Ref
    caches: tuple[jax.Ref, ...]
    buffers: tuple[jax.Ref, ...]
    semaphores: jax.Ref
    cursor_ref: jax.Ref
    """Row and block that are fetched next; a row past the last one when all are."""

    def range(self, row):
        """Returns the first block of a row in this split, and the end."""
        split, num_splits = pl.program_id(0), pl.num_programs(0)
        num_blocks = pl.cdiv(self.used_ref[row], self.layout.block_slots)
        # A block that is left over goes to another split in every row.
        return tuple((i * num_blocks + row % num_splits) // num_splits for i in (split, split + 1))

    def used_slots(self, row, block):
        """Returns how many slots of a block are used."""
        return jnp.minimum(self.used_ref[row] - block * self.layout.block_slots, self.layout.block_slots)

    def seek(self, row):
        """Moves the cursor to the first block from this row on."""
        num_rows = pl.num_programs(1)

        def has_no_block(row):
            first, end = self.range(jnp.minimum(row, num_rows - 1))
            return (row < num_rows) & (first == end)

        row = lax.while_loop(has_no_block, lambda row: row + 1, row)
        self.cursor_ref[0], self.cursor_ref[1] = row, self.range(jnp.minimum(row, num_rows - 1))[0]

    def fetch(self, parity):
        """Starts the DMAs of the block under the cursor, if there is one, and moves on."""
        row, block = self.cursor_ref[0], self.cursor_ref[1]

        @pl.when(row < pl.num_programs(1))
        def _():
            self._start(row, block, parity)
            self.cursor_ref[1] = block + 1
            pl.when(block + 1 == self.range(row)[1])(lambda: self.seek(row + 1))

    def _start(self, row, block, parity):
        used, block_slots, page_size = self.used_slots(row, block), self.layout.block_slots, self.layout.page_size
        piece_slots = page_size or block_slots

        def start_piece(piece, _):
            at = piece * piece_slots
            if page_size is None:
                source_row, first = row, block * block_slots
            else:
                page = block * (block_slots // page_size) + piece
                source_row, first = self.table_ref[row * self.layout.pages_per_sequence + page], 0
            count = jnp.minimum(used - at, piece_slots)
            for index, (cache, buffer) in enumerate(zip(self.caches, self.buffers, strict=True)):
                pltpu.make_async_copy(
                    self._slots(cache.at[source_row], index, first, count),
                    self._slots(buffer.at[parity], index, at, count),
                    self.semaphores.at[parity, index],
                ).start()

        lax.fori_loop(0, pl.cdiv(used, piece_slots), start_piece, None)

    def wait(self, row, block, parity):
        for index, buffer in enumerate(self.buffers):
            # The semaphore counts bytes: this waits for all pieces.
            whole = self._slots(buffer.at[parity], index, 0, self.used_slots(row, block))
            pltpu.make_async_copy(whole, whole, self.semaphores.at[parity, index]).wait()

    def _slots(self, ref, index, first, count):
        """Returns a run of slots of a sequence, a page or a buffer: whole tiles of values, whole lines of scales."""
        if index < 2:
            num_kv_heads = self.layout.num_kv_heads
            return ref.at[pl.ds(num_tiles(first, num_kv_heads), num_tiles(count, num_kv_heads))]
        lanes = pl.ds(pl.multiple_of(first, LANES), pl.multiple_of(num_lanes(count), LANES))
        return ref.at[:, lanes] if len(ref.shape) == 2 else ref.at[:, 0, lanes]


def _kernel(layout: _Layout, num_queries: int, scale: float, newest_ref, used_ref, table_ref, q_ref, *refs):
    quantized = layout.dtype == jnp.int8
    num_caches = 4 if quantized else 2
    caches, (out_ref, lse_ref), refs = refs[:num_caches], refs[num_caches:][:2], refs[num_caches + 2 :]
    buffers, refs = refs[:num_caches], refs[num_caches:]
    k_words_ref, v_words_ref, largest_ref, total_ref, out_sum_ref, parity_ref, cursor_ref, semaphores = refs
    blocks = _Blocks(layout, used_ref, table_ref, caches, buffers, semaphores, cursor_ref)
    row = pl.program_id(1)

    @pl.when(row == 0)
    def _():
        parity_ref[0] = 0
        blocks.seek(0)
        blocks.fetch(0)
        blocks.fetch(1)

    largest_ref[...] = jnp.full_like(largest_ref, _LOWEST)
    total_ref[...] = jnp.zeros_like(total_ref)
    out_sum_ref[...] = jnp.zeros_like(out_sum_ref)

    # The rows of a group are (token, head, query head of that head), its columns (slot, head).
    num_rows, heads = q_ref.shape[2], layout.group_heads
    rows_per_token = num_rows // num_queries
    shape = (num_rows, layout.block_slots * heads)
    q_row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    same_head = q_row % rows_per_token // (rows_per_token // heads) == column % heads
    slot = jnp.where(same_head, column // heads, jnp.iinfo(jnp.int32).max)
    tokens_older = num_queries - 1 - lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0) // rows_per_token

    def visit(block, parity):
        blocks.wait(row, block, parity)
        used = blocks.used_slots(row, block)
        if not quantized:  # int8 is never NaN
            _clear_unused(layout, buffers[1].at[parity], used)
        for words_ref, buffer in zip((k_words_ref, v_words_ref), buffers[:2], strict=True):
            words_ref[...] = _to_words(buffer[parity])
        scales = [_scales_of_columns(layout, buffer[parity], used) for buffer in buffers[2:]]
        # The buffers are free: while this block is computed, two are on their way.
        blocks.fetch(parity)

        newest = newest_ref[row] - block * layout.block_slots
        visible = slot <= jnp.minimum(newest - tokens_older, used - 1)
        for group in range(layout.num_groups):
            scores = _dot(q_ref[0, group], _keys_or_values(layout, k_words_ref, group, q_ref.dtype), contract=1)
            if quantized:
                scores *= scales[0][group]
            scores = jnp.where(visible, scores, -jnp.inf)
            largest = jnp.maximum(largest_ref[group], jnp.max(scores, 1, keepdims=True))
            weights = jnp.exp2((scores - largest) * (scale * _LOG2_E))
            shrink = jnp.exp2((largest_ref[group] - largest) * (scale * _LOG2_E))
            largest_ref[group] = largest
            total_ref[group] = total_ref[group] * shrink + jnp.sum(weights, 1, keepdims=True)
            if quantized:
                weights *= scales[1][group]
            values = _keys_or_values(layout, v_words_ref, group, q_ref.dtype)
            out_sum_ref[group] = out_sum_ref[group] * shrink + _dot(weights.astype(values.dtype), values, contract=0)
        return 1 - parity

    parity_ref[0] = lax.fori_loop(*blocks.range(row), visit, parity_ref[0])

    seen = total_ref[...] > 0
    total = jnp.where(seen, total_ref[...], 1.0)
    out_ref[0, 0] = (out_sum_ref[...] / total).astype(out_ref.dtype)
    lse = jnp.where(seen, largest_ref[...] * scale + jnp.log(total), -jnp.inf)
    # From a column to a row of lanes: as a column it would take 128 times its size in memory.
    row_of, column_of = (lax.broadcasted_iota(jnp.int32, (num_rows, num_rows), axis) for axis in (0, 1))
    lse_ref[0, 0] = jnp.sum(jnp.where(row_of == column_of, lse, 0.0), 1, keepdims=True)


def _to_words(tiles: Array) -> Array:
    """Returns rows [tiles, 8, H] as 32-bit words; a word holds one column of one, two or four rows."""
    return pltpu.bitcast(tiles.reshape(-1, tiles.shape[-1]), jnp.int32)


def _keys_or_values(layout: _Layout, words_ref, group: int, dtype: jnp.dtype) -> Array:
    """Returns one group's part of a block, [slots * heads, H]."""
    words_per_slot = max(layout.num_kv_heads // layout.rows_per_word, 1)
    num_words = words_ref.shape[0] // words_per_slot
    words = words_ref[pl.ds(group, num_words, words_per_slot), :]
    return pltpu.bitcast(words, layout.dtype).astype(dtype)


def _clear_unused(layout: _Layout, v_ref, used) -> None:
    """Zeroes what follows the used slots in the last block of values: it may be NaN, and 0 * NaN would spread."""

    @pl.when(used < layout.block_slots)
    def _():
        words = _to_words(v_ref[...])
        row = lax.broadcasted_iota(jnp.int32, words.shape, 0)
        used_rows = used * layout.num_kv_heads
        # An odd number of bfloat16 rows (there is one head) ends in the middle of a word.
        last = jnp.where(row < pl.cdiv(used_rows, layout.rows_per_word), 0xFFFF, 0)
        kept = words & jnp.where(row < used_rows // layout.rows_per_word, -1, last)
        v_ref[...] = pltpu.bitcast(kept, layout.dtype).reshape(v_ref.shape)


def _scales_of_columns(layout: _Layout, scales_KS: Array, used) -> list[Array]:
    """Returns for each group one row [1, slots * heads] with the scale of each column; 0 after the used slots."""
    slot = lax.broadcasted_iota(jnp.int32, scales_KS.shape, 1)
    scales_KS = jnp.where(slot < used, scales_KS, 0.0)
    heads = layout.group_heads
    if heads == 1:  # one head in all: columns are slots
        return [scales_KS]
    lane, head = (lax.broadcasted_iota(jnp.int32, (layout.num_kv_heads, LANES), axis) for axis in (1, 0))
    rows = [[] for _ in range(layout.num_groups)]
    for first in range(0, layout.block_slots, LANES):
        for part in range(heads):  # LANES slots have `heads * LANES` columns
            which = (part * LANES + lane) // heads
            repeated_KL = jnp.take_along_axis(scales_KS[:, first : first + LANES], which, axis=1)
            for group, row in enumerate(rows):
                own = jnp.where(group * heads + lane % heads == head, repeated_KL, 0.0)
                row.append(jnp.sum(own, 0, keepdims=True))
    return [jnp.concatenate(row, 1) for row in rows]


def _dot(a: Array, b: Array, contract: int) -> Array:
    """Returns the float32 product over the columns of a, and the given dimension of b."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=("chunk_size", "scale", "tiles", "interpret"))
def attend(
    q_BTNH, k_cache, v_cache, lengths_B, page_table, kv_offset, chunk_size, scale, tiles: Tiles, interpret=False
):
    """Returns (out_BTNH, lse_BTN), computed with the tiles given."""
    (B, T, N, H), (S, K) = q_BTNH.shape, k_cache.shape[1:3]
    page_size, pages_per_sequence = (None, 1) if page_table is None else (S, page_table.shape[1])
    quantized = isinstance(k_cache, QuantizedArray)
    values = [cache.values if quantized else cache for cache in (k_cache, v_cache)]
    layout = _Layout(values[0].dtype, K, page_size, pages_per_sequence, tiles.block_slots)
    groups, rows, splits = layout.num_groups, T * N // layout.num_groups, tiles.num_splits

    newest_B = newest_slot(lengths_B, chunk_size, kv_offset)
    used_B = jnp.clip(newest_B + 1, 0, S * pages_per_sequence)
    table = jnp.zeros(1, jnp.int32) if page_table is None else page_table.reshape(-1)
    q_BgRH = q_BTNH.reshape(B, T, groups, -1, H).swapaxes(1, 2).reshape(B, groups, rows, H)
    # These views are how XLA lays out the arrays anyway: nothing moves.
    caches = [x.reshape(-1, S * K // SUBLANES, SUBLANES, H) for x in values]
    buffer_shapes = [(tiles.block_slots * K // SUBLANES, SUBLANES, H)] * 2
    if quantized:
        caches += [cache.scales.transpose(0, 2, 3, 1) for cache in (k_cache, v_cache)]
        buffer_shapes += [(K, tiles.block_slots)] * 2

    num_words = tiles.block_slots * K // layout.rows_per_word
    out, lse = pl.pallas_call(
        functools.partial(_kernel, layout, T, scale),
        name="decode_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(splits, B),
            in_specs=[
                pl.BlockSpec((1, groups, rows, H), lambda split, row, *_: (row, 0, 0, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY) for _ in caches],
            ],
            out_specs=[
                pl.BlockSpec((1, 1, groups, rows, H), lambda split, row, *_: (split, row, 0, 0, 0)),
                pl.BlockSpec((1, 1, groups, 1, rows), lambda split, row, *_: (split, row, 0, 0, 0)),
            ],
            scratch_shapes=[
                *[pltpu.VMEM((2, *shape), x.dtype) for shape, x in zip(buffer_shapes, caches, strict=True)],
                *[pltpu.VMEM((num_words, H), jnp.int32) for _ in values],
                *[pltpu.VMEM((groups, rows, width), jnp.float32) for width in (1, 1, H)],
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, len(caches))),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((splits, *q_BgRH.shape), q_BTNH.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, B, groups, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        cost_estimate=_cost(q_BTNH, caches, S * pages_per_sequence, k_cache.shape[0] * k_cache.shape[1]),
        interpret=interpret,
    )(newest_B, used_B, table, q_BgRH, *caches)

    def ungroup(x, *width):
        return x.reshape(splits, B, groups, T, -1, *width).swapaxes(2, 3).reshape(splits, B, T, N, *width)

    out, lse = ungroup(out, H), ungroup(lse)
    if splits == 1:
        return out[0], lse[0]
    out, lse = merge_partial_attention(list(out), list(lse))
    return out.astype(q_BTNH.dtype), lse


def _cost(q_BTNH: Array, caches: list[Array], num_slots: int, num_held: int) -> pl.CostEstimate:
    """Returns for XLA's scheduler what sequences of `num_slots` cost, of the `num_held` slots of the caches."""
    held_bytes = sum(x.size * x.dtype.itemsize for x in caches)
    num_scores = math.prod(q_BTNH.shape[:3]) * num_slots
    return pl.CostEstimate(
        flops=4 * num_scores * q_BTNH.shape[3],
        transcendentals=num_scores,
        bytes_accessed=held_bytes * q_BTNH.shape[0] * num_slots // num_held,
    )


def decode_attention(q_BTNH, k_cache, v_cache, lengths_B, page_table, kv_offset, chunk_size, scale):
    tiles = choose_tiles(target().device_kind, k_cache.shape, _dtype(k_cache), page_table)
    return attend(q_BTNH, k_cache, v_cache, lengths_B, page_table, kv_offset, chunk_size, scale, tiles)


def decode_attention_interpreted(q_BTNH, k_cache, v_cache, lengths_B, page_table, kv_offset, chunk_size, scale):
    # Small blocks, so that small inputs have several of them.
    page_size = 1 if page_table is None else k_cache.shape[1]
    tiles = Tiles(-(-LANES // page_size) * page_size, num_splits=1)
    return attend(q_BTNH, k_cache, v_cache, lengths_B, page_table, kv_offset, chunk_size, scale, tiles, INTERPRET)


def _dtype(cache: Array | QuantizedArray) -> jnp.dtype:
    return (cache.values if isinstance(cache, QuantizedArray) else cache).dtype


def refuse(q_BTNH, k_cache, v_cache, lengths_B, page_table, *others) -> str | None:
    """Returns why Mosaic cannot serve a call, None if it can."""
    return refuse_platform() or refuse_arguments(q_BTNH, k_cache, v_cache, lengths_B, page_table)


def refuse_arguments(q_BTNH, k_cache, v_cache, lengths_B, page_table, *others) -> str | None:
    """Returns why the kernel is not made for a call, None if it is."""
    (_, T, N, _), (num_rows, slots, K, H) = q_BTNH.shape, k_cache.shape
    dtype, quantized = _dtype(k_cache), isinstance(k_cache, QuantizedArray)
    if 0 in (*q_BTNH.shape, num_rows, slots) or (page_table is not None and page_table.size == 0):
        return "an array is empty"
    if dtype != _dtype(v_cache):
        return f"keys are {dtype} and values {_dtype(v_cache)}"
    if q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"queries are {q_BTNH.dtype}, not float32 or bfloat16"
    if T * N // K > _MAX_QUERIES:
        return f"{T} tokens with {N // K} queries for each kv head are more than {_MAX_QUERIES} queries"
    if H != LANES:
        return f"head_dim={H} is not {LANES}: such a cache lies in memory in another order"
    few = (1, 4) if quantized else (1, 2, 4)
    if K % SUBLANES and K not in few:
        return f"{K} key/value heads are not {', '.join(map(str, few))} or a multiple of {SUBLANES}"
    whole = LANES if quantized else max(SUBLANES // K, 1)
    if slots % whole:
        return f"{slots} slots {'in a page ' if page_table is not None else ''}are not a multiple of {whole}"
    if page_table is not None:
        if slots * slot_bytes(K, H, dtype) > MAX_BLOCK_BYTES:
            return f"a page of {slots} slots is larger than {MAX_BLOCK_BYTES >> 20} MiB"
        if page_table.size * 4 > _MAX_TABLE_BYTES:
            return f"a page table of {page_table.size} entries does not fit scalar memory ({_MAX_TABLE_BYTES // 4})"
    return None
