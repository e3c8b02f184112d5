"""Training in few bits: what enters a matrix product is rounded, the product and everything else stay wide.

fp8: operands to e4m3 and the gradient that comes back to e5m2, each scaled so that its largest magnitude just fits.
Scales are powers of two, so that scaled values are exact in bfloat16: a product of rounded operands, accumulated in
float32, is the FP8 product itself. It is written as convert, multiply, dot: XLA makes FP8 products of that where the
chip has them.

int8 (quantisation-aware training): weights to int8 with a scale for each output channel, inputs with one for each
token, as served after `convert --quantize int8`; gradients stay wide.

Rounding has the gradient of the identity (straight through). A part of an array on a device has a scale of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KINDS = ("fp8", "int8")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class LowPrecision:
    """A weight that trains in few bits; a pytree of the wide weight alone."""

    kernel: Any
    kind: str
    """One of `KINDS`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        return self.kernel.ndim

    def product(
        self,
        multiply: Callable[[Array, Array], Array],
        x: Float[Array, "..."],
        x_axes: tuple[int, ...],
        kernel_axes: tuple[int, ...],
    ) -> Float[Array, "..."]:
        """Returns `multiply(x, kernel)` of rounded operands.

        Args:
            multiply: the product, differentiable.
            x: rows.
            x_axes: axes of x over which the product sums.
            kernel_axes: those of the kernel.
        """
        if self.kind == "int8":
            operands = ((x, x_axes), (self.kernel, kernel_axes))
            return multiply(*(straight_through(round_int8, operand, axes) for operand, axes in operands))
        x, kernel = (straight_through(round_fp8, operand, jnp.float8_e4m3fn) for operand in (x, self.kernel))
        return round_gradient(multiply(x, kernel))


def round_fp8(x: Float[Array, "..."], dtype) -> Float[Array, "..."]:
    """Returns x rounded to `dtype`, an FP8 format, times a power of two; in the dtype of x. NaN if x is not finite."""
    largest = float(jnp.finfo(dtype).max)
    magnitude = jnp.abs(x).max().astype(jnp.float32)
    _, exponent = jnp.frexp(magnitude / largest)  # |x| / largest < 2^exponent
    # Clipping would hide an infinity from those who look for it in gradients.
    scale = jnp.where(jnp.isfinite(magnitude), jnp.ldexp(jnp.float32(1.0), exponent), jnp.nan).astype(x.dtype)
    return jnp.clip(x / scale, -largest, largest).astype(dtype).astype(x.dtype) * scale


def round_int8(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns x rounded to whole multiples of a 127th of the largest magnitude along `axes`; in the dtype of x."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(axes, keepdims=True) / 127, 1e-30)
    return (jnp.round(wide / scale) * scale).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def straight_through(function: Callable, x: Float[Array, "..."], argument: Any) -> Float[Array, "..."]:
    """Returns `function(x, argument)`, whose gradient is taken to be that of the identity."""
    return function(x, argument)


straight_through.defvjp(
    lambda function, x, argument: (function(x, argument), None),
    lambda function, argument, _, cotangent: (cotangent,),
)


@jax.custom_vjp
def round_gradient(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x; the gradient that comes back is rounded to e5m2."""
    return x


round_gradient.defvjp(
    lambda x: (x, None),
    lambda _, cotangent: (round_fp8(cotangent, jnp.float8_e5m2),),
)
