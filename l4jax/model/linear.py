"""Parameters and the one einsum that every projection goes through."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l4jax import ops


def param(rngs: nnx.Rngs, shape, axes: tuple[str | None, ...], dtype, *, fan_in: int) -> nnx.Param:
    """A weight drawn from a normal distribution with variance 1 / `fan_in`; `axes` are its logical axes."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(fan_in)
    return nnx.Param(value.astype(dtype), axes=axes)


def constant(value: float, shape, axes: tuple[str | None, ...], dtype) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)


def einsum(equation: str, x: Float[Array, "..."], kernel: Any, dtype=None) -> Float[Array, "..."]:
    """`jnp.einsum` that accumulates in float32 and returns `dtype`, by default that of `x`.

    Args:
        kernel: an array; a `QuantizedArray` with one scale for each output channel, which is a constant; or a weight
            that trains in `LowPrecision`.
    """
    if isinstance(kernel, ops.LowPrecision):
        of_x, _, of_y = equation.replace("->", ",").split(",")
        summed = tuple(i - len(of_x) for i, letter in enumerate(of_x) if letter not in of_y)
        axes = contracted_axes(equation, kernel.ndim)
        return kernel.product(lambda x, kernel: _einsum(equation, x, kernel, dtype), x, summed, axes)
    if not isinstance(kernel, ops.QuantizedArray):
        return _einsum(equation, x, kernel, dtype)
    scales = jnp.squeeze(kernel.scales, contracted_axes(equation, kernel.ndim))
    return (ops.product(equation, x, kernel.values) * scales).astype(dtype or x.dtype)


def contracted_axes(equation: str, ndim: int) -> tuple[int, ...]:
    """Returns the axes of a kernel, possibly stacked, over which an equation sums."""
    kernel, output = equation.split(",")[1].split("->")
    return tuple(ndim - len(kernel) + i for i, letter in enumerate(kernel) if letter not in output)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(equation: str, x: Float[Array, "..."], kernel: Float[Array, "..."], dtype) -> Float[Array, "..."]:
    """The same for an array.

    Its gradients are einsums too, in the letters of the equation: jax would build the kernel's the other way round and
    transpose it, for which XLA:CPU copies the whole cotangent (three times slower for a large vocabulary).
    """
    return ops.product(equation, x, kernel).astype(dtype or x.dtype)


def _einsum_forward(equation, x, kernel, dtype):
    return _einsum(equation, x, kernel, dtype), (x, kernel)


def _einsum_backward(equation, dtype, operands, cotangent):
    x, kernel = operands
    of_x, of_kernel, of_y = equation.replace("->", ",").split(",")
    cotangent = cotangent.astype(x.dtype)
    d_x = jnp.einsum(f"{of_y},{of_kernel}->{of_x}", cotangent, kernel, preferred_element_type=jnp.float32)
    d_kernel = jnp.einsum(f"{of_x},{of_y}->{of_kernel}", x, cotangent, preferred_element_type=jnp.float32)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)


class Linear(nnx.Module):
    """`einsum(equation, x, kernel) (+ bias)`, for example `"BTD,DNH->BTNH"` with a kernel of shape [D, N, H]."""

    def __init__(self, equation: str, shape, axes, *, use_bias: bool = False, rngs: nnx.Rngs, dtype):
        self.equation = equation
        kernel, output = equation.split(",")[1].split("->")
        fan_in = math.prod(size for letter, size in zip(kernel, shape, strict=True) if letter not in output)
        self.kernel = param(rngs, shape, axes, dtype, fan_in=fan_in)
        kept = [i for i, letter in enumerate(kernel) if letter in output]
        bias_shape, bias_axes = [shape[i] for i in kept], tuple(axes[i] for i in kept)
        self.bias = constant(0.0, bias_shape, bias_axes, dtype) if use_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = einsum(self.equation, x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias[...]
