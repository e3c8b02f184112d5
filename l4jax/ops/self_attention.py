"""Attention over a mesh: batch and heads need nothing from one another; along a split sequence keys and values travel.

Without a cache the rows lie in *balanced order*: a sequence split over c devices is cut into 2c blocks, and device i
holds blocks i and 2c-1-i, so that under a causal mask every device has the same work. Masks come from positions, so
nothing else changes. Four forms, by what a layer can see:

- nothing travels where every chunk lies within one block;
- halo: the keys of the chunk that began in the block before, from the neighbour that holds it;
- gather: all keys and values to every device, while they are few;
- ring: they go round, block by block, and partial results merge by their log-sum-exp. Memory does not grow with the
  sequence; the backward pass goes round again with the gradients of keys and values on board.

With a cache, its slots are split and queries are few: every device attends to its slots, and the parts merge.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels
from l4jax.sharding import axis_sizes, spec
from pallas_kernels import merge_partial_attention

GATHER_BELOW = 1 << 28
"""Bytes of keys and values of a whole sequence, on one device, up to which they are gathered rather than sent round."""

QUERIES, KEYS = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)


def is_balanced(length: int) -> bool:
    """Whether a row of `length` tokens is split on the mesh that is set, into blocks that balance."""
    sizes = axis_sizes()
    return sizes["context"] > 1 and length % (2 * sizes["context"]) == 0


def to_balanced(x: Float[Array, "B T ..."], *axes: str | None) -> Float[Array, "B T ..."]:
    """Returns rows of a split sequence in balanced order.

    Args:
        x: rows in their own order.
        axes: logical axes after the first two.
    """
    return _reorder(x, axes, forth=True)


def to_natural(x: Float[Array, "B T ..."], *axes: str | None) -> Float[Array, "B T ..."]:
    """The inverse of `to_balanced`."""
    return _reorder(x, axes, forth=False)


def _reorder(x, axes, forth: bool):
    """Device d has blocks 2d and 2d+1 of the sequence in its own order, and blocks d and 2c-1-d in the balanced one.

    Of the blocks with even numbers every device sends one and receives one, so two permutations do it.
    """
    num_devices = axis_sizes()["context"]
    place = spec(("batch", "length", *axes), x.shape, axis_sizes())

    def home(block: int) -> int:
        return min(block, 2 * num_devices - 1 - block)

    even, odd = ([(d, home(2 * d + parity)) for d in range(num_devices)] for parity in (0, 1))

    def run(x):
        pair = [x[:, half] for half in _halves(x.shape[1])]
        # A device with an even number has its even block in front: block d, not 2c-1-d.
        in_order = lax.axis_index("context") % 2 == 0
        if not forth:
            pair = _swap_unless(in_order, *pair)
        paths = (even, odd) if forth else ([(b, a) for a, b in even], [(b, a) for a, b in odd])
        pair = [lax.ppermute(x, "context", path) for x, path in zip(pair, paths, strict=True)]
        return jnp.concatenate(_swap_unless(in_order, *pair) if forth else pair, axis=1)

    return jax.shard_map(run, in_specs=place, out_specs=place, check_vma=False)(x)


def _swap_unless(in_order, first, second):
    return jnp.where(in_order, first, second), jnp.where(in_order, second, first)


def full_attention(q: Float[Array, "B X N H"], k: Float[Array, "B X N H"], v: Float[Array, "B X N H"]):
    """Returns attention of everything to everything, tile by tile (the vision tower)."""
    sizes = axis_sizes()
    attend = functools.partial(pallas_kernels.attention, causal=False)
    if math.prod(sizes.values()) == 1:
        return attend(q, k, v)
    place = spec(("tile", None, "heads", None), q.shape, sizes)
    return jax.shard_map(attend, in_specs=(place,) * 3, out_specs=place, check_vma=False)(q, k, v)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    chunk_size: int | None,
    aligned: bool = False,
    balanced: bool = True,
    return_lse: bool = False,
):
    """Returns causal attention of tokens among themselves, and on request the log-sum-exp [B, T, N].

    Args:
        chunk_size: tokens; None means one chunk.
        aligned: whether position p of every row is its p-th token, so that no chunk crosses a block of whole chunks.
        balanced: whether a split row lies in balanced order, or in its own.
    """
    sizes = axis_sizes()
    if math.prod(sizes.values()) == 1:
        return _attend(chunk_size, q, k, v, positions, positions, segment_ids, segment_ids, return_lse)
    places = [spec(axes, x.shape, sizes) for axes, x in ((QUERIES, q), (KEYS, k))]
    tokens = spec(("batch", "length"), positions.shape, sizes)
    num_devices = sizes["context"] if tokens[1] else 1
    block = q.shape[1] // num_devices // (2 if balanced else 1)
    form = _form(k, num_devices, block, chunk_size, aligned, balanced)

    def run(q, k, v, positions, segment_ids=None):
        if form == "local":
            out = _attend(chunk_size, q, k, v, positions, positions, segment_ids, segment_ids, True)
        elif form == "ring":
            out = _ring(num_devices, q, k, v, positions, _or_ones(segment_ids, positions))
        elif form == "halo":
            segment_ids = _or_ones(segment_ids, positions)
            seen = _with_halo((k, v, positions, segment_ids), num_devices, min(block, chunk_size))
            out = _attend(chunk_size, q, *seen[:2], positions, seen[2], segment_ids, seen[3], True)
        else:
            gathered = [
                None if x is None else lax.all_gather(x, "context", axis=1, tiled=True)
                for x in (k, v, positions, segment_ids)
            ]
            out = _attend(chunk_size, q, *gathered[:2], positions, gathered[2], segment_ids, gathered[3], True)
        return out if return_lse else out[0]

    inputs = (q, k, v, positions) + (() if segment_ids is None else (segment_ids,))
    in_specs = (places[0], places[1], places[1], tokens, tokens)[: len(inputs)]
    out_specs = (places[0], PartitionSpec(*places[0][:3])) if return_lse else places[0]
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*inputs)


def _form(k, num_devices: int, block: int, chunk_size: int | None, aligned: bool, balanced: bool) -> str:
    if num_devices == 1:
        return "local"
    if chunk_size is not None and balanced:
        if aligned and block % chunk_size == 0:
            return "local"
        if block >= chunk_size - 1:  # a chunk begins in the block before, not earlier
            return "halo"
    if chunk_size is not None or not balanced or 2 * math.prod(k.shape[1:]) * k.dtype.itemsize <= GATHER_BELOW:
        return "gather"
    return "ring"


def _or_ones(segment_ids, positions):
    return jnp.ones_like(positions) if segment_ids is None else segment_ids


def _attend(chunk_size, q, k, v, q_positions, kv_positions, q_segment_ids, kv_segment_ids, return_lse):
    return pallas_kernels.attention(
        q,
        k,
        v,
        chunk_size=chunk_size,
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        return_lse=return_lse,
    )


def _with_halo(arrays, num_devices: int, width: int):
    """Returns keys, values, positions and segment ids of this device's two blocks, each behind the end of the block
    that comes before it in the sequence."""
    first, second = ([x[:, half] for x in arrays] for half in _halves(arrays[0].shape[1]))
    up = [(i, i + 1) for i in range(num_devices - 1)]
    down = [(j, i) for i, j in up]
    # Who is sent nothing gets zeros, which are of no segment: before block 0 there is nothing, and the block before
    # block c is on the same device.
    before_first = [lax.ppermute(x[:, -width:], "context", up) for x in first]
    before_second = [lax.ppermute(x[:, -width:], "context", down) for x in second]
    parts = zip(before_first, first, before_second, second, strict=True)
    return [jnp.concatenate(part, axis=1) for part in parts]


def _halves(length: int) -> tuple[slice, slice]:
    return slice(0, length // 2), slice(length // 2, length)


# --- Ring ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(num_devices: int, q, k, v, positions, segment_ids):
    """Causal attention (out, lse) of this device's queries to the keys of all devices."""
    return _ring_forward(num_devices, q, k, v, positions, segment_ids)[0]


