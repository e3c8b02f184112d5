"""Flash attention on GPU: three Triton kernels, forward, gradient to the queries, gradients to keys and values.

Tiled: a program has a block of queries of one head, in the third kernel a block of keys and values with all query heads
of their group, one after the other. The blocks of the other side that it sees pass by, from a list that XLA makes on
the GPU: first those in which every pair is visible, in a loop without a mask, then the others. Hidden blocks are
neither read nor computed. Two kernels for the gradients cost seven products a tile instead of five, but no program adds
to what another writes: results are the same every time.

In registers: float32 sums and the statistics of the softmax. In shared memory: the block that stays, and a pipeline of
those that pass by. The grid: blocks (fastest), heads, rows of the batch; causal blocks with most keys begin first.

Bytes: programs load keys and values again for each block of queries and each head, 55 times the least for Scout's 8192
tokens. Programs that run at the same time share a few heads, whose keys and values (4 MB a kv head) stay in the L2
cache.

On an H200, Scout's 8192 tokens, causal: forward 1.80 ms (382 TFLOP/s), gradient to the queries 2.0 ms, to keys and
values 3.1 ms. cuDNN takes 1.19 ms forward. Eight packed documents: 0.42 ms.

cuDNN's attention (`jax.nn.dot_product_attention`) knows causal masks, windows and lengths; documents, explicit
positions and chunks would be a T x S array. So it does not serve here.

Flash attention: Dao et al., 2022; online softmax: Milakov and Gimelshein, 2018.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from pallas_kernels.attention.blocks import (
    Keys,
    Queries,
    every_pair,
    key_ranges,
    make_labels,
    may_see,
    pad_labels,
    query_ranges,
    see_all,
    visible,
)
from pallas_kernels.attention.tiles import gpu_tiles
from pallas_kernels.gpu import LOWEST, Span, dot, exp2, load, power_of_two, refuse_platform, store
from pallas_kernels.residuals import name_attention

_LOG2_E = math.log2(math.e)
# Sums of wider heads would not fit in the registers.
_MAX_HEAD_DIM = 128


class Visits(NamedTuple):
    """Which blocks the blocks of the other side see.

    Attributes:
        order: numbers of blocks; first those that see all of each other, then those that do in part, then the rest.
        num_full: how many see all.
        num_seen: how many see something.
    """

    order: Int[Array, "B blocks others"]
    num_full: Int[Array, "B blocks"]
    num_seen: Int[Array, "B blocks"]


def list_visits(queries: Queries, keys: Keys, q_block: int, kv_block: int, by_keys: bool) -> Visits:
    """Returns the key blocks that each query block sees, or the query blocks that see each key block."""
    pairs = every_pair(query_ranges(queries, q_block), key_ranges(keys, kv_block))
    full, seen = see_all(*pairs), may_see(*pairs)
    if by_keys:
        full, seen = full.swapaxes(1, 2), seen.swapaxes(1, 2)
    num_others = full.shape[2]
    rank = jnp.where(full, 0, jnp.where(seen, 1, 2)) * num_others + jnp.arange(num_others)
    order = jnp.sort(rank, axis=2) % num_others
    return Visits(order.astype(jnp.int32), full.sum(2, dtype=jnp.int32), seen.sum(2, dtype=jnp.int32))


def _loop(visits: Visits, batch, block, visit, carry, repeats: int = 1):
    """Runs `carry = visit(carry, repeat, other, masked)` over the blocks that a block sees, once for each repeat."""
    num_full, num_seen = visits.num_full[batch, block], visits.num_seen[batch, block]

    def body(masked, first, count):
        def step(i, carry):
            repeat, nth = (0, i) if repeats == 1 else (lax.div(i, count), lax.rem(i, count))
            return visit(carry, repeat, visits.order[batch, block, first + nth], masked)

        return step

    carry = lax.fori_loop(0, num_full * repeats, body(False, 0, num_full), carry)
    num_partial = num_seen - num_full
    return lax.fori_loop(0, num_partial * repeats, body(True, num_full, num_partial), carry)


def _labels(labels, batch, span: Span, axis: int):
    """Returns the labels of a block, along one axis of a matrix of scores."""
    return type(labels)(*(None if x is None else jnp.expand_dims(x[batch, span.at], 1 - axis) for x in labels))


def _visible(queries: Queries, keys: Keys, rows: Span, axis: int) -> tuple[Array, Span]:
    """Returns the mask of a matrix of scores, and of the rows of the other block those that are seen at all.

    What nobody sees, padding among it, is not read: it may hold NaN, and 0 * NaN would spread.

    Args:
        axis: along which the mask belongs to the block that stays.
    """
    mask = visible(queries, keys)
    return mask, rows._replace(mask=jnp.max(mask.astype(jnp.int32), axis) > 0)


def _forward(q, k, v, queries, keys, scale, interpret):
    (B, T, N, H), K = q.shape, k.shape[2]
    t = gpu_tiles(q.dtype.itemsize).forward
    queries, keys = pad_labels(queries, t.q_block), pad_labels(keys, t.kv_block)

    def attention_forward(visits, queries, keys, q_ref, k_ref, v_ref, out_ref, lse_ref):
        batch, head, kv_head = pl.program_id(2), pl.program_id(1), lax.div(pl.program_id(1), N // K)
        block = pl.num_programs(0) - 1 - pl.program_id(0)  # later queries see more keys: the longest work first
        q_rows, numbers = Span.block(block, t.q_block, T), Span.block(0, power_of_two(H, 16), H)
        q_block = load(q_ref, batch, q_rows, head, numbers)
        q_labels = _labels(queries, batch, q_rows, axis=0)

        def visit(carry, _, kv_block, masked):
            largest, total, out = carry
            rows = Span(kv_block * t.kv_block, t.kv_block, None)
            if masked:
                mask, rows = _visible(q_labels, _labels(keys, batch, rows, axis=1), rows, 0)
            scores = dot(q_block, load(k_ref, batch, rows, kv_head, numbers), (1, 1), interpret)
            if masked:
                scores = jnp.where(mask, scores, -jnp.inf)
            new_largest = jnp.maximum(largest, jnp.max(scores, 1))
            shift = new_largest * (scale * _LOG2_E)
            weights = exp2(scores, scale * _LOG2_E, shift[:, None], interpret)
            shrink = exp2(largest, scale * _LOG2_E, shift, interpret)
            values = load(v_ref, batch, rows, kv_head, numbers)
            added = dot(weights.astype(values.dtype), values, (1, 0), interpret)
            return new_largest, total * shrink + jnp.sum(weights, 1), out * shrink[:, None] + added

        carry = (
            jnp.full(t.q_block, LOWEST, jnp.float32),
            jnp.zeros(t.q_block, jnp.float32),
            jnp.zeros((t.q_block, numbers.size), jnp.float32),
        )
        largest, total, out = _loop(visits, batch, block, visit, carry)
        # A row that saw nothing has the sum 0. NaN is not 0: it came from the inputs and has to come out.
        nothing = total == 0
        total = jnp.where(nothing, 1.0, total)
        store(out_ref, out / total[:, None], batch, q_rows, head, numbers)
        lse = jnp.where(nothing, -jnp.inf, largest * scale + jnp.log(total))
        store(lse_ref, lse, batch, head, q_rows)

    return pl.pallas_call(
        attention_forward,
        grid=(pl.cdiv(T, t.q_block), N, B),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=t.num_warps, num_stages=t.num_stages),
        interpret=interpret,
        name="attention_forward",
    )(list_visits(queries, keys, t.q_block, t.kv_block, by_keys=False), queries, keys, q, k, v)


def _query_gradients(q, k, v, d_out, lse, delta, queries, keys, scale, interpret):
    (B, T, N, H), K = q.shape, k.shape[2]
    t = gpu_tiles(q.dtype.itemsize).query_gradients
    queries, keys = pad_labels(queries, t.q_block), pad_labels(keys, t.kv_block)

    def attention_query_gradients(visits, queries, keys, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_q_ref):
        batch, head, kv_head = pl.program_id(2), pl.program_id(1), lax.div(pl.program_id(1), N // K)
        block = pl.num_programs(0) - 1 - pl.program_id(0)
        q_rows, numbers = Span.block(block, t.q_block, T), Span.block(0, power_of_two(H, 16), H)
        q_block, d_out_block = (load(ref, batch, q_rows, head, numbers) for ref in (q_ref, d_out_ref))
        lse, delta = (load(ref, batch, head, q_rows)[:, None] for ref in (lse_ref, delta_ref))
        lse *= _LOG2_E
        q_labels = _labels(queries, batch, q_rows, axis=0)

        def visit(d_q, _, kv_block, masked):
            rows = Span(kv_block * t.kv_block, t.kv_block, None)
            if masked:
                mask, rows = _visible(q_labels, _labels(keys, batch, rows, axis=1), rows, 0)
            k_block, v_block = (load(ref, batch, rows, kv_head, numbers) for ref in (k_ref, v_ref))
            weights = exp2(dot(q_block, k_block, (1, 1), interpret), scale * _LOG2_E, lse, interpret)
            d_scores = weights * (dot(d_out_block, v_block, (1, 1), interpret) - delta)
            if masked:
                d_scores = jnp.where(mask, d_scores, 0.0)
            return d_q + dot(d_scores.astype(k_block.dtype), k_block, (1, 0), interpret)

        d_q = _loop(visits, batch, block, visit, jnp.zeros((t.q_block, numbers.size), jnp.float32))
        store(d_q_ref, d_q * scale, batch, q_rows, head, numbers)

    return pl.pallas_call(
        attention_query_gradients,
        grid=(pl.cdiv(T, t.q_block), N, B),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=t.num_warps, num_stages=t.num_stages),
        interpret=interpret,
        name="attention_query_gradients",
    )(list_visits(queries, keys, t.q_block, t.kv_block, by_keys=False), queries, keys, q, k, v, d_out, lse, delta)


def _key_gradients(q, k, v, d_out, lse, delta, queries, keys, scale, interpret):
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    t = gpu_tiles(q.dtype.itemsize).key_gradients
    queries, keys = pad_labels(queries, t.q_block), pad_labels(keys, t.kv_block)

    def attention_key_gradients(
        visits, queries, keys, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_k_ref, d_v_ref
    ):
        batch, kv_head, block = pl.program_id(2), pl.program_id(1), pl.program_id(0)
        rows, numbers = Span.block(block, t.kv_block, S), Span.block(0, power_of_two(H, 16), H)
        k_block, v_block = (load(ref, batch, rows, kv_head, numbers) for ref in (k_ref, v_ref))
        k_labels = _labels(keys, batch, rows, axis=0)

        def visit(carry, nth_head, q_block, masked):
            d_k, d_v = carry
            head = kv_head * (N // K) + nth_head
            q_rows = Span(q_block * t.q_block, t.q_block, None)
            if masked:
                mask, q_rows = _visible(_labels(queries, batch, q_rows, axis=1), k_labels, q_rows, 0)
            q_block, d_out_block = (load(ref, batch, q_rows, head, numbers) for ref in (q_ref, d_out_ref))
            lse, delta = (load(ref, batch, head, q_rows)[None, :] for ref in (lse_ref, delta_ref))
            # Transposed, keys in rows: every product then has its left side as it comes.
            weights = exp2(dot(k_block, q_block, (1, 1), interpret), scale * _LOG2_E, lse * _LOG2_E, interpret)
            d_scores = weights * (dot(v_block, d_out_block, (1, 1), interpret) - delta)
            if masked:
                weights, d_scores = jnp.where(mask, weights, 0.0), jnp.where(mask, d_scores, 0.0)
            d_v += dot(weights.astype(q_block.dtype), d_out_block, (1, 0), interpret)
            d_k += dot(d_scores.astype(q_block.dtype), q_block, (1, 0), interpret)
            return d_k, d_v

        zeros = jnp.zeros((t.kv_block, numbers.size), jnp.float32)
        d_k, d_v = _loop(visits, batch, block, visit, (zeros, zeros), repeats=N // K)
        store(d_k_ref, d_k * scale, batch, rows, kv_head, numbers)
        store(d_v_ref, d_v, batch, rows, kv_head, numbers)

    return pl.pallas_call(
        attention_key_gradients,
        grid=(pl.cdiv(S, t.kv_block), K, B),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=t.num_warps, num_stages=t.num_stages),
        interpret=interpret,
        name="attention_key_gradients",
    )(list_visits(queries, keys, t.q_block, t.kv_block, by_keys=True), queries, keys, q, k, v, d_out, lse, delta)


def _backward(q, k, v, labels, scale, interpret, out, lse, d_out, d_lse):
    # d scores = weights * (d weights - delta): sum(out * d_out) comes from the normalisation, d_lse from the result.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1) - d_lse
    arguments = q, k, v, d_out, lse.swapaxes(1, 2), delta.swapaxes(1, 2), *labels, scale, interpret
    return _query_gradients(*arguments), *_key_gradients(*arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, labels, scale, interpret):
    out, lse_BNT = _forward(q, k, v, *labels, scale, interpret)
    return out, lse_BNT.swapaxes(1, 2)


def _attention_forward(q, k, v, labels, scale, interpret):
    out, lse = name_attention(*_attention(q, k, v, labels, scale, interpret))
    return (out, lse), (q, k, v, labels, out, lse)


def _attention_backward(scale, interpret, residuals, cotangents):
    q, k, v, labels, out, lse = residuals
    return *_backward(q, k, v, labels, scale, interpret, out, lse, *cotangents), None


_attention.defvjp(_attention_forward, _attention_backward)


def _make_labels(q_BTNH, k_BSKH, given, causal, chunk_size) -> tuple[Queries, Keys]:
    """Returns the labels as JAX arrays: lists of blocks are made on the GPU, they are not constants of the program."""
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    positions = [
        jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (B, length)) if x is None else x
        for x, length in zip(given[:2], (T, S), strict=True)
    ]
    return make_labels((B, T, S), *positions, *given[2:], causal, chunk_size)


@functools.partial(jax.jit, static_argnames=("causal", "chunk_size", "scale", "interpret"))
def attention_gradients(
    q_BTNH, k_BSKH, v_BSKH, given, out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN, causal, chunk_size, scale, interpret=False
):
    labels = _make_labels(q_BTNH, k_BSKH, given, causal, chunk_size)
    results = out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN
    return _backward(q_BTNH, k_BSKH, v_BSKH, labels, scale, interpret, *results)


@functools.partial(jax.jit, static_argnames=("causal", "chunk_size", "scale", "interpret"))
def attention(
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS,
    causal, chunk_size, scale, interpret=False,
):  # fmt: skip
    if 0 in (*q_BTNH.shape[:2], k_BSKH.shape[1]):
        return jnp.zeros_like(q_BTNH), jnp.full(q_BTNH.shape[:3], -jnp.inf)
    given = q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS
    labels = _make_labels(q_BTNH, k_BSKH, given, causal, chunk_size)
    return _attention(q_BTNH, k_BSKH, v_BSKH, labels, scale, interpret)


def refuse(q_BTNH, *_) -> str | None:
    """Returns why the kernels cannot serve a call, None if they can."""
    return refuse_platform() or refuse_arrays(q_BTNH)


def refuse_arrays(q_BTNH, *_) -> str | None:
    """Returns why the kernels are not made for a call on any platform, None if they are."""
    if q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernels take float32 and bfloat16, not {q_BTNH.dtype}"
    if q_BTNH.shape[-1] > _MAX_HEAD_DIM:
        return f"head_dim={q_BTNH.shape[-1]} is larger than {_MAX_HEAD_DIM}"
    return None
