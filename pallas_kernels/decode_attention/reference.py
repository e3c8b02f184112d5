"""Attention of few queries against a cache, as a specification: a mask over the slots, then plain attention."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.reference import masked_attention


def visible_slots(
    lengths_B: Int[Array, " B"], num_queries: int, num_slots: int, chunk_size: int | None
) -> Bool[Array, "B T S"]:
    """Returns which slot each query may see: those that hold its chunk's positions up to its own."""
    q_positions_BT1 = (lengths_B[:, None] - num_queries + jnp.arange(num_queries))[..., None]
    last_slot_BT1 = q_positions_BT1 if chunk_size is None else q_positions_BT1 % chunk_size
    return (jnp.arange(num_slots) <= last_slot_BT1) & (q_positions_BT1 >= 0)


def decode_attention(q_BTNH, k_cache_BSKH, v_cache_BSKH, lengths_B, chunk_size, scale):
    mask_BTS = visible_slots(lengths_B, q_BTNH.shape[1], k_cache_BSKH.shape[1], chunk_size)
    out_BTNH, _ = masked_attention(q_BTNH, k_cache_BSKH, v_cache_BSKH, mask_BTS, scale)
    return out_BTNH
