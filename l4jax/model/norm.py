"""Normalisations, with float32 statistics. The RMS norm casts back *before* its weight applies, as in HF and Meta."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l4jax.model.linear import constant


def rms_normalize(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + epsilon) over the last dimension, in float32, cast back to the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, epsilon: float, *, dtype):
        self.epsilon = epsilon
        self.scale = constant(1.0, (width,), ("embed",), dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_normalize(x, self.epsilon) * self.scale[...]


class LayerNorm(nnx.Module):
    """Mean and variance over the last dimension, with weight and bias (vision tower)."""

    def __init__(self, width: int, epsilon: float, *, dtype):
        self.epsilon = epsilon
        self.scale = constant(1.0, (width,), ("embed",), dtype)
        self.bias = constant(0.0, (width,), ("embed",), dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        # torch applies weight and bias before it rounds.
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
