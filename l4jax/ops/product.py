"""The products of dense layers: one einsum, which on a CPU takes few rows another way."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from l4jax.sharding import axis_sizes
from pallas_kernels import few_rows
from pallas_kernels.dispatch import target


def product(equation: str, x: Float[Array, "..."], kernel: Array) -> Float[Array, "..."]:
    """Returns the einsum of x and a kernel, float32.

    Args:
        equation: for example "BTD,DNH->BTNH".
        kernel: in the dtype of x, or in smaller numbers.
    """
    of_x, of_kernel, of_y = equation.replace("->", ",").split(",")
    num_summed = sum(letter not in of_y for letter in of_x)
    leading, summed = of_x[:-num_summed], of_x[-num_summed:]
    is_matrix = of_kernel.startswith(summed) and of_y == leading + of_kernel.removeprefix(summed)
    rows, width = x.shape[: len(leading)], kernel.shape[num_summed:]
    on_one_cpu = target().platform == "cpu" and math.prod(axis_sizes().values()) == 1
    if on_one_cpu and is_matrix and math.prod(rows) <= few_rows.FEW:
        depth = math.prod(kernel.shape[:num_summed])
        return few_rows.dot(x.reshape(-1, depth), kernel.reshape(depth, -1)).reshape(*rows, *width)
    kernel = kernel.astype(x.dtype) if kernel.dtype.itemsize < x.dtype.itemsize else kernel
    return jnp.einsum(equation, x, kernel, preferred_element_type=jnp.float32)
