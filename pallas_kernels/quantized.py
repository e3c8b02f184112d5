"""Arrays in few bits: small integers and the scales that turn them back into numbers."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """An array stored as `values * scales`; a pytree of these two.

    Fields are untyped because trees also hold specs, shardings and shapes in place of arrays. A cache of keys or values
    has int8 values [B, S, K, H] and one float32 scale per slot and head, [B, S, K, 1].
    """

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def dequantize(self, dtype: jnp.dtype) -> Array:
        """Returns the array itself; the product is rounded once, from float32."""
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)


def quantize_heads(x: Float[Array, "*tokens K H"]) -> QuantizedArray:
    """Returns keys or values in int8 with one scale per token and head: the largest number becomes 127."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), -1, keepdims=True)
    scales = jnp.where(largest > 0, largest / 127, 1.0)
    return QuantizedArray(jnp.round(x / scales).astype(jnp.int8), scales)
