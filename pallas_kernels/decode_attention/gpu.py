"""Decode attention on GPU: one Triton kernel over the used slots of the cache, split along the sequence.

Tiled: a program has one kv head of a part of one sequence. The queries of that head, of all its tokens, are the rows of
one product (16 at least, as tensor cores want); blocks of 64 slots pass by, each within one page. int8 becomes the
queries' dtype in registers; its scales multiply scores and weights, one number for a slot.

In registers: queries, float32 sums, the statistics of the softmax. In shared memory: a pipeline of blocks of the cache.

The grid: parts, kv heads, sequences. There are enough parts for two programs on each core, and they share what a
sequence uses evenly. XLA merges them by their log-sum-exp: some float32 numbers for each query and part.

Bytes: the used slots, once. Queries and results of all parts add at most 4% to that at the shapes of
`scripts/check_gpu_compile.sh`.

On an H200, Scout's heads: 32 sequences of 8192 slots 0.26 ms (4.1 TB/s), one of 131,072 slots 0.13 ms (4.0).

cuDNN's attention, as `jax.nn.dot_product_attention` offers it, takes neither pages nor int8.

Splits along the sequence: flash-decoding, Dao et al., 2023.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_attention.slots import newest_slot
from pallas_kernels.decode_attention.tiles import choose_gpu_tiles
from pallas_kernels.gpu import LOWEST, Span, dot, exp2, load, power_of_two, refuse_platform, refuse_size, store, widen
from pallas_kernels.quantized import QuantizedArray

_LOG2_E = math.log2(math.e)

# Scores and sums of more would not fit in the registers.
_MAX_QUERIES = 128
_MAX_HEAD_DIM = 128


@functools.partial(jax.jit, static_argnames=("chunk_size", "scale", "interpret"))
def decode_attention(
    q_BTNH, k_cache, v_cache, lengths_B, page_table, kv_offset, chunk_size, scale, interpret=False
):  # fmt: skip
    (B, T, N, H), (slots, K) = q_BTNH.shape, k_cache.shape[1:3]
    num_slots = slots if page_table is None else slots * page_table.shape[1]
    num_rows, quantized = T * N // K, isinstance(k_cache, QuantizedArray)
    page_size = None if page_table is None else slots
    t = choose_gpu_tiles(B * K, num_slots, num_rows, page_size, q_BTNH.dtype.itemsize)
    # Rows are (token, query head of the kv head).
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, num_rows, H)

    def decode_attention(lengths_ref, offset_ref, table_ref, q_ref, k_ref, v_ref, out_ref, lse_ref):
        split, kv_head, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        rows, numbers = Span(0, t.rows, jnp.arange(t.rows) < num_rows), Span.block(0, power_of_two(H, 16), H)
        q = load(q_ref, batch, kv_head, rows, numbers)
        newest = newest_slot(lengths_ref[batch], chunk_size, offset_ref[batch if kv_offset.ndim else 0])
        used = jnp.clip(newest + 1, 0, num_slots)
        # A token that is older sees fewer slots.
        last = jnp.minimum(newest - (T - 1) + lax.div(jnp.arange(t.rows), N // K), used - 1)

        def visit(block, carry):
            largest, total, out = carry
            start = block * t.block_slots
            slot = start + jnp.arange(t.block_slots)
            if table_ref is None:
                first = batch * slots + start
            else:
                first = table_ref[batch, lax.div(start, slots)] * slots + lax.rem(start, slots)
            place = Span(first, t.block_slots, slot < used)
            k, v = ((ref.values if quantized else ref) for ref in (k_ref, v_ref))
            scores = dot(q, widen(load(k, place, kv_head, numbers), q.dtype, interpret), (1, 1), interpret)
            if quantized:
                scores *= load(k_ref.scales, place, kv_head)[None, :]
            scores = jnp.where(slot[None, :] <= last[:, None], scores, -jnp.inf)
            new_largest = jnp.maximum(largest, jnp.max(scores, 1))
            shift = new_largest * (scale * _LOG2_E)
            weights = exp2(scores, scale * _LOG2_E, shift[:, None], interpret)
            shrink = exp2(largest, scale * _LOG2_E, shift, interpret)
            total = total * shrink + jnp.sum(weights, 1)
            if quantized:
                weights *= load(v_ref.scales, place, kv_head)[None, :]
            added = dot(
                weights.astype(q.dtype), widen(load(v, place, kv_head, numbers), q.dtype, interpret), (1, 0), interpret
            )
            return new_largest, total, out * shrink[:, None] + added

        carry = (
            jnp.full(t.rows, LOWEST, jnp.float32),
            jnp.zeros(t.rows, jnp.float32),
            jnp.zeros((t.rows, numbers.size), jnp.float32),
        )
        num_blocks = lax.div(used + (t.block_slots - 1), t.block_slots)
        # Every split has its part of what is used, however short the sequence.
        first, end = (lax.div(i * num_blocks, t.num_splits) for i in (split, split + 1))
        largest, total, out = lax.fori_loop(first, end, visit, carry)
        nothing = total == 0
        total = jnp.where(nothing, 1.0, total)
        store(out_ref, out / total[:, None], split, batch, kv_head, rows, numbers)
        store(lse_ref, jnp.where(nothing, -jnp.inf, largest * scale + jnp.log(total)), split, batch, kv_head, rows)

    def flat(cache):
        if quantized:
            return QuantizedArray(cache.values.reshape(-1, K, H), cache.scales.reshape(-1, K))
        return cache.reshape(-1, K, H)

    out, lse = pl.pallas_call(
        decode_attention,
        grid=(t.num_splits, K, B),
        out_shape=[
            jax.ShapeDtypeStruct((t.num_splits, *q_BKRH.shape), q_BTNH.dtype if t.num_splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((t.num_splits, B, K, num_rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=t.num_warps, num_stages=t.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(jnp.asarray(lengths_B, jnp.int32), kv_offset.reshape(-1), page_table, q_BKRH, flat(k_cache), flat(v_cache))

    if t.num_splits == 1:
        out, lse = out[0], lse[0]
    else:
        out, lse = _merge(out, lse)
    out, lse = (x.reshape(B, K, T, N // K, *x.shape[3:]).swapaxes(1, 2) for x in (out, lse))
    return out.reshape(q_BTNH.shape).astype(q_BTNH.dtype), lse.reshape(B, T, N)


def _merge(outs, lses):
    """Returns what `merge_partial_attention` does, of parts that lie in one array: there may be hundreds."""
    largest = lses.max(0)
    shares = jnp.exp(lses - jnp.where(jnp.isneginf(largest), 0.0, largest))
    total = shares.sum(0)
    total = jnp.where(total == 0, 1.0, total)
    return (shares[..., None] * outs).sum(0) / total[..., None], largest + jnp.log(total)


def refuse(q_BTNH, k_cache, v_cache, lengths_B, page_table, *others) -> str | None:
    """Returns why the kernel cannot serve a call, None if it can."""
    return refuse_platform() or refuse_arguments(q_BTNH, k_cache, v_cache, lengths_B, page_table)


def refuse_arguments(q_BTNH, k_cache, v_cache, lengths_B, page_table, *others) -> str | None:
    """Returns why the kernel is not made for a call on any platform, None if it is."""
    (_, T, N, H), (num_rows, slots, K, _) = q_BTNH.shape, k_cache.shape
    quantized = isinstance(k_cache, QuantizedArray)
    if 0 in (*q_BTNH.shape, num_rows, slots) or (page_table is not None and page_table.size == 0):
        return "an array is empty"
    if quantized != isinstance(v_cache, QuantizedArray):
        return f"keys are {k_cache.dtype} and values {v_cache.dtype}"
    if q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"queries are {q_BTNH.dtype}, not float32 or bfloat16"
    if T * N // K > _MAX_QUERIES:
        return f"{T} tokens with {N // K} queries for each kv head are more than {_MAX_QUERIES} queries"
    if H > _MAX_HEAD_DIM:
        return f"head_dim={H} is larger than {_MAX_HEAD_DIM}"
    if page_table is not None and slots % 16:
        return f"{slots} slots in a page are not a multiple of 16"
    return refuse_size(keys=k_cache.values, values=v_cache.values) if quantized else None
