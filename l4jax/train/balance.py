"""Load balance: a bias on the router's choice that follows the load, or the classical auxiliary losses.

Meta published no method. The bias, our default, is that of DeepSeek-V3 (arXiv 2408.15664), as torchtitan has it: an
expert with less than its share of the tokens is preferred a little more in the next step. It moves the choice alone,
never the score, so no gradient flows through it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l4jax.model.moe import Routing


def update_router_bias(
    bias_LE: Float[Array, "L E"], load_LE: Int[Array, "L E"] | None, rate: float | Float[Array, ""]
) -> Float[Array, "L E"]:
    """Returns `bias + rate * sign(mean load - load)`, re-centred so that each layer's biases add up to 0.

    Without a load, in a dense model, there is nothing to balance.
    """
    if load_LE is None:
        return bias_LE
    load_LE = load_LE.astype(jnp.float32)
    bias_LE = bias_LE + rate * jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
    return bias_LE - bias_LE.mean(axis=-1, keepdims=True)


def balance_loss(routing: Routing) -> Float[Array, ""]:
    """Returns the Switch Transformer's loss (arXiv 2101.03961, eq. 4), the mean over layers: 1 in balance.

    E times the sum over experts of the share of rows taken and the mean share of the scores, which here are sigmoids
    divided by their sum.
    """
    taken_LE = routing.load / jnp.maximum(routing.load.sum(axis=-1, keepdims=True), 1)
    wanted_LE = routing.importance / jnp.maximum(routing.importance.sum(axis=-1, keepdims=True), 1e-20)
    return (taken_LE * wanted_LE).sum(axis=-1).mean() * taken_LE.shape[-1]


def z_loss(routing: Routing) -> Float[Array, ""]:
    """Returns the mean over tokens and layers of the squared log-sum-exp of the router's logits (arXiv 2202.08906)."""
    return (routing.z / jnp.maximum(routing.importance.sum(axis=-1), 1e-20)).mean()
