"""The Triton kernel of decode attention, interpreted: the suite that every implementation passes."""

import jax.numpy as jnp
import pytest

from tests.pallas_kernels import test_decode_attention as suite
from tests.pallas_kernels.test_decode_attention import (
    BFLOAT16_CASES,
    CASES,
    Case,
    assert_equal_attention,
    decode,
    inputs,
)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in CASES] + [(name, jnp.bfloat16) for name in BFLOAT16_CASES],
)
def test_equals_reference(triton, name, dtype):
    suite.test_equals_reference(triton, name, dtype)


@pytest.mark.parametrize(
    "name", ["full cache", "ring of several blocks", "ring of pages", "int8", "int8 pages", "shard"]
)
def test_what_no_query_sees_may_be_anything(triton, name):
    suite.test_what_no_query_sees_may_be_anything(triton, name)


@pytest.mark.parametrize("name", ["full cache", "ring", "pages", "ring of pages", "int8 pages"])
def test_any_lengths(triton, name):
    suite.check_any_lengths(triton, 25, name)


@pytest.mark.parametrize("chunk_size", [None, 64])
def test_equals_the_end_of_full_attention(triton, chunk_size):
    suite.test_equals_the_end_of_full_attention(triton, chunk_size)


def test_shards_merge_to_the_whole(triton):
    suite.test_shards_merge_to_the_whole(triton)


@pytest.mark.parametrize(
    "case",
    [
        Case([300, 1, 0], num_queries=2),
        Case([384, 1000, 33], slots=384, page_size=128, chunk_size=384, int8=True),
        Case([320, 63, 129], slots=320, page_size=64, heads_per_kv_head=5),
    ],
    ids=["full cache", "ring of int8 pages", "pages"],
)
def test_tiles_of_a_real_gpu(triton, tiles_of_h100, case):
    arrays, arguments = inputs(case, jnp.bfloat16)
    expected = decode(*arrays, **arguments, implementation="reference")
    assert_equal_attention(decode(*arrays, **arguments, implementation=triton), expected, jnp.bfloat16)
