"""The Triton kernels of attention, interpreted: the suite that every implementation passes."""

import jax.numpy as jnp
import pytest

from tests.pallas_kernels import test_attention as suite
from tests.pallas_kernels import test_attention_gradients as parts_suite
from tests.pallas_kernels.test_attention import CASES, DTYPES, LAYER, assert_equal_attention, inputs, packed


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, jnp.float32) for case in CASES] + [(case, jnp.bfloat16) for case in ("in any order", "packed")],
)
def test_equals_reference(triton, case, dtype):
    suite.test_equals_reference(triton, case, dtype)


@pytest.mark.parametrize("head_dim", [16, 40, 128])
def test_heads_of_any_width(triton, head_dim):
    arrays = inputs((1, 70, 70, 6, 3, head_dim), jnp.float32)
    results = suite.value_and_gradients(triton, *arrays, chunk_size=50)
    expected = suite.value_and_gradients("reference", *arrays, chunk_size=50)
    assert_equal_attention(results, expected, jnp.float32)


def test_any_documents_and_offsets(triton):
    suite.test_any_documents_and_offsets(triton)


def test_padding_may_hold_anything(triton):
    suite.test_padding_may_hold_anything(triton)


def test_equals_a_loop_over_the_queries(triton):
    suite.test_equals_a_loop_over_the_queries(triton)


@pytest.mark.oracle
def test_equals_torch(triton):
    suite.test_equals_torch(triton)


def test_parts_merge_to_the_whole(triton):
    suite.test_parts_merge_to_the_whole(triton)


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_parts_add_up_to_the_gradient_of_attention(triton, chunk_size):
    parts_suite.test_parts_add_up_to_the_gradient_of_attention(triton, chunk_size, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_a_real_gpu(triton, tiles_of_h100, dtype):
    segments = packed(2, 300)
    arrays = inputs((2, 300, 300, *LAYER[:2], 128), dtype)
    arguments = {"chunk_size": 200, "q_segment_ids": segments, "kv_segment_ids": segments}
    results = suite.value_and_gradients(triton, *arrays, **arguments)
    assert_equal_attention(results, suite.value_and_gradients("reference", *arrays, **arguments), dtype)
