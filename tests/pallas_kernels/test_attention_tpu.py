"""The TPU kernels of attention: what they visit and move, their ways to split long calls, and the real compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.topology import CHIPS, compile_ahead, one_chip
from pallas_kernels import attention
from pallas_kernels.attention import tiles, tpu
from pallas_kernels.attention.reference import visible
from pallas_kernels.attention.tiles import Tiles, backward_tiles, forward_tiles
from pallas_kernels.attention.traffic import Call, backward_traffic, forward_traffic
from pallas_kernels.shapes import TEXT_SHAPES, VISION_SHAPES
from tests.pallas_kernels.helpers import assert_close, normal

scout, vision = TEXT_SHAPES["scout"], VISION_SHAPES["llama4-vision"]
HEADS = scout.num_heads, scout.num_kv_heads, scout.head_dim


def value_and_gradients(q, k, v, d_out, d_lse, implementation, **arguments):
    function = functools.partial(attention, return_lse=True, implementation=implementation, **arguments)
    (out, lse), backward = jax.vjp(function, q, k, v)
    return out, lse, *backward((d_out, d_lse))


def small_arrays(T, S, N=4, K=2, H=128):
    q, k, v, d_out = normal(0, (1, T, N, H), (1, S, K, H), (1, S, K, H), (1, T, N, H))
    return q, k, v, d_out, *normal(1, (1, T, N))


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keys_per_pass", lambda *_: 128),  # the gradients of more keys would not fit into fast memory
        ("MAX_VISITS", 3),  # the visits of all queries would not fit into scalar memory
    ],
)
def test_long_calls_are_split(monkeypatch, name, value):
    monkeypatch.setattr(tiles, "forward_tiles", lambda *_: Tiles(128, 128, 128, 128, 1))
    monkeypatch.setattr(tiles, "backward_tiles", lambda *_: Tiles(128, 128, 128, 128, 1))
    monkeypatch.setattr(tpu if name.isupper() else tiles, name, value)
    segments = (jnp.arange(300) < 290).astype(jnp.int32)[None]  # the last pass has padding and queries that see none
    arguments = {"chunk_size": 200, "q_segment_ids": segments, "kv_segment_ids": segments}
    results, expected = (
        jax.jit(functools.partial(value_and_gradients, implementation=implementation, **arguments))(
            *small_arrays(300, 300)
        )
        for implementation in ("interpret", "reference")
    )
    seen = segments[..., None] > 0
    assert_close(
        *((out, jnp.where(seen, lse, 0.0), *gradients) for out, lse, *gradients in (results, expected)), jnp.float32
    )


def ideal_bytes(T, chunk_size, q_block):
    """Queries once, and for each block of queries the keys that it sees once, for all heads of a group."""
    keys = sum(start % (chunk_size or T) + q_block for start in range(0, T, q_block))
    N, K, H = HEADS
    return (T * N + 2 * keys * K) * H * 2


@pytest.mark.parametrize("chunk_size", [scout.chunk_size, None])
@pytest.mark.parametrize("device_kind", ["TPU v5 lite", "TPU v6 lite"])
def test_reads_what_the_mask_needs(device_kind, chunk_size):
    T = 131_072
    call = Call(1, T, T, *HEADS, itemsize=2, chunk_size=chunk_size)
    sizes = forward_tiles(T, T, *HEADS[:2], device_kind)
    traffic = forward_traffic(call, sizes)
    assert traffic.bytes_read <= 1.1 * ideal_bytes(T, chunk_size, sizes.q_block)
    scores = (traffic.full_tiles + traffic.partial_tiles) * sizes.q_tile * sizes.kv_tile
    visible_scores = T * ((chunk_size or T) + 1) / 2
    assert scores <= (1.07 if chunk_size else 1.01) * visible_scores

    # Backward, too, hidden blocks cost nothing, although the keys go in several passes.
    sizes = backward_tiles(T, T, *HEADS[:2], device_kind)
    keys_per_pass = tiles.keys_per_pass(sizes, scout.head_dim, device_kind)
    traffic = backward_traffic(call, sizes, keys_per_pass)
    assert traffic.full_tiles + traffic.partial_tiles <= 1.07 * visible_scores / (sizes.q_tile * sizes.kv_tile)
    num_blocks = T // 1024
    passes_of_a_query_block = (
        1 if chunk_size else sum(1 + i * 1024 // keys_per_pass for i in range(num_blocks)) / num_blocks
    )
    assert traffic.rows == num_blocks * passes_of_a_query_block * scout.num_kv_heads


@pytest.mark.parametrize("chunk_size", [None, 512])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 7, 1, 6, 2, 5, 3, 4]], ids=["in a row", "dealt out"])
def test_visits_the_blocks_that_the_mask_needs(order, chunk_size):
    """Packed documents and padding, also in the order in which context parallelism deals out their blocks."""
    T, lengths = 2048, (500, 900, 400, 248)
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat([1, 2, 3, 0], lengths)
    labels = [x.reshape(8, 256)[order].reshape(1, T) for x in (positions, positions, segments, segments)]
    mask = np.asarray(visible(*map(jnp.asarray, labels), True, chunk_size))
    call = Call(1, T, T, 1, 1, 128, 2, True, chunk_size, *labels)
    traffic = forward_traffic(call, Tiles(256, 256, 128, 128, 1))
    blocks, tiles = (mask.reshape(T // n, n, T // n, n) for n in (256, 128))
    visits = blocks.any((1, 3)).sum() + (~blocks.any((1, 2, 3))).sum()  # a block that sees nothing is written, too
    assert traffic.full_tiles == tiles.all((1, 3)).sum()
    assert traffic.partial_tiles == (tiles.any((1, 3)) & ~tiles.all((1, 3))).sum()
    assert traffic.visits == visits


@pytest.mark.parametrize("device_kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "unknown"])
@pytest.mark.parametrize("choose", [forward_tiles, backward_tiles])
def test_tiles_are_legal(choose, device_kind):
    for num_heads, num_kv_heads in ((40, 8), (5, 1), (8, 2), (16, 16), (10, 2), (64, 1), (6, 3)):
        for num_queries, num_keys in ((1, 1), (577, 577), (641, 130), (2048, 131_072), (8192, 8192)):
            sizes = choose(num_queries, num_keys, num_heads, num_kv_heads, device_kind)
            assert sizes.q_block % sizes.q_tile == sizes.kv_block % sizes.kv_tile == sizes.kv_tile % 128 == 0
            assert sizes.q_tile % (16 if choose is forward_tiles else 128) == 0
            assert num_kv_heads % sizes.kv_heads == 0
            assert tiles.keys_per_pass(sizes, 128, device_kind) % sizes.kv_block == 0


def test_refuses_with_the_reason():
    q, kv = jnp.ones((1, 8, 4, 64)), jnp.ones((1, 8, 2, 64))
    with pytest.raises(ValueError, match="a Mosaic kernel needs a TPU, this is a cpu"):
        attention(q, kv, kv, implementation="pallas")
    with pytest.raises(ValueError, match="made for head_dim 64, 88, 128, not 32"):
        attention(q[..., :32], kv[..., :32], kv[..., :32], implementation="interpret")
    with pytest.raises(ValueError, match="float32 and bfloat16, not float16"):
        attention(*(x.astype(jnp.float16) for x in (q, kv, kv)), implementation="interpret")


# (B, T, S, N, K, H), arguments of the call, and which of positions and segment ids are given.
SCOUT_8K = (1, 8192, 8192, *HEADS), {"chunk_size": scout.chunk_size}, ""
PACKED_131K = (1, 131_072, 131_072, *HEADS), {}, "positions and segments"
CHUNKED_131K = (1, 131_072, 131_072, *HEADS), {"chunk_size": scout.chunk_size}, "positions"
CACHE_PIECE = (1, 2048, 131_072, *HEADS), {}, "positions and segments"
PICTURES = (16, vision.num_patches, vision.num_patches, *[vision.num_heads] * 2, vision.head_dim), {"causal": False}, ""
HEAD_64 = (2, 2000, 2000, *HEADS[:2], 64), {}, "segments"


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("chip", "case", "dtype"),
    [
        # The longest program, which has every kind of mask and several passes, for every chip; the others for one each.
        *((chip, PACKED_131K, jnp.bfloat16) for chip in CHIPS),
        ("v5e", SCOUT_8K, jnp.bfloat16),
        ("v5e", CACHE_PIECE, jnp.bfloat16),
        ("v6e", CHUNKED_131K, jnp.bfloat16),
        ("tpu7x", PICTURES, jnp.bfloat16),
        ("v5p", HEAD_64, jnp.bfloat16),
        ("v6e", HEAD_64, jnp.float32),
    ],
)
def test_compiles_for_real_chips(chip, case, dtype):
    (B, T, S, N, K, H), arguments, given = case

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((B, *shape), dtype)

    labels = {}
    if "positions" in given:
        labels |= {"q_positions": array(T, dtype=jnp.int32), "kv_positions": array(S, dtype=jnp.int32)}
    if "segments" in given:
        labels |= {"q_segment_ids": array(T, dtype=jnp.int32), "kv_segment_ids": array(S, dtype=jnp.int32)}

    def forward(q, k, v, labels):
        return attention(q, k, v, return_lse=True, implementation="pallas", **arguments, **labels)

    def both(q, k, v, d_out, d_lse, labels):
        return value_and_gradients(q, k, v, d_out, d_lse, "pallas", **arguments, **labels)

    q, kv, cotangents = array(T, N, H), array(S, K, H), (array(T, N, H), array(T, N, dtype=jnp.float32))
    compiled = (
        compile_ahead(forward, one_chip(chip), q, kv, kv, labels)
        if case is CACHE_PIECE
        else compile_ahead(both, one_chip(chip), q, kv, kv, *cotangents, labels)
    )
    memory = compiled.memory_analysis()
    # Head-major copies of the arguments, gradients summed in float32, statistics: nothing that grows with T x S.
    assert memory.temp_size_in_bytes < 4 * (memory.argument_size_in_bytes + memory.output_size_in_bytes)
