"""Attention to a cache over a mesh, and writing to it.

Rows of the batch and heads lie where the queries' do. The slots of layers that see everything are split over the
`context` axis, which is how ten million tokens fit: every device attends to the slots it holds, and the parts merge
exactly by their log-sum-exp. The slots of a chunked layer are one chunk and lie whole on every device of that axis.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from l4jax.sharding import axis_sizes, spec
from pallas_kernels.dispatch import target

QUERIES = ("batch", None, "heads", None)
PAGE = 128
"""Slots of a page; see `_layer`."""


def slot_axes(chunk_size: int | None) -> tuple[str | None, ...]:
    """Returns the logical axes of a stacked cache [C, B, S, K, H] of one kind of layer."""
    return (None, "batch", "slots" if chunk_size is None else None, "kv_heads", None)


def write_slots(
    cache: Float[Array, "C B S K H"],
    new: Float[Array, "B T K H"],
    layer: int | Int[Array, ""],
    slots: Int[Array, "B T"],
    keep: Bool[Array, "B T"],
    chunk_size: int | None,
) -> Float[Array, "C B S K H"]:
    """Returns the cache with the new keys or values of one layer in their slots; those not to be kept go nowhere."""
    sizes = axis_sizes()
    place = spec(slot_axes(chunk_size), cache.shape, sizes)
    rows, heads = place[1], place[3]

    def write(cache, new, slots):
        num_slots = cache.shape[2]
        here = slots - _first_slot(place, num_slots)
        # Index num_slots is dropped; a negative one would count from the end.
        here = jnp.where((here >= 0) & (here < num_slots), here, num_slots)
        at = (layer, jnp.arange(new.shape[0])[:, None], here)
        return cache.at[at].set(new.astype(cache.dtype), mode="drop")

    slots = jnp.where(keep, slots, -1)
    if math.prod(sizes.values()) == 1:
        return write(cache, new, slots)
    in_specs = (place, PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None))
    return jax.shard_map(write, in_specs=in_specs, out_specs=place, check_vma=False)(cache, new, slots)


def _first_slot(place: PartitionSpec, num_slots: int):
    """Returns the slot of the whole cache that is the first one here."""
    return lax.axis_index("context") * num_slots if place[2] else 0


def decode_attention(
    q: Float[Array, "B T N H"],
    k_cache: Float[Array, "C B S K H"],
    v_cache: Float[Array, "C B S K H"],
    layer: int | Int[Array, ""],
    lengths: Int[Array, "B"],
    chunk_size: int | None,
) -> Float[Array, "B T N H"]:
    """Returns attention of the newest tokens to one layer of the cache, which holds them already."""
    sizes = axis_sizes()
    place, queries = spec(slot_axes(chunk_size), k_cache.shape, sizes), spec(QUERIES, q.shape, sizes)

    def attend(q, k_cache, v_cache, lengths):
        k, v, pages = _layer(k_cache, layer), _layer(v_cache, layer), _pages(k_cache, layer)
        if not place[2]:
            return pallas_kernels.decode_attention(q, k, v, lengths, chunk_size=chunk_size, page_table=pages)
        first = jnp.asarray(_first_slot(place, k_cache.shape[2]), jnp.int32)
        part = pallas_kernels.decode_attention(
            q, k, v, lengths, page_table=pages, kv_offset=first, return_lse=True
        )  # fmt: skip
        return _merge_over_context(*part)[0]

    if math.prod(sizes.values()) == 1:
        return attend(q, k_cache, v_cache, lengths)
    in_specs = (queries, place, place, PartitionSpec(queries[0]))
    return jax.shard_map(attend, in_specs=in_specs, out_specs=queries, check_vma=False)(q, k_cache, v_cache, lengths)


def _in_pages(cache: Array) -> bool:
    """Whether a layer of the stack is read as pages: a Mosaic kernel takes whole arrays, a slice would be a copy."""
    return cache.shape[0] > 1 and target().platform == "tpu" and cache.shape[2] % PAGE == 0


def _layer(cache: Array, layer) -> Array:
    return cache.reshape(-1, PAGE, *cache.shape[3:]) if _in_pages(cache) else cache[layer]


def _pages(cache: Array, layer) -> Array | None:
    if not _in_pages(cache):
        return None
    num_rows, count = cache.shape[1], cache.shape[2] // PAGE
    first = (layer * num_rows + jnp.arange(num_rows, dtype=jnp.int32)) * count
    return first[:, None] + jnp.arange(count, dtype=jnp.int32)


def _merge_over_context(out: Array, lse: Array) -> tuple[Array, Array]:
    """Returns attention over the slots of all devices of the context axis, from attention over each one's own."""
    largest = lax.pmax(lse, "context")
    share = jnp.exp(lse - jnp.where(jnp.isneginf(largest), 0.0, largest))
    total = lax.psum(share, "context")
    safe = jnp.where(total > 0, total, 1.0)
    merged = lax.psum(share[..., None] * out.astype(jnp.float32), "context") / safe[..., None]
    return merged.astype(out.dtype), largest + jnp.log(safe)


def held_positions(
    lengths: Int[Array, "B"], first_slot: int | Array, num_slots: int, chunk_size: int | None
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Returns the position that each slot holds and 1 where the next token of the row can still see it, else 0."""
    start = jnp.zeros_like(lengths) if chunk_size is None else lengths // chunk_size * chunk_size
    positions = start[:, None] + first_slot + jnp.arange(num_slots, dtype=lengths.dtype)
    return positions, (positions < lengths[:, None]).astype(jnp.int32)


def attention_to_slots(
    q: Float[Array, "B T N H"],
    k_cache: Float[Array, "C B S K H"],
    v_cache: Float[Array, "C B S K H"],
    layer: int | Int[Array, ""],
    q_positions: Int[Array, "B T"],
    q_segment_ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    chunk_size: int | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns attention of a piece of a prompt to what a layer of the cache held before, with its log-sum-exp.

    Args:
        q_segment_ids: 0 for padding, else 1.
        lengths: tokens in the cache.
    """
    sizes = axis_sizes()
    place, queries = spec(slot_axes(chunk_size), k_cache.shape, sizes), spec(QUERIES, q.shape, sizes)

    def attend(q, k_cache, v_cache, q_positions, q_segment_ids, lengths):
        k, v = k_cache[layer].astype(q.dtype), v_cache[layer].astype(q.dtype)
        held, visible = held_positions(lengths, _first_slot(place, k.shape[1]), k.shape[1], chunk_size)
        part = pallas_kernels.attention(
            q,
            k,
            v,
            chunk_size=chunk_size,
            q_positions=q_positions,
            kv_positions=held,
            q_segment_ids=q_segment_ids,
            kv_segment_ids=visible,
            return_lse=True,
        )
        return _merge_over_context(*part) if place[2] else part

    if math.prod(sizes.values()) == 1:
        return attend(q, k_cache, v_cache, q_positions, q_segment_ids, lengths)
    tokens = PartitionSpec(queries[0], None)
    in_specs = (queries, place, place, tokens, tokens, PartitionSpec(queries[0]))
    out_specs = (queries, PartitionSpec(*queries[:3]))
    return jax.shard_map(attend, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
        q, k_cache, v_cache, q_positions, q_segment_ids, lengths
    )