def _ring_forward(num_devices, q, k, v, positions, segment_ids):
    def visit(carry, _):
        out, lse, *seen = carry
        part = _attend(None, q, *seen[:2], positions, seen[2], segment_ids, seen[3], True)
        out, lse = merge_partial_attention([out, part[0].astype(jnp.float32)], [lse, part[1]])
        return (out, lse, *_pass_on(seen, num_devices)), None

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf), k, v, positions, segment_ids
    (out, lse, *_), _ = lax.scan(visit, start, None, length=num_devices)
    out, lse = checkpoint_name(out.astype(q.dtype), "attention"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, positions, segment_ids, out, lse)


def _ring_backward(num_devices, residuals, cotangents):
    q, k, v, positions, segment_ids, out, lse = residuals

    def visit(carry, _):
        d_q, d_k, d_v, *seen = carry
        parts = pallas_kernels.attention_gradients(
            q,
            *seen[:2],
            out,
            lse,
            *cotangents,
            q_positions=positions,
            kv_positions=seen[2],
            q_segment_ids=segment_ids,
            kv_segment_ids=seen[3],
        )
        d_q, d_k, d_v = (total + part.astype(jnp.float32) for total, part in zip((d_q, d_k, d_v), parts, strict=True))
        # The gradients of keys and values travel with these, and come home with them.
        d_k, d_v, *seen = _pass_on((d_k, d_v, *seen), num_devices)
        return (d_q, d_k, d_v, *seen), None

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (d_q, d_k, d_v, *_), _ = lax.scan(visit, (*zeros, k, v, positions, segment_ids), None, length=num_devices)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _pass_on(arrays, num_devices: int):
    to_next = [(i, (i + 1) % num_devices) for i in range(num_devices)]
    return [lax.ppermute(x, "context", to_next) for x in arrays]
