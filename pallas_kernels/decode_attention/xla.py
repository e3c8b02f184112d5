"""Decode attention by XLA alone, made for CPU: one dynamic loop over blocks of slots, up to the longest sequence.

Decoding waits for memory, so the cache must be read once, as it lies. A product per kv head would first transpose each
block of the cache (measured: half the speed). Instead all heads share one product with whole slots of K * H numbers:
a query head becomes a row that is zero outside its own kv head. The K-fold multiplications cost less than the copy.

Bytes: the used slots once, plus the blocks that the loop cuts out of the cache (XLA:CPU copies a slice before a dot).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.slices import read_slice

# Below every score, yet finite: -inf - -inf would be NaN.
_LOWEST = -1e30


def slots_per_block(batch: int, num_slots: int) -> int:
    """Returns how many slots one step of the loop reads: about 512 over the batch, so that a block stays in cache."""
    return min(max(512 // batch, 128), num_slots)


@functools.partial(jax.jit, static_argnames=("chunk_size", "scale"))
def decode_attention(q_BTNH, k_cache_BSKH, v_cache_BSKH, lengths_B, chunk_size, scale):
    (B, T, N, H), (S, K) = q_BTNH.shape, k_cache_BSKH.shape[1:3]
    if 0 in (B, T, S):
        return jnp.zeros_like(q_BTNH)
    block = slots_per_block(B, S)
    last_slot_BT = lengths_B[:, None] - T + jnp.arange(T)
    if chunk_size is not None:
        last_slot_BT = jnp.where(last_slot_BT >= 0, last_slot_BT % chunk_size, -1)

    # Rows: (head, query) pairs; columns: the numbers of one slot, zero outside the row's own kv head.
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    own = jnp.eye(K, dtype=q_BTNH.dtype)[None, :, None, None, :, None]
    q_rows = (q_BKGTH[:, :, :, :, None, :] * own).reshape(B, N * T, K * H)
    last_slot_rows = jnp.tile(last_slot_BT, (1, N))[:, :, None]
    k_slots, v_slots = (cache.reshape(B, S, K * H) for cache in (k_cache_BSKH, v_cache_BSKH))

    def visit(index, carry):
        largest, total, out = carry
        first = index * block
        start = jnp.minimum(first, S - block)  # the last block starts early to fit, and repeats slots
        slot = start + jnp.arange(block)
        mask = (slot <= last_slot_rows) & (slot >= first)
        k_block = read_slice(k_slots, (0, start, 0), (B, block, K * H))
        # Slots that nobody sees may hold anything, also NaN, and 0 * NaN would spread.
        v_block = jnp.where(mask.any(1)[:, :, None], read_slice(v_slots, (0, start, 0), (B, block, K * H)), 0)
        scores = jnp.einsum("brd,bsd->brs", q_rows, k_block, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(-1))
        weights = jnp.exp((scores - new_largest[..., None]) * scale)
        shrink = jnp.exp((largest - new_largest) * scale)
        added = jnp.einsum("brs,bsd->brd", weights.astype(v_block.dtype), v_block, preferred_element_type=jnp.float32)
        return new_largest, total * shrink + weights.sum(-1), out * shrink[..., None] + added

    rows = (B, N * T)
    carry = jnp.full(rows, _LOWEST), jnp.zeros(rows), jnp.zeros((*rows, K * H))
    _, total, out = lax.fori_loop(0, jnp.max(last_slot_BT) // block + 1, visit, carry)
    out = (out / jnp.where(total > 0, total, 1.0)[..., None]).reshape(B, K, -1, T, K, H)
    out_BKGTH = jnp.stack([out[:, head, :, :, head] for head in range(K)], axis=1)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)
