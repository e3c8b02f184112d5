"""Products of a few rows against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.model.linear import einsum
from pallas_kernels import few_rows
from pallas_kernels.quantized import quantize


@pytest.mark.parametrize("small", [None, jnp.int8, jnp.int4, jnp.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("depth", [256, 200])
@pytest.mark.parametrize("num_rows", [1, 2, few_rows.FEW + 1])
def test_a_product_equals_numpys(num_rows, depth, dtype, small):
    rows = jax.random.normal(jax.random.key(0), (num_rows, depth)).astype(dtype)
    matrix = (jax.random.normal(jax.random.key(1), (depth, 48)) * 3).astype(small or dtype)
    product = jax.jit(few_rows.dot)(rows, matrix)
    assert product.dtype == jnp.float32
    expected = np.asarray(rows, np.float64) @ np.asarray(matrix, np.float64)
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-4)  # sums of 256 products of about 3, float32


@pytest.mark.parametrize(
    ("equation", "shape", "kernel_shape", "axes"),
    [
        ("BTD,DNH->BTNH", (1, 1, 256), (256, 2, 8), 0),
        ("BTNH,NHD->BTD", (2, 1, 4, 64), (4, 64, 24), (0, 1)),
        ("BTD,DF->BTF", (1, 3, 256), (256, 24), 0),
    ],
)
def test_a_linear_of_few_rows_is_its_einsum(equation, shape, kernel_shape, axes):
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), kernel_shape)
    few = quantize(kernel, jnp.int8, axes)
    for given, whole in ((kernel, kernel), (few, few.dequantize(jnp.float32))):
        expected = np.einsum(equation, np.asarray(x, np.float64), np.asarray(whole, np.float64))
        np.testing.assert_allclose(einsum(equation, x, given), expected, rtol=1e-5, atol=1e-4)
    gradient = jax.grad(lambda x: einsum(equation, x, few).sum())(x)
    expected = jax.grad(lambda x: jnp.einsum(equation, x, few.dequantize(jnp.float32)).sum())(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-4)
