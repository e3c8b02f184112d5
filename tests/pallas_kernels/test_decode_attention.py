"""Every implementation of decode attention against the specification, and that against plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention, decode_attention
from pallas_kernels.dispatch import implementations
from pallas_kernels.shapes import TEXT_SHAPES
from tests.pallas_kernels.helpers import LIMITS, assert_close, normal

FAST = [name for name in implementations("decode_attention") if name != "reference"]
DTYPES = list(LIMITS)
nano = TEXT_SHAPES["nano-scout"]

# (T, S, chunk_size, lengths): one query or a few, caches that are no multiple of the block, idle rows, new chunks.
CASES = {
    "full cache": (1, 300, None, [300, 1, 0]),
    "block edges": (1, 300, None, [128, 129, 127]),
    "a few queries": (3, 300, None, [2, 130, 300]),
    "one slot": (1, 1, None, [1, 0, 1]),
    "chunks": (1, nano.chunk_size, nano.chunk_size, [32, 33, 1000]),
    "cache shorter than a chunk": (1, 200, 256, [200, 3, 0]),
    "a few queries in a chunk": (2, 300, 300, [302, 450, 1]),
}


@functools.partial(jax.jit, static_argnames=("chunk_size", "implementation"))
def decode(q, k, v, lengths, chunk_size, implementation):
    return decode_attention(q, k, v, lengths, chunk_size=chunk_size, implementation=implementation)


def inputs(T, S, dtype):
    N, K, H = nano.num_heads, nano.num_kv_heads, nano.head_dim
    return normal(0, (3, T, N, H), (3, S, K, H), (3, S, K, H), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("implementation", FAST)
def test_equals_reference(implementation, case, dtype):
    T, S, chunk_size, lengths = case
    arguments = *inputs(T, S, dtype), jnp.array(lengths), chunk_size
    assert_close([decode(*arguments, implementation)], [decode(*arguments, "reference")], dtype)


@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), min_size=3, max_size=3), chunked=st.booleans())
def test_any_lengths(implementation, lengths, chunked):
    arguments = *inputs(1, 140, jnp.float32), jnp.array(lengths), 140 if chunked else None
    if not chunked:
        arguments = *arguments[:3], jnp.minimum(arguments[3], 140), None
    assert_close([decode(*arguments, implementation)], [decode(*arguments, "reference")], jnp.float32)


@pytest.mark.parametrize("chunk_size", [None, 64])
@pytest.mark.parametrize("implementation", implementations("decode_attention"))
def test_equals_the_end_of_full_attention(implementation, chunk_size):
    """A cache filled slot by slot holds what plain attention sees from the last tokens."""
    S, T = 150, 2
    q, k, v = inputs(S, S, jnp.float32)
    expected = attention(q, k, v, chunk_size=chunk_size, implementation="reference")
    for length in (2, 64, 66, 129, 131, 150):
        num_queries = 1 if chunk_size and length % chunk_size == 1 else T
        slots = np.arange(length) if chunk_size is None else np.arange(length) % chunk_size
        caches = [jnp.full((3, chunk_size or S, *x.shape[2:]), jnp.nan).at[:, slots].set(x[:, :length]) for x in (k, v)]
        queries, lengths = q[:, length - num_queries : length], jnp.full(3, length)
        result = decode(queries, *caches, lengths, chunk_size, implementation)
        assert_close([result], [expected[:, length - num_queries : length]], jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_the_cache_is_not_copied(dtype):
    q, cache, lengths = (
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((1, 1, 4, 16), dtype), ((1, 16384, 2, 16), dtype), ((1,), jnp.int32))
    )
    compiled = jax.jit(decode_attention).lower(q, cache, cache, lengths).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * 16384 * 2 * 16 * jnp.dtype(dtype).itemsize
