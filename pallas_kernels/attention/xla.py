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

from pallas_kernels.slices import from_bits, read_slice, to_bits

FULL, PARTIAL, HIDDEN = 0, 1, 2

# Below every score, yet finite: -inf - -inf would be NaN.
_LOWEST = -1e30


class _Labels(NamedTuple):
    """What decides visibility on one side: positions, and segment ids or None for a single segment."""

    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None

    def block(self, batch, start, size):
        return _Labels(*(None if x is None else lax.dynamic_slice(x, (batch, start), (1, size))[0] for x in self))


class _Plan(NamedTuple):
    """Blocks of one call: their sizes, the query side padded to whole blocks, and what each query block visits."""

    q_block: int
    kv_block: int
    q_labels: _Labels
    kv_labels: _Labels
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


def block_kinds(
    q_labels: _Labels, kv_labels: _Labels, q_block: int, kv_block: int, causal: bool, chunk_size: int | None
) -> Int[Array, "B nT nS"]:
    """Returns for each pair of blocks whether every key is visible to every query (FULL), none (HIDDEN), or PARTIAL.

    Decided from the ranges of each block alone, so PARTIAL may turn out empty; FULL and HIDDEN are certain.
    """
    needed, full = jnp.array(True), jnp.array(True)

    def compare(q_values, kv_values, same: bool):
        nonlocal needed, full
        q_low, q_high = (x[:, :, None] for x in _ranges(q_values, q_labels.segments, q_block))
        kv_low, kv_high = (x[:, None, :] for x in _ranges(kv_values, kv_labels.segments, kv_block))
        needed &= kv_low <= q_high
        if same:
            needed &= kv_high >= q_low
            full &= (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
        else:
            full &= kv_high <= q_low

    if causal:
        compare(q_labels.positions, kv_labels.positions, same=False)
    if chunk_size is not None:
        compare(q_labels.positions // chunk_size, kv_labels.positions // chunk_size, same=True)
    if q_labels.segments is not None:
        compare(q_labels.segments, kv_labels.segments, same=True)
        for x, block, axis in ((q_labels.segments, q_block, 2), (kv_labels.segments, kv_block, 1)):
            full &= jnp.expand_dims(_blocked(x != 0, block).all(2), axis)
    batch, num_keys = kv_labels.positions.shape
    num_q_blocks, num_kv_blocks = q_labels.positions.shape[1] // q_block, -(-num_keys // kv_block)
    if num_keys % kv_block:  # the last block starts early to fit, and repeats keys of the one before
        full &= jnp.arange(num_kv_blocks) < num_kv_blocks - 1
    kinds = jnp.where(full & needed, FULL, jnp.where(needed, PARTIAL, HIDDEN))
    return jnp.broadcast_to(kinds, (batch, num_q_blocks, num_kv_blocks))


def _blocked(values: Array, block: int) -> Array:
    """Returns [B, S] as [B, blocks, block]; the last block is filled up with its last value."""
    missing = -values.shape[1] % block
    return jnp.pad(values, ((0, 0), (0, missing)), mode="edge").reshape(values.shape[0], -1, block)


def _ranges(values: Array, segments: Array | None, block: int) -> tuple[Array, Array]:
    """Returns the smallest and largest value per block, without padding; an empty range where all is padding."""
    values = _blocked(values, block)
    if segments is None:
        return values.min(2), values.max(2)
    limits, real = jnp.iinfo(values.dtype), _blocked(segments, block) != 0
    return jnp.where(real, values, limits.max).min(2), jnp.where(real, values, limits.min).max(2)


def _make_plan(shape, dtype, q_labels, kv_labels, causal, chunk_size) -> _Plan:
    num_queries, num_keys, num_heads = shape
    q_block, kv_block = block_sizes(num_queries, num_keys, num_heads, dtype)
    padding = ((0, 0), (0, -num_queries % q_block))
    q_labels = _Labels(*(None if x is None else jnp.pad(x, padding, mode="edge") for x in q_labels))
    kinds = block_kinds(q_labels, kv_labels, q_block, kv_block, causal, chunk_size)
    order = jnp.argsort(kinds, axis=2, stable=True)
    return _Plan(
        q_block, kv_block, q_labels, kv_labels, order, (kinds == FULL).sum(2), (kinds != HIDDEN).sum(2)
    )  # fmt: skip


def _visible(q_labels: _Labels, kv_labels: _Labels, causal: bool, chunk_size: int | None):
    """Returns the mask of one tile [q_block, kv_block], from the labels of its queries and keys; True for no mask."""
    mask = jnp.array(True)
    q_position, kv_position = q_labels.positions[:, None], kv_labels.positions[None, :]
    if causal:
        mask &= kv_position <= q_position
    if chunk_size is not None:
        mask &= kv_position // chunk_size == q_position // chunk_size
    if q_labels.segments is not None:
        mask &= (q_labels.segments[:, None] == kv_labels.segments[None, :]) & (q_labels.segments[:, None] != 0)
    return mask


def _fold(block: Float[Array, "Q N ..."], num_kv_heads: int) -> Float[Array, "K GQ ..."]:
    """Returns a query block with the heads that share a kv head as rows of one matrix."""
    Q, _, *rest = block.shape
    return block.reshape(Q, num_kv_heads, -1, *rest).swapaxes(0, 1).swapaxes(1, 2).reshape(num_kv_heads, -1, *rest)


def _unfold(rows: Float[Array, "K GQ ..."], q_block: int) -> Float[Array, "Q N ..."]:
    K, _, *rest = rows.shape
    return rows.reshape(K, -1, q_block, *rest).swapaxes(1, 2).swapaxes(0, 1).reshape(q_block, -1, *rest)


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _visit_keys(plan: _Plan, k, v, batch, q_index, causal, chunk_size, visit, carry):
    """Runs `carry = visit(carry, start, k_KSH, v_KSH, mask_QS or None)` over the key blocks that a query block sees."""
    size, num_keys, num_kv_heads = plan.kv_block, *k.shape[1:3]
    some_partial = causal or chunk_size is not None or plan.q_labels.segments is not None or num_keys % size
    q_labels = plan.q_labels.block(batch, q_index * plan.q_block, plan.q_block)

    def read(array, start):
        block = read_slice(array, (batch, start, 0, 0), (1, size, num_kv_heads, array.shape[3]))
        return block[0].swapaxes(0, 1)

    def visit_full(i, carry):
        start = plan.order_BTS[batch, q_index, i] * size
        return visit(carry, start, read(k, start), read(v, start), None)

    def visit_partial(i, carry):
        first = plan.order_BTS[batch, q_index, i] * size
        start = jnp.minimum(first, num_keys - size)
        mask = _visible(q_labels, plan.kv_labels.block(batch, start, size), causal, chunk_size)
        if num_keys % size:
            mask &= start + jnp.arange(size) >= first
        mask = jnp.broadcast_to(mask, (plan.q_block, size))
        # What nobody sees may hold anything, also NaN, and 0 * NaN would spread.
        seen = mask.any(0)[:, None]
        return visit(carry, start, jnp.where(seen, read(k, start), 0), jnp.where(seen, read(v, start), 0), mask)

    num_full, num_seen = plan.num_full_BT[batch, q_index], plan.num_seen_BT[batch, q_index]
    carry = lax.fori_loop(0, num_full, visit_full, carry)
    return lax.fori_loop(num_full, num_seen, visit_partial, carry) if some_partial else carry


def _mask_rows(mask_QS: Array, num_heads_per_kv: int) -> Array:
    """Returns the mask of one head repeated for the folded rows: [1, G * Q, S]."""
    return jnp.tile(mask_QS, (num_heads_per_kv, 1))[None]


def _pad_queries(array: Array, plan: _Plan, value: float = 0) -> Array:
    missing = plan.q_labels.positions.shape[1] - array.shape[1]
    return jnp.pad(array, ((0, 0), (0, missing)) + ((0, 0),) * (array.ndim - 2), constant_values=value)


def _read_queries(array: Array, plan: _Plan, batch: Array, q_index: Array, num_kv_heads: int) -> Array:
    starts = (batch, q_index * plan.q_block, *(0,) * (array.ndim - 2))
    return _fold(read_slice(array, starts, (1, plan.q_block, *array.shape[2:]))[0], num_kv_heads)


def _forward(q, k, v, q_labels, kv_labels, causal, chunk_size, scale):
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    plan = _make_plan((T, S, N), q.dtype, q_labels, kv_labels, causal, chunk_size)
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
        largest_KR, sum_KR, out_KRH = _visit_keys(
            plan, k, v, batch, q_index, causal, chunk_size, visit, start
        )  # fmt: skip
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


def _backward(q, k, v, q_labels, kv_labels, causal, chunk_size, scale, out, lse, d_out, d_lse):
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    plan = _make_plan((T, S, N), q.dtype, q_labels, kv_labels, causal, chunk_size)
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
        d_q_KRH, d_k_BKSH, d_v_BKSH = _visit_keys(
            plan, k, v, batch, q_index, causal, chunk_size, visit,
            (jnp.zeros(q_KRH.shape, jnp.float32), d_k_BKSH, d_v_BKSH),
        )  # fmt: skip
        d_q_QNH = to_bits(_unfold(d_q_KRH, plan.q_block).astype(q.dtype))
        d_q = lax.dynamic_update_slice(d_q, d_q_QNH[None], (batch, q_index * plan.q_block, 0, 0))
        return d_q, d_k_BKSH, d_v_BKSH

    zeros = jnp.zeros((B, K, S, H))
    d_q, d_k, d_v = lax.fori_loop(0, B * num_q_blocks, attend, (to_bits(jnp.zeros_like(q)), zeros, zeros))
    d_k, d_v = (x.swapaxes(1, 2).astype(q.dtype) for x in (d_k, d_v))
    return from_bits(d_q, q.dtype)[:, :T], d_k, d_v


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, q_labels, kv_labels, causal, chunk_size, scale):
    return _forward(q, k, v, q_labels, kv_labels, causal, chunk_size, scale)


def _attention_forward(q, k, v, q_labels, kv_labels, causal, chunk_size, scale):
    out, lse = _forward(q, k, v, q_labels, kv_labels, causal, chunk_size, scale)
    return (out, lse), (q, k, v, q_labels, kv_labels, out, lse)


def _attention_backward(causal, chunk_size, scale, residuals, cotangents):
    q, k, v, q_labels, kv_labels, out, lse = residuals
    gradients = _backward(q, k, v, q_labels, kv_labels, causal, chunk_size, scale, out, lse, *cotangents)
    return (*gradients, None, None)


_attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.jit, static_argnames=("causal", "chunk_size", "scale"))
def attention(
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS,
    causal, chunk_size, scale,
):  # fmt: skip
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    if 0 in (B, T, S):
        return jnp.zeros_like(q_BTNH), jnp.full(q_BTNH.shape[:3], -jnp.inf)
    if q_positions_BT is None:
        q_positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if kv_positions_BS is None:
        kv_positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    if (q_segment_ids_BT is None) != (kv_segment_ids_BS is None):  # one side given: the other is document 1
        if q_segment_ids_BT is None:
            q_segment_ids_BT = jnp.ones((B, T), jnp.int32)
        else:
            kv_segment_ids_BS = jnp.ones((B, S), jnp.int32)
    q_labels = _Labels(q_positions_BT, q_segment_ids_BT)
    kv_labels = _Labels(kv_positions_BS, kv_segment_ids_BS)
    return _attention(q_BTNH, k_BSKH, v_BSKH, q_labels, kv_labels, causal, chunk_size, scale)
