"""Attention of few queries against a cache, as a specification: a mask over the slots, then plain attention."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.reference import masked_attention
from pallas_kernels.quantized import QuantizedArray


def slot_positions(
    lengths_B: Int[Array, " B"], num_slots: int, chunk_size: int | None, kv_offset: Int[Array, ""] | Int[Array, " B"]
) -> Int[Array, "B S"]:
    """Returns the position that each slot holds; in a ring the newest one with that remainder, so maybe a negative."""
    slot_BS = jnp.arange(num_slots) + jnp.zeros_like(lengths_B)[:, None]
    if chunk_size is None:
        return slot_BS + jnp.broadcast_to(kv_offset, lengths_B.shape)[:, None]
    newest_B1 = lengths_B[:, None] - 1
    return newest_B1 - (newest_B1 - slot_BS) % chunk_size


def visible_slots(
    lengths_B: Int[Array, " B"],
    num_queries: int,
    num_slots: int,
    chunk_size: int | None,
    kv_offset: Int[Array, ""] | Int[Array, " B"],
) -> Bool[Array, "B T S"]:
    """Returns which slot each query may see: those that hold positions of its chunk up to its own."""
    q_position = (lengths_B[:, None] - num_queries + jnp.arange(num_queries))[:, :, None]
    kv_position = slot_positions(lengths_B, num_slots, chunk_size, kv_offset)[:, None, :]
    mask_BTS = (kv_position <= q_position) & (kv_position >= 0) & (q_position >= 0)
    if chunk_size is not None:
        mask_BTS &= kv_position // chunk_size == q_position // chunk_size
    return mask_BTS


def decode_attention(q_BTNH, k_cache, v_cache, lengths_B, page_table, kv_offset, chunk_size, scale):
    k_BSKH, v_BSKH = (_plain(cache, page_table) for cache in (k_cache, v_cache))
    mask_BTS = visible_slots(lengths_B, q_BTNH.shape[1], k_BSKH.shape[1], chunk_size, kv_offset)
    return masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale)


def _plain(cache: Array | QuantizedArray, page_table: Int[Array, "B P"] | None) -> Array:
    """Returns the cache as one array [B, S, K, H]; pages that the table does not name correctly may hold anything."""
    if isinstance(cache, QuantizedArray):
        cache = cache.dequantize(jnp.dtype("float32"))
    if page_table is None:
        return cache
    pages = cache[page_table]
    return pages.reshape(pages.shape[0], -1, *pages.shape[3:])
