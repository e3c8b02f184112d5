import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import QuantizedArray, quantize
from pallas_kernels.quantized import DTYPES
from tests.pallas_kernels.helpers import normal

# Half a step at the largest magnitude of a block: of 127, of 7, and of fp8's 16 to 18 (three bits of mantissa).
ROUNDING = {jnp.int8: 0.5 / 127, jnp.int4: 0.5 / 7, jnp.float8_e4m3fn: 0.5 / 14}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("axis", "group_size", "scales_shape"),
    [(1, None, (3, 1, 40)), (-2, 16, (3, 4, 40)), (2, 8, (3, 64, 5)), ((0, 1), None, (1, 1, 40))],
)
def test_numbers_are_off_by_half_a_step_at_most(dtype, axis, group_size, scales_shape):
    (array,) = normal(0, (3, 64, 40))
    quantized = quantize(array, dtype, axis, group_size)
    assert quantized.dtype == dtype
    assert quantized.scales.shape == scales_shape
    assert quantized.scales.dtype == jnp.float32
    repeats = [size // count for size, count in zip(array.shape, scales_shape, strict=True)]
    largest = np.abs(array).reshape([n for pair in zip(scales_shape, repeats, strict=True) for n in pair])
    largest = largest.max(axis=(1, 3, 5)).repeat(repeats[0], 0).repeat(repeats[1], 1).repeat(repeats[2], 2)
    error = np.abs(quantized.dequantize(jnp.float32) - array)
    assert (error <= ROUNDING[dtype] * largest * 1.001).all()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_quantizing_again_changes_nothing(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    values = data.draw(st.lists(st.floats(-1e4, 1e4, width=32), min_size=24, max_size=24))
    once = quantize(jnp.array(values, jnp.float32).reshape(6, 4), dtype, axis=0, group_size=3)
    again = quantize(once.dequantize(jnp.float32), dtype, axis=0, group_size=3)
    np.testing.assert_allclose(again.dequantize(jnp.float32), once.dequantize(jnp.float32), rtol=1e-6)


def test_zeros_stay_zeros():
    quantized = quantize(jnp.zeros((4, 8)), jnp.int8, axis=0)
    assert not quantized.dequantize(jnp.bfloat16).any()
    assert quantized.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


def test_stacked_layers_are_scanned_and_sliced_as_a_tree():
    (array,) = normal(0, (3, 16, 8))
    stacked = quantize(array, jnp.int8, axis=1, group_size=4)
    second = jax.tree.map(lambda leaf: leaf[1], stacked)
    assert isinstance(second, QuantizedArray)
    assert (second.shape, second.ndim) == ((16, 8), 2)
    np.testing.assert_array_equal(second.dequantize(jnp.float32), stacked.dequantize(jnp.float32)[1])
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, layer.dequantize(jnp.float32)), None, stacked)
    np.testing.assert_array_equal(scanned, stacked.dequantize(jnp.float32))


def test_trees_may_hold_specs_and_shapes():
    quantized = jax.eval_shape(lambda array: quantize(array, jnp.int4, axis=0), jnp.ones((8, 4)))
    assert (quantized.shape, quantized.scales.shape) == ((8, 4), (1, 4))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = QuantizedArray(jax.P(None, "x"), jax.P(None, "x"))
    array = quantize(jnp.ones((8, 4)), jnp.int8, axis=0)
    out = jax.shard_map(lambda a: a.dequantize(jnp.float32), mesh=mesh, in_specs=(specs,), out_specs=jax.P(None, "x"))
    np.testing.assert_allclose(jax.jit(out)(array), np.ones((8, 4)))


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="cannot quantize to int16; choose one of int8, int4, float8_e4m3fn"):
        quantize(jnp.ones((8, 4)), jnp.int16, axis=0)
    with pytest.raises(ValueError, match="groups of 3 do not divide axis 0"):
        quantize(jnp.ones((8, 4)), jnp.int8, axis=0, group_size=3)
    with pytest.raises(ValueError, match="groups of 2 do not divide axis"):
        quantize(jnp.ones((8, 4)), jnp.int8, axis=(0, 1), group_size=2)
