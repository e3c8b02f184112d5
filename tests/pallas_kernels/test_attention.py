"""Every implementation of attention, forward and gradients through both results, against the specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels import attention, merge_partial_attention
from pallas_kernels.attention import tiles
from pallas_kernels.attention.blocks import FULL, HIDDEN, make_labels
from pallas_kernels.attention.xla import block_kinds, block_sizes
from pallas_kernels.dispatch import implementations
from pallas_kernels.shapes import TEXT_SHAPES, VISION_SHAPES
from tests.pallas_kernels.helpers import LIMITS, assert_close, normal, relative_error

# "pallas" needs a TPU: test_attention_tpu.py compiles it. "interpret" runs the same kernels here.
ALL = [name for name in implementations("attention") if name != "pallas"]
FAST = [name for name in ALL if name != "reference"]
DTYPES = list(LIMITS)
RNG = np.random.default_rng(0)


def ids(*shape, high=3):
    return jnp.asarray(RNG.integers(0, high, shape), jnp.int32)


def positions(*shape):
    return jnp.asarray(RNG.permuted(np.broadcast_to(np.arange(2 * shape[1])[: shape[1]], shape), axis=1), jnp.int32)


def packed(*shape):
    return jnp.sort(ids(*shape, high=4), axis=1)


# (B, T, S, N, K, H), then the arguments. 150 is no multiple of any block. The TPU kernels take heads of width 64.
nano, vision = TEXT_SHAPES["nano-scout"], VISION_SHAPES["nano-vision"]
LAYER = (nano.num_heads, nano.num_kv_heads, 64)
CASES = {
    "causal": ((2, 150, 150, *LAYER), {}),
    "chunked": ((2, 150, 150, *LAYER), {"chunk_size": nano.chunk_size}),
    "packed": ((2, 150, 150, *LAYER), {"q_segment_ids": (s := packed(2, 150)), "kv_segment_ids": s}),
    "in any order": (
        (2, 150, 150, 6, 2, 64),
        {
            "chunk_size": 37,
            "q_positions": positions(2, 150),
            "kv_positions": positions(2, 150),
            "q_segment_ids": ids(2, 150),
            "kv_segment_ids": ids(2, 150),
        },
    ),
    "pictures": (
        (2, 4 * vision.num_patches, 4 * vision.num_patches, vision.num_heads, vision.num_heads, 88),
        {"causal": False},
    ),
    "against a cache": (
        (2, 40, 150, *LAYER),
        {
            "scale": 0.3,
            "q_positions": jnp.arange(90, 130) + jnp.zeros((2, 1), jnp.int32),
            "q_segment_ids": jnp.ones((2, 40), jnp.int32),
            "kv_segment_ids": (jnp.arange(150) < jnp.array([[90], [0]])).astype(jnp.int32),
        },
    ),
    "one query, one key": ((1, 1, 1, 4, 4, 128), {}),
    "no chunk in common": ((1, 9, 9, *LAYER), {"chunk_size": 4, "q_positions": jnp.arange(20, 29)[None]}),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, no_races):
    """Gives the interpreted kernels several blocks and tiles, of heads too."""
    monkeypatch.setattr(tiles, "forward_tiles", lambda *_: tiles.Tiles(128, 256, 128, 128, 1))
    monkeypatch.setattr(tiles, "backward_tiles", lambda *_: tiles.Tiles(256, 128, 128, 128, 2))


@functools.partial(jax.jit, static_argnames=("implementation", "causal", "chunk_size", "scale"))
def value_and_gradients(implementation, qkv, cotangents, **arguments):
    def function(q, k, v):
        return attention(q, k, v, implementation=implementation, return_lse=True, **arguments)

    (out, lse), backward = jax.vjp(function, *qkv)
    return out, lse, *backward(cotangents)


def inputs(shape, dtype, seed=0):
    B, T, S, N, K, H = shape
    q, k, v, d_out = normal(seed, (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H), dtype=dtype)
    return (q, k, v), (d_out, *normal(seed + 1, (B, T, N)))


def assert_equal_attention(results, expected, dtype):
    seen = np.asarray(expected[1] > -jnp.inf)
    np.testing.assert_array_equal(np.asarray(results[1] > -jnp.inf), seen)
    masked = [(r[0], jnp.where(seen, r[1], 0.0), *r[2:]) for r in (results, expected)]
    assert_close(*masked, dtype)
    assert not np.asarray(results[0])[~seen].any()


# Interpreting takes seconds, so bfloat16 goes through the cases with every kind of mask only.
COMBINATIONS = [
    (implementation, case, dtype)
    for implementation in FAST
    for case in CASES
    for dtype in DTYPES
    if implementation != "interpret" or dtype == jnp.float32 or case in ("in any order", "packed")
]


@pytest.mark.parametrize(("implementation", "case", "dtype"), COMBINATIONS)
def test_equals_reference(implementation, case, dtype):
    shape, arguments = CASES[case]
    arrays = inputs(shape, dtype)
    results = value_and_gradients(implementation, *arrays, **arguments)
    assert_equal_attention(results, value_and_gradients("reference", *arrays, **arguments), dtype)


@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_documents_and_offsets(implementation, data):
    num_queries, num_keys = 140, 200
    cuts = st.lists(st.integers(0, num_keys), min_size=3, max_size=3).map(sorted)

    def segments(length):  # padding on both sides of two documents
        a, b, c = data.draw(cuts)
        index = jnp.arange(length)
        return ((index >= a) * (1 + (index >= b)) * (index < c)).astype(jnp.int32)[None]

    arguments = {
        "chunk_size": 32,
        "q_positions": jnp.arange(num_queries)[None] + data.draw(st.integers(-5, 200)),
        "kv_positions": jnp.arange(num_keys)[None] + data.draw(st.integers(-5, 200)),
        "q_segment_ids": segments(num_queries),
        "kv_segment_ids": segments(num_keys),
    }
    arrays = inputs((1, num_queries, num_keys, *LAYER), jnp.float32)
    results = value_and_gradients(implementation, *arrays, **arguments)
    assert_equal_attention(results, value_and_gradients("reference", *arrays, **arguments), jnp.float32)


@pytest.mark.parametrize("implementation", ALL)
def test_padding_may_hold_anything(implementation):
    segments = jnp.array([[0] * 10 + [1] * 80 + [2] * 40 + [0] * 20])
    (q, k, v), cotangents = inputs((1, 150, 150, *LAYER), jnp.float32)
    arguments = {"chunk_size": 32, "q_segment_ids": segments, "kv_segment_ids": segments}
    poison = jnp.where(segments == 0, jnp.nan, 1.0)[..., None, None]
    results = value_and_gradients(implementation, (q * poison, k * poison, v * poison), cotangents, **arguments)
    for a, b in zip(results, value_and_gradients(implementation, (q, k, v), cotangents, **arguments), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", ALL)
def test_equals_a_loop_over_the_queries(implementation):
    (q, k, v), _ = inputs((1, 9, 9, *LAYER), jnp.float32)
    segments = np.array([1, 1, 1, 1, 1, 1, 2, 2, 0])
    place = np.array([0, 1, 2, 3, 4, 5, 0, 1, 0])
    ids = {"q_segment_ids": jnp.array(segments)[None], "kv_segment_ids": jnp.array(segments)[None]}
    at = {"q_positions": jnp.array(place)[None], "kv_positions": jnp.array(place)[None]}
    result = attention(q, k, v, chunk_size=4, implementation=implementation, **ids, **at)
    for t in range(9):
        seen = [s for s in range(9) if segments[s] == segments[t] != 0 and place[t] // 4 * 4 <= place[s] <= place[t]]
        for head in range(4):
            expected = np.zeros(64)
            if seen:
                weights = np.exp(np.float64(k[0, seen, head // 2]) @ np.float64(q[0, t, head]) / np.sqrt(64))
                expected = weights @ np.float64(v[0, seen, head // 2]) / weights.sum()
            np.testing.assert_allclose(result[0, t, head], expected, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("implementation", ALL)
def test_equals_torch(implementation):
    import torch

    (q, k, v), (d_out, d_lse) = inputs((2, 150, 150, *LAYER), jnp.float32)
    tensors = [torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    index = torch.arange(150)
    mask = (index[:, None] >= index) & (index[:, None] // 32 == index // 32)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
    expected.backward(torch.tensor(np.asarray(d_out)).transpose(1, 2))
    out, _, *gradients = value_and_gradients(implementation, (q, k, v), (d_out, 0 * d_lse), chunk_size=32)
    for a, b in zip((out, *gradients), (expected.detach(), *(x.grad for x in tensors)), strict=True):
        assert relative_error(a, b.transpose(1, 2).numpy()) <= 1e-5


@pytest.mark.parametrize("implementation", ALL)
def test_parts_merge_to_the_whole(implementation):
    (q, k, v), _ = inputs((1, 20, 60, *LAYER), jnp.float32)
    attend = functools.partial(attention, causal=False, return_lse=True, implementation=implementation)
    whole = attend(q, k, v)
    nothing = attend(q, k[:, :0], v[:, :0])
    parts = [attend(q, k[:, :25], v[:, :25]), nothing, attend(q, k[:, 25:], v[:, 25:])]
    assert_close(merge_partial_attention(*zip(*parts, strict=True)), whole, jnp.float32)
    out, lse = merge_partial_attention([nothing[0]] * 2, [nothing[1]] * 2)
    assert not out.any()
    assert (lse == -jnp.inf).all()


def count_blocks(T, chunk_size=None, segments=None):
    q_block, kv_block = block_sizes(T, T, 8, jnp.dtype("float32"))
    labels = make_labels((1, T, T), None, None, segments, segments, True, chunk_size)
    kinds = np.asarray(block_kinds(*labels, q_block, kv_block))
    return q_block, kv_block, kinds


def test_chunked_layers_visit_their_own_chunk_only():
    T, chunk_size = 131_072, 8192
    q_block, kv_block, kinds = count_blocks(T, chunk_size)
    keys_read = (kinds != HIDDEN).sum() * kv_block
    ideal = sum(start % chunk_size + q_block for start in range(0, T, q_block))
    assert keys_read == ideal
    # Only the diagonal needs a mask: the two key blocks beside each query block.
    assert (kinds == FULL).sum() * kv_block == ideal - T


def test_packed_documents_do_not_visit_one_another():
    segments = jnp.repeat(jnp.array([[1, 2, 0, 0]]), 256, axis=1)
    _, _, kinds = count_blocks(1024, segments=segments)
    visited = kinds != HIDDEN
    assert visited.sum() == 2 * (2 + 4)  # two query blocks a document: the first sees 2 key blocks, the second 4
    assert not visited[:, 4:].any()


def test_no_square_array_is_made():
    T, (N, K, H) = 4096, LAYER
    q, kv = (jax.ShapeDtypeStruct((1, T, heads, H), jnp.float32) for heads in (N, K))

    def total(q, k, v):
        return attention(q, k, v, implementation="xla").sum()

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, kv, kv).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T
