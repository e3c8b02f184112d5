"""Attention, as a specification: all T x S scores, one boolean mask, a softmax in float32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(
    q_positions_BT: Int[Array, "B T"],
    kv_positions_BS: Int[Array, "B S"],
    q_segment_ids_BT: Int[Array, "B T"],
    kv_segment_ids_BS: Int[Array, "B S"],
    causal: bool,
    chunk_size: int | None,
) -> Bool[Array, "B T S"]:
    """Returns which key each query may see: same document, not padding, not later, and in the same chunk."""
    q_position, kv_position = q_positions_BT[:, :, None], kv_positions_BS[:, None, :]
    q_segment, kv_segment = q_segment_ids_BT[:, :, None], kv_segment_ids_BS[:, None, :]
    mask_BTS = (q_segment == kv_segment) & (q_segment != 0)
    if causal:
        mask_BTS &= kv_position <= q_position
    if chunk_size is not None:
        mask_BTS &= kv_position // chunk_size == q_position // chunk_size
    return mask_BTS


def masked_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns softmax attention over the visible keys, and the float32 log-sum-exp of their scores.

    What no visible pair touches is never read: it may hold anything, also NaN.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_used, kv_used = mask_BTS.any(2)[..., None, None], mask_BTS.any(1)[..., None, None]
    q = jnp.where(q_used, q_BTNH, 0).astype(jnp.float32).reshape(B, T, K, N // K, H)
    k = jnp.where(kv_used, k_BSKH, 0).astype(jnp.float32)
    v = jnp.where(kv_used, v_BSKH, 0).astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST

    mask_BTKGS = jnp.broadcast_to(mask_BTS[:, :, None, None, :], (B, T, K, N // K, mask_BTS.shape[2]))
    scores_BTKGS = jnp.einsum("BTKGH,BSKH->BTKGS", q, k, precision=highest) * scale
    largest = jax.lax.stop_gradient(jnp.max(scores_BTKGS, -1, keepdims=True, initial=-1e30, where=mask_BTKGS))
    weights_BTKGS = jnp.exp(jnp.where(mask_BTKGS, scores_BTKGS - largest, -jnp.inf))
    sum_BTKG1 = weights_BTKGS.sum(-1, keepdims=True)
    some = sum_BTKG1 > 0
    safe_sum_BTKG1 = jnp.where(some, sum_BTKG1, 1.0)
    out_BTKGH = jnp.einsum("BTKGS,BSKH->BTKGH", weights_BTKGS / safe_sum_BTKG1, v, precision=highest)
    lse_BTKG1 = jnp.where(some, largest + jnp.log(safe_sum_BTKG1), -jnp.inf)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype), lse_BTKG1.reshape(B, T, N)


def attention(
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS,
    causal, chunk_size, scale,
):  # fmt: skip
    B, T, S = *q_BTNH.shape[:2], k_BSKH.shape[1]
    mask_BTS = visible(
        _or_default(q_positions_BT, jnp.arange(T), B),
        _or_default(kv_positions_BS, jnp.arange(S), B),
        _or_default(q_segment_ids_BT, jnp.ones(T, jnp.int32), B),
        _or_default(kv_segment_ids_BS, jnp.ones(S, jnp.int32), B),
        causal,
        chunk_size,
    )
    return masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale)


def attention_gradients(
    q_BTNH, k_BSKH, v_BSKH, given, out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN, causal, chunk_size, scale
):
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    positions = (_or_default(x, jnp.arange(n), B) for x, n in zip(given[:2], (T, S), strict=True))
    segment_ids = (_or_default(x, jnp.ones(n, jnp.int32), B) for x, n in zip(given[2:], (T, S), strict=True))
    mask_BTS = visible(*positions, *segment_ids, causal, chunk_size)
    q_used, kv_used = mask_BTS.any(2)[..., None, None], mask_BTS.any(1)[..., None, None]
    q, out, d_out = (
        jnp.where(q_used, x, 0).astype(jnp.float32).reshape(B, T, K, N // K, H) for x in (q_BTNH, out_BTNH, d_out_BTNH)
    )
    lse, d_lse = (jnp.where(q_used[..., 0], x, 0.0).reshape(B, T, K, N // K, 1) for x in (lse_BTN, d_lse_BTN))
    k, v = (jnp.where(kv_used, x, 0).astype(jnp.float32) for x in (k_BSKH, v_BSKH))
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    scores_BTKGS = einsum("BTKGH,BSKH->BTKGS", q, k) * scale
    weights_BTKGS = jnp.where(mask_BTS[:, :, None, None, :], jnp.exp(scores_BTKGS - lse), 0.0)
    d_weights_BTKGS = einsum("BTKGH,BSKH->BTKGS", d_out, v)
    # Of the softmax: a weight grows where its own gradient is above the mean under the weights.
    mean = jnp.sum(out * d_out, -1, keepdims=True) - d_lse
    d_scores_BTKGS = weights_BTKGS * (d_weights_BTKGS - mean) * scale
    d_q = einsum("BTKGS,BSKH->BTKGH", d_scores_BTKGS, k).reshape(B, T, N, H)
    d_k = einsum("BTKGS,BTKGH->BSKH", d_scores_BTKGS, q)
    d_v = einsum("BTKGS,BTKGH->BSKH", weights_BTKGS, d_out)
    return tuple(d.astype(x.dtype) for d, x in zip((d_q, d_k, d_v), (q_BTNH, k_BSKH, v_BSKH), strict=True))


def _or_default(given: Array | None, default: Array, batch: int) -> Array:
    return jnp.broadcast_to(default, (batch, *default.shape)) if given is None else given
