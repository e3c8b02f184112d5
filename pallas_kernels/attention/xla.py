"""Attention by XLA alone, made for CPU: flash attention over blocks of queries and keys, in dynamic loops.

Tiled: `q_block` queries with all their heads (the heads that share a kv head are folded into the rows of one matmul)
against `kv_block` keys; one such tile of scores lives in the second-level cache. Walked over: every query block, and
for each of them only the key blocks that it sees, first those it sees entirely (no mask is computed), then those it
sees in part. Which block sees which follows from the smallest and largest position, chunk and segment of each block,
so chunks, packing, padding and empty caches cost nothing, in any order of positions.

Forward: online softmax (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022). Backward: scores again from
the saved log-sum-exp, five matmuls per tile. Neither holds a T x S array.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.blocks import (
    FULL,
    HIDDEN,
    PARTIAL,
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
from pallas_kernels.residuals import name_attention
from pallas_kernels.slices import from_bits, read_slice, to_bits

# Below every score, yet finite: -inf - -inf would be NaN.
_LOWEST = -1e30


class _Plan(NamedTuple):
    """Blocks of one call: their sizes, the query side padded to whole blocks, and what each query block visits."""

    q_block: int
    kv_block: int
    queries: Queries
    keys: Keys
    order_BTS: Int[Array, "B nT nS"]
    num_full_BT: Int[Array, "B nT"]
    num_seen_BT: Int[Array, "B nT"]


def block_sizes(num_queries: int, num_keys: int, num_heads: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Returns (queries, keys) per block: at most 128 x 64, and about 64k scores over all heads (256 KB)."""
    most = min(max(1024 // num_heads, 32), 128)
    q_block = _even(num_queries, most)
    # A bfloat16 product with one row leaves XLA:CPU's fast path.
    return max(q_block, 2 if dtype == jnp.bfloat16 else 1), _even(num_keys, 64)


def _even(length: int, most: int) -> int:
    """Returns the size of the fewest equal blocks of at most `most` that cover `length`, in multiples of 8."""
    if length <= most:
        return length
    num_blocks = -(-length // most)
    return min(-(-length // (8 * num_blocks)) * 8, most)


def block_kinds(queries: Queries, keys: Keys, q_block: int, kv_block: int) -> Int[Array, "B nT nS"]:
    """Returns for each pair of blocks whether every key is visible to every query (FULL), none (HIDDEN), or PARTIAL.

    Decided from the ranges of each block alone, so PARTIAL may turn out empty; FULL and HIDDEN are certain.
    """
    pairs = every_pair(
        query_ranges(pad_labels(queries, q_block), q_block), key_ranges(pad_labels(keys, kv_block), kv_block)
    )
    return jnp.where(see_all(*pairs), FULL, jnp.where(may_see(*pairs), PARTIAL, HIDDEN))


def _make_plan(shape, dtype, queries: Queries, keys: Keys) -> _Plan:
    num_queries, num_keys, num_heads = shape
    q_block, kv_block = block_sizes(num_queries, num_keys, num_heads, dtype)
    kinds = block_kinds(queries, keys, q_block, kv_block)
    order = jnp.argsort(kinds, axis=2, stable=True)
    queries = pad_labels(queries, q_block)
    return _Plan(q_block, kv_block, queries, keys, order, (kinds == FULL).sum(2), (kinds != HIDDEN).sum(2))


def _cut(labels, batch: Array, start: Array, size: int, axis: int):
    """Returns the labels of one block, along one axis of a tile."""
    return type(labels)(
        *(
            None if x is None else jnp.expand_dims(lax.dynamic_slice(x, (batch, start), (1, size))[0], 1 - axis)
            for x in labels
        )
    )


def _fold(block: Float[Array, "Q N ..."], num_kv_heads: int) -> Float[Array, "K GQ ..."]:
    """Returns a query block with the heads that share a kv head as rows of one matrix."""
    Q, _, *rest = block.shape
    return block.reshape(Q, num_kv_heads, -1, *rest).swapaxes(0, 1).swapaxes(1, 2).reshape(num_kv_heads, -1, *rest)


def _unfold(rows: Float[Array, "K GQ ..."], q_block: int) -> Float[Array, "Q N ..."]:
    K, _, *rest = rows.shape
    return rows.reshape(K, -1, q_block, *rest).swapaxes(1, 2).swapaxes(0, 1).reshape(q_block, -1, *rest)


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _visit_keys(plan: _Plan, k, v, batch, q_index, visit, carry):
    """Runs `carry = visit(carry, start, k_KSH, v_KSH, mask_QS or None)` over the key blocks that a query block sees."""
    size, num_keys, num_kv_heads = plan.kv_block, *k.shape[1:3]
    queries = _cut(plan.queries, batch, q_index * plan.q_block, plan.q_block, axis=0)

    def read(array, start):
        block = read_slice(array, (batch, start, 0, 0), (1, size, num_kv_heads, array.shape[3]))
        return block[0].swapaxes(0, 1)

    def visit_full(i, carry):
        start = plan.order_BTS[batch, q_index, i] * size
        return visit(carry, start, read(k, start), read(v, start), None)

    def visit_partial(i, carry):
        first = plan.order_BTS[batch, q_index, i] * size
        start = jnp.minimum(first, num_keys - size)
        mask = visible(queries, _cut(plan.keys, batch, start, size, axis=1))
        if num_keys % size:
            mask &= start + jnp.arange(size) >= first
        # What nobody sees may hold anything, also NaN, and 0 * NaN would spread.
        seen = mask.any(0)[:, None]
        return visit(carry, start, jnp.where(seen, read(k, start), 0), jnp.where(seen, read(v, start), 0), mask)

    num_full, num_seen = plan.num_full_BT[batch, q_index], plan.num_seen_BT[batch, q_index]
    carry = lax.fori_loop(0, num_full, visit_full, carry)
    return lax.fori_loop(num_full, num_seen, visit_partial, carry)


def _mask_rows(mask_QS: Array, num_heads_per_kv: int) -> Array:
    """Returns the mask of one head repeated for the folded rows: [1, G * Q, S]."""
    return jnp.tile(mask_QS, (num_heads_per_kv, 1))[None]


def _pad_queries(array: Array, plan: _Plan, value: float = 0) -> Array:
    missing = plan.queries.low.shape[1] - array.shape[1]
    return jnp.pad(array, ((0, 0), (0, missing)) + ((0, 0),) * (array.ndim - 2), constant_values=value)


def _read_queries(array: Array, plan: _Plan, batch: Array, q_index: Array, num_kv_heads: int) -> Array:
    starts = (batch, q_index * plan.q_block, *(0,) * (array.ndim - 2))
    return _fold(read_slice(array, starts, (1, plan.q_block, *array.shape[2:]))[0], num_kv_heads)


def _forward(q, k, v, queries, keys, scale):
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    plan = _make_plan((T, S, N), q.dtype, queries, keys)
    q = _pad_queries(q, plan)
    num_q_blocks = plan.order_BTS.shape[1]

    def attend(index, outs):
        batch, q_index = index // num_q_blocks, index % num_q_blocks
        q_KRH = _read_queries(q, plan, batch, q_index, K)

        def visit(carry, start, k_KSH, v_KSH, mask_QS):
            largest_KR, sum_KR, out_KRH = carry
            scores_KRS = _dot("KRH,KSH->KRS", q_KRH, k_KSH)
            if mask_QS is not None:
                scores_KRS = jnp.where(_mask_rows(mask_QS, N // K), scores_KRS, -jnp.inf)
            new_largest_KR = jnp.maximum(largest_KR, scores_KRS.max(-1))
            weights_KRS = jnp.exp((scores_KRS - new_largest_KR[..., None]) * scale)
            shrink_KR = jnp.exp((largest_KR - new_largest_KR) * scale)
            sum_KR = sum_KR * shrink_KR + weights_KRS.sum(-1)
            added_KRH = _dot("KRS,KSH->KRH", weights_KRS.astype(v.dtype), v_KSH)
            return new_largest_KR, sum_KR, out_KRH * shrink_KR[..., None] + added_KRH

        rows = (K, q_KRH.shape[1])
        start = jnp.full(rows, _LOWEST), jnp.zeros(rows), jnp.zeros((*rows, H))
        largest_KR, sum_KR, out_KRH = _visit_keys(plan, k, v, batch, q_index, visit, start)
        some_KR = sum_KR > 0
        safe_sum_KR = jnp.where(some_KR, sum_KR, 1.0)
        lse_KR = jnp.where(some_KR, largest_KR * scale + jnp.log(safe_sum_KR), -jnp.inf)
        out_QNH = _unfold(out_KRH / safe_sum_KR[..., None], plan.q_block).astype(q.dtype)
        at = (batch, q_index * plan.q_block, 0)
        return (
            lax.dynamic_update_slice(outs[0], to_bits(out_QNH)[None], (*at, 0)),
            lax.dynamic_update_slice(outs[1], _unfold(lse_KR, plan.q_block)[None], at),
        )

    outs = to_bits(jnp.zeros_like(q)), jnp.zeros(q.shape[:3], jnp.float32)
    out, lse = lax.fori_loop(0, B * num_q_blocks, attend, outs)
    return from_bits(out, q.dtype)[:, :T], lse[:, :T]


def _backward(q, k, v, queries, keys, scale, out, lse, d_out, d_lse):
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    plan = _make_plan((T, S, N), q.dtype, queries, keys)
    num_q_blocks = plan.order_BTS.shape[1]
    nothing_seen = jnp.isneginf(lse)
    # d scores = weights * (d weights - delta): sum(out * d_out) comes from the normalisation, d_lse from the result.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1) - jnp.where(nothing_seen, 0.0, d_lse)
    # Rows that see nothing, and the rows of the padding, get weights exp(-inf) = 0, and are not read.
    lse = _pad_queries(jnp.where(nothing_seen, jnp.inf, lse), plan, jnp.inf)
    q = _pad_queries(jnp.where(nothing_seen[..., None], 0, q), plan)
    d_out = _pad_queries(jnp.where(nothing_seen[..., None], 0, d_out), plan)
    delta = _pad_queries(jnp.where(nothing_seen, 0.0, delta), plan)

    def attend(index, gradients):
        batch, q_index = index // num_q_blocks, index % num_q_blocks
        q_KRH, d_out_KRH, lse_KR, delta_KR = (
            _read_queries(array, plan, batch, q_index, K) for array in (q, d_out, lse, delta)
        )

        def visit(carry, start, k_KSH, v_KSH, mask_QS):
            d_q_KRH, d_k_BKSH, d_v_BKSH = carry
            scores_KRS = _dot("KRH,KSH->KRS", q_KRH, k_KSH) * scale
            weights_KRS = jnp.exp(scores_KRS - lse_KR[..., None])
            if mask_QS is not None:
                weights_KRS = jnp.where(_mask_rows(mask_QS, N // K), weights_KRS, 0.0)
            d_weights_KRS = _dot("KRH,KSH->KRS", d_out_KRH, v_KSH)
            d_scores_KRS = (weights_KRS * (d_weights_KRS - delta_KR[..., None]) * scale).astype(q.dtype)
            d_q_KRH += _dot("KRS,KSH->KRH", d_scores_KRS, k_KSH)
            at, size = (batch, 0, start, 0), (1, *k_KSH.shape)
            d_k = lax.dynamic_slice(d_k_BKSH, at, size) + _dot("KRS,KRH->KSH", d_scores_KRS, q_KRH)
            d_v = lax.dynamic_slice(d_v_BKSH, at, size) + _dot("KRS,KRH->KSH", weights_KRS.astype(q.dtype), d_out_KRH)
            return (
                d_q_KRH,
                lax.dynamic_update_slice(d_k_BKSH, d_k, at),
                lax.dynamic_update_slice(d_v_BKSH, d_v, at),
            )

        d_q, d_k_BKSH, d_v_BKSH = gradients
        d_q_KRH = jnp.zeros(q_KRH.shape)
        d_q_KRH, d_k_BKSH, d_v_BKSH = _visit_keys(plan, k, v, batch, q_index, visit, (d_q_KRH, d_k_BKSH, d_v_BKSH))
        d_q_QNH = to_bits(_unfold(d_q_KRH, plan.q_block).astype(q.dtype))
        d_q = lax.dynamic_update_slice(d_q, d_q_QNH[None], (batch, q_index * plan.q_block, 0, 0))
        return d_q, d_k_BKSH, d_v_BKSH

    zeros = jnp.zeros((B, K, S, H))
    d_q, d_k, d_v = lax.fori_loop(0, B * num_q_blocks, attend, (to_bits(jnp.zeros_like(q)), zeros, zeros))
    d_k, d_v = (x.swapaxes(1, 2).astype(q.dtype) for x in (d_k, d_v))
    return from_bits(d_q, q.dtype)[:, :T], d_k, d_v


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, queries, keys, scale):
    return _forward(q, k, v, queries, keys, scale)


def _attention_forward(q, k, v, queries, keys, scale):
    out, lse = name_attention(*_forward(q, k, v, queries, keys, scale))
    return (out, lse), (q, k, v, queries, keys, out, lse)


def _attention_backward(scale, residuals, cotangents):
    q, k, v, queries, keys, out, lse = residuals
    gradients = _backward(q, k, v, queries, keys, scale, out, lse, *cotangents)
    return (*gradients, None, None)


_attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.jit, static_argnames=("causal", "chunk_size", "scale"))
def attention_gradients(
    q_BTNH, k_BSKH, v_BSKH, given, out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN, causal, chunk_size, scale
):
    labels = make_labels((*q_BTNH.shape[:2], k_BSKH.shape[1]), *given, causal, chunk_size)
    return _backward(q_BTNH, k_BSKH, v_BSKH, *labels, scale, out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN)


@functools.partial(jax.jit, static_argnames=("causal", "chunk_size", "scale"))
def attention(
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS,
    causal, chunk_size, scale,
):  # fmt: skip
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    if 0 in (B, T, S):
        return jnp.zeros_like(q_BTNH), jnp.full(q_BTNH.shape[:3], -jnp.inf)
    queries, keys = make_labels(
        (B, T, S), q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS, causal, chunk_size
    )
    return _attention(q_BTNH, k_BSKH, v_BSKH, queries, keys, scale)
