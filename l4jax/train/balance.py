"""Load balance without an auxiliary loss: a bias on the router's choice that follows the load.

Meta published no method. This is the one of DeepSeek-V3 (arXiv 2408.15664), as torchtitan has it: an expert with less
than its share of the tokens is preferred a little more in the next step. The bias moves the choice alone, never the
score, so no gradient flows through it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def update_router_bias(
    bias_LE: Float[Array, "L E"], load_LE: Int[Array, "L E"] | None, rate: float
) -> Float[Array, "L E"]:
    """Returns `bias + rate * sign(mean load - load)`, re-centred so that each layer's biases add up to 0.

    Without a load, in a dense model, there is nothing to balance.
    """
    if load_LE is None:
        return bias_LE
    load_LE = load_LE.astype(jnp.float32)
    bias_LE = bias_LE + rate * jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
    return bias_LE - bias_LE.mean(axis=-1, keepdims=True)
