"""The Triton kernels of the routed expert matmuls, interpreted: the suite that every implementation passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels import QuantizedArray
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.gpu import most_blocks
from tests.pallas_kernels import test_grouped_matmul as suite
from tests.pallas_kernels.helpers import assert_close
from tests.pallas_kernels.test_grouped_matmul import DTYPES, GROUP_SIZES, OPS, inputs, value_and_gradients


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, jnp.float32) for case in GROUP_SIZES] + [(case, jnp.bfloat16) for case in ("uneven", "one row")],
)
@pytest.mark.parametrize("op", OPS)
def test_equals_reference(triton, op, case, dtype):
    suite.test_equals_reference(op, triton, dtype, case)


@pytest.mark.parametrize(("op", "D", "F"), [("grouped_matmul", 160, 96), ("grouped_swiglu", 72, 490)])
def test_several_tiles_of_everything(triton, op, D, F):
    arguments = inputs(op, 168, [37, 0, 66, 60], jnp.float32, D, F)
    results = value_and_gradients(op, triton, *arguments)
    assert_close(results, value_and_gradients(op, "reference", *arguments), jnp.float32)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_group_sizes(triton, op, data):
    suite.check_any_group_sizes(triton, op, data)


SCHEMES = [
    ("grouped_matmul", jnp.int8, 128),
    ("grouped_matmul", jnp.int4, None),
    ("grouped_matmul", jnp.float8_e4m3fn, None),
    ("grouped_swiglu", jnp.int8, None),
    ("grouped_swiglu", jnp.int4, 128),
]


@pytest.mark.parametrize(("op", "dtype", "group_size"), SCHEMES)
def test_quantized_weights_equal_dequantized_ones(triton, op, dtype, group_size):
    suite.test_quantized_weights_equal_dequantized_ones(triton, op, dtype, group_size)


@pytest.mark.parametrize(("op", "dtype", "group_size"), SCHEMES)
def test_quantized_weights_in_tiles_of_a_real_gpu(triton, tiles_of_h100, op, dtype, group_size):
    suite.test_quantized_weights_equal_dequantized_ones(triton, op, dtype, group_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("group_sizes", [[3, 0, 1, 2], [150, 0, 203, 20]], ids=["decode", "prefill"])
def test_tiles_of_a_real_gpu(triton, tiles_of_h100, op, dtype, group_sizes):
    arguments = inputs(op, sum(group_sizes) + 4, group_sizes, dtype, 160, 300)
    results = value_and_gradients(op, triton, *arguments)
    assert_close(results, value_and_gradients(op, "reference", *arguments), dtype)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_layer_of_stacked_weights(triton, op, quantized):
    suite.test_a_layer_of_stacked_weights(triton, op, quantized)


def test_a_layer_of_a_stack_that_triton_cannot_address():
    """8-bit numbers of 2 to 4 GiB: the layer is taken out of the stack first."""
    stack = QuantizedArray(
        jax.ShapeDtypeStruct((3, 8, 8192, 16384), jnp.int8), jax.ShapeDtypeStruct((3, 8, 1, 16384), jnp.float32)
    )
    assert jax.eval_shape(gpu._stack, stack, jnp.int32(1)).weights_mDF.shape == (8, 8192, 16384)
    assert jax.eval_shape(gpu._stack, jax.tree.map(half, stack), jnp.int32(1)).weights_mDF.shape == (24, 8192, 8192)


def half(leaf):
    return jax.ShapeDtypeStruct((*leaf.shape[:-1], leaf.shape[-1] // 2), leaf.dtype)


@pytest.mark.parametrize("op", OPS)
def test_shards_of_experts_add_up_to_the_whole(triton, op):
    suite.test_shards_of_experts_add_up_to_the_whole(triton, op)


def test_shards_of_experts_under_shard_map(triton):
    suite.test_shards_of_experts_under_shard_map(triton)


@pytest.mark.parametrize("op", OPS)
def test_rows_of_nobody_may_hold_anything(triton, op):
    suite.test_rows_of_nobody_may_hold_anything(triton, op)


def test_equals_a_loop_over_the_rows(triton):
    suite.test_equals_a_loop_over_the_rows(triton)


@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.integers(0, 90), st.sampled_from([16, 64]))
def test_there_are_never_more_blocks_than_programs(group_sizes, rest, size):
    num_blocks = sum(-(-np.array([*group_sizes, rest]) // size))
    assert num_blocks <= most_blocks(sum(group_sizes) + rest, len(group_sizes), size)
