"""What the suites of all ops share: random arrays, the measure of error, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np

# Relative Frobenius error against the float32 reference. bfloat16 keeps 8 bits: 2**-8 = 4e-3 for each rounding.
LIMITS = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


def normal(seed: int, *shapes, dtype=jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype) for shape in shapes]


def relative_error(result, expected) -> float:
    result, expected = np.asarray(result, np.float32), np.asarray(expected, np.float32)
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(result - expected) / (size if size else 1.0))


def assert_close(results, expected, dtype) -> None:
    for index, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert relative_error(a, b) <= LIMITS[dtype], f"result {index}"
