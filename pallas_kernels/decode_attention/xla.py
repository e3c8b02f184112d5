"""Decode attention by XLA alone, made for CPU: one dynamic loop over blocks of slots, up to the longest sequence.

Decoding waits for memory, so the cache must be read once, as it lies. A product per kv head would first transpose each
block of the cache (measured: half the speed). Instead all heads share one product with whole slots of K * H numbers:
a query head becomes a row that is zero outside its own kv head. The K-fold multiplications cost less than the copy.

Bytes: the used slots once, plus the blocks that the loop cuts out of the cache (XLA:CPU copies a slice before a dot).
Pages are gathered and int8 is turned into numbers block by block, so nothing of the size of a cache is made.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.decode_attention.slots import newest_slot
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.slices import from_bits, read_slice, to_bits

# Below every score, yet finite: -inf - -inf would be NaN.
_LOWEST = -1e30


def slots_per_block(batch: int, num_slots: int, page_size: int = 1) -> int:
    """Returns how many slots one step of the loop reads: about 512 over the batch, so that a block stays in cache."""
    pages = max(max(512 // batch, 128) // page_size, 1)
    return min(pages * page_size, num_slots)


@functools.partial(jax.jit, static_argnames=("chunk_size", "scale"))
def decode_attention(q_BTNH, k_cache, v_cache, lengths_B, page_table, kv_offset, chunk_size, scale):
    (B, T, N, H), (S, K) = q_BTNH.shape, k_cache.shape[1:3]
    if page_table is None:
        block = slots_per_block(B, S)
    else:
        page_size, S = S, S * page_table.shape[1]
        block = slots_per_block(B, S, page_size)
    if 0 in (B, T, S):
        return jnp.zeros_like(q_BTNH), jnp.full(q_BTNH.shape[:3], -jnp.inf)
    last_slot_BT = jnp.minimum(newest_slot(lengths_B, chunk_size, kv_offset)[:, None] - jnp.arange(T)[::-1], S - 1)

    # Rows: (head, query) pairs; columns: the numbers of one slot, zero outside the row's own kv head.
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    own = jnp.eye(K, dtype=q_BTNH.dtype)[None, :, None, None, :, None]
    q_rows = (q_BKGTH[:, :, :, :, None, :] * own).reshape(B, N * T, K * H)
    last_slot_rows = jnp.tile(last_slot_BT, (1, N))[:, :, None]
    read_k, read_v = (_reader(cache, page_table, block, q_BTNH.dtype) for cache in (k_cache, v_cache))

    def visit(index, carry):
        largest, total, out = carry
        first = index * block
        start = jnp.minimum(first, S - block)  # the last block starts early to fit, and repeats slots
        slot = start + jnp.arange(block)
        mask = (slot <= last_slot_rows) & (slot >= first)
        k_block = read_k(start)
        # Slots that nobody sees may hold anything, also NaN, and 0 * NaN would spread.
        v_block = jnp.where(mask.any(1)[:, :, None], read_v(start), 0)
        scores = jnp.einsum("brd,bsd->brs", q_rows, k_block, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(-1))
        weights = jnp.exp((scores - new_largest[..., None]) * scale)
        shrink = jnp.exp((largest - new_largest) * scale)
        added = jnp.einsum("brs,bsd->brd", weights.astype(v_block.dtype), v_block, preferred_element_type=jnp.float32)
        return new_largest, total * shrink + weights.sum(-1), out * shrink[..., None] + added

    rows = (B, N * T)
    carry = jnp.full(rows, _LOWEST), jnp.zeros(rows), jnp.zeros((*rows, K * H))
    largest, total, out = lax.fori_loop(0, jnp.max(last_slot_BT) // block + 1, visit, carry)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, largest * scale + jnp.log(total), -jnp.inf)
    out = (out / total[..., None]).reshape(B, K, -1, T, K, H)
    out_BKGTH = jnp.stack([out[:, head, :, :, head] for head in range(K)], axis=1)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)
    return out_BTNH, lse.reshape(B, N, T).swapaxes(1, 2)


def _reader(
    cache: Array | QuantizedArray, page_table: Int[Array, "B P"] | None, block: int, dtype: jnp.dtype
) -> Callable[[Array], Array]:
    """Returns a function of the first slot that returns a block of the cache in `dtype`, [B, block, K * H]."""
    if isinstance(cache, QuantizedArray):
        read_values, read_scales = (
            _reader(x, page_table, block, x.dtype) for x in (cache.values, cache.scales)
        )  # fmt: skip
        num_heads, width = cache.shape[2:]

        def dequantize(start):
            values = read_values(start).reshape(-1, block, num_heads, width)
            part = QuantizedArray(values, read_scales(start)[..., None])
            return part.dequantize(dtype).reshape(-1, block, num_heads * width)

        return dequantize

    flat = cache.reshape(*cache.shape[:2], -1)
    if page_table is None:
        return lambda start: read_slice(flat, (0, start, 0), (flat.shape[0], block, flat.shape[2]))

    page_size = flat.shape[1]

    def gather(start):
        pages = lax.dynamic_slice_in_dim(page_table, start // page_size, block // page_size, axis=1)
        # Page by page: XLA:CPU would turn all pages into float32 before a gather in bfloat16.
        found = lax.map(lambda page: to_bits(read_slice(flat, (page, 0, 0), (1, *flat.shape[1:]))), pages.reshape(-1))
        return from_bits(found, flat.dtype).reshape(-1, block, flat.shape[2])

    return gather
