"""What becomes of the float32 products of a block before it is stored: element-wise, the same on every chip."""

import jax
from jax import Array


def itself(product: Array) -> list[Array]:
    return [product]


def swiglu(gate: Array, up: Array) -> list[Array]:
    return [jax.nn.silu(gate) * up]


def swiglu_and_parts(gate: Array, up: Array) -> list[Array]:
    return [*swiglu(gate, up), gate, up]


def add(first: Array, second: Array) -> list[Array]:
    return [first + second]
